"""Benchmarks: the configuration of each row of the published tables, how they report runs, and tables that compare."""

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

import torch

from hf_mixup.core.checks import check_count, check_known, check_object
from hf_mixup.core.places import COSTS, PUBLISHED, RECIPES
from hf_mixup.methods import METHODS
from hf_mixup.networks.backbones import from_scratch
from hf_mixup.networks.names import same_architecture
from hf_mixup.recipes import ABOUT, load_recipe, read_recipe
from hf_mixup.report.run_folder import LOG_NAME

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
    "AdAutoMix": ("adautomix",),
}
# keys of a recipe's `benchmark`: the rows of the published results that it reproduces, how they are reported, the number of runs that they are
# the mean of, the number of processes they had; sources of configurations that upstream lacks, by methods; the methods of a sweep by network,
# and the number of evaluation images for the corruption error; by network, the published rows whose ranking is compared; and, by the networks'
# names in the tables, the checkpoints that are fine-tuned
FACTS = ("table", "measure", "last_epochs", "runs", "processes", "derived_from", "sweep", "corrupted_images", "order", "checkpoints")
MEASURES = ("median", "best", "last")


@dataclass(frozen=True)
class Reported:
    """How a table turns a run into one number: the `median` of the last epochs' accuracies, the `best`, or the `last` one.

    OpenMixup's tool uses the epochs from `epochs - last` on, which are `last + 1`; this uses `last`, as its tables say.
    """

    measure: str = "last"
    last_epochs: int | None = None

    def __post_init__(self):
        check_known("measure", self.measure, MEASURES)
        if self.last_epochs is not None:
            check_count(1, last_epochs=self.last_epochs)

    @classmethod
    def by(cls, facts: Mapping[str, Any]) -> Reported:
        """As a recipe says it, in what `about` gives."""
        return cls(facts.get("measure", "last"), facts.get("last_epochs"))

    def of(self, accuracies: Sequence[float]) -> float:
        """The number for the accuracies of all epochs, in order."""
        last = list(accuracies)[-(self.last_epochs or len(accuracies)) :]
        return {"median": median, "best": max, "last": lambda values: values[-1]}[self.measure](last)

    def __str__(self) -> str:
        span = f" of the last {self.last_epochs} epochs" if self.last_epochs and self.measure != "last" else " epoch"
        return self.measure + span


@dataclass(frozen=True)
class Run:
    """A complete configuration: a recipe, and arguments that override it.

    Attributes:
        architecture: the network's name.
        arguments: all arguments that the recipe sets for these methods and this network.
        processes: number of processes of the published run.
        derived_from: source of the configuration, if upstream has none.
        checkpoint: the checkpoint to fine-tune, if the recipe has one for the network.
        epochs: the number of epochs, if anything says it.
    """

    recipe: str
    mix: tuple[str, ...]
    architecture: str | None
    arguments: dict[str, Any]
    reported: Reported = Reported()
    processes: int = 1
    derived_from: str | None = None
    checkpoint: str | None = None
    epochs: float | None = None

    def words(self) -> list[str]:
        """The run as arguments of run_mixup.py."""
        words = ["--recipe", self.recipe, "--mix", *self.mix]
        if self.checkpoint is not None:
            words += ["--model_name_or_path", self.checkpoint]
        elif self.architecture is not None:
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
    """The run of these methods with this network by a recipe. Raises ValueError for unknown recipes and names."""
    facts = about(recipe, folder)
    checkpoint = facts.get("checkpoints", {}).get(architecture)
    arguments = read_recipe(recipe, folder, mix=list(mix), network=checkpoint or architecture)
    if checkpoint is not None:
        arguments["model_name_or_path"] = checkpoint
    if epochs is not None:
        arguments["num_train_epochs"] = epochs
    if alpha is not None:
        arguments["alpha"] = [alpha]
    return Run(
        recipe,
        tuple(mix),
        architecture or arguments.get("architecture"),
        {**arguments, "mix": list(mix)},
        Reported.by(facts),
        facts.get("processes", 1),
        _derived(facts, mix, architecture),
        checkpoint,
        arguments.get("num_train_epochs"),
    )


def _derived(facts: Mapping[str, Any], mix: Sequence[str], architecture: str | None) -> str | None:
    """The source of a configuration that upstream lacks: for the methods, or for the methods with one network."""
    found = facts.get("derived_from", {})
    name = "+".join(mix)
    return found.get(f"{name}, {architecture}") or found.get(name)


def published(path: str | Path) -> list[dict[str, str]]:
    """The rows of published results: dataset, setting, backbone, epochs, method, alpha, top1, reproduced_by, source."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def resolve(row: Mapping[str, str], folder: Path) -> Run:
    """The configuration of a row of the published results. Raises ValueError if no recipe in `folder` has it."""
    check_known("method", row["method"], TABLE_METHODS)
    for recipe in _recipes(folder):
        if _is_of_table(row, recipe, folder):
            return configure(recipe, folder, TABLE_METHODS[row["method"]], row["backbone"], int(row["epochs"]))
    raise ValueError(f"a recipe must list in its table {row['dataset']}/{row['setting']}/{row['backbone']}, got none; add `table:`.")


def published_value(rows: Iterable[Mapping[str, str]], run: Run, folder: Path) -> float | None:
    """The published accuracy of a run, in percent, or None. If rows contradict each other, the first."""
    for row in rows:
        if (
            _is_of_table(row, run.recipe, folder)
            and TABLE_METHODS.get(row["method"]) == run.mix
            and run.architecture is not None
            and same_architecture(row["backbone"], run.architecture)
            and float(row["epochs"]) == run.epochs
        ):
            return float(row["top1"])
    return None


@functools.cache
def _recipes(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


@functools.cache
def _read_about(recipe: str, folder: Path) -> dict[str, Any]:
    facts, where = load_recipe(recipe, folder).get(ABOUT) or {}, f"what stands under {ABOUT!r} of recipe {recipe!r}"
    check_object(where, facts, "`measure: last`")
    for key in facts:
        check_known(where, key, FACTS)
    for key in ("table", "derived_from", "sweep", "checkpoints"):
        check_object(f"{key!r} of recipe {recipe!r}", facts.get(key, {}), "a line `name: value` for each")
    for network, mix in facts.get("sweep", {}).items():
        if not isinstance(mix, list) or not all(isinstance(name, str) for name in mix):
            raise ValueError(f"'sweep' of recipe {recipe!r} must list methods for {network!r}, got {mix!r}; write [vanilla, mixup].")
    return facts


def about(recipe: str, folder: Path) -> dict[str, Any]:
    """The `benchmark` entry of a recipe, see `FACTS`."""
    return copy.deepcopy(_read_about(recipe, folder))


def _is_of_table(row: Mapping[str, str], recipe: str, folder: Path) -> bool:
    table = about(recipe, folder).get("table")
    return table is not None and all(row[key] == str(value) for key, value in table.items())


# -- results ----------------------------------------------------------------------------------------------------------------


def accuracies(run_folder: str | Path) -> list[float]:
    """Top-1 accuracies by epoch, from the `train_log.jsonl` of a run. Raises ValueError if there are none."""
    path = Path(run_folder, LOG_NAME)
    if not path.is_file():
        raise ValueError(f"{run_folder} was expected to hold {LOG_NAME}, got none; give the folder of a run of run_mixup.py.")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = [row["eval_top1"] for row in rows if "eval_top1" in row]
    if not found:
        raise ValueError(f"{path} was expected to hold evaluations, got none; train with --eval_strategy epoch.")
    return found


@dataclass(frozen=True)
class Summary:
    """Results of runs that differ only in their seed, in percent.

    Attributes:
        values: one number for each run.
        published: the number in the published tables.
    """

    values: tuple[float, ...]
    published: float | None = None

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation; None for a single run."""
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
    """`table[row][column]` as Markdown; `-` for missing cells."""
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


# -- cards of published results ---------------------------------------------------------------------------------------------

DATASETS = {
    "imagenet1k": "ImageNet-1k",
    "cifar10": "CIFAR-10",
    "tiny_imagenet": "Tiny-ImageNet",
    "inaturalist2018": "iNaturalist-2018",
    "cifar100": "CIFAR-100",
    "cub200": "CUB-200-2011",
    "aircraft": "FGVC-Aircraft",
    "cars": "Stanford Cars",
    "inaturalist2017": "iNaturalist-2017",
    "places205": "Places205",
}
OPENMIXUP = """@article{li2022openmixup,
  title = {OpenMixup: A Comprehensive Mixup Benchmark for Visual Classification},
  author = {Siyuan Li and Zedong Wang and Zicheng Liu and Di Wu and Cheng Tan and Stan Z. Li},
  journal = {arXiv:2209.04851},
  year = {2022}
}"""


# costs in the sources: their names, and their titles in a card
COST_TITLES = {"memory_gb": "memory (GB), published", "hours": "hours, published"}


def published_cards(results: Path, folder: Path, measured: Path | None = None, costs: Path | None = None) -> dict[str, str]:
    """Cards of the published results, by file name: one card for each data set, setting and source. All numbers come from the files.

    `python -m hf_mixup.report.benchmark` writes them into model_cards/.

    Args:
        results: CSV file of the published results.
        folder: folder of the recipes.
        measured: CSV file of our own results, with the columns dataset, setting, backbone, epochs, method, top1, runs, checkpoint.
        costs: CSV file of the published costs, with the columns dataset, setting, backbone, epochs, method, measure, value, source.
    """
    rows = published(results)
    ours = {_key(row): row for row in published(measured)} if measured is not None and measured.is_file() else {}
    spent: dict[tuple[str, ...], dict[str, str]] = {}
    for row in published(costs) if costs is not None else []:
        spent.setdefault(_key(row), {})[row["measure"]] = row["value"]
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["dataset"], row["setting"], row["source"]), []).append(row)
    return {_card_name(*group): _card(*group, found, rows, ours, spent, folder) for group, found in groups.items()}


def _key(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("dataset", "setting", "backbone", "epochs", "method"))


def _card_name(dataset: str, setting: str, source: str) -> str:
    return f"{dataset}-{setting}-{source.split()[1].removesuffix('.md').lower()}.md"


@functools.cache
def _parameters(backbone: str, num_labels: int, size: int) -> str:
    with torch.device("meta"):
        return f"{sum(p.numel() for p in from_scratch(backbone, num_labels, size).parameters()) / 1e6:.2f}"


CLASSES = {
    "imagenet1k": 1000, "cifar10": 10, "tiny_imagenet": 200, "inaturalist2018": 8142, "cifar100": 100, "cub200": 200,
    "aircraft": 100, "cars": 196, "inaturalist2017": 5089, "places205": 205,
}  # fmt: skip


def _card(dataset, setting, source, rows, every, ours, costs, folder: Path) -> str:
    spent = [measure for measure in COST_TITLES if any(measure in costs.get(_key(row), {}) for row in rows)]
    titles = ["backbone", "method", "alpha", "resolution", "parameters (M)", "epochs", "top-1, published", "top-1, measured",
              *(COST_TITLES[measure] for measure in spent), "recipe", "remarks"]  # fmt: skip
    lines = [
        f"# {DATASETS[dataset]}, {setting}: {source}",
        "",
        "Generated by `python -m hf_mixup.report.benchmark` from `published_results.csv` and the recipes. *Published* is the number in the source, "
        "in percent. *Measured* is this project's own result; `-` means not measured. A row without a link has no checkpoint.",
        *(["Memory and hours are from the source, which does not name its GPU."] if spent else []),
        "",
        f"| {' | '.join(titles)} |",
        "|" + " --- |" * len(titles),
    ]
    commands, papers, told = [], {}, dict[str, dict[str, None]]()
    for row in rows:
        run = resolve(row, folder)
        runs = about(run.recipe, folder).get("runs")
        told.setdefault(f"the {run.reported}" + (f", mean of {runs} runs" if runs else ""), {})[f"`{run.recipe}`"] = None
        size = run.arguments["image_size"]
        side = f"{run.arguments.get('train_image_size', size)} / {size}" if "train_image_size" in run.arguments else str(size)
        mine = ours.get(_key(row))
        value = "-" if mine is None else f"{mine['top1']} ({mine['runs']} runs)"
        if mine is not None and mine["checkpoint"]:
            value = f"[{value}]({mine['checkpoint']})"
        lines.append(
            f"| {row['backbone']} | {row['method']} | {row['alpha'] or '-'} | {side} | {_parameters(row['backbone'], CLASSES[dataset], size)} | "
            f"{row['epochs']} | {row['top1']} | {value} | {''.join(costs.get(_key(row), {}).get(name, '-') + ' | ' for name in spent)}"
            f"`{run.recipe}` | {_remarks(row, run, every)} |"
        )
        commands.append(run.command())
        papers.update({name: METHODS[name].paper for name in run.mix if METHODS[name].paper})
    alone = {key: values for key, values in costs.items() if key[:2] == (dataset, setting) and key not in {_key(row) for row in rows}}
    if spent and alone:
        lines += ["", "Costs in the source without an accuracy:", ""]
        for (_, _, backbone, epochs, method), values in alone.items():
            costly = "; ".join(f"{COST_TITLES[name].removesuffix(', published')} {values[name]}" for name in spent if name in values)
            lines.append(f"- {backbone}, {method}, {epochs} epochs: {costly}")
    reported = [what + (f" by {', '.join(recipes)}" if len(told) > 1 else "") for what, recipes in told.items()]
    lines += [
        "",
        f"Reported is {', and '.join(reported)}.",
        "",
        "## Commands",
        "",
        "```bash",
    ]
    lines += [*dict.fromkeys(commands), "```", "", "## Citation", "", "```bibtex", OPENMIXUP, "```", ""]
    lines += [f"- {name}: [arXiv:{paper}](https://arxiv.org/abs/{paper})" for name, paper in papers.items()]
    return "\n".join(lines) + "\n"


def _remarks(row: Mapping[str, str], run: Run, every: Iterable[Mapping[str, str]]) -> str:
    remarks = []
    if row["reproduced_by"] != "openmixup":
        remarks.append({"official": "by the official code", "preprint": "of a preprint"}[row["reproduced_by"]])
    if run.derived_from:
        remarks.append(f"derived from: {run.derived_from}")
    for other in every:
        if other["source"] != row["source"] and _key(other) == _key(row):
            same = other["top1"] == row["top1"]
            if same:
                remarks.append(f"repeated in {other['source']}")
            elif "samix README" in row["source"]:
                remarks.append(f"**contradicted by {other['source']}: {other['top1']}**")
            else:
                whose = ", AutoMix's number" if "samix README" in other["source"] else ""
                remarks.append(f"{other['source']} has {other['top1']}{whose}")
    return "; ".join(remarks)


if __name__ == "__main__":
    cards = PUBLISHED.parent
    for name, text in published_cards(PUBLISHED, RECIPES, cards / "measured.csv", COSTS).items():
        (cards / name).write_text(text)
