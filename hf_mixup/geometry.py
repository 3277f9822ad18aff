"""Boxes, grids and masks shared by several policies."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_mixup.plan import Boxes, MixPlan


def centred_boxes(side: Tensor, row: Tensor, col: Tensor, size: tuple[int, int]) -> Tensor:
    """The boxes of CutMix's code: `side` (n,) float64 in [0, 1] is the ratio of box to image side, (`row`, `col`) the centre.

    Sides are halved in whole pixels, so an odd side loses one, and boxes are clipped at the border. Returns (n, 4) int64
    `[top, bottom, left, right]`.
    """
    edges = []
    for length, centre in zip(size, (row, col), strict=True):
        half = (side.double() * length).floor().long() // 2
        edges += [(centre - half).clamp(0, length), (centre + half).clamp(0, length)]
    return torch.stack(edges, 1)


def random_boxes(area: Tensor, size: tuple[int, int], rng: torch.Generator) -> Tensor:
    """Boxes of the given areas (n,), as shares of the image, before clipping, with centres uniform over the pixels: (n, 4) int64."""
    row, col = (torch.randint(length, area.shape, generator=rng) for length in size)
    return centred_boxes(area.sqrt(), row, col, size)


def box_plan(partner: Tensor, edges: Tensor, size: tuple[int, int]) -> MixPlan:
    """Pastes one box of the partner; the weight is the area really kept."""
    boxes = Boxes(edges, size)
    return MixPlan.pair(partner, boxes, 1 - boxes.area())
