"""Arithmetic on masks (B, K, H, W) and lam (B,), without learned weights, and the names of mixers' options.

A file of its own, because mixers need the Hub's client, which is slow to import.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_mixup.core.checks import check_between, check_count, check_known

MASK_LOSSES = ("L1", "L1+Variance", "L2+Variance", "Sparsity")
UPSAMPLING = ("nearest", "bilinear", "bicubic")
LAM_INPUTS = ("none", "concat", "concat_v", "multiply", "multiply_residual")
NORMS = ("none", "bn", "ln")


def rescale_lam(lam: Tensor, k: float) -> Tensor:
    """SAMix's curve R (arXiv:2111.15454) for the lam that a mixer gets. A negative `k` leaves lam unchanged.

    `R(l) = (4/3 l^3 - 2 l^2 + (k + 1) l) / (k + 1/3)` maps 0, 1/2 and 1 to themselves. A small k is flat around 1/2, a large one is nearly
    straight; values above 10 count as 10.
    """
    if k < 0:
        return lam
    slope = min(k, 10) + 1
    return (4 / 3 * lam**3 - 2 * lam**2 + slope * lam) / (slope - 2 / 3)


def mask_loss(mask: Tensor, lam: Tensor, kind: str, margin: float, *, per_sample: bool = False) -> Tensor:
    """How far the area of masks (B, 2, H, W) is from lam (B,), minus a margin. A scalar; a variance term can make it negative.

    `kind`: `L1` `max(|area - lam| - margin, 0)`; `L1+Variance` the same minus twice the variance of the mask over the pixels;
    `L2+Variance` with `(area - lam)^2` and `margin^2`; `Sparsity` `max(mean |m (1 - m)| - margin, 0)`, independent of lam.
    Area and variance are those of the whole batch, as in OpenMixup, which has one lam for all. `per_sample` computes
    them image by image.
    """
    partner = mask[:, 1].flatten(1) if per_sample else mask[:, 1].flatten()[None]
    lam = lam if per_sample else lam.mean()
    if kind == "Sparsity":
        return ((partner * (partner - 1)).abs().mean(1) - margin).clamp(min=0).mean()
    area = partner.mean(1)
    distance = (1 - area - lam).abs()
    short = (distance - margin).clamp(min=0) if kind.startswith("L1") else (distance**2 - margin**2).clamp(min=0)
    variance = (partner - area[:, None]).square().mean(1) if kind.endswith("Variance") else torch.zeros_like(area)
    return (short - 2 * variance).mean()


def adjust_mask(mask: Tensor, lam: Tensor) -> Tensor:
    """Scales masks (B, 2, H, W) so that the own area of every image is lam (B,): the larger of the two shares is scaled down."""
    area = mask[:, 0].mean((1, 2)).clamp(1e-8, 1 - 1e-8)[:, None, None]
    lam = lam[:, None, None]
    own = mask[:, 0]
    too_much, too_little = own * (lam / area), 1 - mask[:, 1] * ((1 - lam) / (1 - area))
    own = torch.where(area > lam + 1e-8, too_much, torch.where(area < lam - 1e-8, too_little, own))
    return torch.stack([own, 1 - own], 1)


def choices(value: Any) -> tuple:
    """One value, or several options, as a tuple."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)


def check_mixer(
    *,
    reduction: int,
    attention_norm: str,
    upsampling: str | Sequence[str],
    lam_input: str = "none",
    lam_mul_k: float | Sequence[float] = -1.0,
    value_norm: str = "bn",
    value_dropout: float = 0.0,
    x_qk_concat: bool = False,
) -> None:
    """Raises ValueError for settings that no mixer has."""
    check_count(1, reduction=reduction)
    check_known("attention_norm", attention_norm, NORMS)
    for mode in choices(upsampling):
        check_known("upsampling", mode, UPSAMPLING)
    check_known("lam_input", lam_input, LAM_INPUTS)
    for k in choices(lam_mul_k):
        check_between(-1, 1e6, lam_mul_k=k)
    check_known("value_norm", value_norm, NORMS)
    check_between(0, 1, value_dropout=value_dropout)
    if x_qk_concat and lam_input == "concat":
        raise ValueError("x_qk_concat cannot be used with lam_input 'concat', got both; set lam_input='multiply_residual', as SAMix does.")
