"""MoCo v3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from hf_mixup.pretraining.momentum import Momentum
from hf_mixup.pretraining.simclr import check_temperatures
from hf_mixup.pretraining.state import KeyState, check_mlp
from hf_mixup.steps.step import Parts


@dataclass(frozen=True)
class MoCoV3(Momentum):
    """MoCo v3 (Chen et al., ICCV 2021, arXiv:2104.02057; github.com/facebookresearch/moco-v3): in-batch keys of all processes, a
    predictor, no queue; `2 T` times the cross-entropy, both directions summed.

    Negatives are those of one batch, so accumulation of gradients is refused.

    Args:
        temperature: T; 1.0 for ResNets, 0.2 for ViTs.
        mix_temperature: the same for mixtures; `temperature` if None. The factor stays `2 T`.
        predictor, predictor_norm: widths and batch norms, see `mlp`.
    """

    in_batch: ClassVar[bool] = True

    both_ways: bool = True
    temperature: float = 0.2
    mix_temperature: float | None = None
    projector: tuple[int, ...] = (4096, 256)
    projector_norm: str = "all_plain"
    predictor: tuple[int, ...] = (4096, 256)
    predictor_norm: str = "hidden"

    def __post_init__(self):
        super().__post_init__()
        check_temperatures(self.temperature, self.mix_temperature)
        check_mlp("predictor", self.predictor, self.predictor_norm)
        check_widths(self.projector, self.predictor)

    def make_state(self, parts: Parts, network: nn.Module, layers: list[nn.Module | None]) -> KeyState:
        heads = (self.projector, self.projector_norm), (self.predictor, self.predictor_norm)
        return KeyState.for_parts(parts, network, network, *heads, layers)

    def temperature_of(self, mixed: bool) -> float:
        return self.mix_temperature if mixed and self.mix_temperature is not None else self.temperature

    @property
    def factor(self) -> float:
        return 2 * self.temperature


def check_widths(projector: tuple[int, ...], predictor: tuple[int, ...]) -> None:
    if projector[-1] != predictor[-1]:
        raise ValueError(f"predictor must end in the projector's width, got {predictor[-1]} and {projector[-1]}; make them equal.")
