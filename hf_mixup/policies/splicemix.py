"""SpliceMix: a grid of small images."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_mixup.core.checks import check_between
from hf_mixup.core.plan import Dense, MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals

GRIDS = ((1, 2), (2, 2), (2, 3))


@dataclass(frozen=True)
class SpliceMix(SamplePolicy):
    """SpliceMix for multi-label classification (Wang et al., 2023, arXiv:2311.15200; github.com/zuiran/SpliceMix): small versions of several
    images of the batch, side by side in a grid. The labels are those of all of them.

    The label is the union of the labels of all cells, so the loss must be multi-label. In a share of the batches some cells are empty; their
    labels are left out. A grid that is not square is turned in half of the batches, at random. The authors' default is one grid for the batch, of 1 x 2, 2 x 2 or
    2 x 3 cells with probability 0.3, 0.4, 0.3.

    Deviations: every image is in a grid of its own, at a random place, and the step `KeepClean` weights clean images four times (the
    authors make a quarter as many grids as images, and average them with the clean images, which is the same in the mean). In an image with fewer
    pixels than cells along a side, such as a waveform, all cells are side by side along the other.

    Args:
        shares: probabilities of the three grids, summing to 1.
        drop_rate: share of batches whose grids have empty cells, 0 to 1. Their number is uniform, from 1 to the number of cells minus 1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"images"})
    united: ClassVar[bool] = True

    shares: tuple[float, ...] = (0.3, 0.4, 0.3)
    drop_rate: float = 0.3

    def __post_init__(self):
        if len(self.shares) != len(GRIDS) or min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"shares must be {len(GRIDS)} numbers of at least 0 that sum to 1, got {self.shares}; rescale them.")
        check_between(0, 1, drop_rate=self.drop_rate)

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        batch = shape[0]
        rows, cols = GRIDS[int(torch.multinomial(torch.tensor(self.shares, dtype=torch.float64), 1, generator=rng))]
        turned, dropping = (torch.rand(2, generator=rng) < torch.tensor([0.5, self.drop_rate])).tolist()
        rows, cols = fitting((cols, rows) if turned else (rows, cols), tuple(shape[2:]))
        cells = rows * cols
        index = torch.stack([torch.arange(batch), *(torch.randperm(batch, generator=rng) for _ in range(cells - 1))], 1)
        empty = int(torch.randint(1, cells, (), generator=rng)) if dropping else 0
        weight = torch.ones(batch, cells)
        weight.scatter_(1, torch.rand(batch, cells, generator=rng).argsort(1)[:, :empty], 0)
        place = torch.rand(batch, cells, generator=rng).argsort(1)  # the cell of each image
        grid = spliced(signals["images"], index, weight, place, (rows, cols))
        mask = cell_masks(place, (rows, cols), tuple(shape[2:])).to(signals.device)
        return MixPlan(index, Dense(mask), weight, (grid,) * cells, united=True)


def fitting(grid: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The grid, or one line of its cells, so that every cell has a pixel. Raises ValueError for images that are too small."""
    cells = grid[0] * grid[1]
    for rows, cols in (grid, (1, cells), (cells, 1)):
        if rows <= size[0] and cols <= size[1]:
            return rows, cols
    raise ValueError(f"splicemix needs a pixel for each of {cells} images, got images of {size[0]} x {size[1]} pixels; use larger ones.")


def spliced(images: Tensor, index: Tensor, weight: Tensor, place: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, C, H, W): the images `index` (B, K) in the cells `place` (B, K) of a grid, times `weight` (B, K), 0 or 1."""
    size = tuple(images.shape[2:])
    index, weight, place = (part.to(images.device, non_blocking=True) for part in (index, weight, place))
    small = resized(images, (max(size[0] // grid[0], 1), max(size[1] // grid[1], 1)))
    at = place.argsort(1)  # for each cell, the column of its image
    cells = small[index.gather(1, at)] * weight.gather(1, at).to(small.dtype)[:, :, None, None, None]
    joined = cells.unflatten(1, grid).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return resized(joined, size)


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(images.shape[2:]) == size:
        return images
    return F.interpolate(images.float(), size, mode="bilinear", align_corners=True).to(images.dtype)


def cell_masks(place: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """(B, K, H, W) float32: 1 in the cell of each image."""
    row, col = (torch.arange(side) * cells // side for side, cells in zip(size, grid, strict=True))
    cell = row[:, None] * grid[1] + col
    return (cell == place[:, :, None, None]).float()
