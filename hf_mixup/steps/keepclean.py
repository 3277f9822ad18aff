"""Clean images beside their mixtures, in one training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_mixup.core.checks import check_count, check_positive
from hf_mixup.core.plan import blend, mix_others, mix_targets
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import MixKey
from hf_mixup.networks.passes import logits_of
from hf_mixup.steps.standard import relabelled
from hf_mixup.steps.step import MethodState, Parts, Step, StepOutput


@dataclass(frozen=True)
class KeepClean(Step):
    """Trains on every image as it is, and on its mixtures. This is the step of RegMixup (Pinto et al., NeurIPS 2022, arXiv:2206.14502, eq. 4;
    github.com/FrancescoPinto/RegMixup) and of AugMix. It works with any method that needs images only.

    The rows of a step are the mixtures, then the clean images. The loss is the weighted mean over all rows,
    `(sum of mixtures + clean_weight * clean) / (mixtures + clean_weight)`. So a batch counts the same whether it is mixed or not. The paper's
    loss is the sum `clean + eta * mixed`, with eta 1; the authors' code takes the mean of 2 B rows, as here.

    Args:
        clean_weight: weight of a clean image's loss; a mixture has 1. It is `1 / eta` of the paper.
        mixtures: number of mixtures of each image, drawn independently.
        one_pass: all rows pass together, as in the authors' code, so batch norms see clean and mixed images
            together. False gives each part its own pass.
    """

    takes_others: ClassVar[bool] = True

    clean_weight: float = 1.0
    mixtures: int = 1
    one_pass: bool = True

    def __post_init__(self):
        check_positive(clean_weight=self.clean_weight)
        check_count(1, mixtures=self.mixtures)

    @property
    def rows(self) -> tuple[bool, ...] | None:
        """None if clean rows have another weight, or a pass of their own: a collator cannot do that."""
        return (True,) * self.mixtures + (False,) if self.clean_weight == 1 and self.one_pass else None

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
        rows = [*(blend(plan, images) for plan in plans), images]
        beside = [*(mix_others(plan, signals.others) for plan in plans), signals.others]
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
        for k, plan in enumerate(plans):
            own = Signals(signals.device, **{**signals, **{name: of_rows[k] for name, of_rows in late.items()}})
            own.for_label = signals.for_label
            plans[k] = relabelled(parts, plan, rows_logits[k], targets, own)
        mixed = [*(mix_targets(plan, targets) for plan in plans), targets.float()]
        if parts.loss.views > 1:
            losses = parts.loss(logits, torch.cat(mixed))
        else:
            losses = torch.cat([parts.loss(*of_one) for of_one in zip(rows_logits, mixed, [*plans, None], strict=True)])
        weight = losses.new_ones(len(mixed), len(images))
        weight[-1] = self.clean_weight
        losses = losses * weight.flatten() * (len(mixed) / (self.mixtures + self.clean_weight))
        loss = losses.mean() if signals.loss is None else losses.mean() + signals.loss
        lam = torch.cat([*(plan.weight[:, 0] for plan in plans), weight.new_ones(len(images))])
        return StepOutput(loss, losses, logits, torch.cat(mixed), lam, plans[0])
