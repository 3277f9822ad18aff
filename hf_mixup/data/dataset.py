"""A data set of images with keyed augmentation, and the order of repeated augmentation."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_mixup.core.checks import check_cached_size, one_line
from hf_mixup.core.plan import LABEL_KEYS
from hf_mixup.core.rng import hashed, keyed
from hf_mixup.data.augment import Transform, as_pixels
from hf_mixup.data.pixels import Photograph, read_image
from hf_mixup.data.tail import Augmentation

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from datasets import Dataset


# of a column of images whose mode is declared, those without colours
GREY_MODES = ("1", "L", "LA", "I", "F")


class Keyed:
    """The base of data sets and streams: images with keyed augmentation, which may be left to the device."""

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
        """The same images ready for a network: float32, with nothing left for the device."""
        other = copy.copy(self)
        other.on_device = False
        return other

    @property
    def left(self) -> Augmentation | None:
        """The augmentation that is left for the device, or None."""
        return self.transform.tail if self.on_device else None


class ImageDataset(Keyed, torch.utils.data.Dataset):
    """`{"pixel_values": (C, H, W) float32, "labels": int}` from a data set of images; or bytes, which are finished on the device.

    A transform draws by (seed, epoch, row), not from a global random stream. So the images do not depend on the batch size or the number of
    workers, and a resumed run gets the same images.

    Args:
        data: has an image and a label column, with images of any mode or arrays (H, W, C) or (C, H, W), as `read_image` takes them.
        cache: decode and resize all images now, and keep one copy in memory for all workers of this process.
        on_device: return uint8 pixels, and `augmentation_keys` for `transform.tail`, which MixupTrainer applies on the device. It takes a
            quarter of the memory, and gives the same images. Pixels that bytes cannot hold stay float32.

    Raises:
        ValueError: for images that cannot be read, and with `cache` for images of different sizes.
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
        from datasets import Array2D, Array3D, Image, List  # here, because training on your own data set does not need `datasets`

        feature = data.features[image_column]
        data = unformatted(data).select_columns([image_column, label_column])
        self._grey = isinstance(feature, Image) and feature.mode in GREY_MODES
        if isinstance(feature, Image) and feature.mode is not None:  # `datasets` would clip deeper pixels to it
            data = data.cast_column(image_column, Image())
        self.data = with_files(data, image_column)
        if isinstance(feature, (Array2D, Array3D, List)):  # lists would lose the dtype, and so the range of the pixels
            self.data = self.data.with_format("numpy", columns=[image_column], output_all_columns=True)
        self.image_column, self.label_column = image_column, label_column
        super().__init__(transform, seed, on_device)
        self._cache: tuple[Tensor, list] | None = self._decoded() if cache else None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """One row; or (row, copy), where every copy of an image draws another augmentation. Raises IndexError behind the last row."""
        row = index[0] if isinstance(index, tuple) else index
        if row >= len(self):  # ends `for example in dataset`
            raise IndexError(f"row must be below the number of images, got {row} of {len(self)}; choose another.")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> list[dict[str, Any]]:
        """The same for a batch, as DataLoaders call it."""
        pairs = (index if isinstance(index, tuple) else (index, 0) for index in indices)
        # of any integer type, because k-fold splits and samplers give numbers of numpy and torch
        rows, copies = zip(*((operator.index(row), copy) for row, copy in pairs), strict=True)
        if self._cache is None:
            images, labels = zip(
                *(self._read(row, functools.partial(unreadable, self.data, self.image_column, row)) for row in rows), strict=True
            )
        else:
            images, labels = self._cache[0][list(rows)], [self._cache[1][row] for row in rows]
        epoch = keyed(self.seed, int(self._epoch)).initial_seed()
        keys = hashed(torch.tensor(rows) + (torch.tensor(copies) << 40), epoch)
        return examples_of(self.transform, images, labels, keys, self.on_device)

    def _read(self, row: int, later: Callable[[Exception], Exception] | None = None) -> tuple[PIL.Image.Image | Photograph | Tensor, Any]:
        """`later`: function that makes the error of a photograph that is decoded later; None decodes it now."""
        try:
            example = self.data[row]
            image = file_of(example[self.image_column])
            image = self.transform.opened(read_image(image, 1) if self._grey else image, later)
        except Exception as error:
            raise unreadable(self.data, self.image_column, row, error) from None
        return image, example[self.label_column]

    def _decoded(self) -> tuple[Tensor, list]:
        """(N, C, H, W), as `Transform.opened` gives them, and the labels. Not in shared memory, because containers have little of it; forked workers share normal memory."""
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


def unformatted(data: Dataset) -> Dataset:
    """Without a format that was set, such as `torch`, which is saved with a data set and gives palettes as their numbers. A transform of one's
    own stays."""
    return data if data.format["type"] in (None, "custom") else data.with_format(None)


def with_files(data: Dataset, column: str) -> Dataset:
    """The data set with files instead of decoded images, for `file_of`. `datasets` decodes whole photographs, and loses facts about the file."""
    from datasets import Image

    feature = data.features[column]
    plain = isinstance(feature, Image) and feature.decode and feature.mode is None and data.format["type"] is None
    return data.cast_column(column, Image(decode=False)) if plain else data


def file_of(value: Any, tokens: dict[str, str | bool | None] | None = None) -> Any:
    """A source for `read_image`, from a value of a column of `Image(decode=False)`: the bytes of the file. Other values stay.

    Args:
        tokens: by repository of the Hub, for files there.
    """
    if not (isinstance(value, dict) and set(value) == {"bytes", "path"}):
        return value
    if value["bytes"] is not None:
        return value["bytes"]
    if value["path"] is not None and "://" not in value["path"]:
        return Path(value["path"]).read_bytes()
    from datasets import Image

    return Image().decode_example(value, tokens)


def examples_of(
    transform: Transform, images: Sequence[PIL.Image.Image | Photograph | Tensor], labels: Sequence[Any], keys: Tensor, on_device: bool
) -> list[dict[str, Any]]:
    """Examples from images after the transform's head: finished, or with the keys for the tail on the device."""
    pixels = transform.drawn(images, keys)
    if on_device:
        return [
            {"pixel_values": image, "labels": label, "augmentation_keys": key}
            for image, label, key in zip(pixels, labels, keys, strict=True)
        ]
    return [{"pixel_values": image, "labels": label} for image, label in zip(transform.tail(pixels, keys), labels, strict=True)]


def unwrapped(data: Any) -> Iterator[Any]:
    """The data set, and all data sets inside it, for `Subset`, `random_split`, `ConcatDataset`, or your own class with any attribute name."""
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
    """The labels (N,) of a data set, read without its images. It works for those of hf_mixup and `datasets`, and parts of them; else None.

    Args:
        attributes: look for `labels` and `targets` too, as torchvision's data sets have them.
        names: the columns that are the labels (`label_names`), where a batch does not call them so.
    """
    datasets = sys.modules.get("datasets")  # a data set of `datasets` has imported it; nothing else here needs it
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
            return np.asarray(data.select_columns([column]).with_format(None)[:][column])
    if names and not {*names} <= {*LABEL_KEYS}:
        return None
    if attributes and hasattr(data, "__len__") and getattr(data, "target_transform", None) is None:
        found = (getattr(data, name, None) for name in ("labels", "targets"))
        return next((np.asarray(labels) for labels in found if hasattr(labels, "__len__") and len(labels) == len(data)), None)
    return None


def class_counts_of(data: Any, num_labels: int, names: Sequence[str] | None = None) -> tuple[int, ...] | None:
    """Number of rows of each class; for soft labels their rounded sums. None if `labels_of` gives none, or other than `num_labels` classes."""
    labels = labels_of(data, attributes=True, names=names)
    if labels is None or len(labels) == 0 or labels.dtype.kind not in "biuf":
        return None
    if labels.ndim == 2 and labels.shape[1] == num_labels:
        return tuple(labels.sum(0).round().astype(int).tolist())
    if labels.ndim != 1 or labels.dtype.kind == "f" or labels.min() < 0 or labels.max() >= num_labels:
        return None
    return tuple(np.bincount(labels, minlength=num_labels).tolist())


def set_epoch(data: Any, epoch: int) -> None:
    """Sets the epoch, on which augmentation depends, of the data set and of those inside it."""
    for inner in unwrapped(data):
        if callable(getattr(inner, "set_epoch", None)):
            inner.set_epoch(epoch)


def tail_on_device(data: Any) -> Augmentation | None:
    """The augmentation that a data set leaves to the device. None for most data sets.

    Raises ValueError if a batch may hold images with different ones.
    """
    tails = {inner.left for inner in unwrapped(data) if hasattr(inner, "left")}
    if len(tails) > 1:
        raise ValueError(
            f"joined data sets must have the same augmentation on the device, got {len(tails)} different ones; make them with one transform, or on_device=False."
        )
    return next(iter(tails), None)


def check_readable(data: Dataset, column: str, name: str, workers: int = 0) -> None:
    """Reads all images, logs one line for each that cannot be read, and raises ValueError if there are any.

    Args:
        name: name of the data set, for the message and the progress bar.
        workers: number of processes that read.
    """
    faults = _Faults(with_files(data.select_columns([column]), column), column)
    found = torch.utils.data.DataLoader(faults, batch_size=None, num_workers=workers)
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
    """For each image of a data set, the error when it is read; empty if there is none."""

    data: Dataset
    column: str

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> str:
        try:
            value = file_of(self.data[row][self.column])
            if value is None or isinstance(value, (bytes, PIL.Image.Image)):
                read_image(value)
        except Exception as error:
            return f"{place(self.data, self.column, row)} ({one_line(error)})"
        return ""


def unreadable(data: Dataset, column: str, row: int, error: Exception) -> ValueError:
    """The error for a row without a readable image, with its file name if it has one."""
    return ValueError(
        f"every row must hold a readable image, got an error at {place(data, column, row)} ({one_line(error)}); "
        "repair or drop that row (--check_images lists all of them)."
    )


def place(data: Dataset, column: str, row: int) -> str:
    """`row 5, dogs/1.jpg`."""
    from datasets import Image

    path = None
    if isinstance(data.features[column], Image):
        with contextlib.suppress(Exception):
            path = data.cast_column(column, Image(decode=False))[row][column]["path"]
    return f"row {row}" + (f", {path}" if path else "")


class RepeatedAugmentation(torch.utils.data.Sampler):
    """The order of repeated augmentation (Hoffer et al., CVPR 2020, arXiv:1901.09335; as in DeiT's and timm's sampler): every image
    is shown `repeats` times in a row, each time with a new augmentation. An epoch has the same length as without, so it has fewer images.

    With several processes, copies of an image go to different processes. The rest that does not fill a batch is dropped.

    Args:
        length: number of images of the data set, an `ImageDataset`, which gets indices (row, copy).
        repeats: number of augmentations of each image.
        batch_size, processes: images in a batch of one process, and number of processes.
        seed: the order depends on it and on the epoch.
    """

    def __init__(self, length: int, repeats: int, batch_size: int, processes: int, seed: int):
        self.length, self.repeats, self.batch_size, self.processes, self.seed = length, repeats, batch_size, processes, seed
        self.epoch = 0
        if length < batch_size * processes:
            raise ValueError(
                f"repeated augmentation needs at least one batch of {batch_size * processes} images, got {length}; lower the batch size."
            )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.processes) * self.batch_size * self.processes

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rows = torch.randperm(self.length, generator=keyed(self.seed, self.epoch)).tolist()
        # consecutive images of the list go to consecutive processes, and each process takes its batch in one piece
        order = torch.arange(len(self)).view(-1, self.batch_size, self.processes).transpose(1, 2).flatten().tolist()
        for place in order:
            yield rows[place // self.repeats], place % self.repeats
