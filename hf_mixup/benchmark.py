"""Benchmarks: what a row of the published tables was trained with, how they report runs, and tables of ours beside them."""

from __future__ import annotations

import copy
import csv
import functools
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from hf_mixup.arguments import ABOUT, load_recipe, read_recipe
from hf_mixup.backbones import same_architecture
from hf_mixup.checks import check_count, check_known

# methods of the published tables, as arguments of --mix; the token methods are trained in turns with Mixup
TABLE_METHODS: dict[str, tuple[str, ...]] = {
    "Vanilla": ("vanilla",),
    "MixUp": ("mixup",),
    "CutMix": ("cutmix",),
    "DeiT": ("mixup", "cutmix"),
    "RSB": ("mixup", "cutmix"),
    "ManifoldMix": ("manifoldmix",),
    "SmoothMix": ("smoothmix",),
    "SaliencyMix": ("saliencymix",),
    "AttentiveMix+": ("attentivemix",),
    "FMix": ("fmix",),
    "GridMix": ("gridmix",),
    "PuzzleMix": ("puzzlemix",),
    "Co-Mixup": ("comixup",),
    "SuperMix": ("supermix",),
    "ResizeMix": ("resizemix",),
    "AlignMix": ("alignmix",),
    "Grafting": ("saliencygrafting",),
    "TransMix": ("mixup", "transmix"),
    "TokenMix": ("mixup", "tokenmix"),
    "SMMix": ("mixup", "smmix"),
    "AutoMix": ("automix",),
    "SAMix": ("samix",),
}
MEASURES = ("median", "best", "last")


@dataclass(frozen=True)
class Reported:
    """How a table makes one number of a run: of its epochs' accuracies, the `median` of the last ones, the `best`, or the `last`.

    OpenMixup's tool takes the epochs from `epochs - last` on, which are `last + 1` of them; we take `last`, as its tables say.
    """

    measure: str = "last"
    last_epochs: int | None = None

    def __post_init__(self):
        check_known("measure", self.measure, MEASURES)
        if self.last_epochs is not None:
            check_count(1, last_epochs=self.last_epochs)

    def of(self, accuracies: Sequence[float]) -> float:
        """Of the accuracies of all epochs, in order."""
        last = list(accuracies)[-(self.last_epochs or len(accuracies)) :]
        return {"median": median, "best": max, "last": lambda values: values[-1]}[self.measure](last)

    def __str__(self) -> str:
        span = f" of the last {self.last_epochs} epochs" if self.last_epochs and self.measure != "last" else " epoch"
        return self.measure + span


@dataclass(frozen=True)
class Run:
    """A complete configuration: a recipe, and what is typed over it.

    Attributes:
        arguments: all that the recipe sets for these methods and this network.
        processes: how many the published run had.
        derived_from: where the configuration comes from, where upstream has none.
    """

    recipe: str
    mix: tuple[str, ...]
    architecture: str | None
    arguments: dict[str, Any]
    reported: Reported = Reported()
    processes: int = 1
    derived_from: str | None = None

    def words(self) -> list[str]:
        """Arguments of run_mixup.py."""
        words = ["--recipe", self.recipe, "--mix", *self.mix]
        if self.architecture is not None:
            words += ["--architecture", self.architecture]
        if "num_train_epochs" in self.arguments:
            words += ["--num_train_epochs", str(self.arguments["num_train_epochs"])]
        return words

    def command(self) -> str:
        launch = ["accelerate", "launch", *(["--num_processes", str(self.processes)] if self.processes > 1 else [])]
        return shlex.join([*launch, "training_scripts/run_mixup.py", *self.words()])


def configure(
    recipe: str, folder: Path, mix: Sequence[str], architecture: str | None = None, epochs: int | None = None, alpha: float | None = None
) -> Run:
    """The run of these methods on this network by a recipe. Raises ValueError for recipes and names that do not exist."""
    arguments = read_recipe(recipe, folder, mix=list(mix), architecture=architecture)
    if epochs is not None:
        arguments["num_train_epochs"] = epochs
    if alpha is not None:
        arguments["alpha"] = [alpha]
    about = _about(recipe, folder)
    return Run(
        recipe,
        tuple(mix),
        architecture or arguments.get("architecture"),
        {**arguments, "mix": list(mix)},
        Reported(about.get("measure", "last"), about.get("last_epochs")),
        about.get("processes", 1),
        about.get("derived_from", {}).get("+".join(mix)),
    )


def published(path: str | Path) -> list[dict[str, str]]:
    """The rows of published results: dataset, setting, backbone, epochs, method, alpha, top1, reproduced_by, source."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def resolve(row: Mapping[str, str], folder: Path) -> Run:
    """The configuration that a row of the published results was trained with. Raises ValueError where no recipe of `folder` says so."""
    check_known("method", row["method"], TABLE_METHODS)
    for recipe in _recipes(folder):
        if _is_of_table(row, recipe, folder):
            return configure(recipe, folder, TABLE_METHODS[row["method"]], row["backbone"], int(row["epochs"]))
    raise ValueError(f"a recipe must say that its table has {row['dataset']}/{row['setting']}/{row['backbone']}, got none; add `table:`.")


def published_value(rows: Iterable[Mapping[str, str]], run: Run, folder: Path) -> float | None:
    """What the tables have for a run, in percent. Of rows that contradict each other, the first."""
    for row in rows:
        if (
            _is_of_table(row, run.recipe, folder)
            and TABLE_METHODS.get(row["method"]) == run.mix
            and run.architecture is not None
            and same_architecture(row["backbone"], run.architecture)
            and float(row["epochs"]) == float(run.arguments.get("num_train_epochs", -1))
        ):
            return float(row["top1"])
    return None


@functools.cache
def _recipes(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


@functools.cache
def _cached_about(recipe: str, folder: Path) -> dict[str, Any]:
    return load_recipe(recipe, folder).get(ABOUT) or {}


def _about(recipe: str, folder: Path) -> dict[str, Any]:
    return copy.deepcopy(_cached_about(recipe, folder))


def _is_of_table(row: Mapping[str, str], recipe: str, folder: Path) -> bool:
    table = _about(recipe, folder).get("table")
    return table is not None and all(row[key] == str(value) for key, value in table.items())


# -- results ----------------------------------------------------------------------------------------------------------------


def accuracies(run_folder: str | Path) -> list[float]:
    """Top-1 accuracies by epoch, from the `train_log.jsonl` of a run. Raises ValueError where there are none."""
    path = Path(run_folder, "train_log.jsonl")
    if not path.is_file():
        raise ValueError(f"{run_folder} was expected to hold train_log.jsonl, got none; give the folder of a run of run_mixup.py.")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = [row["eval_top1"] for row in rows if "eval_top1" in row]
    if not found:
        raise ValueError(f"{path} was expected to hold evaluations, got none; train with --eval_strategy epoch.")
    return found


@dataclass(frozen=True)
class Summary:
    """Runs that differ in their seed alone, in percent.

    Attributes:
        values: one number a run.
        published: what the tables have.
    """

    values: tuple[float, ...]
    published: float | None = None

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def deviation(self) -> float | None:
        """Of the sample; None for a single run."""
        return stdev(self.values) if len(self.values) > 1 else None

    def shown(self, plus_minus: str = "±") -> str:
        if not self.values:
            return "-" if self.published is None else f"- / {self.published:.2f}"
        spread = "" if self.deviation is None else f" {plus_minus} {self.deviation:.2f}"
        beside = "" if self.published is None else f" / {self.published:.2f}"
        return f"{self.mean:.2f}{spread} ({len(self.values)}){beside}"


Table = Mapping[str, Mapping[str, Summary]]


def columns_of(table: Table) -> list[str]:
    return list(dict.fromkeys(column for cells in table.values() for column in cells))


def markdown_table(table: Table, caption: str = "") -> str:
    """`table[row][column]`; `-` where there is nothing."""
    columns = columns_of(table)
    lines = [f"| method | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for row, cells in table.items():
        lines.append(f"| {row} | {' | '.join(cells[c].shown() if c in cells else '-' for c in columns)} |")
    return "\n".join([*([caption, ""] if caption else []), *lines])


def latex_table(table: Table, caption: str = "") -> str:
    columns = columns_of(table)
    lines = [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{l{'c' * len(columns)}}}", r"\hline"]
    lines.append(" & ".join(["method", *map(_latex, columns)]) + r" \\ \hline")
    for row, cells in table.items():
        lines.append(" & ".join([_latex(row), *(cells[c].shown(r"$\pm$") if c in cells else "--" for c in columns)]) + r" \\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}", *([rf"\caption{{{_latex(caption)}}}"] if caption else []), r"\end{table}"])


def _latex(text: str) -> str:
    for character in "_%&#":
        text = text.replace(character, "\\" + character)
    return text.replace("±", r"$\pm$")
