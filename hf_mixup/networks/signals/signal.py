"""What a signal is, and how networks are read without leaving a trace."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_mixup.core.policy import Policy, Signals


class Signal(ABC):
    """One kind of evidence. Subclasses are either an `EarlySignal` or a `LateSignal`.

    Built once, when the model is: that is when hooks are put on, because one that comes after the first compiled call is
    ignored. Raises ValueError for a network that cannot give it.

    Args:
        network: the image classifier that it is taken from: the one in training, or the policy's frozen teacher.
        policy: the policy that asks.
    """

    @abstractmethod
    def __init__(self, network: nn.Module, policy: Policy): ...

    def disarm(self) -> None:  # noqa: B027, many have no hooks
        """Makes hooks inert. Called at the start of every forward of the model."""


class EarlySignal(Signal):
    """Taken from the clean images, before anything is planned."""

    @abstractmethod
    def take(self, images: Tensor, targets: Tensor, signals: Signals) -> Tensor:
        """`images` (B, C, H, W), `targets` (B, num_labels). `signals` holds those taken so far; only its `loss` may be set."""


class LateSignal(Signal):
    """Seen during the forward pass of the mixed images."""

    @abstractmethod
    def arm(self, size: tuple[int, int]) -> None:
        """Called right before that pass, with (H, W) of the images."""

    @abstractmethod
    def take(self) -> Tensor:
        """Called right after it; what passes later, when checkpointed layers run again, is not asked for."""


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


def load_teacher(repo_or_folder: str) -> nn.Module:
    """A frozen image classifier from a folder or the Hub."""
    from hf_mixup.networks.backbones import load_classifier

    return load_classifier(repo_or_folder).requires_grad_(False).eval()
