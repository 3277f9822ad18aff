"""PatchUp: blocks of hidden states are mixed or swapped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_mixup.core.checks import check_between, check_count
from hf_mixup.core.geometry import random_boxes
from hf_mixup.core.plan import Boxes, MixPlan
from hf_mixup.core.rng import MixKey, beta, normal
from hf_mixup.steps.hidden import Change, HiddenStep, Layers, check_layers
from hf_mixup.steps.step import Parts


@dataclass(frozen=True)
class PatchUp(HiddenStep):
    """PatchUp (Faramarzi et al., AAAI 2022, arXiv:2006.07794; github.com/chandar-lab/PatchUp): blocks of a random layer's maps are mixed with
    another image's (soft), or replaced by them (hard). Each channel draws its own blocks. If the images are chosen as layer, it is CutMix.

    The label's weight is the share of values that stayed; the other values count by lam (soft) or belong to the partner (hard). The authors'
    loss, a sum of three terms with weights 1, is linear in the targets and equals twice the loss of these labels; they take binary
    cross-entropy of the softmax. Blocks are as large as the maps allow, at most `block`. Tokens before the patches, such as a class token, stay.

    Deviations: every image draws its own blocks, box and lam (the authors share them in a batch).

    Args:
        layers: one is chosen for each batch, with equal chances: 0 for the images, k for the output of stage k, or the name of any module. The
            authors choose from the images, the first convolution and the first stage.
        hard: swap blocks instead of mixing them.
        gamma: the approximate share of changed values; 0.75 soft and 0.5 hard in most of the authors' commands, which mix all or
            0.7 of the batches (`mix_rate`).
        block: side of a block, an odd number.
    """

    layers: Layers = (0, 1, 2)
    hard: bool = False
    gamma: float = 0.75
    block: int = 7

    def __post_init__(self):
        check_layers(self.layers)
        check_between(0, 1, gamma=self.gamma)
        check_count(1, block=self.block)
        if self.block % 2 == 0:
            raise ValueError(f"block must be an odd number, got {self.block}; give {self.block + 1}.")

    def changes(self, parts: Parts, plan: MixPlan, key: MixKey, shape: torch.Size) -> list[Change]:
        place = self.one_layer(key)
        draw = boxes if self.layers[place] == 0 else blocks
        lam = torch.zeros_like(plan.weight[:, 0]) if self.hard or draw is boxes else plan.mask.value[:, 0]
        return [Change(place, Patched(self, draw, plan.index[:, 1], lam, key.layer_rng(place)))]

    def labelled(self, plan: MixPlan, changes: list[Change]) -> MixPlan:
        own = changes[0].maps.own
        return plan.reweighted(torch.stack([own, 1 - own], 1))


@dataclass
class Patched:
    """The change of maps in one pass. After it, `own` (B,) is the own image's share of the label."""

    step: PatchUp
    draw: Callable
    partner: Tensor
    lam: Tensor
    rng: torch.Generator
    own: Tensor | None = None

    def __call__(self, maps: Tensor) -> Tensor:
        mask = self.draw(self.step, maps, self.rng).to(maps.device)
        self.own = 1 - (1 - self.lam) * mask.expand_as(maps).flatten(1).mean(1)
        return torch.lerp(maps, maps[self.partner], mask * (1 - self.lam)[:, None, None, None])


def boxes(step: PatchUp, images: Tensor, rng: torch.Generator) -> Tensor:
    """(B, 1, H, W): 1 inside CutMix's box."""
    size = tuple(images.shape[2:])
    return Boxes(random_boxes(beta(1.0, len(images), rng), size, rng), size).share(images.dtype)[:, None]


def blocks(step: PatchUp, maps: Tensor, rng: torch.Generator) -> Tensor:
    """(B, C, h, w): 1 inside blocks; the centres are drawn independently for each value."""
    side = min(step.block, (min(maps.shape[2:]) - 1) // 2 * 2 + 1)
    chance = block_chance(step.gamma, side, tuple(maps.shape[2:]))
    threshold = torch.special.ndtri(torch.tensor(min(chance, 1.0), dtype=torch.float64)).item()
    centres = (normal(tuple(maps.shape), rng, maps.device) < threshold).to(maps.dtype)
    return holes(centres, side)


def block_chance(gamma: float, block: int, size: tuple[int, int]) -> float:
    """The probability that a value is a centre: DropBlock's equation (arXiv:1810.12890) with `gamma` for 1 - keep_prob."""
    height, width = size
    return gamma * height * width / (block**2 * (height - block + 1) * (width - block + 1))


def holes(centres: Tensor, block: int) -> Tensor:
    """Grows every 1 of (B, C, h, w) into a square of side `block`, an odd number."""
    return F.max_pool2d(centres, block, 1, block // 2)
