"""Evaluates a classifier: accuracy, calibration, FGSM, PGD, common corruptions, occlusion.

`hf-mixup evaluate CHECKPOINT_OR_REPO` writes evaluation.json, evaluation.md and pictures to --output_dir, and adds the results to the model
card there. Results are written after every protocol; if interrupted, run the same command again to continue.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from hf_mixup.arguments import FOR_TRAINING, DataArguments
from hf_mixup.cli.launch import command_of
from hf_mixup.cli.parser import Parser
from hf_mixup.cli.refusals import log_to_screen, run
from hf_mixup.data.processor import ImageFormat, format_of_checkpoint
from hf_mixup.data.sources import ImageData, load_images
from hf_mixup.evaluation.evaluate import EvaluationArguments, Evaluator, evaluate, pixel_model
from hf_mixup.networks.backbones import channels_of, check_takes, load_classifier
from hf_mixup.report.card import evaluated, weights_hash, write_evaluation
from hf_mixup.report.run_folder import EVALUATION_NAME, RunFolder, facts_of

GROUPS = {
    "measuring": ["checkpoint", *EvaluationArguments.__dataclass_fields__],
    "data": ["dataset_name", "dataset_config_name", "train_dir", "validation_dir", "train_val_split", "max_eval_samples", "image_column_name",
             "label_column_name", "image_size", "channels", "eval_split", "dataset_revision"],
    "run": ["output_dir", "model_revision", "token", "trust_remote_code"],
}  # fmt: skip
SHORT = [name for names in GROUPS.values() for name in names]

logger = logging.getLogger("run_evaluation")


@dataclass
class CheckpointArguments:
    """The checkpoint, and the folder for results."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for results. Default: the checkpoint's folder, or runs/evaluation-<name>."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    token: str | None = field(default=None, metadata={"help": "Hub token. Default: that of `hf auth login`."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code of the checkpoint's repository. Set it only if you trust that code."}
    )


def parser(prog: str = "run_evaluation.py") -> Parser:
    made = Parser(
        (DataArguments, EvaluationArguments, CheckpointArguments), prog, "CHECKPOINT [...]", __doc__.splitlines()[0], GROUPS, SHORT,
        without=FOR_TRAINING,
    )  # fmt: skip
    made.add_argument("checkpoint", help="The classifier: a folder or a Hub id, of transformers, timm or hf_mixup.")
    return made


def with_the_runs_data(typed: dict[str, Any], facts: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The data arguments and the seed of the split: those of the run, so that the evaluation images are the same."""
    values = dict(typed)
    of_run = {name: value for name, value in facts.get("data", {}).items() if value is not None}
    if not {"dataset_name", "train_dir", "validation_dir"} & set(typed):
        values = {**of_run, **typed} if of_run else {"dataset_name": "digits", **typed}
    elif "train_val_split" in of_run:
        values.setdefault("train_val_split", of_run["train_val_split"])
    return values, facts.get("seed", typed.get("seed", 42))


def fingerprint(images: ImageData, form: ImageFormat) -> str:
    """Identifies the images and their order, by their classes, and what the network is given of them."""
    labels = [images.name, images.evaluation_split, images.image_column, repr(form), list(images.evaluation[images.label_column])]
    return hashlib.sha256(json.dumps(labels, default=str).encode()).hexdigest()


def hash_of_network(network: torch.nn.Module) -> str:
    """A hash of weights that lie in no folder, as those of a revision on the Hub."""
    found = hashlib.sha256()
    for name, weight in network.state_dict().items():
        found.update(name.encode())
        found.update(weight.cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def main(argv: list[str], prog: str = "run_evaluation.py") -> None:
    reader = parser(prog)
    typed = reader.typed(argv)
    reader.help_if_asked(typed)
    hub = {
        "revision": typed.get("model_revision", "main"),
        "token": typed.get("token"),
        "trust_remote_code": typed.get("trust_remote_code", False),
    }
    checkpoint = Path(typed["checkpoint"])
    if "output_dir" in typed:
        RunFolder(typed["output_dir"]).check()
    facts = facts_of(typed["checkpoint"], **hub)
    values, split_seed = with_the_runs_data(typed, facts)
    data, args, where = reader.built(values)
    transformers_logging.disable_progress_bar()
    network = load_classifier(typed["checkpoint"], image_size=data.image_size, **hub)
    form = format_of_checkpoint(data, typed["checkpoint"], channels_of(network), **hub)
    if form.size is not None:
        check_takes(network, form.channels, *form.sides)
    images = load_images(data, split_seed, token=where.token, training=False, held_out=facts.get("held_out"))
    evaluator = Evaluator(pixel_model(network, form, images), form, args)
    main_process = evaluator.accelerator.is_main_process
    log_to_screen(logging.INFO if main_process else logging.WARNING)

    folder = RunFolder(where.output_dir or (checkpoint if checkpoint.is_dir() else f"runs/evaluation-{checkpoint.name}"))
    about = {
        "model": checkpoint.absolute().name if checkpoint.is_dir() else typed["checkpoint"],
        "weights": weights_hash(checkpoint) or hash_of_network(network),
        "dataset": {"name": images.name, "split": images.evaluation_split, "images": len(images.evaluation)},
        "fingerprint": fingerprint(images, form),
        "num_labels": network.config.num_labels,
        "image_size": form.sides[0] if form.sides[0] == form.sides[1] else list(form.sides),
        "command": command_of("evaluate", argv, 1),
    }
    logger.info("%s on %d images of %s (%s)", about["model"], len(images.evaluation), images.name, images.evaluation_split)
    before = unfinished(folder.path, about)
    if before:
        logger.info("continuing an earlier evaluation: %s are done", ", ".join(before["settings"]))
    with folder.gone_if_refused():
        for results in evaluate(evaluator, images, where.token, before):
            if main_process:
                write_evaluation(folder.path, {**about, **results})
                logger.info("%s is done", list(results["settings"])[-1])
    if main_process:
        for _, text, value in evaluated({**about, **results}):
            logger.info("%-58s %.4f", text, value)
        logger.info("everything is in %s", folder.path)
    evaluator.accelerator.end_training()


def unfinished(folder: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """The results of an interrupted evaluation of the same weights and images, or None."""
    try:
        found = json.loads((folder / EVALUATION_NAME).read_text())
    except (OSError, ValueError):
        return None
    same = all(found.get(name) == about[name] for name in ("model", "weights", "dataset", "fingerprint", "image_size"))
    return found if same and found.get("unfinished") else None


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "run_evaluation.py"))
