"""Sweeps: cells of methods, networks, alphas, epochs and seeds, each trained once, and tables of the results."""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_mixup.arguments import DataArguments
from hf_mixup.core.places import PUBLISHED, RECIPES, SCRIPTS
from hf_mixup.core.secrets import redacted, without_secrets
from hf_mixup.methods import MethodChoice
from hf_mixup.model import MixupModel
from hf_mixup.networks.backbones import from_scratch
from hf_mixup.report.benchmark import Reported, Run, Summary, about, accuracies, latex_table, markdown_table, published, published_value
from hf_mixup.report.evidence import evidence, evidence_chart
from hf_mixup.report.plots import benchmark_chart
from hf_mixup.report.run_folder import EVALUATION_NAME, RESULTS_NAME, hash_of

CSV_MEASURES = ("nll", "ece", "corruption_error", "cpu_seconds_per_step", "seconds_per_step")


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
        checkpoint = str(self.run.arguments.get("model_name_or_path") or "checkpoint").rstrip("/")
        return str(self.run.architecture or checkpoint.rpartition("/")[2]) + ("" if self.epochs is None else f", {self.epochs} epochs")

    @property
    def name(self) -> str:
        return f"{self.row}-{self.column}-{self.seed}".replace(", ", "-").replace(" ", "-").replace("/", "-")

    def words(self, folder: Path) -> list[str]:
        alpha = [] if self.alpha is None else ["--alpha", f"{self.alpha:g}"]
        return [*self.run.words(), *alpha, "--seed", str(self.seed), "--output_dir", str(folder / "runs" / self.name)]

    def facts(self, more: Sequence[str]) -> dict[str, Any]:
        """All that the result depends on: the command's words without folders, the recipe's arguments, the methods' settings, what is measured."""
        words = [word if word != self.run.recipe else Path(word).stem for word in self.run.words()]
        words += [*([] if self.alpha is None else ["--alpha", f"{self.alpha:g}"]), "--seed", str(self.seed), *more]
        some = about(self.run.recipe, RECIPES).get("corrupted_images")
        found = {
            "words": without_secrets(words),
            "recipe_hash": hash_of(self.run.arguments),
            "methods_hash": hash_of(choice_of(self.run).to_dict()),  # a new default of a method is in no word and no recipe
        }
        return found if some is None else {**found, "corrupted_images": some}


def choice_of(run: Run) -> MethodChoice:
    """The methods of a run, with its settings."""
    settings = ("mix_prob", "alpha", "mix_args", "mode", "loss", "mix_rate")
    return MethodChoice.build(list(run.mix), **{name: run.arguments[name] for name in settings if name in run.arguments})


def with_changes(words: Sequence[str], more: Sequence[str]) -> list[str]:
    """The words of a cell, and those of the user, which replace arguments with the same name."""

    def name(word: str) -> str:
        return word.partition("=")[0].replace("-", "_") if word.startswith("--") else ""

    typed, kept, replaced = {name(word) for word in more} - {""}, [], False
    for word in words:
        replaced = name(word) in typed if name(word) else replaced
        kept += [] if replaced else [word]
    return [*kept, *more]


def what_is_impossible(run: Run) -> str | None:
    """The reason why these methods cannot work with this network, or None."""
    if run.architecture is None:
        return None
    with torch.random.fork_rng(devices=[]):
        network = from_scratch(run.architecture, 10, run.arguments.get("image_size", 32))
        try:
            MixupModel(network, choice_of(run))
        except ValueError as error:
            return str(error)
    return None


@dataclass(frozen=True)
class Images:
    """The images of a sweep at their place on this machine, instead of the recipe's.

    Attributes:
        path: a folder or file, as `--dataset_name` takes them.
        fingerprint: identifies the images, independent of their path.
    """

    path: str
    fingerprint: str

    @classmethod
    def at(cls, path: str) -> Images:
        """The images at a path. Raises ValueError if there are none."""
        from hf_mixup.data.sources import load_images

        data = load_images(DataArguments(dataset_name=path))
        found = hashlib.sha256()
        for part in (data.train, data.evaluation):
            some = part.select(range(min(100, len(part))))
            found.update(json.dumps([len(part), list(some[data.label_column])], default=str).encode())
            for image in some[data.image_column]:
                found.update(np.asarray(image).tobytes())
        return cls(path, found.hexdigest()[:16])


def train(cell: Cell, folder: Path, more: Sequence[str], threads: int, images: Images | None = None) -> dict[str, Any]:
    """Trains and measures a cell in its own process, and writes the results."""
    torch.set_num_threads(threads)
    target = folder / "runs" / cell.name
    shutil.rmtree(target, ignore_errors=True)
    words = with_changes([*cell.words(folder), *(["--dataset_name", images.path] if images is not None else [])], more)
    start = time.monotonic()
    if cell.run.processes > 1:
        launch = [sys.executable, "-m", "hf_mixup", "train", "--num_processes", str(cell.run.processes)]
        subprocess.run([*launch, *words], check=True)
    else:
        (folder / "logs").mkdir(exist_ok=True)
        with open(folder / "logs" / f"{cell.name}.txt", "w") as log:
            keep = os.dup(1), os.dup(2)
            try:
                os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
                runpy.run_path(str(SCRIPTS / "run_mixup.py"))["main"](words)
                evaluate(cell, target, "--use_cpu" in more)
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os.dup2(keep[0], 1), os.dup2(keep[1], 2)
    result = {
        **cell.facts(more),
        "seconds": round(time.monotonic() - start, 1),
        "top1": accuracies(target),
        **measured(target),
        "machine": {"device": device_name(), "threads": threads, "torch": torch.__version__},
        **({"images": images.fingerprint} if images is not None else {}),
    }
    for heavy in (*target.glob("*.safetensors"), *target.glob("checkpoint-*"), target / "mixup"):
        shutil.rmtree(heavy) if heavy.is_dir() else heavy.unlink(missing_ok=True)
    path = folder / "cells" / f"{cell.name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)
    return result


def evaluate(cell: Cell, target: Path, use_cpu: bool) -> None:
    """Measures calibration and corruption error of the final weights, if the recipe asks for them."""
    some = about(cell.run.recipe, RECIPES).get("corrupted_images")
    if some is not None:
        words = [str(target), "--protocols", "corruptions", "--max_corrupted_samples", str(some), "--batch_size", "250"]
        runpy.run_path(str(SCRIPTS / "run_evaluation.py"))["main"]([*words, *(["--use_cpu"] if use_cpu else [])])


def measured(target: Path) -> dict[str, Any]:
    """Further results in a run's folder: seconds of a step, and the results of its evaluation."""
    results = json.loads((target / RESULTS_NAME).read_text())
    steps = json.loads((target / "trainer_state.json").read_text())["global_step"]
    found = {"seconds_per_step": results["train_runtime"] / steps, "cpu_seconds_per_step": results["train_cpu_seconds"] / steps}
    path = target / EVALUATION_NAME
    if path.is_file():
        evaluation = json.loads(path.read_text())
        found |= {name: evaluation["clean"][name] for name in ("ece", "nll")}
        found |= {"corruption_error": evaluation["corruptions"]["mean_error"]}
    return {name: round(value, 6) for name, value in found.items()}


def device_name() -> str:
    """As people call it."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else torch.get_device_module(accelerator).get_device_name()


def finished(cell: Cell, folder: Path, more: Sequence[str] = ()) -> dict[str, Any] | None:
    """The result of a cell that was trained with the same words, recipe and settings of its methods, or None."""
    result = trained_before(cell, folder)
    return result if result is not None and all(result.get(name) == value for name, value in cell.facts(more).items()) else None


def trained_before(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """The result of a cell with this name, for any words and recipe; None if it never finished."""
    path = folder / "cells" / f"{cell.name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def end_with_parent() -> None:
    """Ends this process when the one that started it has ended. Otherwise a sweep that was killed would go on writing beside the next one."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def sweep(todo: list[Cell], folder: Path, more: Sequence[str], jobs: int, threads: int, images: Images | None = None) -> None:
    """Trains the cells, and prints each result when it is done."""
    done, start, failed = 0, time.monotonic(), []
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        futures = {pool.submit(train, cell, folder, more, threads, images): cell for cell in todo}
        for future in as_completed(futures):
            cell, done = futures[future], done + 1
            minutes = (time.monotonic() - start) / done * (len(todo) - done) / 60
            left = "done" if done == len(todo) else f"{minutes:.0f} min left" if minutes >= 1 else "less than 1 min left"
            try:
                shown = f"{100 * cell.run.reported.of(future.result()['top1']):.2f}"
            except Exception as error:  # a failed run does not stop the others
                failed.append(cell)
                shown = f"failed: {redacted(str(error))}; see {folder / 'logs' / cell.name}.txt"
            print(f"{done}/{len(todo)} {cell.name}: {shown}; {left}", flush=True)
    if failed:
        print(f"{len(failed)} runs failed; run the same command again to repeat them.", flush=True)


def report(every: list[Cell], impossible: dict[tuple, str], folder: Path, recipe: str, more: Sequence[str] = ()) -> str:
    """Writes results.csv, tables and a chart of the finished cells, and returns the Markdown. Raises ValueError for cells with other images."""
    rows = published(PUBLISHED) if PUBLISHED.is_file() else []
    found = [(cell, result) for cell in every if (result := finished(cell, folder, more)) is not None]
    seen = sorted({result.get("images", "those of the recipe") for _, result in found})
    if len(seen) > 1:
        raise ValueError(
            f"cells of a sweep must be trained on the same images, got {' and '.join(seen)} in {folder / 'cells'}; remove one kind."
        )
    write_csv(folder / "results.csv", found)
    reasons: dict[tuple[str, str], list[str]] = {}
    for (mix, network), why in impossible.items():
        reasons.setdefault((network, why), []).append(mix)
    notes = "".join(f"\n- {', '.join(names)} with {network}: {why}" for (network, why), names in reasons.items())
    notes = f"\n\nImpossible pairs, `-` above:\n{notes}" if notes else ""
    measured = [(cell, result) for cell, result in found if "nll" in result]
    if measured:
        networks: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
        for cell, result in measured:
            value = {**result, "top1": cell.run.reported.of(result["top1"])}
            networks.setdefault(cell.column, {}).setdefault(cell.row, {})[cell.seed] = value
        markdown = evidence(networks, rows, about(recipe, RECIPES).get("order", {})) + notes
        evidence_chart(folder / "results.png", networks)
    else:
        markdown = levels(every, found, rows, folder, recipe) + notes
    (folder / "results.md").write_text(markdown + "\n")
    return markdown


def levels(
    every: list[Cell], found: list[tuple[Cell, dict[str, Any]]], rows: list[dict[str, str]], folder: Path, recipe: str
) -> str:  # fmt: skip
    """Accuracies by method and network, with the published ones, as Markdown. It also writes results.tex and results.png."""
    groups: dict[tuple[str, str], list[float]] = {}
    for cell, result in found:
        groups.setdefault((cell.row, cell.column), []).append(100 * cell.run.reported.of(result["top1"]))
    shown: dict[str, dict[str, Summary]] = {}
    columns = list(dict.fromkeys(cell.column for cell in every))
    for cell in every:
        values = groups.get((cell.row, cell.column), [])
        value = published_value(rows, cell.run, RECIPES)
        if values or value is not None:
            shown.setdefault(cell.row, {}).setdefault(cell.column, Summary(tuple(values), value))
    ordered = {row: {column: cells[column] for column in columns if column in cells} for row, cells in shown.items()}
    caption = f"Top-1 accuracy in percent by the recipe {recipe}, {every[0].run.reported}: mean ± deviation (number of runs)"
    caption += " / published." if any(summary.published for cells in ordered.values() for summary in cells.values()) else "."
    (folder / "results.tex").write_text(latex_table(ordered, caption) + "\n")
    measured = {row: {c: (s.mean, s.deviation or 0, len(s.values)) for c, s in cells.items() if s.values} for row, cells in ordered.items()}
    if any(measured.values()):
        benchmark_chart(folder / "results.png", measured, "top-1 accuracy (%)")
    return markdown_table(ordered, caption)


def write_csv(path: Path, found: list[tuple[Cell, dict[str, Any]]]) -> None:
    """Writes one row for each cell, with accuracies in percent."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["method", "network", "alpha", "epochs", "seed", "top1", "best", "last", *CSV_MEASURES, "seconds"])
        for cell, result in found:
            history = [100 * accuracy for accuracy in result["top1"]]
            numbers = [f"{number:.4f}" for number in (100 * cell.run.reported.of(result["top1"]), max(history), history[-1])]
            settings = ["" if setting is None else setting for setting in (cell.alpha, cell.run.epochs)]
            others = [result.get(name, "") for name in CSV_MEASURES]
            table.writerow([cell.method, cell.run.architecture, *settings, cell.seed, *numbers, *others, result["seconds"]])
    os.replace(temporary, path)


def summarize(folders: Sequence[str], reported: Reported) -> str:
    """A table of any runs. Runs that differ only in their seed share a row; their folders have one name, except for `-SEED`."""
    groups: dict[str, list[float]] = {}
    for folder in folders:
        name = Path(folder).name
        head, _, tail = name.rpartition("-")
        groups.setdefault(head if tail.isdigit() and head else name, []).append(100 * reported.of(accuracies(folder)))
    return markdown_table({name: {str(reported): Summary(tuple(values))} for name, values in groups.items()})
