"""From a list of examples to stacked inputs and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from hf_mixup.core.checks import check_examples
from hf_mixup.core.plan import LABEL_KEYS, ONE_PASS_FROM


def as_mapping(example: Any, name: str = "pixel_values") -> Mapping:
    """An example as a mapping. It converts pairs (image, label), as torchvision's data sets give them, and objects with attributes."""
    if isinstance(example, (dict, Mapping)):  # the check for dict is ten times as fast
        return example
    if isinstance(example, (tuple, list)) and len(example) == 2:
        return {name: example[0], "labels": example[1]}
    if hasattr(example, "__dict__") and not isinstance(example, Tensor):
        return vars(example)
    raise TypeError(
        f"examples must be mappings with 'pixel_values' and 'labels', or pairs (image, label), got {type(example).__name__}; "
        "return one of these from the data set."
    )


def unpacked(examples: list, every_column: bool, name: str | None) -> tuple[list[Tensor], Tensor, dict[str, Any], str]:
    """Splits a list of examples into images, labels, other columns that can become tensors, and the name of the image column."""
    if not examples:
        check_examples(examples)
    if {*map(type, examples)} != {dict}:
        examples = [as_mapping(example, name or "pixel_values") for example in examples]
    first = examples[0]
    image_key, classes_key = input_key(first, name), label_key(first)
    others = {}
    for key, value in first.items():
        if key in (image_key, classes_key) or not (every_column or isinstance(value, (Tensor, np.ndarray))):
            continue
        column = _stacked([example.get(key) for example in examples])
        if column is not None:
            others[key] = column
    images = [example[image_key] for example in examples]
    if {*map(type, images)} != {Tensor}:
        images = [_as_tensor(image) for image in images]
    return images, stack_labels([example[classes_key] for example in examples]), others, image_key


def stack_labels(labels: list) -> Tensor:
    """Stacks class numbers, soft labels, numbers or label maps to (B, ...). Raises TypeError for other values, or different lengths."""
    check_not_boxes(labels)
    try:
        if isinstance(labels[0], int):
            labels = np.array(labels)  # torch reads an array five times as fast as a list
        elif isinstance(labels[0], np.ndarray):
            labels = np.stack(labels)
        return torch.stack(labels) if isinstance(labels[0], Tensor) else torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"labels must be class numbers, or soft labels of one length, got {labels[0]!r} and others; convert names to class numbers in the data set."
        ) from None


def _as_tensor(image: Any) -> Any:
    """Converts pixels that are an array, or lists, to a tensor. Data sets that were mapped by a processor hold such pixels."""
    if isinstance(image, np.ndarray):
        return torch.from_numpy(image)
    return torch.tensor(image) if isinstance(image, list) else image


def _stacked(values: list) -> Tensor | None:
    """Stacks a column to (B, ...). None if it holds other values than numbers, or arrays of different shapes."""
    try:
        return torch.stack([torch.as_tensor(value) for value in values])
    except (TypeError, ValueError, RuntimeError):
        return None


def stack_examples(examples: list) -> dict[str, Any]:
    """MixupTrainer's default collator. It is like transformers' own, but drops columns that cannot become tensors, such as PIL images.

    It also takes examples without labels, for predictions.
    """
    examples = [as_mapping(example) for example in examples]
    first, batch = examples[0], {}
    classes = next((key for key in LABEL_KEYS if first.get(key) is not None), None)  # of several columns always the same
    for key in first:
        column = [example.get(key) for example in examples]
        if key == classes:
            batch["labels"] = stack_labels(column)
        elif key in INPUT_NAMES:
            images = of_one_shape([_as_tensor(image) for image in column], key)
            batch[key] = images if isinstance(images, Tensor) else torch.stack(images)
        else:
            stacked = _stacked(column)
            if stacked is not None:
                batch[key] = stacked
    return batch


def of_one_shape(images: list[Tensor], name: str) -> list[Tensor] | Tensor:
    """Checks that all images have one shape. Returns small images as one stacked tensor, large ones as a list."""
    first = images[0]
    # torch.stack would convert images of several dtypes to one
    if (
        isinstance(first, Tensor)
        and first.numel() < ONE_PASS_FROM
        and all(getattr(image, "dtype", None) == first.dtype for image in images)
    ):
        try:
            return torch.stack(images)
        except (RuntimeError, TypeError):
            pass  # the check below has a better message
    check_examples(images, name)
    return images


# names of inputs of transformers' networks that can be mixed
INPUT_NAMES = ("pixel_values", "input_values", "input_features")


def input_key(columns: Mapping, name: str | None) -> str:
    """The column that is mixed: `name`, or the one with a usual name. Raises ValueError for none, or several."""
    found = [key for key in (INPUT_NAMES if name is None else (name,)) if key in columns]
    if len(found) > 1:
        raise ValueError(f"only one column can be mixed, got {' and '.join(found)}; choose one with input_name.")
    if not found:
        raise ValueError(
            f"examples must have a column {name or 'pixel_values'!r}, got {sorted(columns)}; "
            "rename the image column, and set remove_unused_columns=False if the Trainer dropped it."
        )
    return found[0]


def label_key(columns: Mapping) -> str:
    for key in LABEL_KEYS:
        if key in columns:
            return key
    if "mask_labels" in columns:
        raise ValueError(
            "labels must be classes or label maps, got mask_labels, masks of single instances, which cannot be mixed; train without mixing."
        )
    raise ValueError(f"examples must have a column 'labels' or 'label', got {sorted(columns)}; rename the column of the classes.")


def batch_like(example: Tensor, batch: int) -> Tensor:
    """An uninitialised batch, in shared memory inside a worker, which avoids a copy to the main process."""
    shape = (batch, *example.shape)
    if get_worker_info() is None or example.device.type != "cpu":
        return example.new_empty(shape)
    storage = example._typed_storage()._new_shared(batch * example.numel(), device=example.device)
    return example.new(storage).resize_(shape)


def check_not_boxes(labels: Any) -> None:
    """Raises ValueError for annotations of object detection."""
    if isinstance(labels, Sequence) and labels and isinstance(labels[0], Mapping):
        raise TypeError(
            f"labels must be classes or label maps, got {', '.join(sorted(map(str, labels[0]))[:4])} of every image, annotations that cannot be mixed; "
            "train without mixing."
        )
