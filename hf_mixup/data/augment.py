"""Transforms of images with keyed randomness, from the file to the network's input."""

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
    """Runs transforms that draw from the global random streams, image by image, by keys. They take PIL images, or tensors if PIL has no mode."""

    transform: Callable[[PIL.Image.Image | Tensor], PIL.Image.Image | Tensor]

    def __call__(self, images: Iterable[PIL.Image.Image | Photograph | Tensor], keys: Tensor) -> list[Tensor]:
        """(C, H, W) for each image, of any size; uint8 if the transform gives bytes."""
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
    """The transform of an image, in three parts.

    Attributes:
        head: function from an image of `read_image` to an image, or its pixels. It draws nothing, so the result can be cached.
        tail: function from a batch of pixels, and a key for each image, to the network's input. It can run on the device, on bytes.
        channels: number of channels of the images.
        each: the part between both: function from images and their keys to pixels of one size, image by image.
        shrinks_to: (height, width), if `head` does nothing and `each` begins with a `ResizedCrop` to these sides.
    """

    head: Callable[[PIL.Image.Image | Tensor], PIL.Image.Image | Tensor]
    tail: Augmentation
    channels: int = 3
    each: Callable[[Sequence[PIL.Image.Image | Photograph | Tensor], Tensor], Sequence[Tensor]] | None = None
    shrinks_to: tuple[int, int] | None = None

    def opened(self, image: Any, unreadable: Callable[[Exception], Exception] | None = None) -> PIL.Image.Image | Photograph | Tensor:
        """The image after `head`, from any source that `read_image` takes. Pixels are from 0 to 255, float32 if a processor's resizing does not
        give whole numbers.

        Args:
            unreadable: function from the error of a file that cannot be decoded to the error to raise. With it, `drawn` may decode the file later.
        """
        if unreadable is not None and self.shrinks_to is not None:
            photograph = Photograph.of(image, self.channels, self.shrinks_to, unreadable)
            if photograph is not None:
                return photograph
        return self.head(read_image(image, self.channels))

    def drawn(self, images: Tensor | Sequence[PIL.Image.Image | Photograph | Tensor], keys: Tensor) -> Tensor | Sequence[Tensor]:
        """The pixels (C, H, W) of each image, before `tail`."""
        if self.each is not None:
            return self.each(images, keys)
        return images if isinstance(images, Tensor) else [as_pixels(image) for image in images]

    def __call__(self, image: Any, key: int = 0) -> Tensor:
        """The whole transform of one image: (C, H, W) float32."""
        keys = torch.tensor([key])
        return self.tail(self.drawn([self.opened(image)], keys), keys)[0]


def as_pixels(image: PIL.Image.Image | Tensor) -> Tensor:
    """(C, H, W)."""
    return image if isinstance(image, Tensor) else pil_to_tensor(image)


@contextlib.contextmanager
def kept_streams() -> Iterator[None]:
    """Context manager that restores the global random streams of torch, Python and numpy."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])


def seed_streams(key: int) -> None:
    """Seeds the global random streams of torch, Python and numpy, from which transforms draw, by the key."""
    seed = keyed(key).initial_seed()
    torch.random.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def posterized(image: PIL.Image.Image, bits: int, **_: Any) -> PIL.Image.Image:
    """The image with `bits` bits for each channel, 0 to 8. With 0 bits it is black; timm's policies use that, and new versions of Pillow refuse it."""
    if bits >= 8:
        return image
    return PIL.Image.new(image.mode, image.size) if bits < 1 else PIL.ImageOps.posterize(image, bits)
