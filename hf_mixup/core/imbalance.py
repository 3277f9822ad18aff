"""How often classes occur in the training set, for policies and losses of imbalanced data."""

from __future__ import annotations

from torch import Tensor

from hf_mixup.core.losses import class_weights


def counts_of(class_counts: tuple[int, ...] | None, targets: Tensor) -> Tensor:
    """(num_labels,) float32, at least 1: images of each class, in the batch of `targets` (B, num_labels) where they are not known.

    Raises ValueError for another number of classes.
    """
    if class_counts is None:
        return targets.sum(0).clamp_min(1)
    return class_weights("class_counts", class_counts, targets).clamp_min(1)


def rarity(class_counts: tuple[int, ...] | None, targets: Tensor) -> Tensor:
    """(B, B): the same row for every image, the logarithm of `1 / count` of each image's class; of soft targets the mean of `1 / count`."""
    weight = targets.float() @ (1 / counts_of(class_counts, targets.float()))
    return weight.log().expand(len(targets), -1)
