"""Where images come from: the embedded digits, data sets of the Hub, local folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_mixup.arguments import DataArguments
from hf_mixup.core.checks import nearest, needed

needed("datasets", "reading a data set")
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset, load_from_disk  # noqa: E402


def digits() -> DatasetDict:
    """scikit-learn's 1797 handwritten digits, 8x8 and grey, in 1437 to train on and 360 to evaluate on, stratified."""
    needed("sklearn", "the digits")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    # 17 shades, 0 to 16
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
    """Two splits of a data set and what their columns are; `train` is None where there is none and none is needed."""

    name: str
    train: Dataset | None
    evaluation: Dataset
    evaluation_split: str
    image_column: str
    label_column: str
    label_names: list[str]


def load_images(
    args: DataArguments, seed: int = 0, *, token: str | None = None, cache_dir: str | None = None, training: bool = True
) -> ImageData:
    """The data set that the arguments name. Raises ValueError when it cannot be had, or lacks splits or columns.

    Args:
        training: False for one to evaluate on, which may lack the split `train`, and if it has one split alone may call it anything.
    """
    splits = load_splits(args, token, cache_dir)
    evaluation_split = next((name for name in ("validation", "val", "valid", "test") if name in splits), None)
    if "train" not in splits and evaluation_split is None and len(splits) == 1:
        evaluation_split = next(iter(splits))
    if "train" not in splits and (training or evaluation_split is None):
        wanted = "a split 'train'" if training else "a split 'validation' or 'test'"
        raise ValueError(f"the data set must have {wanted}, got {sorted(splits)}; rename one.")
    train = splits.get("train")
    described = splits[evaluation_split] if train is None else train
    image_column = _column(described, args.image_column_name, "image", lambda feature: isinstance(feature, Image))
    label_column = _column(described, args.label_column_name, "label", lambda feature: isinstance(feature, ClassLabel))
    feature = described.features[label_column]
    names = feature.names if isinstance(feature, ClassLabel) else [str(n) for n in range(max(described.unique(label_column)) + 1)]
    if evaluation_split is None:
        enough = len(train) * min(args.train_val_split, 1 - args.train_val_split) >= len(names)
        stratify = label_column if isinstance(feature, ClassLabel) and enough else None
        parts = train.train_test_split(args.train_val_split, seed=seed, stratify_by_column=stratify)
        train, evaluation, evaluation_split = parts["train"], parts["test"], f"{args.train_val_split:.0%} of train"
    else:
        evaluation = splits[evaluation_split]
    if args.max_train_samples is not None and train is not None:
        train = train.shuffle(seed=seed).select(range(min(args.max_train_samples, len(train))))
    if args.max_eval_samples is not None:
        evaluation = evaluation.shuffle(seed=seed).select(range(min(args.max_eval_samples, len(evaluation))))
    name = args.dataset_name or _name_of(Path(args.train_dir or args.validation_dir).absolute())
    return ImageData(name, train, evaluation, evaluation_split, image_column, label_column, names)


def _name_of(folder: Path) -> str:
    """Of a data set in folders: `pets` for pets/train."""
    split = folder.name.lower() in ("train", "training", "val", "valid", "validation", "test", "eval", "evaluation")
    return folder.parent.name if split and folder.parent.name else folder.name


def load_splits(args: DataArguments, token: str | None = None, cache_dir: str | None = None) -> dict[str, Dataset]:
    """Every split of the data set that the arguments name, as it is there. Raises ValueError when it cannot be had."""
    folders = {name: path for name, path in (("train", args.train_dir), ("validation", args.validation_dir)) if path is not None}
    if folders:
        for path in folders.values():
            if not Path(path).is_dir():
                raise ValueError(f"train_dir and validation_dir must be folders with one folder a class, got {path!r}; look at the path.")
        files = {name: str(Path(path, "**")) for name, path in folders.items()}
        return load_dataset("imagefolder", data_files=files, cache_dir=cache_dir)
    name = args.dataset_name
    if name == "digits":
        return digits()
    path = Path(name)
    if path.is_dir() and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        loaded = load_from_disk(name)
        return loaded if isinstance(loaded, dict) else {"train": loaded}
    try:
        return load_dataset(name, args.dataset_config_name, token=token, cache_dir=cache_dir)
    except (FileNotFoundError, ConnectionError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"dataset_name must be 'digits', a folder, or a data set of the Hub that can be reached, got {name!r} ({first}); look at the name."
        ) from None


def _column(dataset: Dataset, name: str | None, kind: str, fits: Callable[[Any], bool]) -> str:
    if name is not None:
        if name not in dataset.column_names:
            raise ValueError(f"{kind}_column_name must be a column of the data set, got {name!r}; {nearest(name, dataset.column_names)}")
        return name
    fitting = [column for column, feature in dataset.features.items() if fits(feature)]
    usual = [column for column in ("image", "img", "label", "labels", "fine_label") if column in fitting]
    if not fitting:
        fitting = [column for column in ({"image": ["image", "img"], "label": ["label", "labels"]}[kind]) if column in dataset.column_names]
    if not fitting:
        raise ValueError(f"the data set must have a column of type {kind}, got {dataset.column_names}; name it with {kind}_column_name.")
    return (usual or fitting)[0]


# -- transforms -----------------------------------------------------------------------------------------------------------
