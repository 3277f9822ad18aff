"""Metrics of a classifier, as functions of arrays. `measures.py` wraps them for the library `evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_mixup.core.losses import CrossEntropy, Loss, MultiHead


def mixed_accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Training accuracy for mixed targets: (B,) float32, 0 to 1.

    It adds the weight of the heaviest class if that is predicted first, and the weight of the second class if that is predicted second. So a
    perfect network has 1, and an unmixed image has its usual accuracy. Classes with equal weights may come in any order.

    Args:
        logits, targets: (B, num_labels).
    """
    k = min(2, targets.shape[1])
    weight = targets.topk(k).values
    predicted = targets.gather(1, logits.topk(k).indices)
    return (weight * (predicted == weight)).sum(1) / weight.sum(1).clamp_min(1e-12)


def training_accuracy(loss: Loss, logits: Tensor, targets: Tensor, several: bool = False) -> Tensor | None:
    """(B,) float32, the accuracy on mixed targets that fits the loss; None for a regression.

    With `several` labels for each image, or one output, and a loss made for that, it is the share of classes that are correctly predicted as
    present or absent. For several heads it is their mean.
    """
    if loss.regression:
        return None
    if loss.multi_label and (several or targets.shape[1] == 1):
        return ((logits > 0) == (targets > 0.5)).float().mean(1)
    if isinstance(loss, MultiHead):
        heads = zip(loss.heads(logits), loss.heads(targets), strict=True)
        return torch.stack([mixed_accuracy(own, wanted) for own, wanted in heads]).mean(0)
    return mixed_accuracy(logits, targets)


def top_k_accuracy(scores: np.ndarray, references: np.ndarray, k: int) -> float:
    """Share of rows whose class is among the k highest scores. `scores` (N, num_labels), `references` (N,)."""
    k = min(k, scores.shape[1])
    best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    return float((best == references[:, None]).any(1).mean())


class TrainerMetrics:
    """`compute_metrics` of a Trainer, depending on the labels of the loss. All are from 0 to 1, if no unit is given.

    - classes: `accuracy`, the same as `top1`, and `top5`; a soft reference counts as its heaviest class
    - several labels: `mAP`, the mean over classes of the average precision; `exact_match`; `f1` over all labels, with
      threshold 0.5
    - several heads: `accuracy_0`, ... for each, `accuracy`, their mean, and `exact_match`
    - regression: `mse` and `mae`, in the unit of the labels

    With `batch_eval_metrics` it keeps predictions and labels until the last batch.
    """

    def __init__(self, loss: Loss | None = None):
        self.loss = CrossEntropy() if loss is None else loss
        self._batches: list[tuple[Any, Any]] = []

    def __call__(self, prediction: Any, compute_result: bool | None = None) -> dict[str, float]:
        """`compute_result` is given with `batch_eval_metrics` alone: whether this is the last batch. None for a whole evaluation."""
        if compute_result is None:
            self.forget()
        self._batches.append((_arrays(prediction.predictions), _arrays(prediction.label_ids)))
        if compute_result is False:
            return {}
        try:
            scores, references = (np.concatenate(parts) for parts in zip(*self._whole(), strict=True))
        finally:
            self.forget()
        return self.measure(scores, references)

    def forget(self) -> None:
        """Drops the batches of an evaluation that was broken off."""
        self._batches = []

    def _whole(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """All batches, one by one, also with `eval_do_concat_batches=False`."""
        pairs = []
        for scores, references in self._batches:
            pairs += zip(scores, references, strict=True) if isinstance(scores, list) else [(scores, references)]
        return pairs

    def measure(self, scores: np.ndarray, references: np.ndarray) -> dict[str, float]:
        """`scores` (N, num_labels), or predicted classes (N,); `references` are labels as the loss takes them."""
        if self.loss.regression:
            apart = scores.reshape(len(scores), -1).astype(np.float64) - references.reshape(len(references), -1)
            return {"mse": float(np.square(apart).mean()), "mae": float(np.abs(apart).mean())}
        if isinstance(self.loss, MultiHead):
            return self._of_heads(scores, references)
        if self.loss.multi_label and (references.ndim == 2 or (scores.ndim == 2 and scores.shape[1] == 1)):
            return multi_label_metrics(scores, references.reshape(len(references), -1))
        references = references.argmax(1) if references.ndim == 2 else references
        if scores.ndim == 1:  # from preprocess_logits_for_metrics
            accuracy = float((scores == references).mean())
            return {"accuracy": accuracy, "top1": accuracy}
        # argpartition has no order for NaN, and a network that gives one is never right
        scores = scores.astype(np.float32)
        references = np.where(np.isnan(scores).any(1), -1, references)
        scores = np.nan_to_num(scores, nan=-np.inf)
        top1, top5 = (top_k_accuracy(scores, references, k) for k in (1, 5))
        return {"accuracy": top1, "top1": top1, "top5": top5}

    def names(self, outputs: int) -> set[str]:
        """The names of its metrics for a network with so many outputs."""
        heads = isinstance(self.loss, MultiHead)
        labels = [np.zeros((2, len(self.loss.classes) if heads else outputs), np.int64), *([] if heads else [np.zeros(2, np.int64)])]
        return {name for references in labels for name in self.measure(np.zeros((2, outputs), np.float32), references)}

    def _of_heads(self, scores: np.ndarray, references: np.ndarray) -> dict[str, float]:
        ends = np.cumsum(self.loss.classes)[:-1]
        if scores.shape[1] != len(self.loss.classes):  # predicted classes have one column for each head
            scores = np.stack([head.argmax(1) for head in np.split(scores, ends, 1)], 1)
        if references.shape[1] != len(self.loss.classes):
            references = np.stack([head.argmax(1) for head in np.split(references, ends, 1)], 1)
        right = scores == references
        each = {f"accuracy_{head}": float(share) for head, share in enumerate(right.mean(0))}
        return {"accuracy": float(right.mean()), **each, "exact_match": float(right.all(1).mean())}


classification_metrics = TrainerMetrics()


def multi_label_metrics(scores: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """`mAP`, `exact_match` and `f1` of logits (N, C) against labels (N, C), present above 0.5.

    Average precision is the mean of the precision at each present image, in the order of the logits. Ties share the precision of the last of
    them, so the order of rows does not matter. Classes that no image has are ignored.
    """
    wanted, found = references > 0.5, scores > 0
    hits = (wanted & found).sum()
    precisions = [_average_precision(scores[:, column], wanted[:, column]) for column in range(scores.shape[1]) if wanted[:, column].any()]
    return {
        "mAP": float(np.mean(precisions)) if precisions else 0.0,
        "exact_match": float((wanted == found).all(1).mean()),
        "f1": float(2 * hits / max(wanted.sum() + found.sum(), 1)),
    }


def _average_precision(scores: np.ndarray, wanted: np.ndarray) -> float:
    order = np.argsort(-scores, kind="stable")
    ordered, right = scores[order], wanted[order]
    last = np.append(ordered[1:] != ordered[:-1], True).nonzero()[0]  # the last row of every group of equal scores
    hits = np.cumsum(right)[last]
    return float((np.diff(hits, prepend=0) * hits / (last + 1)).sum() / right.sum())


def _arrays(values: Any) -> Any:
    """Logits or labels as arrays: the first of a tuple, each of a list of batches, tensors from any device."""
    if isinstance(values, list):
        return [_arrays(value) for value in values]
    if isinstance(values, tuple):
        return _arrays(values[0])
    if not isinstance(values, Tensor):
        return np.asarray(values)
    return (values.float() if values.is_floating_point() else values).cpu().numpy()


@dataclass(frozen=True, eq=False)
class Bins:
    """Predictions grouped by confidence, from low to high; (bins,) each. Empty bins hold 0.

    Attributes:
        count: number of predictions in the bin.
        accuracy: share of them that is correct.
        confidence: their mean confidence.
    """

    count: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error: the mean gap between confidence and accuracy, over all predictions."""
        return float((self.count * np.abs(self.accuracy - self.confidence)).sum() / self.count.sum())


def confidence_bins(probabilities: np.ndarray, references: np.ndarray, bins: int = 10, equal_mass: bool = False) -> Bins:
    """The bins of a reliability diagram.

    Bins of equal width are those of arXiv:1706.04599; each includes its upper edge. Bins of equal mass (arXiv:1904.01685) have the same number
    of predictions, up to one. If an edge falls between predictions with equal confidence, they share their accuracy, so the order of rows does
    not matter. Weight and gap belong to the same bin. (OpenMixup's `ece_score` sorts the gaps first, which is wrong if they are not monotone.)

    Args:
        probabilities: (N, num_labels).
        references: (N,) class numbers.
    """
    confidence = probabilities.max(1)
    right = (probabilities.argmax(1) == references).astype(np.float64)
    if equal_mass:
        _, same, size = np.unique(confidence, return_inverse=True, return_counts=True)
        right = (np.bincount(same, right) / size)[same]
        place = np.empty(len(confidence), dtype=np.int64)
        place[np.argsort(confidence, kind="stable")] = np.arange(len(confidence)) * bins // len(confidence)
    else:
        # edges in the dtype of the confidences; otherwise 0.1 in float32 would be above the edge 0.1
        edges = np.linspace(0, 1, bins + 1).astype(confidence.dtype)[1:-1]
        place = np.searchsorted(edges, confidence, side="left")
    count = np.bincount(place, minlength=bins)
    per_bin = [np.bincount(place, values, bins) / np.maximum(count, 1) for values in (right, confidence.astype(np.float64))]
    return Bins(count, *per_bin)
