"""The sets of images that SuperMix mixes."""

from dataclasses import dataclass

import torch

from hf_mixup.core.checks import check_count, check_positive
from hf_mixup.core.plan import MixPlan, Share
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import dirichlet


@dataclass(frozen=True)
class DirichletSets(SamplePolicy):
    """Several images of the batch, with shares from a symmetric Dirichlet distribution: the sample policy of SuperMix
    (Dabouei et al., CVPR 2021, arXiv:2003.05034), before its masks are found.

    A set consists of neighbours on a random circle of the images, so an image is not mixed with itself if there are enough images. The
    authors' code takes neighbours in the batch, which the loader has shuffled.

    Args:
        alpha: parameter of the Dirichlet.
        mix_samples: number of images in a set.
    """

    alpha: float = 3.0
    mix_samples: int = 2

    def __post_init__(self):
        check_positive(alpha=self.alpha)
        check_count(2, mix_samples=self.mix_samples)

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        circle = torch.randperm(shape[0], generator=rng)
        index = torch.empty(shape[0], self.mix_samples, dtype=torch.int64)
        index[circle] = torch.stack([circle.roll(-k) for k in range(self.mix_samples)], 1)
        share = dirichlet(self.alpha, shape[0], self.mix_samples, rng).float()
        return MixPlan(index, Share(share), share)
