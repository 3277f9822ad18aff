"""The losses and predictions of a `MixupTrainer`'s evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_mixup.core.losses import CrossEntropy
from hf_mixup.data.dataset import tail_on_device
from hf_mixup.data.tail import Augmentation
from hf_mixup.evaluation.metrics import TrainerMetrics


class Evaluating:
    """The part of MixupTrainer that evaluates: like the Trainer, with the columns that the network takes."""

    _left: Augmentation | None = None  # the part of the augmentation that remains for the batches of the current evaluation

    def evaluation_loop(self, dataloader, *args, **kwargs):
        if isinstance(self.compute_metrics, TrainerMetrics):
            self.compute_metrics.forget()
        self._left = tail_on_device(getattr(dataloader, "dataset", None))
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def _evaluated(self, outputs: Any, labels: Tensor | None, items: Tensor | int | None) -> Tensor | None:
        if self._loss_func is not None:
            return self._loss_func(outputs, labels, num_items_in_batch=items) * self._averaged(items)
        smoothing = self.args.label_smoothing_factor
        if smoothing and labels is not None:  # as in the Trainer, in evaluation too
            return CrossEntropy(smoothing)(outputs.logits, self._loss.targets(labels, self.mixup_model.num_labels)).mean()
        return outputs.loss

    def _finished(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A batch of an evaluation as the network sees it: with what its data set left to the device."""
        named = dict(inputs)
        keys = named.pop("augmentation_keys", None)
        if self._left is not None and keys is not None:
            named["pixel_values"] = self._left(named["pixel_values"], keys)
        return named

    def prediction_step(self, model, inputs, *args, **kwargs):
        # drops other columns, such as the number of an image
        named = self._finished(self._prepare_inputs(inputs))
        return super().prediction_step(
            model, {name: value for name, value in named.items() if name in self._inputs or name == "labels"}, *args, **kwargs
        )
