"""Noisy Feature Mixup."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_mixup.core.checks import check_between
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.rng import MixKey, beta, normal
from hf_mixup.steps.hidden import Change, HiddenStep, Layers, check_layers
from hf_mixup.steps.step import Parts


@dataclass(frozen=True)
class NoisyMix(HiddenStep):
    """Noisy Feature Mixup (Lim et al., ICLR 2022, arXiv:2110.02180; github.com/erichson/NFM): mixes the output of a random layer, multiplies
    it by one plus uniform noise, and adds normal noise.

    `(1 + b m U(-1, 1)) x + a n N(0, 1)`, with levels a and b, and `m, n ~ Beta(2, 5)` drawn once for the batch, as in the authors' code.

    Args:
        layers: one is chosen for each batch, with equal chances: 0 for the images, k for the output of stage k (of block k, in a vision
            transformer), or the name of any module. The authors choose from 0 to 3.
        additive, multiplicative: the levels; 0.4 and 0.2 in the authors' commands.
    """

    layers: Layers = (0, 1, 2)
    additive: float = 0.4
    multiplicative: float = 0.2

    def __post_init__(self):
        check_layers(self.layers)
        check_between(0, 100, additive=self.additive, multiplicative=self.multiplicative)

    def changes(self, parts: Parts, plan: MixPlan, key: MixKey, shape: torch.Size) -> list[Change]:
        place = self.one_layer(key)
        rng = key.layer_rng(place)
        additive, multiplicative = (torch.tensor([self.additive, self.multiplicative]) * beta(2, 2, rng, second=5)).tolist()
        partner, lam = plan.index[:, 1], plan.mask.value[:, 0]

        def changed(hidden: Tensor) -> Tensor:
            mixed = torch.lerp(hidden[partner], hidden, lam.view(-1, *[1] * (hidden.ndim - 1)))
            return noisy(mixed, additive, multiplicative, rng)

        return [Change(place, changed, changed)]


def noisy(hidden: Tensor, additive: float, multiplicative: float, rng: torch.Generator) -> Tensor:
    # erf(x / sqrt(2)) of a standard normal x is uniform between -1 and 1
    uniform = torch.erf(normal(tuple(hidden.shape), rng, hidden.device) / math.sqrt(2))
    return with_noise(hidden, additive * normal(tuple(hidden.shape), rng, hidden.device), multiplicative * uniform)


def with_noise(hidden: Tensor, additive: Tensor, multiplicative: Tensor) -> Tensor:
    return hidden * (1 + multiplicative) + additive
