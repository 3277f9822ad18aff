"""RecursiveMix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_mixup.core.checks import check_between
from hf_mixup.core.plan import Boxes, MixPlan, blend
from hf_mixup.core.rng import MixKey
from hf_mixup.networks.families import check_pooled, classifier_of
from hf_mixup.networks.passes import watched
from hf_mixup.networks.signals.features import Stages, normalised
from hf_mixup.steps.standard import relabelled
from hf_mixup.steps.step import MethodState, Parts, Step, StepOutput


class RecursiveState(MethodState):
    """The mixed images of the previous step with their targets and logits, and the classifier for regions."""

    def __init__(self, network: nn.Module, share_fc: bool):
        super().__init__()
        check_pooled(network)
        head = classifier_of(network)
        self.fc_roi = None if share_fc else nn.Linear(head.in_features, head.out_features)
        self.stages = Stages(network)
        # empty until the first step
        for name in ("images", "targets", "logits"):
            self.register_buffer(name, torch.empty(0))

    def remember(self, **rows: Tensor) -> None:
        """Keeps as many rows as the first batch had, the same number on every process. A smaller batch replaces the first of them."""
        for name, new in rows.items():
            old, new = getattr(self, name), new.detach()
            if len(old) and old.shape[1:] == new.shape[1:]:
                # not in place: the loss still needs the old ones
                new = torch.cat([new[: len(old)], old[len(new) :].to(new)])
            setattr(self, name, new)

    @property
    def watched(self) -> list[nn.Module]:
        return [*super().watched, *self.stages.modules]

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in ("images", "targets", "logits"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args)


@dataclass(frozen=True)
class RecursiveMix(Step):
    """RecursiveMix (Yang et al., NeurIPS 2022, arXiv:2203.06844; github.com/implus/RecursiveMix-pytorch): pastes the mixed images of the
    previous step, with their soft labels. The network should classify that region as it classified the whole image then.

    The loss adds `omega (1 - lam)` times the cross-entropy between the region's logits and the earlier softmax. The region's logits come from
    RoIAlign on the last feature map and a classifier of their own. If a layer normalises what is classified, it normalises the region's
    features too. The very first batch is not mixed. With several repeats of a batch, all mix with the previous step, and the first is
    remembered. Under DDP all processes use the first process's memory, because DDP shares buffers at every forward.

    Deviations:
    1. The memory is kept between epochs and is part of a checkpoint. The authors forget it at the start of every epoch, so the first batch of
       each epoch is not mixed.
    2. The memory holds random rows of the earlier batch, not the same rows. With shuffled data this makes no difference.

    Args:
        omega: weight of the region's loss; 0.5 in the paper's ImageNet runs, 0.1 for PyramidNet on CIFAR-10.
        share_fc: classify regions with the network's own classifier.
    """

    omega: float = 0.5
    share_fc: bool = False

    def __post_init__(self):
        check_between(0, float("inf"), omega=self.omega)

    def build(self, parts: Parts, network: nn.Module) -> MethodState:
        if "history" not in parts.sample.needs:
            raise ValueError(
                f"{parts.name} needs a sample policy that mixes with the previous step, got {type(parts.sample).__name__}; use 'recursivepaste'."
            )
        return RecursiveState.for_parts(parts, network, network, self.share_fc)

    def run(self, parts: Parts, state: RecursiveState, network: nn.Module, images: Tensor, targets: Tensor, key: MixKey) -> StepOutput:
        signals = state.before(images, targets)
        first = len(state.images) == 0
        signals["history"] = images if first else state.images
        plan = parts.sample.plan(images.shape, key.own_rng(), signals)
        if first:
            plan = MixPlan.pair(plan.index[:, 1], Boxes(torch.zeros_like(plan.mask.edges), plan.mask.size), torch.ones(len(images)))
        box, plan = plan.mask.edges[0].tolist(), plan.to(images.device)
        mixed = blend(plan, images)
        with state.watching(signals, mixed):
            logits, (features,) = watched(network, mixed, state.stages.taps(tuple(images.shape[2:])))
        features = normalised(network, features)
        region = roi_features(features, box, plan.mask.size)
        with torch.autocast(images.device.type, enabled=False):
            classifier = classifier_of(network) if state.fc_roi is None else state.fc_roi
            region_logits = classifier(region.to(classifier.weight.dtype))

        plan = relabelled(parts, plan, logits, targets, signals)
        earlier = plan.index[:, 1] % max(len(state.targets), 1)
        old_targets, old_logits = (targets, logits) if first else (state.targets[earlier], state.logits[earlier])
        own, other = plan.weight.unbind(1)
        mixed_targets = own[:, None] * targets.float() + other[:, None] * old_targets
        losses = parts.loss(logits, mixed_targets, plan)
        loss = losses.mean()
        # without a box the region has weight 0, but its classifier stays in the graph, as on every other process
        loss = loss + self.omega * (other * region_loss(region_logits, old_logits)).mean()
        memory = {"images": mixed, "targets": mixed_targets, "logits": logits.float()}
        loss = loss if signals.loss is None else loss + signals.loss
        return StepOutput(loss, losses, logits, mixed_targets, own, plan, memory)


def region_loss(logits: Tensor, old_logits: Tensor) -> Tensor:
    """(B,): the cross-entropy between the region's logits and the earlier softmax of the whole image."""
    return -(old_logits.detach().float().softmax(1) * F.log_softmax(logits.float(), 1)).sum(1)


def roi_features(features: Tensor, box: list[int], size: tuple[int, int]) -> Tensor:
    """RoIAlign of one box, shared by the batch, to one place: (B, C) float32 from features (B, C, h, w).

    The result is torchvision's with `aligned=True` and an adaptive number of samples. For a shared box its bilinear weights separate into rows
    and columns. `box` is `[top, bottom, left, right]` in pixels of images of `size`.
    """
    with torch.autocast(features.device.type, enabled=False):
        rows, cols = (
            _sampling_weights(start, end, length, places).to(features.device)
            for start, end, length, places in zip(box[::2], box[1::2], size, features.shape[2:], strict=True)
        )
        return ((features.float() * cols).sum(3) * rows).sum(2)


def _sampling_weights(start: int, end: int, length: int, places: int) -> Tensor:
    """(places,) float32: the weights of a line of features in the samples between pixels `start` and `end` of a line of `length`."""
    low, extent = start * places / length - 0.5, (end - start) * places / length
    count = math.ceil(extent)
    at = low + (torch.arange(count) + 0.5) * extent / max(count, 1)
    inside = (at >= -1) & (at <= places)
    at = at.clamp(0, places - 1)
    near = (1 - (at[:, None] - torch.arange(places)).abs()).clamp_min(0) * inside[:, None]
    return near.sum(0) / max(count, 1)
