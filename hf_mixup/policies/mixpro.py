"""The images of MixPro."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_mixup.core.checks import check_count, check_mode, check_positive
from hf_mixup.core.geometry import dense_pair
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import beta, partners


@dataclass(frozen=True)
class MaskMix(SamplePolicy):
    """MaskMix, the images of MixPro (Zhao et al., ICLR 2023, arXiv:2304.12043; github.com/fistyee/MixPro): random cells of a coarse
    grid are kept, as many as lam says, the others are the partner's.

    `lam ~ Beta(alpha, alpha)`, and `ceil(lam * cells ** 2)` cells are kept, others in every image. Where cells do not divide the
    image the last ones are smaller, and the weight is the area; the official code keeps the share of cells.

    Args:
        alpha: both parameters of the Beta.
        cells: to a side. 4 is the official 56 pixels of 224; 7 puts cells of 32 pixels on patches of 16.
        mode: whose lam is shared; `batch` is the official one. The cells are every image's own.
    """

    alpha: float = 1.0
    cells: int = 4
    mode: str = "sample"

    def __post_init__(self):
        check_positive(alpha=self.alpha)
        check_count(1, cells=self.cells)
        check_mode(self.mode)

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        pairing = partners(shape[0], self.mode, rng)
        lam = pairing.spread(beta(self.alpha, pairing.draws, rng))
        order = torch.rand(shape[0], self.cells**2, generator=rng).argsort(1)
        kept = kept_cells(order, lam).unflatten(1, (self.cells, self.cells))
        return cell_plan(kept, pairing.partner, tuple(shape[2:]), signals.device)


def kept_cells(order: Tensor, lam: Tensor) -> Tensor:
    """(B, n) bool: the first `ceil(lam * n)` cells in `order` (B, n)."""
    first = torch.arange(order.shape[1]) < (lam * order.shape[1]).ceil()[:, None]
    return torch.zeros_like(first).scatter(1, order, first)


def cell_plan(kept: Tensor, partner: Tensor, size: tuple[int, int], device: torch.device | str = "cpu") -> MixPlan:
    """From kept cells (B, g, h), of as many whole pixels that all fit over the image of `size`; what stands out is cut off."""
    rows, cols = (torch.arange(length) // math.ceil(length / cells) for length, cells in zip(size, kept.shape[1:], strict=True))
    pixels = rows.bincount(minlength=kept.shape[1])[:, None] * cols.bincount(minlength=kept.shape[2])
    lam = (kept * pixels).sum((1, 2)).double() / (size[0] * size[1])
    own = kept.to(device)[:, rows.to(device)][:, :, cols.to(device)]
    return MixPlan.pair(partner, dense_pair(own, torch.arange(len(kept))), lam)
