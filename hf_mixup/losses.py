"""Losses on mixed targets. Frozen dataclasses: the fields are the hyper-parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from hf_mixup.checks import check_between, check_known
from hf_mixup.plan import MixPlan


class Loss(ABC):
    """`loss(logits, targets, plan)` -> (B,) float32, one value per row, so that weights per sample survive.

    `multi_label` tells whether targets may be any numbers in [0, 1] instead of distributions.
    """

    multi_label: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, logits: Tensor, targets: Tensor, plan: MixPlan | None = None) -> Tensor:
        """`logits` (B, num_labels); `targets` (B, num_labels), mixed; `plan`, where there is one, tells the pairs."""


def smooth(targets: Tensor, smoothing: float) -> Tensor:
    """Label smoothing of mixed targets: `(1 - e) t + e / num_labels`, the share of the row's own sum.

    Smoothing every one-hot before mixing (timm, DeiT) gives the same.
    """
    if smoothing == 0:
        return targets
    return (1 - smoothing) * targets + smoothing / targets.shape[1] * targets.sum(1, keepdim=True)


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Soft cross-entropy `-sum_c t_c log p_c`; for two images the same as `lam CE(y_i) + (1 - lam) CE(y_j)`.

    Args:
        smoothing: label smoothing of the mixed target, 0 to 1; 0.1 in the DeiT recipes.
    """

    smoothing: float = 0.0

    def __post_init__(self):
        check_between(0, 1, smoothing=self.smoothing)

    def __call__(self, logits: Tensor, targets: Tensor, plan: MixPlan | None = None) -> Tensor:
        return -(smooth(targets, self.smoothing) * F.log_softmax(logits.float(), -1)).sum(-1)


@dataclass(frozen=True)
class BCE(Loss):
    """Binary cross-entropy on every class (ResNet strikes back, arXiv:2110.00476; timm's `BinaryCrossEntropy`).

    Args:
        reduction: over classes. `mean` is timm's; `sum` is OpenMixup's, num_labels times larger, so the learning rate follows.
        target_threshold: targets above it become 1, others 0 (0.2 in RSB); None leaves them soft.
        smoothing: label smoothing of the mixed target, 0 to 1.
    """

    multi_label: ClassVar[bool] = True

    reduction: str = "mean"
    target_threshold: float | None = None
    smoothing: float = 0.0

    def __post_init__(self):
        check_known("reduction", self.reduction, ["mean", "sum"])
        check_between(0, 1, smoothing=self.smoothing)
        if self.target_threshold is not None:
            check_between(0, 1, target_threshold=self.target_threshold)

    def __call__(self, logits: Tensor, targets: Tensor, plan: MixPlan | None = None) -> Tensor:
        targets = smooth(targets, self.smoothing)
        if self.target_threshold is not None:
            targets = (targets > self.target_threshold).float()
        # two shares of one class may add up to a rounding error above 1
        losses = F.binary_cross_entropy_with_logits(logits.float(), targets.clamp(0, 1), reduction="none")
        return losses.mean(-1) if self.reduction == "mean" else losses.sum(-1)


LOSSES = (CrossEntropy, BCE)
