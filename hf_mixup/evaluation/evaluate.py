"""Evaluates a classifier: accuracy, calibration, attacks, corruptions, occlusion, in any number of processes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_mixup.arguments import DataArguments
from hf_mixup.core.checks import check_between, check_count, check_known, needed
from hf_mixup.core.rng import Draws
from hf_mixup.data.dataset import ImageDataset
from hf_mixup.data.labels import ONE_CLASS, moved, network_classes, of_network, read_labels, with_labels
from hf_mixup.data.processor import ImageFormat
from hf_mixup.data.sources import ImageData, load_splits, with_images
from hf_mixup.evaluation.corruptions import COMMON_CORRUPTIONS, EXTRA_CORRUPTIONS, SEVERITIES, corruption, mean_corruption_error
from hf_mixup.evaluation.measures import all_measures
from hf_mixup.evaluation.metrics import confidence_bins, top_k_accuracy
from hf_mixup.evaluation.robustness import PixelModel, fgsm, occlude, pgd

needed("datasets", "an evaluation")
from datasets import ClassLabel, Dataset, List, concatenate_datasets  # noqa: E402

PROTOCOLS = ("fgsm", "pgd", "corruptions", "occlusion")
RATIOS = [tenth / 10 for tenth in range(10)]  # shares of hidden patches
# arguments that some protocols use alone
USED_BY = {
    "eps": ("fgsm", "pgd"), "pgd_step": ("pgd",), "pgd_steps": ("pgd",), "patch": ("occlusion",), "max_corrupted_samples": ("corruptions",),
    "corrupted_dataset_name": ("corruptions",),
}  # fmt: skip
# a function from pixels in [0, 1], labels and rows to changed pixels
Change = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class EvaluationArguments:
    """What to measure."""

    protocols: list[str] = field(
        default_factory=lambda: list(PROTOCOLS),
        metadata={"help": f"Any of {', '.join(PROTOCOLS)}. Accuracy and calibration are always measured."},
    )
    batch_size: int = field(default=64, metadata={"help": "Number of images in a batch of each process."})
    use_cpu: bool = field(default=False, metadata={"help": "Use the CPU, even if there is a GPU."})
    workers: int = field(default=0, metadata={"help": "Number of worker processes that read images, for each process."})
    seed: int = field(
        default=42,
        metadata={
            "help": "Seed of all random draws: starts of PGD, noise, hidden patches. A data set without an evaluation split is split as in the run "
            "of the checkpoint, or, if that is unknown, as in training with this --seed."
        },
    )
    eps: float = field(default=8.0, metadata={"help": "Largest change of a pixel by an attack, on the scale from 0 to 255."})
    pgd_step: float = field(default=2.0, metadata={"help": "Step of PGD, on the scale from 0 to 255."})
    pgd_steps: int = field(default=10, metadata={"help": "Number of steps of PGD."})
    bins: int = field(default=10, metadata={"help": "Number of bins of the calibration error."})
    patch: int | None = field(
        default=None,
        metadata={
            "help": "Side of the hidden patches in pixels, a divisor of the image's side. Default: the divisor nearest to 16, or to an eighth of the side for images of up to 64 pixels."
        },
    )
    corrupted_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A data set of corrupted images, of the Hub or a folder, with columns for the corruption and the severity. Without it, images are corrupted here."
        },
    )
    max_corrupted_samples: int | None = field(
        default=None, metadata={"help": "Corrupt only this many images, chosen by the seed, because every image is classified 95 times."}
    )
    corruption_column_name: str = field(default="corruption", metadata={"help": "Column with the names of corruptions."})
    severity_column_name: str = field(default="severity", metadata={"help": "Column with the severities, 1 to 5."})

    def __post_init__(self):
        for protocol in self.protocols:
            check_known("protocols", protocol, PROTOCOLS)
        for name, protocols in USED_BY.items():
            if getattr(self, name) != getattr(type(self), name) and not set(protocols) & set(self.protocols):
                raise ValueError(
                    f"{name} is for {' and '.join(protocols)}, got {getattr(self, name)!r} with protocols {' '.join(self.protocols) or 'none'}; add "
                    f"{protocols[0]} to the protocols, or leave it out."
                )
        for name in ("corruption_column_name", "severity_column_name"):
            if getattr(self, name) != getattr(type(self), name) and self.corrupted_dataset_name is None:
                raise ValueError(
                    f"{name} is for a ready set, got {getattr(self, name)!r} without corrupted_dataset_name; give it, or leave this out."
                )
        check_count(1, batch_size=self.batch_size, pgd_steps=self.pgd_steps, bins=self.bins)
        check_count(0, workers=self.workers, seed=self.seed)
        check_between(0, 255, eps=self.eps, pgd_step=self.pgd_step)
        for name in ("patch", "max_corrupted_samples"):
            if getattr(self, name) is not None:
                check_count(1, **{name: getattr(self, name)})
        if self.max_corrupted_samples is not None and self.corrupted_dataset_name is not None:
            raise ValueError(
                f"max_corrupted_samples is for images that are corrupted here, got {self.max_corrupted_samples} with the ready set "
                f"{self.corrupted_dataset_name!r}; leave one out."
            )


class Numbered(torch.utils.data.Dataset):
    """The images with the numbers of their rows, which key their random draws."""

    def __init__(self, images: ImageDataset):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.images[row], "rows": row}


def pixel_model(network: PreTrainedModel, form: ImageFormat, images: ImageData) -> PixelModel:
    """The network with its outputs in the order of the data set's classes, followed by classes that the data set lacks.

    Raises ValueError if it does not know all classes of the data set, or an image has several classes or none.
    """
    if images.problem_type != ONE_CLASS or isinstance(images.evaluation.features[images.label_column], List):
        raise ValueError(
            f"evaluation needs one class for each image, got {images.problem_type.replace('_', ' ')} in column {images.label_column!r}; "
            "choose another column with --label_column_name."
        )
    known = network_classes(network.config)
    found = of_network(known, images.label_names, numbered=images.numbered)
    order = [*found, *(number for number in range(len(known)) if number not in set(found))]
    return PixelModel(network, form.mean, form.std, None if order == list(range(len(known))) else order, form.order)


class Evaluator:
    """Runs a classifier on images and on changed images, in any number of processes."""

    def __init__(self, model: PixelModel, form: ImageFormat, args: EvaluationArguments):
        self.accelerator = Accelerator(cpu=args.use_cpu or not torch.accelerator.is_available())
        self.model = self.accelerator.prepare_model(model, evaluation_mode=True)
        self.form, self.args = form, args
        # pixels are not normalised; the model does it first
        self.transform = form.eval_transform(normalise=False)

    def run(
        self, data: Dataset, columns: tuple[str, str], changes: dict[str, Change], text: str
    ) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Yields for every change: its name, probabilities (N, num_labels), classes (N,). Images are read and resized once."""
        images = Numbered(ImageDataset(data, *columns, self.transform))
        loader = torch.utils.data.DataLoader(images, self.args.batch_size, num_workers=self.args.workers)
        loader = self.accelerator.prepare_data_loader(loader)
        found: dict[str, list] = {name: [] for name in changes}
        with tqdm(
            total=len(loader) * len(changes), desc=text, leave=False, disable=None if self.accelerator.is_main_process else True
        ) as bar:
            for batch in loader:
                pixels, labels, rows = batch["pixel_values"], batch["labels"], batch["rows"]
                for name, change in changes.items():
                    with torch.no_grad():
                        probabilities = self.model(change(pixels, labels, rows)).softmax(1)
                    gathered = self.accelerator.gather_for_metrics((probabilities, labels))
                    found[name].append([part.cpu().numpy() for part in gathered])
                    bar.update()
        for name, parts in found.items():
            probabilities, classes = (np.concatenate(part) for part in zip(*parts, strict=True))
            if not np.isfinite(probabilities).all():
                bad = int((~np.isfinite(probabilities)).any(1).sum())
                raise ValueError(
                    f"the network must give finite numbers, got NaN for {bad} of {len(classes)} images ({text}); take another checkpoint."
                )
            yield name, probabilities, classes


def patch_of(sides: Sequence[int], args: EvaluationArguments) -> int:
    """The side of the hidden patches in pixels. Raises ValueError if it does not divide both sides of the images."""
    common, size = math.gcd(*sides), min(sides)
    divisors = [side for side in range(1, common + 1) if common % side == 0]
    if args.patch is None:
        wanted = 16 if size > 64 else max(1, size // 8)
        return min(divisors[:-1] or divisors, key=lambda side: abs(math.log(side / wanted)))
    if args.patch not in divisors:
        raise ValueError(
            f"images must be whole multiples of the patch, got images of {' x '.join(map(str, sides))} pixels and patches of {args.patch} x {args.patch}; "
            f"pass --patch with one of {', '.join(map(str, divisors))}."
        )
    return args.patch


def settings_of(args: EvaluationArguments, sides: Sequence[int]) -> dict[str, Any]:
    """The settings that the numbers of each protocol depend on, beside the weights and the images."""
    size = list(sides)
    ready = {name: getattr(args, name) for name in ("corrupted_dataset_name", "corruption_column_name", "severity_column_name")}
    return {
        "clean": {"bins": args.bins, "size": size},
        "fgsm": {"eps": args.eps, "size": size},
        "pgd": {"eps": args.eps, "step": args.pgd_step, "steps": args.pgd_steps, "seed": args.seed, "size": size},
        "corruptions": {"seed": args.seed, "size": size, "max_samples": args.max_corrupted_samples, **ready},
        "occlusion": {"patch": patch_of(sides, args), "seed": args.seed, "size": size} if "occlusion" in args.protocols else {},
    }


def evaluate(
    evaluator: Evaluator, images: ImageData, token: str | None = None, before: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """Runs all protocols, and yields the results so far after each one, ready for JSON. All settings are checked first.

    Args:
        token: token of the Hub, for a data set of corrupted images.
        before: results of an interrupted evaluation of the same weights and images. Its measurements with the same settings are kept.

    Yields:
        the results, with the `settings` of every finished protocol, and the names of the others under `unfinished`.

    Raises:
        ValueError: before any measurement, for settings of a protocol that do not fit the images.
    """
    args, form = evaluator.args, evaluator.form
    wanted = settings_of(args, form.sides)
    ready = ready_set(images, args, token) if "corruptions" in args.protocols and args.corrupted_dataset_name is not None else None

    def run(changes: dict[str, Change], text: str, data: Dataset = images.evaluation):
        return evaluator.run(data, (images.image_column, images.label_column), changes, text)

    def corrupted() -> dict[str, list[float]]:
        if ready is not None:
            return ready_corruptions(evaluator, images, ready)
        data = images.evaluation
        if args.max_corrupted_samples is not None:
            data = data.shuffle(seed=args.seed).select(range(min(args.max_corrupted_samples, len(data))))
        return corrupted_here(run(corruptions(args), "corruptions", data))

    def measure(protocol: str) -> dict[str, Any]:
        if protocol == "clean":
            return clean(run({"clean": unchanged}, "clean images"), args.bins)
        if protocol in ("fgsm", "pgd"):
            [(_, *found)] = run({protocol: attacks(evaluator.model, args)[protocol]}, protocol)
            facts = (
                {"eps": args.eps / 255}
                if protocol == "fgsm"
                else {"eps": args.eps / 255, "step": args.pgd_step / 255, "steps": args.pgd_steps}
            )
            return {"attacks": {protocol: {**facts, **{f"top{k}": top_k_accuracy(*found, k) for k in (1, 5)}}}}
        if protocol == "corruptions":
            top1 = corrupted()
            return {"corruptions": {"top1": top1, **corruption_errors(top1, alexnet=ready is not None and len(images.label_names) == 1000)}}
        patch = wanted["occlusion"]["patch"]
        fill = torch.tensor(form.neutral).view(1, -1, 1, 1)
        top1 = [top_k_accuracy(*found, 1) for _, *found in run(occlusions(patch, fill, args.seed), "occlusion")]
        return {"occlusion": {"patch": patch, "ratios": RATIOS, "top1": top1}}

    protocols = ["clean", *(name for name in PROTOCOLS if name in args.protocols)]
    results: dict[str, Any] = {"settings": {}}
    for place, protocol in enumerate(protocols):
        found = part_of(before or {}, protocol, wanted[protocol]) or measure(protocol)
        attacked = {**results.get("attacks", {}), **found.get("attacks", {})}
        results |= {**found, **({"attacks": attacked} if attacked else {})}
        results["settings"][protocol] = wanted[protocol]
        left = protocols[place + 1 :]
        yield {**results, "settings": dict(results["settings"]), **({"unfinished": left} if left else {})}


def part_of(results: Mapping[str, Any], protocol: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The part of earlier results for a protocol with these settings, or None."""
    if results.get("settings", {}).get(protocol) != settings:
        return None
    if protocol in ("fgsm", "pgd"):
        return {"attacks": {protocol: results["attacks"][protocol]}}
    return {name: results[name] for name in (("clean", "calibration") if protocol == "clean" else (protocol,))}


def clean(runs: Iterator[tuple[str, np.ndarray, np.ndarray]], bins: int) -> dict[str, Any]:
    """Accuracy and calibration on unchanged images."""
    [(_, probabilities, classes)] = runs
    # not by the measures' `compute`, which first writes 50 million probabilities to a table
    found = {key: value for m in all_measures(bins).evaluation_modules for key, value in m.measure(probabilities, classes).items()}
    calibration = {}
    for key, equal_mass in (("equal width", False), ("equal mass", True)):
        drawn = confidence_bins(probabilities, classes, bins, equal_mass)
        calibration[key] = {**{name: value.tolist() for name, value in dataclasses.asdict(drawn).items()}, "error": drawn.error}
    return {"clean": found, "calibration": calibration}


def unchanged(pixels: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    return pixels


def attacks(model: PixelModel, args: EvaluationArguments) -> dict[str, Change]:
    """By name: FGSM and PGD."""
    eps, step = args.eps / 255, args.pgd_step / 255

    def start(rows, device):
        return Draws([(args.seed, 1000, int(row)) for row in rows], device)

    return {
        "fgsm": lambda pixels, labels, rows: fgsm(model, pixels, labels, eps),
        "pgd": lambda pixels, labels, rows: pgd(model, pixels, labels, eps, step, args.pgd_steps, start(rows, pixels.device)),
    }


def corruptions(args: EvaluationArguments) -> dict[str, Change]:
    """The corruptions by name and severity, as in `fog 3`."""

    def changed_by(name, severity):
        change = corruption(name, severity, args.seed)
        return lambda pixels, labels, rows: change(pixels, rows=rows)

    names = (*COMMON_CORRUPTIONS, *EXTRA_CORRUPTIONS)
    return {f"{name} {severity}": changed_by(name, severity) for name in names for severity in SEVERITIES}


def occlusions(patch: int, fill: Tensor, seed: int) -> dict[str, Change]:
    def hidden(ratio):
        def change(pixels, labels, rows):
            return occlude(pixels, ratio, patch, fill.to(pixels.device), Draws([(seed, 2000, int(row)) for row in rows], pixels.device))

        return change

    return {str(ratio): hidden(ratio) for ratio in RATIOS}


def corrupted_here(runs: Iterator[tuple[str, np.ndarray, np.ndarray]]) -> dict[str, list[float]]:
    """Top-1 accuracies of every corruption by severity."""
    found: dict[str, list[float]] = {}
    for name, *run in runs:
        found.setdefault(name.split()[0], []).append(top_k_accuracy(*run, 1))
    return found


def ready_set(images: ImageData, args: EvaluationArguments, token: str | None) -> Dataset:
    """Loads the data set of corrupted images. Raises ValueError if it cannot be loaded, or lacks columns."""
    data = concatenate_datasets(list(load_splits(DataArguments(dataset_name=args.corrupted_dataset_name), token).values()))
    for name in (args.corruption_column_name, args.severity_column_name, images.image_column, images.label_column):
        check_known("a column of the corrupted set", name, data.column_names)
    data = with_images(data, images.image_column, "corrupted")
    labels = read_labels(data, images.label_column, "corrupted")
    places = of_network(images.label_names, labels.names, numbered=labels.numbered and not images.numbered)
    return with_labels(data, images.label_column, moved(labels, places, images.label_names))


def ready_corruptions(evaluator: Evaluator, images: ImageData, data: Dataset) -> dict[str, list[float]]:
    """Top-1 accuracies of every corruption by severity, on a data set of corrupted images."""
    args = evaluator.args
    kinds, severities = (np.array(data[name]).astype(str) for name in (args.corruption_column_name, args.severity_column_name))
    if isinstance(data.features[args.corruption_column_name], ClassLabel):
        names = data.features[args.corruption_column_name].names
        kinds = np.array([names[int(kind)] for kind in kinds])
    found: dict[str, list[float]] = {}
    for kind in dict.fromkeys(kinds.tolist()):
        for severity in sorted(set(severities[kinds == kind].tolist()), key=float):
            part = data.select(np.flatnonzero((kinds == kind) & (severities == severity)))
            runs = evaluator.run(part, (images.image_column, images.label_column), {"": unchanged}, f"{kind} {severity}")
            found.setdefault(kind, []).extend(top_k_accuracy(*run, 1) for _, *run in runs)
    return found


def corruption_errors(top1: dict[str, list[float]], *, alexnet: bool) -> dict[str, float]:
    """Mean errors: over all measured corruptions; over the 15, if all were measured; with `alexnet`, as ImageNet-C reports it."""
    errors = {name: [1 - value for value in values] for name, values in top1.items()}
    found = {"mean_error_all": float(np.mean([np.mean(values) for values in errors.values()]))}
    if all(len(top1.get(name, ())) == len(SEVERITIES) for name in COMMON_CORRUPTIONS):
        found["mean_error"] = mean_corruption_error(errors)
        if alexnet:
            found["mce_alexnet"] = mean_corruption_error(errors, alexnet=True)
    return found
