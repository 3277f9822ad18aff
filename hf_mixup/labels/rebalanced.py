"""Labels that favour the rarer class (Remix)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_mixup.core.checks import check_between, check_class_counts
from hf_mixup.core.imbalance import counts_of
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import LabelPolicy, Signals


@dataclass(frozen=True)
class RebalancedLabels(LabelPolicy):
    """Remix (Chou et al., ECCV Workshops 2020, arXiv:2007.03943, section 3): a mixture gets only the label of the rarer class, if the other
    class is `kappa` times as common and has less than `tau` of the image.

    The weight of the own label is 0 if `n_i / n_j >= kappa` and `lam < tau`, 1 if `n_i / n_j <= 1 / kappa` and `1 - lam < tau`, else lam.

    Args:
        kappa: ratio of the class sizes from which this applies, at least 1; 3 in the paper.
        tau: threshold of the share of the image, 0 to 1; 0.5 in the paper.
        class_counts: training images of each class. If None, MixupTrainer and MixupCallback read it from the data set, and others count the batch.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"targets"})

    kappa: float = 3.0
    tau: float = 0.5
    class_counts: tuple[int, ...] | None = None

    def __post_init__(self):
        check_between(1, 1e9, kappa=self.kappa)
        check_between(0, 1, tau=self.tau)
        check_class_counts(self.class_counts)

    def weights(self, plan: MixPlan, signals: Signals) -> Tensor:
        if plan.index.shape[1] > 2:
            raise ValueError(
                f"rebalancedlabels weighs pairs of images, got a plan of {plan.index.shape[1]}; use a sample policy of two images, such as mixup."
            )
        if plan.index.shape[1] == 1:
            return plan.weight
        targets = signals["targets"].float()
        count = targets @ counts_of(self.class_counts, targets)  # the mean for soft targets
        own, partner = count[plan.index].unbind(1)
        lam, rest = plan.weight.unbind(1)
        to_partner = (own >= self.kappa * partner) & (lam < self.tau)
        to_own = (partner >= self.kappa * own) & (rest < self.tau)
        lam = torch.where(to_partner, 0, torch.where(to_own, 1, lam))
        return torch.stack([lam, torch.where(to_partner, 1, torch.where(to_own, 0, rest))], 1)
