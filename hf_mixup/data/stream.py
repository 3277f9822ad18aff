"""Images that are read during training, from files or the Hub, without a local copy of the data set."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_mixup.arguments import DataArguments
from hf_mixup.core.checks import check_known, needed, one_line
from hf_mixup.core.rng import hashed, keyed
from hf_mixup.data.augment import Transform
from hf_mixup.data.dataset import GREY_MODES, Keyed, examples_of, file_of
from hf_mixup.data.labels import ONE_CLASS, Labels, listed, matched
from hf_mixup.data.pixels import read_image
from hf_mixup.data.sources import (
    EVALUATION_SPLITS,
    ImageData,
    KnownClasses,
    as_network,
    column_of,
    folder_of,
    in_folder,
    joined,
    load_splits,
    name_of,
    told,
    with_images,
)

needed("datasets", "reading a data set")
from datasets import ClassLabel, Image, IterableDataset, Value  # noqa: E402

logger = logging.getLogger(__name__)


@dataclass
class StreamedSplit:
    """The rows of a split that have a label, in the order of the stream. Without a label column: all rows, with class number -1.

    Attributes:
        data: the stream, with the image column, of `Image(decode=False)`, and the label column.
        classes: for each class number in the column, that of the network; or the names of the network's classes, in which each label is
            looked up.
        numbered: the column holds numbers, not names.
        start, stop: the first row, and the row after the last one.
        folder: where relative paths of images may start, beside the working folder.
        tokens: tokens for repositories of the Hub.
        grey: the column declares images without colours.
    """

    data: IterableDataset
    name: str
    image_column: str
    label_column: str | None
    classes: list[int] | list[str]
    numbered: bool = False
    start: int = 0
    stop: int | None = None
    folder: Path | None = None
    tokens: dict[str, str | bool | None] = field(default_factory=dict)
    grey: bool = False
    _known: dict[Any, int] = field(default_factory=dict, repr=False)

    def rows(self, shuffled_by: int | None = None) -> Iterator[tuple[int, dict[str, Any] | None, int]]:
        """Yields (place in the stream, value of the image column, class number). Raises ValueError for an invalid label."""
        data = self.data.skip(self.start) if self.start else self.data
        data = data if self.stop is None else data.take(self.stop - self.start)
        data = data if shuffled_by is None else data.shuffle(shuffled_by)
        # by `iter`, because `datasets` itself gives whole files to workers, and some workers get none if there are too few
        for place, row in enumerate(data.iter(1)):
            image = row[self.image_column][0]
            if self.label_column is None:
                yield place, image, -1
                continue
            label = row[self.label_column][0]
            if label not in (None, "") and (label != -1 or isinstance(label, str)):
                yield place, image, self._number(label, place, image)

    def image(self, value: dict[str, Any] | None) -> Any:
        """A source for `read_image`, from a value of the image column."""
        if value is not None and value.get("bytes") is None and self.folder is not None:
            value = {**value, "path": in_folder(value["path"], self.folder)}
        return read_image(file_of(value, self.tokens), 1) if self.grey else file_of(value, self.tokens)

    def at(self, place: int, value: dict[str, Any] | None) -> str:
        """For a sentence."""
        path = (value or {}).get("path")
        return f"place {place} of the stream of {self.name!r}" + (f", {path}" if path else "")

    def _number(self, label: Any, place: int, value: Any) -> int:
        if label not in self._known:
            if isinstance(self.classes[0], str):
                found = matched(self.classes, [str(label)], numbered=self.numbered)
                right, number = f"among the classes of the checkpoint, {listed(self.classes)}", None if found is None else found[0]
            else:
                right = f"class numbers, 0 to {len(self.classes) - 1}"
                number = self.classes[label] if 0 <= label < len(self.classes) else None
            if number is None:
                raise ValueError(
                    f"labels must be {right}, got {label!r} at {self.at(place, value)} in column {self.label_column!r}; "
                    "correct the label, or write -1 for no label."
                )
            self._known[label] = number
        return self._known[label]


class ImageStream(Keyed, torch.utils.data.IterableDataset):
    """`{"pixel_values": (C, H, W) float32, "labels": int}` from a split that is read during training; or bytes, which are finished on the device.

    A transform draws by (seed, epoch, place in the stream). So the images do not depend on the batch size, and with `batch_size` the batches do
    not depend on the number of workers.

    Every worker reads the bytes of all rows, and decodes only its own images. accelerate distributes batches to processes; its first process
    reads for all.

    A resumed run of MixupTrainer is exact: it reads and drops the rows that the current pass has seen.

    Args:
        shuffle: shuffle with the buffer of `datasets`, in another order in every epoch.
        batch_size: batch size of the loader. Workers take turns after this many images, so only the last batch may be smaller.
        on_device: see `ImageDataset`.

    Raises:
        ValueError: for images that cannot be read, and for invalid labels.
    """

    def __init__(
        self,
        split: StreamedSplit,
        transform: Transform,
        seed: int = 0,
        *,
        shuffle: bool = False,
        batch_size: int = 1,
        on_device: bool = False,
    ):
        super().__init__(transform, seed, on_device)
        self.split, self.shuffle, self.batch_size = split, shuffle, batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        epoch = keyed(self.seed, int(self._epoch)).initial_seed()
        for count, (place, value, label) in enumerate(self.split.rows(epoch % 2**32 if self.shuffle else None)):
            if count // self.batch_size % workers != worker:
                continue
            refused = functools.partial(self._unreadable, place, value)
            try:
                image = self.transform.opened(self.split.image(value), refused)
            except Exception as error:
                raise refused(error) from None
            yield from examples_of(self.transform, [image], [label], hashed(torch.tensor([place]), epoch), self.on_device)

    def _unreadable(self, place: int, value: Any, error: Exception) -> ValueError:
        where = self.split.at(place, value)
        return ValueError(f"every row must hold a readable image, got an error at {where} ({one_line(error)}); repair or drop that row.")


def load_stream(
    args: DataArguments, *, token: str | None = None, cache_dir: str | None = None, known: KnownClasses | None = None, training: bool = True
) -> ImageData:
    """The splits that the arguments name, as `StreamedSplit`s: like `load_images`, but rows are read only when they are needed.

    Raises ValueError if it cannot be loaded, lacks splits or columns, or its classes are unknown.
    """
    splits, (name, repository) = load_splits(args, token, cache_dir), name_of(args)
    train = _range(args.train_split or ("train" if "train" in splits else "training"), splits, "train_split") if training else None
    chosen = args.eval_split or next((name for name in EVALUATION_SPLITS if name in splits and (train is None or name != train[0])), None)
    if chosen is None:
        raise ValueError(
            f"a stream must have a split to evaluate on, got {sorted(splits)}; choose one with --eval_split, such as 'train[:1000]' beside "
            "--train_split 'train[1000:]'."
        )
    evaluation = _range(chosen, splits, "eval_split")
    if train is not None and train[0] == evaluation[0] and _meet(train[1:], evaluation[1:]):
        logger.warning("some images of eval_split %r are also trained on", chosen)
    ranges = {"train": train, "evaluation": evaluation} if train is not None else {"evaluation": evaluation}
    called = {"train": args.train_split or "train", "evaluation": chosen}
    parts, columns = {}, None
    for role, (split, *_) in ranges.items():
        with told(args):
            parts[role] = splits[split]._resolve_features()  # for files without a schema, from the first row
        if columns is None:
            columns = [column_of(parts[role], getattr(args, f"{kind}_column_name"), kind, called[role]) for kind in ("image", "label")]
        lacking = [column for column in columns if column not in parts[role].column_names]
        if lacking:
            raise ValueError(
                f"every split must have the column {lacking[0]!r}, got {parts[role].column_names} in {called[role]!r}; rename the column."
            )
    label_column = columns[1]
    classes, names, numbered = _classes(parts, label_column, called, known, args.allow_unseen_classes or not training)
    most = {"train": args.max_train_samples, "evaluation": args.max_eval_samples}
    for role, data in parts.items():
        where = args, called[role], *ranges[role][1:], most[role], token
        parts[role] = split = _streamed(data, *where, *columns, classes=classes[role], numbered=numbered)
        if next(split.rows(), None) is None:
            raise ValueError(
                f"a stream must hold images with labels, got none in {called[role]!r} (-1 or None in column {label_column!r}); "
                f"choose another split with --{'train' if role == 'train' else 'eval'}_split."
            )
    return ImageData(name, parts.get("train"), parts["evaluation"], chosen, *columns, names, ONE_CLASS, False, repository)


def load_unlabelled_stream(
    args: DataArguments, *, token: str | None = None, cache_dir: str | None = None
) -> tuple[str, StreamedSplit, str | None]:
    """The name, the images to train on, whatever labels they have, and the repository on the Hub. Raises ValueError as `load_stream`."""
    splits, (name, repository) = load_splits(args, token, cache_dir, labelled=False), name_of(args)
    called = args.train_split or ("train" if "train" in splits else "training")
    split, start, stop = _range(called, splits, "train_split")
    with told(args):
        data = splits[split]._resolve_features()
    column = column_of(data, args.image_column_name, "image", called)
    found = _streamed(data, args, called, start, stop, args.max_train_samples, token, column, None, classes=[])
    if next(found.rows(), None) is None:
        raise ValueError(f"a split to train on must hold images, got none in {called!r}; choose another with --train_split.")
    return name, found, repository


def _streamed(
    data: IterableDataset, args: DataArguments, called: str, start: int, stop: int | None, most: int | None, token: str | None, image: str,
    label: str | None, **labels: Any,
) -> StreamedSplit:  # fmt: skip
    """The rows from `start` to `stop`, of which the first `most`, of the columns `image` and `label`."""
    if most is not None:
        stop = min(start + most, start + most if stop is None else stop)
    feature = data.features[image]
    if not isinstance(feature, (Image, Value, dict)):
        raise ValueError(f"a stream must hold images, paths or bytes, got {feature} in {image!r}; leave out --streaming.")
    columns = [image] if label is None else [image, label]
    data = with_images(data, image, called).cast_column(image, Image(decode=False)).select_columns(columns)
    tokens = {repository: token} if (repository := name_of(args)[1]) else {}
    grey = isinstance(feature, Image) and feature.mode in GREY_MODES
    return StreamedSplit(data, called, image, label, **labels, start=start, stop=stop, folder=folder_of(args), tokens=tokens, grey=grey)


def _range(text: str, splits: dict[str, IterableDataset], argument: str) -> tuple[str, int, int | None]:
    """The split, the first row, and the row after the last one."""
    found = re.fullmatch(r"([^\[\]+]+)(?:\[(\d*):(\d*)\])?", text)
    if found is None:
        raise ValueError(
            f"{argument} of a stream must be one split or rows of it, such as train[1000:], got {text!r}; a stream has no length to take a share of, "
            "so give numbers of rows."
        )
    split, start, stop = found.groups()
    check_known(argument, split, splits)
    start, stop = int(start or 0), int(stop) if stop else None
    if stop is not None and stop <= start:
        raise ValueError(f"{argument} must hold images, got none in {text!r}; make the slice larger.")
    return split, start, stop


def _meet(one: tuple[int, int | None], other: tuple[int, int | None]) -> bool:
    return (other[1] is None or one[0] < other[1]) and (one[1] is None or other[0] < one[1])


def _classes(
    parts: dict[str, IterableDataset], column: str, called: dict[str, str], known: KnownClasses | None, allow_unseen: bool
) -> tuple[dict[str, list[int] | list[str]], list[str], bool]:
    """`StreamedSplit.classes` by role, the names of the classes, and whether the column holds numbers, not names."""
    features = {role: data.features[column] for role, data in parts.items()}
    first, *others = features.values()
    fits = isinstance(first, ClassLabel) or (isinstance(first, Value) and ("int" in first.dtype or "string" in first.dtype))
    if not fits or any(type(other) is not type(first) for other in others):
        raise ValueError(
            f"labels of a stream must be one class for each image in every split, got {' and '.join(map(str, features.values()))} in column "
            f"{column!r}; leave out --streaming, or pass --label_column_name."
        )
    if isinstance(first, ClassLabel):
        # a row of every class
        labels = {
            role: Labels(ONE_CLASS, list(feature.names), np.arange(len(feature.names)), np.ones(len(feature.names), bool), declared=True)
            for role, feature in features.items()
        }
        labels, names = joined(labels, called, allow_unseen, column)
        if known is not None:
            labels, names, _ = as_network(labels, names, False, known)
        return {role: one.values.tolist() for role, one in labels.items()}, names, False
    if known is None:
        raise ValueError(
            f"the classes of a stream must be known before it is read, got {first} in column {column!r} and no checkpoint; make it a column of "
            "type ClassLabel, pass --model_name_or_path, or leave out --streaming."
        )
    return {role: list(known.names) for role in parts}, list(known.names), "int" in first.dtype
