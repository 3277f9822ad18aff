"""No mixing, as a method like any other."""

from dataclasses import dataclass

import torch

from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals


@dataclass(frozen=True)
class Vanilla(SamplePolicy):
    """No mixing: every image keeps its own label."""

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        return MixPlan.identity(shape[0])
