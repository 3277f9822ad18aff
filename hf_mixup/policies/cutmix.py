"""CutMix."""

from dataclasses import dataclass

import torch

from hf_mixup.core.checks import check_between, check_mode, check_positive, check_range
from hf_mixup.core.geometry import box_plan, minmax_boxes, random_boxes
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import beta, partners


@dataclass(frozen=True)
class CutMix(SamplePolicy):
    """CutMix (Yun et al., ICCV 2019, arXiv:1905.04899; github.com/clovaai/CutMix-PyTorch): paste one box of the partner.

    The box has the area `1 - lam` of the image, with `lam ~ Beta(alpha, alpha)`, and its centre is anywhere. It is clipped at the border.
    The label's weight is the area that is kept, as in the authors' code.

    Args:
        alpha: both parameters of the Beta, above 0. The paper uses 1.0; the published CIFAR tables of OpenMixup use 0.2.
        margin: how far from the border the centre stays, as a share of the box's side, 0 to 0.5 (timm). 0 is the paper; 0.5 clips nothing.
        minmax: the smallest and largest side of the box, as shares of the image's, e.g. (0.2, 0.8) (timm). Height and width are
            drawn independently, the box is inside the image, and alpha is not used. None is the paper.
        mode: `sample` draws a box for every image, `pair` for every two that are swapped, `batch` once (the authors' code).
    """

    alpha: float = 1.0
    margin: float = 0.0
    minmax: tuple[float, float] | None = None
    mode: str = "sample"

    def __post_init__(self):
        check_positive(alpha=self.alpha)
        check_between(0, 0.5, margin=self.margin)
        if self.minmax is not None:
            check_range(0, 1, minmax=self.minmax)
        check_mode(self.mode)

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        size = tuple(shape[2:])
        pairing = partners(shape[0], self.mode, rng)
        if self.minmax is None:
            edges = random_boxes(1 - beta(self.alpha, pairing.draws, rng), size, rng, self.margin)
        else:
            edges = minmax_boxes(self.minmax, pairing.draws, size, rng)
        return box_plan(pairing.partner, pairing.spread(edges), size)
