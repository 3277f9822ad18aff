"""Sources of images: the embedded digits, data sets of the Hub, local folders and files."""

from __future__ import annotations

import dataclasses
import glob
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_mixup.arguments import DataArguments
from hf_mixup.core.checks import nearest, needed
from hf_mixup.core.losses import Loss
from hf_mixup.data.dataset import unformatted
from hf_mixup.data.folders import ARCHIVES, SPLITS, class_folders, split_folders
from hf_mixup.data.labels import (
    NUMBER,
    ONE_CLASS,
    SEVERAL_CLASSES,
    Labels,
    in_order,
    listed,
    matched,
    moved,
    of_network,
    places,
    read_splits,
    unnamed,
    with_labels,
)

needed("datasets", "reading a data set")
from datasets import (  # noqa: E402
    Array2D,
    Array3D,
    ClassLabel,
    Dataset,
    DatasetBuilder,
    DatasetDict,
    DatasetInfo,
    Features,
    Image,
    LargeList,
    List,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)

logger = logging.getLogger(__name__)

EVALUATION_SPLITS = ("validation", "val", "valid", "dev", "eval", "evaluation", "test", "testing")
FILES = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset",
}  # fmt: skip
IMAGE_NAMES = ("image", "img", "picture", "photo", "pixel_values", "file_name", "image_path", "path")
LABEL_NAMES = ("label", "labels", "fine_label", "cls", "class", "target", "category")


def digits() -> DatasetDict:
    """scikit-learn's 1797 handwritten digits, 8x8 and grey, 1437 for training and 360 for evaluation, stratified."""
    needed("sklearn", "the digits")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    # 17 grey levels, 0 to 16
    pixels = (data.images * 15.9375).round().astype(np.uint8)
    parts = train_test_split(np.arange(len(pixels)), test_size=360, stratify=data.target, random_state=0)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    return DatasetDict(
        {
            name: Dataset.from_dict({"image": [pixels[i] for i in rows], "label": data.target[rows].tolist()}, features=features)
            for name, rows in zip(("train", "test"), parts, strict=True)
        }
    )


@dataclass
class ImageData:
    """Two splits of a data set, and the meaning of their columns. Every row has a label.

    Attributes:
        name: name of the data set, for people.
        train: the training split, or None if there is none and none is needed.
        label_names: names of the classes, in the order of the class numbers in the label column; for a regression, the column's name.
        problem_type: kind of the labels, as in transformers' configs: class numbers (or shares of classes that sum to 1), lists of
            one share for each class, or float numbers.
        numbered: the classes are numbers without names; `label_names` repeat the numbers.
        repository: the data set's name on the Hub, if it comes from there.
        held_out: `share` and `seed` with which evaluation images were split from the training images, if they were.
    """

    name: str
    train: Dataset | None
    evaluation: Dataset
    evaluation_split: str
    image_column: str
    label_column: str
    label_names: list[str]
    problem_type: str = ONE_CLASS
    numbered: bool = False
    repository: str | None = None
    held_out: dict[str, Any] | None = None


@dataclass(frozen=True)
class KnownClasses:
    """The classes of the checkpoint that training starts from.

    Attributes:
        names: in the order of its outputs.
        fresh: whether its classifier may be replaced if the number of classes differs.
        trains: False if nothing is trained; then the classes must be the checkpoint's own.
    """

    names: Sequence[str]
    fresh: bool = False
    trains: bool = True


def load_images(
    args: DataArguments,
    seed: int = 0,
    *,
    token: str | None = None,
    cache_dir: str | None = None,
    training: bool = True,
    known: KnownClasses | None = None,
    regression: bool = False,
    held_out: Mapping[str, Any] | None = None,
) -> ImageData:
    """Loads the data set that the arguments name. Raises ValueError if it cannot be loaded, lacks splits or columns, or has wrong labels.

    Classes are matched by name, between the splits, and with those of a checkpoint. Rows without a label are left out.

    Args:
        seed: for splitting evaluation images from the training images, and for choosing the images that `max_train_samples` and
            `max_train_samples_per_class` keep.
        training: False for evaluation: the split `train` may be missing, and a single split may have any name.
        known: the classes of the checkpoint. If they include all classes of the data set, its class numbers are used.
        regression: labels are targets of a regression, even if all are whole numbers.
        held_out: `held_out` of the run that is evaluated; its seed and share are used.
    """
    splits, (name, repository) = load_splits(args, token, cache_dir), name_of(args)
    train, evaluation, evaluation_split = chosen_splits(splits, args, training)
    parts = {role: data for role, data in (("train", train), ("evaluation", evaluation)) if data is not None}
    called = {"train": args.train_split or "train", "evaluation": evaluation_split}  # for people
    described, *_ = parts
    image_column = column_of(parts[described], args.image_column_name, "image", called[described])
    label_column = column_of(parts[described], args.label_column_name, "label", called[described])
    for role, data in parts.items():
        for kind, column in (("image", image_column), ("label", label_column)):
            if column not in data.column_names:
                raise ValueError(
                    f"every split must have the {kind} column {column!r}, got {data.column_names} in {called[role]!r}; "
                    f"rename the column, or pass --{kind}_column_name."
                )
    folder = folder_of(args)
    parts = {role: with_images(data, image_column, called[role], folder) for role, data in parts.items()}
    labels = read_splits(parts, label_column, called, numbers=regression)
    _refuse_unlabelled(labels, called, training, label_column)
    labels, names = joined(labels, called, args.allow_unseen_classes or not training, label_column)
    first, numbered = next(iter(labels.values())), all(one.numbered for one in labels.values())
    trains = training and (known is None or known.trains)
    if trains and first.problem_type != NUMBER and len(names) < 2:
        raise ValueError(f"a classifier must have at least two classes, got one, {listed(names)}; add a folder or rows of another class.")
    tell_unlabelled(labels, called)
    if trains:
        empty = sorted({*names} - {*labels["train"].used}, key=names.index)
        if empty:
            logger.warning("train: no image of %d of %d classes: %s", len(empty), len(names), listed(empty))
    in_own_order = labels
    if known is not None and first.problem_type != NUMBER:
        labels, names, numbered = as_network(labels, names, numbered, known)
    parts = {role: with_labels(data, label_column, labels[role]) for role, data in parts.items()}
    train, evaluation, taken = parts.get("train"), parts.get("evaluation"), None
    if evaluation is None:
        taken = share_and_seed(args, seed, held_out)
        kept, out = hold_out(in_own_order["train"], **taken)
        train, evaluation, evaluation_split = train.select(kept), train.select(out), f"{taken['share']:.0%} of train"
    if args.max_train_samples is not None and train is not None:
        train = train.shuffle(seed=seed).select(range(min(args.max_train_samples, len(train))))
    if args.max_train_samples_per_class is not None and train is not None:
        if first.problem_type != ONE_CLASS or isinstance(train.features[label_column], List):
            raise ValueError(
                f"max_train_samples_per_class needs one class for each image, got {first.problem_type.replace('_', ' ')} in column "
                f"{label_column!r}; pass max_train_samples."
            )
        train = train.select(of_every_class(np.asarray(train[label_column]), args.max_train_samples_per_class, seed))
    if args.max_eval_samples is not None:
        evaluation = evaluation.shuffle(seed=seed).select(range(min(args.max_eval_samples, len(evaluation))))
    return ImageData(
        name, train, evaluation, evaluation_split, image_column, label_column, names,
        first.problem_type, numbered, repository, taken,
    )  # fmt: skip


def of_every_class(classes: np.ndarray, most: int, seed: int) -> np.ndarray:
    """The rows of at most `most` images of every class, in random order by the seed. `classes` (N,) are class numbers."""
    drawn = np.random.default_rng(seed).permutation(len(classes))
    order = drawn[np.argsort(classes[drawn], kind="stable")]  # sorted by class, random inside each class
    _, first, counts = np.unique(classes[order], return_index=True, return_counts=True)
    place = np.arange(len(order)) - np.repeat(first, counts)
    kept = np.zeros(len(classes), bool)
    kept[order[place < most]] = True
    return drawn[kept[drawn]]


def check_loss(images: ImageData, losses: Sequence[Loss]) -> None:
    """Raises ValueError for labels that a loss of the run cannot take."""
    fits = {ONE_CLASS: [ONE_CLASS], SEVERAL_CLASSES: [ONE_CLASS, SEVERAL_CLASSES], NUMBER: [NUMBER]}
    seen = {ONE_CLASS: "one class for each image", SEVERAL_CLASSES: "lists of classes", NUMBER: "float numbers"}
    todo = {
        ONE_CLASS: "pass a loss of classes, such as --loss crossentropy",
        SEVERAL_CLASSES: "pass --loss bce",
        NUMBER: "pass a loss of regression, or make the labels names or whole numbers",
    }
    for loss in losses:
        kind = images.problem_type
        if kind not in fits[loss.problem_type]:
            raise ValueError(
                f"labels must fit the loss {type(loss).__name__}, got {seen[kind]} in column {images.label_column!r}; {todo[kind]}."
            )


# -- splits ---------------------------------------------------------------------------------------------------------------


def load_splits(args: DataArguments, token: str | None = None, cache_dir: str | None = None, *, labelled: bool = True) -> dict[str, Any]:
    """All splits of the data set that the arguments name, unchanged: Datasets, or IterableDatasets with `streaming`.

    `labelled`: False if folders of images need no classes. Raises ValueError if it cannot be loaded.
    """
    folders = {"train": ("train_dir", args.train_dir), "validation": ("validation_dir", args.validation_dir)}
    folders = {split: class_folders(path, argument, labelled=labelled) for split, (argument, path) in folders.items() if path is not None}
    if folders:
        return folders
    name, path = args.dataset_name, Path(args.dataset_name)
    if args.dataset_revision is not None and (name == "digits" or path.exists()):
        raise ValueError(f"dataset_revision is for data sets of the Hub, got {args.dataset_revision!r} for {name!r}; leave it out.")
    found = _without_configurations(args, path, cache_dir, labelled)
    if found is not None:
        if args.streaming and path.is_dir():
            raise ValueError(
                "a stream must come from the Hub, from one file, or from a folder of parquet, arrow or tar files, got a folder of images or of "
                f"save_to_disk, {name!r}; leave out --streaming."
            )
        if args.dataset_config_name is not None:
            raise ValueError(
                f"dataset_config_name is for data sets with configurations, got {args.dataset_config_name!r} for {name!r}; leave it out."
            )
        return found
    if path.is_dir() and glob.escape(str(path.resolve())) != str(path.resolve()):
        raise ValueError(f"the path of a folder of data files must be free of *, ? and [, got {name!r}; rename the folder.")
    with told(args):
        builder = load_dataset_builder(name, args.dataset_config_name, revision=args.dataset_revision, token=token, cache_dir=cache_dir)
    if path.is_dir():
        _refuse_other_classes(args, builder)
    with told(args):
        if args.streaming:
            return dict(builder.as_streaming_dataset())
        builder.download_and_prepare()
        return dict(builder.as_dataset())


def _refuse_other_classes(args: DataArguments, builder: DatasetBuilder) -> None:
    """Raises ValueError for files of one folder whose columns of classes list them in different orders: `datasets` takes the first list for all."""
    with told(args):
        files = [str(path) for paths in (builder.config.data_files or {}).values() for path in paths]
        said = [("its card", builder.info.features or {})]
        said += [(Path(path).name, _features_of(Path(path))) for path in files if "://" not in path]
    first: dict[str, tuple[str, list[str]]] = {}
    for where, features in said:
        for column, feature in features.items():
            if not isinstance(feature, ClassLabel):
                continue
            place, names = first.setdefault(column, (where, feature.names))
            if names != feature.names:
                raise ValueError(
                    f"files of one data set must list their classes alike, got {listed(names)} in {place} and {listed(feature.names)} in {where}, "
                    f"column {column!r}; convert one with cast_column, or write both by one DatasetDict."
                )


def _features_of(path: Path) -> Mapping[str, Any]:
    """What a file of Parquet or Arrow says of its columns."""
    if path.suffix == ".parquet":
        return Features.from_arrow_schema(pq.read_schema(path))
    if path.suffix == ".arrow":
        with pa.memory_map(str(path)) as source:
            try:
                schema = pa.ipc.open_stream(source).schema
            except pa.ArrowInvalid:
                schema = pa.ipc.open_file(source).schema
        return Features.from_arrow_schema(schema)
    return {}


def _without_configurations(args: DataArguments, path: Path, cache_dir: str | None, labelled: bool) -> dict[str, Dataset] | None:
    """The digits, a folder of `save_to_disk` or of images, or a file; None for anything else."""
    if args.dataset_name == "digits":
        return digits()
    if path.is_file():
        return _of_file(args, path, cache_dir)
    listing = path / "dataset_dict.json"
    if listing.is_file() or (path / "state.json").is_file():
        with told(args):
            parts = json.loads(listing.read_text())["splits"] if listing.is_file() else ["train"]
            return {part: _from_disk(path / part if listing.is_file() else path) for part in parts}
    return split_folders(path, labelled=labelled) if path.is_dir() else None


def _from_disk(folder: Path) -> Dataset:
    """A split that `save_to_disk` wrote. It can have no rows, which `datasets` itself cannot read."""
    if json.loads((folder / "state.json").read_text())["_data_files"]:
        return load_from_disk(str(folder))
    features = DatasetInfo.from_directory(str(folder)).features
    return Dataset.from_dict({name: [] for name in features}, features=features)


def _of_file(args: DataArguments, path: Path, cache_dir: str | None) -> dict[str, Dataset]:
    extension = path.suffix.lower()
    if extension not in FILES:
        todo = "unpack it, and name its folder" if extension in ARCHIVES else "convert it, or name its folder"
        raise ValueError(f"dataset_name must be a file of {', '.join(FILES)}, got {str(path)!r}; {todo}.")
    more = {"sep": "\t"} if extension == ".tsv" else {}
    more |= {"data_files": {"train": glob.escape(str(path))}, "cache_dir": cache_dir, "streaming": args.streaming}
    with told(args):
        return dict(load_dataset(FILES[extension], **more))


@contextmanager
def told(args: DataArguments) -> Iterator[None]:
    """Context manager that turns errors of `datasets` into a one-sentence ValueError."""
    try:
        yield
    except Exception as error:
        deepest: BaseException = error
        while deepest.__cause__ is not None:
            deepest = deepest.__cause__
        first = " ".join(str(deepest).split())[:300].rstrip(".") or type(deepest).__name__
        todo = "check the spelling, the files and the connection"
        if "onfig" in first and ("missing" in first or "not found" in first):
            todo = "pass --dataset_config_name"
        elif args.dataset_revision is not None and "evision" in first:
            todo = "check --dataset_revision"
        elif "string class label" in first:
            todo = "unpack the archives"
        raise ValueError(
            "dataset_name must be 'digits', a folder, or a data set of the Hub that can be reached, or a file of one, "
            f"got {args.dataset_name!r} ({first}); {todo}."
        ) from None


def name_of(args: DataArguments) -> tuple[str, str | None]:
    """The data set's name for people, and its name on the Hub, if it comes from there."""
    if args.dataset_name is not None and not Path(args.dataset_name).exists():
        return args.dataset_name, None if args.dataset_name == "digits" else args.dataset_name
    if args.dataset_name is not None and Path(args.dataset_name).name not in ("", ".."):
        return args.dataset_name, None
    path = Path(os.path.abspath(args.dataset_name or args.train_dir or args.validation_dir))
    while path.name.lower() in SPLITS and path.parent.name:
        path = path.parent
    return path.name or "images", None


def folder_of(args: DataArguments) -> Path | None:
    """The folder of a table, at which relative paths of images may start."""
    path = Path(args.dataset_name) if args.dataset_name is not None else None
    if path is None or not path.exists():
        return None
    return path.absolute() if path.is_dir() else path.absolute().parent


def chosen_splits(splits: dict[str, Dataset], args: DataArguments, training: bool) -> tuple[Dataset | None, Dataset | None, str | None]:
    """The training images, the evaluation images, and the name of the latter split; None for a missing one."""
    train_rows = None if args.train_split is None else _absolute(args.train_split, splits, "train_split")
    train = splits.get("train", splits.get("training")) if train_rows is None else _cut(splits, train_rows)
    if args.eval_split is not None:
        rows = _absolute(args.eval_split, splits, "eval_split")
        used = train_rows or [("train", 0, len(train))] if train is not None else []
        if training and any(a[0] == b[0] and a[1] < b[2] and b[1] < a[2] for a in rows for b in used):
            logger.warning("some images of eval_split %r are also trained on", args.eval_split)
        return train, _cut(splits, rows), args.eval_split
    taken = {part[0] for part in train_rows or ()}
    name = next((name for name in EVALUATION_SPLITS if name in splits and name not in taken), None)
    if train is None and name is None and len(splits) == 1:
        name = next(iter(splits))
    if train is None and (training or name is None):
        wanted, flag = ("a split 'train'", "train") if training else ("a split 'validation' or 'test'", "eval")
        raise ValueError(f"the data set must have {wanted}, got {sorted(splits)}; choose one with --{flag}_split.")
    return train, None if name is None else splits[name], name


def _absolute(instruction: str, splits: dict[str, Dataset], argument: str) -> list[tuple[str, int, int]]:
    try:
        found = ReadInstruction.from_spec(instruction).to_absolute({name: len(data) for name, data in splits.items()})
    except (ValueError, AssertionError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"{argument} must be a split or a slice such as train[:10%], got {instruction!r} ({reason}); choose from {', '.join(splits)}."
        ) from None
    ranges = [(part.splitname, part.from_ or 0, len(splits[part.splitname]) if part.to is None else part.to) for part in found]
    if not any(high > low for _, low, high in ranges):
        raise ValueError(f"{argument} must hold images, got none in {instruction!r}; make the slice larger.")
    return ranges


def _cut(splits: dict[str, Dataset], ranges: list[tuple[str, int, int]]) -> Dataset:
    parts = [splits[name].select(range(low, high)) for name, low, high in ranges if high > low]
    columns = [part.features for part in parts]
    for own in columns:
        if own != columns[0]:
            column = next((name for name in columns[0] if own.get(name) != columns[0][name]), next(iter(own)))
            raise ValueError(
                f"splits that are joined must have the same columns and classes, got {columns[0].get(column)} and {own.get(column)} in "
                f"{column!r}; convert one with cast_column."
            )
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def share_and_seed(args: DataArguments, seed: int, held_out: Mapping[str, Any] | None) -> dict[str, Any]:
    if held_out is None:
        return {"share": args.train_val_split, "seed": seed}
    share = held_out["share"]
    if args.train_val_split not in (share, DataArguments.train_val_split):
        raise ValueError(f"train_val_split must be that of the run, {share}, got {args.train_val_split}; leave it out.")
    return {"share": share, "seed": held_out["seed"]}


def hold_out(labels: Labels, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows for training and for evaluation, among those with a label; stratified by class if the classes have enough images."""
    rows = int(labels.labelled.sum())
    if rows < 2:
        raise ValueError(
            f"splitting off evaluation images needs at least two images, got {rows} in 'train'; add images, or pass --eval_split."
        )
    data = Dataset.from_dict({"row": np.arange(rows)})
    out = min(math.ceil(rows * share), rows - 1)
    stratify = None
    if labels.problem_type == ONE_CLASS and labels.values.ndim == 1:
        values = labels.values[labels.labelled]
        sizes = np.unique(values, return_counts=True)[1]
        data = data.add_column("label", values, feature=ClassLabel(names=labels.names))
        stratify = "label" if sizes.min() >= 2 and len(sizes) <= min(out, rows - out) else None
    parts = data.train_test_split(out, seed=seed, stratify_by_column=stratify)
    return np.array(parts["train"]["row"]), np.array(parts["test"]["row"])


# -- columns --------------------------------------------------------------------------------------------------------------


def column_of(dataset: Dataset, name: str | None, kind: str, split: str) -> str:
    """The column of images or of labels. Raises ValueError if there is none, or none with the given name."""
    if name is not None:
        if name not in dataset.column_names:
            raise ValueError(f"{kind}_column_name must be a column of the data set, got {name!r}; {nearest(name, dataset.column_names)}")
        return name
    fits: Callable[[Any], bool] = {
        "image": lambda feature: isinstance(feature, Image),
        "label": lambda feature: isinstance(feature, ClassLabel) or isinstance(getattr(feature, "feature", None), ClassLabel),
    }[kind]
    names = {"image": IMAGE_NAMES, "label": LABEL_NAMES}[kind]
    fitting = [column for column, feature in dataset.features.items() if fits(feature)]
    by_name = [column for column in names[:2] if column in dataset.column_names]
    if fitting and by_name and not set(fitting) & set(names):
        raise ValueError(
            f"the {kind} column must be known, got {fitting[0]!r} of type {kind} and {by_name[0]!r} of that name in {split!r}; "
            f"pass --{kind}_column_name."
        )
    if not fitting:
        fitting = [column for column in names if column in dataset.column_names]
    if not fitting and kind == "label":  # as in WebDataset
        whole = [column for column, feature in dataset.features.items() if isinstance(feature, Value) and "int" in feature.dtype]
        fitting = whole if len(whole) == 1 else []
    if not fitting:
        raise ValueError(
            f"the data set must have a column of type {kind}, got {dataset.column_names} in {split!r}; pass --{kind}_column_name."
        )
    return next((column for column in names if column in fitting), fitting[0])


def with_images(data: Dataset, column: str, split: str, folder: Path | None = None) -> Dataset:
    """The split with its column decoded as images. The column may hold images, paths, bytes, dictionaries of these, or arrays of pixels.

    Args:
        folder: where relative paths may start, beside the working folder.

    Raises:
        ValueError: for a column of another type.
    """
    data = unformatted(data) if isinstance(data, Dataset) else data
    feature = data.features[column]
    if isinstance(feature, Image) and feature.decode:
        return data
    dictionary = isinstance(feature, dict) and set(feature) <= {"bytes", "path"}
    pixels = isinstance(feature, (Array2D, Array3D)) or (
        isinstance(feature, (List, LargeList)) and isinstance(feature.feature, (List, LargeList))
    )
    text = isinstance(feature, Value) and feature.dtype in ("string", "large_string")
    if not (isinstance(feature, Image) or dictionary or pixels or text or (isinstance(feature, Value) and "binary" in feature.dtype)):
        raise ValueError(
            f"the image column must hold images, paths, bytes or arrays of pixels, got {feature} in {column!r} of {split!r}; "
            "pass --image_column_name."
        )
    if text and folder is not None and len(data):
        old = data[column][:]
        paths = [in_folder(path, folder) for path in old]
        if paths != old:
            data = data.remove_columns(column).add_column(column, paths)
    # arrays stay arrays: as images they would have at most four channels, and lose their dtype
    return data if pixels else data.cast_column(column, Image())


def in_folder(path: str | None, folder: Path) -> str | None:
    """A path in a table, which may start at the working folder or at the table's folder."""
    lost = path is not None and "://" not in path and not os.path.isabs(path) and not os.path.exists(path)
    return str(folder / path) if lost else path


# -- labels ---------------------------------------------------------------------------------------------------------------


def _refuse_unlabelled(labels: dict[str, Labels], called: Mapping[str, str], training: bool, column: str) -> None:
    for role, one in labels.items():
        if role == "train" and not training:
            continue
        if not len(one.labelled):
            raise ValueError(
                f"every split must hold images, got none in {called[role]!r}; choose others with --train_split and --eval_split."
            )
        if not one.labelled.any():
            raise ValueError(
                f"images must have labels, got none in the {len(one.labelled)} rows of {called[role]!r} (-1 or None in column {column!r}); "
                f"choose another split with --{'train' if role == 'train' else 'eval'}_split, such as 'train[:10%]'."
            )


def tell_unlabelled(labels: Mapping[str, Labels], called: Mapping[str, str]) -> None:
    """Warns of rows without a label, which `with_labels` leaves out."""
    for role, one in labels.items():
        if not one.labelled.all():
            logger.warning("%s: %d of %d rows have no label and are left out", called[role], (~one.labelled).sum(), len(one.labelled))


def joined(labels: dict[str, Labels], called: Mapping[str, str], allow_unseen: bool, column: str) -> tuple[dict[str, Labels], list[str]]:
    """The labels of all splits with common class numbers, and the names: first those of the first split, then those that it lacks."""
    usable = {role: one for role, one in labels.items() if one.labelled.any()}
    kinds = {role: one.problem_type for role, one in usable.items()}
    if set(kinds.values()) == {ONE_CLASS, SEVERAL_CLASSES} and all(one.values.ndim == 2 for one in usable.values()):
        kinds = dict.fromkeys(kinds, SEVERAL_CLASSES)
    if len(set(kinds.values())) > 1:
        raise ValueError(
            f"labels of all splits must be of one kind, got {' and '.join(f'{kind} in {called[role]!r}' for role, kind in kinds.items())} "
            f"in column {column!r}; convert one, or choose other splits with --train_split and --eval_split."
        )
    kind = next(iter(kinds.values()))
    labels = {role: dataclasses.replace(one, problem_type=kind) for role, one in labels.items()}
    (first_role, first), *others = usable.items()
    if kind == NUMBER:
        return labels, first.names
    names = list(first.names)
    # for every split, the common number of each of its classes
    meant: dict[str, list[str]] = {first_role: list(first.names)}
    for role, one in others:
        if one.numbered != first.numbered and not (one.numbered and first.declared):
            raise ValueError(
                f"labels of all splits must be of one kind, got names in one and bare numbers in the other of {called[first_role]!r} and {called[role]!r} "
                f"in column {column!r}; convert one."
            )
        found = places(first.names, one.names, numbered=one.numbered and not first.numbered)
        used = set(one.used)
        meant[role] = [name if place is None else first.names[place] for name, place in zip(one.names, found, strict=True)]
        lacking = [name for name, place in zip(one.names, found, strict=True) if place is None and name in used]
        if lacking and not allow_unseen:
            raise ValueError(
                f"every class of {called[role]!r} must be one of {called[first_role]!r}, got {listed(lacking)}, where {called[first_role]!r} has {listed(names)}; "
                "check the spelling of the names, or pass --allow_unseen_classes to evaluate on classes that training never sees."
            )
        names += [name for name in lacking if name not in names]
    if not first.declared:
        names = in_order(names)
    number = {name: place for place, name in enumerate(names)}
    for role, one in labels.items():
        if role in usable:
            labels[role] = moved(one, [number.get(name, 0) for name in meant[role]], names)
        else:
            values = np.zeros((len(one.labelled), len(names)), np.float32) if first.values.ndim == 2 else np.full(len(one.labelled), -1)
            labels[role] = dataclasses.replace(one, names=names, values=values)
    return labels, names


def as_network(
    labels: dict[str, Labels], names: list[str], numbered: bool, known: KnownClasses
) -> tuple[dict[str, Labels], list[str], bool]:
    """The labels with the numbers of the checkpoint's outputs, if it has these classes, so that its classifier can be kept."""
    theirs = list(known.names)
    found = matched(theirs, names, numbered=numbered)
    if found is None or (known.trains and len(found) < len(theirs)):
        another_size = len(names) != len(theirs)
        if not known.trains and not (known.fresh and another_size):
            of_network(theirs, names, numbered=numbered)
        if found is None and not another_size:
            logger.warning(
                "the checkpoint knows other classes (%s) than those of the data set (%s): training starts with the weights of its classifier, in this order",
                listed(theirs),
                listed(names),
            )
        return labels, names, numbered
    if unnamed(theirs) and len(names) == len(theirs):
        own = dict(zip(found, names, strict=True))
        theirs = [own[place] for place in range(len(theirs))]
    return {split: moved(one, found, theirs) for split, one in labels.items()}, theirs, False
