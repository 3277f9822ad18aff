"""How often classes occur in the training set, for policies and losses of imbalanced data."""

from __future__ import annotations

from torch import Tensor

from hf_mixup.core.losses import class_weights


def counts_of(class_counts: tuple[int, ...] | None, targets: Tensor) -> Tensor:
    """Images of each class, (num_labels,) float32, at least 1. If `class_counts` is None, those in the batch of `targets` (B, num_labels).

    Raises:
        ValueError: if `class_counts` has another number of classes.
    """
    if class_counts is None:
        return targets.sum(0).clamp_min(1)
    return class_weights("class_counts", class_counts, targets).clamp_min(1)


def rarity(class_counts: tuple[int, ...] | None, targets: Tensor) -> Tensor:
    """(B, B) with equal rows: column j is log(`1 / count`) of the class of image j. Soft targets use the mean of `1 / count`."""
    weight = targets.float() @ (1 / counts_of(class_counts, targets.float()))
    return weight.log().expand(len(targets), -1)
