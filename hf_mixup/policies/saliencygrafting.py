"""Saliency Grafting, the images."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_mixup.core.checks import check_between, check_count, check_mode, check_positive
from hf_mixup.core.geometry import block_grid, dense_pair, pooled_evidence
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import beta, partners


@dataclass(frozen=True)
class SaliencyGrafting(SamplePolicy):
    """Saliency Grafting (Park et al., AAAI 2022, arXiv:2112.08796): salient cells of the partner are grafted on the own image.

    This is our implementation of the paper's description; no code is public. The partner's saliency on an n x n grid, scaled to a mean of 1,
    goes through a softmax with a temperature. Cells above its mean are candidates, and each is pasted with probability
    `p ~ Beta(alpha, alpha)`. The label's weights are the visible share of each image's saliency: `SaliencyLabels`. The mean of 1 and the
    defaults are our reading, so you can set all of them. A partner without saliency is not pasted.

    Args:
        alpha: both parameters of the Beta, above 0.
        temperature: small values keep only the most salient cells, large values all cells above the mean saliency.
        block_nums: how many cells a side may have, drawn for every batch; see `geometry.block_grid`.
        clean_lam: weight of the clean images' own loss; see `Policy`.
        mode: which images share a draw of p.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"saliency"})

    alpha: float = 2.0
    temperature: float = 0.2
    block_nums: tuple[int, ...] = (2, 4, 8, 16)
    clean_lam: float = 0.0
    mode: str = "sample"

    def __post_init__(self):
        check_positive(alpha=self.alpha, temperature=self.temperature)
        check_count(2, **{f"block_nums[{i}]": count for i, count in enumerate(self.block_nums)})
        check_count(1, **{"the number of block_nums": len(self.block_nums)})
        check_between(0, float("inf"), clean_lam=self.clean_lam)
        check_mode(self.mode)

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        pairing = partners(shape[0], self.mode, rng)
        share = pairing.spread(beta(self.alpha, pairing.draws, rng))
        grid = block_grid(tuple(shape[2:]), self.block_nums, rng)
        taken = torch.rand(shape[0], *grid, generator=rng, dtype=torch.float64) < share[:, None, None]
        saliency = pooled_evidence(signals["saliency"], grid)
        partner = pairing.partner.to(saliency.device)
        grafted = candidates(saliency, self.temperature)[partner] & taken.to(saliency.device)
        mask = dense_pair(~grafted, torch.arange(shape[0]))
        return MixPlan.pair(partner, mask, mask.value[:, 0].double().mean((1, 2)))


def candidates(saliency: Tensor, temperature: float) -> Tensor:
    """(B, n, n) bool: the cells whose softmax is above its mean. `saliency` (B, n, n) sums to 1."""
    cells = saliency[0].numel()
    scaled = (saliency * cells / temperature).flatten(1)
    mean = scaled.logsumexp(1, keepdim=True) - torch.tensor(cells).log()
    return (scaled > mean).view_as(saliency)
