"""Trains methods x networks x alphas x epochs x seeds by a recipe, and makes tables. An interrupted sweep continues with the same command.

`hf-mixup benchmark --recipe digits100 --mix all --seeds 5` fills runs/benchmark-digits100 with a cell for every run, results.csv,
results.md, results.tex and results.png. `--dry_run FILE` only writes the commands as a shell script. `--summarize RUN...` reports any
existing runs. Arguments after `--` go to the training.

A cell that was trained with the same words, recipe and settings of methods is not trained again. OpenMixup's tool takes the median over N + 1 epochs where its
tables say N; this takes N.
"""

from __future__ import annotations

import itertools
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_mixup import METHODS
from hf_mixup.cli.network import default_network
from hf_mixup.cli.parser import Parser
from hf_mixup.cli.refusals import run
from hf_mixup.cli.train import NETWORK, parse
from hf_mixup.cli.train import parser as of_training
from hf_mixup.core.checks import check_count, check_known, check_positive
from hf_mixup.core.places import RECIPES, SWEEPS
from hf_mixup.core.secrets import without_secrets
from hf_mixup.methods import MethodChoice
from hf_mixup.report.benchmark import Reported, Run, about, configure
from hf_mixup.report.run_folder import RunFolder
from hf_mixup.report.sweep import Cell, Images, finished, report, summarize, sweep, trained_before, what_is_impossible, with_changes


@dataclass
class SweepArguments:
    """The runs of a sweep, and their report."""

    recipe: str = field(default="digits100", metadata={"help": "Name of a recipe, or a YAML file of arguments."})
    mix: list[str] | None = field(
        default=None,
        metadata={
            "help": "Methods; several that take turns as mixup+cutmix; or all. Default: those of the recipe, or vanilla, mixup and cutmix."
        },
    )
    backbones: list[str] | None = field(default=None, metadata={"help": "Networks. Default: the recipe's."})
    alphas: list[float] | None = field(default=None, metadata={"help": "Alphas. Default: the recipe's."})
    epochs: list[int] | None = field(default=None, metadata={"help": "Epochs. Default: the recipe's."})
    seeds: int = field(default=3, metadata={"help": "Number of runs of each, with the seeds 1, 2, ..."})
    jobs: int = field(default=1, metadata={"help": "Runs at a time."})
    threads: int = field(default=1, metadata={"help": "Threads of each run on a CPU. Small networks are not faster with more."})
    data: str | None = field(
        default=None,
        metadata={
            "help": "Folder or file with the recipe's data set on this machine. Results do not contain the path, so other machines can continue the sweep."
        },
    )
    report: bool = field(default=False, metadata={"help": "Make tables and chart of all finished cells, without training."})
    into: str | None = field(
        default=None, metadata={"help": "Also put the tables into this Markdown file, between <!-- RECIPE --> and <!-- /RECIPE -->."}
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Write all published results, and the measured ones in this repository, into this folder as a data set of the Hub, and "
            "train nothing."
        },
    )
    hub_dataset_id: str | None = field(default=None, metadata={"help": "Push the folder of --dataset to this data set of the Hub."})
    token: str | None = field(default=None, metadata={"help": "Hub token. Default: that of `hf auth login`."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder of the sweep. Default: runs/benchmark-<recipe>."})
    dry_run: str | None = field(default=None, metadata={"help": "Write the commands to a shell script with this name, without training."})
    summarize: list[str] | None = field(default=None, metadata={"help": "Report these folders of runs, without training."})
    measure: str = field(default="median", metadata={"help": "How --summarize reports a run: median, best or last."})
    last_epochs: int | None = field(
        default=None, metadata={"help": "Number of last epochs that --summarize uses. Default: 10 for the median."}
    )

    def __post_init__(self):
        check_count(1, seeds=self.seeds, jobs=self.jobs, threads=self.threads)
        Reported(self.measure, self.last_epochs)
        for epochs in self.epochs or ():
            check_count(1, epochs=epochs)
        for alpha in self.alphas or ():
            check_positive(alphas=alpha)
        for method in {name for mix in self.mix or () if mix != "all" for name in mix.split("+")}:
            check_known("method", method, METHODS)
        if self.hub_dataset_id is not None and self.dataset is None:
            raise ValueError(f"hub_dataset_id needs the folder of the data set, got {self.hub_dataset_id!r} without it; pass --dataset.")


def parser(prog: str = "run_benchmark.py") -> Parser:
    usage = "[--recipe NAME] [--mix METHOD ...] [--seeds N] [...] [-- arguments of training]"
    return Parser((SweepArguments,), prog, usage, __doc__.splitlines()[0], {"sweep": list(SweepArguments.__dataclass_fields__)})


def seeds_in(folder: Path) -> list[int]:
    """The seeds of the cells in a sweep's folder."""
    return [
        int(path.stem.rpartition("-")[2]) for path in (folder / "cells").glob("*-[0-9]*.json") if path.stem.rpartition("-")[2].isdigit()
    ]


def configured(recipe: str, mix: list[str], network: str | None, epochs: int | None, alpha: float | None, typed: Mapping[str, Any]) -> Run:
    """The run of these methods. If neither the recipe nor `typed`, the arguments of the training, name a network, it is the one that they train by
    default: methods of attention have another one than the others, and a table must tell them apart."""
    run = configure(recipe, RECIPES, mix, network, epochs, alpha)
    arguments = {**run.arguments, **typed}
    if network is None and not any(arguments.get(name) for name in NETWORK) and arguments.get("image_size"):
        run = configure(recipe, RECIPES, mix, default_network(MethodChoice.build(mix), int(arguments["image_size"])), epochs, alpha)
    return replace(run, epochs=typed.get("num_train_epochs", run.epochs))


def cells(args: SweepArguments, folder: Path, typed: Mapping[str, Any]) -> Iterator[Cell]:
    """The cells to train, seed by seed, so that tables fill evenly. `typed`: the arguments of the training that were typed."""
    of_recipe: dict[str | None, list[str]] = about(args.recipe, RECIPES).get("sweep") or {None: ["vanilla", "mixup", "cutmix"]}
    networks = args.backbones or list(of_recipe)
    choices = {network: args.mix or of_recipe.get(network) or next(iter(of_recipe.values())) for network in networks}
    pairs = [(network, mix) for network, names in choices.items() for mix in (METHODS if names == ["all"] else dict.fromkeys(names))]
    seeds = range(1, max([args.seeds, *(seeds_in(folder) if args.report else [])]) + 1)
    for seed, (network, mix), alpha, epochs in itertools.product(seeds, pairs, args.alphas or [None], args.epochs or [None]):
        yield Cell(configured(args.recipe, mix.split("+"), network, epochs, alpha, typed), alpha, epochs, seed)


def main(argv: list[str], prog: str = "run_benchmark.py") -> None:
    own, more = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    reader = parser(prog)
    typed = reader.typed(own)
    reader.help_if_asked(typed)
    [args] = reader.built(typed)
    for name in ("measure", "last_epochs"):
        if name in typed and not args.summarize:
            raise ValueError(
                f"--{name} is for --summarize, got {typed[name]!r} without it; the recipe says it for a sweep, so leave it out."
            )
    if args.dataset is not None:
        print(publish(args))
        return
    if args.summarize:
        print(summarize(args.summarize, Reported(args.measure, args.last_epochs or (10 if args.measure == "median" else None))))
        return
    folder = Path(args.output_dir or f"runs/benchmark-{Path(args.recipe).stem}")
    of_runs = of_training(prog).typed(more)  # says what is typed several times
    every = list(cells(args, folder, of_runs))
    check(args, every[0], folder, more, of_runs, prog)
    pairs = {("+".join(cell.run.mix), cell.run.architecture): cell.run for cell in every}
    impossible = {pair: why for pair, run in pairs.items() if (why := what_is_impossible(run)) is not None}
    possible = [cell for cell in every if ("+".join(cell.run.mix), cell.run.architecture) not in impossible]
    if not possible:
        (mix, network), why = next(iter(impossible.items()))
        raise ValueError(f"a sweep needs methods that work with its networks, got {mix} with {network} ({why.rstrip('.')}); name others.")
    if args.dry_run:
        launch = {cell.name: ["accelerate", "launch", "--num_processes", str(cell.run.processes)] for cell in possible}
        lines = [
            shlex.join(
                [
                    *launch[cell.name],
                    "training_scripts/run_mixup.py",
                    *with_changes([*cell.words(folder), "--overwrite_output_dir"], without_secrets(more)),
                ]
            )
            for cell in possible
        ]
        Path(args.dry_run).write_text("#!/bin/sh\nset -e\n" + "\n".join(lines) + "\n")
        print(f"{len(lines)} commands are in {args.dry_run}")
        for (mix, network), why in impossible.items():
            print(f"left out: {mix} with {network}: {why}")
        return
    todo = [cell for cell in possible if finished(cell, folder, more) is None]
    images = Images.at(args.data) if args.data is not None and not args.report else None
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    if args.report:
        print(told(args, report(every, impossible, folder, args.recipe, more)))
        return
    print(f"{len(every)} cells: {len(todo)} to train, {len(impossible)} pairs of methods and networks impossible", flush=True)
    changed = [cell.name for cell in todo if trained_before(cell, folder) is not None]
    if changed:
        print(
            f"{len(changed)} of them again, because their arguments, their recipe or the settings of their methods changed: {', '.join(changed)}",
            flush=True,
        )
    sweep(todo, folder, more, args.jobs, args.threads, images)
    print(told(args, report(every, impossible, folder, args.recipe, more)))


def check(args: SweepArguments, cell: Cell, folder: Path, more: list[str], typed: Mapping[str, Any], prog: str) -> None:
    """Raises ValueError for what would make every training fail, or its tables, before hours of it."""
    RunFolder(folder).check()
    for name, own in {
        "recipe": "--recipe",
        "mix": "--mix",
        "seed": "--seeds",
        "architecture": "--backbones",
        "output_dir": "--output_dir",
    }.items():
        if name in typed:
            raise ValueError(f"the sweep sets --{name} itself, got {typed[name]!r} after --; give {own} before it.")
    if not args.report and not parse(with_changes(cell.words(folder), more), prog)[3].do_train:
        raise ValueError(f"every run of a sweep trains, got {' '.join(more)!r} after --; add --do_train, or leave out the other task.")
    if args.into is not None:
        marked(args.recipe, args.into)


def publish(args: SweepArguments) -> str:
    """Writes the data set of all results, pushes it if requested, and returns a sentence with its place."""
    from hf_mixup.report.dataset import write_dataset
    from hf_mixup.training.hub import check_token, push_dataset

    RunFolder(args.dataset).check("dataset")
    if args.hub_dataset_id is not None:
        check_token(args.token)
    folder = write_dataset(args.dataset, sorted(path.parent for path in SWEEPS.glob("*/cells")))
    if args.hub_dataset_id is None:
        return f"the data set is in {folder}"
    return f"pushed to {push_dataset(args.hub_dataset_id, folder, 'All results', token=args.token)}"


def marked(recipe: str, into: str) -> tuple[str, str, str, str]:
    """What stands before the two marks of a recipe in a Markdown file, both marks, and what stands behind. Raises ValueError where there are none."""
    name, path = Path(recipe).stem, Path(into)
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    text = path.read_text() if path.is_file() else ""
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"into must be a file with one {begin} and one {end}, got {into!r}; add both lines.")
    head, _, rest = text.partition(begin)
    return head, begin, end, rest.partition(end)[2]


def told(args: SweepArguments, tables: str) -> str:
    """The tables, which are also written into `into`."""
    if args.into is not None:
        head, begin, end, rest = marked(args.recipe, args.into)
        Path(args.into).write_text(f"{head}{begin}\n{tables}\n{end}{rest}")
    return tables


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "run_benchmark.py"))
