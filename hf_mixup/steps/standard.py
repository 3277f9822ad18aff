"""The step of nearly every method: plan, blend, forward, weigh the labels, loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hf_mixup.plan import MixPlan, Share, blend, mix_targets
from hf_mixup.policy import Signals
from hf_mixup.rng import MixKey
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


def pair_shares(plan: MixPlan, method: Method) -> Tensor:
    """(B,) the share of the own image, for steps that mix two whole images inside the network. Raises ValueError for other plans."""
    if not isinstance(plan.mask, Share) or plan.index.shape[1] != 2:
        raise ValueError(
            f"{method.name} mixes pairs of whole images, got the plan of {type(method.sample).__name__}; take the sample policy 'mixup'."
        )
    return plan.mask.value[:, 0]


def relabelled(method: Method, state: MethodState, plan: MixPlan, logits: Tensor, targets: Tensor, signals: Signals) -> MixPlan:
    """The plan with the label policy's weights, for which it may look at the prediction as well."""
    signals = state.after(signals)
    signals.update(logits=logits, targets=targets)
    return plan.reweighted(method.label.weights(plan, signals))


def finish(method: Method, state: MethodState, plan: MixPlan, logits: Tensor, targets: Tensor, signals: Signals) -> StepOutput:
    """From logits to the loss, which every step that mixes once ends with."""
    plan = relabelled(method, state, plan, logits, targets, signals)
    mixed = mix_targets(plan, targets)
    loss = method.loss(logits, mixed, plan).mean()
    return StepOutput(loss if signals.loss is None else loss + signals.loss, logits, mixed, plan.weight[:, 0], plan)
