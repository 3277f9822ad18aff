"""What an image processor does, measured: it is called, never read, so that every class and every field of it is followed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_mixup.data.pixels import read_image


def is_timm(processor: Any) -> bool:
    return hasattr(processor, "data_config")


def processed(processor: Any, image: Image.Image | Tensor) -> Tensor:
    """(C, H, W) float32: what the processor gives for an image as `read_image` returns it. Raises ValueError where that is no image."""
    channels = len(image) if isinstance(image, Tensor) else len(image.getbands())
    try:
        if is_timm(processor):
            # timm scales PIL images, and leaves tensors as they are
            pixels = processor.val_transforms(image.float() / 255 if isinstance(image, Tensor) else image)
        elif channels == 3:
            pixels = processor(images=image, return_tensors="pt").get("pixel_values")
        else:
            axes = {"input_data_format": "channels_first"} if isinstance(image, Tensor) else {}
            pixels = processor(images=image, return_tensors="pt", do_convert_rgb=False, **axes).get("pixel_values")
    except Exception as error:
        raise ValueError(
            f"{type(processor).__name__} must be able to process images of {channels} channels, got {type(error).__name__} "
            f"({' '.join(str(error).split())[:200]}); check preprocessor_config.json."
        ) from None
    if isinstance(pixels, Tensor) and pixels.ndim == 4 and len(pixels) == 1:
        pixels = pixels[0]
    if not isinstance(pixels, Tensor) or pixels.ndim != 3:
        raise ValueError(
            f"{type(processor).__name__} must give pixel_values (1, C, H, W), got "
            f"{tuple(pixels.shape) if isinstance(pixels, Tensor) else 'none'}; take a checkpoint whose network looks at images."
        )
    return pixels.float()


@dataclass(frozen=True)
class Probe:
    """What a processor makes of images.

    Attributes:
        size: (height, width) of every image it gives; None where that depends on the image.
        mean, std: on pixels in [0, 1]: a channel is given as (pixel - mean) / std.
        order: the channel of the image that each channel given shows.
        squashes: images of any aspect ratio come out with the whole, or the same share, of both sides.
        whole: what it gives are whole numbers from 0 to 255 before the normalisation, so bytes hold them.
    """

    size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    order: tuple[int, ...]
    squashes: bool
    whole: bool


def probe(processor: Any, channels: int = 3) -> Probe:
    """Shows a processor plain colours, ramps and noise. Raises ValueError, with its name, for one that cannot be followed."""
    mean, std, order = _values(processor, channels)
    sizes, pixels = [], []
    for height, width in ((240, 240), (200, 320), (320, 200), (9, 7)):
        noise = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
        given = processed(processor, read_image(noise, channels))
        sizes.append(tuple(given.shape[1:]))
        pixels.append(pixels_of(given, mean, std, order))
    size = sizes[0] if len(set(sizes)) == 1 else None
    squashes = size is not None and _squashes(processor, channels, size, mean, std, order)
    whole = all(bool((image - image.round()).abs().max() < 1e-2) for image in pixels)
    return Probe(size, mean, std, order, squashes, whole)


def pixels_of(given: Tensor, mean: tuple[float, ...], std: tuple[float, ...], order: tuple[int, ...]) -> Tensor:
    """(C, H, W) of 0 to 255, in the image's order of channels, of what a processor gave."""
    low, step = (255 * torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    pixels = given.mul(step).add_(low)
    return pixels if order == tuple(range(len(order))) else pixels[list(np.argsort(order))]


def _values(processor: Any, channels: int) -> tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...]]:
    def shown(colour: Tensor) -> Tensor:  # (C,), the middle of an image of one colour
        plain = colour.to(torch.uint8).numpy() * np.ones((64, 64, 1), np.uint8)
        given = processed(processor, read_image(plain, channels))
        return given[:, given.shape[1] // 2, given.shape[2] // 2].double()

    black = shown(torch.zeros(channels))
    gain = torch.stack([shown(255 * one) - black for one in torch.eye(channels)], 1)  # (given, of the image)
    if len(black) != channels:
        raise ValueError(
            f"{type(processor).__name__} must give as many channels as the image has, got {len(black)} of {channels}; "
            f"give image_mean and image_std {channels} values each."
        )
    order = gain.abs().argmax(1)
    scale = gain.gather(1, order[:, None])[:, 0]
    other = torch.linspace(40, 200, channels).round()
    expected = scale * other[order] / 255 + black
    if len(set(order.tolist())) < channels or bool((scale == 0).any()) or not torch.allclose(shown(other), expected, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{type(processor).__name__} must scale and shift each channel by itself, got one that does more; "
            "take a checkpoint with another image processor."
        )
    # a short decimal is what was meant, where it is within float32 of what was measured
    std = [_short(1 / float(one)) for one in scale]
    mean = [_short(-float(low) * one) if low else 0.0 for low, one in zip(black, std, strict=True)]
    return tuple(mean), tuple(std), tuple(order.tolist())


def _short(value: float) -> float:
    short = float(f"{value:.6g}")
    return short if abs(short - value) <= 3e-7 * abs(value) else value


def _squashes(processor: Any, channels: int, size: tuple[int, int], *values: tuple) -> bool:
    """Whether objects of a picture three times as wide as what is given become three times as narrow."""
    height, width = 240, round(3 * 240 * size[1] / size[0])
    steps = []
    for axis, side in enumerate((height, width)):
        line = np.linspace(0, 255, side).round().astype(np.uint8)
        ramp = np.broadcast_to(line[:, None] if axis == 0 else line[None], (height, width))
        given = pixels_of(processed(processor, read_image(np.repeat(ramp[..., None], channels, -1), channels)), *values)[0]
        middle, reach = size[axis] // 2, max(size[axis] // 8, 1)
        row = given[:, size[1] // 2] if axis == 0 else given[size[0] // 2]
        steps.append(float(row[middle + reach] - row[middle - reach]) / reach * side)  # of the image, for one of what is given
    return steps[1] > 1.7 * steps[0]
