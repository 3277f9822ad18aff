"""Manifold Mixup."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_mixup.core.checks import check_counts, check_known
from hf_mixup.core.plan import blend
from hf_mixup.core.rng import MixKey
from hf_mixup.networks.signals.features import Tap, stage_names
from hf_mixup.steps.standard import check_whole_images, finish
from hf_mixup.steps.step import MethodState, Step, StepOutput

if TYPE_CHECKING:
    from hf_mixup.methods import Method


class ManifoldState(MethodState):
    """One tap for every layer that may be mixed."""

    def __init__(self, layers: list[nn.Module | None]):
        super().__init__()
        self.taps = [None if layer is None else Tap(layer, mixed_output) for layer in layers]

    def disarm(self) -> None:
        super().disarm()
        for tap in self.taps:
            if tap is not None:
                tap.disarm()


@dataclass(frozen=True)
class ManifoldMix(Step):
    """Manifold Mixup (Verma et al., ICML 2019, arXiv:1806.05236; github.com/vikasverma1077/manifold_mixup): mixup of what a
    random layer gives.

    Gradients flow through both images. The authors' code takes binary cross-entropy of the softmax; the published tables, and
    this, cross-entropy. The layer is the same on all processes.

    Args:
        layers: which may be chosen, each as often: 0 for the images, k for the output of stage k (of block k, in a vision
            transformer), or the name of any module of the network.
    """

    layers: tuple[int | str, ...] = (0, 1, 2)

    def __post_init__(self):
        # names are looked up when the network is known
        listed = isinstance(self.layers, (tuple, list))
        numbers = [layer for layer in self.layers if not isinstance(layer, str)] if listed else self.layers
        if numbers or not self.layers:
            check_counts(0, layers=numbers)

    def build(self, method: Method, backbone: nn.Module) -> MethodState:
        check_whole_images(method, "mixup")
        return ManifoldState.for_method(method, backbone, [_module(backbone, layer) for layer in self.layers])

    def run(self, method: Method, state: ManifoldState, backbone: nn.Module, images: Tensor, targets: Tensor, key: MixKey) -> StepOutput:
        signals = state.before(images, targets)
        plan = method.sample.plan(images.shape, key.own_rng(), signals).to(images.device)
        lam = plan.mask.value[:, 0]
        tap = state.taps[int(torch.randint(len(self.layers), (), generator=key.step_rng()))]
        if tap is None:
            images = blend(plan, images)
        else:
            tap.arm(plan.index[:, 1], lam)
        return finish(method, state, plan, backbone(pixel_values=images).logits, targets, signals)


def _module(backbone: nn.Module, layer: int | str) -> nn.Module | None:
    if layer == 0:
        return None
    if isinstance(layer, str):
        check_known("layer", layer, [name for name, _ in backbone.named_modules() if name])
        return backbone.get_submodule(layer)
    names = stage_names(backbone)
    if layer > len(names):
        raise ValueError(f"layers must be from 0 to {len(names)}, the stages of {type(backbone).__name__}, got {layer}; name fewer.")
    return backbone.get_submodule(names[layer - 1])


def mixed_output(output: Any, partner: Tensor, lam: Tensor) -> Any:
    """Every tensor of a module's output that has a row for each image, mixed with its partner's; both arguments (B,)."""
    if isinstance(output, (tuple, list)):
        return type(output)(mixed_output(part, partner, lam) for part in output)
    if not (isinstance(output, Tensor) and output.is_floating_point() and len(output) == len(partner)):
        return output
    return torch.lerp(output[partner], output, lam.to(output.dtype).view(-1, *[1] * (output.ndim - 1)))
