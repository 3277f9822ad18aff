"""Labels by saliency: the visible share of each image's saliency."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_mixup.core.checks import check_known
from hf_mixup.core.geometry import pooled_evidence
from hf_mixup.core.plan import Dense, MixPlan
from hf_mixup.core.policy import LabelPolicy, Signals


@dataclass(frozen=True)
class SaliencyLabels(LabelPolicy):
    """The calibrated labels of Saliency Grafting (Park et al., AAAI 2022, arXiv:2112.08796).

    Each image counts by `|S m| / |S|`: the norm of its saliency under its part of the mask, divided by the norm of its whole saliency. Weights
    sum to 1. Saliency is compared on the mask's grid. This is our implementation of the paper's description; which norm it uses is our reading.

    Args:
        norm: 2 or 1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"saliency"})

    norm: int = 2

    def __post_init__(self):
        check_known("norm", self.norm, [1, 2])

    def weights(self, plan: MixPlan, signals: Signals) -> Tensor:
        if plan.sources is not None:
            raise ValueError(
                "labels by saliency need a sample policy that leaves pixels in place, got one that moves them; "
                "use cutmix, or the label policy 'arealabels'."
            )
        saliency = signals["saliency"]
        grid = tuple(plan.mask.value.shape[2:]) if isinstance(plan.mask, Dense) else tuple(saliency.shape[1:])
        return kept_importance(plan.index, plan.dense_mask(grid), pooled_evidence(saliency, grid), self.norm)


def kept_importance(index: Tensor, mask: Tensor, saliency: Tensor, norm: int) -> Tensor:
    """(B, K) from `index` (B, K), `mask` (B, K, h, w), and `saliency` (B, h, w). If no saliency of any image is visible, the own image has weight 1."""
    whole = torch.linalg.vector_norm(saliency, norm, dim=(1, 2))
    kept = torch.linalg.vector_norm(saliency[index] * mask, norm, dim=(2, 3)) / whole[index]
    total = kept.sum(1, keepdim=True)
    own = torch.zeros_like(kept)
    own[:, 0] = 1
    return torch.where(total > 0, kept / total, own)
