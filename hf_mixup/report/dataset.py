"""All results as a data set in the layout of the Hub: parquet files and a card, with published and measured results apart."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from hf_mixup.core.places import COSTS, PUBLISHED, RECIPES
from hf_mixup.report.benchmark import OPENMIXUP, Reported, about, published, resolve
from hf_mixup.report.sweep import CSV_MEASURES

CONFIGS = {
    "published": "published accuracies, with the recipe and the command of each",
    "published_costs": "published memory (GB) and hours of a training, on a GPU that the source does not name",
    "measured": "results of this project, one row for each run of a sweep",
}


def published_rows() -> list[dict[str, Any]]:
    """All published accuracies, in percent."""
    rows = []
    for row in published(PUBLISHED):
        run = resolve(row, RECIPES)
        typed = {"epochs": int(row["epochs"]), "top1": float(row["top1"])}
        rows.append({**row, **typed, "recipe": run.recipe, "command": run.command(), "derived_from": run.derived_from or ""})
    return rows


def measured_rows(sweeps: Iterable[Path]) -> list[dict[str, Any]]:
    """The cells of sweeps; the folder's name is the recipe's. Accuracy is in percent; None means not measured, and for alpha none or several."""
    rows = []
    for path in sorted(cell for sweep in sweeps for cell in (sweep / "cells").glob("*.json")):
        cell, words, values = json.loads(path.read_text()), {}, []
        for word in cell["words"]:
            if word.startswith("--"):
                name, given, value = word[2:].partition("=")
                words[name.replace("-", "_")] = values = [value] if given else []
            else:
                values.append(word)
        reported = Reported.by(about(words["recipe"][0], RECIPES))
        rows.append(
            {
                "recipe": words["recipe"][0],
                "method": "+".join(words["mix"]),
                "network": words.get("architecture", words.get("model_name_or_path", [""]))[0],
                "epochs": float(words["num_train_epochs"][0]) if "num_train_epochs" in words else None,
                "seed": int(words["seed"][0]),
                "alpha": float(words["alpha"][0]) if len(words.get("alpha", ())) == 1 else None,
                "top1": 100 * reported.of(cell["top1"]),
                "reported": str(reported),
                **{name: cell.get(name) for name in CSV_MEASURES},
                "device": cell.get("machine", {}).get("device"),
                "images": cell.get("images"),
            }
        )
    return rows


def write_dataset(folder: str | Path, sweeps: Iterable[Path] = ()) -> Path:
    """Writes the data set into a folder, and returns the folder.

    Args:
        sweeps: folders of sweeps, whose cells become the configuration `measured`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tables = {"published": published_rows(), "published_costs": _costs(), "measured": measured_rows(sweeps)}
    tables = {name: rows for name, rows in tables.items() if rows}
    for name, rows in tables.items():
        parquet.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    (folder / "README.md").write_text(_card(tables))
    return folder


def _costs() -> list[dict[str, Any]]:
    return [{**row, "epochs": int(row["epochs"]), "value": float(row["value"])} for row in published(COSTS)]


def _card(tables: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "---",
        "pretty_name: Mixup benchmark results",
        "task_categories:",
        "- image-classification",
        "tags:",
        "- mixup",
        "- benchmark",
        "configs:",
    ]
    for name in tables:
        lines += [f"- config_name: {name}", f"  data_files: {name}.parquet"]
    lines += ["---", "", "# Results of mixup methods for image classification", ""]
    lines += [f"- `{name}`: {len(rows)} rows, {CONFIGS[name]}" for name, rows in tables.items()]
    lines += [
        "",
        "Accuracies are in percent. Made by `hf-mixup benchmark --dataset FOLDER` of hf_mixup.",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
    ]
    lines += ['rows = load_dataset("THIS_REPOSITORY", "published")["train"]', "```", "", "## Citation", "", "```bibtex", OPENMIXUP, "```"]
    return "\n".join(lines) + "\n"
