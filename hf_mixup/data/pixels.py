"""Reads an image of any kind into bytes with a given number of channels. No other code in hf_mixup converts images."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_RAW = {"RGBX": 4, "CMYK": 4}  # kept unchanged if the network takes that many channels
# modes with more than 8 bits for each channel, which `Image.convert` would clip
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def read_image(source: Any, channels: int = 3) -> Image.Image | Tensor:
    """Reads an image, upright, with 8 bits for each channel: mode L or RGB for 1 or 3 channels, else uint8 (channels, H, W).

    16-bit values are divided by 256, as Pillow does with 16-bit RGB. Floating-point values must be in [0, 1], and are multiplied by 255.
    32-bit integers must be from 0 to 255. Alpha is dropped if the number of channels does not include it, as in `transformers.pipeline`. The
    EXIF orientation is applied.

    Args:
        source: a path, a PIL image, or an array or tensor (H, W), (H, W, C) or (C, H, W).
        channels: number of channels that the network takes.

    Raises:
        ValueError: for values that do not fit into 8 bits, and for images whose number of channels cannot be converted.
        OSError: for files that cannot be read as an image.
    """
    if isinstance(source, (str, os.PathLike)):
        with Image.open(source) as opened:
            opened.load()
            return read_image(opened, channels)
    if not isinstance(source, Image.Image):
        return _of_array(source, channels)
    # without a copy if there is nothing to do
    image = ImageOps.exif_transpose(source) if source.getexif().get(ExifTags.Base.Orientation, 1) != 1 else source
    if image.mode in _DEEP:
        image = Image.fromarray(_bytes(np.asarray(image), f"an image of mode {image.mode}"))
    if _RAW.get(image.mode) != channels:
        if channels not in _MODES:
            raise ValueError(
                f"an image must have {channels} channels, got {len(image.getbands())} (mode {image.mode}); check the number of channels."
            )
        if channels == 4 and image.mode in _RAW:
            image = image.convert("RGB")
        image = image if image.mode == _MODES[channels] else image.convert(_MODES[channels])
    return image if channels in (1, 3) else torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _of_array(source: Any, channels: int) -> Image.Image | Tensor:
    array = np.asarray(source.cpu() if isinstance(source, Tensor) else source)
    if array.dtype == object or array.ndim not in (2, 3):
        raise ValueError(
            f"an image must be a PIL image, a path, or an array (H, W), (H, W, C) or (C, H, W), got {_told(source, array)}; check the image column."
        )
    if array.ndim == 2:
        array = array[..., None]
    # channels are the last axis, as in files, unless only the first axis can be channels
    if array.shape[-1] not in (1, channels) and array.shape[0] in (1, channels):
        array = np.moveaxis(array, 0, -1)
    array = _bytes(array, f"an array of {array.dtype}")
    if array.shape[-1] == 1 and channels == 3:
        array = np.repeat(array, 3, -1)
    if array.shape[-1] != channels:
        if array.shape[-1] == 3:  # colours, but another number of channels is needed
            return read_image(Image.fromarray(array), channels)
        raise ValueError(f"an image must have {channels} channels, got an array of shape {np.shape(source)}; pass --channels.")
    if channels in (1, 3):
        return Image.fromarray(array[..., 0] if channels == 1 else array)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0)))


def _told(source: Any, array: np.ndarray) -> str:
    return f"{type(source).__name__}" + (f" of shape {array.shape}" if array.dtype != object else "")


def _bytes(values: np.ndarray, what: str) -> np.ndarray:
    """The values as uint8 with the same brightness. Raises ValueError for values of an unknown range."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return (values >> 8).astype(np.uint8)
    floating = values.dtype.kind == "f"
    if not floating and values.dtype.kind not in "iu":
        raise ValueError(f"an image must hold numbers, got {what}; check the image column.")
    top = 1 if floating else 255
    if values.size and not (values.min() >= 0 and values.max() <= top):  # NaN too
        raise ValueError(
            f"{what} must hold values from 0 to {top}, got {values.min():g} to {values.max():g}; scale them, or save images of 8 or 16 bits."
        )
    return (values * 255.0).round().astype(np.uint8) if floating else values.astype(np.uint8)
