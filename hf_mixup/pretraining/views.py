"""Two augmented views of every image, by the published augmentations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import PIL.Image
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from hf_mixup.core.checks import check_known
from hf_mixup.core.rng import hashed
from hf_mixup.data.augment import OneByOne, Transform
from hf_mixup.data.processor import ImageFormat, ResizedCrop


@dataclass(frozen=True)
class Style:
    """Settings of the views; pairs are for the first and the second view.

    Attributes:
        scale: smallest and largest share of the image in a crop.
        jitter: strength of changes of brightness, contrast, saturation and hue, in 8 of 10 views.
        blur: probability of a Gaussian blur with a deviation of 0.1 to 2 pixels.
        solarize: probability of inverting bright pixels.
        grey: probability of a grey view.
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
    """Several transforms of the same images: `Transform.each`, for an `ImageDataset`.

    The draws of a view depend on the image's key and the index of the view, so on (seed, epoch, row, view).

    Attributes:
        style: of the views, for the card.
    """

    views: tuple[OneByOne, ...]
    style: str | Style

    def __call__(self, images: Sequence[PIL.Image.Image | Tensor], keys: Tensor) -> list[Tensor]:
        """(views, C, H, W) uint8 for each image, of any size."""
        made = [view(images, hashed(keys, number)) for number, view in enumerate(self.views)]
        return [torch.stack(of_one) for of_one in zip(*made, strict=True)]


def view_transform(form: ImageFormat, style: str | Style = "mocov2", horizontal_flip: bool = True) -> Transform:
    """The transform from an image to two views (2, C, H, W) in the format `form`.

    Args:
        style: a name of `STYLES`, or your own `Style`.
        horizontal_flip: flip half of the views.

    Raises:
        ValueError: for unknown styles, and for images with other than 1 or 3 channels.
    """
    named = style
    if isinstance(style, str):
        check_known("views", style, STYLES)
        style = STYLES[style]
    if form.channels not in (1, 3):
        raise ValueError(f"views need images of 1 or 3 channels, got {form.channels}; write your own transform for them.")
    views = (
        OneByOne(v2.Compose(_steps(form, style, blur, solarize, horizontal_flip)))
        for blur, solarize in zip(style.blur, style.solarize, strict=True)
    )
    return Transform(v2.Identity(), form.normalisation(), form.channels, Views(tuple(views), named))


def _steps(form: ImageFormat, style: Style, blur: float, solarize: float, flip: bool) -> list[Callable]:
    steps: list[Callable] = [ResizedCrop(form.sides, style.scale, InterpolationMode(form.interpolation), form.squash)]
    steps += [v2.RandomHorizontalFlip()] if flip else []
    steps += [v2.RandomApply([v2.ColorJitter(*style.jitter)], 0.8), v2.RandomGrayscale(style.grey)]
    steps += [v2.RandomApply([v2.GaussianBlur(max(form.sides) // 10 | 1, (0.1, 2.0))], blur)] if blur else []  # 23 pixels at 224
    return [*steps, *([v2.RandomSolarize(128, solarize)] if solarize else [])]
