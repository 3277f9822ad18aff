"""Clean images, or Mixup, beside mixtures in one training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_mixup.core.checks import check_between, check_count, check_positive
from hf_mixup.core.plan import MixPlan, blend, mix_others, mix_targets
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import MixKey, beta, partners
from hf_mixup.networks.passes import logits_of
from hf_mixup.steps.standard import relabelled
from hf_mixup.steps.step import MethodState, Parts, Step, StepOutput


@dataclass(frozen=True)
class KeepClean(Step):
    """Trains on every image as it is, and on its mixtures. This is the step of RegMixup (Pinto et al., NeurIPS 2022, arXiv:2206.14502, eq. 4;
    github.com/FrancescoPinto/RegMixup) and of AugMix, and with `clean_alpha` of MergeMix. It works with any method of the standard step.

    The rows of a step are the mixtures, then the clean images. The loss is the weighted mean over all rows,
    `(sum of mixtures + clean_weight * clean) / (mixtures + clean_weight)`. So a batch counts the same whether it is mixed or not. The paper's
    loss is the sum `clean + eta * mixed`, with eta 1; the authors' code takes the mean of 2 B rows, as here.

    Args:
        clean_weight: weight of a clean image's loss; a mixture has 1. It is `1 / eta` of the paper.
        mixtures: number of mixtures of each image, drawn independently.
        one_pass: all rows pass together, as in the authors' code, so batch norms see clean and mixed images
            together. False gives each part its own pass.
        clean_alpha: if above 0, the clean images are mixed with one another by Mixup, with one lam for the batch, drawn from the Beta with this
            parameter. MergeMix has 0.8.
    """

    takes_others: ClassVar[bool] = True

    clean_weight: float = 1.0
    mixtures: int = 1
    one_pass: bool = True
    clean_alpha: float = 0.0

    def __post_init__(self):
        check_positive(clean_weight=self.clean_weight)
        check_between(0, 1e6, clean_alpha=self.clean_alpha)
        check_count(1, mixtures=self.mixtures)

    @property
    def rows(self) -> tuple[bool, ...] | None:
        """None if clean rows have another weight, a pass or a mixture of their own: a collator cannot do that."""
        alike = self.clean_weight == 1 and self.one_pass and not self.clean_alpha
        return (True,) * self.mixtures + (False,) if alike else None

    def run(
        self,
        parts: Parts,
        state: MethodState,
        network: nn.Module,
        images: Tensor,
        targets: Tensor,
        key: MixKey,
    ) -> StepOutput:
        signals, rng = state.before(images, targets), key.own_rng()
        plans = [parts.plan(images, rng, signals) for _ in range(self.mixtures)]
        if parts.loss.views > 1 and any(plan.index.shape[1] > 1 for plan in plans):
            raise ValueError(
                f"{type(parts.loss).__name__} compares views of one label, got {parts.name!r}, which mixes the labels of several images; use 'augmix'."
            )
        plans.append(self.plan_beside(len(images), rng).to(images.device))
        rows = [blend(plan, images) for plan in plans]
        beside = [mix_others(plan, signals.others) for plan in plans]
        logits, seen = [], []
        if self.one_pass:
            rows, beside = [torch.cat(rows)], [{name: torch.cat([part[name] for part in beside]) for name in signals.others}]
        for batch, of_batch in zip(rows, beside, strict=True):
            with state.watching(signals, batch):
                logits.append(logits_of(network, batch, of_batch))
            seen.append({name: signals[name] for name in state.late})
        logits = torch.cat(logits)
        # each mixture gets the signals of its own rows
        late = {name: torch.cat([part[name] for part in seen]).split(len(images)) for name in state.late}
        rows_logits = logits.split(len(images))
        for k, plan in enumerate(plans[:-1]):
            own = Signals(signals.device, **{**signals, **{name: of_rows[k] for name, of_rows in late.items()}})
            own.for_label = signals.for_label
            plans[k] = relabelled(parts, plan, rows_logits[k], targets, own)
        mixed = [mix_targets(plan, targets) for plan in plans]
        if parts.loss.views > 1:
            losses = parts.loss(logits, torch.cat(mixed))
        else:
            pairs = plans if self.clean_alpha else [*plans[:-1], None]
            losses = torch.cat([parts.loss(*of_one) for of_one in zip(rows_logits, mixed, pairs, strict=True)])
        weight = losses.new_ones(len(mixed), len(images))
        weight[-1] = self.clean_weight
        losses = losses * weight.flatten() * (len(mixed) / (self.mixtures + self.clean_weight))
        loss = losses.mean() if signals.loss is None else losses.mean() + signals.loss
        lam = torch.cat([plan.lam for plan in plans])
        return StepOutput(loss, losses, logits, torch.cat(mixed), lam, plans[0])

    def plan_beside(self, batch: int, rng: torch.Generator) -> MixPlan:
        """The plan of the last row of every image: the clean image, or Mixup."""
        if not self.clean_alpha:
            return MixPlan.identity(batch)
        return MixPlan.pair(partners(batch, "batch", rng).partner, None, beta(self.clean_alpha, 1, rng).expand(batch))
