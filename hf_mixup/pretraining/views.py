"""Two augmented views of every image, by the published augmentations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from hf_mixup.core.checks import check_known
from hf_mixup.core.rng import hashed
from hf_mixup.data.augment import OneByOne, Transform
from hf_mixup.data.processor import ImageFormat, Reordered, ResizedCrop


@dataclass(frozen=True)
class Style:
    """How views are made; pairs are for the first and the second view.

    Attributes:
        scale: smallest and largest share of the image in a crop.
        jitter: of brightness, contrast, saturation and hue; for 8 of 10 views.
        blur: probability of a Gaussian blur, of a deviation of 0.1 to 2 pixels.
        solarize: probability of inverting bright pixels.
        grey: probability of losing colour.
    """

    scale: tuple[float, float]
    jitter: tuple[float, float, float, float]
    blur: tuple[float, float] = (0.0, 0.0)
    solarize: tuple[float, float] = (0.0, 0.0)
    grey: float = 0.2


STYLES: dict[str, Style] = {
    "mocov2": Style((0.2, 1.0), (0.4, 0.4, 0.4, 0.1), blur=(0.5, 0.5)),
    "simclr": Style((0.08, 1.0), (0.8, 0.8, 0.8, 0.2), blur=(0.5, 0.5)),
    "byol": Style((0.08, 1.0), (0.4, 0.4, 0.2, 0.1), blur=(1.0, 0.1), solarize=(0.0, 0.2)),
    "mocov3": Style((0.2, 1.0), (0.4, 0.4, 0.2, 0.1), blur=(1.0, 0.1), solarize=(0.0, 0.2)),
    "cifar": Style((0.2, 1.0), (0.4, 0.4, 0.4, 0.1)),  # i-Mix's, without blur
    "unmix": Style((0.08, 1.0), (0.4, 0.4, 0.4, 0.1)),
}


@dataclass(frozen=True)
class Views:
    """Several transforms of the same images: the tail of a `Transform`, for an `ImageDataset`.

    What a view draws follows from the image's key and the number of the view, so from (seed, epoch, row, view).
    """

    tails: tuple[OneByOne, ...]

    def __call__(self, images: Sequence[Tensor], keys: Tensor) -> Tensor:
        """(B, views, C, H, W) float32 of uint8 images of any sizes."""
        return torch.stack([tail(images, hashed(keys, view)) for view, tail in enumerate(self.tails)], 1)


def view_transform(form: ImageFormat, style: str | Style = "mocov2", horizontal_flip: bool = True) -> Transform:
    """From an image to two views (2, C, H, W) as the network of `form` wants to see them.

    Args:
        style: a name of `STYLES`, or one of your own.
        horizontal_flip: mirror one half of the views.

    Raises:
        ValueError: for unknown styles, and for images that have no colours to change.
    """
    if isinstance(style, str):
        check_known("views", style, STYLES)
        style = STYLES[style]
    if form.channels not in (1, 3):
        raise ValueError(f"views need images of 1 or 3 channels, got {form.channels}; make transforms of your own for them.")
    tails = (
        OneByOne(v2.Compose(_steps(form, style, blur, solarize, horizontal_flip)))
        for blur, solarize in zip(style.blur, style.solarize, strict=True)
    )
    return Transform(v2.Identity(), Views(tuple(tails)), form.channels)


def _steps(form: ImageFormat, style: Style, blur: float, solarize: float, flip: bool) -> list[Callable]:
    steps: list[Callable] = [ResizedCrop(form.sides, style.scale, InterpolationMode(form.interpolation), form.squash)]
    steps += [v2.RandomHorizontalFlip()] if flip else []
    steps += [v2.RandomApply([v2.ColorJitter(*style.jitter)], 0.8), v2.RandomGrayscale(style.grey)]
    steps += [v2.RandomApply([v2.GaussianBlur(max(form.sides) // 10 | 1, (0.1, 2.0))], blur)] if blur else []  # 23 pixels at 224
    steps += [v2.RandomSolarize(128, solarize)] if solarize else []
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    steps += [] if form.order is None else [Reordered(form.order)]
    return [*steps, v2.Normalize(form.mean, form.std)]
