"""GridMix."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_mixup.core.checks import check_count, check_mode, check_positive, check_range, check_switch
from hf_mixup.core.geometry import dense_pair
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import beta, integers, partners, uniform


@dataclass(frozen=True)
class GridMix(SamplePolicy):
    """GridMixup (github.com/IlyaDobrynin/GridMixup). OpenMixup lists it as GridMix (Baek et al., Pattern Recognition 2021).

    A rectangle of the image, the cut, is divided into a grid. The partner fills a hole at the upper left of each cell. A hole covers the share
    `1 - lam` of its cell, with `lam ~ Beta(alpha, alpha)`. The label's weight is the area that is kept. (The paper of the same name draws whole
    cells at random and adds a local loss. No benchmark of OpenMixup uses that.)

    Args:
        alpha: both parameters of the Beta, above 0. The published tables of OpenMixup use 0.2, and 1 for ViTs on CIFAR-100.
        n_holes: fewest and most cells across the cut. A cut that is too small for them gets fewer, so small images work.
        hole_aspect_ratio: height by width of a cell.
        cut_area_ratio: smallest and largest area of the cut, as shares of the image's.
        cut_aspect_ratio: smallest and largest height by width of the cut. Of waveforms and stereo sounds, (1 or 2, T), all shapes are in units of
            the sides, because squares of pixels would be next to nothing.
        as_published: repeats a bug of the published code. With these ranges every second cut is larger than the image. We keep the part
            inside. In the published code a negative index counts from the other end: holes completely before the image appear at its end,
            and holes across its edge vanish. Unlike that code, this works for images that are not square.
        mode: `sample` draws a grid for every image, `pair` for every two that are swapped, `batch` once (the published code).
    """

    alpha: float = 1.0
    n_holes: tuple[int, int] = (2, 6)
    hole_aspect_ratio: float = 1.0
    cut_area_ratio: tuple[float, float] = (0.5, 1.0)
    cut_aspect_ratio: tuple[float, float] = (0.5, 2.0)
    as_published: bool = False
    mode: str = "sample"

    def __post_init__(self):
        check_positive(alpha=self.alpha, hole_aspect_ratio=self.hole_aspect_ratio)
        check_range(1, 10000, n_holes=self.n_holes)
        check_count(fewest_holes=self.n_holes[0], most_holes=self.n_holes[1])
        check_range(0.001, 1, cut_area_ratio=self.cut_area_ratio)
        check_range(0.001, 1000, cut_aspect_ratio=self.cut_aspect_ratio)
        check_switch(as_published=self.as_published)
        check_mode(self.mode)

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        size = tuple(shape[2:])
        pairing = partners(shape[0], self.mode, rng)
        draws = pairing.draws
        fewest, most = (torch.full((draws,), int(n)) for n in self.n_holes)
        rows, cols = holes(
            beta(self.alpha, draws, rng),
            integers(fewest, most + 1, rng),
            self.hole_aspect_ratio,
            uniform(*self.cut_area_ratio, draws, rng),
            uniform(*self.cut_aspect_ratio, draws, rng),
            (uniform(0, 1, draws, rng), uniform(0, 1, draws, rng)),
            size,
            self.as_published,
        )
        lam = 1 - rows.sum(1) * cols.sum(1) / (size[0] * size[1])
        # image-sized tensors are made on the images' device only
        rows, cols = (hit.to(signals.device, non_blocking=True) for hit in (rows, cols))
        own = ~(rows[:, :, None] & cols[:, None, :])
        return MixPlan.pair(pairing.partner, dense_pair(own, pairing.row), pairing.spread(lam))


def holes(
    lam: Tensor,
    n_holes: Tensor,
    hole_aspect: float,
    cut_area: Tensor,
    cut_aspect: Tensor,
    place: tuple[Tensor, Tensor],
    size: tuple[int, int],
    as_published: bool,
) -> tuple[Tensor, Tensor]:
    """The rows (n, H) and columns (n, W), bool, that cross a hole. A pixel is in a hole if both its row and its column cross one.

    All draws are (n,), float64. `place`, vertical first, in [0, 1), is where the cut begins, as a share of the room that it has.
    """
    flat = size[0] / size[1] if min(size) <= 2 else 1
    cut_width = (((size[0] * size[1] * cut_area).floor() / cut_aspect / flat).sqrt().floor().long()).clamp(min=1)
    cut_height = ((cut_width * cut_aspect * flat).floor().long()).clamp(min=1)
    # a cell is at least two pixels wide, one of them for the hole
    n_holes = torch.minimum(n_holes, cut_width // 2).clamp(min=1)
    cell_width = -(-cut_width // n_holes)
    cell_height = (cell_width * hole_aspect * flat).floor().long().clamp(min=1)
    crossed = []
    for length, cut, cell, share in zip(size, (cut_height, cut_width), (cell_height, cell_width), place, strict=True):
        begin = ((length - cut) * share).trunc().long()
        # a hole leaves at least a pixel of its cell, where that has more than one
        hole = torch.minimum((cell * (1 - lam).sqrt()).floor().long().clamp(min=1), (cell - 1).clamp(min=1))
        begin, cut, cell, hole = (value[:, None] for value in (begin, cut, cell, hole))
        pixel = torch.arange(length)
        inside = (pixel >= begin) & (pixel < begin + cut) & ((pixel - begin) % cell < hole)
        if as_published:
            first = pixel - (pixel - begin) % cell
            before = pixel - length
            end = before - (before - begin) % cell + hole
            inside = (inside & (first >= 0)) | ((before >= begin) & ((before - begin) % cell < hole) & (end < 0))
        crossed.append(inside)
    return tuple(crossed)
