"""Images to pre-train on. They need no labels. Images with labels are used by the kNN monitor."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from datasets import ClassLabel, Dataset

from hf_mixup.arguments import DataArguments
from hf_mixup.data.labels import ONE_CLASS, Labels, listed, read_splits, with_labels
from hf_mixup.data.sources import (
    LABEL_NAMES,
    ImageData,
    chosen_splits,
    column_of,
    folder_of,
    hold_out,
    joined,
    load_splits,
    name_of,
    share_and_seed,
    with_images,
)
from hf_mixup.data.stream import load_unlabelled_stream

logger = logging.getLogger(__name__)


@dataclass
class PreTrainingImages:
    """The images of a pre-training.

    Attributes:
        images: the training images in `train`; class number -1 means no label. It is a `StreamedSplit` with `streaming`. `evaluation` has
            labels; it is empty without a kNN monitor.
        bank: the training images with a label; empty without a kNN monitor.
    """

    images: ImageData
    bank: Dataset


def load_pretraining_images(
    args: DataArguments, seed: int = 0, *, token: str | None = None, cache_dir: str | None = None, asked: Sequence[str] = ()
) -> PreTrainingImages:
    """The data set that the arguments name: folders of classes, one folder without classes, or a data set with or without labels.

    The kNN monitor needs one class for each image of two splits, with at least two classes, and no stream. If it is not possible, the log says
    why.

    Args:
        seed: for splitting evaluation images from the training images, and for `max_train_samples`.
        asked: names of further arguments that request the kNN monitor.

    Raises:
        ValueError: if the data set cannot be loaded, has no images, or kNN is requested but not possible.
    """
    if args.max_train_samples_per_class is not None:
        raise ValueError(
            f"pre-training does not look at classes, got max_train_samples_per_class {args.max_train_samples_per_class}; pass max_train_samples."
        )
    asked = [
        *asked,
        *(name for name in ("validation_dir", "eval_split", "label_column_name", "max_eval_samples") if getattr(args, name) is not None),
    ]
    if args.streaming:
        if asked:
            raise ValueError(
                f"the kNN monitor, which --{asked[0]} asks for, compares all images of two splits, got --streaming, which reads them once as they "
                f"come; leave out --{asked[0]} or --streaming."
            )
        logger.warning("no kNN monitor: it compares all images of two splits, and a stream is read once as it comes")
        name, stream, repository = load_unlabelled_stream(args, token=token, cache_dir=cache_dir)
        column, nothing = stream.image_column, Dataset.from_dict({})
        return PreTrainingImages(ImageData(name, stream, nothing, "", column, "", ["0", "1"], repository=repository), nothing)
    splits, (name, repository) = load_splits(args, token, cache_dir, labelled=False), name_of(args)
    train, evaluation, split = chosen_splits(splits, args, True)
    called = {"train": args.train_split or "train", "evaluation": split}
    image_column = column_of(train, args.image_column_name, "image", called["train"])
    train = with_images(train, image_column, called["train"], folder_of(args))
    if not len(train):
        raise ValueError(f"the training split must hold images, got none in {called['train']!r}; choose another with --train_split.")
    parts = {"train": train} if evaluation is None else {"train": train, "evaluation": evaluation}
    try:
        found = _labels(parts, called, args)
        if evaluation is not None and not isinstance(found, str):
            if image_column not in evaluation.column_names:
                found = f"no column {image_column!r} in {split!r}"
            else:
                parts["evaluation"] = with_images(evaluation, image_column, split, folder_of(args))
    except ValueError as error:
        found = str(error).rstrip(".")
    if isinstance(found, str):
        why = found
        if asked:
            raise ValueError(
                f"the kNN monitor, which --{asked[0]} asks for, needs images of known classes to train on and to evaluate on, got {why}; "
                f"leave out --{asked[0]}, or give both labels."
            )
        logger.warning("no kNN monitor: %s", why)
        column = next(name for name in ("label", "labels") if name != image_column)
        train = train.select_columns([image_column]).add_column(column, [-1] * len(train))
        train = _some(train, args.max_train_samples, seed)
        nothing = train.select(range(0))
        return PreTrainingImages(ImageData(name, train, nothing, "", image_column, column, ["0", "1"], repository=repository), nothing)
    column, labels, names = found

    def of(role: str, *, all_rows: bool) -> Dataset:
        own = labels[role]
        return with_labels(parts[role].select_columns([image_column, column]), column, replace(own, labelled=own.labelled | all_rows))

    train, taken = of("train", all_rows=True), None
    if evaluation is None:
        taken = share_and_seed(args, seed, None)
        rows = np.flatnonzero(labels["train"].labelled)
        kept, out = (rows[some] for some in hold_out(labels["train"], **taken))
        evaluation, split = train.select(out), f"{taken['share']:.0%} of train"
        train = train.select(np.concatenate([kept, np.flatnonzero(~labels["train"].labelled)]))
    else:
        evaluation = of("evaluation", all_rows=False)
    train, evaluation = _some(train, args.max_train_samples, seed), _some(evaluation, args.max_eval_samples, seed)
    known = np.asarray(train.select_columns([column]).with_format(None)[:][column]) != -1
    bank = train if known.all() else train.select(np.flatnonzero(known))
    images = ImageData(name, train, evaluation, split, image_column, column, names, repository=repository, held_out=taken)
    return PreTrainingImages(images, bank)


def _some(data: Dataset, most: int | None, seed: int) -> Dataset:
    return data if most is None else data.shuffle(seed=seed).select(range(min(most, len(data))))


def _labels(parts: dict[str, Dataset], called: dict[str, str], args: DataArguments) -> tuple[str, dict[str, Labels], list[str]] | str:
    """The label column, the labels of every split with common class numbers, and the names of the classes. If kNN is not possible, a text that
    says what is missing. Raises ValueError for labels that cannot be read.
    """
    train = parts["train"]
    try:
        column = column_of(train, args.label_column_name, "label", called["train"])
    except ValueError:
        if args.label_column_name is not None:
            raise
        column = None
    # columns of whole numbers with another name, such as image_id, are not classes
    if column is None or not (args.label_column_name or column in LABEL_NAMES or isinstance(train.features[column], ClassLabel)):
        return f"no column of classes in {called['train']!r} ({', '.join(train.column_names)})"
    for role, data in parts.items():
        if column not in data.column_names:
            return f"no column {column!r} in {called[role]!r}"
    labels = read_splits(parts, column, called)
    for role, one in labels.items():
        if not one.labelled.any():
            return f"no label in {called[role]!r}"
    labels, names = joined(labels, called, args.allow_unseen_classes, column)
    if any(one.problem_type != ONE_CLASS or one.values.ndim != 1 for one in labels.values()):
        return f"labels that are not one class for each image in {column!r}"
    if len(names) < 2:
        return f"one class, {listed(names)}"
    return column, labels, names
