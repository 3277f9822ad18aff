"""Losses of mixed targets that SAMix describes for its mixer; the plain cross-entropy is what its published runs used."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def positive_bce(logits: Tensor, targets: Tensor, eta: float) -> Tensor:
    """Binary cross-entropy (B,), summed over the classes, those absent from both images at weight eta.

    What OpenMixup's `neg_weight` does with a sigmoid. Its SAMix configurations set it for a softmax, where it multiplies
    terms that are 0 already.
    """
    losses = F.binary_cross_entropy_with_logits(logits.float(), targets.clamp(0, 1), reduction="none")
    return (losses * torch.where(targets > 0, 1.0, eta)).sum(-1)


def eta_cross_entropy(logits: Tensor, targets: Tensor, eta: float) -> Tensor:
    """Cross-entropy (B,) whose softmax counts classes absent from both images at weight eta, so that the two compete locally.

    Our reading of SAMix's balance of local and global terms (arXiv:2111.15454), not found in the authors' code.
    """
    logits = logits.float()
    weighted = logits + torch.where(targets > 0, 1.0, eta).log()
    return -(targets * (logits - weighted.logsumexp(-1, keepdim=True))).sum(-1)
