"""A data set of images with keyed augmentation, and the order of repeated augmentation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_mixup.core.checks import check_cached_size, refuse_augmentation_on_device
from hf_mixup.core.rng import hashed, keyed
from hf_mixup.data.augment import Augmentation, Transform

if TYPE_CHECKING:
    from datasets import Dataset


class ImageDataset(torch.utils.data.Dataset):
    """`{"pixel_values": (3, H, W) float32, "labels": int}` of a data set of images.

    What a transform draws follows from (seed, epoch, row), not from a global stream: the same images come in batches of any size, at
    any number of workers, and to a resumed run.

    Args:
        data: with an image and a label column; images of any mode become RGB.
        cache: decode and resize all images now, and keep them in memory, one copy for all workers of this process.
        on_device: give uint8 pixels, and `augmentation_keys` for `transform.tail`, which MixupTrainer then applies on the device.

    Raises:
        ValueError: for images that cannot be read, with `cache` for those of several sizes, and with `on_device` for transforms that
            take images one by one.
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
        if on_device and not isinstance(transform.tail, Augmentation):
            refuse_augmentation_on_device()
        self.data = data.select_columns([image_column, label_column])
        self.image_column, self.label_column = image_column, label_column
        self.transform, self.seed, self.on_device = transform, seed, on_device
        # in shared memory, because persistent workers keep the copy of the data set that they started with
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._cache: tuple[Tensor, list] | None = self._decoded() if cache else None

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """A row, or (row, copy): of every copy of an image, another augmentation is drawn."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> list[dict[str, Any]]:
        """The same for a batch, which DataLoaders ask for."""
        rows, copies = zip(*((index, 0) if isinstance(index, int) else index for index in indices), strict=True)
        if self._cache is None:
            pixels, labels = zip(*map(self._read, rows), strict=True)
        else:
            pixels, labels = self._cache[0][list(rows)], [self._cache[1][row] for row in rows]
        epoch = keyed(self.seed, int(self._epoch)).initial_seed()
        keys = hashed(torch.tensor(rows) + (torch.tensor(copies) << 40), epoch)
        if self.on_device:
            return [
                {"pixel_values": image, "labels": label, "augmentation_keys": key}
                for image, label, key in zip(pixels, labels, keys, strict=True)
            ]
        images = self.transform.tail(pixels, keys)
        return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]

    def _read(self, row: int) -> tuple[Tensor, Any]:
        try:
            example = self.data[row]
            pixels = self.transform.pixels(example[self.image_column])
        except Exception as error:
            raise ValueError(
                f"every row must hold a readable image, got an error at row {row} ({error}); repair or drop that row."
            ) from None
        return pixels, example[self.label_column]

    def _decoded(self) -> tuple[Tensor, list]:
        """(N, 3, H, W) uint8 and the labels. Not in shared memory, which containers have little of: forked workers share it as it is."""
        labels = []
        for row in tqdm(range(len(self)), desc="decoding images", leave=False, disable=None):
            pixels, label = self._read(row)
            if row == 0:
                images = pixels.new_empty((len(self), *pixels.shape))
            check_cached_size(row, pixels, images[0])
            images[row] = pixels
            labels.append(label)
        return images, labels


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
