"""Whether the hardware computes in bfloat16."""

from __future__ import annotations

import functools
import time

import torch
from torch import nn


@functools.cache
def has_bfloat16() -> bool:
    """Whether the device of the training computes in bfloat16 without emulation. It depends on the hardware only."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator().type != "mps"
    # torch has private functions for it, which differ between releases
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


@functools.cache
def bfloat16_ratio(seconds: float = 1.0) -> float:
    """Time of a small convolution (forward and backward) on this CPU in bfloat16, divided by that in float32. Measured for about a second."""
    with torch.random.fork_rng(devices=[]):
        network = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
        images = torch.randn(16, 32, 16, 16)

    def run(half: bool) -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = network(images).float().mean()
        loss.backward()
        return time.perf_counter() - start

    taken: dict[bool, list[float]] = {True: [], False: []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[True]) < 3:
        for half, times in taken.items():
            times.append(run(half))
    # the fastest run of each, because other load can only make a run slower
    return min(taken[True]) / min(taken[False])


def prefers_channels_last(network: nn.Module, half: bool) -> bool:
    """Whether training is faster with weights channels last in memory: true for convolutional networks in half precision."""
    return half and sum(isinstance(module, nn.Conv2d) for module in network.modules()) > 1
