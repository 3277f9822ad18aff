"""Transforms of whole batches of pixels, on any device, by keys: random crop and flip, normalisation, random erasing."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hf_mixup.core.rng import hashed, hashed_integers

# hashes of a key from this number on are for erasing; crops and flips use the first ones
_ERASED, _NOISE = 8, 64


@dataclass(frozen=True)
class Augmentation:
    """Random crop, flip, normalisation and random erasing of a batch, on any device.

    Attributes:
        mean, std: of the normalisation, applied to bytes times `scale`.
        padding: pixels that are added on each side before the crop to the old size.
        reflect: added pixels are mirrored; otherwise they are black.
        flip: flip half of the images horizontally.
        order: the image's channel in each output channel, such as (2, 1, 0) for BGR; None keeps the order.
        scale: factor of the bytes before the normalisation.
        erasing: probability that, as the last step, a rectangle of an image becomes noise.
        noise_mean, noise_std: of that noise, one value for each output channel; 0 and 1 if None.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 0
    reflect: bool = False
    flip: bool = False
    order: tuple[int, ...] | None = None
    scale: float = 1 / 255
    erasing: float = 0.0
    noise_mean: tuple[float, ...] | None = None
    noise_std: tuple[float, ...] | None = None

    def __call__(self, images: Tensor | Sequence[Tensor], keys: Tensor | None = None) -> Tensor:
        """Turns images (B, C, H, W) uint8 into float32. The draws of an image depend only on its key; `keys` are (B,) int64."""
        images = self.normalised(self.moved(images, keys))
        return self._erased(images, keys) if self.erasing else images

    @property
    def draws(self) -> bool:
        """Whether keys are needed."""
        return bool(self.padding or self.flip or self.erasing)

    @property
    def still(self) -> Augmentation:
        """The normalisation alone."""
        return replace(self, padding=0, flip=False, erasing=0.0)

    def moved(self, images: Tensor | Sequence[Tensor], keys: Tensor | None) -> Tensor:
        """(B, C, H, W), cropped and flipped, in the same dtype."""
        images = images if isinstance(images, Tensor) else torch.stack(images)
        return self._moved(images, keys) if self.padding or self.flip else images

    def normalised(self, images: Tensor) -> Tensor:
        """Normalises pixels from 0 to 255: (..., C, H, W) float32."""
        mean, std = (_per_channel(values, images.device) for values in (self.mean, self.std))
        images = images if self.order is None else images[..., list(self.order), :, :]
        # new memory, even for float32 images, because they may belong to a cache
        made = torch.empty(images.shape, dtype=torch.float32, device=images.device)
        for part, out in zip(_in_cache(images), _in_cache(made), strict=True):
            out.copy_(part).mul_(self.scale).sub_(mean).div_(std)
        return made

    def pixels(self, images: Tensor) -> Tensor:
        """(..., C, H, W) uint8: inverse of `normalised`, rounded."""
        mean, std = (_per_channel(values, images.device) for values in (self.mean, self.std))
        made = (images * std).add_(mean).mul_(1 / self.scale).round_().clamp_(0, 255).to(torch.uint8)
        return made if self.order is None else made[..., np.argsort(self.order).tolist(), :, :]

    def _moved(self, images: Tensor, keys: Tensor) -> Tensor:
        height, width = images.shape[2:]
        # the source row of each row y and the source column of each column x, (B, H) and (B, W)
        y, x = (torch.arange(side, device=images.device).expand(len(images), -1) for side in (height, width))
        if self.flip:
            x = torch.where(hashed_integers(keys, 2, 2)[:, None] == 1, width - 1 - x, x)
        y, x = (axis + (hashed_integers(keys, draw, 2 * self.padding + 1) - self.padding)[:, None] for draw, axis in enumerate((y, x)))
        if self.reflect:
            y, x = (last - (last - axis.abs()).abs() for axis, last in ((y, height - 1), (x, width - 1)))
        from_y, from_x = y.clamp(0, height - 1), x.clamp(0, width - 1)
        source = (from_y[:, :, None] * width + from_x[:, None, :]).flatten(1)[:, None]
        moved = images.flatten(2).gather(2, source.expand(-1, images.shape[1], -1)).view_as(images)
        inside = (y == from_y)[:, :, None] & (x == from_x)[:, None, :]
        return moved * inside[:, None]

    def _erased(self, images: Tensor, keys: Tensor) -> Tensor:
        """Writes noise into `images`, and returns them."""
        channels, height, width = images.shape[1:]
        chosen, edges = erased_boxes(keys, height, width, self.erasing)
        mean, std = (
            _per_channel(values or (default,) * channels, images.device)
            for values, default in ((self.noise_mean, 0.0), (self.noise_std, 1.0))
        )
        places = torch.arange(channels * height * width, device=images.device).view(channels, height, width)
        if images.device.type == "cpu":  # on the CPU only the erased pixels are indexed, because that does not wait
            for row in chosen.nonzero().flatten().tolist():
                top, bottom, left, right = edges[row].tolist()
                images[row, :, top:bottom, left:right] = _noise(keys[row], places[:, top:bottom, left:right]).mul_(std).add_(mean)
            return images
        rows, cols = (torch.arange(side, device=images.device) for side in (height, width))
        top, bottom, left, right = edges[:, :, None].unbind(1)
        inside = ((rows >= top) & (rows < bottom))[:, :, None] & ((cols >= left) & (cols < right))[:, None]
        noise = _noise(keys[:, None, None, None], places).mul_(std).add_(mean)
        return torch.where((inside & chosen[:, None, None])[:, None], noise, images)


def erased_boxes(keys: Tensor, height: int, width: int, probability: float) -> tuple[Tensor, Tensor]:
    """Which images are erased, (B,) bool, and their rectangles (B, 4) int64, `[top, bottom, left, right]`.

    Random erasing (Zhong et al., AAAI 2020, arXiv:1708.04896) with timm's settings: an area of 0.02 to 1/3, an aspect ratio of
    0.3 to 1/0.3, and ten attempts to find a rectangle smaller than the image.
    """
    tries = torch.arange(10, device=keys.device)
    area, aspect, y, x = (_uniform(hashed(keys, _ERASED + 1 + draw)[:, None] + tries, 0) for draw in range(4))
    area = (0.02 + (1 / 3 - 0.02) * area) * (height * width)
    aspect = ((2 * aspect - 1) * math.log(1 / 0.3)).exp()
    h, w = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (h < height) & (w < width)
    first = fits.long().argmax(1, keepdim=True)
    top, left = ((share * (side - length + 1)).long() for share, side, length in ((y, height, h), (x, width, w)))
    edges = torch.cat([edge.gather(1, first) for edge in (top, top + h, left, left + w)], 1)
    return (_uniform(keys, _ERASED) < probability) & fits.any(1), edges


def _uniform(keys: Tensor, draw: int) -> Tensor:
    """float64, in [0, 1)."""
    return ((hashed(keys, draw) >> 11) & (2**53 - 1)).double() * 2.0**-53


def _noise(keys: Tensor, places: Tensor) -> Tensor:
    """Standard normal noise, float32, for places of an image with this key. It is the same on every device, up to rounding."""
    bits = hashed(hashed(keys, _NOISE) + places, 0)
    # Box and Muller's transform of two halves
    radius = ((((bits >> 40) & (2**24 - 1)) + 1).float() * 2.0**-24).log_().mul_(-2).sqrt_()
    return ((bits & (2**24 - 1)).float() * (2.0**-24 * 2 * math.pi)).cos_().mul_(radius)


def _in_cache(images: Tensor) -> Sequence[Tensor]:
    """Parts of a batch. On the CPU they are small enough to stay in its cache."""
    if images.device.type != "cpu" or images.ndim < 4 or not images.numel():
        return [images]
    return images.split(max(1, 2**18 // images[0].numel()))


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The values as a tensor. Cached, because a copy in every batch would make the host wait for the accelerator."""
    return torch.tensor(values, device=device).view(-1, 1, 1)
