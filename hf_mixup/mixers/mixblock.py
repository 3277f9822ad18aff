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
    """A 1x1 convolution and a norm, which takes the place of the bias."""
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
    github.com/Westlake-AI/openmixup is the authors' code. With features a, b of the own and the partner image, which are
    told lam by `lam_input`: `mask = sigmoid(up(softmax(q(a)^T k(b) / sqrt(d)) v(b)))` is the share of the partner. Works in
    float32 whatever autocast says, as bfloat16 attention makes the masks blotchy.

    Deviations: the image gives the size of the mask (OpenMixup: a fixed scale factor; equal for whole factors), and masks
    are not searched for NaN, which costs three waits a call on a GPU; the loss would show it.

    Args:
        channels: of the features.
        reduction: the channels of queries and keys are `channels // reduction`.
        lam_input: how the block is told lam. `none` (AutoMix on CIFAR): not at all, the mask is free of lam; `concat` (AutoMix
            on larger sets): as one more channel; `concat_v`: the same for the values only; `multiply`: the features of either
            image are multiplied by its share; `multiply_residual` (SAMix): by 1 + its share.
        lam_mul_k: for the `multiply` kinds, the k of SAMix's curve (see `rescale_lam`), or several to choose from.
        value_neck: SAMix's values, a hidden layer of half the channels and ELU; else AutoMix's one convolution.
        value_norm: of the hidden layer, `bn`, `ln` or `none`.
        value_dropout: on the map of values, 0 to 1, with `value_neck`; 0.1 in SAMix on ImageNet.
        x_qk_concat: queries and keys see both images (SAMix), through a projection each; else they share one.
        x_v_concat: so do the values.
        attention_norm: of queries and keys, `none`, `bn` or `ln`.
        upsampling: `nearest` (AutoMix), `bilinear` (SAMix) or `bicubic`, or several to choose from.
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

        `upsampling` and `k` are the choice of this call, the first of the block's own where None. `others` (B, C, h, w) are the features
        that partners are taken from, where those are of other views.
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
        """The attention (B, hw, hw), of the own image's places over the partner's, and the values (B, 1, h, w)."""
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
    """One more, constant channel: `lam` (B, 1, 1, 1)."""
    return torch.cat([features, lam.expand(-1, 1, *features.shape[2:])], 1)


def attention_of(query: Tensor, key: Tensor) -> Tensor:
    """(B, d, h, w) queries and keys -> (B, hw, hw) softmax over the keys."""
    scores = query.flatten(2).mT @ key.flatten(2) / math.sqrt(query.shape[1])
    return scores.softmax(-1)


def upsample(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    return F.interpolate(x, size=size, mode=mode, align_corners=None if mode == "nearest" else False)


def two_shares(partner: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Scores of the partner (B, 1, h, w), before the sigmoid -> (B, 2, *size), summing to 1."""
    partner = upsample(partner, size, mode).sigmoid()
    return torch.cat([1 - partner, partner], 1)


# names in OpenMixup's checkpoints, where the block is `mix_block` or the first half of it, and ours
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
