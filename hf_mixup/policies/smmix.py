"""SMMix."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_mixup.core.checks import check_divisible, check_range
from hf_mixup.core.plan import Boxes, MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import partners


@dataclass(frozen=True)
class SMMix(SamplePolicy):
    """SMMix (Chen et al., ICCV 2023, arXiv:2212.12977; github.com/ChenMnZ/SMMix): pastes the region of the partner that the network
    attends to most over the region of the own image that it attends to least.

    Regions are squares of whole patches, of one size for a batch. The value of a patch is the attention that it gets from all patches of the
    clean image, in evaluation mode, as in the official code. (OpenMixup uses the class token's attention, in training mode.)

    Args:
        scope: smallest and largest side of the square, as shares of the grid's shorter side. All whole numbers of patches between are equally
            probable.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"images", "patch_attention"})

    scope: tuple[float, float] = (0.25, 0.75)

    def __post_init__(self):
        check_range(0, 1, scope=self.scope)

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        attention = signals["patch_attention"]
        check_divisible(tuple(shape[2:]), tuple(attention.shape[1:]))
        sides = square_sides(min(attention.shape[1:]), self.scope)
        side = sides[int(torch.randint(len(sides), (), generator=rng))]
        partner = partners(shape[0], "batch", rng).partner
        return max_min_plan(signals["images"], attention, partner, side)


def square_sides(grid: int, scope: tuple[float, float]) -> range:
    least = max(1, int(scope[0] * grid))
    return range(least, max(least, int(scope[1] * grid)) + 1)


def extreme_squares(attention: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The squares of `side` patches with the least and the most attention (B, h, w): (B, 2) int64 each, top and left."""
    sums = F.avg_pool2d(attention.float()[:, None], side, stride=1)[:, 0]
    width = sums.shape[2]
    places = sums.flatten(1)
    return tuple(torch.stack([place // width, place % width], 1) for place in (places.argmin(1), places.argmax(1)))


def max_min_plan(images: Tensor, attention: Tensor, partner: Tensor, side: int) -> MixPlan:
    """The plan that pastes a square of `side` patches from the partner's most attended place to the own image's least attended place."""
    size, grid = tuple(images.shape[2:]), tuple(attention.shape[1:])
    cell = torch.tensor([length // cells for length, cells in zip(size, grid, strict=True)], device=images.device)
    partner = partner.to(images.device, non_blocking=True)
    least, most = extreme_squares(attention, side)
    shift = (most[partner] - least) * cell
    rows, cols = ((torch.arange(n, device=images.device) + by[:, None]) % n for n, by in zip(size, shift.unbind(1), strict=True))
    channels = torch.arange(images.shape[1], device=images.device)[:, None, None]
    moved = images[partner[:, None, None, None], channels, rows[:, None, :, None], cols[:, None, None, :]]
    top, left = (least * cell).unbind(1)
    edges = torch.stack([top, top + side * cell[0], left, left + side * cell[1]], 1)
    lam = torch.full((len(images),), 1 - side * side / (grid[0] * grid[1]), device=images.device)
    return MixPlan.pair(partner, Boxes(edges, size), lam, (images, moved))
