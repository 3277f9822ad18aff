"""Facts about a method for the pages of the site. All are read from its row, its docstrings and the files of measurements."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import itertools
import json
import re
import shutil
import statistics
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hf_mixup.core.losses import CrossEntropy
from hf_mixup.core.policy import AreaLabels
from hf_mixup.method import Method, needs_of_model
from hf_mixup.methods import METHODS
from hf_mixup.report.benchmark import TABLE_METHODS, Summary, markdown_table
from hf_mixup.report.examples import TOKEN_SIGNALS
from hf_mixup.steps import Standard

ROOT = Path(__file__).parents[2]
UNSAID = (AreaLabels(), CrossEntropy(), Standard())
KINDS = {"sample": "how images are mixed", "label": "how labels are weighted", "loss": "the loss", "step": "the training step"}


def parts(method: Method) -> dict[str, Any]:
    """The parts of a method that are not the usual ones, by kind."""
    return {kind: getattr(method, kind) for kind in KINDS if getattr(method, kind) not in UNSAID}


def main_part(method: Method) -> Any:
    """The part that the method is named after: the last that is not the usual one, or the sample policy."""
    own = parts(method)
    return next((own[kind] for kind in ("step", "loss", "label") if kind in own), method.sample)


def paragraphs(part: Any) -> list[str]:
    """The paragraphs of a part's docstring, each on one line, without the arguments."""
    text = (inspect.getdoc(type(part)) or "").split("\nArgs:")[0]
    return [" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n") if paragraph.strip()]


def sentence(method: Method) -> str:
    """What the method does, in one sentence: from `plain.yaml`, or else from its docstring."""
    plain = yaml.safe_load((Path(__file__).parent / "plain.yaml").read_text())
    if method.name in plain:
        return plain[method.name]
    for part in (main_part(method), method.sample):
        text = " ".join(paragraphs(part))
        # "NAME (paper; code): what it does. More."; a docstring that begins otherwise says it in its second sentence
        found = re.match(r"[^.]*?\([^()]*(?:\([^()]*\)[^()]*)*\):? ?(.*)", text)
        said = found.group(1) if found and found.group(1) else text
        said = said.removeprefix(", ").lstrip(". ")
        first = re.split(r"(?<=[.:]) (?=[A-Z`])", said)[0].rstrip(":. ")
        if first:
            return first[0].upper() + first[1:] + "."
    return ""


def deviations(part: Any) -> list[str]:
    """The deviations in a docstring, one each: the items of a numbered list after "Deviations", or else its clauses and sentences."""
    found = []
    for paragraph in paragraphs(part):
        place = re.search(r"Deviations?\b[^:]*: ", paragraph)
        if place is None:
            continue
        numbered = re.split(r"(?:^| )\d\. (?=[A-Z`])", paragraph[place.end() - 1 :])[1:]
        if numbered:
            found += [clause.strip() for clause in numbered]
            continue
        *clauses, last = re.split(r"; (?![^()]*\))", paragraph[place.end() :])
        sentences = re.split(r"(?<=\.) (?=[A-Z])", last)
        found += [clause[0].upper() + clause[1:].rstrip(".") + "." for clause in [*clauses, *sentences]]
    return found


def prose(part: Any) -> list[str]:
    """The paragraphs without what `deviations` lists."""
    kept = (re.split(r"Deviations?\b[^:]*: ", paragraph)[0].strip() for paragraph in paragraphs(part))
    return [paragraph for paragraph in kept if paragraph]


def arguments(part: Any) -> list[tuple[str, str, str]]:
    """(name, default, what it is) of the hyper-parameters of a part. "see `Base`" is replaced by what the base class says."""
    told: dict[str, str] = {}
    for kind in reversed(type(part).__mro__):
        text = inspect.cleandoc(kind.__doc__ or "").partition("\nArgs:\n")[2].split("\n\n")[0]
        for match in re.finditer(r"^    (\w+(?:,\s+\w+)*):(.*?)(?=^    \w+(?:,\s+\w+)*:|\Z)", text + "\n", re.M | re.S):
            for name in re.split(r",\s*", match.group(1)):
                meaning = " ".join(match.group(2).split())
                told[name.strip()] = told.get(name.strip(), meaning) if meaning.startswith("see `") else meaning
    return [(f.name, repr(getattr(part, f.name)), told.get(f.name, "")) for f in dataclasses.fields(part)]


def runs_in(method: Method) -> str:
    """Where a method works."""
    if not needs_of_model(method):
        return "any loop, collator, `MixupTrainer`"
    signals = method.sample.needs | method.label.needs
    return "`MixupTrainer`, vision transformers only" if signals & TOKEN_SIGNALS else "`MixupTrainer`"


def formula(method: Method) -> str:
    """What pixels and labels become."""
    weights = {
        "AreaLabels": "\\lambda",
    }.get(type(method.label).__name__, "w")
    pixels = "\\tilde x = m \\odot x_i + (1 - m) \\odot x_j"
    labels = f"\\tilde y = {weights}\\, y_i + (1 - {weights})\\, y_j"
    return f"{pixels}, \\qquad {labels}"


# -- measurements ---------------------------------------------------------------------------------------------------------


@cache
def _figures() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks/results/cpu.json").read_text())


# a section of the measurements, its network, the name in it of the step without mixing, how names are written, a name for people
_STEPS = (
    ("learned", "cifar_resnet18, 100x3x32x32", "vanilla", "{}", "ResNet-18, 32 px"),
    ("labels", "DeiT-S, 4x3x224x224", "cutmix", "{}", "DeiT-S, 224 px, beside CutMix"),
    ("steps", "cifar_resnet20, 64x3x32x32", "no mixing", "ours {}, per image", "ResNet-20, 32 px"),
    ("methods", "cifar_resnet20, 64x3x32x32", "vanilla", "{}", "ResNet-20, 32 px"),
)


def cost(name: str) -> tuple[float, str] | None:
    """The time of a training step relative to one without mixing, and the network of that measurement; None if not measured."""
    for section, network, plain, pattern, where in _STEPS:
        found = _figures().get(section, {}).get("figures", {}).get(network, {})  # not all were measured everywhere
        if name != plain and pattern.format(name) in found:
            return found[pattern.format(name)]["ratio"][1], where
    return None


@cache
def digits() -> dict[str, dict[str, list[dict[str, str]]]]:
    """The rows of docs/digits100.csv, by method and network."""
    found: dict[str, dict[str, list[dict[str, str]]]] = {}
    with open(ROOT / "docs/digits100.csv", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["method"], {}).setdefault(row["network"], []).append(row)
    return found


def whole_run(name: str) -> tuple[float, str] | None:
    """As `cost`, for a whole run with its start and evaluations."""
    cells = digits().get(name, {})
    for network, words in (("cifar_resnet20", "whole run on 100 digits, ResNet-20"), ("vit_mini", "whole run on 100 digits, small ViT")):
        if network in cells and name != "vanilla" and all(row["seconds"] for row in cells[network]):  # some ran beside other work
            seconds, plain = (statistics.median(float(row["seconds"]) for row in digits()[n][network]) for n in (name, "vanilla"))
            return seconds / plain, words
    return None


def cost_text(name: str) -> str:
    if name == "vanilla":
        return "1"
    found = cost(name) or whole_run(name)
    return "not measured" if found is None else f"{found[0]:.2f} ({found[1]})"


@cache
def published() -> list[dict[str, str]]:
    with open(ROOT / "model_cards/published_results.csv", newline="") as file:
        return list(csv.DictReader(file))


def published_of(name: str) -> list[dict[str, str]]:
    """The published rows of a method, or of several that take turns, such as `mixup+cutmix`. A single method also has the rows in which it takes
    turns with mixup."""
    wanted = {tuple(name.split("+")), ("mixup", name)} - {("mixup", "cutmix") if name == "cutmix" else ()}
    return [row for row in published() if TABLE_METHODS.get(row["method"]) in wanted]


def plain_of(row: dict[str, str]) -> float | None:
    keys = ("dataset", "setting", "backbone", "epochs")
    return next(
        (float(other["top1"]) for other in published() if other["method"] == "Vanilla" and all(other[k] == row[k] for k in keys)), None
    )


def gain(name: str, dataset: str, backbone: str, epochs: int) -> tuple[float, float, str]:
    """(without mixing, with it, alpha): published top-1 accuracies of one setting."""
    wanted = {"dataset": dataset, "backbone": backbone, "epochs": str(epochs)}
    row = next(row for row in published_of(name) if all(row[key] == value for key, value in wanted.items()))
    plain = plain_of(row)
    assert plain is not None
    return plain, float(row["top1"]), row["alpha"]


@cache
def settings() -> list[tuple[str, dict[str, Any]]]:
    """(recipe, its arguments by method) of every recipe that has some."""
    found = []
    for path in sorted((ROOT / "training_scripts/recipes").glob("*.yaml")):
        recipe = yaml.safe_load(path.read_text())
        if recipe.get("for_method"):
            found.append((path.stem, recipe["for_method"]))
    return found


# -- tables that are committed, between markers -----------------------------------------------------------------------------


def _measured(recipe: str) -> str:
    """The table of our own sweep, from its CSV file."""
    values: dict[str, dict[str, list[float]]] = {}
    with open(ROOT / f"docs/{recipe}.csv", newline="") as file:
        for row in csv.DictReader(file):
            values.setdefault(row["method"], {}).setdefault(row["network"], []).append(float(row["top1"]))
    return markdown_table({name: {n: Summary(tuple(found)) for n, found in cells.items()} for name, cells in values.items()}).strip()


def catalogue() -> str:
    """A table with one line for each method. The site turns the names into links."""
    lines = ["| method | what it does | runs in | time of a step, without mixing = 1 | paper |", "| --- | --- | --- | --- | --- |"]
    for name, method in METHODS.items():
        paper = f"[{method.paper}](https://arxiv.org/abs/{method.paper})" if method.paper else ""
        lines.append(f"| `{name}` | {sentence(method)} | {runs_in(method)} | {cost_text(name)} | {paper} |")
    return "\n".join(lines)


# what people have, what to use, and where its gain was published or measured; cost, gain and alpha follow from the files
CHOICES: tuple[tuple[str, str, tuple[str, str, int] | str | None], ...] = (
    ("a vision transformer from scratch", "mixup+cutmix", ("imagenet1k", "DeiT-S", 300)),
    ("the same, for more accuracy", "mixup+transmix", ("imagenet1k", "DeiT-S", 300)),
    ("a CNN from scratch, photos", "resizemix", ("imagenet1k", "ResNet-50", 300)),
    ("a CNN from scratch, small pictures", "cutmix", ("cifar10", "ResNet-18", 200)),
    ("a CNN from scratch, a hundred pictures", "resizemix", "digits"),
    ("somewhat more time", "puzzlemix", ("cifar10", "ResNet-18", 200)),
    ("three times the time and twice the memory", "automix", ("cifar10", "ResNet-18", 200)),
    ("a pretrained network and few epochs", "mixup", None),
)


def which() -> str:
    """The table that helps to choose."""
    lines = [
        "| you have | use | alpha | time of a step, without mixing = 1 | top-1 accuracy in %, without → with |",
        "| --- | --- | --- | --- | --- |",
    ]
    for have, name, where in CHOICES:
        last = name.split("+")[-1]
        one = cost(last) or whole_run(last)
        assert one is not None
        if where is None:
            alpha, shown = "0.2", "nothing published: compare, see below"
        elif isinstance(where, str):
            plain, mixed = (statistics.mean(float(r["top1"]) for r in digits()[n]["cifar_resnet20"]) for n in ("vanilla", name))
            alpha, shown = "default", f"{plain:.2f} → {mixed:.2f} (100 digits, measured here)"
        else:
            plain, mixed, alpha = gain(name, *where)
            dataset = {"imagenet1k": "ImageNet", "cifar10": "CIFAR-10"}[where[0]]
            shown = f"{plain:.2f} → {mixed:.2f} ({dataset}, {where[1]}, {where[2]} epochs)"
        lines.append(f"| {have} | `{name.replace('+', '` + `')}` | {alpha.replace(',', ' ')} | {one[0]:.1f} | {shown} |")
    return "\n".join(lines)


def evidence() -> str:
    """The table of the kept runs of cifar10_500, which `hf-mixup benchmark --report` has made."""
    return (ROOT / "benchmarks/results/cifar10_500/results.md").read_text().strip()


def photographs() -> str:
    """Of the first network in that table: accuracies, losses, and their differences to training without mixing."""
    lines = evidence().splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("| method |"))
    rows = [line.split("|") for line in itertools.takewhile(lambda line: line.startswith("|"), lines[start:])]
    return "\n".join("|".join([*row[:2], *row[3:7], ""]) for row in rows)


def speed() -> str:
    """Milliseconds to collate and mix a batch, and JPEG files a second of a loader, from `benchmarks/results/cpu.json`."""
    figures = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    batches = figures["collation"]["figures"]["batches"]
    lines = ["| milliseconds a batch | Mixup, 224 px | CutMix, 224 px | Mixup, 32 px | CutMix, 32 px |", "| --- | --- | --- | --- | --- |"]
    for who, *names in (
        ("ours, a lam for every image", "ours mixup, per image", "ours cutmix, per image"),
        ("ours, bytes, a lam for every image", "ours mixup, per image, bytes", "ours cutmix, per image, bytes"),
        ("stacking, then timm, one lam", "timm mixup, batch", "timm cutmix, batch"),
        ("stacking, then timm, a lam for every image", "timm mixup, per image", "timm cutmix, per image"),
        ("timm's collator, bytes, one lam", "timm's collator mixup, bytes, batch", "timm's collator cutmix, bytes, batch"),
        (
            "timm's collator, bytes, a lam for every image",
            "timm's collator mixup, bytes, per image",
            "timm's collator cutmix, bytes, per image",
        ),
        ("stacking, then torchvision, one lam", "torchvision MixUp", "torchvision CutMix"),
    ):
        cells = (f"{batches[size][name]['ms'][1]:.3g}" for size in ("64x3x224x224", "128x3x32x32") for name in names)
        lines.append(f"| {who} | {' | '.join(cells)} |")
    lines += ["", "| JPEG files at 224 pixels, RandAugment, two workers | images a second | MB of a worker's own |", "| --- | --- | --- |"]
    for name in ("timm's create_loader", "ours, floats", "ours, bytes"):
        row = figures["pipeline"]["figures"]["jpegs"][name]
        lines.append(f"| {name} | {row['images_per_second']:.0f} | {row['own_mb']:.0f} |")
    return "\n".join(lines)


def tasks() -> str:
    """What mixing did for other tasks than classes of images, of `benchmarks/results/tasks.json`."""
    lines = ["| task | way | measure | mean of three seeds | difference to plain, seed by seed |", "| --- | --- | --- | ---: | ---: |"]
    for row in json.loads((ROOT / "benchmarks/results/tasks.json").read_text()):
        scale, places = (1, 3) if row["measure"] == "mse" else (100, 1)
        measure = {"top1": "top-1, %", "mean_iou": "mean IoU, %", "mse": "squared error, less is better"}[row["measure"]]
        mean, by, spread = (
            f"{scale * row[name]:{form}{places}f}" for name, form in (("mean", "."), ("to_plain", "+."), ("to_plain_sd", "."))
        )
        lines.append(f"| {row['task']} | {row['way']} | {measure} | {mean} | {'' if row['way'] == 'plain' else f'{by} ± {spread}'} |")
    return "\n".join(lines)


TABLES = {
    "tasks": ("docs/benchmarks.md", tasks),
    "speed": ("docs/benchmarks.md", speed),
    "catalogue": ("docs/methods.md", catalogue),
    "which": ("README.md", which),
    "which ": ("docs/which-method.md", which),
    "cifar10_500": ("docs/benchmarks.md", evidence),
    "photographs": ("README.md", photographs),
    "digits100": ("docs/benchmarks.md", lambda: _measured("digits100")),
    "cifar10_small": ("docs/benchmarks.md", lambda: _measured("cifar10_small")),
}


def table_of(text: str, name: str) -> str:
    """The table between the markers of that name."""
    return text.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0].strip()


def main() -> None:
    """Writes all tables again from the files, and copies the chart of the kept runs to docs/, because the site shows only files there."""
    shutil.copy(ROOT / "benchmarks/results/cifar10_500/results.png", ROOT / "docs/pictures/cifar10_500.png")
    for key, (file, make) in TABLES.items():
        name, path = key.strip(), ROOT / file
        before, _, rest = path.read_text().partition(f"<!-- {name} -->")
        after = rest.partition(f"<!-- /{name} -->")[2]
        path.write_text(f"{before}<!-- {name} -->\n{make()}\n<!-- /{name} -->{after}")


if __name__ == "__main__":
    main()
