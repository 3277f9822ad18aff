"""AlignMixup."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_mixup.core.checks import check_between, check_count, check_positive
from hf_mixup.core.plan import blend
from hf_mixup.core.rng import MixKey
from hf_mixup.networks.families import Layout, family_of, module_of, stage_names
from hf_mixup.networks.passes import changing, check_changeable, logits_of
from hf_mixup.steps.standard import check_whole_images, finish
from hf_mixup.steps.step import MethodState, Parts, Step, StepOutput


class AlignState(MethodState):
    """Watches the last feature map before the classifier."""

    def __init__(self, network: nn.Module):
        super().__init__()
        names = stage_names(network)
        last = names[-2 if family_of(network).class_token and len(names) > 1 else -1]
        self.layer = (module_of(network, last),)  # in a tuple, so that it is not registered as a module of the state
        self.layout = Layout.of(network)

    @property
    def changed(self) -> list[nn.Module]:
        return [*self.layer]


@dataclass(frozen=True)
class AlignMix(Step):
    """AlignMixup (Venkataramanan et al., CVPR 2022, arXiv:2103.15375; github.com/shashankvkt/AlignMixup_CVPR22): mixes the last feature
    maps of two images, after it moved the places of one map onto those of the other by optimal transport.

    A fair coin chooses between input mixup and aligned features, for the whole batch and on all processes. A second coin chooses whose
    geometry is kept, as in the authors' code. (OpenMixup alternates with Manifold Mixup instead of input mixup: use the methods manifoldmix
    and alignmix together, with `align_prob=1`.) Gradients flow through both images, not through the transport. If the network classifies a
    class token, the features are those before the last block, and the token is mixed as it is.

    Args:
        eps: temperature of the transport.
        iterations: of Sinkhorn's algorithm, at most.
        tol: stop when the summed change of a potential, averaged over the batch, is below it. The authors use 0.1 with at most
            100 iterations; then the host waits for the device in each. None does all iterations.
        align_prob: the share of batches whose features are aligned.
    """

    eps: float = 0.1
    iterations: int = 20
    tol: float | None = None
    align_prob: float = 0.5

    def __post_init__(self):
        check_positive(eps=self.eps, **({} if self.tol is None else {"tol": self.tol}))
        check_count(1, iterations=self.iterations)
        check_between(0, 1, align_prob=self.align_prob)

    def build(self, parts: Parts, network: nn.Module) -> MethodState:
        check_whole_images(parts, "mixup")
        return AlignState.for_parts(parts, network, network)

    def run(self, parts: Parts, state: AlignState, network: nn.Module, images: Tensor, targets: Tensor, key: MixKey) -> StepOutput:
        signals = state.before(images, targets)
        plan = parts.plan(images, key.own_rng(), signals)
        size, partner, lam = tuple(images.shape[2:]), plan.index[:, 1], plan.mask.value[:, 0]
        aligned, own_places = (torch.rand(2, generator=key.step_rng()) < torch.tensor([self.align_prob, 0.5])).tolist()
        if aligned:
            check_changeable(network, parts.name)
            change = changing(state.layer[0], lambda output: self._aligned_output(state.layout, output, size, partner, lam, own_places))
        else:
            images, change = blend(plan, images), nullcontext()
        with change, state.watching(signals, images):
            logits = logits_of(network, images)
        return finish(parts, plan, logits, targets, signals)

    def _aligned_output(self, layout: Layout, output: Any, size: tuple[int, int], partner: Tensor, lam: Tensor, own_places: bool) -> Any:
        maps = layout.maps(output, size)
        with torch.autocast(maps.device.type, enabled=False):
            own, other = maps.float(), maps[partner].float()
            plan = transport(own, other, self.eps, self.iterations, self.tol)
            mixed = aligned_mix(own, other, plan, lam, own_places).to(maps.dtype)
        share = lam[:, None, None].to(maps.dtype)
        return layout.put(mixed, output, lambda tokens: torch.lerp(tokens[partner], tokens, share))


@torch.no_grad()
def transport(own: Tensor, other: Tensor, eps: float, iterations: int, tol: float | None = None) -> Tensor:
    """The entropic transport plan (B, r, r) between the r places of two maps, (B, C, h, w) float32 each. Its total mass is 1.

    The cost is the squared distance of the features. It runs Sinkhorn's algorithm in log space, so columns sum to 1 / r exactly.
    """
    x, y = own.flatten(2), other.flatten(2)
    places = x.shape[2]
    # |x|^2 + |y|^2 - 2 x y, because the differences would take C times the memory
    cost = x.pow(2).sum(1)[:, :, None] + y.pow(2).sum(1)[:, None] - 2 * x.transpose(1, 2) @ y
    kernel = -cost.clamp_min(0) / eps
    log_mass = math.log(1 / places + 1e-8)
    u, v = kernel.new_zeros(2, len(kernel), places)
    for _ in range(iterations):
        last = u
        # potentials in units of eps
        u = log_mass - (kernel + v[:, None]).logsumexp(2)
        v = log_mass - (kernel + u[:, :, None]).logsumexp(1)
        if tol is not None and eps * (u - last).abs().sum(1).mean() < tol:
            break
    return (kernel + u[:, :, None] + v[:, None]).exp()


def aligned_mix(own: Tensor, other: Tensor, plan: Tensor, lam: Tensor, own_places: bool) -> Tensor:
    """Mixes both maps (B, C, h, w) by `lam` (B,), at the places of `own`, or of `other`."""
    size, assignment = own.shape[2:], plan.shape[1] * plan
    if own_places:
        other = (other.flatten(2) @ assignment.transpose(1, 2)).unflatten(2, size)
    else:
        own = (own.flatten(2) @ assignment).unflatten(2, size)
    return torch.lerp(other, own, lam[:, None, None, None].float())
