"""Manifold Mixup."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_mixup.core.plan import blend, is_mask, mix_others
from hf_mixup.core.rng import MixKey
from hf_mixup.networks.families import first_position
from hf_mixup.networks.passes import changing, check_changeable, logits_of
from hf_mixup.steps.hidden import HiddenState, check_layers, layer_of
from hf_mixup.steps.standard import check_whole_images, finish
from hf_mixup.steps.step import MethodState, Parts, Step, StepOutput


@dataclass(frozen=True)
class ManifoldMix(Step):
    """Manifold Mixup (Verma et al., ICML 2019, arXiv:1806.05236; github.com/vikasverma1077/manifold_mixup): mixes the output of a
    random layer. For texts this is wordMixup of Guo et al. (arXiv:1905.08941) or TMix (Chen et al., ACL 2020, arXiv:2004.12239;
    github.com/SALT-NLP/MixText), depending on the layer.

    Gradients flow through both images. The layer is the same on all processes. The authors' code takes binary cross-entropy of the softmax;
    the published tables, and this, take cross-entropy.

    For texts and sounds, the output of a layer is computed under each input's own attention mask, and the later layers see the union of the
    masks. With masks this costs one pass more. Positions, and the norm of embeddings, are applied once, after words are mixed.

    Deviations from the authors' code of TMix:
    1. Attention masks are used (the authors' code has none, so padding counts as text).
    2. The network's own head classifies (there: a head on the mean of all tokens).
    3. Every text draws its own lam (there: one for the batch).
    4. Alpha is the default of their script, 0.75 (their command has 16).

    Args:
        layers: one is chosen with equal chances: 0 for the images, or the embeddings of words; k for the output of stage k (of block k in a
            transformer); a share of the depth such as 0.75; or the name of any module of the network.
    """

    takes_others: ClassVar[bool] = True
    takes_tokens: ClassVar[bool] = True

    layers: tuple[int | float | str, ...] = (0, 1, 2)

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
    ) -> StepOutput:
        signals = state.before(images, targets)
        plan = parts.plan(images, key.own_rng(), signals)
        partner, lam = plan.index[:, 1], plan.mask.value[:, 0]
        place = int(torch.randint(len(self.layers), (), generator=key.step_rng()))
        layer, hidden = state.layers[place], []
        if layer is None:
            images, change = blend(plan, images), nullcontext()
        else:
            check_changeable(network, parts.name)
            if self.layers[place] != 0 and any(map(is_mask, signals.others)):
                with changing(layer, lambda output: hidden.append(output) or output):
                    logits_of(network, images, signals.others)
            change = changing(layer, lambda output: mixed_layer(hidden.pop() if hidden else output, partner, lam))
        beside = mix_others(plan, signals.others)
        if layer is not None and self.layers[place] == 0:
            beside = with_positions(network, beside)
        with change, state.watching(signals, images):
            logits = logits_of(network, images, beside)
        return finish(parts, plan, logits, targets, signals)


def with_positions(network: nn.Module, others: dict[str, Tensor]) -> dict[str, Tensor]:
    """Beside mixed words, their positions, where the network would count those of the own text, which may be the shorter one."""
    before, mask = first_position(network), others.get("attention_mask")
    if before is None or mask is None or "position_ids" in others:
        return others
    return {**others, "position_ids": mask.long().cumsum(1) * mask.long() + before}


def mixed_layer(output: Any, partner: Tensor, lam: Tensor) -> Any:
    """As `mixed_output`. Raises ValueError for a layer without such a tensor, which would leave all but the labels unmixed."""
    mixed = mixed_output(output, partner, lam)
    if mixed is output or (isinstance(output, (tuple, list)) and all(one is other for one, other in zip(mixed, output, strict=True))):
        shapes = [tuple(part.shape) for part in (output if isinstance(output, (tuple, list)) else [output]) if isinstance(part, Tensor)]
        raise ValueError(
            f"a layer that is mixed must give a row for each of the {len(partner)} inputs, got shapes {shapes}; name another one."
        )
    return mixed


def mixed_output(output: Any, partner: Tensor, lam: Tensor) -> Any:
    """Mixes every tensor of a module's output that has one row for each image, with the partner's row. `partner` and `lam` are (B,)."""
    if isinstance(output, (tuple, list)):
        return type(output)(mixed_output(part, partner, lam) for part in output)
    if not (isinstance(output, Tensor) and output.is_floating_point() and len(output) == len(partner)):
        return output
    return torch.lerp(output[partner], output, lam.to(output.dtype).view(-1, *[1] * (output.ndim - 1)))
