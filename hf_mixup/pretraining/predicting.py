"""The base of methods with a predictor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from hf_mixup.pretraining.contrast import Contrast
from hf_mixup.pretraining.state import ContrastState, check_mlp
from hf_mixup.steps.step import Parts


@dataclass(frozen=True)
class Predicting(Contrast):
    """Abstract: queries are a predictor's output for projections.

    Args:
        predictor, predictor_norm: widths (the last is the projector's) and batch norms, see `mlp`.
    """

    state: ClassVar[type[ContrastState]] = ContrastState

    predictor: tuple[int, ...] = (4096, 256)
    predictor_norm: str = "hidden"

    def __post_init__(self):
        super().__post_init__()
        check_mlp("predictor", self.predictor, self.predictor_norm)
        if self.projector[-1] != self.predictor[-1]:
            raise ValueError(
                f"predictor must end in the projector's width, got {self.predictor[-1]} and {self.projector[-1]}; make them equal."
            )

    def make_state(self, parts: Parts, network: nn.Module, layers: list[nn.Module | None]) -> ContrastState:
        heads = (self.projector, self.projector_norm), (self.predictor, self.predictor_norm)
        return self.state.for_parts(parts, network, network, *heads, layers)
