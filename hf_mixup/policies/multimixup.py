"""Mixup of several images."""

from dataclasses import dataclass

import torch

from hf_mixup.core.checks import check_count, check_known, check_positive
from hf_mixup.core.plan import MixPlan, Share
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import beta


@dataclass(frozen=True)
class MultiMixup(SamplePolicy):
    """The linear mixture of several images with which AdAutoMix starts (Qin et al., ICLR 2024, arXiv:2312.11954).

    Shares are independent draws of Beta(alpha, alpha), divided by their sum; for two images they are `lam` and `1 - lam`. Each partner comes
    from its own permutation, so an image may be mixed with itself, as in the authors' code.

    Args:
        alpha: both parameters of the Beta, above 0.
        mix_samples: images in a mixture; 3 in the paper's CIFAR and fine-grained runs, 2 on ImageNet.
        is_random: draws the number of images for every batch, from 2 to `mix_samples`.
        mode: `sample` draws shares for every image, `batch` once (the authors' code).
    """

    alpha: float = 1.0
    mix_samples: int = 3
    is_random: bool = False
    mode: str = "sample"

    def __post_init__(self):
        check_positive(alpha=self.alpha)
        check_count(2, mix_samples=self.mix_samples)
        check_known("mode", self.mode, ["sample", "batch"])

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        batch, count = shape[0], self.mix_samples
        if self.is_random:
            count = int(torch.randint(2, count + 1, (), generator=rng))
        rows = batch if self.mode == "sample" else 1
        if count == 2:
            lam = beta(self.alpha, rows, rng)
            shares = torch.stack([lam, 1 - lam], 1)
        else:
            shares = beta(self.alpha, rows * count, rng).view(rows, count)
            shares = shares / shares.sum(1, keepdim=True)
        shares = shares.expand(batch, -1).float()
        partners = [torch.randperm(batch, generator=rng) for _ in range(count - 1)]
        return MixPlan(torch.stack([torch.arange(batch), *partners], 1), Share(shares), shares)
