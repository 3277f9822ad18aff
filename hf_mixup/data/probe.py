"""Measures what an image processor does. It calls the processor and never reads its fields, so it works for every class."""

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
    """The processor's output for an image of `read_image`: (C, H, W) float32. Raises ValueError if it is not an image."""
    channels = len(image) if isinstance(image, Tensor) else len(image.getbands())
    try:
        if is_timm(processor):
            # timm scales PIL images, but not tensors
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
            f"{tuple(pixels.shape) if isinstance(pixels, Tensor) else 'none'}; use a checkpoint whose network takes images."
        )
    return pixels.float()


@dataclass(frozen=True)
class Probe:
    """The measured properties of a processor.

    Attributes:
        size: (height, width) of every output; None if it depends on the image.
        mean, std: of the normalisation on pixels in [0, 1]: an output channel is (pixel - mean) / std.
        order: the image's channel in each output channel.
        squashes: the output shows the whole, or the same share, of both sides, whatever the aspect ratio.
        whole: before the normalisation, values are whole numbers from 0 to 255, so they fit into bytes.
    """

    size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    order: tuple[int, ...]
    squashes: bool
    whole: bool


def probe(processor: Any, channels: int = 3) -> Probe:
    """Measures a processor on plain colours, ramps and noise. Raises ValueError, with its name, if it does more than resizing and normalising."""
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
    """A processor's output as pixels (C, H, W) from 0 to 255, in the image's order of channels."""
    low, step = (255 * torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    pixels = given.mul(step).add_(low)
    return pixels if order == tuple(range(len(order))) else pixels[list(np.argsort(order))]


def _values(processor: Any, channels: int) -> tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...]]:
    def shown(colour: Tensor) -> Tensor:  # (C,), the middle of an image of one colour
        plain = colour.to(torch.uint8).numpy() * np.ones((64, 64, 1), np.uint8)
        given = processed(processor, read_image(plain, channels))
        return given[:, given.shape[1] // 2, given.shape[2] // 2].double()

    black = shown(torch.zeros(channels))
    gain = torch.stack([shown(255 * one) - black for one in torch.eye(channels)], 1)  # (output channel, image channel)
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
            f"{type(processor).__name__} must scale and shift each channel separately, got one that does more; "
            "use a checkpoint with another image processor."
        )
    # rounds to a short decimal if it equals the measured value in float32
    std = [_short(1 / float(one)) for one in scale]
    mean = [_short(-float(low) * one) if low else 0.0 for low, one in zip(black, std, strict=True)]
    return tuple(mean), tuple(std), tuple(order.tolist())


def _short(value: float) -> float:
    short = float(f"{value:.6g}")
    return short if abs(short - value) <= 3e-7 * abs(value) else value


def _squashes(processor: Any, channels: int, size: tuple[int, int], *values: tuple) -> bool:
    """Whether objects in a picture that is three times as wide as the output become three times narrower."""
    height, width = 240, round(3 * 240 * size[1] / size[0])
    steps = []
    for axis, side in enumerate((height, width)):
        line = np.linspace(0, 255, side).round().astype(np.uint8)
        ramp = np.broadcast_to(line[:, None] if axis == 0 else line[None], (height, width))
        given = pixels_of(processed(processor, read_image(np.repeat(ramp[..., None], channels, -1), channels)), *values)[0]
        middle, reach = size[axis] // 2, max(size[axis] // 8, 1)
        row = given[:, size[1] // 2] if axis == 0 else given[size[0] // 2]
        steps.append(float(row[middle + reach] - row[middle - reach]) / reach * side)  # image pixels for one output pixel
    return steps[1] > 1.7 * steps[0]
