"""Model cards, filled from what a run left in its folder."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_mixup.labels import AreaLabels
from hf_mixup.losses import CrossEntropy
from hf_mixup.methods import CONFIG_NAME, METHODS, needs_of_model
from hf_mixup.steps import Standard

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"


def write_model_card(
    folder: str | Path,
    *,
    model_name: str,
    dataset: str,
    split: str,
    command: str,
    base_model: str | None = None,
    license: str = "apache-2.0",
) -> Path:
    """Writes `README.md` into the folder of a run, from its `all_results.json`, `mixup_config.json` and `config.json`.

    Numbers come from those files and nowhere else. `base_model` is a Hub id, or None for a network trained from scratch.
    Returns the path of the card.
    """
    folder = Path(folder)
    results = json.loads((folder / "all_results.json").read_text())
    config = json.loads((folder / CONFIG_NAME).read_text())
    network = json.loads((folder / "config.json").read_text())
    methods = [method["name"] for method in config["methods"]]
    measured = [(key, name) for key, name in (("eval_top1", "accuracy"), ("eval_top5", "top-5 accuracy")) if key in results]
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["image-classification", "hf_mixup", *methods],
        datasets=None if "/" in dataset and Path(dataset).exists() else [dataset],
        metrics=["accuracy"],
        base_model=base_model,
        model_name=model_name,
        eval_results=[
            EvalResult("image-classification", _slug(dataset), dataset, kind, results[key], metric_name=name, dataset_split=split)
            for (key, name), kind in zip(measured, ("accuracy", "top_5_accuracy"), strict=False)
        ],
    )
    papers = [
        f"- {name}: [arXiv:{METHODS[name].paper}](https://arxiv.org/abs/{METHODS[name].paper})" for name in methods if METHODS[name].paper
    ]
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=model_name,
        network=network.get("architecture", (network.get("architectures") or ["?"])[0]),
        dataset=dataset,
        split=split,
        methods=" + ".join(methods),
        config=json.dumps(config, indent=2),
        command=command,
        results=[(name, f"{results[key]:.4f}") for key, name in measured],
        speed=results.get("train_images_per_second"),
        papers="\n".join(papers),
        gallery=(folder / "gallery.png").is_file(),
        ours=network["model_type"] == "cifar_resnet",
    )
    path = folder / "README.md"
    card.save(path)
    return path


def methods_table() -> str:
    """The table of methods of the README, in Markdown."""
    plain = {AreaLabels(), CrossEntropy(), Standard()}
    lines = ["| method | parts | needs | paper |", "| --- | --- | --- | --- |"]
    for method in METHODS.values():
        parts = [part for part in (method.sample, method.label, method.loss, method.step) if part not in plain]
        shown = " + ".join(f"`{type(part).__name__}`" for part in parts)
        needs = "the model" if needs_of_model(method) else "images"
        paper = f"[{method.paper}](https://arxiv.org/abs/{method.paper})" if method.paper else ""
        lines.append(f"| `{method.name}` | {shown} | {needs} | {paper} |")
    return "\n".join(lines)


def _slug(name: str) -> str:
    return Path(name).name.lower().replace(" ", "-") or "dataset"
