"""What a signal is, and how networks are read without leaving a trace."""

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

    Raises ValueError for a network that cannot give it.

    Args:
        network: the image classifier that it is taken from: the one in training, or the policy's frozen teacher.
        policy: the policy that asks.

    Attributes:
        modules: those of the network that are watched.
    """

    modules: Sequence[nn.Module] = ()

    @abstractmethod
    def __init__(self, network: nn.Module, policy: Policy): ...


class EarlySignal(Signal):
    """Taken from the clean images, before anything is planned."""

    @abstractmethod
    def take(self, images: Tensor, targets: Tensor, signals: Signals) -> Tensor:
        """`images` (B, C, H, W), `targets` (B, num_labels). `signals` holds those taken so far; only its `loss` may be set."""


class LateSignal(Signal):
    """Seen during the forward pass of the mixed images."""

    @abstractmethod
    def taps(self, size: tuple[int, int]) -> list[Tap]:
        """What is watched in that pass, of images of `size`, (H, W)."""

    @abstractmethod
    def value(self, seen: list[Tensor]) -> Tensor:
        """The signal, from what the taps read."""


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode, so that neither batch statistics nor dropout streams move; every module's mode is restored."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        # some releases keep autocast's half-precision weights of a pass without gradients for the training pass, which then
        # gives the weights none
        torch.clear_autocast_cache()


@contextmanager
def reading(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode and without gradients."""
    with torch.no_grad(), evaluating(network):
        yield


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Under FSDP2 any backward pass ends by giving the gathered parameters back; inside, one within a forward pass does not.

    `model` is the root, whose forward that is; elsewhere nothing happens.
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
    """The images as a network of another size wants them."""
    if size is None or tuple(images.shape[2:]) == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
