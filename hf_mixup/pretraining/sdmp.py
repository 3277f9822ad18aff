"""SDMP, on MoCo v3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_mixup.core.checks import check_between, check_positive
from hf_mixup.core.losses import Loss
from hf_mixup.core.plan import MixPlan, blend
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import MixKey, beta
from hf_mixup.policies.resizemix import moved_boxes, paste_resized
from hf_mixup.pretraining.contrast import Name
from hf_mixup.pretraining.losses import LogOfMean
from hf_mixup.pretraining.momentum import Momentum
from hf_mixup.pretraining.predicting import Predicting
from hf_mixup.pretraining.processes import everyone
from hf_mixup.pretraining.state import Batch, ContrastState, KeyState, unit
from hf_mixup.steps.step import Parts, StepOutput


@dataclass(frozen=True)
class Paste(SamplePolicy):
    """Pastes the whole partner, shrunk, at a random place. The partners are the batch in reversed order.

    Args:
        alpha: both parameters of the Beta, above 0 of the own image's share, which is then clipped to 0.1 to 0.9.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"images"})

    alpha: float = 1.0

    def __post_init__(self):
        check_positive(alpha=self.alpha)

    def sides(self, count: int, rng: torch.Generator) -> Tensor:
        """Sides of the boxes, as shares of the image's sides: (count,) float64."""
        return (1 - (0.1 + 0.8 * beta(self.alpha, count, rng))).sqrt()

    def pasted(self, images: Tensor, sides: Tensor, rng: torch.Generator) -> MixPlan:
        """The plan for boxes with these sides, each at its own random place."""
        count, _, height, width = images.shape
        row, col = (torch.randint(length, (count,), generator=rng) for length in (height, width))
        edges, step = moved_boxes(sides, row, col, (height, width))
        return paste_resized(images, torch.arange(count).flip(0), edges, step, "bilinear")

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        return self.pasted(signals["images"], self.sides(shape[0], rng), rng)


@dataclass(frozen=True)
class SDMP(Predicting, Momentum):
    """SDMP (Ren et al., CVPR 2022, arXiv:2206.07692), for vision transformers, on MoCo v3: mixtures are positives of their sources, and of
    mixtures with common sources.

    Both views are mixed by boxes of the same sides, each at its own place. The loss is that of MoCo v3 for clean images in one direction, plus
    twice half of `2 T LogOfMean` for mixtures of the second view: once against keys of the first view, and once against keys of its mixtures.
    There the partner's mixture counts `c / (1 + c)`, where c is the share that both have in common. Which view is the first is random, the same
    on all processes.

    Deviations: the formula is ours (the released code, github.com/OliverRensu/SDMP, mixes no pixel, because its paste depends on a condition
    that is never true); if the whole image stays, the loss is MoCo v3's in both directions.

    Args:
        temperature: T.
        predictor, predictor_norm: see `Predicting`.
    """

    state: ClassVar[type[ContrastState]] = KeyState
    losses: ClassVar[tuple[type[Loss], ...]] = (LogOfMean,)
    in_batch: ClassVar[bool] = True

    temperature: float = 0.2
    projector: tuple[int, ...] = (4096, 4096, 256)
    projector_norm: str = "all_plain"
    predictor_norm: str = "all_plain"

    def __post_init__(self):
        super().__post_init__()
        check_between(1e-3, 1e3, temperature=self.temperature)
        fixed = {"positives": "other", "both_ways": False, "halved": False, "one_pass": False, "input_mix": 0, "layers": (0,)}
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} must be left out for sdmp, got {getattr(self, name)!r}; it has its own pairs of views.")

    def make_state(self, parts: Parts, network: nn.Module, layers: list[nn.Module | None]) -> ContrastState:
        if not isinstance(parts.sample, Paste):
            raise ValueError(f"sdmp takes the sample policy 'paste', got {type(parts.sample).__name__}; leave it out.")
        return super().make_state(parts, network, layers)

    def temperature_of(self, mixed: bool) -> float:
        return self.temperature

    @property
    def factor(self) -> float:
        return 2 * self.temperature

    def run(self, parts: Parts, state: KeyState, network: nn.Module, images: Tensor, targets: Any, key: MixKey) -> StepOutput:
        """`images` (B, 2, C, H, W); `targets` are not used."""
        rng, views = key.own_rng(), list(images.unbind(1))
        if float(torch.rand((), generator=key.step_rng())) < 0.5:
            views.reverse()
        sides = parts.sample.sides(len(images), rng)
        plans = [parts.sample.pasted(view, sides, rng).to(images.device) for view in views]
        return self.pasted(parts, state, network, views, plans, [blend(plan, view) for plan, view in zip(plans, views, strict=True)])

    def pasted(
        self, parts: Parts, state: KeyState, network: nn.Module, views: list[Tensor], plans: list[MixPlan], mixed: list[Tensor]
    ) -> StepOutput:
        """Runs the step with these draws: a plan and the mixtures (B, C, H, W) of each view, with the same shares."""
        made = state.projected(network, [Batch(views[0]), Batch(mixed[1])], one_pass=False)
        clean, mixture = (unit(state.predicted(row)) for row in made)
        first, second, first_mixed = (everyone(state.keys(images)) for images in (*views, mixed[0]))
        alone = MixPlan.identity(len(views[0])).to(views[0].device)
        together = plans[1].reweighted(in_common(plans[1]))
        found = []
        for query, keys, plan in ((clean, second, alone), (mixture, first, plans[1]), (mixture, first_mixed, together)):
            scores, wanted = self.compare(parts.loss, state, query, {0: keys}, Name(True, 0), 0, plan)
            found.append((self.factor * parts.loss(scores, wanted, plan), scores, wanted))
        losses, scores, wanted = found[1]
        loss = self.clean * found[0][0].mean() + self.mixed * (losses.mean() + found[2][0].mean()) / 2
        return StepOutput(loss, losses, scores, wanted, plans[1].weight[:, 0], plans[1])


def in_common(plan: MixPlan) -> Tensor:
    """(B, 2), summing to 1: the weights of the own mixture (1) and the partner's (the share of pixels from common images)."""
    lam = plan.weight[:, 0]
    other = lam[plan.index[:, 1]]
    common = torch.minimum(lam, 1 - other) + torch.minimum(1 - lam, other)
    return torch.stack([torch.ones_like(common), common], 1) / (1 + common)[:, None]
