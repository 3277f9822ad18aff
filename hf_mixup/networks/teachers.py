"""Frozen teachers, and how their images are normalised."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Normalisation:
    """How pixels in [0, 1] become what a network is given: `scale * pixels + offset`, by channel.

    Attributes:
        scale, offset: one number for each channel, red, green, blue.
        order: which of them comes first, second, third; (2, 1, 0) for a network that takes blue first.
    """

    scale: tuple[float, ...]
    offset: tuple[float, ...]
    order: tuple[int, ...] = (0, 1, 2)

    @classmethod
    def of_processor(cls, processor: Any) -> Normalisation | None:
        """That of an image processor, by what it makes of four pictures of one colour each: so it holds for every class of them.

        None for anything else, such as a tokenizer.
        """
        from transformers.image_processing_base import ImageProcessingMixin

        if not isinstance(processor, ImageProcessingMixin):
            return None
        side = 640  # larger than what processors crop, which would pad with black
        colours = [(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)]
        seen = [processor(PIL.Image.new("RGB", (side, side), colour), return_tensors="pt")["pixel_values"][0] for colour in colours]
        black, *single = (image[:, image.shape[1] // 2, image.shape[2] // 2].double() for image in seen)
        gains = torch.stack([colour - black for colour in single])  # [colour, place]
        order = gains.abs().argmax(0)  # the colour at each place
        places = order.argsort()
        scale = gains[torch.arange(3), places]
        return cls(tuple(scale.tolist()), tuple(black[places].tolist()), tuple(order.tolist()))

    def same_as(self, other: Normalisation | None) -> bool:
        """To the rounding of float32."""
        if other is None or self.order != other.order:
            return False
        mine, theirs = (torch.tensor(self_.scale + self_.offset) for self_ in (self, other))
        return torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)

    def pixels(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1], red first, of images that are normalised like this."""
        scale, offset = self._placed(images)
        return ((images - offset) / scale)[:, _inverse(self.order)]

    def images(self, pixels: Tensor) -> Tensor:
        """Inverse of `pixels`."""
        scale, offset = self._placed(pixels)
        return pixels[:, self.order] * scale + offset

    def _placed(self, images: Tensor) -> Iterator[Tensor]:
        for values in (self.scale, self.offset):
            placed = torch.tensor([values[colour] for colour in self.order], dtype=images.dtype)
            yield placed.to(images.device, non_blocking=True).view(-1, 1, 1)


def _inverse(order: tuple[int, ...]) -> list[int]:
    return [order.index(place) for place in range(len(order))]


class Teacher(nn.Module):
    """A frozen image classifier from a folder or the Hub, which is shown images as its own image processor normalises them.

    Attributes:
        own: its normalisation; None where it has no image processor, and is shown images as they are.
        given: that of the images in training, which `MixupModel` tells; None where that is not known.
    """

    def __init__(self, repo_or_folder: str):
        from hf_mixup.networks.backbones import load_classifier  # here, because it imports transformers, and policies need none

        super().__init__()
        self.name = repo_or_folder
        self.network = load_classifier(repo_or_folder).requires_grad_(False).eval()
        self.own, self.given = normalisation_of(repo_or_folder), None

    def view(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) of the training as the teacher wants them. Raises ValueError where their normalisation is not known."""
        if self.own is None or self.own.same_as(self.given):
            return images
        if self.given is None:
            raise ValueError(
                f"the teacher {self.name} has a normalisation of its own, got training images whose normalisation is not known; give "
                "MixupTrainer the image processor as processing_class, or set the normalisation of the MixupModel."
            )
        return self.own.images(self.given.pixels(images))

    def forward(self, pixel_values: Tensor) -> Any:
        """Of images as the training has them."""
        return self.network(pixel_values=self.view(pixel_values))


def normalisation_of(repo_or_folder: str | os.PathLike) -> Normalisation | None:
    """That of a checkpoint's image processor; None where it has none."""
    from transformers import AutoImageProcessor

    try:
        return Normalisation.of_processor(AutoImageProcessor.from_pretrained(repo_or_folder, trust_remote_code=False))
    except (OSError, ValueError):
        return None
