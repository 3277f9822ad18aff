"""Barlow Twins, and Mixed Barlow Twins."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_mixup.core.checks import check_between
from hf_mixup.core.losses import CrossEntropy
from hf_mixup.core.plan import MixPlan, blend, mix_targets
from hf_mixup.core.policy import AreaLabels, Signals
from hf_mixup.core.rng import MixKey, keyed
from hf_mixup.pretraining.state import Batch, ContrastState, check_mlp
from hf_mixup.steps.step import Parts, Step, StepOutput


@dataclass(frozen=True)
class BarlowTwins(Step):
    """Barlow Twins (Zbontar et al., ICML 2021, arXiv:2103.03230, equation 1) and Mixed Barlow Twins (Bandara et al., 2023,
    arXiv:2312.02151; github.com/wgcban/mix-bt).

    The loss is `sum_i (C_ii - 1)^2 + l sum_(i != j) C_ij^2` for the cross-correlation C of two views. A mixture has the own image from the first
    view and its partners from the second. Its cross-correlation with each view should equal the mixed one. Gradients flow through targets too.
    Each process uses the correlations of its own batch. Any sample policy that needs images only can be used.

    Args:
        off_diagonal: l; 0.0078125 in mix-bt, 0.0051 in Barlow Twins.
        mix_scale: weight of the mixed loss, in units of `off_diagonal`; 4 in mix-bt, 1 is best on ImageNet, 0 does not mix.
        projector, projector_norm: widths and batch norms, see `mlp`.
    """

    views: ClassVar[int] = 2
    in_batch: ClassVar[bool] = True

    off_diagonal: float = 0.0078125
    mix_scale: float = 4.0
    projector: tuple[int, ...] = (1024, 1024, 1024)
    projector_norm: str = "hidden"

    def __post_init__(self):
        check_between(0, 1e3, off_diagonal=self.off_diagonal, mix_scale=self.mix_scale)
        check_mlp("projector", self.projector, self.projector_norm)

    @property
    def mixed(self) -> float:
        return self.mix_scale

    def build(self, parts: Parts, network: nn.Module) -> ContrastState:
        if parts.sample.needs - {"images"} or parts.label != AreaLabels() or parts.loss != CrossEntropy():
            raise ValueError(
                f"Barlow Twins takes sample policies that need images only, and no other label policy or loss, got {parts.name!r}; choose another."
            )
        images = torch.zeros(2, 3, 32, 32)
        if parts.sample.plan(images.shape, keyed(0), Signals(images=images)).sources is not None:
            raise ValueError(
                f"Mixed Barlow Twins takes partners from the other view, got {parts.name!r}, which moves pixels itself; choose another."
            )
        return ContrastState.for_parts(parts, network, network, (self.projector, self.projector_norm), None, [None])

    def run(self, parts: Parts, state: ContrastState, network: nn.Module, images: Tensor, targets: Any, key: MixKey) -> StepOutput:
        """`images` (B, 2, C, H, W); `targets` are not used."""
        first, second = images.unbind(1)
        plan = parts.sample.plan(first.shape, key.own_rng(), Signals(first.device, images=first)).to(first.device)
        return self.step(state, network, first, second, plan)

    def step(self, state: ContrastState, network: nn.Module, first: Tensor, second: Tensor, plan: MixPlan) -> StepOutput:
        """The step for a plan."""
        rows = len(first)
        batches = [Batch(first), Batch(second)]
        if self.mix_scale:
            sources = (first, *(second[column] for column in plan.index[:, 1:].unbind(1)))
            batches.append(Batch(blend(replace(plan, sources=sources), first)))
        projected = state.projected(network, batches, one_pass=False)
        with torch.autocast(first.device.type, enabled=False):
            one, two, *mixed = map(standardised, projected)
            correlation = one.T @ two / rows
            diagonal = torch.diagonal(correlation)
            others = correlation.square().sum() - diagonal.square().sum()
            loss = (diagonal - 1).square().sum() + self.off_diagonal * others
            if mixed:
                # partners' rows come after all first views' rows
                index = torch.cat([plan.index[:, :1], plan.index[:, 1:] + rows], 1)
                wanted = mix_targets(replace(plan, index=index), torch.cat([one, two]))
                apart = sum(((mixed[0] - wanted).T @ view / rows).square().sum() for view in (one, two))
                loss = loss + self.mix_scale * self.off_diagonal * apart
            # similarity to the other view, for the log only: the loss is one number for the whole batch
            shown = one.detach() @ two.detach().T
        return StepOutput(loss, loss.detach().expand(rows), shown, torch.eye(rows, device=shown.device), plan.weight[:, 0], plan)


def standardised(rows: Tensor) -> Tensor:
    """(B, d) float32 with mean 0 and variance 1 over the batch."""
    rows = rows.float()
    return (rows - rows.mean(0)) / rows.std(0)
