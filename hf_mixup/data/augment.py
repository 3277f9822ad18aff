"""Transforms whose randomness is keyed: crops, mirrors and normalisation of batches, and transforms of single images."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from hf_mixup.core.rng import hashed_integers, keyed
from hf_mixup.data.pixels import read_image


@dataclass(frozen=True)
class Augmentation:
    """Random crop, mirror and normalisation of a batch in one go, on any device.

    Attributes:
        mean, std: of the normalisation, on bytes times `scale`.
        padding: pixels added to each side before the crop back to the size of before.
        reflect: what is added is mirrored; else it is black.
        flip: mirror one half of the images.
        order: the image's channel that each channel of the result shows, such as (2, 1, 0) for BGR; None keeps them.
        scale: what bytes are multiplied by first.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 0
    reflect: bool = False
    flip: bool = False
    order: tuple[int, ...] | None = None
    scale: float = 1 / 255

    def __call__(self, images: Tensor | Sequence[Tensor], keys: Tensor) -> Tensor:
        """(B, C, H, W) float32 of images (B, C, H, W) uint8. What is drawn for one follows from its key (B,) int64 alone."""
        images = images if isinstance(images, Tensor) else torch.stack(images)
        if self.padding or self.flip:
            images = self._moved(images, keys)
        mean, std = (_per_channel(values, images.device) for values in (self.mean, self.std))
        images = images if self.order is None else images[:, list(self.order)]
        # a copy, also of images that are float32 already: those of a cache
        return images.to(torch.float32, copy=True).mul_(self.scale).sub_(mean).div_(std)

    def _moved(self, images: Tensor, keys: Tensor) -> Tensor:
        height, width = images.shape[2:]
        # where the pixels of row y and column x come from, (B, H) and (B, W)
        y, x = (torch.arange(side, device=images.device).expand(len(images), -1) for side in (height, width))
        if self.flip:
            x = torch.where(hashed_integers(keys, 2, 2)[:, None] == 1, width - 1 - x, x)
        y, x = (axis + (hashed_integers(keys, draw, 2 * self.padding + 1) - self.padding)[:, None] for draw, axis in enumerate((y, x)))
        if self.reflect:
            y, x = (last - (last - axis.abs()).abs() for axis, last in ((y, height - 1), (x, width - 1)))
        from_y, from_x = y.clamp(0, height - 1), x.clamp(0, width - 1)
        source = (from_y[:, :, None] * width + from_x[:, None, :]).flatten(1)[:, None]
        moved = images.flatten(2).gather(2, source.expand(-1, images.shape[1], -1)).view_as(images)
        inside = (y == from_y)[:, :, None] & (x == from_x)[:, None, :]
        return moved * inside[:, None]


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Kept, because copying them to an accelerator for every batch would wait for it."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


@dataclass(frozen=True)
class OneByOne:
    """Transforms of single images that draw from the global streams, by keys all the same: of PIL images, or of tensors where PIL has no mode."""

    transform: Callable[[PIL.Image.Image | Tensor], Tensor]

    def __call__(self, images: Iterable[Tensor], keys: Tensor) -> Tensor:
        """(B, C, H, W) float32 of uint8 images of any sizes."""
        done = []
        for image, key in zip(images, keys.tolist(), strict=True):
            with seeded_streams(key):
                done.append(self.transform(to_pil_image(image) if len(image) in (1, 3) else image))
        return torch.stack(done)


@dataclass(frozen=True)
class Transform:
    """What becomes of an image, in two halves.

    Attributes:
        head: from an image as `read_image` returns it to one, or to its pixels; draws nothing, so that they can be kept.
        tail: from pixels, and a key for each image, to what a network sees.
        channels: of the images.
    """

    head: Callable[[PIL.Image.Image | Tensor], PIL.Image.Image | Tensor]
    tail: Augmentation | OneByOne
    channels: int = 3

    def pixels(self, image: Any) -> Tensor:
        """(C, H, W), of 0 to 255: uint8, or float32 where a processor's resizing leaves more than whole numbers. Of what `read_image` takes."""
        made = self.head(read_image(image, self.channels))
        return made if isinstance(made, Tensor) else pil_to_tensor(made)

    def __call__(self, image: Any, key: int = 0) -> Tensor:
        """(C, H, W) float32 of one image."""
        return self.tail([self.pixels(image)], torch.tensor([key]))[0]


@contextlib.contextmanager
def seeded_streams(key: int) -> Iterator[None]:
    """Inside, the global streams that transforms draw from, of torch, Python and numpy, follow from the key; after, they are as before."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    seed = keyed(key).initial_seed()
    torch.random.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])
