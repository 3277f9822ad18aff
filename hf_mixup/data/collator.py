"""Mixing in any training loop of transformers: a data collator, a loss for `compute_loss_func`, a callback."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import re
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info
from transformers import TrainerCallback
from transformers.data import DefaultDataCollator, default_data_collator

from hf_mixup.core.checks import (
    check_count,
    check_counts,
    check_examples,
    check_images,
    check_labels,
    check_num_labels,
    check_rows,
    check_values,
)
from hf_mixup.core.losses import CrossEntropy, Loss, MultiHead
from hf_mixup.core.plan import LABEL_KEYS, ONE_PASS_FROM, MixPlan, blend_examples, mix_others, mix_targets, move_maps, onehot
from hf_mixup.core.planes import frames_of, plane_shape, planes
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import keyed
from hf_mixup.data.tail import Augmentation
from hf_mixup.method import Method, are_maps, check_maps, check_model_free, check_without_frames, check_without_maps
from hf_mixup.methods import MethodChoice
from hf_mixup.networks.families import main_input_of

logger = logging.getLogger(__name__)


class MixedBatch(dict):
    """A batch whose labels are final. Its type survives moves to a device by accelerate and the Trainer. An extra key would not: models reject
    or ignore unknown keys."""


@dataclass
class MixupCollator:
    """Stacks examples into a batch and mixes it, in one pass over the pixels. The labels become soft, (B, num_labels) float32.

    For training only. Give a stock `Trainer` `MixupCallback(collator)` and `compute_loss_func=MixupLoss()`; then evaluation does not mix.
    Methods that need the model are refused.

    - Inputs: images (C, H, W), videos (T, C, H, W), volumes (C, D, H, W), spectrograms (T, F) and waveforms (T,). They keep name and shape, and
      all frames or slices share one mask. Waveforms of different lengths must be padded first, by the `base_collator`. Masks such as
      `attention_mask` become the union of those of the mixed inputs.
    - Label maps (H, W), integers, are moved with the pixels and stay integers; ignored values are kept. Use a method of whole pixels, such as
      cutmix, fmix or resizemix, and the network's own loss.
    - Images as bytes, uint8 from 0 to 255, are mixed as bytes, in a quarter of the memory. Boxes and masks copy pixels; shares are rounded, by
      at most half a level. With `processor`, `MixupCallback` lets the network normalise them, in evaluation too.
    - A method that keeps clean images (RegMixup) gives r rows of each image, r * B in all: first all mixtures, then all clean images.
    - Randomness: each batch takes one seed from the worker's torch generator and adds the process rank, so workers and processes draw
      different mixtures. A run that is resumed in the middle of an epoch draws other mixtures; with MixupTrainer it draws the same.

    Args:
        mix: a method of `METHODS` that needs images only, or several, of which one is chosen for every batch.
        num_labels: number of classes; needed for class numbers. A list for several label columns, one number for each head.
        mix_prob: one probability for each method, a number or a schedule over epochs; equal probabilities if None.
        alpha: one for each method, or one for all.
        mix_args: other hyper-parameters by method, `{"cutmix": {"mode": "batch"}}`.
        base_collator: makes the batch, a mapping with the input and `labels`; None stacks, which is faster.
        mode: `sample`, `pair` or `batch`, for every method that has it.
        mix_rate: the share of batches that is mixed, 0 to 1, or a schedule of it over epochs, as in `MethodChoice.build`.
        mix_repeat: independent mixtures of each batch; r of them give r * B rows.
        check_finite: refuse NaN and infinite pixels.
        every_column: without a `base_collator`, keep columns of numbers and lists too, not only those of tensors and arrays.
        processor: for images as bytes, the image processor with their normalisation. It is applied after mixing, and before a method looks at
            the images. Without it a method sees pixels in [0, 1].
        input_name: the column that is mixed, such as `pixel_values` or `input_values`. None takes the one that is there, or the model's main
            input with MixupCallback and MixupTrainer.

    Raises:
        ValueError: at construction for wrong methods and hyper-parameters; at a batch for images and labels that cannot be mixed.
    """

    mix: str | Method | Sequence[str | Method] = "cutmix"
    num_labels: int | Sequence[int] | None = None
    mix_prob: Sequence[Any] | None = None
    alpha: float | Sequence[float] | None = None
    mix_args: Mapping[str, Mapping[str, Any]] | None = None
    base_collator: Callable[[list], Mapping] | None = None
    mode: str | None = None
    mix_rate: Any = 1.0
    mix_repeat: int = 1
    check_finite: bool = True
    every_column: bool = field(default=False, repr=False)
    processor: Any = field(default=None, repr=False)
    input_name: str | None = None
    choice: MethodChoice = field(init=False, repr=False)

    def __post_init__(self):
        self.choice = MethodChoice.build(self.mix, self.mix_prob, self.alpha, self.mix_args, mode=self.mode, mix_rate=self.mix_rate)
        for method in self.choice.methods:
            check_model_free(method, "MixupCollator")
        kept = {method.step.rows for method in self.choice.methods if len(method.step.rows) > 1}
        if len(kept) > 1:
            raise ValueError(
                f"methods of a MixupCollator must keep the same number of clean images, got {self.choice}; use one of them, or MixupTrainer alone."
            )
        check_count(1, mix_repeat=self.mix_repeat)
        if isinstance(self.num_labels, Sequence):
            self.num_labels = tuple(self.num_labels)
            check_counts(2, num_labels=self.num_labels)
        elif self.num_labels is not None:
            check_num_labels(self.num_labels)
        self.normalisation = None if self.processor is None else normalisation_of(self.processor)
        # in shared memory, so that workers see them: whether mixing is off; the epoch, and the number of epochs; the checksums of the last
        # batches' labels
        self._off = torch.zeros((), dtype=torch.int64).share_memory_()
        self._when = torch.tensor([-1, 0]).share_memory_()
        self._made = torch.full((64,), math.nan, dtype=torch.float64).share_memory_()
        _collators.add(self)

    __hash__ = object.__hash__

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rank": process_rank()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for shared in (self._off, self._when, self._made):  # a copy is not in shared memory, where workers see it
            shared.share_memory_()
        _collators.add(self)

    @property
    def outputs(self) -> int | None:
        """Length of the soft labels, or None without `num_labels`."""
        return sum(self.num_labels) if isinstance(self.num_labels, tuple) else self.num_labels

    def mix_until_now(self, off: bool = True) -> None:
        """Stops mixing (or starts it again with `off=False`), in workers too. Batches that are already prefetched are not changed."""
        self._off.fill_(int(off))

    def set_epoch(self, epoch: int, epochs: int = 0) -> None:
        """Sets the epoch of the next batches, from 0, and the number of epochs, for schedules. MixupCallback and MixupTrainer call it."""
        self._when.copy_(torch.tensor([epoch, epochs]))

    def has_made(self, labels: Tensor) -> bool:
        """Whether these soft labels come from one of the last batches."""
        return bool(((self._made - _checksum(labels)).abs() < 1e-6).any())

    def __call__(self, examples: list) -> MixedBatch:
        return self.mixed(examples)[0]

    def mixed(self, examples: list, tail: Augmentation | None = None, main: str | None = None) -> tuple[MixedBatch, Tensor, list[str]]:
        """The batch of r * B rows, where r is the repeats times the rows of the methods; the label's share of each row's own image, (r * B,)
        float32; the method of each repeat.

        `tail` is the augmentation that a data set has left. All of it is done here except the normalisation: bytes stay bytes. Noise cannot be
        mixed as bytes, so with random erasing, and for pixels that are not bytes, the normalisation is done too. `main` is the network's main
        input, if it is known.
        """
        name = self.input_name or main
        if self.base_collator is None:
            images, labels, others, name = _unpack(examples, self.every_column, name)
            images = _checked(images, name)
        else:
            others = dict(as_mapping(self.base_collator(examples), name or "pixel_values"))
            name = input_key(others, name)
            images, labels = others.pop(name), others.pop(_label_key(others))
            check_images(images, name=name, finite=False, raw=True)
            images = images if images[0].numel() < ONE_PASS_FROM else list(images)
        keys = others.pop("augmentation_keys", None)
        if tail is not None:
            images = _before_mixing(tail, images, keys)
        elif keys is not None:
            raise ValueError(
                "images must be cropped and flipped before they are mixed, got augmentation_keys of a data set that leaves that to the device; make "
                "the data set with on_device=False, or use MixupTrainer."
            )
        elif self.normalisation is not None and images[0].dtype != torch.uint8:
            raise TypeError(
                f"processor is for images of bytes, got {images[0].dtype}; leave it out, or give images that are not yet normalised."
            )
        if "spatial_shapes" in others:
            raise ValueError(
                "images of a batch must have one grid, got patches with spatial_shapes (NaFlex), which have one each; use a network for images of "
                "one size, with its image processor."
            )
        columns = {column: others.pop(column) for column in self.choice.columns & others.keys()}
        labels = self._targets(labels, len(images))
        maps = labels if are_maps(labels) else None
        # every batch has the same number of rows, mixed or not; otherwise accumulation would weight their images differently
        repeats, rows = 1 if self._off else self.mix_repeat, self.choice.rows
        out = _batch_like(images[0], rows * repeats * len(images))
        check_images(out, name=name, finite=False, raw=True)
        look = (self.normalisation if tail is None else tail) or _IN_UNIT_RANGE
        key = int(torch.randint(2**62, ()))
        # a plain DataLoader gives the workers of all processes the same seeds; a worker that was not forked has no process group
        rank = self.__dict__.get("_rank", process_rank()) if get_worker_info() else process_rank()
        totals, names, plans = [], [], []
        # all repeats of every image's first row, then of its second row, so a loss that compares rows finds them in equal parts
        for repeat, parts in enumerate(zip(*(part.chunk(repeats) for part in out.chunk(rows)), strict=True)):
            method, own = self._plans(images, labels, columns, parts, keyed(key, rank, repeat), look)
            for plan, part in zip(own, parts, strict=False):
                blend_examples(plan, images, part, lambda done: totals.append(done.sum()) if self.check_finite else None)
            for part in parts[len(own) :]:
                part.copy_(parts[0])
            names.append(method)
            plans.append(own * (rows // len(own)))
        plans = [of_one for of_row in zip(*plans, strict=True) for of_one in of_row]
        if not math.isfinite(sum(totals)):
            check_images(out, name=name)  # names the rows, unless only the sum overflowed
        beside = [mix_others(plan, others) for plan in plans]
        if len(plans) > 1:
            others = {k: torch.cat([part[k] for part in beside]) if isinstance(v, Tensor) else v for k, v in others.items()}
        else:
            others = beside[0]
        targets = torch.cat([mix_targets(plan, labels, self.outputs) if maps is None else move_maps(plan, maps) for plan in plans])
        if maps is None:
            self._made[key % len(self._made)] = _checksum(targets)
        return MixedBatch(others, **{name: out}, labels=targets), torch.cat([plan.weight[:, 0].float() for plan in plans]), names

    def _targets(self, labels: Tensor, batch: int) -> Tensor:
        """Checks labels and prepares them: class numbers (B,) and label maps (B, H, W) stay as they are, others become (B, ...) float32."""
        check_not_boxes(labels)
        if not isinstance(labels, Tensor):
            check_labels(labels, batch, self.outputs)
        if are_maps(labels):
            check_rows(labels, batch)
            for method in self.choice.methods:
                check_maps(method)
            return labels
        for method in self.choice.methods:
            check_without_maps(method)
        if isinstance(self.num_labels, tuple):
            loss = MultiHead(self.num_labels)
            loss.check(labels, batch, self.outputs)
            return loss.targets(labels, self.outputs)
        if labels.ndim == 1 and labels.is_floating_point():  # regression with one output
            check_values(labels, batch, 1)
            return labels.float()[:, None]
        check_labels(labels, batch, self.num_labels)
        return labels

    def _plans(
        self,
        images: list[Tensor] | Tensor,
        labels: Tensor,
        columns: Mapping[str, Tensor],
        parts: tuple[Tensor, ...],
        rng: torch.Generator,
        look: Augmentation,
    ) -> tuple[str, list[MixPlan]]:
        """One plan for each of the `parts` (B, ...), which receive the mixtures, or one plan for all. If the policy looks at images, `parts` hold
        them until then. `look` normalises bytes."""
        if len(images) == 1 or self._off:
            if not self._off:
                _log_once("a batch of one image is not mixed; use dataloader_drop_last=True to leave it out")
            return "vanilla", [MixPlan.identity(len(images))]
        method = self.choice.at(*self._when.tolist()).draw(rng)
        columns, plans = method.taken(columns, len(images)), []
        for mixture, part in zip(method.step.rows, parts, strict=False):
            if not mixture:
                plans.append(MixPlan.identity(len(images)))
                continue
            signals = Signals(**columns, **({"maps": labels} if are_maps(labels) else {}))
            signals.frames = frames_of(part.shape)
            if "images" in method.sample.needs:
                seen = images if isinstance(images, Tensor) else torch.stack(images, out=part)
                signals["images"] = planes(look.normalised(seen) if seen.dtype == torch.uint8 else seen)
            if method.needs_targets:
                signals["targets"] = onehot(labels, self.outputs)
            plan = method.of_the_batch(plane_shape(part.shape), rng, signals)
            if plan.sources is not None and part.dtype == torch.uint8:
                own = [planes(image[None])[0] for image in images] if isinstance(images, list) else planes(images)
                sources = tuple(
                    own if source is signals.get("images") else planes(look.pixels(source.view(part.shape))) for source in plan.sources
                )
                plan = dataclasses.replace(plan, sources=sources)
            plans.append(plan)
        return method.name, plans


# for bytes of unknown normalisation, with any number of channels
_IN_UNIT_RANGE = Augmentation((0.0,), (1.0,))


def normalisation_of(processor: Any) -> Augmentation:
    """The normalisation of images as bytes by an image processor."""
    from hf_mixup.data.processor import ImageFormat  # here, because most collators do not need it

    mean = getattr(processor, "image_mean", None)
    return ImageFormat.of_processor(processor, channels=len(mean) if isinstance(mean, Sequence) else 3).normalisation()


def _before_mixing(tail: Augmentation, images: Tensor | list[Tensor], keys: Tensor | None) -> Tensor | list[Tensor]:
    if tail.draws and keys is None:
        raise ValueError(
            "a batch must have 'augmentation_keys', which the data set gives, got none; pass them on in the base_collator, or make the data set "
            "with on_device=False."
        )
    if tail.erasing or images[0].dtype != torch.uint8:
        return tail(images, keys)
    return tail.moved(images, keys) if tail.draws else images


# collators in use; MixupLoss asks them whether soft labels of an evaluation are theirs
_collators: weakref.WeakSet[MixupCollator] = weakref.WeakSet()


def _checksum(labels: Tensor) -> float:
    """A checksum: two different batches of soft labels almost never have the same."""
    numbers = labels.detach().double().cpu().flatten()
    return float(numbers @ _square_roots(len(numbers)))


@functools.lru_cache(maxsize=8)
def _square_roots(count: int) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.float64).sqrt()


def process_rank() -> int:
    """The rank of this process, or of the process that started this worker, from torch.distributed or the launcher's variables."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", 0))


_logged: set[str] = set()


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.warning("%s", message)


def as_mapping(example: Any, name: str = "pixel_values") -> Mapping:
    """An example as a mapping. It converts pairs (image, label), as torchvision's data sets give them, and objects with attributes."""
    if isinstance(example, (dict, Mapping)):  # the check for dict is ten times as fast
        return example
    if isinstance(example, (tuple, list)) and len(example) == 2:
        return {name: example[0], "labels": example[1]}
    if hasattr(example, "__dict__") and not isinstance(example, Tensor):
        return vars(example)
    raise TypeError(
        f"examples must be mappings with 'pixel_values' and 'labels', or pairs (image, label), got {type(example).__name__}; "
        "return one of these from the data set."
    )


def _unpack(examples: list, every_column: bool, name: str | None) -> tuple[list[Tensor], Tensor, dict[str, Any], str]:
    """Splits a list of examples into images, labels, other columns that can become tensors, and the name of the image column."""
    if not examples:
        check_examples(examples)
    if {*map(type, examples)} != {dict}:
        examples = [as_mapping(example, name or "pixel_values") for example in examples]
    first = examples[0]
    image_key, label_key = input_key(first, name), _label_key(first)
    others = {}
    for key, value in first.items():
        if key in (image_key, label_key) or not (every_column or isinstance(value, (Tensor, np.ndarray))):
            continue
        column = _stacked([example.get(key) for example in examples])
        if column is not None:
            others[key] = column
    images = [example[image_key] for example in examples]
    if {*map(type, images)} != {Tensor}:
        images = [_as_tensor(image) for image in images]
    return images, stack_labels([example[label_key] for example in examples]), others, image_key


def stack_labels(labels: list) -> Tensor:
    """Stacks class numbers, soft labels, numbers or label maps to (B, ...). Raises TypeError for other values, or different lengths."""
    check_not_boxes(labels)
    try:
        if isinstance(labels[0], int):
            labels = np.array(labels)  # torch reads an array five times as fast as a list
        elif isinstance(labels[0], np.ndarray):
            labels = np.stack(labels)
        return torch.stack(labels) if isinstance(labels[0], Tensor) else torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"labels must be class numbers, or soft labels of one length, got {labels[0]!r} and others; convert names to class numbers in the data set."
        ) from None


def _as_tensor(image: Any) -> Any:
    """Converts pixels that are an array, or lists, to a tensor. Data sets that were mapped by a processor hold such pixels."""
    if isinstance(image, np.ndarray):
        return torch.from_numpy(image)
    return torch.tensor(image) if isinstance(image, list) else image


def _stacked(values: list) -> Tensor | None:
    """Stacks a column to (B, ...). None if it holds other values than numbers, or arrays of different shapes."""
    try:
        return torch.stack([torch.as_tensor(value) for value in values])
    except (TypeError, ValueError, RuntimeError):
        return None


def stack_examples(examples: list) -> dict[str, Any]:
    """MixupTrainer's default collator. It is like transformers' own, but drops columns that cannot become tensors, such as PIL images.

    It also takes examples without labels, for predictions.
    """
    examples = [as_mapping(example) for example in examples]
    first, batch = examples[0], {}
    for key, value in first.items():
        column = [example.get(key) for example in examples]
        if key in LABEL_KEYS:
            if value is not None:
                batch["labels"] = stack_labels(column)
        elif key in INPUT_NAMES:
            images = _checked([_as_tensor(image) for image in column], key)
            batch[key] = images if isinstance(images, Tensor) else torch.stack(images)
        else:
            stacked = _stacked(column)
            if stacked is not None:
                batch[key] = stacked
    return batch


def _checked(images: list[Tensor], name: str) -> list[Tensor] | Tensor:
    """Checks that all images have one shape. Returns small images as one stacked tensor, large ones as a list."""
    if isinstance(images[0], Tensor) and images[0].numel() < ONE_PASS_FROM:
        try:
            return torch.stack(images)
        except (RuntimeError, TypeError):
            pass  # the check below has a better message
    check_examples(images, name)
    return images


# names of inputs of transformers' networks that can be mixed
INPUT_NAMES = ("pixel_values", "input_values", "input_features")


def input_key(columns: Mapping, name: str | None) -> str:
    """The column that is mixed: `name`, or the one with a usual name. Raises ValueError for none, or several."""
    found = [key for key in (INPUT_NAMES if name is None else (name,)) if key in columns]
    if len(found) > 1:
        raise ValueError(f"only one column can be mixed, got {' and '.join(found)}; choose one with input_name.")
    if not found:
        raise ValueError(
            f"examples must have a column {name or 'pixel_values'!r}, got {sorted(columns)}; "
            "rename the image column, and set remove_unused_columns=False if the Trainer dropped it."
        )
    return found[0]


def _label_key(columns: Mapping) -> str:
    for key in LABEL_KEYS:
        if key in columns:
            return key
    if "mask_labels" in columns:
        raise ValueError(
            "labels must be classes or label maps, got mask_labels, masks of single instances, which cannot be mixed; train without mixing."
        )
    raise ValueError(f"examples must have a column 'labels' or 'label', got {sorted(columns)}; rename the column of the classes.")


def _batch_like(example: Tensor, batch: int) -> Tensor:
    """An uninitialised batch, in shared memory inside a worker, which avoids a copy to the main process."""
    shape = (batch, *example.shape)
    if get_worker_info() is None or example.device.type != "cpu":
        return example.new_empty(shape)
    storage = example._typed_storage()._new_shared(batch * example.numel(), device=example.device)
    return example.new(storage).resize_(shape)


def check_not_boxes(labels: Any) -> None:
    """Raises ValueError for annotations of object detection."""
    if isinstance(labels, Sequence) and labels and isinstance(labels[0], Mapping):
        raise TypeError(
            f"labels must be classes or label maps, got {', '.join(sorted(map(str, labels[0]))[:4])} of every image, annotations that cannot be mixed; "
            "train without mixing."
        )


class MixupLoss:
    """The loss of mixed batches for any `Trainer`: `Trainer(..., compute_loss_func=MixupLoss())`, and for your own loop.

    It takes soft labels (B, num_labels) and hard labels (B,). It is right under gradient accumulation, because it divides by the number of
    images of the whole accumulated batch. Evaluation reports `loss.plain()`, without smoothing, weights or thresholds, so losses stay
    comparable.

    Args:
        label_smoothing: of the mixed target, 0 to 1. Use it instead of `label_smoothing_factor`, which is refused with mixing.
        loss: `CrossEntropy()` or another of `hf_mixup.core.losses`; if it has a `smoothing` field, set either that or `label_smoothing`.

    Raises:
        ValueError, TypeError: for smoothing that is given twice, and for a loss that is not an instance of `Loss`.
    """

    def __init__(self, label_smoothing: float = 0.0, loss: Loss | None = None):
        if loss is not None and label_smoothing:
            raise ValueError(f"label_smoothing must be given once, got {label_smoothing} beside loss={loss!r}; set it in the loss.")
        if loss is not None and not isinstance(loss, Loss):
            raise TypeError(f"loss must be one of hf_mixup.core.losses, got {type(loss).__name__}; give an instance, such as Focal().")
        self.loss = CrossEntropy(label_smoothing) if loss is None else loss
        self._looked = False

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """A scalar. `outputs`: logits (B, num_labels), or a model's output with logits; `labels` as in `hf_mixup.core.losses`."""
        logits = logits_of(outputs)
        training = torch.is_grad_enabled()
        if labels.is_floating_point() and not training and not self._looked:
            self._looked = True
            if any(collator.has_made(labels) for collator in _collators):
                warnings.warn(
                    "evaluation was expected to have plain labels, got mixed ones; a MixupCollator given as data_collator mixes the "
                    "evaluation set too: give the Trainer callbacks=[MixupCallback(collator)] instead.",
                    stacklevel=2,
                )
        if are_maps(labels):
            raise ValueError("label maps need the network's own loss, got them in MixupLoss; leave out compute_loss_func.")
        self.loss.check(labels, len(logits), logits.shape[1])
        targets = self.loss.targets(labels, logits.shape[1])
        losses = (self.loss if training else self.loss.plain())(logits, targets)
        if num_items_in_batch is None:
            return losses.mean()
        # the Trainer counts every number in a soft label as an item
        return losses.sum() / (num_items_in_batch / (labels.numel() / len(labels)))


def logits_of(outputs: Any) -> Tensor:
    """The logits in a network's output: a tensor, a mapping or an object with `logits`, or a tuple that begins with them."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        return outputs["logits"]
    return outputs.logits if hasattr(outputs, "logits") else outputs[0]


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
        self._bytes: weakref.ref | None = None
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
        mixing = dataclasses.replace(self.collator, **changes)
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
        """Makes the model normalise images as bytes, once for each model."""
        if model is None or normalisation is None or (self._bytes is not None and self._bytes() is model):
            return
        self._bytes = weakref.ref(model)

        def normalised(module, args, kwargs):
            images = kwargs.get("pixel_values")
            if isinstance(images, Tensor) and images.dtype == torch.uint8:
                return args, {**kwargs, "pixel_values": normalisation.normalised(images)}

        model.register_forward_pre_hook(normalised, with_kwargs=True)

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
