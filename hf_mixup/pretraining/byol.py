"""BYOL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from hf_mixup.core.losses import Loss
from hf_mixup.pretraining.losses import Agreement
from hf_mixup.pretraining.mocov3 import check_widths
from hf_mixup.pretraining.momentum import Momentum
from hf_mixup.pretraining.state import KeyState, check_mlp
from hf_mixup.steps.step import Parts


@dataclass(frozen=True)
class BYOL(Momentum):
    """BYOL (Grill et al., NeurIPS 2020, arXiv:2006.07733): the prediction of the online network is to agree with the target network.

    `2 - 2 sum_s w_s cos(query, key_s)` over the images in a mixture; there are no negatives, so accumulation of gradients changes
    nothing but batch statistics. Mixtures go through the online network, as in i-Mix.

    Args:
        predictor, predictor_norm: widths and batch norms, see `mlp`.
    """

    losses: ClassVar[tuple[type[Loss], ...]] = (Agreement,)
    gathers: ClassVar[bool] = False

    both_ways: bool = True
    projector: tuple[int, ...] = (4096, 256)
    projector_norm: str = "hidden"
    predictor: tuple[int, ...] = (4096, 256)
    predictor_norm: str = "hidden"

    def __post_init__(self):
        super().__post_init__()
        check_mlp("predictor", self.predictor, self.predictor_norm)
        check_widths(self.projector, self.predictor)

    def make_state(self, parts: Parts, network: nn.Module, layers: list[nn.Module | None]) -> KeyState:
        heads = (self.projector, self.projector_norm), (self.predictor, self.predictor_norm)
        return KeyState.for_parts(parts, network, network, *heads, layers)

    def temperature_of(self, mixed: bool) -> float:
        return 1.0
