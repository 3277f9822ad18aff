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


class Step(ABC):
    """From a clean batch to a loss. Subclasses are frozen dataclasses; what they learn or remember lives in their state."""

    def build(self, method: Method, backbone: nn.Module) -> nn.Module:
        """The state of the method: networks, buffers and hooks beside the backbone. Saved, moved and trained with the model."""
        return nn.Module()

    @abstractmethod
    def run(
        self, method: Method, state: nn.Module, backbone: nn.Module, images: Tensor, targets: Tensor, key: MixKey
    ) -> StepOutput:
        """`images` (B, C, H, W), `targets` (B, num_labels) float32, one-hot or soft."""

    def deployed(self, state: nn.Module, backbone: nn.Module) -> nn.Module:
        """The network that is evaluated and shipped."""
        return backbone
