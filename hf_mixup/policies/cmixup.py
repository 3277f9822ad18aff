"""C-Mixup: mixup of images whose labels are close to each other."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_mixup.core.checks import check_known, check_positive
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import beta, categorical


@dataclass(frozen=True)
class CMixup(SamplePolicy):
    """C-Mixup (Yao et al., NeurIPS 2022, arXiv:2210.05775, equation 6; github.com/huaxiuyao/C-Mixup): mixup for regression, of images
    whose labels are close to each other.

    The partner of image i is drawn with probability proportional to `exp(-|y_i - y_j|^2 / (2 bandwidth^2))`. Then
    `x = lam x_i + (1 - lam) x_j`, `y = lam y_i + (1 - lam) y_j`, with `lam ~ Beta(alpha, alpha)`. Use the loss `mse` for numbers.

    Deviations:
    1. Partners come from the batch (the authors draw from the whole training set, or from the batch with `batch_type`).
    2. An image is never its own partner. In a batch it would often be the most probable one.

    Args:
        bandwidth: width of the kernel, in units of the labels. 1 in the authors' code; their commands use 0.05 to 20.
        alpha: both parameters of the Beta, above 0; 2 in the authors' code.
        mode: `sample` draws lam for every image, `batch` once (the authors' code).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"targets"})

    bandwidth: float = 1.0
    alpha: float = 2.0
    mode: str = "sample"

    def __post_init__(self):
        check_positive(bandwidth=self.bandwidth, alpha=self.alpha)
        check_known("mode of cmixup", self.mode, ["sample", "batch"])

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        scores = kernel(signals["targets"], self.bandwidth)
        partner = categorical(scores.fill_diagonal_(-torch.inf), rng)
        lam = beta(self.alpha, 1 if self.mode == "batch" else shape[0], rng)
        return MixPlan.pair(partner, None, lam.expand(shape[0]))


def kernel(targets: Tensor, bandwidth: float) -> Tensor:
    """(B, B): logarithm of the Gaussian kernel between all pairs of labels (B, num_labels), up to a constant."""
    # differences, not products: large labels that are close to each other would lose precision
    distance = (targets[:, None] - targets[None]).float().square().sum(2)
    return distance / (-2 * bandwidth**2)
