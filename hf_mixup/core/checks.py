"""All checks of user input. Each error says what was expected, what was seen and what to do."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def needed(module: str, purpose: str) -> ModuleType:
    """Imports an optional module. Raises ImportError, in one sentence, if its package is not installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = {"sklearn": "scikit-learn"}.get(name := module.split(".")[0], name)
        raise ImportError(f"{purpose} must have the package {package}, got {error}; run `pip install {package}`.") from None


def one_line(error: BaseException) -> str:
    """What an error of a library says, for the brackets of a sentence."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def nearest(name: Any, options: Iterable[str]) -> str:
    """The end of an error about an unknown name: it suggests the closest known names, or lists all of them."""
    options = sorted(map(str, options))
    words = meant(name)
    if words and set(words) <= set(options):  # a list in one word, or quotes and brackets that are not needed
        return f"write {' '.join(words)} instead."
    close = difflib.get_close_matches(str(name).lower(), options, n=3, cutoff=0.5)
    if not close and len(options) > 100:
        return "check the spelling."
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"choose from {', '.join(options)}."


def meant(text: Any, kind: type = str, one: bool = False) -> list[str]:
    """The words that somebody probably meant: without quotes and brackets, a list in `one` value or several, `20%` as 0.2, `1e3` as 1000.

    Empty where they would be no values of this kind, or are what was typed."""
    bare = str(text).strip("[]()'\"\u2018\u2019\u201c\u201d ")
    decimal = re.fullmatch(r"[-+]?\d+,\d+", bare) if kind is float and (one or bare.startswith("0,")) else None
    words = (
        [bare.replace(",", ".")]
        if decimal
        else [bare]
        if one
        else re.split(r"[\s,;+'\"]+", bare)
        if kind is str
        else re.split(r"[\s,;]+", bare)
    )
    if kind is str:
        return words if words != [str(text)] and all(words) else []
    found = []
    for word in words:
        try:
            value = float(word.removesuffix("%")) / (100 if word.endswith("%") else 1)
        except ValueError:
            return []
        if not math.isfinite(value) or (kind is int and value != int(value)):
            return []
        found.append(f"{int(value)}" if kind is int else f"{value:.12g}")
    return found if found != [str(text)] else []


def from_json(name: str, text: str, expected: str) -> Any:
    """Parses JSON that a person typed. Raises ValueError if it is not JSON, or has a key twice; `expected` describes what it must be."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [key for key, _ in pairs]
        twice = sorted({key for key in names if names.count(key) > 1})
        if twice:
            raise ValueError(f"{name} must name everything once, got {twice[0]!r} several times; keep one of them.")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        share = meant(text, float, one=True)
        advice = (
            f"write {share[0]} instead."
            if share
            else "check the quotes."
            if set(text) & set("{[\"'\u201c\u201d")
            else "check the spelling."
        )
        raise ValueError(f"{name} must be {expected}, got {text!r} ({error}); {advice}") from None


def check_known(what: str, name: Any, options: Iterable[str]) -> None:
    options = list(options)
    if name not in options:
        raise ValueError(f"{what} must be a known name, got {name!r}; {nearest(name, options)}")


def check_listed(what: str, value: Any, each: str) -> None:
    """Refuses what has no order, such as a set, and dictionaries, whose values would be lost."""
    if isinstance(value, (str, bytes, Mapping)) or not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        raise ValueError(f"{what} must be a list {each}, got {value!r}; write them in an order, as [..., ...].")


def check_patterns(**values: Sequence[str]) -> None:
    for name, patterns in values.items():
        check_listed(name, patterns, "of regular expressions")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (TypeError, re.error) as error:
                raise ValueError(f"{name} must hold regular expressions, got {pattern!r} ({error}); correct it.") from None


def check_pairs(what: str, text: str, example: str) -> None:
    """Refuses text that is not `name=value`, with commas between several."""
    for pair in text.replace(" ", "").split(","):
        name, equals, value = pair.partition("=")
        if not (name and equals and value) or "=" in value:
            raise ValueError(f"{what} must be name=value, with commas between several, got {pair!r}; write it as {example}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (_is_number(value) and value > 0):
            raise ValueError(f"{name} must be a positive, finite number, got {value!r}; to train without mixing use the method 'vanilla'.")


def check_between(low: float, high: float, **values: float) -> None:
    for name, value in values.items():
        if not (_is_number(value) and low <= value <= high):
            raise ValueError(f"{name} must be a number from {low} to {high}, got {value!r}; give one in that range.")


def check_decay(**values: float) -> None:
    """Of an average: at 1 it would stay where it began."""
    for name, value in values.items():
        if not (_is_number(value) and 0 <= value < 1):
            raise ValueError(f"{name} must be a number from 0 to below 1, got {value!r}; give one such as 0.999.")


def check_range(low: float, high: float, **values: tuple[float, float]) -> None:
    for name, value in values.items():
        pair = value if isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_number, value)) else (1, 0)
        if not low <= pair[0] <= pair[1] <= high:
            raise ValueError(f"{name} must be two numbers from {low} to {high}, the smaller one first, got {value!r}; give such a pair.")


def check_count(least: int = 1, **values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}; give one in that range.")


def check_object(name: str, value: Any, example: str) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must map names to values, got {value!r}; write it as {example}.")


def check_counts(least: int = 1, **values: Sequence[int]) -> None:
    for name, value in values.items():
        listed = value if isinstance(value, (tuple, list)) else ()
        if not listed or not all(isinstance(count, int) and not isinstance(count, bool) and count >= least for count in listed):
            raise ValueError(f"{name} must list whole numbers of at least {least}, got {value!r}; give one or more.")


def check_class_counts(class_counts: Sequence[int] | None) -> None:
    if class_counts is not None:
        check_counts(0, class_counts=class_counts)


def check_per_channel(low: float, **values: Sequence[float]) -> None:
    for name, value in values.items():
        if not (isinstance(value, (tuple, list)) and value and all(_is_number(number) and number > low for number in value)):
            raise ValueError(f"{name} must list numbers above {low}, got {value!r}; give one for all channels, or one for each.")


def check_normalisation(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std must be given together, got mean={mean} and std={std}; give both or none.")
    if std is not None:
        check_per_channel(0, std=std)
        check_per_channel(float("-inf"), mean=mean)


def check_channels(images: Tensor, **values: Sequence[float]) -> None:
    for name, value in values.items():
        if len(value) not in (1, images.shape[1]):
            raise ValueError(
                f"{name} has {len(value)} values, got images of {images.shape[1]} channels; give one for all, or one for each."
            )


def check_channel_values(name: str, values: Sequence[float], channels: int) -> None:
    if len(values) != channels:
        raise ValueError(f"{name} must have a value for each of {channels} channels, got {list(values)}; give as many.")


def check_switch(**values: bool) -> None:
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}; give one of the two.")


def check_mode(mode: str) -> None:
    from hf_mixup.core.rng import MODES

    check_known("mode", mode, MODES)


def check_probabilities(probabilities: Sequence[float], count: int) -> None:
    if len(probabilities) != count:
        raise ValueError(f"mix_prob needs one probability for each of the {count} methods, got {len(probabilities)}; give {count}.")
    if not all(_is_number(p) and p >= 0 for p in probabilities):
        raise ValueError(f"mix_prob must hold numbers of at least 0, got {list(probabilities)}; replace the others.")
    if not math.isclose(sum(probabilities), 1, rel_tol=1e-6):
        raise ValueError(f"mix_prob must sum to 1, got {list(probabilities)}, which sums to {sum(probabilities):g}; rescale it.")


def check_num_labels(num_labels: int | None) -> None:
    if num_labels is None:
        raise ValueError("num_labels is needed to mix class numbers, got None; pass the number of classes, or soft labels (B, num_labels).")
    check_count(2, num_labels=num_labels)


def check_images(images: Tensor, *, name: str = "images", flat: bool | None = False, finite: bool = True, raw: bool = False) -> None:
    """Refuses a batch that a policy cannot mix, with a TypeError or a ValueError.

    Args:
        name: of the network's input. `pixel_values` are images (B, C, H, W), or videos or volumes with one more axis. Other inputs may have
            any axes after the first.
        flat: True takes images only. None takes whatever a module of your own takes, such as rows of a table (B, F).
        finite: look for NaN and infinity. This is skipped on an accelerator, because the host would have to wait for the answer.
        raw: take uint8 pixels too, because they are normalised later.
    """
    pictures = name in ("images", "pixel_values")
    what, form = ("images", "(B, C, H, W)") if pictures else (name, "(B, ...)")
    if not isinstance(images, Tensor):
        raise TypeError(f"{what} must be a tensor {form}, got {type(images).__name__}; stack them first.")
    if images.ndim < (4 if name == "pixel_values" and flat is not None else 2) or (flat and images.ndim > 4):
        raise ValueError(f"{what} must have shape {form}, got {tuple(images.shape)}; add the missing axis or flatten the others.")
    if name == "input_ids":
        raise TypeError(
            "token ids cannot be mixed, only their embeddings, got input_ids; train the text classifier with MixupTrainer and wordmixup or "
            "tmix."
        )
    if not images.is_floating_point() and not (raw and images.dtype == torch.uint8):
        raise TypeError(f"{what} must be floating point, got {str(images.dtype).removeprefix('torch.')}; normalise first.")
    if pictures and images.ndim > 3 and images.shape[-3] > 4 and images.shape[-1] <= 4:
        raise ValueError(f"images must be channels first, (B, C, H, W), got {tuple(images.shape)}; use permute(0, 3, 1, 2).")
    if len(images) == 0:
        raise ValueError("mixing needs at least 2 images in a batch, got 0; check the sampler, or the filter before it.")
    if finite and images.device.type == "cpu" and not math.isfinite(images.detach().sum()):
        rows = (~torch.isfinite(images.flatten(1)).all(1)).nonzero().flatten().tolist()
        if rows:
            raise ValueError(
                f"{what} must be finite, got NaN or infinity in rows {rows[:8]} of the batch; repair those images, "
                "or turn the check off with check_finite=False."
            )


def check_tokens(tokens: Tensor) -> None:
    """Refuses anything that is not a batch of texts, int64 token ids (B, L)."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
        seen = f"{tuple(tokens.shape)}, {str(tokens.dtype).removeprefix('torch.')}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"input_ids must be whole numbers (B, L), got {seen}; pad the texts of each batch with the tokenizer.")
    if len(tokens) == 0:
        raise ValueError("mixing needs at least 2 texts in a batch, got 0; check the sampler, or the filter before it.")


def check_examples(examples: Sequence[Tensor], name: str = "pixel_values") -> None:
    """`check_images` for a list of single inputs, before they are stacked."""
    if len(examples) == 0:
        raise ValueError("mixing needs at least 2 images in a batch, got 0; check the sampler, or the filter before it.")
    pictures = name == "pixel_values"
    for example in examples:
        if not isinstance(example, Tensor):
            what, way_out = (
                ("every image must be a tensor (C, H, W)", "add ToTensor to")
                if pictures
                else (f"every {name} must be a tensor", "make one in")
            )
            raise TypeError(f"{what}, got {type(example).__name__}; {way_out} the transform.")
    kinds = {example.dtype for example in examples}
    if len(kinds) > 1:  # bytes beside normalised pixels, for example
        shown = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise TypeError(f"{name} of a batch must have one dtype, got {shown}; convert all alike in the data set.")
    sizes = {example.shape for example in examples}
    if len(sizes) > 1:
        shown = ", ".join(str(tuple(size)) for size in sorted(sizes)[:4])
        if pictures and all(len(size) == 2 for size in sizes):
            raise ValueError(
                f"all images must have one size, got patches of images of several sizes, {shown}, which have no common grid; use a network for images of "
                "one size, with its image processor."
            )
        what, way_out = (
            ("images", "add Resize and a crop to the transform")
            if pictures
            else (name, "give a base_collator that pads them, such as DataCollatorWithPadding")
        )
        raise ValueError(f"{what} of a batch must have one size, got {shown}; {way_out}.")


def check_cached_size(row: int, pixels: Tensor, first: Tensor) -> None:
    if pixels.shape != first.shape:
        sizes = " and ".join(f"{image.shape[2]}x{image.shape[1]}" for image in (first, pixels))
        raise ValueError(
            f"cache_images needs images of one size before their random crop, got {sizes} in rows 0 and {row}; "
            "leave cache_images out, or set train_crop to pad, reflect or none."
        )


def check_places(grid: tuple[int, int]) -> None:
    """Refuses evidence on one place of the image, which would keep it or replace it as a whole."""
    if grid[0] * grid[1] == 1:
        raise ValueError(
            "the network must look at several places of an image, got a grid of one; use larger images, a network with a finer grid, or a method "
            "without one, such as cutmix."
        )


def check_divisible(size: tuple[int, int], grid: tuple[int, int]) -> None:
    """Refuses images that the network's grid does not divide, and a grid of one place."""
    check_places(grid)
    if size[0] % grid[0] or size[1] % grid[1]:
        raise ValueError(
            f"images must be whole multiples of the network's grid of {grid[0]} x {grid[1]} patches, got {size[0]} x {size[1]} pixels; "
            "resize them."
        )


def check_rows(labels: Tensor, batch: int) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"labels must be a tensor, class numbers (B,) or soft labels (B, num_labels), got {type(labels).__name__}; convert them with torch.as_tensor."
        )
    if labels.ndim and len(labels) != batch:
        raise ValueError(
            f"labels must have one row for each of the {batch} images, got {len(labels)}; check that images and labels are columns of the same rows."
        )


def check_labels(labels: Tensor, batch: int, num_labels: int | None) -> None:
    """Refuses class numbers that are out of range, and soft labels with another number of classes. Otherwise a GPU kernel would crash.

    Shapes and types are checked everywhere. Values are checked on the CPU only, because reading them from a GPU makes the host wait.

    Raises:
        TypeError: for labels that are not a tensor.
        ValueError: for all other faults.
    """
    check_rows(labels, batch)
    if labels.ndim == 1 and not labels.is_floating_point() and not labels.is_complex():
        check_num_labels(num_labels)
        _check_classes(labels, num_labels)
    elif labels.ndim == 2 and labels.is_floating_point():
        if tuple(labels.shape) != (batch, num_labels or labels.shape[1]):
            raise ValueError(
                f"soft labels must have shape {(batch, num_labels)}, got {tuple(labels.shape)}; set num_labels to the length of the soft labels."
            )
    else:
        raise ValueError(
            f"labels must be class numbers (B,), integer, or soft labels (B, num_labels), floating point; got {tuple(labels.shape)}, "
            f"{str(labels.dtype).removeprefix('torch.')}; convert them."
        )


def _check_classes(labels: Tensor, num_labels: int, head: str = "") -> None:
    """Class numbers (B,) of any integer dtype; `head` names the column in the error, if there are several."""
    if labels.device.type != "cpu" or len(labels) == 0:
        return
    labels = labels.long()
    least, most = torch.aminmax(labels)
    if least.item() >= 0 and most.item() < num_labels:
        return
    if (labels == -100).any():
        row = int((labels == -100).nonzero()[0])
        raise ValueError(
            f"labels must be class numbers, got the ignore index -100 at row {row}{head}; it is not supported when mixing, drop such rows."
        )
    row = int(((labels < 0) | (labels >= num_labels)).nonzero()[0])
    raise ValueError(
        f"labels must be from 0 to {num_labels - 1}, got {int(labels[row])} at row {row} of the batch{head}; "
        "correct the labels in the data set, or set num_labels to the number of classes."
    )


def check_heads(labels: Tensor, batch: int, classes: Sequence[int]) -> None:
    """Checks class numbers (B, heads), one column for each head. Raises ValueError."""
    check_rows(labels, batch)
    if labels.shape[1] != len(classes):
        raise ValueError(
            f"labels must have one column for each of the {len(classes)} heads, got {labels.shape[1]}; correct the classes of the loss."
        )
    for head, (column, count) in enumerate(zip(labels.unbind(1), classes, strict=True)):
        _check_classes(column, count, f", column {head}")


def check_values(labels: Tensor, batch: int, num_labels: int, limits: tuple[float, float] | None = None) -> None:
    """Checks numbers (B,) for one output, or (B, num_labels): targets of a regression, or 0 and 1 for several labels. Raises ValueError."""
    check_rows(labels, batch)
    if tuple(labels.shape) not in {(batch, num_labels), *([(batch,)] if num_labels == 1 else [])} or labels.is_complex():
        raise ValueError(
            f"labels must be numbers {(batch, num_labels)}, one for each output of the network, got {tuple(labels.shape)}; "
            "correct the labels in the data set, or set num_labels."
        )
    if labels.device.type != "cpu" or batch == 0:
        return
    numbers = labels.reshape(batch, -1).double()
    low, high = limits or (-math.inf, math.inf)
    wrong = (~torch.isfinite(numbers) | (numbers < low) | (numbers > high)).any(1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        wanted = "finite" if limits is None else f"from {low} to {high} for each class"
        raise ValueError(f"labels must be {wanted}, got {numbers[row].tolist()[:8]} at row {row} of the batch; repair or drop such rows.")


def check_class_weights(**values: Sequence[float] | None) -> None:
    for name, value in values.items():
        if value is None:
            continue
        listed = value if isinstance(value, tuple) else ()
        if not listed or not all(_is_number(number) and number >= 0 for number in listed) or not any(listed):
            raise ValueError(f"{name} must be a tuple of numbers of at least 0, not all of them 0, got {value!r}; give one for each.")


def check_distributions(labels: Tensor) -> None:
    """Checks the soft labels of a softmax loss: each row must sum to 1. (A BCE loss takes any rows, so it takes multi-label targets.)"""
    if labels.ndim != 2 or labels.device.type != "cpu":
        return
    total = labels.float().sum(1)
    wrong = ~((total - 1).abs() <= 1e-3) | (labels < 0).any(1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"soft labels must be at least 0 and sum to 1 for a cross-entropy loss, got a sum of {float(total[row]):g} at row {row}; "
            "for multi-label targets use the loss 'bce'."
        )


def check_torchvision() -> None:
    """Refuses a torchvision built for another torch. With such a pair transformers fails too, but its error does not name the cause."""
    try:
        import torchvision  # noqa: F401
    except (RuntimeError, ImportError, OSError) as error:
        from importlib.metadata import PackageNotFoundError, version

        try:
            seen = f"torchvision {version('torchvision')}"
        except PackageNotFoundError:
            seen = "no torchvision"
        raise ImportError(
            f"torch and torchvision must be a matching pair, got torch {torch.__version__} and {seen} ({error}); "
            "install both together from one index: pip install --upgrade torch torchvision."
        ) from None


OLDEST_TRANSFORMERS = (5, 17)


def check_transformers() -> None:
    """Refuses versions of transformers whose Trainer works differently."""
    from transformers import __version__

    if tuple(map(int, __version__.split(".")[:2])) < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise ImportError(
            f"MixupTrainer needs transformers {oldest} or newer, got {__version__}; run `pip install --upgrade transformers`."
        )
