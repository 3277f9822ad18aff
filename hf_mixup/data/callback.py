"""Mixing in an unmodified Trainer of transformers, as a callback."""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.data import DefaultDataCollator, default_data_collator

from hf_mixup.core.checks import check_count
from hf_mixup.core.plan import LABEL_KEYS
from hf_mixup.data.collator import MixupCollator
from hf_mixup.data.tail import Augmentation
from hf_mixup.method import Method, check_maps, check_without_frames, check_without_maps
from hf_mixup.networks.families import main_input_of

# the hook of each model that normalises bytes
_normalising: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


@dataclass
class _Run:
    """A training that a `MixupCallback` mixes: its loader, the collator that this had, the one that mixes, and the next epoch."""

    loader: Any
    plain: Any
    mixing: MixupCollator
    epoch: int
    guard: Any = None


class MixupCallback(TrainerCallback):
    """Mixes only the training batches of an unmodified `Trainer`: `Trainer(..., callbacks=[MixupCallback(collator)])`.

    The Trainer's own collator makes the batch. Only the default collator is replaced by the faster `MixupCollator`. Give the Trainer
    `compute_loss_func=MixupLoss()` too: without it transformers reads soft labels as multi-label ones. A network that labels pixels has the
    right loss, so leave it out there.

    If the collator has a `processor`, or the data set was made with `on_device`, images come as bytes. From then on the model normalises uint8
    `pixel_values`, in training and in evaluation, and leaves others unchanged.

    Args:
        mix_off_epoch: train without mixing from this epoch on, counted from 0; None mixes to the end.

    Raises:
        ValueError: before training, for settings that do not work with mixing.
        RuntimeError: at the first batch, if the model's own loss would get the soft labels.
    """

    def __init__(self, collator: MixupCollator, mix_off_epoch: int | None = None):
        if not isinstance(collator, MixupCollator):
            raise TypeError(f"MixupCallback needs a MixupCollator, got {type(collator).__name__}; wrap yours with base_collator=.")
        if mix_off_epoch is not None:
            check_count(0, mix_off_epoch=mix_off_epoch)
        self.collator, self.mix_off_epoch = collator, mix_off_epoch
        self._runs: dict[int, _Run] = {}  # by model: one training may run inside another
        self._spared: weakref.ref | None = None

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self._spare_columns(model)
        if self.collator.normalisation is not None:
            self._take_bytes(model, self.collator.normalisation)

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor must be 0 when mixing, got {args.label_smoothing_factor}; use MixupLoss(label_smoothing=...)."
            )
        check_label_names(args.label_names)
        size = state.train_batch_size or args.per_device_train_batch_size  # which auto_find_batch_size makes smaller
        if size < 2:
            raise ValueError(f"mixing needs at least 2 images in a batch, got per_device_train_batch_size={size}; raise it.")
        check_labels_of(model, self.collator.choice.methods)
        self._spare_columns(model)
        self._restore(model)  # an earlier run may have ended in an error
        # accelerate puts its own class around the loader, whose attribute the iteration does not read
        loader = getattr(train_dataloader, "base_dataloader", train_dataloader)
        if not callable(getattr(loader, "collate_fn", None)):
            raise TypeError(
                f"MixupCallback needs a DataLoader, whose collate_fn it replaces, got {type(loader).__name__}; "
                "use the collator where the batches are made, or use MixupTrainer."
            )
        if isinstance(loader.collate_fn, MixupCollator):
            raise ValueError(
                "every batch must be mixed once, got a loader whose collator mixes already; give the MixupCollator to the callback alone."
            )
        from hf_mixup.data.dataset import class_counts_of, tail_on_device  # here, because your own data sets do not need it

        tail = tail_on_device(getattr(loader, "dataset", None))
        if tail is not None and tail.draws:
            raise ValueError(
                "images must be cropped and flipped before they are mixed, got a data set that leaves that to the device; make it with "
                "on_device=False, or use MixupTrainer."
            )
        self._take_bytes(model, self.collator.normalisation if tail is None else tail)
        changes = {"every_column": True, "input_name": self.collator.input_name or main_input_of(model)}
        if self.collator.base_collator is None and not is_default_collator(loader.collate_fn):
            changes["base_collator"] = loader.collate_fn
        outputs = getattr(getattr(model, "config", None), "num_labels", None)
        if self.collator.num_labels is None and isinstance(outputs, int) and outputs > 1:
            changes["num_labels"] = outputs
        elif isinstance(outputs, int) and self.collator.outputs not in (None, outputs):
            raise ValueError(
                f"the collator and the model must agree on num_labels, got {self.collator.outputs} and {outputs}; make them equal."
            )
        mixing = self.collator.copied(**changes)
        counts = class_counts_of(loader.dataset, mixing.outputs or 0) if mixing.choice.counting else None
        if counts is not None:
            mixing.choice = mixing.choice.with_class_counts(counts)
        # epochs are counted here, because for a stream without length state.epoch is not whole when they begin
        run = self._runs[id(model)] = _Run(loader, loader.collate_fn, mixing, int(state.epoch or 0))
        self._mixing = loader.collate_fn = mixing
        run.guard = model.register_forward_pre_hook(functools.partial(self._first_batch, run), with_kwargs=True)

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        run = self._runs[id(model)]
        run.mixing.set_epoch(run.epoch, state.num_train_epochs)
        run.mixing.mix_until_now(self.mix_off_epoch is not None and run.epoch >= self.mix_off_epoch)
        run.epoch += 1

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._restore(model)

    def _restore(self, model: nn.Module) -> None:
        run = self._runs.pop(id(model), None)
        if run is not None:
            run.loader.collate_fn = run.plain
            run.guard.remove()

    def _spare_columns(self, model: nn.Module | None) -> None:
        """From now on the model is not given the columns of a data set that the methods read, which evaluation sets may have too; once for each
        model."""
        columns = self.collator.choice.columns
        if model is None or not columns or (self._spared is not None and self._spared() is model):
            return
        self._spared = weakref.ref(model)

        def without(module, args, kwargs):
            return args, {name: value for name, value in kwargs.items() if name not in columns}

        model.register_forward_pre_hook(without, with_kwargs=True)

    def _take_bytes(self, model: nn.Module | None, normalisation: Augmentation | None) -> None:
        """Makes the model normalise images as bytes."""
        if model is None or normalisation is None:
            return
        if model in _normalising:  # of an earlier training, which may have had another one
            _normalising.pop(model).remove()

        def normalised(module, args, kwargs):
            images = kwargs.get("pixel_values")
            if isinstance(images, Tensor) and images.dtype == torch.uint8:
                return args, {**kwargs, "pixel_values": normalisation.normalised(images)}

        _normalising[model] = model.register_forward_pre_hook(normalised, with_kwargs=True)

    @staticmethod
    def _first_batch(run: _Run, module, args, kwargs):
        if not module.training:
            return  # an evaluation before the first step
        run.guard.remove()
        images = kwargs.get(run.mixing.input_name)
        if isinstance(images, Tensor) and images.dtype == torch.uint8:
            raise TypeError(
                "images must be normalised before the network sees them, got uint8; give the MixupCollator the image processor as processor."
            )
        labels = kwargs.get("labels")
        many = getattr(getattr(module, "config", None), "problem_type", None) in ("multi_label_classification", "regression")
        if labels is not None and not many and labels.is_floating_point() and labels.ndim == 2 and labels.shape[1] > 1:
            raise RuntimeError(
                "labels must be class numbers for the model's own loss, got soft ones, which it reads as multi-label; "
                "give the Trainer compute_loss_func=MixupLoss()."
            )


def check_label_names(names: Sequence[str] | None) -> None:
    """Raises ValueError for columns of labels that a MixupCollator does not read: training and evaluation would see different labels."""
    if not set(names or ()) <= set(LABEL_KEYS):
        raise ValueError(
            f"label_names must be left out with a MixupCollator, which reads 'labels' or 'label', got {list(names)}; rename the column to 'labels'."
        )


def check_labels_of(model: nn.Module, methods: Sequence[Method]) -> None:
    """Refuses networks of transformers whose labels cannot be mixed, and methods that cannot mix label maps for a network that labels pixels."""
    name = type(getattr(model, "module", model)).__name__
    if re.search("For(Universal|Instance|Panoptic)?Segmentation|ForObjectDetection", name):
        raise ValueError(
            f"labels must be classes or label maps, got {name}, whose labels are boxes or masks of single instances; train without mixing."
        )
    for method in methods:
        if "ForSemanticSegmentation" in name:
            check_maps(method)
        elif "Classification" in name:
            check_without_maps(method)
        if re.search("For(Image|Audio|Sequence)Classification|ForSemanticSegmentation", name):
            check_without_frames(method)


def is_default_collator(collate_fn: Any) -> bool:
    return collate_fn is default_data_collator or isinstance(collate_fn, DefaultDataCollator)
