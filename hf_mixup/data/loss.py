"""The loss of mixed batches in any training loop of transformers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_mixup.core.losses import CrossEntropy, Loss
from hf_mixup.data.collator import in_use
from hf_mixup.method import Method, are_maps


class MixupLoss:
    """The loss of mixed batches for any `Trainer`: `Trainer(..., compute_loss_func=MixupLoss())`, and for your own loop.

    It takes soft labels (B, num_labels) and hard labels (B,). It is right under gradient accumulation, because it divides by the number of
    images of the whole accumulated batch. Evaluation reports `loss.plain()`, without smoothing, weights or thresholds, so losses stay
    comparable.

    Args:
        label_smoothing: of the mixed target, 0 to 1. Use it instead of `label_smoothing_factor`, which is refused with mixing.
        loss: `CrossEntropy()` or another of `hf_mixup.core.losses`; if it has a `smoothing` field, set either that or `label_smoothing`.

    Raises:
        ValueError, TypeError: for smoothing that is given twice, and for a loss that is not an instance of `Loss`. At the first batch: for methods
            with a loss of their own, such as `decouplemix`, if `loss` is not given.
    """

    def __init__(self, label_smoothing: float = 0.0, loss: Loss | None = None):
        if loss is not None and label_smoothing:
            raise ValueError(f"label_smoothing must be given once, got {label_smoothing} beside loss={loss!r}; set it in the loss.")
        if loss is not None and not isinstance(loss, Loss):
            raise TypeError(f"loss must be one of hf_mixup.core.losses, got {type(loss).__name__}; give an instance, such as Focal().")
        self.loss, self._is_chosen = CrossEntropy(label_smoothing) if loss is None else loss, loss is not None
        self._looked = self._compared = self._agreed = False

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """A scalar. `outputs`: logits (B, num_labels), or a model's output with logits; `labels` as in `hf_mixup.core.losses`."""
        logits = logits_of(outputs)
        training = torch.is_grad_enabled()
        if labels.is_floating_point() and not training and not self._looked:
            self._looked = True
            if any(collator.has_made(labels) for collator in in_use):
                warnings.warn(
                    "evaluation was expected to have plain labels, got mixed ones; a MixupCollator given as data_collator mixes the "
                    "evaluation set too: give the Trainer callbacks=[MixupCallback(collator)] instead.",
                    stacklevel=2,
                )
        if training and not self._agreed and labels.is_floating_point():
            self._agreed = True  # once, because a checksum waits for the device
            for collator in () if self._is_chosen else in_use:
                if collator.has_made(labels):
                    self.check_methods(collator.choice.methods)
        if are_maps(labels):
            raise ValueError("label maps need the network's own loss, got them in MixupLoss; leave out compute_loss_func.")
        self.loss.check(labels, len(logits), logits.shape[1])
        targets = self.loss.targets(labels, logits.shape[1])
        if training and self.loss.views > 1 and not self._compared:
            self._compared = True  # once on the CPU, where it costs no waiting for the device
            self.loss(logits.detach().cpu(), targets.cpu())
        losses = (self.loss if training else self.loss.plain())(logits, targets)
        if num_items_in_batch is None:
            return losses.mean()
        # the Trainer counts every number in a soft label as an item
        return losses.sum() / (num_items_in_batch / (labels.numel() / len(labels)))

    def check_methods(self, methods: Sequence[Method]) -> None:
        """Raises ValueError for methods with a loss of their own, which would have no effect; not where `loss` was given, which replaces it."""
        lost = next((method for method in methods if method.loss not in (CrossEntropy(), self.loss)), None)
        if lost is not None and not self._is_chosen:
            raise ValueError(
                f"MixupLoss must have the loss of the method, got {self.loss} with {lost.name!r}, whose loss is {lost.loss}; give it as MixupLoss(loss=...)."
            )


def logits_of(outputs: Any) -> Tensor:
    """The logits in a network's output: a tensor, a mapping or an object with `logits`, or a tuple that begins with them."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        return outputs["logits"]
    return outputs.logits if hasattr(outputs, "logits") else outputs[0]
