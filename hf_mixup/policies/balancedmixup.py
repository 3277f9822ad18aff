"""Balanced-MixUp: every image is mixed with an image that is drawn with balanced classes."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_mixup.core.checks import check_class_counts, check_known, check_positive
from hf_mixup.core.imbalance import rarity
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import beta, categorical


@dataclass(frozen=True)
class BalancedMixup(SamplePolicy):
    """Balanced-MixUp (Galdran et al., MICCAI 2021, arXiv:2109.09850, section 2.2; github.com/agaldran/balanced_mixup): mixup of each image
    with an image that is drawn with equal chances for all classes.

    `x = (1 - lam) x_i + lam x_j`, and the same for labels, with `lam ~ Beta(alpha, 1)`. So image i keeps most of the pixels.

    Deviations: the partner is drawn from the batch, with weight `1 / count` of its class, so a class that is missing in the batch is never
    drawn (the authors draw from the whole training set).

    Args:
        alpha: first parameter of the Beta; the second is 1. 0.1 to 0.3 in the paper.
        class_counts: training images of each class. If None, MixupTrainer and MixupCallback read it from the data set,
            and others count the batch.
        mode: `sample` draws lam for every image, `batch` once (the authors' code).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"targets"})

    alpha: float = 0.2
    class_counts: tuple[int, ...] | None = None
    mode: str = "sample"

    def __post_init__(self):
        check_positive(alpha=self.alpha)
        check_class_counts(self.class_counts)
        check_known("mode of balancedmixup", self.mode, ["sample", "batch"])

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        partner = categorical(rarity(self.class_counts, signals["targets"]), rng)
        lam = 1 - beta(self.alpha, 1 if self.mode == "batch" else shape[0], rng, second=1.0)
        return MixPlan.pair(partner, None, lam.expand(shape[0]))
