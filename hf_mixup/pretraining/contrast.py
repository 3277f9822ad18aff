"""The step of all contrastive bases: instances are the classes, similarities are the logits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from hf_mixup.core.checks import check_between, check_count, check_counts, check_known, check_switch
from hf_mixup.core.losses import CrossEntropy, Loss
from hf_mixup.core.plan import MixPlan, blend, mix_targets
from hf_mixup.core.policy import AreaLabels, Signals
from hf_mixup.core.rng import MixKey
from hf_mixup.networks.passes import check_changeable
from hf_mixup.pretraining.losses import LogOfMean, Separate
from hf_mixup.pretraining.policies import auxiliary_plan, first_half
from hf_mixup.pretraining.processes import everyone, processes
from hf_mixup.pretraining.state import Batch, ContrastState, check_mlp
from hf_mixup.steps.hidden import layer_of
from hf_mixup.steps.standard import check_whole_images
from hf_mixup.steps.step import Parts, Step, StepOutput

POSITIVES = ("other", "same", "both")


class Mixture(NamedTuple):
    """Mixed images of one view: the plan, and the batch (B, C, H, W)."""

    plan: MixPlan
    batch: Batch


class Name(NamedTuple):
    """The images of an embedding.

    Attributes:
        mixed: whether they are mixtures.
        view: 0 or 1.
    """

    mixed: bool
    view: int


@dataclass(frozen=True)
class Contrast(Step):
    """Pre-training on two views (B, 2, C, H, W) of every image: i-Mix (Lee et al., ICLR 2021, arXiv:2010.08887) in general.

    Instance numbers are the labels. The sample policy plans, `blend` mixes a view, and the embedding of a mixture is compared with the keys of
    clean images. Similarities (B, M), divided by the temperature, are the logits. `mix_targets` of the numbers are the targets. The method's
    loss decides who competes with whom: `CrossEntropy` (i-Mix, MixCo) or `Separate` (Un-Mix, MoCoMix, SAMix). Keys are gathered from all
    processes. Similarities are float32, also under autocast.

    Args:
        clean, mixed: weights of the loss of the clean images and of the mixtures.
        positives: which keys a mixture of one view should find: those of the `other` view, of the `same` view (MoCoMix), or `both`
            (Un-Mix with `both_ways`, which then mixes only the first view).
        both_ways: each view finds the other's keys; otherwise only the first view finds those of the second.
        halved: use only the first half of the batch's mixtures (MixCo).
        one_pass: clean images and mixtures go through the backbone at once, with common batch statistics (MixCo).
        input_mix: first average every image with this many others, without a change of targets (i-Mix); 0 for none.
        layers: where mixtures are made; one layer is drawn for each step: 0 for the images, k for stage k, or a module's name.
        projector: widths of its layers.
        projector_norm: its batch norms, see `mlp`.
    """

    views: ClassVar[int] = 2
    losses: ClassVar[tuple[type[Loss], ...]] = (CrossEntropy, Separate, LogOfMean)
    gathers: ClassVar[bool] = True
    in_batch: ClassVar[bool] = False  # whether negatives come from one batch, so that gradient accumulation changes the loss

    clean: float = 1.0
    mixed: float = 1.0
    positives: str = "other"
    both_ways: bool = False
    halved: bool = False
    one_pass: bool = False
    input_mix: int = 0
    layers: tuple[int | str, ...] = (0,)
    projector: tuple[int, ...] = (2048, 128)
    projector_norm: str = "hidden"

    def __post_init__(self):
        check_between(0, 1e3, clean=self.clean, mixed=self.mixed)
        if not (self.clean or self.mixed):
            raise ValueError("pre-training needs a loss, got clean=0 and mixed=0; set one of them.")
        check_known("positives", self.positives, POSITIVES)
        check_switch(both_ways=self.both_ways, halved=self.halved, one_pass=self.one_pass)
        if self.positives == "both" and not self.both_ways:
            raise ValueError("positives='both' needs both_ways=True, got False; set it, or set positives='other'.")
        check_count(0, input_mix=self.input_mix)
        numbers = [layer for layer in self.layers if not isinstance(layer, str)]
        if numbers or not self.layers:
            check_counts(0, layers=tuple(numbers))
        if self.halved and tuple(self.layers) != (0,):
            raise ValueError(f"halved mixes images, got layers={self.layers!r}; leave one of them out.")
        check_mlp("projector", self.projector, self.projector_norm)

    # -- defined by each base ------------------------------------------------------------------------------------------------

    @abstractmethod
    def make_state(self, parts: Parts, network: nn.Module, layers: list[nn.Module | None]) -> ContrastState:
        """The state for this network."""

    @abstractmethod
    def embed(
        self, state: ContrastState, network: nn.Module, queries: Mapping[Name, Batch], views: Mapping[int, Tensor], rng: torch.Generator
    ) -> tuple[dict[Name, Tensor], dict[int, Tensor]]:
        """(B, d) float32 of length 1: the queries, and the keys of the `key_views` (B, C, H, W)."""

    @abstractmethod
    def temperature_of(self, mixed: bool) -> float:
        """The divisor of similarities."""

    @property
    def direction_weight(self) -> float:
        """Weight of the loss of each direction."""
        return 1.0

    def candidates(self, state: ContrastState, keys: Mapping[int, Tensor], own: int, other: int, mixed: bool) -> Tensor:
        """The candidates (M, d) for the queries of view `own`; the keys of view `other` come first."""
        return keys[other]

    def rivals(self, scores: Tensor, plan: MixPlan, numbers: Tensor, targets: Tensor, loss: Loss, mixed: bool, keys: int) -> Tensor:
        """The similarities (B, M). Those that do not compete get the smallest number. The first `keys` columns are keys of images."""
        return scores

    # -- the step --------------------------------------------------------------------------------------------------------

    def build(self, parts: Parts, network: nn.Module) -> ContrastState:
        if type(parts.loss) not in self.losses:
            known = ", ".join(loss.__name__.lower() for loss in self.losses)
            raise ValueError(f"{type(self).__name__} must have the loss {known}, got {type(parts.loss).__name__}; choose one of those.")
        if parts.loss != type(parts.loss)() and isinstance(parts.loss, CrossEntropy):
            raise ValueError(f"instances have no weights and no smoothing, got {parts.loss}; leave them out.")
        unknown = sorted(parts.sample.needs - {"images"})
        if unknown or parts.label != AreaLabels():
            needs = " and ".join(unknown) or type(parts.label).__name__
            raise ValueError(
                f"mixing without labels takes policies that need images only, got {parts.name!r}, which needs {needs}; choose another."
            )
        if self.halved or any(layer != 0 for layer in self.layers):
            check_whole_images(parts, "imix")
        return self.make_state(parts, network, [layer_of(network, layer) for layer in self.layers])

    def run(self, parts: Parts, state: ContrastState, network: nn.Module, images: Tensor, targets: Any, key: MixKey) -> StepOutput:
        """`images` (B, 2, C, H, W); `targets` are not used."""
        rng = key.own_rng()
        views = list(images.unbind(1))
        if self.input_mix:
            views = list(blend(auxiliary_plan(2 * len(images), self.input_mix, rng), torch.cat(views)).chunk(2))
        layer = state.layers[int(torch.randint(len(state.layers), (), generator=key.step_rng()))]
        if layer is not None:
            check_changeable(network, parts.name)
        mixtures = {view: self.mixture(parts, views[view], layer, rng) for view in self.mixed_views}
        return self.step(parts, state, network, views, mixtures, rng)

    @property
    def mixed_views(self) -> tuple[int, ...]:
        """The views that are mixed."""
        if not self.mixed:
            return ()
        return (0, 1) if self.both_ways and self.positives != "both" else (0,)

    def mixture(self, parts: Parts, images: Tensor, layer: nn.Module | None, rng: torch.Generator) -> Mixture:
        plan = parts.sample.plan(images.shape, rng, Signals(images.device, images=images)).to(images.device)
        if layer is not None:
            return Mixture(plan, Batch(images, layer, plan))
        if self.halved:
            plan = first_half(plan, images)
            return Mixture(plan, Batch(blend(plan, images[: len(plan.index)])))
        return Mixture(plan, Batch(blend(plan, images)))

    def step(
        self,
        parts: Parts,
        state: ContrastState,
        network: nn.Module,
        views: list[Tensor],
        mixtures: Mapping[int, Mixture],
        rng: torch.Generator,
    ) -> StepOutput:
        """Runs the step with the drawn mixtures by view."""
        terms = [(Name(False, own), 1 - own) for own in range(1 + self.both_ways)] if self.clean else []
        others = {"other": lambda view: [1 - view], "same": lambda view: [view], "both": lambda view: [1, 0]}[self.positives]
        terms += [(Name(True, view), other) for view in mixtures for other in others(view)]
        queries = {name: mixtures[name.view].batch if name.mixed else Batch(views[name.view]) for name, _ in terms}
        wanted = self.key_views(terms)
        embedded, keys = self.embed(state, network, queries, {view: views[view] for view in wanted}, rng)
        keys = {view: everyone(rows) for view, rows in keys.items()} if self.gathers else keys
        alone = MixPlan.identity(len(views[0])).to(views[0].device)
        loss, shown = 0.0, None
        for name, other in terms:
            plan = mixtures[name.view].plan if name.mixed else alone
            scores, targets = self.compare(parts.loss, state, embedded[name], keys, name, other, plan)
            losses = self.factor * parts.loss(scores, targets, plan)
            loss = loss + (self.mixed if name.mixed else self.clean) * self.direction_weight * losses.mean()
            if shown is None or (name.mixed and not shown[0]):
                shown = name.mixed, losses, scores, targets, plan
        _, losses, scores, targets, plan = shown
        return StepOutput(loss, losses, scores, targets, plan.weight[:, 0], plan, self.memory(keys))

    @property
    def factor(self) -> float:
        """Of every loss."""
        return 1.0

    def key_views(self, terms: list[tuple[Name, int]]) -> list[int]:
        """The views whose keys are needed."""
        return sorted({other for _, other in terms})

    def memory(self, keys: Mapping[int, Tensor]) -> dict[str, Tensor] | None:
        """Tensors that the state will remember."""
        return None

    def compare(
        self, loss: Loss, state: ContrastState, queries: Tensor, keys: Mapping[int, Tensor], name: Name, other: int, plan: MixPlan
    ) -> tuple[Tensor, Tensor]:
        """The similarities (B, M) of the queries to all candidates, and the targets (B, M), float32."""
        rank = processes()[0] if self.gathers else 0
        rows = len(keys[other]) // (processes()[1] if self.gathers else 1)
        numbers = rank * rows + torch.arange(rows, device=queries.device)  # each image's own column
        with torch.autocast(queries.device.type, enabled=False):
            candidates = self.candidates(state, keys, name.view, other, name.mixed)
            scores = queries @ candidates.T / self.temperature_of(name.mixed)
        targets = mix_targets(plan, numbers, len(candidates))
        return self.rivals(scores, plan, numbers, targets, loss, name.mixed, len(keys[other])), targets


def hide(scores: Tensor, hidden: Tensor) -> Tensor:
    """Sets similarities where `hidden` to the smallest number, so that they do not compete."""
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
