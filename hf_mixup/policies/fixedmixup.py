"""Mixup with a fixed share."""

from dataclasses import dataclass

import torch

from hf_mixup.core.checks import check_between
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import partners


@dataclass(frozen=True)
class FixedMixup(SamplePolicy):
    """Mixup with a fixed share: the labels of MoEx (arXiv:2002.11102), whose step mixes hidden states.

    Args:
        lam: share of the own image, 0 to 1; 0.9 in the authors' ImageNet command.
    """

    lam: float = 0.9

    def __post_init__(self):
        check_between(0, 1, lam=self.lam)

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        partner = partners(shape[0], "batch", rng).partner
        return MixPlan.pair(partner, None, torch.full((shape[0],), self.lam))
