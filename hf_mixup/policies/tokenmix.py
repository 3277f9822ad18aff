"""TokenMix."""

import math
import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_mixup.core.checks import check_between, check_count, check_divisible, check_known, check_mode
from hf_mixup.core.geometry import dense_pair, enlarged
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import partners


@dataclass(frozen=True)
class TokenMix(SamplePolicy):
    """TokenMix (Liu et al., ECCV 2022, arXiv:2207.08409; github.com/Sense-X/TokenMix): pastes several blocks of the partner's
    tokens.

    Blocks of random area and shape (aspect ratio 0.3 to 1 / 0.3) are drawn until the partner has `(1 - lam)` of the grid, and `minimum_tokens`
    more. The label policy, `TokenLabels`, reads the evidence that the fields below describe.

    As in the official code, lam is always one half; OpenMixup draws it. The grid has the size of the evidence, instead of always 14 by 14.
    `mask_type="random"` takes single cells.

    Args:
        lam: share of the grid that the own image keeps, before `minimum_tokens` are taken from it.
        minimum_tokens: None for a fourteenth of the grid, which is the official 14 of 14 by 14.
        mask_type: `block` or `random`.
        scores: the evidence for the labels: `attention`, as in OpenMixup, or `activation`, the class activation map. The paper uses
            activation maps of a teacher.
        teacher: Hub id or folder of a frozen image classifier that gives the scores; None for the network in training.
        teacher_size: side in pixels to which images are resized for the teacher.
        mode: which images share a mask. `batch` is the official one; `sample` draws one mask after the other on the CPU.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"token_scores"})

    lam: float = 0.5
    minimum_tokens: int | None = None
    mask_type: str = "block"
    scores: str = "attention"
    teacher: str | None = None
    teacher_size: int | None = None
    mode: str = "batch"

    def __post_init__(self):
        check_between(0, 1, lam=self.lam)
        for name, least in (("minimum_tokens", 0), ("teacher_size", 1)):
            if getattr(self, name) is not None:
                check_count(least, **{name: getattr(self, name)})
        check_known("mask_type", self.mask_type, ["block", "random"])
        check_known("scores", self.scores, ["attention", "activation"])
        check_mode(self.mode)

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        size, grid = tuple(shape[2:]), tuple(signals["token_scores"].shape[1:])
        check_divisible(size, grid)
        pairing = partners(shape[0], self.mode, rng)
        cells = grid[0] * grid[1]
        least = cells // 14 if self.minimum_tokens is None else self.minimum_tokens
        count = min(cells, int((1 - self.lam) * cells) + least)
        if self.mask_type == "random":
            pasted = torch.stack([random_mask(torch.randperm(cells, generator=rng), count, grid) for _ in range(pairing.draws)])
        else:
            # rejection sampling takes many single numbers, for which torch's generator is slow
            draws = random.Random(int(torch.randint(2**62, (), generator=rng)))
            pasted = torch.stack([block_mask(grid, count, draws) for _ in range(pairing.draws)])
        # measured, because the blocks may not reach the count
        lam = 1 - pasted.double().mean((1, 2))
        own = enlarged(~pasted.to(signals.device), size)
        return MixPlan.pair(pairing.partner, dense_pair(own, pairing.row), pairing.spread(lam))


def block_mask(grid: tuple[int, int], count: int, draws: random.Random) -> Tensor:
    """(h, w) bool: blocks that cover at most `count` cells; fewer if ten blocks in a row do not fit.

    A block is always shorter than the whole side.
    """
    height, width = grid
    rows, covered = [0] * height, 0  # one number for each row; its bits are the cells
    while covered < count:
        left = count - covered
        for _ in range(10):
            area = draws.uniform(1, left)
            ratio = math.exp(draws.uniform(math.log(0.3), math.log(1 / 0.3)))
            down, across = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if down >= height or across >= width:
                continue
            top, start = draws.randint(0, height - down), draws.randint(0, width - across)
            block = ((1 << across) - 1) << start
            new = down * across - sum((row & block).bit_count() for row in rows[top : top + down])
            if 0 < new <= left:
                rows[top : top + down] = [row | block for row in rows[top : top + down]]
                covered += new
                break
        else:
            break
    return torch.tensor([[row >> column & 1 for column in range(width)] for row in rows], dtype=torch.bool)


def random_mask(order: Tensor, count: int, grid: tuple[int, int]) -> Tensor:
    """(h, w) bool: the first `count` cells in `order`."""
    mask = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    mask[order[:count]] = True
    return mask.view(grid)
