"""GMix: a Gaussian spot of one image in the other."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_mixup.core.checks import check_mode, check_positive
from hf_mixup.core.geometry import dense_pair
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import beta, partners


@dataclass(frozen=True)
class GMix(SamplePolicy):
    """GMix (Park et al., NeurIPS 2022, arXiv:2208.09913; github.com/naver-ai/hmix-gmix): CutMix with a Gaussian spot instead of a box.

    The image with the smaller share is shown in the spot `exp(-pi d^2 / share)` around a random pixel, with distances d in units of the image's
    sides; the integral of the spot over the plane is that share of the image. The label's weight is the mean of the mask.

    Deviations:
    1. Images need not be square (the authors' code has `H^2`). In a long image the spot is as long; a waveform has one side, and the integral of
       its spot along it is the share.
    2. Partners are drawn (the authors' code reverses the batch).

    Args:
        alpha: both parameters of the Beta of lam, above 0.
        mode: `sample` draws lam and the spot for every image, `pair` for every two that are swapped, `batch` once (the authors' code).
    """

    alpha: float = 1.0
    mode: str = "sample"

    def __post_init__(self):
        check_positive(alpha=self.alpha)
        check_mode(self.mode)

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        size = tuple(shape[2:])
        pairing = partners(shape[0], self.mode, rng)
        lam = beta(self.alpha, pairing.draws, rng)
        centre = (torch.rand(pairing.draws, 2, generator=rng, dtype=torch.float64) * torch.tensor(size)).long()
        own = own_share(lam, centre, size)
        return MixPlan.pair(pairing.partner, dense_pair(own, pairing.row), pairing.spread(own.double().mean((1, 2))))


def own_share(lam: Tensor, centre: Tensor, size: tuple[int, int]) -> Tensor:
    """The own share (n, H, W) float32, from lam (n,) and the centre of the spot, row and column (n, 2)."""
    rows, cols = (torch.arange(side, dtype=torch.float64) - place[:, None] for side, place in zip(size, centre.double().T, strict=True))
    share = torch.minimum(lam, 1 - lam).clamp(min=1e-12)[:, None] ** (2 if min(size) == 1 else 1)
    falls = [torch.exp(-math.pi * places**2 / (share * side * side)) for places, side in zip((rows, cols), size, strict=True)]
    spot = (falls[0][:, :, None] * falls[1][:, None, :]).float()
    return torch.where((lam < 0.5)[:, None, None], spot, 1 - spot)
