"""Manifold Mixup."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_mixup.core.plan import blend, mix_others
from hf_mixup.core.policy import NOTHING
from hf_mixup.core.rng import MixKey
from hf_mixup.networks.passes import changing, check_changeable, logits_of
from hf_mixup.steps.hidden import HiddenState, check_layers, layer_of
from hf_mixup.steps.standard import check_whole_images, finish
from hf_mixup.steps.step import MethodState, Parts, Step, StepOutput


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

    takes_others: ClassVar[bool] = True

    layers: tuple[int | str, ...] = (0, 1, 2)

    def __post_init__(self):
        check_layers(self.layers)

    def build(self, parts: Parts, network: nn.Module) -> MethodState:
        check_whole_images(parts, "mixup")
        return HiddenState.for_parts(parts, network, [layer_of(network, layer) for layer in self.layers])

    def run(
        self,
        parts: Parts,
        state: HiddenState,
        network: nn.Module,
        images: Tensor,
        targets: Tensor,
        key: MixKey,
        others: Mapping[str, Tensor] = NOTHING,
    ) -> StepOutput:
        signals = state.before(images, targets, others)
        plan = parts.plan(images, key.own_rng(), signals)
        partner, lam = plan.index[:, 1], plan.mask.value[:, 0]
        layer = state.layers[int(torch.randint(len(self.layers), (), generator=key.step_rng()))]
        if layer is None:
            images, change = blend(plan, images), nullcontext()
        else:
            check_changeable(network, parts.name)
            change = changing(layer, lambda output: mixed_output(output, partner, lam))
        with change, state.watching(signals, images):
            logits = logits_of(network, images, mix_others(plan, others))
        return finish(parts, plan, logits, targets, signals)


def mixed_output(output: Any, partner: Tensor, lam: Tensor) -> Any:
    """Every tensor of a module's output that has a row for each image, mixed with its partner's; both arguments (B,)."""
    if isinstance(output, (tuple, list)):
        return type(output)(mixed_output(part, partner, lam) for part in output)
    if not (isinstance(output, Tensor) and output.is_floating_point() and len(output) == len(partner)):
        return output
    return torch.lerp(output[partner], output, lam.to(output.dtype).view(-1, *[1] * (output.ndim - 1)))
