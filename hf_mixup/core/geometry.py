"""Boxes, grids and masks shared by several policies."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_mixup.core.plan import Boxes, Dense, MixPlan
from hf_mixup.core.rng import integers


def centred_boxes(side: Tensor, row: Tensor, col: Tensor, size: tuple[int, int]) -> Tensor:
    """The boxes of CutMix's code: `side` (n,) float64 in [0, 1] is the ratio of box to image side, (`row`, `col`) the centre.

    Sides are halved in whole pixels, so an odd side loses one, and boxes are clipped at the border. A line, one pixel high or wide, is cut
    along its length alone, into the same area. Returns (n, 4) int64 `[top, bottom, left, right]`, where the centres are.
    """
    lengths = torch.tensor(size)
    ratio = side.double() if min(size) > 1 else side.double() ** 2
    half = ((ratio[:, None] * lengths).long() // 2).to(row.device, non_blocking=True)
    centre = torch.stack([row, col], 1)
    edges = torch.stack([centre - half, centre + half], 2).clamp_(min=0)  # (n, 2 axes, 2 ends)
    edges = torch.minimum(edges, lengths[:, None].to(row.device, non_blocking=True)).flatten(1)
    return edges if min(size) > 1 else _whole_across(edges, size)


def _whole_across(edges: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (n, 4) that take the whole of a side of one pixel."""
    for axis, length in enumerate(size):
        if length == 1:
            edges[:, 2 * axis], edges[:, 2 * axis + 1] = 0, 1
    return edges


def random_boxes(area: Tensor, size: tuple[int, int], rng: torch.Generator, margin: float = 0.0) -> Tensor:
    """Boxes of the given areas (n,), as shares of the image, before clipping, with centres uniform over the pixels: (n, 4) int64.

    `margin` keeps centres that share of the box's side away from the border, so that less is clipped; at 0.5 nothing is.
    """
    side = area.sqrt()
    if margin == 0:  # nothing else to work out
        places = torch.rand(len(side), 2, generator=rng, dtype=torch.float64) * torch.tensor(size)
        return centred_boxes(side, *places.long().unbind(1), size)
    lengths = torch.tensor(size)
    away = (margin * (side[:, None] * lengths).floor()).long()
    return centred_boxes(side, *integers(away, lengths - away, rng).unbind(1), size)


def minmax_boxes(minmax: tuple[float, float], count: int, size: tuple[int, int], rng: torch.Generator) -> Tensor:
    """Boxes of independent height and width, uniform between two shares of the image's, anywhere inside it: (count, 4) int64."""
    edges = []
    for length in size:
        if length == 1:  # a line is cut along its length alone
            edges += [torch.zeros(count, dtype=torch.int64), torch.ones(count, dtype=torch.int64)]
            continue
        low, high = (torch.full((count,), int(length * share)) for share in minmax)
        side = integers(low, high, rng)
        start = integers(torch.zeros_like(side), length - side + 1, rng)
        edges += [start, start + side]
    return torch.stack(edges, 1)


def box_plan(partner: Tensor, edges: Tensor, size: tuple[int, int]) -> MixPlan:
    """Pastes one box of the partner; the weight is the area really kept."""
    boxes = Boxes(edges, size)
    return MixPlan.pair(partner, boxes, 1 - boxes.area())


def dense_pair(own: Tensor, row: Tensor) -> Dense:
    """The mask of two images from the own share `own` (draws, H, W), bool or float32, for images that use draw `row` (B,)."""
    both = own.new_empty((len(own), 2, *own.shape[1:]), dtype=torch.float32)
    both[:, 0] = own
    torch.neg(both[:, 0], out=both[:, 1]).add_(1)
    if len(both) == 1:
        return Dense(both.expand(len(row), -1, -1, -1))
    # as many draws as images: everyone has its own, in order
    return Dense(both if len(both) == len(row) else both[row.to(both.device, non_blocking=True)])


def largest_divisor(number: int, most: int) -> int:
    return max(divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0)


def block_count(size: tuple[int, int], wanted: tuple[int, ...], rng: torch.Generator) -> int:
    """How many blocks a side is cut into: one of `wanted` at random, among those that divide both sides of the image.

    Where none does, it is the largest number up to all of them that does; 1 for sides without a common divisor.
    """
    side = math.gcd(*size)
    fitting = [count for count in wanted if side % count == 0] or [largest_divisor(side, max(wanted))]
    return fitting[int(torch.randint(len(fitting), (), generator=rng))]


def pooled_evidence(evidence: Tensor, grid: tuple[int, int]) -> Tensor:
    """The share of every cell of a grid in the evidence (B, H, W) of its image: (B, h, w) float32, summing to 1.

    Uniform for an image without any evidence, where a division by the sum would give NaN.
    """
    kernel = tuple(side // cells for side, cells in zip(evidence.shape[1:], grid, strict=True))
    pooled = F.avg_pool2d(evidence.float()[:, None], kernel)[:, 0]
    total = pooled.sum((1, 2), keepdim=True)
    return torch.where(total > 0, pooled / total, 1 / (grid[0] * grid[1]))


def enlarged(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Every cell of (..., h, w) as a block of pixels, (..., H, W); h and w divide H and W."""
    *lead, h, w = grid.shape
    return grid[..., :, None, :, None].expand(*lead, h, size[0] // h, w, size[1] // w).reshape(*lead, *size)
