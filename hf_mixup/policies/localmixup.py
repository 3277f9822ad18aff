"""Local mixup."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_mixup.core.checks import check_between, check_known, check_positive
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import beta


@dataclass(frozen=True)
class LocalMixup(SamplePolicy):
    """Local Mixup (Baena et al., EUSIPCO 2022, arXiv:2201.04368; github.com/raphael-baena/Local-Mixup): Mixup that prefers similar images.

    Image j is the partner with probability proportional to `exp(-locality * distance)`, the image itself included. This is the form of the
    authors' CIFAR-10 notebook. Their scripts for other data sets draw random pairs and weight the losses by the same factor, which is the same
    in the mean, up to a constant. The distance is the root of the mean squared difference of pixels, so it does not depend on the image size.

    Args:
        alpha: both parameters of the Beta of lam, above 0; 1 in the authors' scripts. In the notebook the partner has at least half.
        locality: 0 is Mixup. 0.0554 is the authors' number for CIFAR-10, 0.001 times the Euclidean distance over 3072 values.
        mode: `sample` draws lam for every image, `batch` once (the authors' code).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"images"})

    alpha: float = 1.0
    locality: float = 0.0554
    mode: str = "sample"

    def __post_init__(self):
        check_positive(alpha=self.alpha)
        check_between(0, float("inf"), locality=self.locality)
        check_known("mode", self.mode, ["sample", "batch"])

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        batch = shape[0]
        nearness = -self.locality * distances(signals["images"])
        # the maximum of the logarithms plus Gumbel noise is such a draw, and the host does not wait for the device
        noise = torch.rand(batch, batch, generator=rng, dtype=torch.float64).clamp_(min=1e-300).log_().neg_().log_().neg_()
        partner = (nearness + noise.float().to(nearness.device, non_blocking=True)).argmax(1)
        lam = beta(self.alpha, batch if self.mode == "sample" else 1, rng)
        return MixPlan.pair(partner, None, lam.expand(batch).to(nearness.device, non_blocking=True))


def distances(images: Tensor) -> Tensor:
    """(B, B) float32: the root of the mean squared difference of pixels; 0 on the diagonal."""
    flat = images.flatten(1).float()
    apart = torch.cdist(flat, flat, compute_mode="use_mm_for_euclid_dist") / flat.shape[1] ** 0.5
    return apart * (1 - torch.eye(len(flat), device=flat.device))
