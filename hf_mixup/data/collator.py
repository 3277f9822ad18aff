"""Mixing in the data collator of any training loop of transformers."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from hf_mixup.core.checks import (
    check_count,
    check_counts,
    check_images,
    check_labels,
    check_num_labels,
    check_rows,
    check_values,
)
from hf_mixup.core.losses import MultiHead
from hf_mixup.core.plan import ONE_PASS_FROM, MixPlan, blend_examples, mix_others, mix_targets, move_maps, onehot
from hf_mixup.core.planes import frames_of, plane_shape, planes
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import keyed
from hf_mixup.data.stacking import as_mapping, batch_like, check_not_boxes, input_key, label_key, of_one_shape, unpacked
from hf_mixup.data.tail import Augmentation
from hf_mixup.method import Method, are_maps, check_maps, check_model_free, check_without_maps
from hf_mixup.methods import MethodChoice

logger = logging.getLogger(__name__)


class MixedBatch(dict):
    """A batch whose labels are final. Its type survives moves to a device by accelerate and the Trainer. An extra key would not: models reject
    or ignore unknown keys.

    Attributes:
        several: whether the labels were vectors before mixing. It does not survive moves.
    """

    several = False


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
        self._asked = self._off  # of a copy: that of the original
        self._when = torch.tensor([-1, 0]).share_memory_()
        self._made = torch.full((64,), math.nan, dtype=torch.float64).share_memory_()
        in_use.add(self)

    __hash__ = object.__hash__

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rank": process_rank()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for shared in (self._off, self._asked, self._when, self._made):  # a copy is not in shared memory, where workers see it
            shared.share_memory_()
        in_use.add(self)

    def copied(self, **changes: Any) -> MixupCollator:
        """A copy for one training, with other arguments. `mix_until_now` of this collator stops it too."""
        copy = dataclasses.replace(self, **changes)
        copy.choice, copy._asked = self.choice, self._off
        return copy

    @property
    def _stopped(self) -> bool:
        return bool(self._off) or bool(self._asked)

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
            images, labels, others, name = unpacked(examples, self.every_column, name)
            images = of_one_shape(images, name)
        else:
            others = dict(as_mapping(self.base_collator(examples), name or "pixel_values"))
            name = input_key(others, name)
            images, labels = others.pop(name), others.pop(label_key(others))
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
        stopped = self._stopped
        repeats, rows = 1 if stopped else self.mix_repeat, self.choice.rows
        out = batch_like(images[0], rows * repeats * len(images))
        check_images(out, name=name, finite=False, raw=True)
        look = (self.normalisation if tail is None else tail) or _IN_UNIT_RANGE
        key = int(torch.randint(2**62, ()))
        # a plain DataLoader gives the workers of all processes the same seeds; a worker that was not forked has no process group
        rank = self.__dict__.get("_rank", process_rank()) if get_worker_info() else process_rank()
        totals, names, plans = [], [], []
        # all repeats of every image's first row, then of its second row, so a loss that compares rows finds them in equal parts
        for repeat, parts in enumerate(zip(*(part.chunk(repeats) for part in out.chunk(rows)), strict=True)):
            method, own = self._plans(images, labels, columns, parts, keyed(key, rank, repeat), look, stopped)
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
        others = beside[0] if len(plans) == 1 else {column: _joined([part[column] for part in beside], len(images)) for column in others}
        targets = torch.cat([mix_targets(plan, labels, self.outputs) if maps is None else move_maps(plan, maps) for plan in plans])
        if maps is None:
            self._made[key % len(self._made)] = _checksum(targets)
        batch = MixedBatch(others, **{name: out}, labels=targets)
        batch.several = labels.ndim == 2
        return batch, torch.cat([plan.weight[:, 0].float() for plan in plans]), names

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
        if labels.ndim == 1 and labels.is_floating_point() and self.num_labels is None:  # regression with one output
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
        stopped: bool,
    ) -> tuple[str, list[MixPlan]]:
        """One plan for each of the `parts` (B, ...), which receive the mixtures, or one plan for all. If the policy looks at images, `parts` hold
        them until then. `look` normalises bytes."""
        if len(images) == 1 or stopped:
            if not stopped:
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


def _joined(parts: list[Any], batch: int) -> Any:
    """A column of the batch for the rows of all mixtures, from that of each. A value that has no row for each image stays."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts) if first.ndim and len(first) == batch else first
    return [row for part in parts for row in part] if isinstance(first, list) and len(first) == batch else first


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
in_use: weakref.WeakSet[MixupCollator] = weakref.WeakSet()


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
