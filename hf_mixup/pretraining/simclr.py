"""SimCLR."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_mixup.core.checks import check_between, check_switch
from hf_mixup.core.losses import Loss
from hf_mixup.core.plan import MixPlan
from hf_mixup.pretraining.contrast import Contrast, Name, hide
from hf_mixup.pretraining.state import Batch, ContrastState, unit
from hf_mixup.steps.step import Parts


@dataclass(frozen=True)
class SimCLR(Contrast):
    """SimCLR (Chen et al., ICML 2020, arXiv:2002.05709, equation 1), and the N-pair form that i-Mix uses (arXiv:2010.08887).

    Negatives come from one batch, so gradient accumulation is refused: it would change the loss. All images go through the backbone in one
    pass, with gradients in queries and keys.

    Deviation from OpenMixup's `SimCLRMix`, which cannot run: the formula is ours (its classes pair the wrong rows).

    Args:
        within_view: True is NT-Xent: embeddings of the same view compete too, except those of the images in a mixture; the loss is the mean
            of both directions. False is N-pair: only keys of the other view compete, and directions are summed.
        mixed_within_view: the same for mixtures (False in MixCo).
        temperature: divisor of the similarities; 0.1 to 0.5 in published settings.
        mix_temperature: the same for mixtures; `temperature` if None.
    """

    in_batch: ClassVar[bool] = True

    both_ways: bool = True
    within_view: bool = True
    mixed_within_view: bool = True
    temperature: float = 0.2
    mix_temperature: float | None = None
    projector_norm: str = "all"

    def __post_init__(self):
        super().__post_init__()
        check_temperatures(self.temperature, self.mix_temperature)
        check_switch(within_view=self.within_view, mixed_within_view=self.mixed_within_view)
        if self.within_view and not self.both_ways:
            raise ValueError("within_view needs both_ways=True, got False; set within_view=False for the N-pair loss.")
        if self.within_view and self.mixed_within_view and self.mixed and self.positives != "other":
            raise ValueError(
                f"positives must be 'other' with within_view, where the same view competes, got {self.positives!r}; set within_view=False."
            )

    def make_state(self, parts: Parts, network: nn.Module, layers: list[nn.Module | None]) -> ContrastState:
        return ContrastState.for_parts(parts, network, network, (self.projector, self.projector_norm), None, layers)

    def temperature_of(self, mixed: bool) -> float:
        return self.mix_temperature if mixed and self.mix_temperature is not None else self.temperature

    @property
    def direction_weight(self) -> float:
        return 0.5 if self.within_view else 1.0

    def embed(
        self, state: ContrastState, network: nn.Module, queries: Mapping[Name, Batch], views: Mapping[int, Tensor], rng: torch.Generator
    ) -> tuple[dict[Name, Tensor], dict[int, Tensor]]:
        batches = {**queries, **{Name(False, view): Batch(images) for view, images in views.items()}}
        made = dict(zip(batches, map(unit, state.projected(network, list(batches.values()), one_pass=True)), strict=True))
        return {name: made[name] for name in queries}, {view: made[Name(False, view)] for view in views}

    def _within(self, mixed: bool) -> bool:
        return self.within_view and (self.mixed_within_view or not mixed)

    def candidates(self, state: ContrastState, keys: Mapping[int, Tensor], own: int, other: int, mixed: bool) -> Tensor:
        return torch.cat([keys[other], keys[own]]) if self._within(mixed) else keys[other]

    def rivals(self, scores: Tensor, plan: MixPlan, numbers: Tensor, targets: Tensor, loss: Loss, mixed: bool, keys: int) -> Tensor:
        if not self._within(mixed):
            return scores
        sources = targets > 0
        sources = sources.scatter(1, numbers[plan.index[:, :1]], True)[:, :keys]  # the own image, even with share 0
        return hide(scores, torch.cat([torch.zeros_like(sources), sources], 1))


def check_temperatures(temperature: float, mix_temperature: float | None) -> None:
    check_between(1e-3, 1e3, temperature=temperature)
    if mix_temperature is not None:
        check_between(1e-3, 1e3, mix_temperature=mix_temperature)
