"""The step of nearly every method: plan, blend, forward, set label weights, loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_mixup.core.plan import MixPlan, Share, blend, mix_others, mix_targets
from hf_mixup.core.policy import OF_THE_BATCH, Signals
from hf_mixup.core.rng import MixKey, keyed
from hf_mixup.networks.passes import logits_of
from hf_mixup.steps.step import MethodState, Parts, Step, StepOutput


@dataclass(frozen=True)
class Standard(Step):
    """One forward pass of the mixed images."""

    takes_others: ClassVar[bool] = True

    @property
    def rows(self) -> tuple[bool, ...]:
        return (True,)

    def run(
        self,
        parts: Parts,
        state: MethodState,
        network: nn.Module,
        images: Tensor,
        targets: Tensor,
        key: MixKey,
    ) -> StepOutput:
        signals = state.before(images, targets)
        plan = parts.plan(images, key.own_rng(), signals)
        mixed = blend(plan, images)
        with state.watching(signals, mixed):
            # labels are not passed on: with soft labels, a Hugging Face model switches to BCE and keeps that in its config
            logits = logits_of(network, mixed, mix_others(plan, signals.others))
        return finish(parts, plan, logits, targets, signals)


def check_whole_images(parts: Parts, instead: str, pairs: bool = True) -> None:
    """Raises ValueError for a sample policy with masks, or with more than two images, if the step cannot use it."""
    batch, classes = torch.zeros(2, 3, 32, 32), len(getattr(parts.sample, "class_counts", None) or (1, 1))
    signals = Signals(images=batch, targets=torch.eye(2, classes))
    plan = None if parts.sample.needs - OF_THE_BATCH else parts.sample.plan(batch.shape, keyed(0), signals)
    if plan is None or not isinstance(plan.mask, Share) or (pairs and plan.index.shape[1] != 2):
        raise ValueError(
            f"{parts.name} needs a sample policy that mixes {'pairs of ' if pairs else ''}whole images, "
            f"got {type(parts.sample).__name__}; use {instead!r}."
        )


def relabelled(parts: Parts, plan: MixPlan, logits: Tensor, targets: Tensor, signals: Signals) -> MixPlan:
    """The plan with the label policy's weights, which may depend on the prediction."""
    signals.update(logits=logits, targets=targets)
    seen = Signals(signals.device, **{**signals, **signals.for_label})
    return plan.reweighted(parts.label.weights(plan, seen))


def finish(parts: Parts, plan: MixPlan, logits: Tensor, targets: Tensor, signals: Signals) -> StepOutput:
    """From logits to the loss: the end of every step that mixes once."""
    plan = relabelled(parts, plan, logits, targets, signals)
    mixed = mix_targets(plan, targets)
    losses = parts.loss(logits, mixed, plan)
    loss = losses.mean()
    return StepOutput(loss if signals.loss is None else loss + signals.loss, losses, logits, mixed, plan.weight[:, 0], plan)
