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
from hf_mixup.core.planes import plane_shape, planes
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import keyed
from hf_mixup.data.tail import Augmentation
from hf_mixup.method import Method, are_maps, check_maps, check_model_free, check_without_maps
from hf_mixup.methods import MethodChoice
from hf_mixup.networks.families import main_input_of

logger = logging.getLogger(__name__)


class MixedBatch(dict):
    """A batch whose labels are final. The type survives accelerate's and the Trainer's moves to a device, which an extra key
    would not: models reject or swallow keys that they do not know."""


@dataclass
class MixupCollator:
    """Stacks examples into a batch and mixes it, in one pass over the pixels. Labels come out soft, (B, num_labels) float32.

    Label maps (H, W), integers, are moved with the pixels, and stay integers; numbers to be ignored are kept. That takes a method of whole
    pixels, such as cutmix, fmix or resizemix, and the network's own loss.

    Images (C, H, W), videos (T, C, H, W), volumes (C, D, H, W), spectrograms (T, F) and waveforms (T,) are mixed, and keep name and shape. One
    mask holds for all frames or slices. Waveforms of several lengths must be padded first, by the `base_collator`; of masks such as
    `attention_mask` a mixture has the union.

    Images of bytes, uint8 of 0 to 255, are mixed as bytes, a quarter of the memory: boxes and masks by copying, shares rounded, so
    half a level off at most. With `processor`, `MixupCallback` lets the network normalise them, in evaluation too.

    A method that keeps clean images (RegMixup) gives r rows of each image: the mixtures of all, then all clean ones, r * B rows in all.

    For training only: give a stock `Trainer` `MixupCallback(collator)` and `compute_loss_func=MixupLoss()`, so that evaluation
    stays plain. Methods that need the model are refused. Each batch takes one seed from the worker's
    torch generator and adds the process rank, so workers and processes draw different mixtures. A run resumed in the middle of an
    epoch draws other mixtures; with MixupTrainer it draws the same.

    Args:
        mix: a method of `METHODS` that needs images only, or several, of which one is chosen for every batch.
        num_labels: classes; needed where labels are class numbers. Several numbers for several columns of them, one for each head.
        mix_prob: one probability for each method, a number or a schedule over epochs; equal ones if None.
        alpha: one for each method, or one for all.
        mix_args: other hyper-parameters by method, `{"cutmix": {"mode": "batch"}}`.
        base_collator: makes the batch, a mapping with the input and `labels`; None stacks, which is faster.
        mode: `sample`, `pair` or `batch`, for every method that has it.
        mix_rate: the share of batches that is mixed, 0 to 1, or a schedule of it over epochs, as in `MethodChoice.build`.
        mix_repeat: independent mixtures of each batch; r of them give r * B rows.
        check_finite: refuse NaN and infinite pixels.
        every_column: without a `base_collator`, keep columns of numbers and lists too, not of tensors and arrays alone.
        processor: for images of bytes, the image processor that says how they are normalised: after mixing, and before a method looks
            at them. Without it a method looks at pixels in [0, 1].
        input_name: the column that is mixed, such as `pixel_values` or `input_values`; None for the one that there is, or the model's
            main input with MixupCallback and MixupTrainer.

    Raises:
        ValueError: at construction for methods and hyper-parameters, at the batch for images and labels that cannot be mixed.
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
                f"methods of a MixupCollator must keep clean images alike, got {self.choice}; take one of them, or MixupTrainer alone."
            )
        check_count(1, mix_repeat=self.mix_repeat)
        if isinstance(self.num_labels, Sequence):
            self.num_labels = tuple(self.num_labels)
            check_counts(2, num_labels=self.num_labels)
        elif self.num_labels is not None:
            check_num_labels(self.num_labels)
        self.normalisation = None if self.processor is None else normalisation_of(self.processor)
        # in shared memory, so that workers see it: no mixing any more; the epoch and how many there are; and what the last batches' labels
        # add up to
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
        """Length of the soft labels, where `num_labels` says it."""
        return sum(self.num_labels) if isinstance(self.num_labels, tuple) else self.num_labels

    def mix_until_now(self, off: bool = True) -> None:
        """From now on batches are left alone, in workers too, once those that were asked for before have come; or mixed again."""
        self._off.fill_(int(off))

    def set_epoch(self, epoch: int, epochs: int = 0) -> None:
        """Tells schedules the epoch of the batches to come, counted from 0, and how many there are; MixupCallback and MixupTrainer do."""
        self._when.copy_(torch.tensor([epoch, epochs]))

    def has_made(self, labels: Tensor) -> bool:
        """Whether these soft labels are of one of the last batches."""
        return bool(((self._made - _checksum(labels)).abs() < 1e-6).any())

    def __call__(self, examples: list) -> MixedBatch:
        return self.mixed(examples)[0]

    def mixed(self, examples: list, tail: Augmentation | None = None, main: str | None = None) -> tuple[MixedBatch, Tensor, list[str]]:
        """The batch of r * B rows, r of them the repeats times the rows of the methods; the labels' share of each row's own image (r * B,)
        float32; the method of each repeat.

        Of `tail`, the augmentation that a data set has left, all is done here but normalising: bytes are left as bytes. Noise cannot be
        mixed as bytes, so with random erasing, and for pixels that are no bytes, that is done too. `main` is the network's main input, where
        that is known.
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
                "images must be cropped and mirrored before they are mixed, got augmentation_keys of a data set that leaves it to the device; make "
                "the data set with on_device=False, or use MixupTrainer."
            )
        elif self.normalisation is not None and images[0].dtype != torch.uint8:
            raise TypeError(f"processor is for images of bytes, got {images[0].dtype}; leave it out, or do not normalise them before.")
        if "spatial_shapes" in others:
            raise ValueError(
                "images of a batch must have one grid, got patches with spatial_shapes (NaFlex), which have one each; take a network for images of "
                "one size, and its image processor."
            )
        columns = {column: others.pop(column) for column in self.choice.columns & others.keys()}
        labels = self._targets(labels, len(images))
        maps = labels if are_maps(labels) else None
        # the same number of rows in every batch, mixed or not, or accumulation would weigh their images differently
        repeats, rows = 1 if self._off else self.mix_repeat, self.choice.rows
        out = _batch_like(images[0], rows * repeats * len(images))
        check_images(out, name=name, finite=False, raw=True)
        look = (self.normalisation if tail is None else tail) or _IN_UNIT_RANGE
        key = int(torch.randint(2**62, ()))
        # a plain DataLoader seeds the workers of all processes alike; one that was not forked knows no process group
        rank = self.__dict__.get("_rank", process_rank()) if get_worker_info() else process_rank()
        totals, names, plans = [], [], []
        # all repeats of the first row of every image, then of the second one: a loss that compares rows finds them in equal parts
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
            check_images(out, name=name)  # says where, if it was not the sum that ran over
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
        """Checked, and ready to be mixed: class numbers (B,) and label maps (B, H, W) as they are, all else (B, ...) float32."""
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
        if labels.ndim == 1 and labels.is_floating_point():  # a regression with one output
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
        """One for each of the `parts` (B, ...), where the mixtures go, or one for all. Parts hold the images until then if the policy
        looks at them. `look` normalises bytes."""
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


# for looking at bytes whose normalisation is not known, of any number of channels
_IN_UNIT_RANGE = Augmentation((0.0,), (1.0,))


def normalisation_of(processor: Any) -> Augmentation:
    """Of images of bytes, as an image processor does it."""
    from hf_mixup.data.processor import ImageFormat  # here, because most collators need none

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


# those that are in use, which MixupLoss asks whether soft labels of an evaluation are theirs
_collators: weakref.WeakSet[MixupCollator] = weakref.WeakSet()


def _checksum(labels: Tensor) -> float:
    """A checksum: two different batches of soft labels almost never have the same."""
    numbers = labels.detach().double().cpu().flatten()
    return float(numbers @ _square_roots(len(numbers)))


@functools.lru_cache(maxsize=8)
def _square_roots(count: int) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.float64).sqrt()


def process_rank() -> int:
    """The rank of this process; in a worker, of the process that started it. From torch.distributed, or from the launcher's variables."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", 0))


_logged: set[str] = set()


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.warning("%s", message)


def as_mapping(example: Any, name: str = "pixel_values") -> Mapping:
    """An example as a mapping: pairs (image, label), as torchvision's data sets give them, and objects with attributes, become one."""
    if isinstance(example, (dict, Mapping)):  # a dict is found ten times as fast
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
    """Images, labels, the other columns that make tensors, and the name of the column of images, of a list of examples."""
    if not examples:
        check_examples(examples)
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
    """(B, ...) of class numbers, soft labels, numbers or label maps. Raises TypeError for what is neither, or of several lengths."""
    check_not_boxes(labels)
    try:
        if isinstance(labels[0], int):
            labels = np.array(labels)  # which torch reads five times as fast as a list
        elif isinstance(labels[0], np.ndarray):
            labels = np.stack(labels)
        return torch.stack(labels) if isinstance(labels[0], Tensor) else torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"labels must be class numbers, or soft labels of one length, got {labels[0]!r} and others; make numbers of names in the data set."
        ) from None


def _as_tensor(image: Any) -> Any:
    """A tensor of pixels that are an array, or lists; data sets that were mapped by a processor hold such."""
    if isinstance(image, np.ndarray):
        return torch.from_numpy(image)
    return torch.tensor(image) if isinstance(image, list) else image


def _stacked(values: list) -> Tensor | None:
    """(B, ...) of a column; None where it holds no numbers, or arrays of several shapes."""
    try:
        return torch.stack([torch.as_tensor(value) for value in values])
    except (TypeError, ValueError, RuntimeError):
        return None


def stack_examples(examples: list) -> dict[str, Any]:
    """The collator of MixupTrainer where none is given: as transformers' own, and it leaves out what makes no tensor, such as PIL images.

    Examples without labels, for predictions, are taken as well.
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
            pass  # what is wrong, the check says better
    check_examples(images, name)
    return images


# what networks of transformers call what can be mixed
INPUT_NAMES = ("pixel_values", "input_values", "input_features")


def input_key(columns: Mapping, name: str | None) -> str:
    """The column that is mixed: `name`, or the one of the usual names that there is. Raises ValueError where that is not clear."""
    found = [key for key in (INPUT_NAMES if name is None else (name,)) if key in columns]
    if len(found) > 1:
        raise ValueError(f"one column is mixed, got {' and '.join(found)}; say which with input_name.")
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
    """An uninitialised batch, in shared memory inside a worker, which saves the copy to the main process."""
    shape = (batch, *example.shape)
    if get_worker_info() is None or example.device.type != "cpu":
        return example.new_empty(shape)
    storage = example._typed_storage()._new_shared(batch * example.numel(), device=example.device)
    return example.new(storage).resize_(shape)


def check_not_boxes(labels: Any) -> None:
    """Refuses the annotations of detection."""
    if isinstance(labels, Sequence) and labels and isinstance(labels[0], Mapping):
        raise TypeError(
            f"labels must be classes or label maps, got {', '.join(sorted(map(str, labels[0]))[:4])} of every image, annotations that cannot be mixed; "
            "train without mixing."
        )


class MixupLoss:
    """The loss of mixed batches for any `Trainer`: `Trainer(..., compute_loss_func=MixupLoss())`, and for loops of one's own.

    Takes soft labels (B, num_labels) and hard labels (B,), and is right under gradient accumulation: it divides by the images
    of the whole accumulated batch. In evaluation `loss.plain()` is reported, without smoothing, weights or thresholds, so losses
    stay comparable.

    Args:
        label_smoothing: of the mixed target, 0 to 1; use it in place of `label_smoothing_factor`, which mixing cannot have.
        loss: `CrossEntropy()` or another of `hf_mixup.core.losses`; its own smoothing field and `label_smoothing` exclude each other.
    """

    def __init__(self, label_smoothing: float = 0.0, loss: Loss | None = None):
        if loss is not None and label_smoothing:
            raise ValueError(f"label_smoothing must be given once, got {label_smoothing} beside loss={loss!r}; set it in the loss.")
        if loss is not None and not isinstance(loss, Loss):
            raise TypeError(f"loss must be one of hf_mixup.core.losses, got {type(loss).__name__}; give an instance, such as Focal().")
        self.loss = CrossEntropy(label_smoothing) if loss is None else loss
        self._looked = False

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """`outputs`: logits (B, num_labels), or what a model gives that has them; `labels` as in `hf_mixup.core.losses`."""
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
            raise ValueError("label maps are for the network's own loss, got them in MixupLoss; leave out compute_loss_func.")
        self.loss.check(labels, len(logits), logits.shape[1])
        targets = self.loss.targets(labels, logits.shape[1])
        losses = (self.loss if training else self.loss.plain())(logits, targets)
        if num_items_in_batch is None:
            return losses.mean()
        # the Trainer counts every number of a label as an item
        return losses.sum() / (num_items_in_batch / (labels.numel() / len(labels)))


def logits_of(outputs: Any) -> Tensor:
    """Of what a network returns: the logits themselves, a mapping or an object that names them, or a tuple that begins with them."""
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
    """Mixes the training batches of an unmodified `Trainer`, and only those: `Trainer(..., callbacks=[MixupCallback(collator)])`.

    The Trainer's own collator makes the batch, unless it is the default one, which the faster `MixupCollator` replaces. Give
    the Trainer `compute_loss_func=MixupLoss()` too: without it transformers takes soft labels for multi-label ones. A network that labels
    pixels has the right loss, so leave it out there.

    Where the collator has a `processor`, or the data set is one of ours with `on_device`, images come as bytes, and the model takes them
    from then on: it normalises uint8 `pixel_values`, in training and in evaluation, and leaves others as they are.

    Args:
        mix_off_epoch: train without mixing from this epoch on, counted from 0; None mixes to the end.

    Raises:
        ValueError: before training, for settings that cannot go with mixing.
        RuntimeError: at the first batch, when the loss of the model would see the soft labels.
    """

    def __init__(self, collator: MixupCollator, mix_off_epoch: int | None = None):
        if not isinstance(collator, MixupCollator):
            raise TypeError(f"MixupCallback needs a MixupCollator, got {type(collator).__name__}; wrap yours with base_collator=.")
        if mix_off_epoch is not None:
            check_count(0, mix_off_epoch=mix_off_epoch)
        self.collator, self.mix_off_epoch = collator, mix_off_epoch
        self._runs: dict[int, _Run] = {}  # by model: a training may run inside of another
        self._bytes: weakref.ref | None = None

    def on_init_end(self, args, state, control, model=None, **kwargs):
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
        self._restore(model)  # a run before this one may have ended in an error
        # accelerate puts its own class around the loader, whose attribute the iteration does not read
        loader = getattr(train_dataloader, "base_dataloader", train_dataloader)
        if not callable(getattr(loader, "collate_fn", None)):
            raise TypeError(
                f"MixupCallback needs a DataLoader, whose collate_fn it replaces, got {type(loader).__name__}; "
                "give the collator to what makes the batches, or use MixupTrainer."
            )
        if isinstance(loader.collate_fn, MixupCollator):
            raise ValueError(
                "every batch must be mixed once, got a loader whose collator mixes already; give the MixupCollator to the callback alone."
            )
        from hf_mixup.data.dataset import class_counts_of, tail_on_device  # here, because data sets of one's own need none of it

        tail = tail_on_device(getattr(loader, "dataset", None))
        if tail is not None and tail.draws:
            raise ValueError(
                "images must be cropped and mirrored before they are mixed, got a data set that leaves it to the device; make it with "
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
        # epochs are counted here: of a stream without length, state.epoch is not whole at their beginning
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

    def _take_bytes(self, model: nn.Module | None, normalisation: Augmentation | None) -> None:
        """From now on the model normalises images of bytes; once for each model."""
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
                "labels must be class numbers where the model's own loss sees them, got soft ones, which it takes for multi-label; "
                "give the Trainer compute_loss_func=MixupLoss()."
            )


def check_labels_of(model: nn.Module, methods: Sequence[Method]) -> None:
    """Refuses a network of transformers whose labels cannot be mixed, and methods that cannot mix those of one that labels pixels."""
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


def is_default_collator(collate_fn: Any) -> bool:
    return collate_fn is default_data_collator or isinstance(collate_fn, DefaultDataCollator)
