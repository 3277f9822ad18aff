"""Losses on similarities (B, M) whose targets are shares of instances. Cross-entropy, the loss of i-Mix, is in `core/losses.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_mixup.core.checks import check_between
from hf_mixup.core.losses import Loss, decoupled_log_probs
from hf_mixup.core.plan import MixPlan


@dataclass(frozen=True)
class Separate(Loss):
    """`-sum_s t_s (z_s - log(exp z_s + sum_n exp z_n))`, where n runs over the candidates that are not in the mixture.

    The sources of a mixture compete with negatives, but not with each other: Un-Mix (arXiv:2003.05438), OpenMixup's MoCoMix, and SAMix
    (arXiv:2111.15454). For one source it is cross-entropy.
    """

    def __call__(self, logits: Tensor, targets: Tensor, plan: MixPlan | None = None) -> Tensor:
        return -(targets * decoupled_log_probs(logits.float(), targets > 0)).sum(-1)


@dataclass(frozen=True)
class Agreement(Loss):
    """`offset - scale * sum_s t_s z_s`: the loss of BYOL and SimSiam, which have no negatives. `z` are cosines.

    Args:
        scale, offset: 2 and 2 are BYOL's squared distance (arXiv:2006.07733, equation 2); 1 and 0 SimSiam's and lightly's negative
            cosine; 2 and 0 OpenMixup's. A recipe's learning rate fits only one of them.
    """

    scale: float = 2.0
    offset: float = 2.0

    def __post_init__(self):
        check_between(0, 1e3, scale=self.scale, offset=self.offset)

    def __call__(self, logits: Tensor, targets: Tensor, plan: MixPlan | None = None) -> Tensor:
        return self.offset - self.scale * (targets * logits.float()).sum(-1)


@dataclass(frozen=True)
class LogOfMean(Loss):
    """`-log sum_s t_s p_s`: SDMP (Ren et al., CVPR 2022, arXiv:2206.07692), which mixes probabilities and not their logarithms."""

    def __call__(self, logits: Tensor, targets: Tensor, plan: MixPlan | None = None) -> Tensor:
        limits = torch.finfo(torch.float32)
        weighted = F.log_softmax(logits.float(), -1) + targets.clamp_min(limits.tiny).log()
        # not -inf, because its gradient may be NaN
        return -torch.logsumexp(weighted.masked_fill(targets == 0, limits.min), -1)
