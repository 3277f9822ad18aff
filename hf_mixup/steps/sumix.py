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
    """A second classifier, which says how uncertain the first one is. The deployed network does without it."""

    def __init__(self, network: nn.Module):
        super().__init__()
        classifier = classifier_of(network)
        self.classifier = (classifier,)  # in a tuple, or it would become a module of the state too
        self.uncertainty = nn.Linear(classifier.in_features, classifier.out_features).to(classifier.weight)

    @property
    def watched(self) -> list[nn.Module]:
        return [*super().watched, *self.classifier]


@dataclass(frozen=True)
class SUMix(Step):
    """SUMix (Qin et al., ECCV 2024, arXiv:2407.07805; github.com/JinXins/SUMix): labels by how far the mixture is from either image
    in what the network says of them, and a loss on its uncertainty. For any sample policy of two images.

    The clean images pass as well, with gradients: a step costs twice as much. As in the authors' code semantic distances are
    multiplied by the size of the batch. Deviations: each sample's own share weighs its own loss (there, each share the mean loss of
    the batch); every image may have a lam of its own.

    Args:
        gamma: weight of the loss on the uncertainty: 0.5 for CIFAR-100, CUB and ImageNet, 1 for Tiny-ImageNet.
        normalise: whether uncertainties are normalised, to a softmax of length 1; not on ImageNet.
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
            raise ValueError(f"{parts.name} weighs two images, got the plan of {type(parts.sample).__name__}; take one of pairs.")
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
    """(B, 2, num_labels): how the prediction for a mixture differs from that for either image without the other's class.

    Softmax of the differences, to length 1, times the size of the batch. No gradients.
    """
    mixed, alone = (value.detach().float().softmax(1) for value in (logits, clean))
    other = F.one_hot(classes.flip(1), logits.shape[1])  # (B, 2, num_labels)
    return len(logits) * F.normalize((mixed[:, None] - alone[index] * (1 - other)).softmax(2), dim=2)


def weighed(weight: Tensor, distance: Tensor, classes: Tensor) -> Tensor:
    """(B, 2): shares that shrink with the distance from the image at its own class, and sum to 1."""
    # in logarithms: the distance grows with the batch, and e to the power of it is soon nothing
    own = distance.gather(2, classes[:, :, None])[:, :, 0]
    return (weight.log() - own).softmax(1)


def uncertainties(logits: Tensor, normalise: bool) -> Tensor:
    return F.normalize(logits.float().softmax(1), dim=1) if normalise else logits.float()


def uncertainty_loss(distance: Tensor, clean: Tensor, mixed: Tensor, plan: MixPlan, classes: Tensor) -> Tensor:
    """The mixed cross-entropy of `exp(-(uncertainty + distance))`, taken as logits; the uncertainty is the image's and the mixture's.

    `clean` and `mixed` are (B, num_labels). Gradients reach the uncertainties only.
    """
    logits = torch.exp(-(clean[plan.index] + mixed[:, None] + distance))
    losses = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="none").view_as(plan.weight)
    return (plan.weight * losses).sum(1).mean()
