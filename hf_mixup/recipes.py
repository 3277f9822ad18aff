"""Recipes: YAML files of arguments, with overrides for single methods and networks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_mixup.arguments import known_arguments
from hf_mixup.core.checks import nearest
from hf_mixup.core.precision import has_bfloat16
from hf_mixup.networks.names import same_architecture

# keys of a recipe that are not arguments
OVERLAYS = ("for_method", "for_backbone")
ABOUT = "benchmark"
EXTENDS = "extends"


def read_recipe(
    name: str,
    folder: Path,
    known: set[str] | None = None,
    mix: list[str] | None = None,
    network: str | None = None,
    usual: Sequence[str] = ("mixup", "cutmix"),
) -> dict[str, Any]:
    """The arguments of a recipe, for these methods and this network.

    A recipe maps arguments to values. `for_method` holds arguments for one choice of methods, with names joined by `+` as in `mixup+cutmix`.
    `for_backbone` holds arguments for one network, an architecture or a checkpoint, and may have its own `for_method`:

        alpha: [1.0]
        for_method: {cutmix: {alpha: [0.2]}}
        for_backbone: {ResNeXt-50-32x4d: {learning_rate: 0.05, for_method: {cutmix: {alpha: [1.0]}}}}

    A recipe with `extends: NAME` has everything of the recipe NAME, except for the keys that it sets itself.

    `bf16: auto` is true if the hardware computes in bfloat16, and false if it would emulate it.

    Later entries of this list override earlier ones: the recipe, `for_backbone`, `for_method`, `for_method` inside `for_backbone`. `benchmark`
    sets how results are reported; see `benchmark.py`.

    Args:
        name: a YAML file, or the name of one in `folder`.
        known: names of allowed arguments; those of run_mixup.py if None.
        mix: the methods on the command line; the recipe's own if None.
        network: the architecture or checkpoint on the command line; the recipe's own if None.
        usual: the methods of a script if neither says any.

    Raises:
        ValueError: for unknown names and keys, anywhere in the file, and for methods that have arguments in another order.
    """
    known = known_arguments() if known is None else known
    values = load_recipe(name, folder)
    values.pop(ABOUT, None)
    methods, backbones = (_overlays(values, key, name) for key in OVERLAYS)
    chosen = values.get("mix", list(usual)) if mix is None else mix
    chosen = [chosen] if isinstance(chosen, str) else chosen
    if not isinstance(chosen, list) or not all(isinstance(method, str) for method in chosen):
        raise ValueError(f"recipe {name!r} must list names of methods under 'mix', got {chosen!r}; write [mixup, cutmix].")
    chosen = "+".join(chosen)
    network = network or values.get("architecture") or values.get("model_name_or_path")
    general, special, unused = [values], list[dict[str, Any]](), list[dict[str, Any]]()
    for backbone, overlay in backbones.items():
        matches = network is not None and same_architecture(backbone, network)
        within = _overlays(overlay, "for_method", name)
        (general if matches else unused).append(overlay)
        for method, arguments in within.items():
            (special if matches and _are_for(method, chosen, name) else unused).append(arguments)
    for method, arguments in methods.items():
        (general if _are_for(method, chosen, name) else unused).append(arguments)
    layers = [*general, *special]
    for layer in [*layers, *unused]:
        for key in layer:
            if key not in known:
                raise ValueError(f"recipe {name!r} must set arguments of this script, got {key!r}; {nearest(key, known)}")
    values = {key: value for layer in layers for key, value in layer.items()}
    if values.get("bf16") == "auto":
        values["bf16"] = has_bfloat16()
    return values


def _are_for(methods: str, chosen: str, recipe: str) -> bool:
    """Whether arguments for `methods` are for the chosen ones. Raises ValueError for another order, as lists such as alpha follow it."""
    if methods != chosen and sorted(methods.split("+")) == sorted(chosen.split("+")):
        raise ValueError(
            f"methods must be in the order in which recipe {recipe!r} has arguments for them, {methods}, got {chosen}; swap them."
        )
    return methods == chosen


def _overlays(values: dict[str, Any], key: str, recipe: str) -> dict[str, dict[str, Any]]:
    """Removes and returns the entry `key`: arguments by name."""
    found = values.pop(key, None) or {}
    if not isinstance(found, dict) or not all(isinstance(arguments, dict) for arguments in found.values()):
        raise ValueError(f"recipe {recipe!r} must map names to arguments under {key!r}, got {found!r}; write `cutmix: {{alpha: [0.2]}}`.")
    return {name: dict(arguments) for name, arguments in found.items()}


def load_recipe(name: str, folder: Path) -> dict[str, Any]:
    """Reads a recipe, with what it extends: a YAML file, or the name of one in `folder`. Raises ValueError if there is none."""
    values = _written(name, folder)
    if EXTENDS not in values:
        return values
    base = _written(str(values.pop(EXTENDS)), folder)
    if EXTENDS in base:
        raise ValueError(f"recipe {name!r} must extend a recipe that extends none, got one that extends {base[EXTENDS]!r}; name that one.")
    return base | values


def _written(name: str, folder: Path) -> dict[str, Any]:
    import yaml

    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        names = sorted(file.stem for file in folder.glob("*.yaml"))
        if name not in names:
            raise ValueError(f"recipe must be a YAML file or a known name, got {name!r}; {nearest(name, names)}")
        path = folder / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"recipe must be a YAML file that exists, got {name!r}; check the path.")
    try:
        values = copy.deepcopy(_parsed(path.read_text()))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {name!r} must be plain YAML, got {' '.join(str(error).split())}; correct the file.") from None
    if not isinstance(values, dict):
        raise ValueError(f"recipe {name!r} must map arguments to values, got {type(values).__name__}; write one `key: value` on each line.")
    return values


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> Any:
    """Parses YAML; a key that occurs twice is an error. Cached, because parsing takes longer than the rest of the work on a recipe."""
    import yaml

    class Once(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value]
            twice = next((key for key, _ in node.value if names.count(key.value) > 1), None)
            if twice is not None:
                repeated = yaml.constructor.ConstructorError(None, None, f"{twice.value!r} several times", twice.start_mark)
                raise repeated  # the caller makes the sentence
            return super().construct_mapping(node, deep)

    return yaml.load(text, Once)
