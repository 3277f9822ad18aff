"""The base of steps that change hidden states during the forward pass of the images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from hf_mixup.core.checks import check_between, check_counts, check_known
from hf_mixup.core.plan import MixPlan, mix_others
from hf_mixup.core.planes import plane_shape, planes
from hf_mixup.core.rng import MixKey
from hf_mixup.networks.families import Layout, bare, module_of, reads_tokens, stage_names, word_embeddings
from hf_mixup.networks.passes import changing, check_changeable, logits_of
from hf_mixup.steps.standard import check_whole_images, finish
from hf_mixup.steps.step import MethodState, Parts, Step, StepOutput

Layers = tuple[int | float | str, ...]


class HiddenState(MethodState):
    """The layers that may be changed; None means the images."""

    def __init__(self, layers: list[nn.Module | None], layout: Layout | None = None):
        super().__init__()
        self.layers = tuple(layers)  # a tuple, so that they are not registered as modules of the state
        self.layout = layout

    @property
    def changed(self) -> list[nn.Module]:
        return [layer for layer in self.layers if layer is not None]


class Change(NamedTuple):
    """How the output of one layer is changed.

    Attributes:
        place: index of the layer in `layers`.
        maps: function from its maps (B, C, h, w) to new ones, in float32.
        tokens: function from the tokens before the patches (B, n, C), such as the class token, to new ones; None keeps them.
    """

    place: int
    maps: Callable[[Tensor], Tensor]
    tokens: Callable[[Tensor], Tensor] | None = None


class HiddenStep(Step):
    """One pass of the clean images that changes outputs of layers. Subclasses have the field `layers`."""

    takes_others: ClassVar[bool] = True
    layers: Layers

    def build(self, parts: Parts, network: nn.Module) -> MethodState:
        check_whole_images(parts, "mixup")
        return HiddenState.for_parts(parts, network, [layer_of(network, layer) for layer in self.layers], Layout.of(network))

    @abstractmethod
    def changes(self, parts: Parts, plan: MixPlan, key: MixKey, shape: torch.Size) -> list[Change]:
        """The changes of one pass. Draw the choice of a layer from `key.step_rng()`, which is equal on all processes, and draws for a layer from
        `key.layer_rng(place)`."""

    def labelled(self, plan: MixPlan, changes: list[Change]) -> MixPlan:
        """The plan whose weights mix the labels, after the pass."""
        return plan

    def one_layer(self, key: MixKey) -> int:
        return int(torch.randint(len(self.layers), (), generator=key.step_rng()))

    def run(
        self,
        parts: Parts,
        state: HiddenState,
        network: nn.Module,
        images: Tensor,
        targets: Tensor,
        key: MixKey,
    ) -> StepOutput:
        signals = state.before(images, targets)
        plan = parts.plan(images, key.own_rng(), signals)
        shape = plane_shape(images.shape)
        size, changes = tuple(shape[2:]), self.changes(parts, plan, key, shape)
        with ExitStack() as stack:
            for change in changes:
                layer = state.layers[change.place]
                if layer is None:
                    images = change.maps(planes(images).float()).to(images.dtype).view_as(images)
                else:
                    check_changeable(network, parts.name)
                    stack.enter_context(changing(layer, lambda output, change=change: changed_output(state.layout, output, size, change)))
            stack.enter_context(state.watching(signals, images))
            logits = logits_of(network, images, mix_others(plan, signals.others))
        return finish(parts, self.labelled(plan, changes), logits, targets, signals)


def changed_output(layout: Layout, output: Any, size: tuple[int, int], change: Change) -> Any:
    maps = layout.maps(output, size)
    with torch.autocast(maps.device.type, enabled=False):
        changed = change.maps(maps.float()).to(maps.dtype)
        return layout.put(changed, output, lambda tokens: changed_tokens(tokens, change))


def changed_tokens(tokens: Tensor, change: Change) -> Tensor:
    """The tokens before the patches (B, n, C) after the change, if there are any."""
    return tokens if change.tokens is None or tokens.shape[1] == 0 else change.tokens(tokens.float()).to(tokens.dtype)


def check_layers(layers: Layers) -> None:
    # names are checked when the network is known
    listed = isinstance(layers, (tuple, list))
    numbers = [layer for layer in layers if not isinstance(layer, (str, float))] if listed else layers
    for share in (layer for layer in layers if isinstance(layer, float)) if listed else ():
        check_between(0, 1, layers=share)
    if numbers or not layers:
        check_counts(0, layers=numbers)


def layer_of(network: nn.Module, layer: int | float | str) -> nn.Module | None:
    """The module of a layer. 0 is the input: None for images, the word embeddings for texts. k is stage k. A share between 0 and 1 is the stage
    at that share of the depth. A string is a module's name. Raises ValueError for a layer that does not exist."""
    if layer == 0:
        return word_embeddings(network) if reads_tokens(network) else None
    if isinstance(layer, str):
        check_known("layer", layer, [name for name, _ in bare(network).named_modules() if name])
        return module_of(network, layer)
    names = stage_names(network)
    if isinstance(layer, float):
        layer = max(1, round(layer * len(names)))
    if layer > len(names):
        raise ValueError(f"layers must be from 0 to {len(names)}, the stages of {type(bare(network)).__name__}, got {layer}; name fewer.")
    return module_of(network, names[layer - 1])
