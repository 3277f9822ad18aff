"""The losses and predictions of a `MixupTrainer`'s evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from hf_mixup.core.checks import check_known
from hf_mixup.core.losses import CrossEntropy
from hf_mixup.data.dataset import tail_on_device
from hf_mixup.data.tail import Augmentation
from hf_mixup.evaluation.metrics import TrainerMetrics


def _may_add_metrics(callback: TrainerCallback) -> bool:
    """Whether a callback of the user's code gets the metrics of an evaluation, which it can add to."""
    known = type(callback).__module__.split(".")[0] in ("transformers", "hf_mixup")
    return not known and type(callback).on_evaluate is not TrainerCallback.on_evaluate


def _losses(metrics: Mapping[str, float]) -> float:
    """The loss of an evaluation, or the sum of those of several data sets."""
    return sum(value for name, value in metrics.items() if name.endswith("_loss"))


class Evaluating:
    """The part of MixupTrainer that evaluates: like the Trainer, with the columns that the network takes."""

    _left: Augmentation | None = None  # the part of the augmentation that remains for the batches of the current evaluation
    _measures_others = False

    def evaluate(self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """As the Trainer's. A measurement of another data set than the Trainer's own is not a result of the run: its log and card do not have it."""
        with self._measuring(eval_dataset):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def hyperparameter_search(
        self,
        hp_space: Callable | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As the Trainer's. By default it minimises the loss, as in a Trainer without metrics of its own: the sum of the default metrics would be
        least for the worst run."""
        if compute_objective is None and direction == "minimize" and isinstance(self.compute_metrics, TrainerMetrics):
            known = self._metric_names()
            if known is not None and "loss" not in known:
                raise ValueError(
                    f"hyperparameter_search must minimise a loss, got only {', '.join(sorted(known))}; set direction='maximize', or give compute_objective."
                )
            compute_objective = _losses
        return super().hyperparameter_search(hp_space, compute_objective, n_trials, direction, *args, **kwargs)

    @contextmanager
    def _measuring(self, data: Any) -> Iterator[None]:
        """Marks what is logged of a data set of the caller; without one of its own, every data set is the Trainer's."""
        own = self.eval_dataset
        owned = (own, *(own.values() if isinstance(own, Mapping) else ()))
        others = own is not None and data is not None and not isinstance(data, str) and not any(data is one for one in owned)
        before, self._measures_others = self._measures_others, others or self._measures_others
        try:
            yield
        finally:
            self._measures_others = before

    def _metric_names(self) -> set[str] | None:
        """The names of the metrics of an evaluation, without `eval_` and the names of data sets; None where the user's code makes them."""
        plain = all(getattr(type(self), name) is getattr(Evaluating, name) for name in ("evaluate", "evaluation_loop", "prediction_step"))
        if not plain or self.preprocess_logits_for_metrics is not None or any(map(_may_add_metrics, self.callback_handler.callbacks)):
            return None
        if self.compute_metrics is None or self.args.prediction_loss_only:
            return {"loss"}
        if not isinstance(self.compute_metrics, TrainerMetrics):
            return None
        return {"loss", *self.compute_metrics.names(self.mixup_model.num_labels)}

    def _refuse_unknown_metric(self) -> None:
        """Raises ValueError for a `metric_for_best_model` that no evaluation will give; the Trainer notices after the first one."""
        asked, known = self.args.metric_for_best_model, self._metric_names()
        if asked is None or known is None or self.args.eval_strategy == "no":
            return
        known |= {"runtime", "samples_per_second", "steps_per_second"}
        if isinstance(self.eval_dataset, Mapping):
            known = {f"{name}_{metric}" for name in self.eval_dataset for metric in known}
        check_known("metric_for_best_model", asked.removeprefix("eval_"), known)

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
        taken = self._taken(named)
        if "labels" in named:
            taken["labels"] = named["labels"]
        return super().prediction_step(model, taken, *args, **kwargs)
