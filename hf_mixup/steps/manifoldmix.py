"""Manifold Mixup."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_mixup.core.checks import check_counts, check_known
from hf_mixup.core.plan import blend
from hf_mixup.core.rng import MixKey
from hf_mixup.networks.families import bare, module_of, stage_names
from hf_mixup.networks.passes import changing, check_changeable
from hf_mixup.steps.standard import check_whole_images, finish
from hf_mixup.steps.step import MethodState, Parts, Step, StepOutput


class ManifoldState(MethodState):
    """The layers that may be mixed; None stands for the images."""

    def __init__(self, layers: list[nn.Module | None]):
        super().__init__()
        self.layers = tuple(layers)  # a tuple, or they would become modules of the state too

    @property
    def changed(self) -> list[nn.Module]:
        return [layer for layer in self.layers if layer is not None]


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

    def build(self, parts: Parts, network: nn.Module) -> MethodState:
        check_whole_images(parts, "mixup")
        return ManifoldState.for_parts(parts, network, [layer_of(network, layer) for layer in self.layers])

    def run(self, parts: Parts, state: ManifoldState, network: nn.Module, images: Tensor, targets: Tensor, key: MixKey) -> StepOutput:
        signals = state.before(images, targets)
        plan = parts.sample.plan(images.shape, key.own_rng(), signals).to(images.device)
        partner, lam = plan.index[:, 1], plan.mask.value[:, 0]
        layer = state.layers[int(torch.randint(len(self.layers), (), generator=key.step_rng()))]
        if layer is None:
            images, change = blend(plan, images), nullcontext()
        else:
            check_changeable(network, parts.name)
            change = changing(layer, lambda output: mixed_output(output, partner, lam))
        with change, state.watching(signals, images):
            logits = network(pixel_values=images).logits
        return finish(parts, plan, logits, targets, signals)


def layer_of(network: nn.Module, layer: int | str) -> nn.Module | None:
    if layer == 0:
        return None
    if isinstance(layer, str):
        check_known("layer", layer, [name for name, _ in bare(network).named_modules() if name])
        return module_of(network, layer)
    names = stage_names(network)
    if layer > len(names):
        raise ValueError(f"layers must be from 0 to {len(names)}, the stages of {type(bare(network)).__name__}, got {layer}; name fewer.")
    return module_of(network, names[layer - 1])


def mixed_output(output: Any, partner: Tensor, lam: Tensor) -> Any:
    """Every tensor of a module's output that has a row for each image, mixed with its partner's; both arguments (B,)."""
    if isinstance(output, (tuple, list)):
        return type(output)(mixed_output(part, partner, lam) for part in output)
    if not (isinstance(output, Tensor) and output.is_floating_point() and len(output) == len(partner)):
        return output
    return torch.lerp(output[partner], output, lam.to(output.dtype).view(-1, *[1] * (output.ndim - 1)))
