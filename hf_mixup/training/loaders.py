"""The batches of a `MixupTrainer`: checked, with the right names, complete in evaluation, mixed if there is a MixupCollator."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import has_length

from hf_mixup.core.checks import check_examples, check_images, check_tokens
from hf_mixup.core.losses import Loss
from hf_mixup.core.plan import LABEL_KEYS, is_mask
from hf_mixup.data.collator import MixedBatch, MixupCollator
from hf_mixup.data.dataset import ImageDataset, RepeatedAugmentation, labels_of, tail_on_device
from hf_mixup.data.stacking import as_mapping
from hf_mixup.data.tail import Augmentation
from hf_mixup.networks.families import main_input_of

# arguments of transformers' forward that are not inputs
_SWITCHES = {"labels", "return_dict", "output_attentions", "output_hidden_states"}


@dataclass
class CheckedCollator:
    """A collator that also checks its input and its batch. It runs in a worker, where checks do not delay training.

    Attributes:
        base: makes the batch.
        loss, num_labels: define which labels are valid.
        label_names: columns that become `labels`; several columns are put side by side.
        training: whether labels are required.
        tail: the part of the augmentation that the data set leaves to the device.
        main, flat: the name of the mixed input, and whether it must be images.
        columns: columns of the data set that the methods read, beside images and labels.
    """

    base: Callable
    loss: Loss
    num_labels: int
    label_names: list[str] | None = None
    training: bool = False
    tail: Augmentation | None = None
    main: str = "pixel_values"
    flat: bool | None = True
    columns: frozenset[str] = frozenset()

    def __call__(self, examples: list) -> Any:
        pixels = [example[self.main] for example in examples if isinstance(example, Mapping) and self.main in example]
        if pixels and all(isinstance(image, Tensor) for image in pixels) and self.main != "input_ids":  # texts are padded to one length
            check_examples(pixels, self.main)
        batch = dict(as_mapping(self.base(examples), self.main))
        if self.label_names is not None:
            self._check_names(examples, batch)
        name_labels(batch, self.label_names)
        columns = sorted(self.columns) if self.training else []
        wanted = [self.main, *(["labels"] if self.training else []), *(["augmentation_keys"] if self.tail else []), *columns]
        if not all(name in batch for name in wanted):
            raise ValueError(
                f"a batch must have {' and '.join(map(repr, wanted))}, got {sorted(batch)}; rename the columns and set remove_unused_columns=False "
                "if the Trainer dropped one."
            )
        if self.main == "input_ids":
            check_tokens(batch[self.main])
        else:
            check_images(batch[self.main], name=self.main, flat=self.flat, finite=self.training, raw=self.tail is not None)
        if "labels" in batch:
            self.loss.check(batch["labels"], len(batch[self.main]), self.num_labels)
        return batch

    def _check_names(self, examples: list, batch: Mapping[str, Any]) -> None:
        # a collator of one's own may have made `labels` of columns that the batch does not have
        known = {*batch, *(name for example in examples[:1] if isinstance(example, Mapping) for name in example)}
        unknown = [name for name in self.label_names if name not in known and name not in LABEL_KEYS]
        if unknown and (self.training or known & {*LABEL_KEYS, *self.label_names}):  # data for predictions may have no labels
            raise ValueError(f"label_names must be columns of the data, got {unknown[0]!r} beside {sorted(batch)}; check the spelling.")


def name_labels(batch: dict[str, Any], label_names: Sequence[str] | None) -> None:
    """Calls the labels of a batch `labels`; several columns of them lie beside each other."""
    if label_names is not None and all(name in batch for name in label_names):
        columns = [torch.as_tensor(batch.pop(name)) for name in label_names]
        batch["labels"] = columns[0] if len(columns) == 1 else torch.stack(columns, 1)
    elif "labels" not in batch:
        found = next((name for name in LABEL_KEYS if name in batch), None)
        if found is not None:
            batch["labels"] = batch.pop(found)


@dataclass
class RecordedCollator:
    """A MixupCollator whose batches also record what was mixed, for the log: `mix_lam` (B,), and `mix_method` (B,), indices of `choice.methods`,
    one larger for rows that were not mixed; `mix_several`, if the labels were vectors before mixing. `tail` is the part of the augmentation that the
    data set leaves, `main` the network's main input."""

    collator: MixupCollator
    loss: Loss
    num_labels: int
    tail: Augmentation | None = None
    main: str = "pixel_values"

    def __call__(self, examples: list) -> MixedBatch:
        batch, lam, names = self.collator.mixed(examples, self.tail, self.main)
        self.loss.check(batch["labels"], len(batch["labels"]), self.num_labels)
        known = [method.name for method in self.collator.choice.methods]
        numbers = torch.tensor([known.index(name) if name in known else len(known) for name in names])
        several = {"mix_several": torch.ones_like(lam)} if batch.several else {}
        return MixedBatch(batch, mix_lam=lam, mix_method=numbers.repeat_interleave(len(lam) // len(names)), **several)


class Loaders:
    """The part of MixupTrainer that makes its loaders."""

    @property
    def _inputs(self) -> frozenset[str]:
        """Names of the network's inputs: the main input, masks, and token types of texts."""
        network = self.mixup_model.backbone
        return masks_of(network) | {self.mixup_model.main_input_name} | ({"token_type_ids"} & other_inputs(network))

    def _taken(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the network gets of a batch. Raises ValueError for others of its inputs, which it would not get."""
        taken = self._inputs
        left = other_inputs(self.mixup_model.backbone) - taken
        extra = sorted(name for name, value in batch.items() if name in left and isinstance(value, Tensor))
        if extra:
            raise ValueError(
                f"MixupTrainer gives a network only {self.mixup_model.main_input_name}, got {extra[0]!r} too; drop the column, "
                "or use a stock Trainer with MixupCallback, which passes it on unmixed."
            )
        return {name: value for name, value in batch.items() if name in taken}

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        # loaders of one's own come without the collator that names labels
        batch = super()._prepare_inputs(as_mapping(inputs, self.mixup_model.main_input_name))
        batch = batch if isinstance(batch, dict) else dict(batch)
        if not isinstance(batch, MixedBatch):  # whose labels are final
            name_labels(batch, self.args.label_names)
        return batch

    def get_train_dataloader(self):
        if self.mixes and self._train_batch_size < 2:
            raise ValueError(
                f"mixing needs at least 2 images in a batch, got {self._train_batch_size} from auto_find_batch_size; use smaller images, or gradient checkpointing."
            )
        if has_length(self.train_dataset) and len(self.train_dataset) == 0:
            raise ValueError(f"training needs images, got a {type(self.train_dataset).__name__} without any; check where it is made.")
        if self._train_collator is not None:
            model = self.mixup_model
            tail = tail_on_device(self.train_dataset)
            collator = RecordedCollator(self._train_collator, self._loss, model.num_labels, tail, model.main_input_name)
        else:
            collator = self._checked(training=True, tail=tail_on_device(self.train_dataset))
        with self._collating(collator):
            loader = super().get_train_dataloader()
        if has_length(loader) and len(loader) == 0:
            raise ValueError(
                f"training needs a whole batch of {self._train_batch_size} for every process, got {len(self.train_dataset)} images; make batches smaller, or set "
                "dataloader_drop_last=False."
            )
        return loader

    def get_eval_dataloader(self, eval_dataset=None):
        if not (eval_dataset is None or isinstance(eval_dataset, str)):
            # cached loaders of persistent workers belong to the data sets that the trainer was made with
            getattr(self, "_eval_dataloaders", {}).pop("eval", None)
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        data = self.eval_dataset[data] if isinstance(data, str) else data
        with self._collating(self._checked(tail=tail_on_device(data)), drop_last=False):
            loader = super().get_eval_dataloader(eval_dataset)
        if not (eval_dataset is None or isinstance(eval_dataset, str)):
            getattr(self, "_eval_dataloaders", {}).pop("eval", None)
        return loader

    def get_test_dataloader(self, test_dataset):
        with self._collating(self._checked(tail=tail_on_device(test_dataset)), drop_last=False):
            return super().get_test_dataloader(test_dataset)

    def _check_evaluation_labels(self) -> None:
        """Checks labels before training, if they can be read without images; otherwise an error would come at the first evaluation."""
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval_dataset": self.eval_dataset}
        for name, data in sets.items():
            labels = None if self.args.label_names else labels_of(data)
            if labels is None or labels.dtype.kind not in "biuf":
                continue
            try:
                self._loss.check(torch.as_tensor(labels), len(labels), self.mixup_model.num_labels)
            except ValueError as error:
                error.args = (f"in {name}, {error}",)
                raise

    def _checked(self, training: bool = False, tail: Augmentation | None = None) -> CheckedCollator:
        model = self.mixup_model
        return CheckedCollator(
            self.data_collator, self._loss, model.num_labels, self.args.label_names, training, tail, model.main_input_name, model.flat,
            model.choice.columns,
        )  # fmt: skip

    @contextlib.contextmanager
    def _collating(self, collator: Callable, drop_last: bool | None = None) -> Iterator[None]:
        """Context manager in which loaders use this collator. The Trainer has one for training and evaluation, and drops the last batch of both."""
        plain, drop = self.data_collator, self.args.dataloader_drop_last
        try:
            self.data_collator = collator
            self.args.dataloader_drop_last = drop if drop_last is None else drop_last
            yield
        finally:
            self.data_collator, self.args.dataloader_drop_last = plain, drop

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self.mixup_model.choice.columns
        self._signature_columns = [
            *{*self._signature_columns, *self._inputs, *columns, "augmentation_keys", *(self.args.label_names or [])}
        ]

    def _get_train_sampler(self, train_dataset=None):
        data = self.train_dataset if train_dataset is None else train_dataset
        repeats = self.args.repeated_augmentation
        if repeats == 1:
            return super()._get_train_sampler(train_dataset)
        if getattr(self.args, "train_sampling_strategy", "random") != "random":
            raise ValueError(
                f"repeated_augmentation shows images in an order of its own, got train_sampling_strategy={self.args.train_sampling_strategy!r}; leave out one."
            )
        if not isinstance(data, ImageDataset):
            raise ValueError(
                f"repeated_augmentation is for a hf_mixup.data.dataset.ImageDataset, got {type(data).__name__}; leave it at 1."
            )
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return RepeatedAugmentation(len(data), repeats, self._train_batch_size, self.args.world_size, seed)


def other_inputs(network: nn.Module) -> frozenset[str]:
    """Names of the inputs of the network's forward, beside its main input."""
    forward = getattr(network, "network", network).forward
    return _arguments(getattr(forward, "__func__", forward)) - _SWITCHES - {main_input_of(network)}


@functools.cache
def _arguments(forward: Callable) -> frozenset[str]:
    named = inspect.signature(forward).parameters.values()
    return frozenset(p.name for p in named if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)) - {"self"}


def masks_of(network: nn.Module) -> frozenset[str]:
    """The masks among `other_inputs`, such as `attention_mask`, which are mixed too."""
    return frozenset(name for name in other_inputs(network) if is_mask(name))
