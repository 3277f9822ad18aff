"""SmoothMix."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_mixup.core.checks import check_mode, check_range, check_switch
from hf_mixup.core.geometry import dense_pair
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import partners, uniform


@dataclass(frozen=True)
class SmoothMix(SamplePolicy):
    """SmoothMix (Lee et al., CVPR Workshops 2020): the partner is visible through a round Gaussian window.

    The window `exp(-d**2 / 2)` is the partner's share of each pixel; `d` is the distance from a random centre, in units of sigma. The authors
    published no code. This is OpenMixup's form, for images of any size and shape (OpenMixup takes square images of even size). It has no alpha:
    OpenMixup draws a lam and never uses it.

    Args:
        sigma: the smallest and largest sigma, as shares of the image's height and width.
        as_published: swaps the two label weights, a bug of OpenMixup that its tables were trained with. Otherwise the label's weights are the
            visible shares.
        mode: `sample` draws a window for every image, `pair` for every two that are swapped, `batch` once (OpenMixup).
    """

    sigma: tuple[float, float] = (0.25, 0.5)
    as_published: bool = False
    mode: str = "sample"

    def __post_init__(self):
        check_range(0.001, 100, sigma=self.sigma)
        check_switch(as_published=self.as_published)
        check_mode(self.mode)

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        size = tuple(shape[2:])
        pairing = partners(shape[0], self.mode, rng)
        row, col = (torch.randint(length, (pairing.draws,), generator=rng) for length in size)
        rows, cols = windows(row, col, uniform(*self.sigma, pairing.draws, rng), size)
        visible = pairing.spread(rows.mean(1) * cols.mean(1))
        # image-sized tensors are made on the images' device only
        rows, cols = (profile.float().to(signals.device, non_blocking=True) for profile in (rows, cols))
        own = (rows[:, :, None] * cols[:, None, :]).neg_().add_(1)
        lam = visible if self.as_published else 1 - visible
        return MixPlan.pair(pairing.partner, dense_pair(own, pairing.row), lam)


def windows(row: Tensor, col: Tensor, sigma: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The profiles (n, H) and (n, W), float64, of the window. Their outer product is the window, because a Gaussian is separable.

    Its centre is the upper left corner of pixel (`row`, `col`), both (n,), as in OpenMixup's code for even sizes. `sigma` is (n,).
    """
    profiles = []
    for length, centre in zip(size, (row, col), strict=True):
        distance = torch.arange(length) - (centre[:, None] - 0.5)
        profiles.append(torch.exp(-((distance / (length * sigma[:, None])) ** 2) / 2))
    return tuple(profiles)
