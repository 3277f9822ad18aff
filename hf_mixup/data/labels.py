"""The meaning of a label column: named classes, several classes for each image, or numbers. It also matches classes by name."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_mixup.core.checks import needed

needed("datasets", "reading a data set")
from datasets import ClassLabel, Dataset, DatasetInfo, Features, LargeList, List, Value, concatenate_datasets  # noqa: E402

logger = logging.getLogger(__name__)

# as transformers' configs name them
ONE_CLASS, SEVERAL_CLASSES, NUMBER = "single_label_classification", "multi_label_classification", "regression"
UNNAMED = "LABEL_"  # transformers' names for classes without a name


@dataclass(frozen=True)
class Labels:
    """The labels of one split.

    Attributes:
        problem_type: their kind, as in transformers' configs.
        names: names of the classes; for a regression, the name of its column.
        values: class numbers, (N,) int64; shares of the classes, (N, len(names)) float32; or numbers, (N,) float32.
        labelled: (N,) bool. Rows with None have no label, and class numbers of -1.
        numbered: classes are whole numbers without names; `names` repeat the numbers.
        declared: the data set lists the names itself, so some of them may have no row.
    """

    problem_type: str
    names: list[str]
    values: np.ndarray
    labelled: np.ndarray
    numbered: bool = False
    declared: bool = False

    @property
    def used(self) -> list[str]:
        """Names of the classes that occur in some row."""
        if self.problem_type == NUMBER:
            return self.names
        if self.values.ndim == 2:
            return [name for name, some in zip(self.names, self.values.any(0), strict=True) if some]
        return [self.names[number] for number in np.unique(self.values[self.labelled])]


def whole_numbers(names: Iterable[str]) -> list[int] | None:
    """The names as numbers, if all are different whole numbers such as '3' or '003', but not '-1'; else None."""
    names = list(names)
    if not names or not all(re.fullmatch("[0-9]+", name) for name in names):
        return None
    numbers = list(map(int, names))
    return numbers if len(set(numbers)) == len(numbers) else None


def in_order(names: Iterable[str]) -> list[str]:
    """Names in the order of their class numbers: by value if all are whole numbers, else alphabetically."""
    names = sorted(names)
    numbers = whole_numbers(names)
    return names if numbers is None else [name for _, name in sorted(zip(numbers, names, strict=True))]


def listed(names: Iterable[str], most: int = 3) -> str:
    """A list for a sentence: 'cat', 'dog', 'owl' and 7 more."""
    names = list(names)
    shown = ", ".join(map(repr, names[:most]))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


# -- reading a column -----------------------------------------------------------------------------------------------------


def read_labels(data: Dataset, column: str, split: str, *, numbers: bool = False) -> Labels:
    """`read_splits` of one split; its name is for errors."""
    return read_splits({split: data}, column, {split: split}, numbers=numbers)[split]


def read_splits(parts: Mapping[str, Dataset], column: str, called: Mapping[str, str], *, numbers: bool = False) -> dict[str, Labels]:
    """Reads the label column of every split. Raises ValueError, with the row, for a value that is not a label.

    Whole numbers, names, True and False are classes. A list of classes, or one share for each class, means several classes; shares that sum
    to 1 mean one class. Other numbers are a regression. All splits together decide what is not clear in one, such as whether [0, 1] is a
    list of shares or of classes.

    Args:
        called: names of the splits, for errors.
        numbers: labels are targets of a regression, even if all are whole numbers.
    """
    arrays = {role: _column(data, column) for role, data in parts.items()}
    whole = _are_whole([array for array in arrays.values() if pa.types.is_floating(array.type)])
    shares = _are_shares({called[role]: array for role, array in arrays.items() if _is_list(array.type)}, column)
    return {
        role: _read(array, parts[role].features[column], column, called[role], numbers, whole, shares) for role, array in arrays.items()
    }


def _column(data: Dataset, column: str) -> pa.Array:
    array = data.select_columns([column]).with_format("arrow")[:].column(0).combine_chunks()
    return pa.array([], array.type) if isinstance(array, pa.ChunkedArray) else array  # of no rows


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _are_whole(arrays: Sequence[pa.Array]) -> bool:
    """Whether floats are class numbers: tables with holes keep whole numbers as floats."""
    values = np.concatenate([np.zeros(0), *(array.to_numpy(zero_copy_only=False).astype(np.float64) for array in arrays)])
    known = values[~np.isnan(values)]
    return 0 < len(known) < len(values) and bool((known == np.round(known)).all())


def _are_shares(arrays: Mapping[str, pa.Array], column: str) -> bool:
    """Whether lists of numbers hold a share for each class, and not classes. Raises ValueError where that differs between splits."""
    widths: dict[str, int] = {}
    sure, classes = [], []
    for split, array in arrays.items():
        full = array.filter(array.is_valid())
        flat, lengths = pc.list_flatten(full), pc.list_value_length(full).to_numpy(zero_copy_only=False)
        if not len(full) or flat.null_count or not _is_number(flat.type):
            continue
        values, width = flat.cast(pa.float32()).to_numpy(zero_copy_only=False), int(lengths[0])
        if width > 1 and (lengths == width).all() and ((values >= 0) & (values <= 1)).all():
            widths[split] = width
            # a list of classes is of whole numbers, and holds none twice
            if width > 2 or not pa.types.is_integer(flat.type) or (values.reshape(-1, 2).sum(1) != 1).any():
                sure.append(split)
        elif pa.types.is_integer(flat.type):
            classes.append(split)
    if classes and sure:
        raise ValueError(
            f"lists of labels must be of one kind in all splits, got a share for each class in {sure[0]!r} and class numbers in {classes[0]!r} "
            f"of column {column!r}; convert one."
        )
    if not classes and len(set(widths.values())) > 1:
        lengths = " and ".join(f"{width} in {split!r}" for split, width in widths.items())
        raise ValueError(
            f"lists of shares must have one length in all splits, got {lengths} of column {column!r}; add the classes that lack."
        )
    return bool(widths) and not classes


def _read(array: pa.Array, feature: Any, column: str, split: str, numbers: bool, whole: bool, shares: bool) -> Labels:
    kind = array.type
    if pa.types.is_null(kind):
        return Labels(ONE_CLASS, [], np.zeros(len(array), np.int64), np.zeros(len(array), bool))
    if _is_list(kind):
        return _of_lists(array, feature, column, split, shares)
    if isinstance(feature, ClassLabel):
        return _of_numbers(array, column, split, feature.names or [str(n) for n in range(feature.num_classes)])
    if numbers and (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return _of_floats(array, column)
    if pa.types.is_boolean(kind):
        return _of_numbers(array, column, split, ["False", "True"])
    if pa.types.is_integer(kind):
        return _of_numbers(array, column, split, None)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _of_names(array)
    if pa.types.is_floating(kind):
        return _of_numbers(pc.if_else(pc.is_nan(array), None, array), column, split, None) if whole else _of_floats(array, column)
    raise ValueError(f"labels must be classes, lists of classes or numbers, got {feature} in column {column!r}; pass --label_column_name.")


def _of_numbers(array: pa.Array, column: str, split: str, names: list[str] | None) -> Labels:
    array = array.cast(pa.int64())
    labelled = pc.fill_null(pc.not_equal(array, -1), False).to_numpy(zero_copy_only=False)
    values = pc.fill_null(array, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    highest = np.iinfo(np.int64).max if names is None else len(names) - 1
    wrong = np.flatnonzero((values < -1) | (values > highest))
    if len(wrong):
        row = int(wrong[0])
        limit = "0 or more" if names is None else f"0 to {highest}"
        raise ValueError(
            f"labels must be class numbers, {limit}, got {values[row]} at row {row} of {split!r} in column {column!r}; "
            "correct the label, or write -1 for no label."
        )
    if names is not None:
        return Labels(ONE_CLASS, list(names), values, labelled, declared=True)
    found = np.unique(values[labelled])
    placed = np.searchsorted(found, values) if len(found) else values
    return Labels(ONE_CLASS, list(map(str, found)), np.where(labelled, placed, -1), labelled, numbered=True)


def _of_names(array: pa.Array) -> Labels:
    labelled = pc.fill_null(pc.not_equal(array, ""), False).to_numpy(zero_copy_only=False)
    names = in_order(pc.unique(array.filter(pa.array(labelled))).to_pylist())
    found = pc.index_in(array, pa.array(names, array.type))
    return Labels(ONE_CLASS, names, pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64), labelled)


def _of_floats(array: pa.Array, column: str) -> Labels:
    values = pc.fill_null(array.cast(pa.float64()), np.nan).to_numpy(zero_copy_only=False).astype(np.float32)
    return Labels(NUMBER, [column], values, np.isfinite(values))


def _of_lists(array: pa.Array, feature: List | LargeList, column: str, split: str, shares: bool) -> Labels:
    labelled = array.is_valid().to_numpy(zero_copy_only=False)
    full = array.filter(array.is_valid())
    lengths = pc.list_value_length(full).to_numpy(zero_copy_only=False)
    flat = pc.list_flatten(full)
    inner = getattr(feature, "feature", None)
    rows = np.repeat(np.flatnonzero(labelled), lengths)
    if flat.null_count:
        row = int(rows[np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0]])
        raise ValueError(f"lists of labels must hold no None, got one at row {row} of {split!r} in column {column!r}; correct the label.")
    if isinstance(inner, ClassLabel):
        found = _of_numbers(flat, column, split, inner.names)
    elif pa.types.is_string(flat.type) or pa.types.is_large_string(flat.type):
        found = _of_names(flat)
    elif _is_number(flat.type):
        numbers = flat.cast(pa.float32()).to_numpy(zero_copy_only=False)
        width = int(lengths[0]) if len(lengths) else 0
        if shares and width > 1 and (lengths == width).all() and ((numbers >= 0) & (numbers <= 1)).all():
            values = np.zeros((len(array), width), np.float32)
            values[labelled] = numbers.reshape(-1, width)
            one = np.allclose(values[labelled].sum(1), 1, atol=1e-3)
            return Labels(ONE_CLASS if one else SEVERAL_CLASSES, [str(n) for n in range(width)], values, labelled, numbered=True)
        if not pa.types.is_integer(flat.type):
            row = int(rows[np.flatnonzero((numbers < 0) | (numbers > 1))[0]]) if ((numbers < 0) | (numbers > 1)).any() else 0
            raise ValueError(
                f"a list of labels must hold one share from 0 to 1 for each class, got {array[row].as_py()!r} at row {row} of {split!r} "
                f"in column {column!r}; correct the label."
            )
        found = _of_numbers(flat, column, split, None)
    else:
        raise ValueError(
            f"labels must be classes, lists of classes or numbers, got {feature} in column {column!r}; pass --label_column_name."
        )
    if not found.labelled.all():
        row = int(rows[np.flatnonzero(~found.labelled)[0]])
        raise ValueError(
            f"lists of labels must hold classes, got {array[row].as_py()!r} at row {row} of {split!r} in column {column!r}; "
            "use an empty list for no class."
        )
    values = np.zeros((len(array), len(found.names)), np.float32)
    values[rows, found.values] = 1
    return Labels(SEVERAL_CLASSES, found.names, values, labelled, found.numbered, found.declared)


# -- matching classes -------------------------------------------------------------------------------------------------


def places(known: Sequence[str], wanted: Sequence[str], *, numbered: bool = False) -> list[int | None]:
    """For each class of `wanted`, its index in `known`, or None if it is not in there.

    1. Equal names are the same class. Whole numbers are compared as numbers: '7' is '007'.
    2. If the names of `wanted` are whole numbers, and those of `known` are not, they are class numbers.

    Args:
        numbered: `wanted` are numbers, not names: class numbers of `known`, unless `known` are such numbers too.
    """
    if not wanted:
        return []
    wanted_numbers, known_numbers = whole_numbers(wanted), whole_numbers(known)
    from_numbers = known_numbers is not None and known_numbers == sorted(known_numbers)
    if wanted_numbers is not None and (known_numbers is None or (numbered and not from_numbers)):
        by_number = [number if number < len(known) else None for number in wanted_numbers]
        if numbered:
            return by_number
        if not set(wanted) & set(known):
            if None in by_number:
                return [None] * len(wanted)
            logger.warning("the names %s are read as numbers of the classes %s", listed(wanted), listed(known))
            return by_number
    if list(known) == list(wanted):
        return list(range(len(known)))
    if known_numbers is not None and wanted_numbers is not None:
        names, looked_for = known_numbers, wanted_numbers
    else:
        names, looked_for = ([unicodedata.normalize("NFC", name) for name in some] for some in (known, wanted))
    numbers = {name: number for number, name in enumerate(names)}
    if len(numbers) < len(names) or len(set(looked_for)) < len(looked_for):  # two classes with one name
        return [None] * len(wanted)
    return [numbers.get(name) for name in looked_for]


def matched(known: Sequence[str], wanted: Sequence[str], *, numbered: bool = False) -> list[int] | None:
    """For each class of `wanted`, the index of the network's output, whose classes are `known`. None if they are other classes.

    It uses `places`, and also matches ImageNet's folders, such as n01440764, with names such as 'tench, Tinca tinca'. It matches by order, with
    a warning, if at most one name in ten differs, or if the network has the same number of classes without names.
    """
    found = places(known, wanted, numbered=numbered)
    if None not in found:
        return found
    if numbered:
        return None
    if wanted and all(re.fullmatch("n[0-9]{8}", name) for name in wanted):
        return _of_imagenet(known, wanted)
    if len(known) == len(wanted):
        others = [(theirs, ours) for theirs, ours in zip(known, wanted, strict=True) if theirs != ours]
        spelled = len(others) <= len(known) // 10 and not {ours for _, ours in others} & set(known)
        if spelled:  # the others have the same order
            pairs = ", ".join(f"{ours!r} for {theirs!r}" for theirs, ours in others[:3])
            logger.warning("%d of %d classes are spelled differently in the network; these are matched: %s", len(others), len(known), pairs)
        elif unnamed(known) and not set(known) & set(wanted):
            logger.warning("the network's classes have no names; they are assumed to be %s, in this order", listed(wanted))
        else:
            return None
        return list(range(len(known)))
    return None


def _of_imagenet(known: Sequence[str], synsets: Sequence[str]) -> list[int] | None:
    """`matched` for ImageNet's synsets: by their numbers in ImageNet-1k if the network has those names, else by their descriptions."""
    from timm.data import ImageNetInfo

    thousand, every = ImageNetInfo("imagenet-1k").label_names(), ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True)
    texts, numbers = [every.get(name, name) for name in synsets], {name: number for number, name in enumerate(thousand)}
    if len(known) == len(thousand) and all(name in numbers for name in synsets):
        # two of the thousand classes are called crane
        same = [known[numbers[name]].split(",")[0] == text.split(",")[0] for name, text in zip(synsets, texts, strict=True)]
        if sum(same) >= 0.9 * len(same) or unnamed(known):
            return [numbers[name] for name in synsets]
    found = places(known, texts)
    return None if None in found else found


def network_classes(config: Any) -> list[str]:
    """The names of a network's outputs, in order, from its config."""
    names = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    return [names.get(number, f"{UNNAMED}{number}") for number in range(config.num_labels)]


def unnamed(names: Sequence[str]) -> bool:
    """Whether a checkpoint's classes have no names: LABEL_0, LABEL_1, ..., or 0, 1, ..."""
    return all(name in (f"{UNNAMED}{number}", str(number)) for number, name in enumerate(names))


def of_network(known: Sequence[str], wanted: Sequence[str], *, numbered: bool = False) -> list[int]:
    """`matched` for a network that is evaluated unchanged. Raises ValueError if it does not know all classes."""
    found = matched(known, wanted, numbered=numbered)
    if found is None:
        raise ValueError(
            f"the network must know the classes of the data set, got {len(known)} classes, {listed(known)}, and {len(wanted)} of the data set, "
            f"{listed(wanted)}; rename the folders or labels, or number them 0 to {len(known) - 1} like the network's outputs."
        )
    return found


def moved(labels: Labels, places: Sequence[int], names: list[str]) -> Labels:
    """The same labels with other class numbers: class `c` becomes `places[c]`, an index of `names`. For a class without a row it may be any."""
    if labels.values.ndim == 2:
        values = np.zeros((len(labels.values), len(names)), np.float32)
        np.maximum.at(values, (slice(None), list(places)), labels.values)
    else:
        values = np.append(np.asarray(places, np.int64), -1)[labels.values]
    return Labels(labels.problem_type, names, values, labels.labelled, labels.numbered, labels.declared)


def with_labels(data: Dataset, column: str, labels: Labels) -> Dataset:
    """The rows of a split that have a label. The column then holds class numbers, lists of shares, or numbers."""
    if labels.problem_type == NUMBER:
        feature, array = Value("float32"), pa.array(labels.values)
    elif labels.values.ndim == 2:
        feature = List(Value("float32"))
        width = labels.values.shape[1]
        array = pa.ListArray.from_arrays(np.arange(len(labels.values) + 1, dtype=np.int32) * width, pa.array(labels.values.reshape(-1)))
    else:
        feature = ClassLabel(names=labels.names) if len(set(labels.names)) == len(labels.names) else Value("int64")
        array = pa.array(labels.values)
    raw = data.select_columns([column]).with_format("arrow")[:].column(0)
    if data.features[column] != feature or not raw.equals(pa.chunked_array([array])):
        features = Features({column: feature})
        new = Dataset(pa.table({column: array}, schema=features.arrow_schema), info=DatasetInfo(features=features))
        data = concatenate_datasets([data.remove_columns(column), new], axis=1)
    return data if labels.labelled.all() else data.select(np.flatnonzero(labels.labelled))
