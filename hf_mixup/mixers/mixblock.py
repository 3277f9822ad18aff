"""The Mix Block of AutoMix and SAMix."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_mixup.mixers.masks import check_mixer, choices, rescale_lam
from hf_mixup.mixers.mixer import Mixer


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of every pixel of (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def norm_layer(kind: str, channels: int) -> nn.Module:
    return {"none": nn.Identity, "bn": nn.BatchNorm2d, "ln": ChannelNorm}[kind](channels)


def projection(channels: int, out: int, norm: str) -> nn.Sequential:
    """A 1x1 convolution and a norm, which replaces the bias."""
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(channels, out, 1, bias=norm == "none"), norm=norm_layer(norm, out)))


def init_mixer(mixer: nn.Module) -> None:
    """Small weights: the sigmoid or softmax at the end starts near equal shares, so training starts near mixup."""
    for module in mixer.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class MixBlock(Mixer):
    """Mix Block: cross-attention between the features of two images gives the mask to mix them with.

    AutoMix (Liu et al., ECCV 2022, arXiv:2103.13027) and SAMix (Li et al., arXiv:2111.15454);
    github.com/Westlake-AI/openmixup is the authors' code. Features a, b of the own and the partner image, with lam added by `lam_input`, give
    `mask = sigmoid(up(softmax(q(a)^T k(b) / sqrt(d)) v(b)))`, the share of the partner. It computes in float32, also under autocast, because
    attention in bfloat16 makes the masks blotchy.

    Deviations:
    1. The mask has the size of the image (OpenMixup uses a fixed scale factor, which gives the same for whole factors).
    2. Masks are not checked for NaN, because that makes the host wait three times a call on a GPU. The loss would show a NaN.

    Args:
        channels: number of channels of the features.
        reduction: the channels of queries and keys are `channels // reduction`.
        lam_input: how the block gets lam. `none` (AutoMix on CIFAR): the mask does not depend on lam; `concat` (AutoMix
            on larger sets): as one more channel; `concat_v`: the same for the values only; `multiply`: the features of each
            image are multiplied by its share; `multiply_residual` (SAMix): by 1 + its share.
        lam_mul_k: for the `multiply` kinds, the k of SAMix's curve (see `rescale_lam`), or several, of which one is drawn.
        value_neck: use SAMix's values, a hidden layer of half the channels and ELU, instead of AutoMix's one convolution.
        value_norm: of the hidden layer, `bn`, `ln` or `none`.
        value_dropout: dropout of the map of values, 0 to 1, with `value_neck`; 0.1 in SAMix on ImageNet.
        x_qk_concat: queries and keys see both images (SAMix), each by its own projection; otherwise they share one.
        x_v_concat: values see both images too.
        attention_norm: of queries and keys, `none`, `bn` or `ln`.
        upsampling: `nearest` (AutoMix), `bilinear` (SAMix) or `bicubic`, or several, of which one is drawn.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 2,
        lam_input: str = "concat",
        lam_mul_k: float | Sequence[float] = -1.0,
        value_neck: bool = False,
        value_norm: str = "bn",
        value_dropout: float = 0.0,
        x_qk_concat: bool = False,
        x_v_concat: bool = False,
        attention_norm: str = "none",
        upsampling: str | Sequence[str] = "nearest",
    ):
        super().__init__()
        check_mixer(
            reduction=reduction,
            attention_norm=attention_norm,
            upsampling=upsampling,
            lam_input=lam_input,
            lam_mul_k=lam_mul_k,
            value_norm=value_norm,
            value_dropout=value_dropout,
            x_qk_concat=x_qk_concat,
        )
        self.channels, self.lam_input = channels, lam_input
        self.lam_mul_ks, self.upsamplings = choices(lam_mul_k), choices(upsampling)
        self.x_qk_concat, self.x_v_concat = x_qk_concat, x_v_concat
        told = channels + (lam_input == "concat")
        inner = max(channels // reduction, 1)
        self.query = projection(told * (2 if x_qk_concat else 1), inner, attention_norm)
        self.key = projection(told * 2, inner, attention_norm) if x_qk_concat else None
        values = channels + 1 if lam_input == "concat_v" else told * (2 if x_v_concat else 1)
        if value_neck:
            hidden = max(channels // 2, 1)
            self.value = nn.Sequential(
                OrderedDict(
                    hidden=nn.Conv2d(values, hidden, 1, bias=value_norm == "none"),
                    norm=norm_layer(value_norm, hidden),
                    act=nn.ELU(),
                    out=nn.Conv2d(hidden, 1, 1, bias=False),
                    drop=nn.Dropout(value_dropout),
                )
            )
        else:
            self.value = nn.Conv2d(values, 1, 1)
        init_mixer(self)

    def forward(
        self,
        features: Tensor,
        index: Tensor,
        weight: Tensor,
        size: tuple[int, int],
        upsampling: str | None = None,
        k: float | None = None,
        others: Tensor | None = None,
    ) -> Tensor:
        """`features` (B, C, h, w); `index` (B, 2) int64 and `weight` (B, 2) as in a MixPlan -> masks (B, 2, *size) float32.

        `upsampling` and `k` are the values for this call; None takes the block's first. `others` (B, C, h, w) are the features of the partners, if
        they come from other views.
        """
        with torch.autocast(features.device.type, enabled=False):
            attention, value = self.attend(
                features.float(),
                index[:, 1],
                weight[:, 0],
                self.lam_mul_ks[0] if k is None else k,
                None if others is None else others.float(),
            )
            share = (attention @ value.flatten(1)[:, :, None]).view_as(value)  # (B, 1, h, w)
            return two_shares(share, size, upsampling or self.upsamplings[0])

    def attend(self, features: Tensor, partner: Tensor, lam: Tensor, k: float, others: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The attention (B, hw, hw) of the own image's places to the partner's, and the values (B, 1, h, w)."""
        lam = lam.to(features)[:, None, None, None]
        own, other = features, (features if others is None else others)[partner]
        if self.lam_input.startswith("multiply"):
            base, told = float(self.lam_input.endswith("residual")), rescale_lam(lam, k)
            own, other = own * (base + told), other * (base + 1 - told)
        elif self.lam_input == "concat":
            own, other = with_channel(own, lam), with_channel(other, 1 - lam)
        if self.lam_input == "concat_v":
            value = self.value(with_channel(other, 1 - lam))
        else:
            value = self.value(torch.cat([own, other], 1) if self.x_v_concat else other)
        if self.key is None:
            query, key = self.query(own), self.query(other)
        else:
            both = torch.cat([own, other], 1)
            query, key = self.query(both), self.key(both)
        return attention_of(query, key), value


def with_channel(features: Tensor, lam: Tensor) -> Tensor:
    """Adds one constant channel, `lam` (B, 1, 1, 1)."""
    return torch.cat([features, lam.expand(-1, 1, *features.shape[2:])], 1)


def attention_of(query: Tensor, key: Tensor) -> Tensor:
    """Attention of queries and keys (B, d, h, w): (B, hw, hw), a softmax over the keys."""
    scores = query.flatten(2).mT @ key.flatten(2) / math.sqrt(query.shape[1])
    return scores.softmax(-1)


def upsample(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    return F.interpolate(x, size=size, mode=mode, align_corners=None if mode == "nearest" else False)


def two_shares(partner: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Masks (B, 2, *size), summing to 1, from the partner's scores (B, 1, h, w) before the sigmoid."""
    partner = upsample(partner, size, mode).sigmoid()
    return torch.cat([1 - partner, partner], 1)


# (name in OpenMixup's checkpoints, our name); there the block is `mix_block`, or the first half of it
OPENMIXUP_NAMES = (
    (r"^mix_block\.", ""),
    (r"^value\.conv\.0\.conv\.", "value.hidden."),
    (r"^value\.conv\.0\.(bn|ln)\.", "value.norm."),
    (r"^value\.conv\.1\.conv\.", "value.out."),
    (r"^(query|key)\.(bn|ln)\.", r"\1.norm."),
)


def from_openmixup(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of OpenMixup's `PixelMixBlock` under our names."""
    return {renamed(name, OPENMIXUP_NAMES): value for name, value in state.items()}


def renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, ours in table:
        name = re.sub(pattern, ours, name)
    return name
