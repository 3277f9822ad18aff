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
    """MergeMix for images (Jin et al., 2025, arXiv:2510.23479; OpenMixup's `mergemix.py`): keeps the patches of the own image that the network
    finds most important, and fills the rest with the partner.

    The importance of a patch is its attention to the class token, in a pass of the clean image that merges similar tokens block by block
    (ToMe, arXiv:2210.09461). So all patches of one cluster are equally important. `floor(lam N)` of the N patches stay. The label's weight is
    their share. The step of the method is `KeepClean(clean_alpha=0.8)`: a Mixup batch beside the mixtures, the second loss of the authors.

    Deviations from OpenMixup:
    1. Attention and clusters come from the same block (OpenMixup reads the attention of one block with the clusters of the last block).
    2. Tokens are merged after a block, not between its attention and its MLP.
    3. The numbers of merged tokens fall on a straight line from block to block (OpenMixup rounds them down, and corrects the first block).
    4. The pass of the clean image is in evaluation mode and has no gradient.
    5. The label's weights are not replaced by normal draws (`lam_scale`, in the settings for CIFAR-100).
    6. The loss is the mean of both losses (OpenMixup adds them).
    7. Partners are any permutation (OpenMixup draws up to ten, to find one in which no image meets itself).
    8. The loss that ranks answers of language models (`use_ranking` in the authors' code for LLaVA) is not here: it is no image classification.

    Args:
        alpha: both parameters of the Beta of lam, above 0.
        merged: share of the patches that is merged away over all blocks, more in early blocks; 0.25 on ImageNet in OpenMixup.
        depth: which block is read, as a share of the blocks: 0.75 is the ninth of twelve, 1 the last.
        pairing: `random`, or `overlap`: the partner is the image whose important patches overlap least with the own ones.
        teacher: Hub id or folder of a frozen vision transformer that is used instead; None for the network in training.
        mode: `sample` draws lam for every image, `pair` for every two that are swapped, `batch` once (the authors' code).
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
    """(B, h, w) bool: the `floor(lam N)` patches of each image with the largest `worth` (B, h, w). lam is (B,) float64."""
    rank = worth.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(1)
    return (rank < (lam * worth[0].numel()).floor()[:, None]).view_as(worth)


def least_overlap(stay: Tensor) -> Tensor:
    """(B,) int64: for each image the partner for which the patches `stay` (B, h, w) of both cover the most."""
    masks = stay.flatten(1).float()
    count = masks.sum(1)
    covered = count[:, None] + count - masks @ masks.mT
    return (covered - torch.eye(len(masks), device=masks.device) * masks.shape[1] * 2).argmax(1)
