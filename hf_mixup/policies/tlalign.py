"""The images of TL-Align."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_mixup.core.checks import check_divisible, check_mode, check_positive
from hf_mixup.core.geometry import box_plan, random_boxes
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import beta, partners


@dataclass(frozen=True)
class TokenCutMix(SamplePolicy):
    """CutMix by whole tokens, as in TL-Align (Xiao et al., ICCV 2023, arXiv:2210.06455; github.com/Euphoria16/TL-Align):
    the box is drawn on the grid of patches, so that no token holds two images.

    Small boxes vanish on a coarse grid; then the image stays whole.

    Args:
        alpha: both parameters of the Beta from which the area is drawn, above 0.
        mode: which images share a box; `batch` is the official one.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"token_grid"})

    alpha: float = 1.0
    mode: str = "sample"

    def __post_init__(self):
        check_positive(alpha=self.alpha)
        check_mode(self.mode)

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        size, grid = tuple(shape[2:]), tuple(signals["token_grid"].shape)
        check_divisible(size, grid)
        pairing = partners(shape[0], self.mode, rng)
        edges = random_boxes(1 - beta(self.alpha, pairing.draws, rng), grid, rng)
        cell = torch.tensor([size[0] // grid[0], size[1] // grid[1]]).repeat_interleave(2)
        return box_plan(pairing.partner, pairing.spread(edges * cell), size)
