"""The two kinds of policy: a sample policy plans the mixing, a label policy sets the label weights."""

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
OF_THE_BATCH = frozenset({"images", "targets", "maps", "object_masks", "frames"})
# of those, the ones that are columns of the data set beside images and labels
COLUMNS = frozenset({"object_masks"})
NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class Signals(dict[str, Tensor]):
    """Evidence by name: `images`, `targets` (B, num_labels), `saliency`, `attention`, ...

    Attributes:
        device: where image-sized noise is to be drawn; numbers and boxes are always drawn on the CPU.
        loss: an extra loss on the clean images, where a policy trains on those too (`clean_lam`); added to that of the step.
        others: what the network takes beside its main input, (B, ...) each, such as an `attention_mask`.
        frames: T of a batch of videos (B, T, C, H, W), which policies see as (B, T * C, H, W); None for other inputs.
        for_label: signals that the label policy alone takes in its own way, such as from a teacher of its own.
    """

    def __init__(self, device: torch.device | str = "cpu", **values: Tensor):
        super().__init__(values)
        self.device = torch.device(device)
        self.loss: Tensor | None = None
        self.others = NOTHING
        self.frames: int | None = None
        self.for_label: dict[str, Tensor] = {}


class Policy:
    """The base of both kinds: which signals a policy reads, and where they come from.

    A policy may declare these as fields, to get its signals in another way:

    Attributes:
        needs: names of signals.
        teacher: Hub id or folder of a frozen image classifier that gives the signals; None for the network in training.
        teacher_size: side in pixels to which images are resized for the signals; None does not resize.
        scores: what kind of evidence `token_scores` are: `attention` or `activation`.
        clean_lam: weight of the loss on the clean images; the input gradients then come from that loss too.

    Raises:
        ValueError: at construction, for fields out of their range.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    teacher = None
    teacher_size = None
    scores = "attention"
    clean_lam = 0.0


class SamplePolicy(Policy, ABC):
    """Plans what is mixed with what. Subclasses are frozen dataclasses whose fields are the hyper-parameters.

    `needs` names the signals that `plan` reads, and `frames` where it takes videos alone; a policy that needs at most that, `images`, `targets` and
    `maps`, the label maps (B, H, W), can be used in a collator.

    Attributes:
        united: whether its plans unite the labels of all images, which needs a multi-label loss.
    """

    united: ClassVar[bool] = False

    @abstractmethod
    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        """Plans one batch. All random draws come from `rng`, so the same state of the generator gives the same plan.

        `shape` is (B, C, H, W): that of the images, or of `planes` for other inputs."""


class LabelPolicy(Policy, ABC):
    """Turns a plan, and signals of the forward pass, into label weights. Subclasses are frozen dataclasses."""

    @abstractmethod
    def weights(self, plan: MixPlan, signals: Signals) -> Tensor:
        """(B, K) float32."""


@dataclass(frozen=True)
class AreaLabels(LabelPolicy):
    """The weights of the plan itself: the share of each image that is visible."""

    def weights(self, plan: MixPlan, signals: Signals) -> Tensor:
        return plan.weight
