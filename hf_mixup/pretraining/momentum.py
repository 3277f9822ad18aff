"""The base of MoCo, MoCo v3 and BYOL: a key network that is an EMA of the network in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_mixup.core.checks import check_between
from hf_mixup.networks.average import ema_momentum
from hf_mixup.pretraining.contrast import Contrast, Name
from hf_mixup.pretraining.state import Batch, KeyState, unit


@dataclass(frozen=True)
class Momentum(Contrast):
    """Keys come from an exponential moving average (EMA) of backbone and projector, which is updated after every optimizer step.

    So in a step it has the weights after the last step, as in the published order, where it is updated before keys are made.

    Args:
        momentum, end_momentum, momentum_scope: of the key network, see `ema_momentum`. It is constant if `end_momentum` is None.
    """

    momentum: float = 0.99
    end_momentum: float | None = 1.0
    momentum_scope: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_between(0, 1, momentum=self.momentum, end_momentum=self._end, momentum_scope=self.momentum_scope)
        if self._end < self.momentum:
            raise ValueError(f"end_momentum must be at least momentum, got {self.end_momentum} and {self.momentum}; set both.")

    def embed(
        self, state: KeyState, network: nn.Module, queries: Mapping[Name, Batch], views: Mapping[int, Tensor], rng: torch.Generator
    ) -> tuple[dict[Name, Tensor], dict[int, Tensor]]:
        made = state.projected(network, list(queries.values()), self.one_pass)
        rows = {name: unit(state.predicted(row)) for name, row in zip(queries, made, strict=True)}
        return rows, {view: self.keys_of(state, images, rng) for view, images in views.items()}

    def keys_of(self, state: KeyState, images: Tensor, rng: torch.Generator) -> Tensor:
        return state.keys(images)

    def after_optimizer_step(self, state: KeyState, network: nn.Module, step: int, total_steps: int) -> None:
        state.follow(network, ema_momentum(step, total_steps, self.momentum, self._end, self.momentum_scope, warmup=False))

    @property
    def _end(self) -> float:
        return self.momentum if self.end_momentum is None else self.end_momentum
