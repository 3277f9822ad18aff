"""Transforms of images whose randomness is keyed, from a file to what a network sees."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from hf_mixup.core.rng import keyed
from hf_mixup.data.pixels import Photograph, read_image
from hf_mixup.data.tail import Augmentation


@dataclass(frozen=True)
class OneByOne:
    """Transforms of single images that draw from the global streams, by keys all the same: of PIL images, or of tensors where PIL has no mode."""

    transform: Callable[[PIL.Image.Image | Tensor], PIL.Image.Image | Tensor]

    def __call__(self, images: Iterable[PIL.Image.Image | Photograph | Tensor], keys: Tensor) -> list[Tensor]:
        """(C, H, W) for each of the images, which are of any sizes: uint8, if the transform leaves bytes."""
        done = []
        with kept_streams():
            for image, key in zip(images, keys.tolist(), strict=True):
                seed_streams(key)
                if isinstance(image, Tensor) and len(image) in (1, 3):
                    image = to_pil_image(image)
                done.append(as_pixels(self.transform(image)))
        return done


@dataclass(frozen=True)
class Transform:
    """What becomes of an image, in three parts.

    Attributes:
        head: from an image as `read_image` returns it to one, or to its pixels; draws nothing, so that they can be kept.
        tail: from a batch of pixels, and a key for each image, to what a network sees. On the device, where pixels arrive as bytes.
        channels: of the images.
        each: between both: from images and their keys to pixels of one size, image by image.
        shrinks_to: (height, width), where `head` does nothing and `each` begins with a `ResizedCrop` to these sides.
    """

    head: Callable[[PIL.Image.Image | Tensor], PIL.Image.Image | Tensor]
    tail: Augmentation
    channels: int = 3
    each: Callable[[Sequence[PIL.Image.Image | Photograph | Tensor], Tensor], Sequence[Tensor]] | None = None
    shrinks_to: tuple[int, int] | None = None

    def opened(self, image: Any, unreadable: Callable[[Exception], Exception] | None = None) -> PIL.Image.Image | Photograph | Tensor:
        """The image after `head`, of what `read_image` takes; as pixels they are of 0 to 255, float32 where a processor's resizing leaves more than
        whole numbers.

        Args:
            unreadable: the exception to be raised for that of a file that cannot be decoded. With it a photograph may be left to `drawn` to decode.
        """
        if unreadable is not None and self.shrinks_to is not None:
            photograph = Photograph.of(image, self.channels, self.shrinks_to, unreadable)
            if photograph is not None:
                return photograph
        return self.head(read_image(image, self.channels))

    def drawn(self, images: Tensor | Sequence[PIL.Image.Image | Photograph | Tensor], keys: Tensor) -> Tensor | Sequence[Tensor]:
        """The pixels (C, H, W) of each image, which are left to `tail`."""
        if self.each is not None:
            return self.each(images, keys)
        return images if isinstance(images, Tensor) else [as_pixels(image) for image in images]

    def __call__(self, image: Any, key: int = 0) -> Tensor:
        """(C, H, W) float32 of one image."""
        keys = torch.tensor([key])
        return self.tail(self.drawn([self.opened(image)], keys), keys)[0]


def as_pixels(image: PIL.Image.Image | Tensor) -> Tensor:
    """(C, H, W)."""
    return image if isinstance(image, Tensor) else pil_to_tensor(image)


@contextlib.contextmanager
def kept_streams() -> Iterator[None]:
    """After it, the global streams of torch, Python and numpy are as they were before."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])


def seed_streams(key: int) -> None:
    """From here on, the global streams that transforms draw from, of torch, Python and numpy, follow from the key."""
    seed = keyed(key).initial_seed()
    torch.random.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def posterized(image: PIL.Image.Image, bits: int, **_: Any) -> PIL.Image.Image:
    """The image with so many bits a channel, 0 to 8. With none left it is black: timm's policies go so far, and new versions of Pillow refuse it."""
    if bits >= 8:
        return image
    return PIL.Image.new(image.mode, image.size) if bits < 1 else PIL.ImageOps.posterize(image, bits)
