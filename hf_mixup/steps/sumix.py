"""SUMix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_mixup.core.checks import check_between
from hf_mixup.core.plan import MixPlan, blend, mix_others, mix_targets
from hf_mixup.core.rng import MixKey
from hf_mixup.networks.families import classifier_of
from hf_mixup.networks.passes import input_of, watched
from hf_mixup.steps.standard import relabelled
from hf_mixup.steps.step import MethodState, Parts, Step, StepOutput


class UncertaintyState(MethodState):
    """A second classifier for the uncertainty of the first. It is not part of the deployed network."""

    def __init__(self, network: nn.Module):
        super().__init__()
        classifier = classifier_of(network)
        self.classifier = (classifier,)  # in a tuple, so that it is not registered as a module of the state
        self.uncertainty = nn.Linear(classifier.in_features, classifier.out_features).to(classifier.weight)

    @property
    def watched(self) -> list[nn.Module]:
        return [*super().watched, *self.classifier]


@dataclass(frozen=True)
class SUMix(Step):
    """SUMix (Qin et al., ECCV 2024, arXiv:2407.07805; github.com/JinXins/SUMix): label weights that follow how far the prediction for the
    mixture is from the prediction for each image, plus a loss on its uncertainty. It works with any sample policy of two images.

    The clean images pass too, with gradients, so a step costs twice as much. As in the authors' code, semantic distances are multiplied by the
    size of the batch.

    Deviations:
    1. Each sample's own weight multiplies its own loss (in the authors' code, each weight multiplies the mean loss of the batch).
    2. Every image may have its own lam.

    Args:
        gamma: weight of the loss on the uncertainty: 0.5 for CIFAR-100, CUB and ImageNet, 1 for Tiny-ImageNet.
        normalise: whether uncertainties are normalised, to a softmax of length 1. The authors do not do so on ImageNet.
    """

    takes_others: ClassVar[bool] = True

    gamma: float = 0.5
    normalise: bool = True

    def __post_init__(self):
        check_between(0, 1e3, gamma=self.gamma)

    def build(self, parts: Parts, network: nn.Module) -> UncertaintyState:
        return UncertaintyState.for_parts(parts, network, network)

    def run(
        self,
        parts: Parts,
        state: UncertaintyState,
        network: nn.Module,
        images: Tensor,
        targets: Tensor,
        key: MixKey,
    ) -> StepOutput:
        signals = state.before(images, targets)
        plan = parts.plan(images, key.own_rng(), signals)
        if plan.index.shape[1] != 2:
            raise ValueError(
                f"{parts.name} weighs two images, got the plan of {type(parts.sample).__name__}; use a sample policy of pairs."
            )
        clean, (clean_feature,) = watched(network, images, [input_of(*state.classifier)], signals.others)
        mixed_images = blend(plan, images)
        with state.watching(signals, mixed_images):
            logits, (feature,) = watched(network, mixed_images, [input_of(*state.classifier)], mix_others(plan, signals.others))
        plan = relabelled(parts, plan, logits, targets, signals)
        classes = targets.argmax(1)[plan.index]  # (B, 2)
        distance = semantic_distances(logits, clean, plan.index, classes)
        uncertain = [uncertainties(state.uncertainty(value), self.normalise) for value in (clean_feature, feature)]
        regulariser = uncertainty_loss(distance, *uncertain, plan, classes)
        plan = plan.reweighted(weighed(plan.weight, distance, classes))
        mixed = mix_targets(plan, targets)
        losses = parts.loss(logits, mixed, plan)
        loss = losses.mean() + self.gamma * regulariser
        return StepOutput(loss if signals.loss is None else loss + signals.loss, losses, logits, mixed, plan.weight[:, 0], plan)


def semantic_distances(logits: Tensor, clean: Tensor, index: Tensor, classes: Tensor) -> Tensor:
    """(B, 2, num_labels): the difference between the prediction for a mixture and that for each image, without the other image's class.

    It is the softmax of the differences, scaled to length 1, times the size of the batch. No gradients.
    """
    mixed, alone = (value.detach().float().softmax(1) for value in (logits, clean))
    other = F.one_hot(classes.flip(1), logits.shape[1])  # (B, 2, num_labels)
    return len(logits) * F.normalize((mixed[:, None] - alone[index] * (1 - other)).softmax(2), dim=2)


def weighed(weight: Tensor, distance: Tensor, classes: Tensor) -> Tensor:
    """(B, 2), summing to 1: each share falls with the distance from its image, at the image's own class."""
    # in logarithms, because the distance grows with the batch and its exponential would underflow
    own = distance.gather(2, classes[:, :, None])[:, :, 0]
    return (weight.log() - own).softmax(1)


def uncertainties(logits: Tensor, normalise: bool) -> Tensor:
    return F.normalize(logits.float().softmax(1), dim=1) if normalise else logits.float()


def uncertainty_loss(distance: Tensor, clean: Tensor, mixed: Tensor, plan: MixPlan, classes: Tensor) -> Tensor:
    """The mixed cross-entropy with `exp(-(uncertainty + distance))` as logits; the uncertainty is that of the image and of the mixture.

    `clean` and `mixed` are (B, num_labels). Gradients reach the uncertainties only.
    """
    logits = torch.exp(-(clean[plan.index] + mixed[:, None] + distance))
    losses = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="none").view_as(plan.weight)
    return (plan.weight * losses).sum(1).mean()
