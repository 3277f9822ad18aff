"""Exponential moving averages (EMA) of a network's weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_mixup.networks.families import main_input_of

HALF = (torch.bfloat16, torch.float16)


class Average(nn.Module):
    """An exponential moving average of the weights of a network, for `ema_decay` and for the teachers of learned mixers.

    Weights in half precision are averaged in float32. In half precision small steps round to 0, and the average would never change.

    Attributes:
        network: the average, a copy of the network without gradients. It is evaluated and saved like any other network. It may lack parts
            of the network; those parts are not averaged.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        if any(value.dtype in HALF for value in self.network.parameters()):
            self.network.float()

    @property
    def main_input_name(self) -> str:
        return main_input_of(self.network)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Average:
        """What `to`, `half` and `bfloat16` call: floats stay float32."""

        def kept(value: Tensor) -> Tensor:
            made = fn(value)
            return value.to(made.device) if value.dtype is torch.float32 and made.dtype in HALF else made

        return super()._apply(kept, recurse)

    @torch.no_grad()
    def follow(self, network: nn.Module, momentum: float, *, buffers: bool) -> None:
        """Updates the parameters: `average = momentum * average + (1 - momentum) * network`.

        Buffers, such as the running statistics of batch norms, are copied if `buffers` is set. Otherwise the average keeps its own.
        """
        given, own = dict(network.named_parameters()), dict(self.network.named_parameters())
        averages = [*own.values()]
        theirs = [given[name].to(average.dtype) for name, average in own.items()]
        torch._foreach_lerp_(averages, theirs, 1 - momentum)
        if buffers:
            for average, buffer in zip(self.network.buffers(), network.buffers(), strict=True):
                average.copy_(buffer)

    def forward(self, **inputs: Any) -> Any:
        """Forward pass of the average; floating-point inputs are converted to its dtype."""
        dtype = next(self.network.parameters()).dtype
        return self.network(
            **{
                name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
                for name, value in inputs.items()
            }
        )


# -- schedules of the momentum: functions of the step, so they need no state ------------------------------------


def rising_decay(decay: float, step: int, rising: float) -> float:
    """The decay after `step` optimizer steps: during the first `rising` steps it rises from 0.9 `decay` to `decay`."""
    return decay * (0.9 + 0.1 * min(1.0, (step + 1) / rising) if rising else 1.0)


def ema_momentum(step: int, total_steps: int, start: float, end: float, scope: float, warmup: bool) -> float:
    """A teacher's momentum after `step` optimizer steps: `start` for the share `scope` of the run, then a cosine to `end`.

    As in OpenMixup, the cosine covers the whole run, so the momentum jumps at `scope` to the cosine's current value. With `warmup` it is
    `(1 + step) / (10 + step)` until that reaches `start`: for 0.999, the first 9,000 steps.
    """
    if warmup and start < 1 and (1 + step) / (10 + step) < start:
        return (1 + step) / (10 + step)
    if start >= end or total_steps == 0 or step < scope * total_steps:
        return start
    return end - (end - start) * (1 + math.cos(math.pi * step / total_steps)) / 2
