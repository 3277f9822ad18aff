"""Trains methods x networks x alphas x epochs x seeds by a recipe, and makes tables: safe to kill, and it goes on where it was.

`run_benchmark.py --recipe digits100 --mix all --seeds 5` fills runs/benchmark-digits100 with a cell for every run, results.csv,
results.md, results.tex and results.png. `--dry_run FILE` writes the commands as a shell script instead, and `--summarize RUN...`
reports runs that are there, of whatever origin. What is typed after `--` goes to run_mixup.py.

A finished cell is never trained again; one that was cut short is, from its start. OpenMixup's tool takes the median over N + 1 epochs
where its tables say N; here it is N.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from hf_mixup import METHODS, MixupModel
from hf_mixup.methods import MethodChoice
from hf_mixup.networks.backbones import from_scratch
from hf_mixup.report.benchmark import (
    Reported,
    Run,
    Summary,
    about,
    accuracies,
    configure,
    latex_table,
    markdown_table,
    published,
    published_value,
)
from hf_mixup.report.plots import benchmark_chart

RECIPES = Path(__file__).parent / "recipes"
PUBLISHED = Path(__file__).parents[1] / "model_cards" / "published_results.csv"


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    run: Run
    alpha: float | None
    epochs: int | None
    seed: int

    @property
    def method(self) -> str:
        return "+".join(self.run.mix)

    @property
    def row(self) -> str:
        return self.method + ("" if self.alpha is None else f" {self.alpha:g}")

    @property
    def column(self) -> str:
        return str(self.run.architecture or "checkpoint") + ("" if self.epochs is None else f", {self.epochs} epochs")

    @property
    def name(self) -> str:
        return f"{self.row}-{self.column}-{self.seed}".replace(", ", "-").replace(" ", "-").replace("/", "-")

    def words(self, folder: Path) -> list[str]:
        alpha = [] if self.alpha is None else ["--alpha", f"{self.alpha:g}"]
        return [*self.run.words(), *alpha, "--seed", str(self.seed), "--output_dir", str(folder / "runs" / self.name)]


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """What is to be trained, in the order in which tables grow evenly: seed by seed."""
    networks = args.backbones or about(args.recipe, RECIPES).get("backbones") or [None]
    choices = [(name,) for name in METHODS] if args.mix == ["all"] else [tuple(choice.split("+")) for choice in args.mix]
    for seed, mix, architecture, alpha, epochs in itertools.product(
        range(1, args.seeds + 1), choices, networks, args.alphas or [None], args.epochs or [None]
    ):
        yield Cell(configure(args.recipe, RECIPES, mix, architecture, epochs, alpha), alpha, epochs, seed)


def what_is_impossible(run: Run) -> str | None:
    """Why these methods cannot work with this network; None where they can."""
    arguments = run.arguments
    build = {key: arguments.get(key) for key in ("mix_prob", "alpha", "mix_args", "mode", "loss")}
    if run.architecture is None:
        return None
    with torch.random.fork_rng(devices=[]):
        network = from_scratch(run.architecture, 10, arguments.get("image_size", 32))
        try:
            MixupModel(network, MethodChoice.build(list(run.mix), **build))
        except ValueError as error:
            return str(error)
    return None


def train(cell: Cell, folder: Path, more: Sequence[str], threads: int) -> dict[str, Any]:
    """Trains a cell and writes what came out; in a process of its own."""
    torch.set_num_threads(threads)
    target = folder / "runs" / cell.name
    shutil.rmtree(target, ignore_errors=True)
    words = [*cell.words(folder), *more]
    start = time.monotonic()
    if cell.run.processes > 1:
        launch = ["accelerate", "launch", "--num_processes", str(cell.run.processes), str(Path(__file__).parent / "run_mixup.py")]
        subprocess.run([*launch, *words], check=True)
    else:
        from run_mixup import main as run_mixup

        (folder / "logs").mkdir(exist_ok=True)
        with open(folder / "logs" / f"{cell.name}.txt", "w") as log:
            keep = os.dup(1), os.dup(2)
            try:
                os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
                run_mixup(words)
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os.dup2(keep[0], 1), os.dup2(keep[1], 2)
    result = {"words": words, "seconds": round(time.monotonic() - start, 1), "top1": accuracies(target)}
    for heavy in (*target.glob("*.safetensors"), *target.glob("checkpoint-*"), target / "mixup"):
        shutil.rmtree(heavy) if heavy.is_dir() else heavy.unlink(missing_ok=True)
    path = folder / "cells" / f"{cell.name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)
    return result


def finished(cell: Cell, folder: Path) -> dict[str, Any] | None:
    path = folder / "cells" / f"{cell.name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def sweep(todo: list[Cell], folder: Path, args: argparse.Namespace, more: list[str]) -> None:
    done, start, failed = 0, time.monotonic(), []
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(train, cell, folder, more, args.threads): cell for cell in todo}
        for future in as_completed(futures):
            cell, done = futures[future], done + 1
            left = (time.monotonic() - start) / done * (len(todo) - done)
            try:
                shown = f"{100 * cell.run.reported.of(future.result()['top1']):.2f}"
            except Exception as error:  # one run that fails leaves the others alone
                failed.append(cell)
                shown = f"failed: {error}; see {folder / 'logs' / cell.name}.txt"
            print(f"{done}/{len(todo)} {cell.name}: {shown}; {left / 60:.0f} minutes left", flush=True)
    if failed:
        print(f"{len(failed)} runs failed; run the same command again to try them again.", flush=True)


def report(every: list[Cell], impossible: dict[tuple, str], folder: Path, recipe: str) -> str:
    """results.csv, and tables and chart of the cells that are there; returns the Markdown."""
    rows = published(PUBLISHED) if PUBLISHED.is_file() else []
    groups: dict[tuple[str, str], list[tuple[Cell, float]]] = {}
    with open(folder / "results.tmp", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["method", "network", "alpha", "epochs", "seed", "top1", "best", "last", "seconds"])
        for cell in every:
            result = finished(cell, folder)
            if result is not None:
                value = 100 * cell.run.reported.of(result["top1"])
                groups.setdefault((cell.row, cell.column), []).append((cell, value))
                history = [100 * accuracy for accuracy in result["top1"]]
                numbers = [f"{number:.4f}" for number in (value, max(history), history[-1])]
                settings = ["" if setting is None else setting for setting in (cell.alpha, cell.run.arguments.get("num_train_epochs"))]
                table.writerow([cell.method, cell.run.architecture, *settings, cell.seed, *numbers, result["seconds"]])
    os.replace(folder / "results.tmp", folder / "results.csv")
    shown: dict[str, dict[str, Summary]] = {}
    columns = list(dict.fromkeys(cell.column for cell in every))
    for cell in every:
        found = groups.get((cell.row, cell.column), [])
        value = published_value(rows, cell.run, RECIPES)
        if found or value is not None:
            shown.setdefault(cell.row, {}).setdefault(cell.column, Summary(tuple(number for _, number in found), value))
    ordered = {row: {column: cells[column] for column in columns if column in cells} for row, cells in shown.items()}
    caption = f"Top-1 accuracy in percent by the recipe {recipe}, {every[0].run.reported}: mean ± deviation (number of runs)"
    caption += " / published." if any(summary.published for cells in ordered.values() for summary in cells.values()) else "."
    reasons: dict[tuple[str, str], list[str]] = {}
    for (mix, network), why in impossible.items():
        reasons.setdefault((network, why), []).append(mix)
    notes = "".join(f"\n- {', '.join(names)} with {network}: {why}" for (network, why), names in reasons.items())
    markdown = markdown_table(ordered, caption) + (f"\n\nImpossible pairs, `-` above:\n{notes}" if notes else "")
    (folder / "results.md").write_text(markdown + "\n")
    (folder / "results.tex").write_text(latex_table(ordered, caption) + "\n")
    measured = {row: {c: (s.mean, s.deviation or 0) for c, s in cells.items() if s.values} for row, cells in ordered.items()}
    if any(measured.values()):
        benchmark_chart(folder / "results.png", measured, "top-1 accuracy (%)")
    return markdown


def summarize(folders: Sequence[str], reported: Reported) -> str:
    """A table of runs of whatever origin: those that differ by their seed alone, in folders of one name but for `-SEED`, share a row."""
    groups: dict[str, list[float]] = {}
    for folder in folders:
        name = Path(folder).name
        head, _, tail = name.rpartition("-")
        groups.setdefault(head if tail.isdigit() and head else name, []).append(100 * reported.of(accuracies(folder)))
    return markdown_table({name: {str(reported): Summary(tuple(values))} for name, values in groups.items()})


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--recipe", default="digits100", help="name of a recipe, or a YAML file")
    made.add_argument("--mix", nargs="+", default=["vanilla", "mixup", "cutmix"], help="methods, several joined as in mixup+cutmix, or all")
    made.add_argument("--backbones", nargs="+", help="networks; the recipe's if not given")
    made.add_argument("--alphas", nargs="+", type=float, help="the recipe's if not given")
    made.add_argument("--epochs", nargs="+", type=int, help="the recipe's if not given")
    made.add_argument("--seeds", type=int, default=3, help="runs of each, with the seeds 1, 2, ...")
    made.add_argument("--jobs", type=int, default=1, help="runs at a time")
    made.add_argument("--threads", type=int, default=1, help="of each run on a CPU; small networks do not gain from more")
    made.add_argument("--output_dir", type=Path, help="runs/benchmark-<recipe> if not given")
    made.add_argument("--dry_run", type=Path, metavar="FILE", help="write the commands as a shell script, and train nothing")
    made.add_argument("--summarize", nargs="+", metavar="RUN", help="report these folders of runs, and train nothing")
    made.add_argument("--measure", default="median", help="of --summarize: median, best or last")
    made.add_argument("--last_epochs", type=int, help="of --summarize: how many; 10 if not given")
    return made


def main(argv: list[str]) -> None:
    own, more = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = parser().parse_args(own)
    if args.summarize:
        print(summarize(args.summarize, Reported(args.measure, args.last_epochs or (10 if args.measure == "median" else None))))
        return
    folder = args.output_dir or Path("runs", f"benchmark-{Path(args.recipe).stem}")
    every = list(cells(args))
    if args.dry_run:
        launch = {cell.name: ["accelerate", "launch", "--num_processes", str(cell.run.processes)] for cell in every}
        lines = [
            shlex.join([*launch[cell.name], "training_scripts/run_mixup.py", *cell.words(folder), "--overwrite_output_dir", *more])
            for cell in every
        ]
        args.dry_run.write_text("#!/bin/sh\nset -e\n" + "\n".join(lines) + "\n")
        return
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    pairs = {("+".join(cell.run.mix), cell.run.architecture): cell.run for cell in every}
    impossible = {pair: why for pair, run in pairs.items() if (why := what_is_impossible(run)) is not None}
    todo = [cell for cell in every if ("+".join(cell.run.mix), cell.run.architecture) not in impossible and finished(cell, folder) is None]
    print(f"{len(every)} cells: {len(todo)} to train, {len(impossible)} pairs of methods and networks impossible", flush=True)
    sweep(todo, folder, args, more)
    print(report(every, impossible, folder, args.recipe))


if __name__ == "__main__":
    main(sys.argv[1:])
