"""A data set of images with keyed augmentation, and the order of repeated augmentation."""

from __future__ import annotations

import contextlib
import copy
import logging
import operator
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_mixup.core.checks import check_cached_size
from hf_mixup.core.plan import LABEL_KEYS
from hf_mixup.core.rng import hashed, keyed
from hf_mixup.data.augment import Transform, as_pixels
from hf_mixup.data.pixels import read_image
from hf_mixup.data.tail import Augmentation

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from datasets import Dataset


class Keyed:
    """Images whose augmentation follows from keys, and may be left to the device: what data sets and streams share."""

    def __init__(self, transform: Transform, seed: int, on_device: bool):
        self.transform, self.seed, self.on_device = transform, seed, on_device
        # in shared memory, because persistent workers keep the copy of the data set that they started with
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()  # a copy is not

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def finished(self) -> Self:
        """The same images as a network can see them: float32, with nothing left for the device."""
        other = copy.copy(self)
        other.on_device = False
        return other

    @property
    def left(self) -> Augmentation | None:
        """What is left to be done with its batches."""
        return self.transform.tail if self.on_device else None


class ImageDataset(Keyed, torch.utils.data.Dataset):
    """`{"pixel_values": (C, H, W) float32, "labels": int}` of a data set of images, or bytes that are finished on the device.

    What a transform draws follows from (seed, epoch, row), not from a global stream: the same images come in batches of any size, at
    any number of workers, and to a resumed run.

    Args:
        data: with an image and a label column: images of any mode, or arrays (H, W, C) or (C, H, W), as `read_image` takes them.
        cache: decode and resize all images now, and keep them in memory, one copy for all workers of this process.
        on_device: give uint8 pixels, and `augmentation_keys` for `transform.tail`, which MixupTrainer then applies on the device: a
            quarter of the memory, and the same images. Pixels that bytes cannot hold stay float32.

    Raises:
        ValueError: for images that cannot be read, and with `cache` for those of several sizes.
    """

    def __init__(
        self,
        data: Dataset,
        image_column: str,
        label_column: str,
        transform: Transform,
        seed: int = 0,
        *,
        cache: bool = False,
        on_device: bool = False,
    ):
        self.data = data.select_columns([image_column, label_column])
        from datasets import Array2D, Array3D, List  # here, because training on a data set of one's own needs no `datasets`

        if isinstance(
            data.features[image_column], (Array2D, Array3D, List)
        ):  # as lists they would lose their dtype, and so the depth of their pixels
            self.data = self.data.with_format("numpy", columns=[image_column], output_all_columns=True)
        self.image_column, self.label_column = image_column, label_column
        super().__init__(transform, seed, on_device)
        self._cache: tuple[Tensor, list] | None = self._decoded() if cache else None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """A row, or (row, copy): of every copy of an image, another augmentation is drawn."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> list[dict[str, Any]]:
        """The same for a batch, which DataLoaders ask for."""
        pairs = (index if isinstance(index, tuple) else (index, 0) for index in indices)
        # of any integer type, as k-fold splits and samplers of numpy and torch give them
        rows, copies = zip(*((operator.index(row), copy) for row, copy in pairs), strict=True)
        if self._cache is None:
            images, labels = zip(*map(self._read, rows), strict=True)
        else:
            images, labels = self._cache[0][list(rows)], [self._cache[1][row] for row in rows]
        epoch = keyed(self.seed, int(self._epoch)).initial_seed()
        keys = hashed(torch.tensor(rows) + (torch.tensor(copies) << 40), epoch)
        return examples_of(self.transform, images, labels, keys, self.on_device)

    def _read(self, row: int) -> tuple[PIL.Image.Image | Tensor, Any]:
        try:
            example = self.data[row]
            image = self.transform.opened(example[self.image_column])
        except Exception as error:
            raise unreadable(self.data, self.image_column, row, error) from None
        return image, example[self.label_column]

    def _decoded(self) -> tuple[Tensor, list]:
        """(N, C, H, W), as `Transform.opened` gives them, and the labels. Not in shared memory, which containers have little of: forked workers share it as it is."""
        labels = []
        for row in tqdm(range(len(self)), desc="decoding images", leave=False, disable=None):
            image, label = self._read(row)
            pixels = as_pixels(image)
            if row == 0:
                images = pixels.new_empty((len(self), *pixels.shape))
            check_cached_size(row, pixels, images[0])
            images[row] = pixels
            labels.append(label)
        return images, labels


def examples_of(
    transform: Transform, images: Sequence[PIL.Image.Image | Tensor], labels: Sequence[Any], keys: Tensor, on_device: bool
) -> list[dict[str, Any]]:
    """Examples of images after the transform's head: finished, or with what their tail needs to be applied on the device."""
    pixels = transform.drawn(images, keys)
    if on_device:
        return [
            {"pixel_values": image, "labels": label, "augmentation_keys": key}
            for image, label, key in zip(pixels, labels, keys, strict=True)
        ]
    return [{"pixel_values": image, "labels": label} for image, label in zip(transform.tail(pixels, keys), labels, strict=True)]


def unwrapped(data: Any) -> Iterator[Any]:
    """The data set, and those that it wraps under whatever name: of `Subset`, `random_split`, `ConcatDataset`, or of a class of one's own."""
    waiting, seen = [data], set()
    while waiting:
        outer = waiting.pop()
        if id(outer) in seen:
            continue
        seen.add(id(outer))
        yield outer
        for value in getattr(outer, "__dict__", {}).values():
            value = list(value.values()) if isinstance(value, dict) else value
            parts = value if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.utils.data.Dataset) else [value]
            waiting += [part for part in parts if isinstance(part, torch.utils.data.Dataset)]


def labels_of(data: Any, attributes: bool = False, names: Sequence[str] | None = None) -> np.ndarray | None:
    """Labels of a data set that can be read without its images: one of ours or of `datasets`, and parts of them; None where they cannot.

    Args:
        attributes: look for `labels` and `targets` too, as torchvision's data sets have them.
        names: the columns that are the labels (`label_names`), where a batch does not call them so.
    """
    datasets = sys.modules.get("datasets")  # a data set of theirs has imported it; nothing else here needs it
    if isinstance(data, torch.utils.data.Subset):
        inner = labels_of(data.dataset, attributes, names)
        return None if inner is None else inner[np.asarray(data.indices, dtype=np.int64)]
    if isinstance(data, torch.utils.data.ConcatDataset):
        parts = [labels_of(part, attributes, names) for part in data.datasets]
        return None if any(part is None for part in parts) else np.concatenate(parts)
    column = None
    if isinstance(data, ImageDataset):
        data, column = data.data, data.label_column
    if datasets is not None and isinstance(data, datasets.Dataset):
        known = [name for name in names or () if name in data.column_names] if column is None else []
        if len(known) > 1:
            return None  # of several heads
        column = column or next((name for name in [*known, *LABEL_KEYS] if name in data.column_names), None)
        if column is not None:
            return np.asarray(data.select_columns([column]).with_format("numpy")[:][column])
    if names and not {*names} <= {*LABEL_KEYS}:
        return None
    if attributes and hasattr(data, "__len__") and getattr(data, "target_transform", None) is None:
        found = (getattr(data, name, None) for name in ("labels", "targets"))
        return next((np.asarray(labels) for labels in found if hasattr(labels, "__len__") and len(labels) == len(data)), None)
    return None


def class_counts_of(data: Any, num_labels: int, names: Sequence[str] | None = None) -> tuple[int, ...] | None:
    """Rows of each class; of soft labels their sums, rounded. None where `labels_of` says no labels, or others than of so many classes."""
    labels = labels_of(data, attributes=True, names=names)
    if labels is None or len(labels) == 0 or labels.dtype.kind not in "biuf":
        return None
    if labels.ndim == 2 and labels.shape[1] == num_labels:
        return tuple(labels.sum(0).round().astype(int).tolist())
    if labels.ndim != 1 or labels.dtype.kind == "f" or labels.min() < 0 or labels.max() >= num_labels:
        return None
    return tuple(np.bincount(labels, minlength=num_labels).tolist())


def set_epoch(data: Any, epoch: int) -> None:
    """Tells the data set its epoch, on which augmentation depends, and those that it wraps."""
    for inner in unwrapped(data):
        if callable(getattr(inner, "set_epoch", None)):
            inner.set_epoch(epoch)


def tail_on_device(data: Any) -> Augmentation | None:
    """What is left to be done with the batches of a data set: the augmentation that it leaves to the device. None for most.

    Raises ValueError where a batch may hold images of several kinds.
    """
    tails = {inner.left for inner in unwrapped(data) if hasattr(inner, "left")}
    if len(tails) > 1:
        raise ValueError(
            f"data sets that are joined must be augmented alike on the device, got {len(tails)} ways of it; make them with one transform, or on_device=False."
        )
    return next(iter(tails), None)


def check_readable(data: Dataset, column: str, name: str, workers: int = 0) -> None:
    """Reads all images, logs those that cannot be read, a line each, and raises ValueError if there are any.

    Args:
        name: of the data set, for the message and the progress bar.
        workers: processes that read.
    """
    found = torch.utils.data.DataLoader(_Faults(data.select_columns([column]), column), batch_size=None, num_workers=workers)
    broken = [fault for fault in tqdm(found, total=len(data), desc=f"checking {name}", disable=None) if fault]
    for fault in broken:
        logger.warning("%s", fault)
    if broken:
        first = "; ".join(broken[:3]) + (", ..." if len(broken) > 3 else "")
        raise ValueError(
            f"every {name} image must be readable, got {len(broken)} of {len(data)} that are not, listed above ({first}); repair or remove them."
        )


@dataclass(frozen=True)
class _Faults(torch.utils.data.Dataset):
    """What is wrong with each image of a data set; empty where it can be read."""

    data: Dataset
    column: str

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> str:
        try:
            value = self.data[row][self.column]
            if value is None or isinstance(value, PIL.Image.Image):
                read_image(value)
        except Exception as error:
            return f"{place(self.data, self.column, row)} ({one_line(error)})"
        return ""


def unreadable(data: Dataset, column: str, row: int, error: Exception) -> ValueError:
    """For a row without a readable image, with the name of its file, if it has one."""
    return ValueError(
        f"every row must hold a readable image, got an error at {place(data, column, row)} ({one_line(error)}); "
        "repair or drop that row (--check_images lists all such)."
    )


def place(data: Dataset, column: str, row: int) -> str:
    """`row 5, dogs/1.jpg`."""
    from datasets import Image

    path = None
    if isinstance(data.features[column], Image):
        with contextlib.suppress(Exception):
            path = data.cast_column(column, Image(decode=False))[row][column]["path"]
    return f"row {row}" + (f", {path}" if path else "")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class RepeatedAugmentation(torch.utils.data.Sampler):
    """The order of repeated augmentation (Hoffer et al., CVPR 2020, arXiv:1901.09335; as in DeiT's and timm's sampler): every image
    is shown `repeats` times in a row, each time augmented anew, and an epoch is as long as without, so it holds fewer images.

    Where several processes share the order, copies of an image go to different ones. What is left of the last batch is dropped.

    Args:
        length: images of the data set, an `ImageDataset`, which is asked for (row, copy).
        repeats: augmentations of each.
        batch_size, processes: images that a process takes at once, and how many processes take turns.
        seed: with the epoch, the order follows from it.
    """

    def __init__(self, length: int, repeats: int, batch_size: int, processes: int, seed: int):
        self.length, self.repeats, self.batch_size, self.processes, self.seed = length, repeats, batch_size, processes, seed
        self.epoch = 0
        if length < batch_size * processes:
            raise ValueError(
                f"repeated augmentation needs at least one batch of {batch_size * processes} images, got {length}; make batches smaller."
            )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.processes) * self.batch_size * self.processes

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rows = torch.randperm(self.length, generator=keyed(self.seed, self.epoch)).tolist()
        # the next image of the list goes to the next process, and every process takes its batch in one piece
        order = torch.arange(len(self)).view(-1, self.batch_size, self.processes).transpose(1, 2).flatten().tolist()
        for place in order:
            yield rows[place // self.repeats], place % self.repeats
