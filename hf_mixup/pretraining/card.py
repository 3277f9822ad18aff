"""The model card of a pre-training."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_mixup.core.secrets import redacted
from hf_mixup.report.run_folder import CARD_NAME
from hf_mixup.training.callbacks import trained_until


def write_card(
    folder: str | os.PathLike,
    *,
    name: str,
    network: str,
    timm: bool,
    method: Mapping[str, Any],
    repo: str | None,
    command: str,
    hyperparameters: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    knn: str,
    best_step: int | None = None,
    dataset: str | None = None,
    dataset_id: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    language: str | None = None,
    tags: Sequence[str] = (),
) -> None:
    """Writes `README.md`: how to use the backbone, how it was trained, results of the kNN monitor.

    Args:
        network: class name of the classifier to which the backbone belongs.
        timm: whether it is a model of timm.
        method: the pretext, as data.
        repo: Hub id, if it has one.
        history: the `log_history` of a Trainer.
        knn: how its numbers were measured.
        best_step: the step of the saved weights, if they were chosen by the kNN monitor; the last step if None.
    """
    base, mix = method["step"]["name"], method["name"]
    place = repo or "path/or/hub-id/of/this/model"
    own = network.startswith(("Cifar", "MogaNet"))  # not of transformers
    data = ModelCardData(
        library_name="transformers", pipeline_tag="image-feature-extraction", license=license, language=language, base_model=base_model,
        datasets=[dataset_id] if dataset_id else None, tags=["image-feature-extraction", "self-supervised", "hf_mixup", base, mix, *tags],
        model_name=name,
    )  # fmt: skip
    # no pre-training here trains the poolers of vision transformers, so their features are the input of a classifier
    use = [
        "from transformers import AutoModel, AutoModelForImageClassification\n",
        f'backbone = AutoModel.from_pretrained("{place}")  # features: pooler_output.flatten(1)',
    ] if timm else [
        "from transformers import AutoModelForImageClassification\n",
        f'backbone = AutoModelForImageClassification.from_pretrained("{place}")  # features: logits, as there is no classifier',
    ]  # fmt: skip
    rows = [entry for entry in history if "eval_knn_top1" in entry]
    if best_step is not None:  # what is measured after the training is measured with the best weights
        rows = [entry for entry in history[: trained_until(history)] if "eval_knn_top1" in entry]
    table = ["| step | kNN top-1 |", "| ---: | ---: |", *(f"| {row['step']} | {100 * row['eval_knn_top1']:.2f} |" for row in rows)]
    how = "without mixing" if mix == "vanilla" else f"with **{mix}**"
    paper = f" ([arXiv:{method['paper']}](https://arxiv.org/abs/{method['paper']}))" if method["paper"] else ""
    text = "\n".join(
        [
            f"---\n{data.to_yaml()}\n---\n\n# {name}\n",
            f"The backbone of a {network}, pre-trained without labels by **{base}** {how}{paper}"
            + (f", on {dataset}" if dataset else "")
            + ", with hf_mixup. It has no classifier, so it names no classes.\n",
            "## Use\n\n```python",
            *(["import hf_mixup.networks.backbones  # this architecture is hf_mixup's own"] if own else []),
            *use,
            f'classifier = AutoModelForImageClassification.from_pretrained("{place}", num_labels=10)  # a new classifier, which must be trained\n```\n',
            "A linear probe, and fine-tuning without `--freeze_backbone`:\n\n```bash",
            f"hf-mixup train --model_name_or_path {place} --freeze_backbone --mix vanilla --train_dir FOLDER\n```\n",
            "## Nearest neighbours\n",
            *(table if rows else ["Not measured."]),
            f"\n{knn}" if rows else "",
            "\nDo not compare these numbers with losses of runs with other mixing, or with published accuracies of other protocols.\n",
            "## Training\n\n```bash",
            redacted(command),
            "```\n",
            *(f"- **{key}:** {value}" for key, value in hyperparameters.items()),
            "\n<details><summary>The pretext as data</summary>\n\n```json",
            json.dumps(method, indent=2),
            "```\n\n</details>\n\n## Limits\n",
            "- The numbers above are from one run and its last weights, not from the best epoch."
            if best_step is None
            else f"- The numbers above are from one run. Its weights are those of step {best_step}, chosen by the same images, which makes their number too high.",
            "" if license else "- No licence is named: ask the author before you use the weights; the images have their own.",
        ]
    )
    ModelCard(text).save(Path(folder, CARD_NAME))
