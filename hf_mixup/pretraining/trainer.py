"""`MixupPreTrainer`: a MixupTrainer without labels."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_mixup.core.checks import check_images
from hf_mixup.data.dataset import tail_on_device
from hf_mixup.data.stacking import as_mapping, stack_examples
from hf_mixup.networks.families import is_timm
from hf_mixup.networks.signals.signal import reading
from hf_mixup.networks.wrapping import as_classifier
from hf_mixup.pretraining.arguments import PreTrainingArguments
from hf_mixup.pretraining.card import write_card
from hf_mixup.pretraining.knn import knn_classes
from hf_mixup.pretraining.moco import Queued, check_splits
from hf_mixup.pretraining.model import PreTrainingModel
from hf_mixup.pretraining.processes import everyone, processes
from hf_mixup.pretraining.views import Views
from hf_mixup.training.agreement import loss_of
from hf_mixup.training.callbacks import own_entries
from hf_mixup.training.optimization import check_optimization
from hf_mixup.training.trainer import MixupTrainer


@dataclass
class ViewCollator:
    """Stacks views (2, C, H, W) to `pixel_values` (B, 2, C, H, W), and checks them; labels are left out.

    Attributes:
        raw: whether they are bytes, which are finished on the device.
    """

    base: Callable
    raw: bool = False

    def __call__(self, examples: list) -> dict[str, Tensor]:
        batch = as_mapping(self.base(examples))
        images = batch.get("pixel_values")
        if not isinstance(images, Tensor) or images.ndim != 5 or images.shape[1] != 2:
            found = sorted(batch) if images is None else tuple(images.shape)
            raise ValueError(
                f"a batch of pre-training must have pixel_values (B, 2, C, H, W), two views of every image, got {found}; make the data set "
                "with view_transform."
            )
        check_images(images.flatten(0, 1), raw=self.raw)
        return {name: batch[name] for name in ("pixel_values", "augmentation_keys") if name in batch}


class WholeBatches(torch.utils.data.IterableDataset):
    """A stream without what does not fill a batch at the end of a pass, which loaders leave out of other data sets by themselves.

    Args:
        stream: the examples of a pass, in every worker its own.
        size: images that all processes see in a step.
    """

    def __init__(self, stream: torch.utils.data.IterableDataset, size: int):
        super().__init__()
        self.stream, self.size = stream, size

    def __iter__(self) -> Iterator[Any]:
        rows, whole = [], False
        for example in self.stream:
            rows.append(example)
            if len(rows) == self.size:
                yield from rows
                rows, whole = [], True
        worker = torch.utils.data.get_worker_info()
        if not whole and (worker is None or worker.id == 0):  # the first worker has the most
            raise ValueError(
                f"pre-training needs a whole batch of {self.size} images, got {len(rows)} in a pass over the stream; make batches smaller."
            )


class MixupPreTrainer(MixupTrainer):
    """Pre-trains an image network without labels, with mixing. Otherwise it is a MixupTrainer.

    All random draws depend on (mix_seed, rank, step, micro-step); views depend on the data set's (seed, epoch, row, view). Weights, key network
    and queue are in every checkpoint. So a resumed run repeats them exactly. Evaluation gives `eval_knn_top1`, the accuracy of nearest
    neighbours (kNN) in the bank, by the backbone's features.

    Args:
        model: any image classifier, whose classifier layer is not trained, or a PreTrainingModel.
        args: PreTrainingArguments, with the pretext.
        train_dataset: gives `pixel_values` (2, C, H, W), such as an ImageDataset or an ImageStream with a `view_transform`. Images that do not
            fill a batch at the end of a pass are left out.
        eval_dataset, bank_dataset: give `pixel_values` (C, H, W) and `labels`, of the images that are classified and of their neighbours:
            the training images without augmentation.
        **kwargs: as in `transformers.Trainer`.

    Raises:
        ValueError: for settings that contradict each other or have no effect.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: PreTrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        bank_dataset: Any = None,
        **kwargs: Any,
    ):
        args = PreTrainingArguments("runs/pretraining") if args is None else args
        if not isinstance(args, PreTrainingArguments):
            raise TypeError(f"args must be PreTrainingArguments, got {type(args).__name__}; use PreTrainingArguments instead.")
        for name in ("compute_loss_func", "compute_metrics", "teacher"):
            if kwargs.get(name) is not None:
                raise ValueError(f"pre-training has its own loss and metric, got {name}; leave it out.")
        if args.eval_strategy != "no" and (eval_dataset is None or bank_dataset is None):
            raise ValueError("kNN evaluation needs eval_dataset and bank_dataset, got one or none; give both, or eval_strategy='no'.")
        self.bank_dataset = bank_dataset
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)
        images, step = getattr(train_dataset, "__len__", lambda: None)(), args.train_batch_size * args.world_size
        if images is not None and images < step:
            raise ValueError(f"pre-training needs a whole batch of {step} images, got {images} in all; lower the batch size.")
        given = [name for name, part in zip(("optimizer", "scheduler"), self._optimizers, strict=True) if part is not None]
        if args.predictor_constant_lr and given:
            raise ValueError(
                f"predictor_constant_lr is for the Trainer's own optimizer and schedule, got {given[0]} given as optimizers; leave one of them out."
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("pre-training needs the whole network in each process, got FSDP or DeepSpeed; use DistributedDataParallel.")

    def _ready(self, model: nn.Module, args: PreTrainingArguments) -> PreTrainingModel:
        """The PreTrainingModel to train."""
        choice = args.method_choice()
        if not isinstance(model, PreTrainingModel):
            model = PreTrainingModel(as_classifier(model), choice)
        elif model.choice != choice:
            raise ValueError(
                f"the model and the arguments must agree on the pretext, got {model.pretext.to_dict()} and {choice.methods[0].to_dict()}; "
                "give the network without PreTrainingModel, or the same settings."
            )
        step = model.pretext.step
        if step.in_batch and args.gradient_accumulation_steps > 1:
            raise ValueError(
                f"{type(step).__name__} takes its negatives from one batch, so gradient_accumulation_steps must be 1, got "
                f"{args.gradient_accumulation_steps}; use more processes, or the base moco, byol or simsiam."
            )
        if isinstance(step, Queued):
            check_splits(args.train_batch_size, step.bn_splits)
            keys = args.train_batch_size * args.world_size * (1 + step.both_ways)
            if keys > step.queue_size:
                raise ValueError(
                    f"queue_size must be at least the {keys} keys of one step, got {step.queue_size}; raise it, or lower the batch size."
                )
        self.mixup_model, self._loss = model, loss_of(model)
        check_optimization(args, model, self._data, self._optimizers)
        if args.torch_compile:
            model.compile_backbone(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        return model

    # -- a step ---------------------------------------------------------------------------------------------------------

    def _checked(self, training: bool = False, tail: Any = None) -> Callable:
        return ViewCollator(self.data_collator, tail is not None) if training else self.data_collator

    def get_train_dataloader(self):
        data = self.train_dataset
        if not isinstance(data, torch.utils.data.IterableDataset):
            return super().get_train_dataloader()
        try:
            self.train_dataset = WholeBatches(data, self._train_batch_size * self.args.world_size)
            return super().get_train_dataloader()
        finally:
            self.train_dataset = data

    def _check_evaluation_labels(self) -> None:
        """Nothing to check, because there is no classifier."""

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        return None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._last_key = self._next_key()
        inputs = as_mapping(inputs)
        images = inputs["pixel_values"] if self._tail is None else self._tail(inputs["pixel_values"], inputs["augmentation_keys"])
        outputs = model(pixel_values=images, mix_key=self._last_key)
        self._last_methods = outputs.methods
        found = outputs.logits.detach().argmax(1) == outputs.targets.argmax(1)
        self._tally.add(outputs.methods, found.float(), outputs.lam)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    # -- optimizer ------------------------------------------------------------------------------------------------------

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        """As MixupTrainer's, plus timm's LARS, with `optim_args` such as `momentum=0.9,trust_coeff=0.001`."""
        if args.optim != "lars":
            return MixupTrainer.get_optimizer_cls_and_kwargs(args, model)
        from timm.optim import Lars

        return Lars, {"lr": args.learning_rate, **args.lars_options()}

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As MixupTrainer's. For LARS: all except biases and norms, which LARS then does not scale either."""
        if self.args.optim == "lars" and self.args.no_weight_decay is None:
            return [name for name, value in model.named_parameters() if value.ndim > 1]
        return super().get_decay_parameter_names(model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        first = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if first and self.args.optim == "lars":
            # timm adapts the groups that decay, so without decay none
            decaying = set(self.get_decay_parameter_names(self.mixup_model))
            adapted = {id(p) for name, p in self.mixup_model.named_parameters() if name in decaying}
            for group in optimizer.param_groups:
                group["always_adapt"] = any(id(p) in adapted for p in group["params"])
        if first and self.args.predictor_constant_lr:
            own = {id(p) for name, p in self.mixup_model.named_parameters() if ".predictor." in name}
            for group in list(optimizer.param_groups):
                moved = [p for p in group["params"] if id(p) in own]
                group["params"] = [p for p in group["params"] if id(p) not in own]
                if moved:
                    optimizer.add_param_group({**{k: v for k, v in group.items() if k != "params"}, "params": moved, "constant": True})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        first = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if first and self.args.predictor_constant_lr:
            for place, group in enumerate(scheduler.optimizer.param_groups):
                if group.get("constant"):
                    scheduler.lr_lambdas[place] = _constant
                    group["lr"] = group["initial_lr"]
        return scheduler

    # -- evaluation -----------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """`eval_knn_top1`: the share of images whose nearest neighbours in the bank vote for their class, 0 to 1. Images with a label below 0 are
        left out. A dictionary of data sets gives `eval_NAME_knn_top1` for each."""
        with self._measuring(eval_dataset):
            return self._by_neighbours(self.eval_dataset if eval_dataset is None else eval_dataset, metric_key_prefix)

    def _by_neighbours(self, data: Any, metric_key_prefix: str) -> dict[str, float]:
        if isinstance(data, str):
            data = self.eval_dataset[data]
        if isinstance(data, dict):
            each = [self._by_neighbours(one, f"{metric_key_prefix}_{name}") for name, one in data.items()]
            return {name: value for one in each for name, value in one.items()}
        if data is None or self.bank_dataset is None:
            raise ValueError("kNN evaluation needs eval_dataset and bank_dataset, got one or none; give both.")
        began = time.perf_counter()
        (bank, known), (queries, labels) = self._labelled("bank_dataset", self.bank_dataset), self._labelled("eval_dataset", data)
        classes = int(max(known.max(), labels.max())) + 1
        found = knn_classes(bank, known, queries, classes, self.args.knn_neighbours, self.args.knn_temperature)
        seconds = time.perf_counter() - began
        metrics = {
            f"{metric_key_prefix}_knn_top1": (found == labels).float().mean().item(),
            f"{metric_key_prefix}_runtime": round(seconds, 4),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _metric_names(self) -> set[str]:
        return {"knn_top1"}

    def predict(self, *args: Any, **kwargs: Any) -> None:
        """Refused, as there is no classifier."""
        raise ValueError(
            "a pre-training has no classifier to predict by, got a call of predict; call features(data) for features, or evaluate()."
        )

    def _labelled(self, name: str, data: Any) -> tuple[Tensor, Tensor]:
        """The features and labels of the images that have a label."""
        features, labels = self.features(data)
        if not (labels >= 0).any():
            raise ValueError(
                f"{name} must hold images with a label, got none of {len(labels)} (labels below 0 are none); give some a label."
            )
        return features[labels >= 0], labels[labels >= 0]

    def features(self, data: Any) -> tuple[Tensor, Tensor]:
        """(N, D) float32 features of all images of a data set, and their labels (N,), the same on all processes."""
        model, (rank, count) = self.mixup_model, processes()
        if count > 1:
            for buffer in model.backbone.buffers():  # every process has its own batch statistics
                torch.distributed.broadcast(buffer, 0)
        share = math.ceil(len(data) / count)
        rows = [
            (rank + count * place) % len(data) for place in range(share)
        ]  # in turns; if they do not divide evenly, the first rows are repeated
        loader = torch.utils.data.DataLoader(
            torch.utils.data.Subset(data, rows),
            self.args.eval_batch_size,
            num_workers=self.args.dataloader_num_workers,
            collate_fn=stack_examples,
        )
        features, labels, tail = [], [], tail_on_device(data)
        with reading(model.backbone), self.compute_loss_context_manager():
            for batch in loader:
                images = batch["pixel_values"].to(self.args.device)
                images = images if tail is None else tail(images, batch["augmentation_keys"].to(self.args.device))
                features.append(model.features(images).float())
                labels.append(batch["labels"].to(self.args.device))
        with torch.no_grad():
            every, numbers = (everyone(torch.cat(parts)) for parts in (features, labels))
        # back in the order of the data set
        order = torch.arange(count * share, device=every.device).view(count, share).T.flatten()[: len(data)]
        return every[order], numbers[order]

    # -- the card -------------------------------------------------------------------------------------------------------

    def _write_card(self, model_name: str | None, split: str | None, **facts: Any) -> None:
        args, network = self.args, self.mixup_model.backbone
        of_split = f" of {split}" if split else ""
        write_card(
            args.output_dir,
            name=model_name or Path(args.output_dir).absolute().name,
            network=network.config.to_dict().get("architecture") or type(network).__name__,
            timm=is_timm(network),
            method=self.mixup_model.pretext.to_dict(),
            history=own_entries(self.state.log_history),
            best_step=self.state.best_global_step if args.load_best_model_at_end else None,
            knn=f"Share of the evaluation images{of_split} whose class {args.knn_neighbours} nearest training images vote for, by cosine of the "
            f"backbone's features, at a temperature of {args.knn_temperature:g}.",
            **facts,
        )

    def _hyperparameters(self) -> dict[str, Any]:
        found = super()._hyperparameters()
        drawn = getattr(getattr(self.train_dataset, "transform", None), "each", None)
        return {**found, "views": str(drawn.style)} if isinstance(drawn, Views) else found


def _constant(step: int) -> float:
    """The factor of a learning rate without a schedule."""
    return 1.0
