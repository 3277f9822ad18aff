"""MoEx: exchanges moments of hidden states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_mixup.core.checks import check_positive
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.rng import MixKey
from hf_mixup.steps.hidden import Change, HiddenStep, Layers, check_layers
from hf_mixup.steps.step import Parts


@dataclass(frozen=True)
class MoEx(HiddenStep):
    """Moment Exchange (Li et al., CVPR 2021, arXiv:2002.11102; github.com/Boyiliee/MoEx): gives the hidden states of an image the mean and
    deviation of another image's, at every place over the channels (positional normalisation).

    Labels are mixed with the fixed share of the sample policy `fixedmixup`. Gradients flow through both images. The authors exchange before
    the first stage (`stem`), and offer stages as other choices. Here the first stage is the default, and you can name the module before it.
    `mix_rate` is their `moex_prob`, the share of mixed batches: 1 in their ImageNet command.

    Args:
        layers: one is chosen for each batch, with equal chances: k for the output of stage k (of block k, in a vision transformer), 0 for the
            images, or the name of any module of the network.
        eps: added to the variance.
    """

    layers: Layers = (1,)
    eps: float = 1e-5

    def __post_init__(self):
        check_layers(self.layers)
        check_positive(eps=self.eps)

    def changes(self, parts: Parts, plan: MixPlan, key: MixKey, shape: torch.Size) -> list[Change]:
        partner = plan.index[:, 1]
        # tokens have their channels last
        return [Change(self.one_layer(key), *(lambda hidden, dim=dim: exchanged(hidden, partner, dim, self.eps) for dim in (1, 2)))]


def exchanged(hidden: Tensor, partner: Tensor, dim: int, eps: float) -> Tensor:
    """Hidden states with the moments of their partners over `dim`; `partner` is (B,). Raises ValueError for a single channel, which is its own
    mean, so that the partner would replace the whole image."""
    if hidden.shape[dim] == 1:
        raise ValueError("moex exchanges moments over several channels, got hidden states of one; name a later layer in layers.")
    mean = hidden.mean(dim, keepdim=True)
    deviation = (hidden.var(dim, keepdim=True) + eps).sqrt()
    scale = deviation[partner] / deviation
    return hidden * scale + (mean[partner] - mean * scale)
