"""Labels by attention (TransMix)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_mixup.core.checks import check_between
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import LabelPolicy, Signals


def attention_shares(plan: MixPlan, attention: Tensor) -> Tensor:
    """(B, K): how much of the attention (B, h, w) to a mixed image falls on each source.

    A place of the grid belongs to whom its pixel at the top left belongs to.
    """
    mask = plan.dense_mask(tuple(attention.shape[1:]))
    seen = (mask * attention[:, None]).sum((2, 3))
    # attention of nothing but zeros is no softmax, but would be a division by zero; such an image keeps its area
    total = attention.sum((1, 2))[:, None]
    return torch.where(total > 0, seen / total, plan.weight)


@dataclass(frozen=True)
class AttentionLabels(LabelPolicy):
    """TransMix (Chen et al., CVPR 2022, arXiv:2111.09833, equations 4 to 6; github.com/Beckschen/TransMix).

    A source's weight is the mean of its area and of the attention that the class token of the last block gives to its part of the
    mixed image, in the very forward pass that is trained on. Works on any sample policy and network whose attention is known;
    where no class token is classified (Swin, PVTv2), with the attention that the other patches give.

    Deviation from OpenMixup: every sample's weights multiply its own loss (there, their mean over the batch does), and its
    distributed branch, where the two weights have changed places, is not followed.

    Args:
        rho: the share of the area, 0 to 1; 0.5 in the official code, 0 for attention alone.
    """

    needs = frozenset({"attention"})

    rho: float = 0.5

    def __post_init__(self):
        check_between(0, 1, rho=self.rho)

    def weights(self, plan: MixPlan, signals: Signals) -> Tensor:
        return self.rho * plan.weight + (1 - self.rho) * attention_shares(plan, signals["attention"])
