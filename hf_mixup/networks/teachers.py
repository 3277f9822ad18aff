"""Frozen teachers, and the normalisation of their images."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


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
        seen = [processor(PIL.Image.new("RGB", (side, side), colour), return_tensors="pt")["pixel_values"] for colour in colours]
        # of the first frame, where they are videos (1, T, C, H, W)
        black, *single = (images.flatten(0, -4)[0, :, images.shape[-2] // 2, images.shape[-1] // 2].double() for images in seen)
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
        """The pixels (..., C, H, W) in [0, 1], red first, of normalised images or videos."""
        scale, offset = self._placed(images)
        return ((images - offset) / scale)[..., _inverse(self.order), :, :]

    def images(self, pixels: Tensor) -> Tensor:
        """Inverse of `pixels`."""
        scale, offset = self._placed(pixels)
        return pixels[..., list(self.order), :, :] * scale + offset

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
        places: index of its output for each class of the student; None for the same order, and before `match`.
    """

    def __init__(self, repo_or_folder: str):
        from hf_mixup.networks.backbones import (
            load_classifier,
        )  # here, because it imports transformers

        super().__init__()
        self.name = repo_or_folder
        with torch.random.fork_rng(devices=[]):  # one that is asked for features only needs no classifier
            self.network = load_classifier(repo_or_folder, fresh_classifier=True).requires_grad_(False).eval()
        self.own, self.given = normalisation_of(repo_or_folder), None
        self.places: list[int] | None = None

    def match(self, student: nn.Module) -> None:
        """From here on its classes are the student's, by name. Raises ValueError for a teacher of other classes, or without a classifier."""
        self.check_classifies()
        self.places = _places(self.name, _classes(self.network.config), _classes(student.config))

    def check_classifies(self) -> None:
        """Raises ValueError where the checkpoint holds no classifier."""
        if self.network.classifier_is_fresh:
            raise ValueError(f"a teacher that is asked for classes must hold a classifier, got none in {self.name}; fine-tune it first.")

    def answers(self, logits: Tensor) -> Tensor:
        """Its logits (B, its classes) as (B, num_labels) of the student."""
        return logits if self.places is None else logits[:, self.places]

    def targets(self, targets: Tensor) -> Tensor:
        """Targets (B, num_labels) of the student as its own, (B, its classes)."""
        if self.places is None:
            return targets
        own = targets.new_zeros(len(targets), self.network.config.num_labels)
        own[:, self.places] = targets
        return own

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


def _classes(config: Any) -> list[str] | int:
    """Names of the classes; their number where they have none but transformers' own."""
    names = [str(config.id2label[number]) for number in range(config.num_labels)]
    return config.num_labels if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else names


def _places(teacher: str, its: list[str] | int, own: list[str] | int) -> list[int] | None:
    """The teacher's place of each class of the student; None for the same order."""
    counts = [classes if isinstance(classes, int) else len(classes) for classes in (its, own)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"a teacher must know the {counts[1]} classes of the network, got {teacher} with {counts[0]}; fine-tune it on them first."
        )
    if its == own:
        return None
    if isinstance(its, int) or isinstance(own, int):
        logger.warning("the classes of the teacher %s and of the network are not known by name: they are taken to be in one order", teacher)
        return None
    missing = [name for name in own if name not in its]
    if missing:
        raise ValueError(
            f"a teacher must know the classes of the network by name, got {teacher} without {', '.join(map(repr, missing[:3]))}; rename the classes "
            "in its config.json, or fine-tune it."
        )
    return [its.index(name) for name in own]
