"""Losses on mixed targets. Frozen dataclasses: the fields are the hyper-parameters."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_mixup.core.checks import (
    check_between,
    check_class_counts,
    check_class_weights,
    check_count,
    check_counts,
    check_distributions,
    check_heads,
    check_known,
    check_labels,
    check_values,
)
from hf_mixup.core.plan import MixPlan, onehot


class Loss(ABC):
    """`loss(logits, targets, plan)` -> (B,) float32, one value per row, so that per-sample weights can be applied.

    A loss also checks labels and turns them into targets. Losses raise ValueError at construction, for fields out of their range.

    Attributes:
        multi_label: targets are any numbers in [0, 1], one for each class, instead of distributions.
        regression: targets are any numbers, one for each output; there are no classes.
        views: number of views of each image that are compared, in as many equal parts of the batch (`JensenShannon`); 1 for independent rows.
    """

    multi_label: ClassVar[bool] = False
    regression: ClassVar[bool] = False
    views = 1

    @property
    def problem_type(self) -> str:
        """The `problem_type` of transformers' configs. Pipelines use it to choose between softmax and sigmoid."""
        if self.regression:
            return "regression"
        return "multi_label_classification" if self.multi_label else "single_label_classification"

    @abstractmethod
    def __call__(self, logits: Tensor, targets: Tensor, plan: MixPlan | None = None) -> Tensor:
        """`logits` (B, num_labels); `targets` (B, num_labels), mixed; `plan` has the pairs, or is None."""

    def check(self, labels: Tensor, batch: int, num_labels: int) -> None:
        """Refuses labels that this loss cannot take. Raises ValueError, or TypeError if they are not a tensor."""
        if self._is_column(labels, num_labels):
            check_values(labels, batch, num_labels, (0, 1) if self.multi_label else None)
            return
        check_labels(labels, batch, num_labels)
        if not self.multi_label:
            check_distributions(labels)

    def targets(self, labels: Tensor, num_labels: int) -> Tensor:
        """Turns the data set's labels into (B, num_labels) float32: class numbers (B,), soft labels, or numbers (B,) or (B, k)."""
        return labels.float().view(-1, num_labels) if self._is_column(labels, num_labels) else onehot(labels, num_labels)

    def smoothed(self, targets: Tensor) -> Tensor:
        """Mixed targets (B, num_labels) with this loss's label smoothing, if it has any."""
        return smooth(targets, getattr(self, "smoothing", 0.0))

    def plain(self) -> Loss:
        """The loss that evaluation reports: without regularisation and weights, so that runs can be compared."""
        return CrossEntropy()

    def at(self, epoch: int, epochs: int) -> Loss:
        """The loss in one epoch of a run of `epochs`. Epochs count from 0; -1 means unknown."""
        return self

    def single(self) -> Loss:
        """The loss for batches that were not mixed, where each row stands alone."""
        return self

    def _is_column(self, labels: Tensor, num_labels: int) -> bool:
        """Whether labels are one column of numbers: targets of a regression, or 0 and 1 for a single output."""
        return isinstance(labels, Tensor) and (self.regression or (self.multi_label and (labels.ndim == 2 or num_labels == 1)))


def smooth(targets: Tensor, smoothing: float) -> Tensor:
    """Label smoothing of mixed targets: `(1 - e) t + e s / num_labels`, where s is the sum of the row.

    Smoothing every one-hot before mixing (timm, DeiT) gives the same.
    """
    if smoothing == 0:
        return targets
    return (1 - smoothing) * targets + smoothing / targets.shape[1] * targets.sum(1, keepdim=True)


def class_weights(name: str, weight: tuple[float, ...] | None, logits: Tensor) -> Tensor | float:
    """The weights as (num_labels,) float32 on the device of the logits; 1.0 for None. Raises ValueError for another number of classes."""
    if weight is None:
        return 1.0
    if len(weight) != logits.shape[1]:
        raise ValueError(
            f"{name} needs one number for each of the {logits.shape[1]} classes, got {len(weight)}; give as many as the network has outputs."
        )
    return _on_device(weight, logits.device)


@functools.lru_cache(maxsize=64)
def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """The numbers on the device. Cached, because a copy in every step would make the host wait for the device."""
    with torch.inference_mode(False):  # otherwise an evaluation before training would cache a tensor that training cannot use
        return torch.tensor(numbers, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Soft cross-entropy `-sum_c w_c t_c log p_c`; for two images the same as `lam CE(y_i) + (1 - lam) CE(y_j)`.

    Args:
        smoothing: label smoothing of the mixed target, 0 to 1; 0.1 in the DeiT recipes.
        weight: w, one number for each class, at least 0; all 1 if None. As in torch for soft targets, the mean is over images.
    """

    smoothing: float = 0.0
    weight: tuple[float, ...] | None = None

    def __post_init__(self):
        check_between(0, 1, smoothing=self.smoothing)
        check_class_weights(weight=self.weight)

    def __call__(self, logits: Tensor, targets: Tensor, plan: MixPlan | None = None) -> Tensor:
        weight = class_weights("weight", self.weight, logits)
        return -(weight * smooth(targets, self.smoothing) * F.log_softmax(logits.float(), -1)).sum(-1)


@dataclass(frozen=True)
class ClassBalanced(Loss):
    """Cross-entropy weighted by the effective number of images of each class, from `start_epoch` on (Cui et al., CVPR 2019, arXiv:1901.05555, eq. 4).
    This is deferred re-weighting (Cao et al., NeurIPS 2019, arXiv:1906.07413, section 3.4; github.com/kaidic/LDAM-DRW).

    `w_c = (1 - beta) / (1 - beta ** n_c)`, scaled to a mean of 1. Before `start_epoch` all weights are 1.

    Deviations: the mean is over images, as in torch for soft targets (the authors divide by the weights of the batch's labels).

    Args:
        start_epoch: the first epoch with weights, counted from 0; 160 of 200 in LDAM-DRW.
        beta: 0 to 1; 0.9999 in LDAM-DRW. At 0 all weights are equal, at 1 they are proportional to `1 / n_c`.
        class_counts: training images of each class. MixupTrainer reads it from the data set if None.
        smoothing: label smoothing of the mixed target, 0 to 1.
    """

    start_epoch: int = 0
    beta: float = 0.9999
    class_counts: tuple[int, ...] | None = None
    smoothing: float = 0.0

    def __post_init__(self):
        check_count(0, start_epoch=self.start_epoch)
        check_between(0, 1, beta=self.beta, smoothing=self.smoothing)
        check_class_counts(self.class_counts)

    def at(self, epoch: int, epochs: int) -> Loss:
        if epoch < 0 and self.start_epoch:
            raise ValueError(
                f"classbalanced with start_epoch={self.start_epoch} needs the epoch, got none; train with MixupTrainer, or set epoch and epochs of "
                "the MixKey."
            )
        return _weighted(self) if epoch >= self.start_epoch else CrossEntropy(self.smoothing)

    def __call__(self, logits: Tensor, targets: Tensor, plan: MixPlan | None = None) -> Tensor:
        return self.at(-1, 0)(logits, targets, plan) if self.start_epoch else _weighted(self)(logits, targets, plan)


@functools.lru_cache(maxsize=16)
def _weighted(loss: ClassBalanced) -> CrossEntropy:
    if loss.class_counts is None:
        raise ValueError("classbalanced needs class_counts, the training images of each class, got None; set class_counts.")
    counts = [max(count, 1) for count in loss.class_counts]
    weight = [1 / count if loss.beta == 1 else (1 - loss.beta) / (1 - loss.beta**count) for count in counts]
    return CrossEntropy(loss.smoothing, tuple(w * len(weight) / sum(weight) for w in weight))


@dataclass(frozen=True)
class Focal(Loss):
    """Focal loss of soft targets, `-sum_c w_c t_c (1 - p_c) ** gamma log p_c` (Lin et al., ICCV 2017, arXiv:1708.02002, eq. 5).

    Args:
        gamma: a larger gamma lowers the loss of well predicted classes; 2 in the paper, 0 is cross-entropy.
        weight: w (alpha in the paper), one number for each class, at least 0; all 1 if None.
        smoothing: label smoothing of the mixed target, 0 to 1.
    """

    gamma: float = 2.0
    weight: tuple[float, ...] | None = None
    smoothing: float = 0.0

    def __post_init__(self):
        check_between(0, 100, gamma=self.gamma)
        check_between(0, 1, smoothing=self.smoothing)
        check_class_weights(weight=self.weight)

    def __call__(self, logits: Tensor, targets: Tensor, plan: MixPlan | None = None) -> Tensor:
        log_p = F.log_softmax(logits.float(), -1)
        # not 1 - exp(log p): it rounds to 0 for a confident prediction, and its power has no gradient there
        missing = (-torch.expm1(log_p)).clamp_min(torch.finfo(torch.float32).tiny)
        weight = class_weights("weight", self.weight, logits)
        return -(weight * smooth(targets, self.smoothing) * missing**self.gamma * log_p).sum(-1)


@dataclass(frozen=True)
class MSE(Loss):
    """Squared error of a regression, the mean over outputs: C-Mixup (arXiv:2210.05775) and others mix its targets like pixels.

    Labels are numbers, (B,) for one output or (B, num_labels).
    """

    regression: ClassVar[bool] = True

    def __call__(self, logits: Tensor, targets: Tensor, plan: MixPlan | None = None) -> Tensor:
        return (logits.float() - targets).square().mean(-1)

    def plain(self) -> Loss:
        return self


@dataclass(frozen=True)
class MultiHead(Loss):
    """Cross-entropy of several label columns, such as family, genus and species: one head for each.

    The network gives the logits of all heads in one row, so `num_labels` is the sum of `classes`. Labels are class
    numbers (B, heads), or soft (B, num_labels).

    Args:
        classes: number of classes of each head, each at least 2.
        weight: of each head; all 1 if None. The losses of the heads are added.
        smoothing: label smoothing of each head's mixed target, 0 to 1.
    """

    classes: tuple[int, ...] = (2, 2)
    weight: tuple[float, ...] | None = None
    smoothing: float = 0.0

    def __post_init__(self):
        check_counts(2, classes=self.classes)
        check_between(0, 1, smoothing=self.smoothing)
        check_class_weights(weight=self.weight)
        if self.weight is not None and len(self.weight) != len(self.classes):
            raise ValueError(f"weight needs one number for each of the {len(self.classes)} heads, got {len(self.weight)}; give as many.")

    def __call__(self, logits: Tensor, targets: Tensor, plan: MixPlan | None = None) -> Tensor:
        parts = zip(self.heads(logits), self.heads(targets), strict=True)
        losses = [CrossEntropy(self.smoothing)(own, wanted) for own, wanted in parts]
        return sum(weight * loss for weight, loss in zip(self.weight or [1.0] * len(losses), losses, strict=True))

    def heads(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Splits (B, num_labels) logits or targets into one (B, classes) for each head."""
        return rows.split(list(self.classes), 1)

    def check(self, labels: Tensor, batch: int, num_labels: int) -> None:
        if num_labels != sum(self.classes):
            raise ValueError(
                f"the network must have one output for each of the {sum(self.classes)} classes of all heads, got num_labels={num_labels}; "
                "correct the classes of the loss, or set num_labels to their sum."
            )
        if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
            check_heads(labels, batch, self.classes)
            return
        if isinstance(labels, Tensor) and labels.ndim == 1:
            raise ValueError(
                f"labels must be class numbers (B, {len(self.classes)}), one for each head, got {tuple(labels.shape)}; "
                "name the columns with label_names."
            )
        check_labels(labels, batch, num_labels)
        for head in self.heads(labels):
            check_distributions(head)

    def targets(self, labels: Tensor, num_labels: int) -> Tensor:
        if labels.is_floating_point():
            return labels.float()
        return torch.cat([onehot(column, classes) for column, classes in zip(labels.unbind(1), self.classes, strict=True)], 1)

    def smoothed(self, targets: Tensor) -> Tensor:
        return torch.cat([smooth(head, self.smoothing) for head in self.heads(targets)], 1)

    def plain(self) -> Loss:
        return MultiHead(self.classes)


@dataclass(frozen=True)
class BCE(Loss):
    """Binary cross-entropy on every class (ResNet strikes back, arXiv:2110.00476; timm's `BinaryCrossEntropy`).

    Args:
        reduction: over classes. `mean` is timm's; `sum` is OpenMixup's and num_labels times larger, so it needs a smaller learning rate.
        target_threshold: targets above it become 1, others 0 (0.2 in RSB); None leaves them soft.
        smoothing: label smoothing of the mixed target, 0 to 1.
        weight: one number for each class, at least 0; all 1 if None.
        pos_weight: factor of the positive term, one number for each class, as in torch; above 1 it favours recall.
    """

    multi_label: ClassVar[bool] = True

    reduction: str = "mean"
    target_threshold: float | None = None
    smoothing: float = 0.0
    weight: tuple[float, ...] | None = None
    pos_weight: tuple[float, ...] | None = None

    def __post_init__(self):
        check_known("reduction", self.reduction, ["mean", "sum"])
        check_between(0, 1, smoothing=self.smoothing)
        if self.target_threshold is not None:
            check_between(0, 1, target_threshold=self.target_threshold)
        check_class_weights(weight=self.weight, pos_weight=self.pos_weight)

    def __call__(self, logits: Tensor, targets: Tensor, plan: MixPlan | None = None) -> Tensor:
        # rounding may give two shares of one class a sum above 1, and some papers do
        targets = smooth(targets.clamp(0, 1), self.smoothing)
        if self.target_threshold is not None:
            targets = (targets > self.target_threshold).float()
        positive = None if self.pos_weight is None else class_weights("pos_weight", self.pos_weight, logits)
        losses = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none", pos_weight=positive)
        losses = class_weights("weight", self.weight, logits) * losses
        return losses.mean(-1) if self.reduction == "mean" else losses.sum(-1)

    def plain(self) -> Loss:
        return BCE(self.reduction)


def rescale(shares: Tensor, threshold: float, power: float) -> Tensor:
    """`r(v) = min(1, (v / threshold) ** power)` of shares above 0; 0 stays 0 (DecoupleMix, section 4.3)."""
    return torch.where(shares > 0, (shares / threshold).clamp(0, 1) ** power, 0)


def decoupled_log_probs(logits: Tensor, present: Tensor) -> Tensor:
    """(B, num_labels): log-softmax of each class over that class and the classes outside the mixture.

    `present` (B, num_labels) bool: the classes in the mixture. For two of them, a and b, the value at a is `z_a - log sum_{c != b} exp z_c`.
    """
    # not -inf: its gradient is NaN if a mixture holds all classes
    absent = logits.masked_fill(present, torch.finfo(logits.dtype).min).logsumexp(1, keepdim=True)
    return logits - torch.logaddexp(absent, logits)


@dataclass(frozen=True)
class Decoupled(Loss):
    """DecoupleMix (Liu et al., NeurIPS 2023, arXiv:2203.10761; github.com/Westlake-AI/openmixup is the authors' code).

    The mixed cross-entropy, plus, for each of the two classes, the negative log-probability among all classes except the other one,
    weighted by `eta`. So the two classes of a mixture do not compete with each other, and hard mixtures teach both.

    The classes and their shares are read from the mixed target. So the loss works with any method, with per-sample shares, and in
    collators. Some rows have the plain cross-entropy only: rows that are not a mixture of one-hot labels (soft labels of a teacher),
    and rows with one class (both images have the same class, or a share is within 1e-3 of 0 or 1).

    Deviations from OpenMixup, whose results depend on the order of the class numbers:
    1. Each class has the weight of its own side (OpenMixup swaps the two if the own class number is larger than its partner's in the
       first sample).
    2. The share may differ from sample to sample.
    3. Mixtures at exactly one half count.
    4. Smoothing changes the mixed cross-entropy only.

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
    """DecoupleMix (arXiv:2203.10761) for binary cross-entropy: a class can count fully although its share is below 1.

    Targets are `min(1, (share / threshold) ** power)`. With the defaults this is the plain mixed BCE. With power 0 every class in the
    mixture has target 1. Two images of one class count as one share, the sum of both (OpenMixup applies the function to each, and their
    sum may exceed 1).

    Args:
        threshold, power: `t` and `xi` of the paper.
        negative_weight: weight of the classes that are not in the mixture, 0 to 1.
        reduction: over classes. `mean` is timm's; `sum` is OpenMixup's and num_labels times larger, so it needs a smaller learning rate.
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

    def plain(self) -> Loss:
        return BCE(self.reduction)
