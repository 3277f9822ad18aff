"""The mask generator of AdAutoMix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_mixup.mixers.masks import check_mixer, choices
from hf_mixup.mixers.mixblock import attention_of, init_mixer, projection, renamed, upsample, with_channel
from hf_mixup.mixers.mixer import Mixer


class AdaptiveMask(Mixer):
    """AdAutoMix's generator (Qin et al., ICLR 2024, arXiv:2312.11954; github.com/JinXins/Adversarial-AutoMixup): for any number of images.

    Every image attends to the sum of the others, `s_i = softmax(q_i sum_{j != i} k_j^T / sqrt(d)) v_i`. The masks are a softmax over the images
    of `up(s_i)`. As in the authors' code, queries and keys end in a ReLU, and the values are the image's own, although the columns of the
    attention are places of the others. It computes in float32, also under autocast.

    Deviation: the masks have the size of the image (the authors use a fixed scale factor, which gives the same for whole factors).

    Args:
        channels: number of channels of the features.
        reduction: the channels of queries and keys are `channels // reduction`.
        lam_concat: whether the generator gets every image's share as one more channel.
        attention_norm: of queries and keys, `none`, `bn` or `ln`.
        upsampling: `nearest`, `bilinear` or `bicubic`, or several, of which one is drawn.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 2,
        lam_concat: bool = False,
        attention_norm: str = "none",
        upsampling: str | Sequence[str] = "bilinear",
    ):
        super().__init__()
        check_mixer(reduction=reduction, attention_norm=attention_norm, upsampling=upsampling)
        self.channels, self.lam_concat, self.upsamplings = channels, lam_concat, choices(upsampling)
        told, inner = channels + lam_concat, max(channels // reduction, 1)
        self.query = projection(told, inner, attention_norm)
        self.key = projection(told, inner, attention_norm)
        self.value = nn.Conv2d(told, 1, 1)
        init_mixer(self)

    def forward(self, features: Tensor, index: Tensor, weight: Tensor, size: tuple[int, int], upsampling: str | None = None) -> Tensor:
        """`features` (B, C, h, w); `index` (B, K) int64 and `weight` (B, K) as in a MixPlan -> masks (B, K, *size) float32."""
        with torch.autocast(features.device.type, enabled=False):
            attention, value = self.attend(features.float(), index, weight)
            scores = torch.cat([(a @ v.flatten(1)[:, :, None]).view_as(v) for a, v in zip(attention, value, strict=True)], 1)
            return upsample(scores, size, upsampling or self.upsamplings[0]).softmax(1)

    def attend(self, features: Tensor, index: Tensor, lam: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """For every image of a mixture: the attention (B, hw, hw) and the values (B, 1, h, w)."""
        inputs = [features[partner] for partner in index.unbind(1)]
        if self.lam_concat:
            inputs = [with_channel(x, share[:, None, None, None]) for x, share in zip(inputs, lam.to(features).unbind(1), strict=True)]
        queries, keys = ([F.relu(project(x)) for x in inputs] for project in (self.query, self.key))
        others = [sum(key for j, key in enumerate(keys) if j != i) for i in range(len(keys))]
        return [attention_of(query, other) for query, other in zip(queries, others, strict=True)], [self.value(x) for x in inputs]


# (name in checkpoints of OpenMixup and AdAutoMix, our name)
OFFICIAL_NAMES = (
    (r"^mix_block\.", ""),
    (r"^conv_q\.", "query."),
    (r"^conv_k\.", "key."),
    (r"^conv_v\.", "value."),
    (r"^(query|key)\.(bn|ln)\.", r"\1.norm."),
)


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of AdAutoMix's `AdaptiveMask` under our names."""
    return {renamed(name, OFFICIAL_NAMES): value for name, value in state.items()}
