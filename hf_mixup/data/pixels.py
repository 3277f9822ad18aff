"""Reads an image of any kind into bytes with a given number of channels. No other code in hf_mixup converts images."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_RAW = {"RGBX": 4, "CMYK": 4}  # kept unchanged if the network takes that many channels
# modes with more than 8 bits for each channel, which `Image.convert` would clip
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def read_image(source: Any, channels: int = 3) -> Image.Image | Tensor:
    """Reads an image, upright, with 8 bits for each channel: mode L or RGB for 1 or 3 channels, else uint8 (channels, H, W).

    16-bit values are divided by 256, as Pillow does with 16-bit RGB, and 12-bit values by 16. Floating-point values must be in [0, 1], and are
    multiplied by 255. 32-bit integers must be from 0 to 255. Alpha is dropped if the number of channels does not include it, as in
    `transformers.pipeline`. The EXIF orientation is applied.

    Args:
        source: a path, the bytes of a file, a PIL image, or an array or tensor (H, W), (H, W, C) or (C, H, W). A copy of a PIL image does not
            know any more that its file has 12 bits, or that its 0 is white.
        channels: number of channels that the network takes.

    Raises:
        ValueError: for values that do not fit into 8 bits, and for images whose number of channels cannot be converted.
        OSError: for files that cannot be read as an image.
    """
    if isinstance(source, (str, os.PathLike)):
        source = Path(source).read_bytes()
    if isinstance(source, bytes):
        source = Image.open(BytesIO(source))
    if not isinstance(source, Image.Image):
        return _of_array(source, channels)
    source.load()
    # without a copy if there is nothing to do
    image = ImageOps.exif_transpose(source) if source.getexif().get(ExifTags.Base.Orientation, 1) != 1 else source
    _check_counted(source)
    if image.mode in _DEEP:
        image = Image.fromarray(_grey(np.asarray(image), source))
    if _RAW.get(image.mode) != channels:
        if channels not in _MODES:
            raise ValueError(
                f"an image must have {channels} channels, got {len(image.getbands())} (mode {image.mode}); check the number of channels."
            )
        if channels == 4 and image.mode in _RAW:
            image = image.convert("RGB")
        image = image if image.mode == _MODES[channels] else image.convert(_MODES[channels])
    return image if channels in (1, 3) else torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _check_counted(file: Image.Image) -> None:
    """Refuses files whose numbers Pillow reads wrongly."""
    signed = getattr(file, "tag_v2", {}).get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] == 2 and file.mode not in _DEEP
    if signed or (file.format == "FITS" and file.mode in _DEEP):
        held = "signed numbers of 8 bits" if signed else f"FITS of mode {file.mode}, whose zero and scale Pillow ignores"
        raise ValueError(f"an image must hold numbers from 0 up, got {held}; save it as PNG or as unsigned TIFF.")


def _grey(values: np.ndarray, file: Image.Image) -> np.ndarray:
    """uint8 of an image with more bits. `file`: the opened file, whose tags say how its numbers count."""
    tags = getattr(file, "tag_v2", {})
    if file.format == "PPM" and file.mode == "I":  # which Pillow has scaled to 16 bits
        values = values.astype(np.uint16)
    if tags.get(TiffImagePlugin.BITSPERSAMPLE) == (12,):
        values = values << 4
    grey = _bytes(values, f"an image of mode {file.mode}")
    return 255 - grey if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0 else grey  # white is 0


@dataclass(frozen=True)
class Photograph:
    """A large JPEG file that is not decoded yet. If a part of it becomes small, it is decoded at 1/2, 1/4 or 1/8 of its sides, which takes less time.

    The decoded part has at least twice the wanted sides, by the rule of Pillow's `thumbnail`. So the result differs from that of the whole file by
    less than bilinear differs from bicubic.

    Attributes:
        file: its bytes.
        size: (width, height), upright.
        orientation: of EXIF, 1 to 8.
        channels: 1 or 3, of what is decoded.
        unreadable: function from the error of a file that cannot be decoded to the error to raise.
    """

    file: bytes
    size: tuple[int, int]
    orientation: int
    channels: int
    unreadable: Callable[[Exception], Exception]

    @classmethod
    def of(cls, file: Any, channels: int, sides: tuple[int, int], unreadable: Callable[[Exception], Exception]) -> Photograph | None:
        """From the bytes of a file. None if no part could be decoded at a smaller scale for `sides`, (height, width)."""
        if not isinstance(file, bytes):
            return None
        image = Image.open(BytesIO(file))
        if not isinstance(image, JpegImageFile) or image.mode not in ("L", "RGB") or channels not in (1, 3):
            return None
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        size = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
        return cls(file, size, orientation, channels, unreadable) if _shrinks(*size, sides) > 1 else None

    def resized_crop(self, top: int, left: int, height: int, width: int, sides: tuple[int, int], resample: int) -> Image.Image:
        """The part of these pixels, resized to `sides` by a filter of Pillow."""
        try:
            image, scale = Image.open(BytesIO(self.file)), _shrinks(width, height, sides)
            if scale > 1 and image.draft(None, (image.width // scale, image.height // scale)) is None:
                scale = 1
            image = read_image(image, self.channels)
        except Exception as error:
            raise self.unreadable(error) from None
        # where `scale` does not divide a side, the decoded one is a part of a pixel longer at its end, which is at its start once it is turned
        x = image.width - self.size[0] / scale if self.orientation in (2, 3, 6, 7) else 0
        y = image.height - self.size[1] / scale if self.orientation in (3, 4, 7, 8) else 0
        box = left / scale + x, top / scale + y, (left + width) / scale + x, (top + height) / scale + y
        # cut out first, because a filter must not see what lies outside
        first_x, first_y = math.floor(box[0]), math.floor(box[1])
        part = image.crop((first_x, first_y, math.ceil(box[2]), math.ceil(box[3])))
        return part.resize(sides[::-1], resample, box=(box[0] - first_x, box[1] - first_y, box[2] - first_x, box[3] - first_y))


def _shrinks(width: int, height: int, sides: tuple[int, int]) -> int:
    """By how much a part is decoded smaller if it is resized to `sides`, (height, width)."""
    return next((scale for scale in (8, 4, 2) if min(width / sides[1], height / sides[0]) >= 2 * scale), 1)


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
