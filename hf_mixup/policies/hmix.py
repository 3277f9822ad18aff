"""HMix: a box of the partner inside a mixture of both images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_mixup.core.checks import check_between, check_mode, check_positive
from hf_mixup.core.geometry import dense_pair, random_boxes
from hf_mixup.core.plan import Boxes, MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import beta, partners


@dataclass(frozen=True)
class HMix(SamplePolicy):
    """HMix (Park et al., NeurIPS 2022, arXiv:2208.09913; github.com/naver-ai/hmix-gmix): CutMix with a smaller box, and Mixup outside it.

    Before clipping, the box has the area `ratio (1 - lam)` and shows the partner. Outside, the own image has the share `lam / (1 - box)`, so
    that its share of the whole image is lam. A ratio of 0 is Mixup; a ratio of 1 is CutMix, except for clipped boxes.

    Deviation: partners are drawn (the authors' code reverses the batch).

    Args:
        alpha: both parameters of the Beta of lam, above 0.
        ratio: share of the partner's part that is cut, 0 to 1; the authors' class has 1.
        mode: `sample` draws lam and the box for every image, `pair` for every two that are swapped, `batch` once (the authors' code).
    """

    alpha: float = 1.0
    ratio: float = 0.5
    mode: str = "sample"

    def __post_init__(self):
        check_positive(alpha=self.alpha)
        check_between(0, 1, ratio=self.ratio)
        check_mode(self.mode)

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        size = tuple(shape[2:])
        pairing = partners(shape[0], self.mode, rng)
        lam = beta(self.alpha, pairing.draws, rng)
        boxes = Boxes(random_boxes((1 - lam) * self.ratio, size, rng), size)
        return MixPlan.pair(pairing.partner, dense_pair(own_share(boxes, lam), pairing.row), pairing.spread(lam))


def own_share(boxes: Boxes, lam: Tensor) -> Tensor:
    """The own share (n, H, W) float32. Its mean is lam (n,)."""
    outside = 1 - boxes.share(torch.float32)
    return outside * (lam / (1 - boxes.area()).clamp(min=1e-12)).clamp(max=1).float()[:, None, None]
