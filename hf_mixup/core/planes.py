"""Any input as planes (B, C, H, W), the one form that plans and masks know."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def plane_shape(shape: torch.Size) -> torch.Size:
    """(B, C, H, W) of any input (B, ...); see `planes`."""
    batch, *own = shape
    *lead, height, width = [1] * (2 - len(own)) + own
    return torch.Size((batch, math.prod(lead), height, width))


def planes(inputs: Tensor) -> Tensor:
    """Any input (B, ...) as (B, C, H, W), without a copy if its memory layout allows it.

    - images (B, C, H, W): themselves
    - a waveform (B, T): (B, 1, 1, T)
    - a spectrogram (B, T, F) of time and frequency: (B, 1, T, F)
    - a video (B, T, C, H, W), a volume (B, C, D, H, W): (B, T * C, H, W), so all frames or slices share one mask
    """
    return inputs if inputs.ndim == 4 else inputs.reshape(plane_shape(inputs.shape))


def frames_of(shape: torch.Size) -> int | None:
    """T of videos (B, T, C, H, W) with 1 to 4 channels; None for all other inputs, volumes (B, C, D, H, W) among them."""
    return shape[1] if len(shape) == 5 and shape[2] <= 4 else None
