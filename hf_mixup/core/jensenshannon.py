"""The loss on several views of every image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_mixup.core.checks import check_between, check_count
from hf_mixup.core.losses import CrossEntropy, Loss
from hf_mixup.core.plan import MixPlan


@dataclass(frozen=True)
class JensenShannon(Loss):
    """Cross-entropy of the clean images, plus the Jensen-Shannon divergence between the predictions for each image's views
    (AugMix, arXiv:1912.02781, equations 1 and 2; github.com/google-research/augmix).

    The batch holds the views one after the other, in equal parts, as `KeepClean` and a MixupCollator with such a method make them.
    The last part is clean. In a stock Trainer: `MixupLoss(loss=JensenShannon())`.

    Args:
        weight: weight of the divergence; 12 in the authors' code.
        views: views of each image, including the clean one.
        smoothing: label smoothing of the cross-entropy, 0 to 1.
    """

    weight: float = 12.0
    views: int = 3
    smoothing: float = 0.0

    def __post_init__(self):
        check_between(0, 1e3, weight=self.weight)
        check_count(2, views=self.views)
        check_between(0, 1, smoothing=self.smoothing)

    def __call__(self, logits: Tensor, targets: Tensor, plan: MixPlan | None = None) -> Tensor:
        """Returns (views * B,) float32. Every row has the loss of its image."""
        parts = targets.chunk(self.views)
        if len(targets) % self.views or (targets.device.type == "cpu" and not all(torch.equal(part, parts[0]) for part in parts)):
            raise ValueError(
                f"JensenShannon compares {self.views} views of every image, got {len(targets)} rows whose targets differ between the views; use the method "
                f"'augmix', or another one that keeps labels, with step=KeepClean(mixtures={self.views - 1})."
            )
        log_p = F.log_softmax(logits.float(), -1).unflatten(0, (self.views, -1))
        p = log_p.exp()
        # clamped as in the authors' code: a class with probability 0 in all views would make the divergence infinite
        log_mean = p.mean(0).clamp(1e-7, 1).log()
        divergence = (p * (log_p - log_mean)).sum(-1).mean(0)
        clean = CrossEntropy(self.smoothing)(logits.chunk(self.views)[-1], parts[-1])
        return (clean + self.weight * divergence).repeat(self.views)

    def single(self) -> Loss:
        return CrossEntropy(self.smoothing)
