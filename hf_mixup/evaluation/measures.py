"""The measures of `metrics.py` for the library `evaluate`: they work offline, and have one feature set, so that `evaluate.combine` takes them."""

from __future__ import annotations

import numpy as np

from hf_mixup.core.checks import check_count, needed
from hf_mixup.evaluation.metrics import confidence_bins, top_k_accuracy

datasets, evaluate = (needed(name, "the measures of an evaluation") for name in ("datasets", "evaluate"))


def _info(description: str, citation: str = "") -> evaluate.MetricInfo:
    features = {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
    info = evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description="predictions: a probability for every class; references: class numbers.",
        features=datasets.Features(features),
    )
    # set after the constructor, which takes it for single values only; without it, ImageNet's 50 million probabilities
    # become Python floats
    info.format = "numpy"
    return info


class _Measure(evaluate.Metric):
    """A measure of probabilities (N, num_labels) against class numbers (N,). Kept in memory, without a script to download."""

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
