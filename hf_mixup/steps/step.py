"""What a training step is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from hf_mixup.rng import MixKey

if TYPE_CHECKING:
    from hf_mixup.methods import Method


class StepOutput(NamedTuple):
    """One training step of a batch.

    Attributes:
        loss: scalar, float32.
        logits: (B, num_labels), of the mixed images.
        targets: (B, num_labels) float32, the mixed targets.
        lam: (B,) float32, the labels' share of the own image.
    """

    loss: Tensor
    logits: Tensor
    targets: Tensor
    lam: Tensor


class MethodState(nn.Module):
    """What a method keeps beside the backbone: networks, buffers, hooks. Saved, moved and trained with the model."""

    def disarm(self) -> None:
        """Makes hooks inert. Called at the start of every forward of the model, in evaluation too."""


class Step(ABC):
    """From a clean batch to a loss. Subclasses are frozen dataclasses; what they learn or remember lives in their state."""

    def build(self, method: Method, backbone: nn.Module) -> MethodState:
        """The state of the method. Raises ValueError when the backbone cannot serve it. Copies of the backbone are made
        before hooks are put on it, or the copies would carry them too."""
        return MethodState()

    @abstractmethod
    def run(
        self, method: Method, state: MethodState, backbone: nn.Module, images: Tensor, targets: Tensor, key: MixKey
    ) -> StepOutput:
        """`images` (B, C, H, W), `targets` (B, num_labels) float32, one-hot or soft."""

    def deployed(self, state: MethodState, backbone: nn.Module) -> nn.Module:
        """The network that is evaluated and shipped: a Hugging Face image classifier."""
        return backbone

    def after_optimizer_step(self, state: MethodState, backbone: nn.Module, step: int, total_steps: int) -> None:
        """What follows the weights, such as an EMA teacher. `step` optimizer steps were done before this one."""
