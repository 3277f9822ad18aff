"""MergeMix."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_mixup.core.checks import check_between, check_divisible, check_known, check_mode, check_positive
from hf_mixup.core.geometry import dense_pair
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import beta, partners


@dataclass(frozen=True)
class MergeMix(SamplePolicy):
    """MergeMix for images (Jin et al., 2025, arXiv:2510.23479; OpenMixup's `mergemix.py`): the patches of the own image that the network finds
    most important stay, the partner fills the rest.

    A patch is worth what it attends to the class token, read in a pass of the clean image in which alike tokens are merged block by block
    (ToMe, arXiv:2210.09461), so that patches of one cluster are worth the same. `floor(lam N)` of N patches stay, and the label's weight is
    their share. In the catalogue its step is `KeepClean(clean_alpha=0.8)`: a Mixup batch beside the mixtures, the second loss of the authors.

    Deviations from OpenMixup: attention and clusters are of the same block, where it reads the attention of one block by the clusters of the
    last one; tokens are merged after a block, not between its attention and its MLP; the counts of merged tokens fall on a straight line,
    which it rounds down, so that the first block makes up for the rest; the pass of the clean image is in evaluation mode and has no gradient;
    labels are not weighed by normal draws (`lam_scale`, in its settings for CIFAR-100); the loss is the mean of the mixture's and Mixup's,
    where it adds them; partners are any permutation, where it draws up to ten to find one in which no image meets itself; the loss that ranks
    answers of language models (`use_ranking`, in the authors' code for LLaVA) is none of image classification, and not here.

    Args:
        alpha: both parameters of the Beta of lam.
        merged: share of the patches that are merged away over all blocks, more in early ones; 0.25 on ImageNet there.
        depth: which block is read, as a share of the blocks: 0.75 is the ninth of twelve, 1 the last.
        pairing: `random`, or `overlap`, where the partner is the image whose important patches overlap the own ones least.
        teacher: Hub id or folder of a frozen vision transformer that is asked; None for the network in training.
        mode: `sample` draws lam for every image, `pair` for every two that change places, `batch` once (the authors' code).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"merged_attention"})

    alpha: float = 1.0
    merged: float = 0.5
    depth: float = 0.75
    pairing: str = "random"
    teacher: str | None = None
    mode: str = "sample"

    def __post_init__(self):
        check_positive(alpha=self.alpha)
        check_between(0, 1, merged=self.merged, depth=self.depth)
        check_known("pairing", self.pairing, ["random", "overlap"])
        check_mode(self.mode)

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        worth = signals["merged_attention"]
        check_divisible(tuple(shape[2:]), tuple(worth.shape[1:]))
        pairing = partners(shape[0], self.mode, rng)
        lam = pairing.spread(beta(self.alpha, pairing.draws, rng))
        stay = important(worth, lam.to(worth.device, non_blocking=True))
        partner = pairing.partner if self.pairing == "random" else least_overlap(stay)
        return MixPlan.pair(partner.to(worth.device, non_blocking=True), dense_pair(stay, pairing.row), stay.double().mean((1, 2)))


def important(worth: Tensor, lam: Tensor) -> Tensor:
    """(B, h, w) bool: of every image the `floor(lam N)` patches of the most `worth` (B, h, w); lam is (B,) float64."""
    rank = worth.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(1)
    return (rank < (lam * worth[0].numel()).floor()[:, None]).view_as(worth)


def least_overlap(stay: Tensor) -> Tensor:
    """(B,) int64: for every image the other one with which its patches `stay` (B, h, w) cover most together."""
    masks = stay.flatten(1).float()
    count = masks.sum(1)
    covered = count[:, None] + count - masks @ masks.mT
    return (covered - torch.eye(len(masks), device=masks.device) * masks.shape[1] * 2).argmax(1)
