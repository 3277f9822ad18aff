"""MoCo v3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_mixup.pretraining.momentum import Momentum
from hf_mixup.pretraining.predicting import Predicting
from hf_mixup.pretraining.simclr import check_temperatures
from hf_mixup.pretraining.state import ContrastState, KeyState


@dataclass(frozen=True)
class MoCoV3(Predicting, Momentum):
    """MoCo v3 (Chen et al., ICCV 2021, arXiv:2104.02057; github.com/facebookresearch/moco-v3): in-batch keys of all processes, a
    predictor, no queue. The loss is `2 T` times the cross-entropy, summed over both directions.

    Negatives come from one batch, so gradient accumulation is refused.

    Args:
        temperature: T; 1.0 for ResNets, 0.2 for ViTs.
        mix_temperature: the same for mixtures; `temperature` if None. The factor stays `2 T`.
        predictor, predictor_norm: see `Predicting`.
    """

    state: ClassVar[type[ContrastState]] = KeyState
    in_batch: ClassVar[bool] = True

    both_ways: bool = True
    temperature: float = 0.2
    mix_temperature: float | None = None
    projector: tuple[int, ...] = (4096, 256)
    projector_norm: str = "all_plain"

    def __post_init__(self):
        super().__post_init__()
        check_temperatures(self.temperature, self.mix_temperature)

    def temperature_of(self, mixed: bool) -> float:
        return self.mix_temperature if mixed and self.mix_temperature is not None else self.temperature

    @property
    def factor(self) -> float:
        return 2 * self.temperature
