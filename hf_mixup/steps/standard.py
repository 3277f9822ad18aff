"""The step of nearly every method: plan, blend, forward, weigh the labels, loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_mixup.core.plan import MixPlan, Share, blend, mix_targets
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import MixKey, keyed
from hf_mixup.steps.step import MethodState, Step, StepOutput

if TYPE_CHECKING:
    from hf_mixup.methods import Method


@dataclass(frozen=True)
class Standard(Step):
    """One forward pass of the mixed images."""

    def run(self, method: Method, state: MethodState, backbone: nn.Module, images: Tensor, targets: Tensor, key: MixKey) -> StepOutput:
        signals = state.before(images, targets)
        plan = method.sample.plan(images.shape, key.own_rng(), signals).to(images.device)
        # the labels stay here: given soft ones, a Hugging Face model would switch to BCE and keep that in its config
        logits = backbone(pixel_values=blend(plan, images)).logits
        return finish(method, state, plan, logits, targets, signals)


def check_whole_images(method: Method, instead: str, pairs: bool = True) -> None:
    """Refuses a sample policy with masks, or of more than two images, where a step cannot do with those."""
    batch = torch.Size((2, 3, 32, 32))
    plan = None if method.sample.needs else method.sample.plan(batch, keyed(0), Signals())
    if plan is None or not isinstance(plan.mask, Share) or (pairs and plan.index.shape[1] != 2):
        raise ValueError(
            f"{method.name} needs a sample policy that mixes {'pairs of ' if pairs else ''}whole images, "
            f"got {type(method.sample).__name__}; take {instead!r}."
        )


def relabelled(method: Method, state: MethodState, plan: MixPlan, logits: Tensor, targets: Tensor, signals: Signals) -> MixPlan:
    """The plan with the label policy's weights, for which it may look at the prediction as well."""
    signals = state.after(signals)
    signals.update(logits=logits, targets=targets)
    return plan.reweighted(method.label.weights(plan, signals))


def finish(method: Method, state: MethodState, plan: MixPlan, logits: Tensor, targets: Tensor, signals: Signals) -> StepOutput:
    """From logits to the loss, which every step that mixes once ends with."""
    plan = relabelled(method, state, plan, logits, targets, signals)
    mixed = mix_targets(plan, targets)
    losses = method.loss(logits, mixed, plan)
    loss = losses.mean()
    return StepOutput(loss if signals.loss is None else loss + signals.loss, losses, logits, mixed, plan.weight[:, 0], plan)
