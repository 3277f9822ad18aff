"""BYOL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_mixup.core.losses import Loss
from hf_mixup.pretraining.losses import Agreement
from hf_mixup.pretraining.momentum import Momentum
from hf_mixup.pretraining.predicting import Predicting
from hf_mixup.pretraining.state import ContrastState, KeyState


@dataclass(frozen=True)
class BYOL(Predicting, Momentum):
    """BYOL (Grill et al., NeurIPS 2020, arXiv:2006.07733): the prediction of the online network should agree with the target network.

    The loss is `2 - 2 sum_s w_s cos(query, key_s)` over the images in a mixture. There are no negatives, so accumulation of gradients changes only
    batch statistics. Mixtures go through the online network, as in i-Mix.

    Args:
        predictor, predictor_norm: see `Predicting`.
    """

    state: ClassVar[type[ContrastState]] = KeyState
    losses: ClassVar[tuple[type[Loss], ...]] = (Agreement,)
    gathers: ClassVar[bool] = False

    both_ways: bool = True
    projector: tuple[int, ...] = (4096, 256)
    projector_norm: str = "hidden"

    def temperature_of(self, mixed: bool) -> float:
        return 1.0
