"""Measures of a classifier."""

from __future__ import annotations

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
    """`compute_metrics` of a Trainer: top-1 and top-5 accuracy. Soft references count by their heaviest class."""
    scores = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    references = prediction.label_ids
    references = references.argmax(1) if references.ndim == 2 else references
    # argpartition has no order for NaN
    scores = np.nan_to_num(scores.astype(np.float32), nan=-np.inf)
    return {f"top{k}": top_k_accuracy(scores, references, k) for k in (1, 5)}
