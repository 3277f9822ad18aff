"""Frozen teachers, and the normalisation of their images."""

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
    """The normalisation of a network's input: `scale * pixels + offset` for each channel, with pixels in [0, 1].

    Attributes:
        scale, offset: one number for each channel, red, green, blue.
        order: which colour each channel holds; (2, 1, 0) for a network that takes blue first.
    """

    scale: tuple[float, ...]
    offset: tuple[float, ...]
    order: tuple[int, ...] = (0, 1, 2)

    @classmethod
    def of_processor(cls, processor: Any) -> Normalisation | None:
        """The normalisation of an image processor, measured on four pictures of one colour each. So it works for every class of processor.

        None for anything else, such as a tokenizer.
        """
        from transformers.image_processing_base import ImageProcessingMixin

        if not isinstance(processor, ImageProcessingMixin):
            return None
        side = 640  # larger than processors crop: they would pad a smaller picture with black
        colours = [(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)]
        seen = [processor(PIL.Image.new("RGB", (side, side), colour), return_tensors="pt")["pixel_values"][0] for colour in colours]
        black, *single = (image[:, image.shape[1] // 2, image.shape[2] // 2].double() for image in seen)
        gains = torch.stack([colour - black for colour in single])  # [colour, place]
        order = gains.abs().argmax(0)  # the colour at each place
        places = order.argsort()
        scale = gains[torch.arange(3), places]
        return cls(tuple(scale.tolist()), tuple(black[places].tolist()), tuple(order.tolist()))

    def same_as(self, other: Normalisation | None) -> bool:
        """Whether both are equal, up to the rounding of float32."""
        if other is None or self.order != other.order:
            return False
        mine, theirs = (torch.tensor(self_.scale + self_.offset) for self_ in (self, other))
        return torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)

    def pixels(self, images: Tensor) -> Tensor:
        """The pixels (B, C, H, W) in [0, 1], red first, of normalised images."""
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
    """A frozen image classifier from a folder or the Hub, which sees images in the normalisation of its own image processor.

    Attributes:
        own: its normalisation; None if it has no image processor, and sees images without a change.
        given: the normalisation of the training images, set by `MixupModel`; None if unknown.
    """

    def __init__(self, repo_or_folder: str):
        from hf_mixup.networks.backbones import (
            load_classifier,
        )  # here, because it imports transformers

        super().__init__()
        self.name = repo_or_folder
        self.network = load_classifier(repo_or_folder).requires_grad_(False).eval()
        self.own, self.given = normalisation_of(repo_or_folder), None

    def view(self, images: Tensor) -> Tensor:
        """Training images (B, C, H, W) in the teacher's normalisation. Raises ValueError if that of the training images is unknown."""
        if self.own is None or self.own.same_as(self.given):
            return images
        if self.given is None:
            raise ValueError(
                f"the teacher {self.name} has its own normalisation, got training images of unknown normalisation; give "
                "MixupTrainer the image processor as processing_class, or set the normalisation of the MixupModel."
            )
        return self.own.images(self.given.pixels(images))

    def forward(self, pixel_values: Tensor) -> Any:
        """Forward pass on images with the normalisation of the training."""
        return self.network(pixel_values=self.view(pixel_values))


def normalisation_of(repo_or_folder: str | os.PathLike) -> Normalisation | None:
    """The normalisation of a checkpoint's image processor, or None."""
    from transformers import AutoImageProcessor

    try:
        return Normalisation.of_processor(AutoImageProcessor.from_pretrained(repo_or_folder, trust_remote_code=False))
    except (OSError, ValueError):
        return None
