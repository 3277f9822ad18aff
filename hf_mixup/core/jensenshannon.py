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
    """Cross-entropy of the clean images, and the Jensen-Shannon divergence of what the network says of each image's views
    (AugMix, arXiv:1912.02781, equations 1 and 2; github.com/google-research/augmix).

    The rows of a batch are its views, in as many equal parts: those of `KeepClean`, whose last part is clean, or of a MixupCollator with
    such a method. In a stock Trainer: `MixupLoss(loss=JensenShannon())`.

    Args:
        weight: of the divergence; 12 in the authors' code.
        views: of each image, the clean one among them.
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
        """(views * B,): every row has the loss of its image."""
        parts = targets.chunk(self.views)
        if len(targets) % self.views or (targets.device.type == "cpu" and not all(torch.equal(part, parts[0]) for part in parts)):
            raise ValueError(
                f"JensenShannon compares {self.views} views of every image, got {len(targets)} rows with targets of their own; take the method "
                f"'augmix', or another one with step=KeepClean(mixtures={self.views - 1}) whose labels stay."
            )
        log_p = F.log_softmax(logits.float(), -1).unflatten(0, (self.views, -1))
        p = log_p.exp()
        # clamped as there, where a class that no view expects would have an infinite divergence
        log_mean = p.mean(0).clamp(1e-7, 1).log()
        divergence = (p * (log_p - log_mean)).sum(-1).mean(0)
        clean = CrossEntropy(self.smoothing)(logits.chunk(self.views)[-1], parts[-1])
        return (clean + self.weight * divergence).repeat(self.views)

    def single(self) -> Loss:
        return CrossEntropy(self.smoothing)
