"""The sample policies of published pre-training methods. None needs labels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_mixup.core.checks import check_between, check_positive
from hf_mixup.core.geometry import box_plan, random_boxes
from hf_mixup.core.plan import MixPlan, Share
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import beta, dirichlet, uniform


def folded(lam: Tensor) -> Tensor:
    """The share of the own image, at least one half."""
    return torch.maximum(lam, 1 - lam)


@dataclass(frozen=True)
class IMixup(SamplePolicy):
    """Mixup as in i-Mix (Lee et al., ICLR 2021, arXiv:2010.08887; github.com/kibok90/imix): every image has its own share, at least one half, and
    the partner comes from a random permutation.

    Args:
        alpha: both parameters of the Beta, above 0; 1 in the paper for images.
    """

    alpha: float = 1.0

    def __post_init__(self):
        check_positive(alpha=self.alpha)

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        partner = torch.randperm(shape[0], generator=rng)
        return MixPlan.pair(partner, None, folded(beta(self.alpha, shape[0], rng)))


@dataclass(frozen=True)
class ICutMix(SamplePolicy):
    """CutMix as in i-Mix (arXiv:2010.08887; github.com/kibok90/imix): one box for the batch, of at most half of the image.

    Args:
        alpha: both parameters of the Beta, above 0; 1 in the paper.
    """

    alpha: float = 1.0

    def __post_init__(self):
        check_positive(alpha=self.alpha)

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        partner = torch.randperm(shape[0], generator=rng)
        edges = random_boxes(1 - folded(beta(self.alpha, 1, rng)), tuple(shape[2:]), rng)
        return box_plan(partner, edges.expand(shape[0], -1), tuple(shape[2:]))


@dataclass(frozen=True)
class UnMix(SamplePolicy):
    """Un-Mix (Shen et al., AAAI 2022, arXiv:2003.05438; github.com/szq0214/Un-Mix): the batch is mixed with itself in reversed order, by one
    share or by one box.

    Args:
        alpha: both parameters of the Beta of the share and of the box, above 0; 1 in the paper.
        whole: probability of mixing whole images (`global` in the paper) instead of a box (`region`); 0.5 on CIFAR.
    """

    alpha: float = 1.0
    whole: float = 0.5

    def __post_init__(self):
        check_positive(alpha=self.alpha)
        check_between(0, 1, whole=self.whole)

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        partner = torch.arange(shape[0]).flip(0)
        whole = float(torch.rand((), generator=rng)) < self.whole
        lam = beta(self.alpha, 1, rng)
        if whole:
            return MixPlan.pair(partner, None, lam.expand(shape[0]))
        edges = random_boxes(1 - lam, tuple(shape[2:]), rng)
        return box_plan(partner, edges.expand(shape[0], -1), tuple(shape[2:]))


@dataclass(frozen=True)
class Halves(SamplePolicy):
    """MixCo (Kim et al., 2020, arXiv:2010.06300; github.com/Lee-Gihun/MixCo-Mixup-Contrast): the first half of the batch is mixed with the
    second. Every pair has its own share.

    Rows of the second half repeat the mixtures of the first, so the step needs only the first half. The last image of an odd batch is not
    mixed.
    """

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        half, odd = divmod(shape[0], 2)
        own, lam = torch.arange(shape[0]), uniform(0, 1, half, rng)
        partner = torch.cat([own[half : 2 * half], own[:half], own[2 * half :]])
        return MixPlan.pair(partner, None, torch.cat([lam, 1 - lam, lam.new_ones(odd)]))


@dataclass(frozen=True)
class Strangers(SamplePolicy):
    """Mixup as OpenMixup's MoCoMix draws it (github.com/Westlake-AI/openmixup): one share for the batch, and a partner for every image that is
    never the image itself, but in a batch of one.

    Args:
        alpha: both parameters of the Beta; 2 there.
    """

    alpha: float = 2.0

    def __post_init__(self):
        check_positive(alpha=self.alpha)

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        order = torch.randperm(shape[0], generator=rng)
        partner = torch.empty_like(order).index_copy_(0, order, order.roll(1))  # round a circle in random order
        return MixPlan.pair(partner, None, beta(self.alpha, 1, rng).expand(shape[0]))


def first_half(plan: MixPlan, images: Tensor) -> MixPlan:
    """The mixtures of the first half of the batch (B, C, H, W); for `Halves` these are all mixtures.

    `blend` takes it with `images[: B // 2]`.
    """
    rows = len(images) // 2
    index = plan.index[:rows]
    if not isinstance(plan.mask, Share):
        raise ValueError(f"half a batch must be mixed by shares of whole images, got {type(plan.mask).__name__}; use the policy 'halves'.")
    sources = tuple(images[column] for column in index.unbind(1))
    return replace(plan, index=index, mask=Share(plan.mask.value[:rows]), weight=plan.weight[:rows], sources=sources)


def auxiliary_plan(batch: int, others: int, rng: torch.Generator) -> MixPlan:
    """i-Mix's input mixing: each image is averaged with `others` more, without a change of labels; the own one keeps at least one half."""
    own = torch.arange(batch)
    index = torch.stack([own, *(torch.randperm(batch, generator=rng) for _ in range(others))], 1)
    return auxiliary(index, beta(1.0, batch, rng)[:, None] if others == 1 else dirichlet(1.0, batch, others + 1, rng))


def auxiliary(index: Tensor, drawn: Tensor) -> MixPlan:
    """The plan of `index` (B, 1 + n) with shares `drawn`: (B, 1) from a Beta for one other image, or (B, 1 + n) from a Dirichlet."""
    if index.shape[1] == 2:
        lam = folded(drawn[:, 0])
        share = torch.stack([lam, 1 - lam], 1).float()
    else:
        share = 0.5 * drawn.float()
        share[:, 0] += 0.5
    return MixPlan(index, Share(share), share)
