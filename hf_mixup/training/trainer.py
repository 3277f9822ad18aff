"""`MixupTrainer`: a Trainer that mixes on the device, by keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase, SequenceFeatureExtractor, Trainer

from hf_mixup.arguments import MixupTrainingArguments
from hf_mixup.core.checks import check_transformers
from hf_mixup.data.callback import is_default_collator
from hf_mixup.data.collator import MixedBatch, MixupCollator
from hf_mixup.data.dataset import tail_on_device
from hf_mixup.data.loss import MixupLoss
from hf_mixup.data.stacking import as_mapping, stack_examples
from hf_mixup.evaluation.metrics import TrainerMetrics, classification_metrics, training_accuracy
from hf_mixup.training.agreement import check_arguments, check_callable, check_fsdp, check_functions, check_no_processor
from hf_mixup.training.callbacks import OTHER_DATA, BesideSteps, EpochLog, Tally
from hf_mixup.training.course import Course
from hf_mixup.training.evaluating import Evaluating
from hf_mixup.training.loaders import Loaders
from hf_mixup.training.optimization import Optimization
from hf_mixup.training.publishing import Publishing
from hf_mixup.training.resuming import Resuming
from hf_mixup.training.wrapping import Wrapping


class MixupTrainer(Publishing, Resuming, Optimization, Evaluating, Course, Loaders, Wrapping, Trainer):
    """Trains a classifier of images, videos, sounds or texts with mixing. Otherwise it is transformers' Trainer.

    The batch is mixed on the device, inside the model's forward pass. All random draws depend on (mix_seed, rank, step, micro-step) only. So a
    resumed run repeats them exactly, with any number of workers, on the same number of processes. Evaluation does not mix, and uses every
    image. The loss of an accumulated batch is the mean over its images.

    Args:
        model: any image classifier: of transformers, of timm, of torchvision, a module that returns logits, or a MixupModel.
        args: MixupTrainingArguments, with the methods.
        data_collator: makes batches with the network's main input (`pixel_values` for images) and `labels`. A MixupCollator mixes training
            batches in the workers instead of on the device; evaluation uses its base collator.
        model_init: makes a new model for every `train()`.
        compute_loss_func: replaces the loss, for methods without further losses: `f(outputs, labels, num_items_in_batch)`. In training with
            mixing, labels are mixed, (B, num_labels); otherwise they are the data set's. Items are images. A MixupLoss sets `loss`.
        train_dataset, eval_dataset, processing_class: as in `transformers.Trainer`.
        compute_metrics: by default `TrainerMetrics` of the loss.
        **kwargs: as in `transformers.Trainer`, plus `teacher`: the Hub id or folder of a classifier to learn from, like `distill_from` in `args`.

    Raises:
        ValueError: for methods that do not fit the model, and settings that contradict each other or have no effect.
    """

    _epoch = -1  # whole epochs done
    _items: Tensor | int | None = None  # images of the accumulated batch that is trained on

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: MixupTrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable | None = classification_metrics,
        **kwargs: Any,
    ):
        check_transformers()
        args = MixupTrainingArguments("runs/trainer") if args is None else args
        check_arguments(args, train_dataset, kwargs.get("callbacks"))
        self._teacher = kwargs.pop("teacher", None)
        preprocess = kwargs.get("preprocess_logits_for_metrics")
        check_functions(data_collator=data_collator, compute_metrics=compute_metrics, preprocess_logits_for_metrics=preprocess)
        check_callable(compute_loss_func)
        self._loss_func = None if isinstance(compute_loss_func, MixupLoss) else compute_loss_func
        self._given_loss = compute_loss_func
        # its own: epochs, and counts of classes, are those of this run
        self._train_collator = None
        if isinstance(data_collator, MixupCollator):
            # lists too, such as the masks of a data set without a format, which evaluation reads
            self._train_collator = data_collator.copied(every_column=True)
        self._processor = processing_class
        self._data, self._optimizers = train_dataset, kwargs.get("optimizers") or (None, None)
        if self._train_collator is not None:
            check_no_processor(self._train_collator)
            data_collator = data_collator.base_collator
        if data_collator is None and isinstance(processing_class, (PreTrainedTokenizerBase, SequenceFeatureExtractor)):
            data_collator = DataCollatorWithPadding(processing_class)  # as the Trainer does
        if data_collator is None or is_default_collator(data_collator):
            data_collator = stack_examples
        if model is None and model_init is None:
            raise ValueError("MixupTrainer needs a network, got neither model nor model_init; give one of them.")
        if model is not None:
            model = self._ready(model, args)
        elif len(args.mix) > 1 or args.method_choice().rates[0] < 1 or args.mix_off_epoch is not None:
            args.ddp_find_unused_parameters = True  # as below; here the model does not exist yet
        # the Trainer would log the mean of earlier losses instead of a NaN
        args.logging_nan_inf_filter = False
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, model_init,
            compute_loss_func=self._loss_func, compute_metrics=compute_metrics, **kwargs,
        )  # fmt: skip
        if self.is_fsdp_enabled:
            check_fsdp(self.accelerator.state.fsdp_plugin, args)
        self.compute_metrics = TrainerMetrics(self._loss) if compute_metrics is classification_metrics else compute_metrics
        self.label_names = ["labels"]  # the collator renames args.label_names
        self.model_accepts_loss_kwargs = True  # so the Trainer counts the images of an accumulated batch, and does not scale the loss
        self._beside = BesideSteps(self._start, self._follow)
        self.add_callback(self._beside)
        if self.is_world_process_zero():
            self.add_callback(EpochLog(self._folder))

    @property
    def mixes(self) -> bool:
        """Whether any batch will be mixed."""
        choice = self.mixup_model.choice
        return choice.rates[1] > 0 and any(method.name != "vanilla" for method in choice.methods)

    def _folder(self) -> str:
        """The folder of the current training: `output_dir`, or that of a trial of `hyperparameter_search`, where its checkpoints are too."""
        return self._get_output_dir(getattr(self, "_trial", None))

    # -- a step ---------------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        """Number of images of an accumulated batch, on all processes."""
        main = self.mixup_model.main_input_name
        counted = [batch for batch in (as_mapping(batch, main) for batch in batch_samples) if main in batch]
        rows = [{"labels": torch.zeros(len(batch[main]), dtype=torch.int64)} for batch in counted]
        return super()._get_num_items_in_batch(rows, device) if len(rows) == len(batch_samples) else None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if num_items_in_batch is None and model.training:  # of an override that does not pass it on
            num_items_in_batch = self._items
        main = self.mixup_model.main_input_name
        inputs = as_mapping(inputs, main)
        inputs = inputs if model.training else self._finished(inputs)
        given = self._taken(inputs)
        labels = inputs.get("labels")
        if main not in given:
            raise ValueError(f"a batch must have {main!r} and 'labels', got {sorted(inputs)}; rename the columns in the loader.")
        if not model.training:
            outputs = model(**given, labels=labels if self._loss_func is None else None)
            loss = self._evaluated(outputs, labels, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss
        if self._train_collator is not None and not isinstance(inputs, MixedBatch):
            raise ValueError("batches must come from the MixupCollator, got others; let it make them, or leave the MixupCollator out.")
        mixed_before = isinstance(inputs, MixedBatch)
        if mixed_before and self._train_collator is None:
            raise ValueError(
                "MixupTrainer mixes by itself, got batches that a MixupCollator of the loader has mixed; pass it as data_collator, or leave it out."
            )
        if self._tail is not None and not mixed_before and "augmentation_keys" in inputs:
            given[main] = self._tail(given[main], inputs["augmentation_keys"])
        elif self._tail is not None and mixed_before and given[main].dtype == torch.uint8:
            given[main] = self._tail.normalised(given[main])  # a MixupCollator has done the rest
        self._last_key = self._next_key()
        mixed = self._train_collator.choice.rows if mixed_before else int(self._mixing_is_over())
        columns = {name: inputs[name] for name in self.mixup_model.choice.columns & inputs.keys()}
        rows, outputs = len(given[main]), model(**given, **columns, labels=labels, mix_key=self._last_key, mixed=mixed)
        self._last_methods = outputs.methods
        several = "mix_several" in inputs if mixed_before else labels.ndim == 2
        accuracy = training_accuracy(self._loss, outputs.logits.detach(), outputs.targets, several)
        self._tally.add(inputs.get("mix_method", outputs.methods), accuracy, inputs.get("mix_lam", outputs.lam))
        if self._loss_func is not None:
            items = None if num_items_in_batch is None else num_items_in_batch * (len(outputs.targets) / rows)
            repeated = torch.cat([labels] * (len(outputs.targets) // rows))
            loss = self._loss_func(outputs, outputs.targets if self.mixes else repeated, num_items_in_batch=items)
        else:
            loss = outputs.loss if num_items_in_batch is None else outputs.loss * (rows / num_items_in_batch)
        loss = loss * self._averaged(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _averaged(self, items: Tensor | int | None) -> int:
        """The factor that undoes the mean over processes, if items are counted on all of them."""
        return 1 if items is None or not self.args.average_tokens_across_devices else self.accelerator.num_processes // self.get_tp_size()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> Tensor:
        if self._beside not in self.callback_handler.callbacks:
            raise RuntimeError(
                f"MixupTrainer counts steps and moves averages by its own BesideSteps, got callbacks without it: {self.callback_handler.callback_list.split()}; "
                "leave it in when others are removed."
            )
        self._last_key, self._items = None, num_items_in_batch
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._last_key is None:
            raise RuntimeError(
                f"compute_loss of MixupTrainer must run, because it mixes, got a {type(self).__name__} that does not call it; call "
                "super().compute_loss(...), or give compute_loss_func or loss."
            )
        # reads one value a step, like the Trainer, and only after the backward pass has been queued
        if not torch.isfinite(loss):
            key, names = self._last_key, " and ".join(map(repr, self._last_methods))
            raise FloatingPointError(
                f"the loss must stay finite, got {loss.item()} at step {key.step} with method {names}, learning rate "
                f"{self._get_learning_rate():g} and {key}; lower the learning rate, or check the images of that batch."
            )
        return loss

    # -- logging ------------------------------------------------------------------------------------------------------

    def _start(self, loader: Any) -> None:
        self._refuse_missing_parameters()
        self._refuse_unknown_metric()
        self._tail = tail_on_device(getattr(loader, "dataset", None)) or tail_on_device(self.train_dataset)
        self._weights = self.mixup_model.backbone.dtype  # an evaluation in half precision changes it
        self._tally = Tally([method.name for method in self.mixup_model.choice.methods])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._tally.pop(self.accelerator))
        super().log({**logs, OTHER_DATA: True} if self._measures_others else logs, start_time)
