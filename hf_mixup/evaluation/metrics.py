"""Measures of a classifier, as functions of arrays; `measures.py` has them for the library `evaluate`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


def mixed_accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Training accuracy that means something under mixing: (B,) float32.

    The weight of the heaviest class counts when it is predicted first, that of the second when it is predicted second, so a
    perfect network scores 1, and an unmixed image is scored as ever.

    Args:
        logits, targets: (B, num_labels).
    """
    k = min(2, targets.shape[1])
    weight, wanted = targets.topk(k)
    return (weight * (logits.topk(k).indices == wanted)).sum(1) / weight.sum(1).clamp_min(1e-12)


def top_k_accuracy(scores: np.ndarray, references: np.ndarray, k: int) -> float:
    """Share of rows whose class is among the k highest scores. `scores` (N, num_labels), `references` (N,)."""
    k = min(k, scores.shape[1])
    best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    return float((best == references[:, None]).any(1).mean())


def classification_metrics(prediction) -> dict[str, float]:
    """`compute_metrics` of a Trainer: top-1 and top-5 accuracy, and `accuracy`, the name of top-1 in transformers' scripts.

    Soft references count by their heaviest class.
    """
    scores = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    references = prediction.label_ids
    references = references.argmax(1) if references.ndim == 2 else references
    # argpartition has no order for NaN
    scores = np.nan_to_num(scores.astype(np.float32), nan=-np.inf)
    found = {f"top{k}": top_k_accuracy(scores, references, k) for k in (1, 5)}
    return {**found, "accuracy": found["top1"]}


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
