"""Watches or changes a network for one pass only.

A pass is one call of the network. Hooks are added when it begins and removed when it ends, also after an exception. So a second method, a
second trainer, the user, and checkpointed layers that run again in the backward pass never run with these hooks. The values that were
read belong to the caller.

Hooks are always outside compiled code: `compile_around` compiles the parts between the watched modules.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_mixup.core.policy import NOTHING
from hf_mixup.networks.families import main_input_of


class Tap(NamedTuple):
    """A module, and a function that reads values when it runs.

    Attributes:
        read: function from the module's positional arguments and its output to the value that is kept.
    """

    module: nn.Module
    read: Callable[[tuple, Any], Any]


def output_of(module: nn.Module) -> Tap:
    """Reads a module's output."""
    return Tap(module, lambda args, output: output)


def input_of(module: nn.Module) -> Tap:
    """Reads a module's first argument."""
    return Tap(module, lambda args, output: args[0])


class Unseen:
    """Stands for a module that has not run."""


@contextmanager
def watching(taps: Sequence[Tap]) -> Iterator[list[Any]]:
    """Context manager: the list holds the last value that each tap read. At the end it raises ValueError if a module has not run."""
    seen: list[Any] = [Unseen] * len(taps)
    with ExitStack() as hooks:
        for place, tap in enumerate(taps):

            def passing(module: nn.Module, args: tuple, output: Any, place: int = place, tap: Tap = tap) -> None:
                seen[place] = tap.read(args, output)

            # first of all hooks: FSDP's takes the gathered parameters away, which reading attention needs
            hooks.callback(tap.module.register_forward_hook(passing, prepend=True).remove)
        yield seen
    missing = [type(tap.module).__name__ for tap, value in zip(taps, seen, strict=True) if value is Unseen]
    if missing:
        raise ValueError(
            f"the network was expected to run its {missing[0]}, got a pass without it; use a network that runs all of its blocks, "
            "or another method."
        )


def logits_of(network: nn.Module, images: Tensor, others: Mapping[str, Tensor] = NOTHING) -> Tensor:
    """The logits (B, num_labels) of one pass. `images` is the main input in its own shape, `others` the other inputs by name."""
    return network(**{main_input_of(network): images}, **others).logits


def watched(network: nn.Module, images: Tensor, taps: Sequence[Tap], others: Mapping[str, Tensor] = NOTHING) -> tuple[Tensor, list[Any]]:
    """As `logits_of`, plus the value that each tap read."""
    with watching(taps) as seen:
        logits = logits_of(network, images, others)
    return logits, seen


@contextmanager
def changing(module: nn.Module, change: Callable[[Any], Any]) -> Iterator[None]:
    """Context manager: `change(output)` replaces the module's output.

    The change is missing when checkpointed layers run again in the backward pass. So a layer of transformers is not checkpointed in this
    pass: before release 5.19 its hooks would run again too. timm's blocks are refused by `check_changeable`.

    Raises ValueError after a pass in which the module did not run exactly once: labels would be mixed, but hidden states not, or several times.
    """
    checkpointed, runs = getattr(module, "gradient_checkpointing", False), 0

    def changed(module: nn.Module, args: tuple, output: Any) -> Any:
        nonlocal runs
        runs += 1
        return change(output)

    handle = module.register_forward_hook(changed)
    try:
        if checkpointed:
            module.gradient_checkpointing = False
        yield
    finally:
        handle.remove()
        if checkpointed:
            module.gradient_checkpointing = True
    if runs != 1:
        raise ValueError(
            f"a layer that is changed must run once in a pass, got a {type(module).__name__} that ran {runs} times; name another one in layers."
        )


def check_changeable(network: nn.Module, method: str, *, checkpointed: bool = False, changed: Iterable[nn.Module] = ()) -> None:
    """Raises ValueError for timm's activation checkpointing: timm runs whole blocks again, including hooks. transformers keeps hooks outside, but
    not those of parts of a layer.

    Args:
        checkpointed: whether it will be switched on.
        changed: the modules that are changed.
    """
    flags = [module.grad_checkpointing for module in network.modules() if hasattr(module, "grad_checkpointing")]
    if (flags and checkpointed) or any(flag is True for flag in flags):
        raise ValueError(
            f"{method} changes features inside the blocks that timm's activation checkpointing runs again, got a network with it; switch it "
            "off for this method, or use a network of transformers."
        )
    changed = set(changed)
    for layer in network.modules() if changed else ():
        if getattr(type(layer), "gradient_checkpointing", None) is not None and (checkpointed or layer.gradient_checkpointing):
            part = next((module for module in layer.modules() if module in changed and module is not layer), None)
            if part is not None:
                raise ValueError(
                    f"{method} must change whole layers where activation checkpointing runs them again, got a {type(part).__name__} inside a "
                    f"{type(layer).__name__}; name the layer in layers, or switch it off."
                )


# -- compilation ------------------------------------------------------------------------------------------------------------


def compile_around(network: nn.Module, taken: Iterable[nn.Module], **options: Any) -> None:
    """Compiles a network in place, so that hooks on the modules `taken` are outside compiled code.

    A graph does not contain hooks that are added later. `torch.compile` also keeps graphs by code, so one network can get the graph of another
    one of its class. Where hooks will be added, the largest parts without a hook are compiled instead of the whole network. `options` are those
    of `torch.compile`. What was compiled before is not used any more.
    """
    taken = set(taken)
    uncompile(network)
    network._compiled_around = True
    if not taken:
        network.compile(**options)
        return
    holding = {module for module in network.modules() if any(inner in taken for inner in module.modules() if inner is not module)}

    def visit(module: nn.Module) -> None:
        if module not in holding:
            if any(True for _ in module.parameters()):
                module.forward = Compiled(module.forward, **options)
            return
        for child in module.children():
            visit(child)

    visit(network)


def check_uncompiled(network: nn.Module, taken: Iterable[nn.Module], method: str) -> None:
    """Raises ValueError if one of the modules `taken` is in a part that the user has compiled. Hooks that come after the first pass do nothing there."""
    taken = set(taken)
    parts = [module for module in network.modules() if module._compiled_call_impl is not None]
    if any(inner in taken for part in parts for inner in part.modules()):
        raise ValueError(
            f"{method} must watch modules of the network, got them inside compiled code, where it cannot; leave out torch.compile, and pass torch_compile=True "
            "to the trainer, which compiles the rest."
        )


def uncompile(network: nn.Module) -> None:
    """Undoes `compile_around`: an earlier model's graphs know nothing of the hooks of this one."""
    if not getattr(network, "_compiled_around", False):
        return
    network._compiled_around, network._compiled_call_impl = False, None
    for module in network.modules():
        if isinstance(module.__dict__.get("forward"), Compiled):
            del module.forward


class Compiled:
    """The compiled `forward` of a module. A copy of the module, such as an average, has its own forward, which is not compiled."""

    def __init__(self, forward: types.MethodType, **options: Any):
        self.plain, self.graphs = forward, torch.compile(_own_code(forward), **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.graphs(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> types.MethodType:
        return copy.deepcopy(self.plain, memo)  # of the copied module


def _own_code(method: types.MethodType) -> Callable:
    """The same method with its own code object. `torch.compile` counts graphs by code object, and stops compiling after a few."""
    function = method.__func__
    code = function.__code__.replace()
    own = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return types.MethodType(own, method.__self__)
