"""Model cards, filled from what a run left in its folder."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hf_mixup.hub import repository_name
from hf_mixup.labels import AreaLabels
from hf_mixup.losses import CrossEntropy
from hf_mixup.methods import CONFIG_NAME, METHODS, needs_of_model
from hf_mixup.plots import training_curve
from hf_mixup.steps import Standard

TEMPLATES = Path(__file__).parent / "templates"

# what `all_results.json` calls it: its type in a model-index, and its name for people
MEASURES = {
    "eval_top1": ("accuracy", "top-1 accuracy"),
    "eval_top5": ("top_5_accuracy", "top-5 accuracy"),
    "eval_loss": ("loss", "loss"),
    "eval_nll": ("nll", "negative log-likelihood"),
    "eval_ece": ("expected_calibration_error", "expected calibration error"),
    "eval_brier": ("brier_score", "Brier score"),
    "eval_mce": ("mean_corruption_error", "mean corruption error"),
}
NO_MEASURES = ("_runtime", "_per_second", "_compilation_time")
COLUMNS = {
    "epoch": "epoch",
    "train_loss": "training loss",
    "train_accuracy": "training accuracy (of mixtures)",
    "eval_loss": "loss",
    "eval_top1": "top-1",
    "eval_top5": "top-5",
}
PACKAGES = ("hf_mixup", "transformers", "torch", "timm", "datasets", "accelerate")


def write_model_card(
    folder: str | Path,
    *,
    model_name: str | None = None,
    repo: str | None = None,
    dataset: str | None = None,
    dataset_id: str | None = None,
    split: str | None = None,
    command: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    language: str | None = None,
    tags: Sequence[str] = (),
    hyperparameters: Mapping[str, Any] | None = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
) -> Path:
    """Writes `README.md`, and `training_curve.png`, into the folder of a run.

    Numbers come from its files and nowhere else: `all_results.json`, or the last evaluation of `train_log.jsonl`;
    `mixup_config.json`, `config.json`. The rest is what those do not know.

    Args:
        model_name: the name of the folder if None.
        repo: Hub id that it will be found under.
        dataset, dataset_id, split: what it was evaluated on: its name for people, its Hub id if it has one, the split.
        command: that trained it.
        base_model: Hub id or folder of the checkpoint it started from, None for a network trained from scratch.
        license: apache-2.0 if None.
        tags: beside our own.
        hyperparameters: what a reader asks for first, by name.
        rows: one an epoch; those of `train_log.jsonl` if None.

    Returns:
        the path of the card.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    folder = Path(folder)
    config, network = (json.loads((folder / name).read_text()) for name in (CONFIG_NAME, "config.json"))
    rows = _rows(folder) if rows is None else rows
    results = _results(folder, rows)
    methods = [method["name"] for method in config["methods"]]
    labels = len(network.get("id2label") or network.get("label_names") or ()) or network.get("num_classes") or 2
    measured = [(key, *_measure(key), value) for key, value in results.items() if key != "eval_top5" or labels > 5]
    model_name = model_name or folder.absolute().name
    base = base_model and repository_name(base_model)
    base_model = None if base is None or Path(base).exists() else base  # people elsewhere cannot follow a path of ours
    data = ModelCardData(
        language=language,
        license=license or "apache-2.0",
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=list(dict.fromkeys(["image-classification", "hf_mixup", *methods, *tags])),
        datasets=[dataset_id] if dataset_id else None,
        metrics=["accuracy"],
        base_model=base_model,
        model_name=model_name,
        eval_results=[
            EvalResult("image-classification", dataset_id or _slug(dataset), dataset, kind, value, metric_name=name, dataset_split=split)
            for _, kind, name, value in measured
        ]
        if dataset and measured
        else None,
    )
    mixers = {"mixblock": "MixBlock", "adaptivemask": "AdaptiveMask"}
    here = repo or "path/or/hub-id/of/this/model"
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "model_card.md"),
        title=plain(model_name),
        repo=json.dumps(here),
        network=plain(_architecture(network)),
        base=f"[{plain(base_model)}](https://huggingface.co/{base_model})" if base_model else base and "a local checkpoint",
        dataset=dataset and plain(dataset),
        split=split and plain(split),
        methods=" + ".join(methods),
        config=json.dumps(config, indent=2),
        command=command and fenced(command, "bash"),
        results=[(plain(name), f"{value:.4f}") for _, _, name, value in measured],
        facts=[(plain(name), plain(str(value))) for name, value in _facts(folder, network).items()],
        hyperparameters=[(plain(name), plain(str(value))) for name, value in (hyperparameters or {}).items()],
        epochs=_table(rows),
        curve=_curve(folder, rows),
        gallery=(folder / "gallery.png").is_file(),
        ours=network["model_type"] in ("cifar_resnet", "moganet"),
        timm=network["model_type"] == "timm_wrapper" and json.dumps(f"hf-hub:{here}"),
        state=(folder / "mixup").is_dir(),
        mixers=[name for place, name in mixers.items() if (folder / "mixup" / place).is_dir()],
        num_labels=labels,
        unmeasured=_unmeasured(results),
        versions=", ".join(f"{name} {number}" for name, number in _versions().items()),
        citations="\n\n".join(filter(None, map(bibtex, methods))),
    )
    path = folder / "README.md"
    card.save(path)
    return path


def bibtex(method: str) -> str | None:
    """The paper of a method, in the fields that are certain; None for one that has none."""
    papers = json.loads((TEMPLATES / "papers.json").read_text())
    if method not in papers:
        return None
    authors, title, venue, year = papers[method]
    number = METHODS[method].paper
    fields = {"title": f"{{{title}}}", "author": authors, "booktitle": venue, "year": year}
    fields |= {"eprint": number, "archivePrefix": "arXiv"} if number else {}
    lines = [f"  {name} = {{{value}}}" for name, value in fields.items() if value]
    return "@{}{{{},\n{}\n}}".format("inproceedings" if venue else "misc", f"{method}{year}", ",\n".join(lines))


def plain(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line, in a table too."""
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # an underscore or a hyphen inside a word is only itself
    return re.sub(r"([\\`*\[\]|~#$]|(?<!\w)_|_(?!\w)|^[-+=])", r"\\\1", text)


def fenced(text: str, language: str) -> str:
    """A code block, whatever the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def methods_table() -> str:
    """The table of methods of the README, in Markdown."""
    unsaid = {AreaLabels(), CrossEntropy(), Standard()}
    lines = ["| method | parts | needs | paper |", "| --- | --- | --- | --- |"]
    for method in METHODS.values():
        parts = [part for part in (method.sample, method.label, method.loss, method.step) if part not in unsaid]
        shown = " + ".join(f"`{type(part).__name__}`" for part in parts)
        needs = "the model" if needs_of_model(method) else "images"
        paper = f"[{method.paper}](https://arxiv.org/abs/{method.paper})" if method.paper else ""
        lines.append(f"| `{method.name}` | {shown} | {needs} | {paper} |")
    return "\n".join(lines)


# -- what the files say ---------------------------------------------------------------------------------------------------


def _rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "train_log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _results(folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    path = folder / "all_results.json"
    last = next((row for row in reversed(rows) if "eval_top1" in row), {})
    found = json.loads(path.read_text()) if path.is_file() else last
    wanted = {key: value for key, value in found.items() if key.startswith("eval_") and not key.endswith(NO_MEASURES)}
    numbers = {key: float(value) for key, value in wanted.items() if isinstance(value, (int, float))}
    return dict(sorted(numbers.items(), key=lambda item: list(MEASURES).index(item[0]) if item[0] in MEASURES else len(MEASURES)))


def _measure(key: str) -> tuple[str, str]:
    name = key.removeprefix("eval_")
    return MEASURES.get(key, (name, name.replace("_", " ")))


def _unmeasured(results: Mapping[str, float]) -> str:
    calibrated = any("ece" in key or "calibration" in key for key in results)
    robust = any(part in key for key in results for part in ("fgsm", "pgd", "corruption", "mce", "occlusion"))
    lacking = [name for name, known in (("calibration", calibrated), ("robustness", robust)) if not known]
    return f"{' and '.join(lacking)} {'were' if len(lacking) > 1 else 'was'} not measured." if lacking else "other images may differ."


def _architecture(network: Mapping[str, Any]) -> str:
    return network.get("architecture") or (network.get("architectures") or [network["model_type"]])[0]


def _facts(folder: Path, network: Mapping[str, Any]) -> dict[str, Any]:
    """Architecture, size and cost, counted on a copy of the network that holds no numbers."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForImageClassification

    facts: dict[str, Any] = {"architecture": _architecture(network)}
    side = _side(folder, network)
    facts |= {"image size": f"{side} x {side} pixels"} if side else {}
    names = list((network.get("id2label") or {}).values()) or network.get("label_names") or []
    facts["classes"] = f"{len(names)}: {', '.join(map(str, names[:10]))}{', ...' if len(names) > 10 else ''}" if names else "not named"
    try:
        with torch.device("meta"), torch.no_grad():
            model = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(folder)).eval()
            facts["parameters"] = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"
            if side:
                with FlopCounterMode(display=False) as counter:
                    model(pixel_values=torch.zeros(1, 3, side, side))
                facts["cost of an image"] = f"{counter.get_total_flops() / 2e9:.3f} GMACs"
    except (ImportError, NotImplementedError, RuntimeError, ValueError):
        pass  # an architecture that cannot be built without its code, or counted: the card goes without
    return facts


def _side(folder: Path, network: Mapping[str, Any]) -> int | None:
    path = folder / "preprocessor_config.json"
    if path.is_file():
        processor = json.loads(path.read_text())
        for size in (processor.get("crop_size"), processor.get("size")):
            if isinstance(size, dict) and "height" in size:
                return size["height"]
    described = (network.get("pretrained_cfg") or {}).get("input_size", (None,))[-1]
    return network["image_size"] if isinstance(network.get("image_size"), int) else described


def _table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The log as a table, its head first; nothing for a run of one epoch."""
    columns = [key for key in COLUMNS if any(key in row for row in rows)]
    if len(rows) < 2:
        return []
    shown = [[f"{row[key]:.4f}" if isinstance(row.get(key), float) else str(row.get(key, "")) for key in columns] for row in rows]
    return [[COLUMNS[key] for key in columns], *shown]


def _curve(folder: Path, rows: Sequence[Mapping[str, Any]]) -> bool:
    if len(rows) > 1:
        training_curve(folder / "training_curve.png", rows)
    return (folder / "training_curve.png").is_file()


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _slug(name: str | None) -> str:
    return re.sub(r"[^a-z0-9_.-]+", "-", Path(name or "").name.lower()).strip("-") or "dataset"
