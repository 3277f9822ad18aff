"""Boxes, grids and masks shared by several policies."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_mixup.core.plan import Boxes, Dense, MixPlan
from hf_mixup.core.rng import integers


def centred_boxes(side: Tensor, row: Tensor, col: Tensor, size: tuple[int, int]) -> Tensor:
    """The boxes of CutMix's code, (n, 4) int64 `[top, bottom, left, right]`, on the device of the centres.

    Half a side is a whole number of pixels, so an odd side loses one pixel. Boxes are clipped at the border. A side of one or two pixels, such as
    that of a waveform or of stereo sound, has no such half: the box covers it whole, and the other side is cut to the same area.

    Args:
        side: (n,) float64 in [0, 1], the box's side divided by the image's side.
        row, col: (n,) the centre, in pixels.
        size: (H, W) of the image.
    """
    return _around(side, torch.stack([row, col], 1), size)


def thin_sides(size: tuple[int, int]) -> list[int]:
    """The axes of an image that are too short to be cut, so that boxes cover them whole. Raises ValueError if both are."""
    thin = [axis for axis, length in enumerate(size) if length <= 2]
    if len(thin) == 2:
        raise ValueError(f"boxes need a side of at least 3 pixels or patches, got {size[0]} x {size[1]}; use larger images, or mixup.")
    return thin


def _around(side: Tensor, centre: Tensor, size: tuple[int, int]) -> Tensor:
    """The same for centres (n, 2)."""
    lengths, thin = torch.tensor(size), thin_sides(size)
    ratio = side.double() ** 2 if thin else side.double()
    half = ((ratio[:, None] * lengths).long() // 2).to(centre.device, non_blocking=True)
    edges = torch.stack([centre - half, centre + half], 2).clamp_(min=0)  # (n, 2 axes, 2 ends)
    edges = torch.minimum(edges, lengths[:, None].to(centre.device, non_blocking=True))
    for axis in thin:
        edges[:, axis, 0], edges[:, axis, 1] = 0, size[axis]
    return edges.flatten(1)


def centred_spans(share: Tensor, length: int, rng: torch.Generator) -> Tensor:
    """Parts of a line, `share` (n,) of its length in whole steps, with centres uniform over it and clipped at its ends: (n, 2) int64, the first
    and the one after the last."""
    steps = (share * length).round().long()
    first = integers(torch.zeros_like(steps), torch.full_like(steps, length), rng) - steps // 2
    return torch.stack([first, first + steps], 1).clamp_(0, length)


def random_boxes(area: Tensor, size: tuple[int, int], rng: torch.Generator, margin: float = 0.0) -> Tensor:
    """Boxes with the given areas (n,), as shares of the image before clipping, and centres uniform over the pixels: (n, 4) int64.

    `margin` keeps centres away from the border, by this share of the box's side, so that less is clipped. At 0.5 nothing is clipped.
    """
    side, lengths = area.sqrt(), torch.tensor(size)
    if margin == 0:  # nothing else to work out
        return _around(side, (torch.rand(len(side), 2, generator=rng, dtype=torch.float64) * lengths).long(), size)
    away = (margin * (side[:, None] * lengths).floor()).long()
    return _around(side, integers(away, lengths - away, rng), size)


def minmax_boxes(minmax: tuple[float, float], count: int, size: tuple[int, int], rng: torch.Generator) -> Tensor:
    """Boxes anywhere inside the image, (count, 4) int64. Height and width are independent, uniform between two shares of the image's."""
    edges, thin = [], thin_sides(size)
    for axis, length in enumerate(size):
        if axis in thin:
            edges += [torch.zeros(count, dtype=torch.int64), torch.full((count,), length)]
            continue
        low, high = (torch.full((count,), int(length * share)) for share in minmax)
        side = integers(low, high, rng)
        start = integers(torch.zeros_like(side), length - side + 1, rng)
        edges += [start, start + side]
    return torch.stack(edges, 1)


def box_plan(partner: Tensor, edges: Tensor, size: tuple[int, int]) -> MixPlan:
    """Pastes one box of the partner; the weight is the area that is kept after clipping."""
    boxes = Boxes(edges, size)
    return MixPlan.pair(partner, boxes, 1 - boxes.area())


def dense_pair(own: Tensor, row: Tensor) -> Dense:
    """The mask of two images. `own` (draws, H, W), bool or float32, is the share of the own image; image b uses draw `row[b]`."""
    both = own.new_empty((len(own), 2, *own.shape[1:]), dtype=torch.float32)
    both[:, 0] = own
    torch.neg(both[:, 0], out=both[:, 1]).add_(1)
    if len(both) == 1:
        return Dense(both.expand(len(row), -1, -1, -1))
    # as many draws as images: image b uses draw b
    return Dense(both if len(both) == len(row) else both[row.to(both.device, non_blocking=True)])


def largest_divisor(number: int, most: int) -> int:
    return max(divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0)


def block_grid(size: tuple[int, int], wanted: tuple[int, ...], rng: torch.Generator) -> tuple[int, int]:
    """Into how many blocks both sides of the image are cut: a random one of the `wanted` numbers that divide both.

    If none does, it is the largest number up to `max(wanted)` that does. Sides without such a number, as those of a waveform, are cut into
    different numbers of blocks, the largest up to `max(wanted)` for each.

    Raises:
        ValueError: if no such number is above 1 for either side: one block would mix nothing.
    """
    common, most = math.gcd(*size), max(wanted)
    fitting = [count for count in wanted if common % count == 0] or [largest_divisor(common, most)]
    count = fitting[int(torch.randint(len(fitting), (), generator=rng))]
    grid = (count, count) if count > 1 else tuple(largest_divisor(side, most) for side in size)
    if grid == (1, 1):
        raise ValueError(
            f"images must have a side that 2 to {most} blocks divide, got {size[0]} x {size[1]} pixels; resize them, or set block_nums."
        )
    return grid


def pooled_evidence(evidence: Tensor, grid: tuple[int, int]) -> Tensor:
    """The share of the evidence (B, H, W) that falls into each cell of a grid: (B, h, w) float32, summing to 1.

    An image without any evidence gets a uniform share, since dividing by its sum would give NaN.
    """
    kernel = tuple(side // cells for side, cells in zip(evidence.shape[1:], grid, strict=True))
    pooled = F.avg_pool2d(evidence.float()[:, None], kernel)[:, 0]
    total = pooled.sum((1, 2), keepdim=True)
    return torch.where(total > 0, pooled / total, 1 / (grid[0] * grid[1]))


def enlarged(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Repeats every cell of (..., h, w) as a block of pixels, (..., H, W). h and w must divide H and W."""
    *lead, h, w = grid.shape
    return grid[..., :, None, :, None].expand(*lead, h, size[0] // h, w, size[1] // w).reshape(*lead, *size)
