"""The common code of the scripts for sounds, videos, texts and label maps: arguments, data sets, and the run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset as Examples
from transformers import Trainer, set_seed
from transformers.utils import logging as transformers_logging

from hf_mixup.arguments import MixupTrainingArguments, RunArguments
from hf_mixup.cli.folder import choose_folder
from hf_mixup.cli.parser import Parser
from hf_mixup.cli.refusals import log_to_screen
from hf_mixup.cli.train import DEFAULTS, REPLACED, TASKS, TOLD, check_installed
from hf_mixup.core.checks import check_count
from hf_mixup.data.labels import ONE_CLASS, Labels, listed, network_classes, read_splits, with_labels
from hf_mixup.networks.backbones import checkpoint_config
from hf_mixup.report.examples import Recordings, mixed_examples, varied
from hf_mixup.report.plots import gallery
from hf_mixup.report.run_folder import GALLERY_NAME
from hf_mixup.training.callbacks import AtTheStart
from hf_mixup.training.progress import EpochTable
from hf_mixup.training.trainer import MixupTrainer

logger = logging.getLogger("run_mixup")


@dataclass
class TaskArguments:
    """The network and its data."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "A folder of save_to_disk, or a data set of the Hub. Default: a small data set that is made here."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    input_column_name: str | None = field(default=None, metadata={"help": "Column of the inputs. Default: the one with the right type."})
    label_column_name: str | None = field(default=None, metadata={"help": "Column of the labels. Default: the one with the right type."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most this many examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most this many examples."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A checkpoint to start from: a folder or a Hub id. Default: a tiny network from scratch."}
    )

    def __post_init__(self):
        counts = {name: getattr(self, name) for name in ("max_train_samples", "max_eval_samples")}
        check_count(1, **{name: count for name, count in counts.items() if count is not None})
        for name in ("dataset_config_name", "input_column_name", "label_column_name"):
            if self.dataset_name is None and getattr(self, name) is not None:
                raise ValueError(f"{name} is for a data set of your own, got {getattr(self, name)!r} without one; pass --dataset_name.")
        if self.dataset_config_name is not None and Path(str(self.dataset_name)).is_dir():
            raise ValueError(
                f"dataset_config_name is for data sets of the Hub, got {self.dataset_config_name!r} for the folder {self.dataset_name!r}; leave it out."
            )


# the function of a script: from its arguments to the trainer and the name of the data set
Build = Callable[[TaskArguments, MixupTrainingArguments], tuple[Trainer, str]]
RUN = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint")
SHORT = (
    "mix", "mix_prob", "alpha", "mix_args", "mix_rate", *TaskArguments.__dataclass_fields__, *RUN, "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "learning_rate", "seed", "use_cpu",
)  # fmt: skip
# defaults for the small data sets, and tiny networks from scratch
FROM_SCRATCH = {"learning_rate": 2e-3, "num_train_epochs": 30, "per_device_train_batch_size": 32, "warmup_steps": 20, "weight_decay": 0.05}
NOT_HERE = {"recipe", "report_dir", "license", *TASKS, *REPLACED}


def parse(
    argv: list[str], prog: str, about: str, mix: Sequence[str], small: Mapping[str, Any]
) -> tuple[TaskArguments, RunArguments, MixupTrainingArguments]:
    """The typed arguments over the defaults. Raises ValueError in one sentence."""
    groups = {"task": list(TaskArguments.__dataclass_fields__), "run": list(RUN)}
    kinds = (TaskArguments, RunArguments, MixupTrainingArguments)
    reader = Parser(kinds, prog, "[--mix METHOD ...] [...]", about, groups, SHORT, TOLD, NOT_HERE, choices={"optim": ["lamb"]})
    typed = reader.typed(argv)
    from_scratch = {} if "model_name_or_path" in typed else {**FROM_SCRATCH, **small}
    values = {**DEFAULTS, **from_scratch, "mix": list(mix), "remove_unused_columns": False, **typed}
    reader.help_if_asked(typed, values)
    task, run, args = reader.built(values)
    if "output_dir" not in values:
        args.output_dir = None
    check_installed(args)
    return task, run, args


class Read(Examples):
    """Examples that are made when they are needed.

    Args:
        rows: the rows of the data set.
        read: function from a row to an example.
        most: largest number of examples. They are chosen by the seed, because the first rows are often of one class.
        keep: keep examples in memory, for a small data set.
    """

    def __init__(self, rows: Any, read: Callable[[Any], Mapping[str, Any]], most: int | None = None, keep: bool = False, seed: int = 0):
        self.rows, self.read_row = rows, read
        self.kept: dict[int, Mapping[str, Any]] | None = {} if keep else None
        self.order = range(len(rows)) if most is None else np.random.default_rng(seed).permutation(len(rows))[:most].tolist()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        if self.kept is None:
            return self.read_row(self.rows[self.order[row]])
        if row not in self.kept:
            self.kept[row] = self.read_row(self.rows[self.order[row]])
        return dict(self.kept[row])


def data_sets(task: TaskArguments, train: Any, evaluation: Any, read: Callable[[Any], Mapping[str, Any]], seed: int) -> dict[str, Read]:
    """The Trainer's data sets. Examples of a small data set that is made here stay in memory."""
    kept = task.dataset_name is None
    return {
        "train_dataset": Read(train, read, task.max_train_samples, kept, seed),
        "eval_dataset": Read(evaluation, read, task.max_eval_samples, kept, seed),
    }


def named(names: Sequence[str]) -> dict[str, dict]:
    """The class names as fields of a network's config."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def load_splits(task: TaskArguments, seed: int) -> tuple[Any, Any]:
    """The data sets for training and evaluation. Without an evaluation split it is a fifth of the training data."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    from hf_mixup.data.sources import EVALUATION_SPLITS

    name = str(task.dataset_name)
    if Path(name).is_file():
        raise ValueError(f"dataset_name must be a folder of save_to_disk, or a data set of the Hub, got the file {name!r}; convert it.")
    data = load_from_disk(name) if Path(name).is_dir() else load_dataset(name, task.dataset_config_name)
    if not isinstance(data, DatasetDict):
        data = DatasetDict(train=data)
    held_out = next((name for name in EVALUATION_SPLITS if name in data), None)
    if "train" not in data:
        raise ValueError(f"a data set must have a split 'train', got {', '.join(data)}; rename one.")
    if held_out is None:
        parts = data["train"].train_test_split(0.2, seed=seed)
        return parts["train"], parts["test"]
    return data["train"], data[held_out]


def column_of(data: Any, name: str | None, kind: type | tuple[type, ...], what: str) -> str:
    """The column with a name, or with a type of `datasets`. Raises ValueError if there is none, or several."""
    found = [column for column, feature in data.features.items() if (column == name if name else isinstance(feature, kind))]
    if len(found) != 1:
        raise ValueError(
            f"exactly one column must hold the {what}, got {', '.join(found) or 'none'} of {', '.join(data.column_names)}; pass its name as "
            f"--{'label' if what.startswith('label') else 'input'}_column_name."
        )
    return found[0]


def with_classes(train: Any, evaluation: Any, column: str) -> tuple[Any, Any, list[str]]:
    """Both splits with a column of class numbers, matched by name and without rows that have no label, and the names of the classes.

    Raises ValueError for labels that are not one class for each row, and for an evaluation of classes that are not trained.
    """
    from hf_mixup.data.sources import joined, tell_unlabelled

    parts, called = {"train": train, "evaluation": evaluation}, {"train": "train", "evaluation": "the evaluation split"}
    labels = read_splits(parts, column, called)
    for role, one in labels.items():
        if one.problem_type != ONE_CLASS or one.values.ndim == 2 or not one.labelled.any():
            seen = one.problem_type.replace("_", " ") if one.labelled.any() else "no label"
            raise ValueError(
                f"every row must have one class, got {seen} in column {column!r} of {called[role]}; choose another column with --label_column_name."
            )
    tell_unlabelled(labels, called)
    trained = labels["train"].names
    labels, names = joined(labels, called, True, column)
    if len(names) > len(trained):
        raise ValueError(
            f"every class of the evaluation split must be one of the training split, got {listed(name for name in names if name not in trained)}, where "
            f"that has {listed(trained)}; check the spelling of the names."
        )
    return *(with_labels(data, column, labels[role]) for role, data in parts.items()), names


def numbered(task: TaskArguments, names: Sequence[str]) -> tuple[list[str], dict[int, int]]:
    """The names of the network's classes, and its number for each class of the data set: a checkpoint with the same classes keeps its order."""
    from hf_mixup.data.sources import KnownClasses, as_network

    # a row of every class
    labels = {"": Labels(ONE_CLASS, list(names), np.arange(len(names)), np.ones(len(names), bool), declared=True)}
    classes = list(names)
    if task.model_name_or_path is not None:
        known = KnownClasses(network_classes(checkpoint_config(task.model_name_or_path)), fresh=True)
        labels, classes, _ = as_network(labels, classes, False, known)
    return classes, dict(enumerate(labels[""].values.tolist()))


def train(
    argv: list[str], prog: str, about: str, mix: Sequence[str], build: Build, small: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, float]:
    """Trains, evaluates, and writes network, numbers and card to the run's folder. Returns the numbers of the evaluation.

    `mix` are the default methods, `small` the arguments for a network from scratch."""
    task, run, args = parse(argv, prog, about, mix, small)
    log_to_screen(logging.INFO if args.should_log else logging.WARNING)
    transformers_logging.disable_progress_bar()
    folder = choose_folder(run, args, "+".join(map(str, args.mix)))
    set_seed(args.seed)
    with folder.gone_if_refused():
        trainer, name = build(task, args)
        measure, title = ("eval_top1", "top-1") if isinstance(trainer, MixupTrainer) else ("eval_mean_iou", "mIoU")
        EpochTable.replace(trainer, measure, title, "inputs")
        if run.overwrite_output_dir and not args.resume_from_checkpoint and trainer.is_world_process_zero():
            trainer.add_callback(AtTheStart(folder.clear))  # after all checks
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_metrics("train", {"train_loss": result.metrics["train_loss"]})
        trainer.save_state()
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        draw_examples(trainer, folder.path)
        trainer.create_model_card(model_name=folder.path.name, dataset=name)
    told = ", ".join(
        f"{key.removeprefix('eval_')} {metrics[key]:.4f}" for key in ("eval_top1", "eval_mean_iou", "eval_loss") if key in metrics
    )
    logger.info("%s on %s", told, name)
    logger.info("everything is in %s", args.output_dir)
    return metrics


def draw_examples(trainer: Trainer, folder: Path) -> None:
    """Leaves a picture of mixtures of the evaluation set's inputs in the folder, for its card; not of texts, nor of inputs of several sizes."""
    if not isinstance(trainer, MixupTrainer) or not trainer.is_world_process_zero():
        return
    model: Any = trainer.mixup_model
    data: Any = trainer.eval_dataset
    if model.tokens or len({torch.as_tensor(row[model.main_input_name]).shape for row in varied(data, 6)}) > 1:
        return
    form = Recordings.of(model, trainer.processing_class, torch.as_tensor(data[0][model.main_input_name]))
    gallery(folder / GALLERY_NAME, mixed_examples(model, data, form, trainer.args.seed), list(model.config.id2label.values()))


def script(main: Callable[[list[str], str], Any], file: str) -> None:
    """Runs a script from the command line, and exits."""
    from hf_mixup.cli.refusals import run

    sys.exit(run(main, sys.argv[1:], Path(file).name))
