"""Mixup."""

from dataclasses import dataclass

import torch

from hf_mixup.core.checks import check_mode, check_positive
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import beta, partners


@dataclass(frozen=True)
class Mixup(SamplePolicy):
    """Mixup (Zhang et al., ICLR 2018, arXiv:1710.09412, equation 1; github.com/facebookresearch/mixup-cifar10).

    `x = lam x_i + (1 - lam) x_j`, `y = lam y_i + (1 - lam) y_j`, with `lam ~ Beta(alpha, alpha)`.

    Args:
        alpha: both parameters of the Beta, above 0. The paper's CIFAR value is 1.0; 0.2, used on ImageNet, mostly keeps one image nearly whole.
        mode: `sample` draws lam for every image, `pair` for every two that are swapped, `batch` once (the authors' code).
    """

    alpha: float = 1.0
    mode: str = "sample"

    def __post_init__(self):
        check_positive(alpha=self.alpha)
        check_mode(self.mode)

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        pairing = partners(shape[0], self.mode, rng)
        lam = pairing.spread(beta(self.alpha, pairing.draws, rng))
        return MixPlan.pair(pairing.partner, None, lam)
