"""Measures of a classifier, as functions of arrays; `measures.py` has them for the library `evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_mixup.core.losses import CrossEntropy, Loss, MultiHead


def mixed_accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Training accuracy that means something under mixing: (B,) float32.

    The weight of the heaviest class counts when it is predicted first, that of the second when it is predicted second, so a
    perfect network scores 1, and an unmixed image is scored as ever. Classes of one weight may come in any order.

    Args:
        logits, targets: (B, num_labels).
    """
    k = min(2, targets.shape[1])
    weight = targets.topk(k).values
    predicted = targets.gather(1, logits.topk(k).indices)
    return (weight * (predicted == weight)).sum(1) / weight.sum(1).clamp_min(1e-12)


def training_accuracy(loss: Loss, logits: Tensor, targets: Tensor, several: bool = False) -> Tensor | None:
    """(B,) float32, the accuracy on mixed targets that fits the loss; None for a regression, which has none.

    With `several` labels an image, or one output, the share of classes that are told rightly from absent ones under a loss that is
    made for it; of several heads, their mean.
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
    """`compute_metrics` of a Trainer, by what the loss takes for labels. All are shares from 0 to 1 unless said otherwise.

    - classes: `accuracy`, and the same as `top1`, and `top5`; soft references count by their heaviest class
    - several labels: `mAP`, the mean over classes of the average precision; `exact_match`; `f1` over all labels, at a
      probability of one half
    - several heads: `accuracy_0`, ... of each, `accuracy`, their mean, and `exact_match`
    - regression: `mse` and `mae`, of the labels' unit

    With `batch_eval_metrics` it keeps predictions and labels until the last batch has come.
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
        """Every batch for itself, with `eval_do_concat_batches=False` too."""
        pairs = []
        for scores, references in self._batches:
            pairs += zip(scores, references, strict=True) if isinstance(scores, list) else [(scores, references)]
        return pairs

    def measure(self, scores: np.ndarray, references: np.ndarray) -> dict[str, float]:
        """`scores` (N, num_labels), or (N,) of classes that were chosen already; `references` as the loss takes labels."""
        if self.loss.regression:
            apart = scores.reshape(len(scores), -1).astype(np.float64) - references.reshape(len(references), -1)
            return {"mse": float(np.square(apart).mean()), "mae": float(np.abs(apart).mean())}
        if isinstance(self.loss, MultiHead):
            return self._of_heads(scores, references)
        if self.loss.multi_label and (references.ndim == 2 or (scores.ndim == 2 and scores.shape[1] == 1)):
            return multi_label_metrics(scores, references.reshape(len(references), -1))
        references = references.argmax(1) if references.ndim == 2 else references
        if scores.ndim == 1:  # of preprocess_logits_for_metrics
            accuracy = float((scores == references).mean())
            return {"accuracy": accuracy, "top1": accuracy}
        # argpartition has no order for NaN
        scores = np.nan_to_num(scores.astype(np.float32), nan=-np.inf)
        top1, top5 = (top_k_accuracy(scores, references, k) for k in (1, 5))
        return {"accuracy": top1, "top1": top1, "top5": top5}

    def _of_heads(self, scores: np.ndarray, references: np.ndarray) -> dict[str, float]:
        ends = np.cumsum(self.loss.classes)[:-1]
        if scores.shape[1] != len(self.loss.classes):  # classes that were chosen already have one column for each head
            scores = np.stack([head.argmax(1) for head in np.split(scores, ends, 1)], 1)
        if references.shape[1] != len(self.loss.classes):
            references = np.stack([head.argmax(1) for head in np.split(references, ends, 1)], 1)
        right = scores == references
        each = {f"accuracy_{head}": float(share) for head, share in enumerate(right.mean(0))}
        return {"accuracy": float(right.mean()), **each, "exact_match": float(right.all(1).mean())}


classification_metrics = TrainerMetrics()


def multi_label_metrics(scores: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """`mAP`, `exact_match` and `f1` of logits (N, C) against labels (N, C), present above one half.

    Average precision is the mean precision at each present image, those in order of their logits; ties share the precision of
    the last of them, so the order of rows does not matter. Classes that no image has do not count.
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
    last = np.append(ordered[1:] != ordered[:-1], True).nonzero()[0]  # of every group of equal scores
    hits = np.cumsum(right)[last]
    return float((np.diff(hits, prepend=0) * hits / (last + 1)).sum() / right.sum())


def _arrays(values: Any) -> Any:
    """Logits or labels as arrays: of tuples the first, of lists of batches each, of tensors on any device."""
    if isinstance(values, list):
        return [_arrays(value) for value in values]
    if isinstance(values, tuple):
        return _arrays(values[0])
    if not isinstance(values, Tensor):
        return np.asarray(values)
    return (values.float() if values.is_floating_point() else values).cpu().numpy()


@dataclass(frozen=True, eq=False)
class Bins:
    """Predictions put together by their confidence, from low to high; (bins,) each. Empty bins hold 0.

    Attributes:
        count: predictions in the bin.
        accuracy: share of them that is right.
        confidence: their mean confidence.
    """

    count: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error: the mean gap between confidence and accuracy, every prediction counting once."""
        return float((self.count * np.abs(self.accuracy - self.confidence)).sum() / self.count.sum())


def confidence_bins(probabilities: np.ndarray, references: np.ndarray, bins: int = 10, equal_mass: bool = False) -> Bins:
    """What a reliability diagram shows.

    Equal widths are those of arXiv:1706.04599, each bin with its upper edge. Equal masses (arXiv:1904.01685) have the same
    number of predictions, up to one; where an edge falls between predictions of one confidence, they share their accuracy, so
    that the order of the rows does not matter. Weights and gaps are of the same bin; OpenMixup's `ece_score` sorts the gaps
    first, and is wrong wherever they are not monotone.

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
        # edges as the confidences are, or 0.1 in single precision would lie above 0.1
        edges = np.linspace(0, 1, bins + 1).astype(confidence.dtype)[1:-1]
        place = np.searchsorted(edges, confidence, side="left")
    count = np.bincount(place, minlength=bins)
    per_bin = [np.bincount(place, values, bins) / np.maximum(count, 1) for values in (right, confidence.astype(np.float64))]
    return Bins(count, *per_bin)
