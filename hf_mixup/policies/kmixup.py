"""k-mixup."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_mixup.core.checks import check_count, check_known, check_positive, needed
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import beta


@dataclass(frozen=True)
class KMixup(SamplePolicy):
    """k-mixup (Greenewald et al., TMLR 2023, arXiv:2106.02933; github.com/AnmingGu/kmixup-cifar10): Mixup of similar images.

    k images are matched with k others, so that the sum of the distances between the pixels of all pairs is smallest. `k=1` is Mixup.

    Deviations:
    1. The cost is the Euclidean distance, as in the authors' code. The paper uses its square.
    2. The two groups have no image in common, and are at most a fourth of the batch, so that pairs vary. The authors' code matches two
       random groups, in which an image can be paired with itself.

    Args:
        alpha: both parameters of the Beta of lam, above 0; 10 in the authors' example for CIFAR-10.
        k: number of images in a group; 16 in that example.
        mode: `sample` draws lam for every image, `batch` once (the authors' code).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"images"})

    alpha: float = 10.0
    k: int = 16
    mode: str = "sample"

    def __post_init__(self):
        check_positive(alpha=self.alpha)
        check_count(1, k=self.k)
        check_known("mode", self.mode, ["sample", "batch"])

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        batch = shape[0]
        order = torch.randperm(batch, generator=rng)
        size = max(min(self.k, batch // 4), 1)
        rows, others = order.split(size), order.roll(-size).split(size)
        partner = torch.empty_like(order)
        partner[order] = torch.cat(matched(signals["images"], rows, others))
        lam = beta(self.alpha, batch if self.mode == "sample" else 1, rng)
        return MixPlan.pair(partner, None, lam.expand(batch))


def matched(images: Tensor, rows: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> list[Tensor]:
    """For every group, its `others` (k,) int64, in the order of the `rows` (k,) that they are matched with."""
    solver = needed("scipy.optimize", "k-mixup")
    flat = images.detach().flatten(1).float()
    costs = [torch.cdist(flat[own], flat[other], compute_mode="use_mm_for_euclid_dist") for own, other in zip(rows, others, strict=True)]
    # on the host: it copies a few kilobytes, but waits for the device
    costs = torch.cat([cost.flatten() for cost in costs]).cpu().split([cost.numel() for cost in costs])
    return [other[solver.linear_sum_assignment(cost.view(len(other), -1).numpy())[1]] for cost, other in zip(costs, others, strict=True)]
