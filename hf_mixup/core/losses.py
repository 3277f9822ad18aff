"""Losses on mixed targets. Frozen dataclasses: the fields are the hyper-parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_mixup.core.checks import check_between, check_known
from hf_mixup.core.plan import MixPlan


class Loss(ABC):
    """`loss(logits, targets, plan)` -> (B,) float32, one value per row, so that weights per sample survive.

    `multi_label` tells whether targets may be any numbers in [0, 1] instead of distributions.
    """

    multi_label: ClassVar[bool] = False

    @property
    def problem_type(self) -> str:
        """What it teaches a network, as transformers' configs name it: their pipelines choose softmax or sigmoid by that."""
        return "multi_label_classification" if self.multi_label else "single_label_classification"

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


def rescale(shares: Tensor, threshold: float, power: float) -> Tensor:
    """`r(v) = min(1, (v / threshold) ** power)` of shares above 0; 0 stays 0 (DecoupleMix, section 4.3)."""
    return torch.where(shares > 0, (shares / threshold).clamp(0, 1) ** power, 0)


def decoupled_log_probs(logits: Tensor, present: Tensor) -> Tensor:
    """(B, num_labels): the log-probability of every class among itself and the classes that are not in the mixture.

    `present` (B, num_labels) bool: the classes that are; for two of them, a and b, it is `z_a - log sum_{c != b} exp z_c` at a.
    """
    # not -inf, whose gradient is NaN where a mixture holds all classes
    absent = logits.masked_fill(present, torch.finfo(logits.dtype).min).logsumexp(1, keepdim=True)
    return logits - torch.logaddexp(absent, logits)


@dataclass(frozen=True)
class Decoupled(Loss):
    """DecoupleMix (Liu et al., NeurIPS 2023, arXiv:2203.10761; github.com/Westlake-AI/openmixup is the authors' code).

    The mixed cross-entropy, and for either class the negative log-probability among all classes but the other one, weighted by
    `eta`: mixed classes stop competing with each other, so that hard mixtures teach both.

    The classes and their shares are read off the mixed target, so the loss serves any method and any share per sample, and
    collators too. Rows that are no mixture of one-hots (soft labels of a teacher) have the plain cross-entropy alone, and so
    have rows with one class: two images of the same one, or a share within 1e-3 of 0 or 1.

    Deviations from OpenMixup, whose results depend on the order of the class numbers: each class has its own side's weight (there
    the two are swapped where the own class number is larger than its partner's in the first sample); one share for the whole
    batch is not needed; mixtures at exactly one half count; smoothing touches the mixed cross-entropy alone.

    Args:
        eta: weight of the decoupled terms. The paper's ImageNet value is 0.1.
        sides: `both` classes, only those with `less` than half of the image, or only those with `more`.
        power, threshold: scale eta by `min(1, (share / threshold) ** power)`. The paper's equation has power 0; OpenMixup's
            published runs 0, 0.5 or 1, with threshold 1.
        smoothing: label smoothing of the mixed target, 0 to 1.
    """

    eta: float = 0.1
    sides: str = "both"
    power: float = 0.0
    threshold: float = 1.0
    smoothing: float = 0.0

    def __post_init__(self):
        check_between(0, 1e3, eta=self.eta, power=self.power)
        check_between(1e-3, 1, threshold=self.threshold)
        check_between(0, 1, smoothing=self.smoothing)
        check_known("sides", self.sides, ["both", "less", "more"])

    def __call__(self, logits: Tensor, targets: Tensor, plan: MixPlan | None = None) -> Tensor:
        logits = logits.float()
        mixed = -(smooth(targets, self.smoothing) * F.log_softmax(logits, -1)).sum(-1)
        present = targets > 1e-3
        images = 2 if plan is None else plan.index.shape[1]
        mixture = (present.sum(1) > 1) & ((targets > 0).sum(1) <= images)
        eta = self.eta * rescale(targets, self.threshold, self.power)
        wanted = {"both": present, "less": present & (targets <= 0.5), "more": present & (targets >= 0.5)}[self.sides]
        terms = torch.where(wanted & mixture[:, None], eta * decoupled_log_probs(logits, present), 0)
        return mixed - terms.sum(1)


@dataclass(frozen=True)
class DecoupledBCE(Loss):
    """DecoupleMix (arXiv:2203.10761) for binary cross-entropy: a class counts as there before its share is 1.

    Targets are `min(1, (share / threshold) ** power)`; with the defaults that is the plain mixed BCE, with power 0 every class in
    the mixture is wholly there. Two images of one class make one share, of which the function is taken (OpenMixup takes it of
    each, and its sum may exceed 1).

    Args:
        threshold, power: `t` and `xi` of the paper.
        negative_weight: weight of the classes that are not in the mixture, 0 to 1.
        reduction: over classes. `mean` is timm's; `sum` is OpenMixup's, num_labels times larger, so the learning rate follows.
    """

    multi_label: ClassVar[bool] = True

    threshold: float = 1.0
    power: float = 1.0
    negative_weight: float = 1.0
    reduction: str = "mean"

    def __post_init__(self):
        check_between(1e-3, 1, threshold=self.threshold)
        check_between(0, 1e3, power=self.power)
        check_between(0, 1, negative_weight=self.negative_weight)
        check_known("reduction", self.reduction, ["mean", "sum"])

    def __call__(self, logits: Tensor, targets: Tensor, plan: MixPlan | None = None) -> Tensor:
        targets = rescale(targets, self.threshold, self.power)
        losses = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")
        losses = torch.where(targets > 0, 1, self.negative_weight) * losses
        return losses.mean(-1) if self.reduction == "mean" else losses.sum(-1)


LOSSES = (CrossEntropy, BCE, Decoupled, DecoupledBCE)
