"""Labels that follow the tokens (TL-Align)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import LabelPolicy, Signals


@dataclass(frozen=True)
class AlignedLabels(LabelPolicy):
    """TL-Align (Xiao et al., ICCV 2023, arXiv:2210.06455; github.com/Euphoria16/TL-Align): every patch starts with the label of its
    image. Every block mixes labels as its attention mixes tokens. The target is the mixture that reaches the class token.

    The official code keeps a distribution over classes for every token. This keeps the shares of the source images, which gives the same with
    much less work. It needs the attention of all blocks, on one grid of tokens (ViT, DeiT). (OpenMixup's method TLA has only the images.)
    """

    needs: ClassVar[frozenset[str]] = frozenset({"token_grid", "attention_layers"})

    def weights(self, plan: MixPlan, signals: Signals) -> Tensor:
        attention = signals["attention_layers"]
        patches = plan.dense_mask(tuple(signals["token_grid"].shape)).flatten(2).mT  # (B, N, K)
        # tokens that are not patches start with the label of the whole image
        whole = plan.weight[:, None].expand(-1, attention.shape[2] - patches.shape[1], -1)
        return aligned(torch.cat([whole, patches], 1), attention)[:, 0]


def aligned(shares: Tensor, attention: Tensor) -> Tensor:
    """(B, N, K): the shares of the tokens after all blocks, whose `attention` is (B, L, N, N). Half of each token is its own share: the
    residual connection of every block."""
    with torch.autocast(shares.device.type, enabled=False):
        for layer in attention.float().unbind(1):
            shares = (layer @ shares + shares) / 2
    return shares
