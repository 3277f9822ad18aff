"""The base of all signals, and tools to read networks without changing them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_mixup.core.policy import Policy, Signals
from hf_mixup.networks.passes import Tap


class Signal(ABC):
    """One kind of evidence. Subclasses are either an `EarlySignal` or a `LateSignal`.

    Raises ValueError if the network cannot give it.

    Args:
        network: the image classifier that gives it: the one in training, or the policy's frozen teacher.
        policy: the policy that reads it.

    Attributes:
        modules: modules of the network that are watched.
        of_classes: True if the signal depends on which class each output of the network is.
    """

    modules: Sequence[nn.Module] = ()
    of_classes: bool = False

    @abstractmethod
    def __init__(self, network: nn.Module, policy: Policy): ...


class EarlySignal(Signal):
    """A signal of the clean images, computed before the plan."""

    @abstractmethod
    def take(self, images: Tensor, targets: Tensor, signals: Signals) -> Tensor:
        """`images` (B, C, H, W), `targets` (B, num_labels). `signals` holds the earlier ones; only its `loss` may be changed."""


class LateSignal(Signal):
    """A signal of the forward pass of the mixed images."""

    @abstractmethod
    def taps(self, size: tuple[int, int]) -> list[Tap]:
        """The taps of that pass, for images of `size` (H, W)."""

    @abstractmethod
    def value(self, seen: list[Tensor]) -> Tensor:
        """The signal, from the values that the taps read."""


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Context manager: the network in evaluation mode, so batch statistics and dropout streams stay. Every module's mode is restored."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        # some releases reuse the half-precision weights that autocast cached in a pass without gradients, and the training pass then
        # gives those weights no gradients
        torch.clear_autocast_cache()


@contextmanager
def with_input_gradient(network: nn.Module) -> Iterator[None]:
    """Inside, the input may have a gradient in training too: networks for waveforms ask for one themselves, which torch forbids for what has it."""
    asking = [module for module in network.modules() if getattr(module, "_requires_grad", False) is True]
    try:
        for module in asking:
            module._requires_grad = False
        yield
    finally:
        for module in asking:
            module._requires_grad = True


@contextmanager
def reading(network: nn.Module) -> Iterator[None]:
    """Context manager: the network in evaluation mode, without gradients."""
    with torch.no_grad(), evaluating(network):
        yield


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Context manager for FSDP2, which shards parameters again after every backward pass: inside it, a backward pass within a forward pass
    does not.

    `model` is the root of that forward pass. Without FSDP2 nothing happens.
    """
    sharded = False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        sharded = isinstance(model, FSDPModule)
    if sharded:
        model.set_reshard_after_backward(False)
        model.set_is_last_backward(False)
    try:
        yield
    finally:
        if sharded:
            model.set_reshard_after_backward(True)
            model.set_is_last_backward(True)


def resized(images: Tensor, size: int | None) -> Tensor:
    """The images resized to `size` pixels a side; unchanged if `size` is None."""
    if size is None or tuple(images.shape[2:]) == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
