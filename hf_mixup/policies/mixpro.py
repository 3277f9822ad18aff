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
    grid are kept, and the others show the partner.

    `lam ~ Beta(alpha, alpha)`. `ceil(lam * cells ** 2)` cells are kept, different ones in every image. If the cells do not divide the image,
    the last ones are smaller. The label's weight is the area; the official code uses the share of the cells.

    Args:
        alpha: both parameters of the Beta, above 0.
        cells: number of cells on a side. 4 is the official value, 56 of 224 pixels; 7 gives cells of 32 pixels, two patches of 16.
        mode: which images share lam; `batch` is the official one. Every image draws its own cells.
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
    """The plan of the kept cells (B, g, h). Cells have whole pixels and cover the image of `size` (H, W); what lies outside is cut off."""
    rows, cols = (torch.arange(length) // math.ceil(length / cells) for length, cells in zip(size, kept.shape[1:], strict=True))
    pixels = rows.bincount(minlength=kept.shape[1])[:, None] * cols.bincount(minlength=kept.shape[2])
    lam = (kept * pixels).sum((1, 2)).double() / (size[0] * size[1])
    own = kept.to(device)[:, rows.to(device)][:, :, cols.to(device)]
    return MixPlan.pair(partner, dense_pair(own, torch.arange(len(kept))), lam)
