"""Measures what a classifier is worth beside its accuracy: `accelerate launch training_scripts/run_evaluation.py CHECKPOINT_OR_REPO`.

Calibration; FGSM and PGD; the 15 + 4 common corruptions at five severities; occlusion. Leaves evaluation.json, evaluation.md and
pictures in --output_dir, and adds the results to the model card there. `--help` lists all there is to set.
"""

from __future__ import annotations

import logging
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from hf_mixup.arguments import DataArguments
from hf_mixup.core.checks import nearest
from hf_mixup.data.processor import format_of_checkpoint
from hf_mixup.data.sources import held_out, load_images
from hf_mixup.evaluation.evaluate import EvaluationArguments, Evaluator, evaluate, pixel_model
from hf_mixup.networks.backbones import channels_of, check_takes, load_classifier
from hf_mixup.report.card import evaluated, weights_hash, write_evaluation
from hf_mixup.training.hub import without_secrets

logger = logging.getLogger("run_evaluation")


@dataclass
class CheckpointArguments:
    """Where the checkpoint comes from, where the results go."""

    output_dir: str | None = field(default=None, metadata={"help": "The checkpoint's folder, or runs/evaluation-<name>, if not given."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    token: str | None = field(default=None, metadata={"help": "Hub token; the one of `hf auth login` if not given."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code of the checkpoint's repository. Off unless you trust it."})


def main(argv: list[str]) -> None:
    parser = HfArgumentParser((DataArguments, EvaluationArguments, CheckpointArguments), description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="A folder, or a repository of the Hub: of transformers, timm or ours.")
    data, args, where, rest, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        raise ValueError(f"every argument must be known, got {unknown[0]!r}; {nearest(unknown[0], flags)}")
    if data.dataset_name is None and data.train_dir is None and data.validation_dir is None:
        data.dataset_name = "digits"
    transformers_logging.disable_progress_bar()
    hub = {"revision": where.model_revision, "token": where.token, "trust_remote_code": where.trust_remote_code}
    network = load_classifier(rest.checkpoint, image_size=data.image_size, **hub)
    form = format_of_checkpoint(data, rest.checkpoint, channels_of(network), **hub)
    if form.size is not None:
        check_takes(network, form.channels, *form.sides)
    images = load_images(data, args.seed, token=where.token, training=False, held_out=held_out(rest.checkpoint))
    evaluator = Evaluator(pixel_model(network, form, images), form, args)
    main_process = evaluator.accelerator.is_main_process
    logging.basicConfig(level=logging.INFO if main_process else logging.WARNING, format="%(message)s")

    results = evaluate(evaluator, images, where.token)
    if main_process:
        checkpoint = Path(rest.checkpoint)
        folder = Path(where.output_dir or (checkpoint if checkpoint.is_dir() else f"runs/evaluation-{checkpoint.name}"))
        about = {
            "model": checkpoint.absolute().name if checkpoint.is_dir() else rest.checkpoint,
            "weights": weights_hash(checkpoint),
            "dataset": {"name": images.name, "split": images.evaluation_split, "images": len(images.evaluation)},
            "num_labels": network.config.num_labels,
            "image_size": form.size,
            "command": shlex.join(["accelerate", "launch", "training_scripts/run_evaluation.py", *without_secrets(argv)]),
        }
        write_evaluation(folder, {**about, **results})
        for _, text, value in evaluated({**about, **results}):
            logger.info("%-58s %.4f", text, value)
        logger.info("everything is in %s", folder)
    evaluator.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])
