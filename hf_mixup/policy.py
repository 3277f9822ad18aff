"""The two things a method is made of: a policy that plans the mixing, and one that weighs the labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from hf_mixup.plan import MixPlan


class Signals(dict[str, Tensor]):
    """Evidence by name: `images`, `saliency`, `attention`, ...

    `device` is where image-sized noise is to be drawn; numbers and boxes are always drawn on the CPU.
    """

    def __init__(self, device: torch.device | str = "cpu", **values: Tensor):
        super().__init__(values)
        self.device = torch.device(device)


class SamplePolicy(ABC):
    """Plans what is mixed with what. Subclasses are frozen dataclasses whose fields are the hyper-parameters.

    `needs` names the signals that `plan` reads; a policy that needs at most `images` can be used in a collator.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        """`shape` is (B, C, H, W). Every draw comes from `rng`; the same generator state gives the same plan."""


class LabelPolicy(ABC):
    """Turns a plan, and what was seen during the forward pass, into label weights. Subclasses are frozen dataclasses."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def weights(self, plan: MixPlan, signals: Signals) -> Tensor:
        """(B, K) float32."""
