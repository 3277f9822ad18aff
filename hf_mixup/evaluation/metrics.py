"""Measures of a classifier. Those of `evaluate` work offline and share one feature set, so that `evaluate.combine` takes them."""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import evaluate
import numpy as np
from torch import Tensor

from hf_mixup.core.checks import check_count


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


def _info(description: str, citation: str = "") -> evaluate.MetricInfo:
    features = {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
    info = evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description="predictions: a probability for every class; references: class numbers.",
        features=datasets.Features(features),
    )
    # set after the constructor, which takes it for single values only; without it, ImageNet's 50 million probabilities
    # come as Python's floats
    info.format = "numpy"
    return info


class _Measure(evaluate.Metric):
    """A measure of probabilities (N, num_labels) against class numbers (N,). Kept in memory, with no script to fetch."""

    def __init__(self):
        super().__init__(keep_in_memory=True)

    def _compute(self, predictions, references) -> dict[str, float]:
        return self.measure(predictions[:], references[:])


class TopK(_Measure):
    """`top<k>`: share of predictions with the class among the k most probable."""

    def __init__(self, k: int = 1):
        check_count(1, k=k)
        self.k = k
        super().__init__()

    def _info(self):
        return _info(f"Share of predictions with the class among the {self.k} most probable.")

    def measure(self, probabilities: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {f"top{self.k}": top_k_accuracy(probabilities, references, self.k)}


class CalibrationError(_Measure):
    """`ece`, or `ece_mass` with bins of equal mass: the expected calibration error of the most probable class, 0 to 1."""

    def __init__(self, bins: int = 10, equal_mass: bool = False):
        check_count(1, bins=bins)
        self.bins, self.equal_mass = bins, equal_mass
        super().__init__()

    def _info(self):
        kind = "mass" if self.equal_mass else "width"
        return _info(f"Expected calibration error over {self.bins} bins of equal {kind}.", "arXiv:1706.04599")

    def measure(self, probabilities: np.ndarray, references: np.ndarray) -> dict[str, float]:
        name = "ece_mass" if self.equal_mass else "ece"
        return {name: confidence_bins(probabilities, references, self.bins, self.equal_mass).error}


class NegativeLogLikelihood(_Measure):
    """`nll`: mean negative logarithm of the class's probability, in nats. Probabilities of 0 count as the smallest float32."""

    def _info(self):
        return _info("Mean negative logarithm of the probability of the class, in nats.")

    def measure(self, probabilities: np.ndarray, references: np.ndarray) -> dict[str, float]:
        own = np.take_along_axis(probabilities, references[:, None], 1)
        return {"nll": float(-np.log(np.maximum(own, np.finfo(np.float32).tiny)).mean(dtype=np.float64))}


class Brier(_Measure):
    """`brier`: mean over predictions of the squared distance to the one-hot class, 0 to 2."""

    def _info(self):
        return _info("Mean squared distance between probabilities and the one-hot class, summed over classes.")

    def measure(self, probabilities: np.ndarray, references: np.ndarray) -> dict[str, float]:
        own = np.take_along_axis(probabilities, references[:, None], 1)[:, 0].astype(np.float64)
        squares = np.square(probabilities, dtype=np.float64).sum(1)
        return {"brier": float((squares - 2 * own + 1).mean())}


def all_measures(bins: int = 10) -> evaluate.CombinedEvaluations:
    """Every measure of this file as one: `.compute(predictions=probabilities, references=classes)`."""
    calibration = [CalibrationError(bins), CalibrationError(bins, equal_mass=True)]
    return evaluate.combine([TopK(1), TopK(5), *calibration, NegativeLogLikelihood(), Brier()])
