"""Folders of the scripts, the recipes and the published results: beside the package in a checkout, inside it when installed."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def _place(installed: str, in_a_checkout: str) -> Path:
    inside = _PACKAGE / installed
    return inside if inside.is_dir() else _PACKAGE.parent / in_a_checkout


SCRIPTS = _place("scripts", "training_scripts")
RECIPES = SCRIPTS / "recipes"
PUBLISHED = _place("model_cards", "model_cards") / "published_results.csv"
COSTS = PUBLISHED.with_name("published_costs.csv")
# sweep results that are kept with the code; an installed package has none
SWEEPS = _PACKAGE.parent / "benchmarks" / "results"
