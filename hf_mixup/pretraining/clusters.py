"""Classes that nobody named: clusters of keys, and a classifier of them, for SAMix-C."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_mixup.core.plan import MixPlan, mix_targets


class Clusters(nn.Module):
    """Spherical k-means over keys, a classifier of clusters, and a copy of that classifier without gradients.

    A cluster of `n` keys counts `n ** -0.5`, as in DeepCluster (Caron et al., ECCV 2018, arXiv:1807.05520, section 3.3), at a mean of 1.
    Before the first clustering every one counts 0.

    Args:
        count: of the clusters.
        width: of the keys.
    """

    def __init__(self, count: int, width: int):
        super().__init__()
        self.register_buffer("centroids", torch.zeros(count, width))
        self.register_buffer("weight", torch.zeros(count))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # keys that the queue was given so far
        self.head = nn.Linear(width, count)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.fixed = copy.deepcopy(self.head).requires_grad_(False)

    def losses(self, mixtures: Tensor, clean: Tensor, keys: Tensor, plan: MixPlan) -> tuple[Tensor, Tensor]:
        """(B,) each: of the mixer, whose `mixtures` (B, d) the copy is to see as what they are made of, and of the classifier.

        Args:
            mixtures, clean: (B, d), projections by the key network; `mixtures` with gradients.
            keys: (B, d) of length 1, of the clean images, whose clusters are the classes.
        """
        with torch.autocast(keys.device.type, enabled=False):
            numbers = (keys @ self.centroids.T).argmax(1)
            mixed, alone = mix_targets(plan, numbers, len(self.weight)), F.one_hot(numbers, len(self.weight))
            mixer = self._entropy(self.fixed(mixtures.float()), mixed)
            head = self._entropy(self.head(mixtures.detach().float()), mixed) + self._entropy(self.head(clean.float()), alone)
        return mixer, head

    def _entropy(self, scores: Tensor, targets: Tensor) -> Tensor:
        return -(self.weight * targets * F.log_softmax(scores, 1)).sum(1)

    @torch.no_grad()
    def follow(self) -> None:
        """Makes the copy equal to the classifier."""
        for own, other in zip(self.fixed.parameters(), self.head.parameters(), strict=True):
            own.copy_(other)

    @torch.no_grad()
    def find(self, queue: Tensor, rounds: int = 10) -> None:
        """Clusters the keys of a queue (size, d), from the centroids that there are. Where there are fewer keys than clusters, nothing happens.

        A cluster that loses its last key takes the key that is furthest from its centroid.
        """
        keys = queue[: min(int(self.seen), len(queue))].float()
        count = len(self.centroids)
        if len(keys) < count:
            return
        if not self.weight.any():
            self.centroids.copy_(keys[torch.arange(count, device=keys.device) * len(keys) // count])
        for _ in range(rounds):
            sums, sizes, cosines = torch.zeros_like(self.centroids), torch.zeros_like(self.weight), []
            for some in keys.split(8192):
                cosine, numbers = (some @ self.centroids.T).max(1)
                members = F.one_hot(numbers, count).to(some.dtype)
                sums += members.T @ some
                sizes += members.sum(0)
                cosines.append(cosine)
            empty = (sizes == 0).nonzero().flatten()
            sums[empty] = keys[torch.cat(cosines).topk(len(empty), largest=False).indices]
            self.centroids.copy_(F.normalize(sums, dim=1))
        rarity = sizes.clamp_min(1) ** -0.5
        self.weight.copy_(rarity / rarity.mean())
