"""MixStyle: mixes the styles of hidden states, but not the labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_mixup.core.checks import check_between, check_positive
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import MixKey
from hf_mixup.steps.hidden import Change, HiddenStep, Layers, check_layers
from hf_mixup.steps.step import MethodState, Parts


@dataclass(frozen=True)
class MixStyle(HiddenStep):
    """MixStyle (Zhou et al., ICLR 2021, arXiv:2104.02008; github.com/KaiyangZhou/mixstyle-release): mixes the mean and deviation of every
    channel, over all places, with those of another image. Images keep their labels. It is made for domain generalisation.

    Every layer draws its own coin, partners and shares, from the sample policy (`mixup` with alpha 0.1). Gradients do not flow through means
    and deviations. Partners come from the whole batch, as with the authors' sampler of random domains. Tokens before the patches, such as a
    class token, have one place and therefore no style, so they stay.

    Args:
        layers: k for the output of stage k, or the name of any module; 0, the images, is allowed too.
        probability: probability that the style of a layer is mixed in a step.
        eps: added to the variance.
    """

    layers: Layers = (1, 2)
    probability: float = 0.5
    eps: float = 1e-6

    def __post_init__(self):
        check_layers(self.layers)
        check_between(0, 1, probability=self.probability)
        check_positive(eps=self.eps)

    def build(self, parts: Parts, network: nn.Module) -> MethodState:
        if parts.sample.needs:
            raise ValueError(
                f"{parts.name} draws partners for every layer, got {type(parts.sample).__name__}, which needs {' and '.join(sorted(parts.sample.needs))}; "
                "take 'mixup'."
            )
        return super().build(parts, network)

    def changes(self, parts: Parts, plan: MixPlan, key: MixKey, shape: torch.Size) -> list[Change]:
        chosen = []
        for place in range(len(self.layers)):
            rng = key.layer_rng(place)
            if float(torch.rand((), generator=rng)) < self.probability:
                own = parts.sample.plan(shape, rng, Signals()).to(plan.index.device)
                partner, lam = own.index[:, 1], own.mask.value[:, 0]
                chosen.append(Change(place, lambda maps, partner=partner, lam=lam: restyled(maps, partner, lam, self.eps)))
        return chosen

    def labelled(self, plan: MixPlan, changes: list[Change]) -> MixPlan:
        own = torch.zeros_like(plan.weight)
        own[:, 0] = 1
        return plan.reweighted(own)


def restyled(maps: Tensor, partner: Tensor, lam: Tensor, eps: float) -> Tensor:
    """Maps (B, C, h, w) with the mixed style of both images; `lam` (B,) is the share of the own style. Raises ValueError for a single place, which
    is its own mean, so that it would be mixed under the own label."""
    if maps[0, 0].numel() == 1:
        raise ValueError(
            "mixstyle mixes styles over several places, got maps of one; name an earlier layer in layers, or use larger images."
        )
    detached = maps.detach()
    mean = detached.mean((2, 3), keepdim=True)
    deviation = (detached.var((2, 3), keepdim=True) + eps).sqrt()
    mixed_mean, mixed_deviation = (torch.lerp(part[partner], part, lam[:, None, None, None]) for part in (mean, deviation))
    return (maps - mean) / deviation * mixed_deviation + mixed_mean
