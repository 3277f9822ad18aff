"""The two things a method is made of: a policy that plans the mixing, and one that weighs the labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from hf_mixup.core.plan import MixPlan

# signals that a batch holds itself, so that no model is needed for them
OF_THE_BATCH = frozenset({"images", "targets", "maps", "object_masks"})
# of those, the ones that are columns of the data set beside images and labels
COLUMNS = frozenset({"object_masks"})
NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class Signals(dict[str, Tensor]):
    """Evidence by name: `images`, `targets` (B, num_labels), `saliency`, `attention`, ...

    Attributes:
        device: where image-sized noise is to be drawn; numbers and boxes are always drawn on the CPU.
        loss: an extra loss on the clean images, where a policy trains on those too (`clean_lam`); added to that of the step.
        others: what the network takes beside its main input, (B, ...) each, such as an `attention_mask`.
        for_label: signals that the label policy alone takes in its own way, such as from a teacher of its own.
    """

    def __init__(self, device: torch.device | str = "cpu", **values: Tensor):
        super().__init__(values)
        self.device = torch.device(device)
        self.loss: Tensor | None = None
        self.others = NOTHING
        self.for_label: dict[str, Tensor] = {}


class Policy:
    """What both kinds share: the signals they read, and how those are taken.

    A policy whose signals can be taken in another way has these as fields, of the same name:

    Attributes:
        needs: names of signals.
        teacher: Hub id or folder of a frozen image classifier that gives them; None for the network in training itself.
        teacher_size: side in pixels of the images that the network sees for it; None for the images as they are.
        scores: what kind of evidence `token_scores` are: `attention` or `activation`.
        clean_lam: weight of the clean images' own loss, which input gradients then come from as well.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    teacher = None
    teacher_size = None
    scores = "attention"
    clean_lam = 0.0


class SamplePolicy(Policy, ABC):
    """Plans what is mixed with what. Subclasses are frozen dataclasses whose fields are the hyper-parameters.

    `needs` names the signals that `plan` reads; a policy that needs at most `images`, `targets` and `maps`, the label maps (B, H, W), can be
    used in a collator.
    """

    @abstractmethod
    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        """`shape` is (B, C, H, W); that of `planes`, for other inputs than images. Every draw comes from `rng`; the same generator state gives the same plan."""


class LabelPolicy(Policy, ABC):
    """Turns a plan, and what was seen during the forward pass, into label weights. Subclasses are frozen dataclasses."""

    @abstractmethod
    def weights(self, plan: MixPlan, signals: Signals) -> Tensor:
        """(B, K) float32."""


@dataclass(frozen=True)
class AreaLabels(LabelPolicy):
    """The weights of the plan itself: the share of each image that is visible."""

    def weights(self, plan: MixPlan, signals: Signals) -> Tensor:
        return plan.weight
