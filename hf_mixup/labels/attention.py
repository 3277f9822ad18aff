"""Labels by attention (TransMix)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_mixup.core.checks import check_between, check_places
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import LabelPolicy, Signals


def attention_shares(plan: MixPlan, attention: Tensor) -> Tensor:
    """(B, K): the share of a mixed image's attention (B, h, w) that falls on each source.

    A place of the grid belongs to the image at its top left pixel. Raises ValueError for a grid of one place.
    """
    check_places(tuple(attention.shape[1:]))
    mask = plan.dense_mask(tuple(attention.shape[1:]))
    seen = (mask * attention[:, None]).sum((2, 3))
    # all-zero attention does not come from a softmax, but would divide by zero; such an image keeps its area
    total = attention.sum((1, 2))[:, None]
    return torch.where(total > 0, seen / total, plan.weight)


@dataclass(frozen=True)
class AttentionLabels(LabelPolicy):
    """TransMix (Chen et al., CVPR 2022, arXiv:2111.09833, equations 4 to 6; github.com/Beckschen/TransMix).

    A source's weight is the mean of its area and its attention: the attention that the class token of the last block gives to its part of the
    mixed image, in the same forward pass that is trained. It works with any sample policy, and any network whose attention is known. If no class
    token is classified (Swin, PVTv2), it is the attention that the other patches give.

    Deviations from OpenMixup: every sample's weights multiply its own loss (there, their mean over the batch does); its distributed branch,
    which swaps the two weights, is not repeated.

    Args:
        rho: the share of the area in the weight, 0 to 1; 0.5 in the official code, 0 for attention only.
    """

    needs = frozenset({"attention"})

    rho: float = 0.5

    def __post_init__(self):
        check_between(0, 1, rho=self.rho)

    def weights(self, plan: MixPlan, signals: Signals) -> Tensor:
        return self.rho * plan.weight + (1 - self.rho) * attention_shares(plan, signals["attention"])
