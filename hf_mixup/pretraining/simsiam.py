"""SimSiam."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_mixup.core.losses import Loss
from hf_mixup.pretraining.contrast import Name
from hf_mixup.pretraining.losses import Agreement
from hf_mixup.pretraining.predicting import Predicting
from hf_mixup.pretraining.state import Batch, ContrastState, unit


@dataclass(frozen=True)
class SimSiam(Predicting):
    """SimSiam (Chen and He, CVPR 2021, arXiv:2011.10566, algorithm 1; github.com/facebookresearch/simsiam): the prediction of one view
    should agree with the other view's projection, which gets no gradient.

    The loss is the mean of both directions. Deviation from OpenMixup: the gradient is stopped (OpenMixup's SimSiam does not, and may collapse).

    Args:
        predictor, predictor_norm: see `Predicting`.
    """

    losses: ClassVar[tuple[type[Loss], ...]] = (Agreement,)
    gathers: ClassVar[bool] = False

    both_ways: bool = True
    projector: tuple[int, ...] = (2048, 2048, 2048)
    projector_norm: str = "all_plain"
    predictor: tuple[int, ...] = (512, 2048)

    def temperature_of(self, mixed: bool) -> float:
        return 1.0

    @property
    def direction_weight(self) -> float:
        return 0.5

    def embed(
        self, state: ContrastState, network: nn.Module, queries: Mapping[Name, Batch], views: Mapping[int, Tensor], rng: torch.Generator
    ) -> tuple[dict[Name, Tensor], dict[int, Tensor]]:
        made = dict(zip(queries, state.projected(network, list(queries.values()), self.one_pass), strict=True))
        rows = {name: unit(state.predicted(row)) for name, row in made.items()}
        keys = {}
        for view, images in views.items():
            row = made.get(Name(False, view))
            if row is None:
                with torch.no_grad():
                    (row,) = state.projected(network, [Batch(images)], one_pass=False)
            keys[view] = unit(row.detach())
        return rows, keys
