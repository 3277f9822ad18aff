"""Measures what a classifier is worth beside its accuracy: `accelerate launch training_scripts/run_evaluation.py CHECKPOINT_OR_REPO`.

Calibration; FGSM and PGD; the 15 + 4 common corruptions at five severities; occlusion. Leaves evaluation.json, evaluation.md and
pictures in --output_dir, and adds the results to the model card there. `--help` lists all there is to set.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, HfArgumentParser
from transformers.utils import logging as transformers_logging

from hf_mixup import plots
from hf_mixup.arguments import DataArguments
from hf_mixup.backbones import load_classifier
from hf_mixup.checks import check_known, nearest
from hf_mixup.corruptions import COMMON_CORRUPTIONS, EXTRA_CORRUPTIONS, SEVERITIES, corruption, mean_corruption_error
from hf_mixup.data import ImageData, ImageDataset, ImageFormat, load_images
from hf_mixup.metrics import all_measures, confidence_bins
from hf_mixup.rng import Draws
from hf_mixup.robustness import PixelModel, fgsm, occlude, pgd

PROTOCOLS = ("fgsm", "pgd", "corruptions", "occlusion")
RATIOS = [tenth / 10 for tenth in range(10)]
MARKS = ("<!-- evaluation -->", "<!-- /evaluation -->")
# what an image becomes: of pixels in [0, 1], labels and rows
Change = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

logger = logging.getLogger("run_evaluation")


@dataclass
class EvaluationArguments:
    """What to measure."""

    protocols: list[str] = field(
        default_factory=lambda: list(PROTOCOLS), metadata={"help": f"Any of {', '.join(PROTOCOLS)}; accuracy and calibration are always."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "The checkpoint's folder, or runs/evaluation-<name>, if not given."})
    batch_size: int = field(default=64, metadata={"help": "Images a process looks at together."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave a GPU alone."})
    workers: int = field(default=0, metadata={"help": "Processes that read images, for each process."})
    seed: int = field(default=0, metadata={"help": "Of everything random: starts of PGD, noise, hidden patches."})
    eps: float = field(default=8.0, metadata={"help": "Largest change of a pixel by an attack, of 255."})
    pgd_step: float = field(default=2.0, metadata={"help": "Step of PGD, of 255."})
    pgd_steps: int = field(default=10, metadata={"help": "Steps of PGD."})
    bins: int = field(default=10, metadata={"help": "Bins of the calibration error."})
    patch: int | None = field(default=None, metadata={"help": "Side of the patches hidden; 16, or an eighth of images up to 64 pixels."})
    corrupted_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A ready corrupted set, instead of corrupting here: of the Hub or a folder, with columns of the corruption and the severity."
        },
    )
    corruption_column_name: str = field(default="corruption", metadata={"help": "Column of the names of corruptions."})
    severity_column_name: str = field(default="severity", metadata={"help": "Column of the severities, 1 to 5."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    token: str | None = field(default=None, metadata={"help": "Hub token; the one of `hf auth login` if not given."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code of the checkpoint's repository. Off unless you trust it."})


class Numbered(torch.utils.data.Dataset):
    """The images with the numbers of their rows, which their randomness follows from."""

    def __init__(self, images: ImageDataset):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.images[row], "rows": row}


class Evaluator:
    """Runs a classifier over images as they are, and as changes leave them, in any number of processes."""

    def __init__(self, model: PixelModel, form: ImageFormat, args: EvaluationArguments):
        self.accelerator, self.args = Accelerator(cpu=args.use_cpu or not torch.accelerator.is_available()), args
        self.model = self.accelerator.prepare_model(model, evaluation_mode=True)
        # pixels, not normalised: that is the model's first step
        self.transform = dataclasses.replace(form, mean=(0.0,) * 3, std=(1.0,) * 3).eval_transform()

    def run(self, data, columns: tuple[str, str], changes: dict[str, Change], text: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """For every change: its name, probabilities (N, num_labels), classes (N,). Images are read and resized once."""
        images = Numbered(ImageDataset(data, *columns, self.transform))
        loader = torch.utils.data.DataLoader(images, self.args.batch_size, num_workers=self.args.workers)
        loader = self.accelerator.prepare_data_loader(loader)
        found: dict[str, list] = {name: [] for name in changes}
        with tqdm(total=len(loader) * len(changes), desc=text, disable=not self.accelerator.is_main_process) as bar:
            for batch in loader:
                pixels, labels, rows = batch["pixel_values"], batch["labels"], batch["rows"]
                for name, change in changes.items():
                    with torch.no_grad():
                        probabilities = self.model(change(pixels, labels, rows)).softmax(1)
                    gathered = self.accelerator.gather_for_metrics((probabilities, labels))
                    found[name].append([part.cpu().numpy() for part in gathered])
                    bar.update()
        for name, parts in found.items():
            yield name, *(np.concatenate(part) for part in zip(*parts, strict=True))


def unchanged(pixels, labels, rows):
    return pixels


def attacks(model: PixelModel, args: EvaluationArguments) -> dict[str, Change]:
    eps, step = args.eps / 255, args.pgd_step / 255

    def start(rows, device):
        return Draws([(args.seed, 1000, int(row)) for row in rows], device)

    known = {
        "fgsm": lambda pixels, labels, rows: fgsm(model, pixels, labels, eps),
        "pgd": lambda pixels, labels, rows: pgd(model, pixels, labels, eps, step, args.pgd_steps, start(rows, pixels.device)),
    }
    return {name: known[name] for name in known if name in args.protocols}


def corruptions(args: EvaluationArguments) -> dict[str, Change]:
    def changed_by(name, severity):
        change = corruption(name, severity, args.seed)
        return lambda pixels, labels, rows: change(pixels, rows=rows)

    names = (*COMMON_CORRUPTIONS, *EXTRA_CORRUPTIONS)
    return {f"{name} {severity}": changed_by(name, severity) for name in names for severity in SEVERITIES}


def occlusions(patch: int, fill: torch.Tensor, seed: int) -> dict[str, Change]:
    def hidden(ratio):
        def change(pixels, labels, rows):
            return occlude(pixels, ratio, patch, fill.to(pixels.device), Draws([(seed, 2000, int(row)) for row in rows], pixels.device))

        return change

    return {str(ratio): hidden(ratio) for ratio in RATIOS}


def ready_corruptions(evaluator: Evaluator, images: ImageData, args: EvaluationArguments) -> dict[str, list[float]]:
    """Top-1 accuracies on a corrupted set that is there already."""
    import datasets

    path = args.corrupted_dataset_name
    on_disk = Path(path, "dataset_dict.json").is_file() or Path(path, "state.json").is_file()
    splits = datasets.load_from_disk(path) if on_disk else datasets.load_dataset(path, token=args.token)
    data = splits if isinstance(splits, datasets.Dataset) else datasets.concatenate_datasets(list(splits.values()))
    for name in (args.corruption_column_name, args.severity_column_name, images.image_column, images.label_column):
        check_known("a column of the corrupted set", name, data.column_names)
    kinds, severities = (np.array(data[name]).astype(str) for name in (args.corruption_column_name, args.severity_column_name))
    if isinstance(data.features[args.corruption_column_name], datasets.ClassLabel):
        names = data.features[args.corruption_column_name].names
        kinds = np.array([names[int(kind)] for kind in kinds])
    found: dict[str, list[float]] = {}
    for kind in dict.fromkeys(kinds.tolist()):
        for severity in sorted(set(severities[kinds == kind].tolist()), key=float):
            part = data.select(np.flatnonzero((kinds == kind) & (severities == severity)))
            runs = evaluator.run(part, (images.image_column, images.label_column), {"": unchanged}, f"{kind} {severity}")
            found.setdefault(kind, []).extend(accuracy(probabilities, classes) for _, probabilities, classes in runs)
    return found


def accuracy(probabilities: np.ndarray, classes: np.ndarray) -> float:
    return float((probabilities.argmax(1) == classes).mean())


def evaluate(evaluator: Evaluator, images: ImageData, form: ImageFormat, args: EvaluationArguments) -> dict[str, Any]:
    """All results, ready for JSON."""

    def run(changes, text):
        return evaluator.run(images.evaluation, (images.image_column, images.label_column), changes, text)

    measures = all_measures(args.bins).evaluation_modules
    [(_, probabilities, classes)] = run({"clean": unchanged}, "clean images")
    # not through their `compute`, which writes 50 million probabilities to a table first
    results: dict[str, Any] = {"clean": {key: value for m in measures for key, value in m.measure(probabilities, classes).items()}}
    for key, equal_mass in (("equal width", False), ("equal mass", True)):
        bins = confidence_bins(probabilities, classes, args.bins, equal_mass)
        lists = {name: value.tolist() for name, value in dataclasses.asdict(bins).items()}
        results.setdefault("calibration", {})[key] = {**lists, "error": bins.error}
    if attacking := attacks(evaluator.model, args):
        settings = {"fgsm": {"eps": args.eps / 255}, "pgd": {"eps": args.eps / 255, "step": args.pgd_step / 255, "steps": args.pgd_steps}}
        results["attacks"] = {
            name: {**settings[name], **{key: value for m in measures[:2] for key, value in m.measure(*found).items()}}
            for name, *found in run(attacking, "attacks")
        }
    if "corruptions" in args.protocols:
        if args.corrupted_dataset_name is not None:
            top1 = ready_corruptions(evaluator, images, args)
        else:
            top1 = {}
            for name, *found in run(corruptions(args), "corruptions"):
                top1.setdefault(name.split()[0], []).append(accuracy(*found))
        errors = {name: [1 - value for value in values] for name, values in top1.items()}
        results["corruptions"] = {"top1": top1, "mean_error_all": float(np.mean([np.mean(values) for values in errors.values()]))}
        if all(len(top1.get(name, ())) == len(SEVERITIES) for name in COMMON_CORRUPTIONS):
            results["corruptions"]["mean_error"] = mean_corruption_error(errors)
            if args.corrupted_dataset_name is not None and len(images.label_names) == 1000:
                results["corruptions"]["mce_alexnet"] = mean_corruption_error(errors, alexnet=True)
    if "occlusion" in args.protocols:
        patch = args.patch or (16 if form.size > 64 else form.size // 8)
        fill = torch.tensor(form.mean).view(1, -1, 1, 1)
        top1 = [accuracy(*found) for _, *found in run(occlusions(patch, fill, args.seed), "occlusion")]
        results["occlusion"] = {"patch": patch, "ratios": RATIOS, "top1": top1}
    return results


def numbers(results: dict[str, Any]) -> list[tuple[str, str, float]]:
    """The results in short: type of the metric, its name for people, value."""
    clean = results["clean"]
    rows = [
        ("accuracy", "top-1 accuracy", clean["top1"]),
        ("top_5_accuracy", "top-5 accuracy", clean["top5"]),
        ("expected_calibration_error", "expected calibration error, bins of equal width", clean["ece"]),
        ("expected_calibration_error_equal_mass", "expected calibration error, bins of equal mass", clean["ece_mass"]),
        ("nll", "negative log-likelihood", clean["nll"]),
        ("brier_score", "Brier score", clean["brier"]),
    ]
    for name, attack in results.get("attacks", {}).items():
        steps = f", {attack['steps']} steps" if "steps" in attack else ""
        rows.append((f"{name}_accuracy", f"top-1 accuracy under {name.upper()}, eps {255 * attack['eps']:g}/255{steps}", attack["top1"]))
    damage = results.get("corruptions", {})
    for key, text in (
        ("mean_error", "mean corruption error, 15 corruptions, unnormalised"),
        ("mean_error_all", "mean error over all corruptions measured"),
        ("mce_alexnet", "mean corruption error relative to AlexNet"),
    ):
        if key in damage:
            rows.append(({"mean_error": "mean_corruption_error"}.get(key, key), text, damage[key]))
    if "occlusion" in results:
        rows.append(("occlusion_accuracy", "top-1 accuracy with half of the patches hidden", results["occlusion"]["top1"][5]))
    return rows


def write(folder: Path, results: dict[str, Any]) -> None:
    """JSON, Markdown, pictures, and the model card, where there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")
    plots.reliability(folder / "reliability.png", {f"bins of {key}": value for key, value in results["calibration"].items()})
    pictures = ["![Reliability diagrams](reliability.png)"]
    if "corruptions" in results:
        plots.corruption_bars(folder / "corruptions.png", results["corruptions"]["top1"], results["clean"]["top1"])
        pictures.append("![Accuracy under every corruption](corruptions.png)")
    if "occlusion" in results:
        occlusion = results["occlusion"]
        plots.occlusion_curve(folder / "occlusion.png", occlusion["ratios"], occlusion["top1"], 1 / results["num_labels"])
        pictures.append("![Accuracy over the share of hidden patches](occlusion.png)")
    table = "\n".join(["| measure | value |", "| --- | --- |", *(f"| {text} | {value:.4f} |" for _, text, value in numbers(results))])
    data, split = results["dataset"]["name"], results["dataset"]["split"]
    body = "\n\n".join(
        [f"{results['dataset']['images']} images of {data} ({split}).", table, *pictures, f"```bash\n{results['command']}\n```"]
    )
    (folder / "evaluation.md").write_text(f"# Evaluation of {results['model']}\n\n{body}\n")
    if (folder / "README.md").is_file():
        merge_into_card(folder / "README.md", f"## Evaluation\n\n{body}", results)


def merge_into_card(path: Path, section: str, results: dict[str, Any]) -> None:
    """Adds the results to the model-index and as a section, in the place of those of an earlier evaluation on the same images."""
    from huggingface_hub import EvalResult, ModelCard

    card = ModelCard.load(path)
    name, split = results["dataset"]["name"], results["dataset"]["split"]
    rows = {kind: (text, value) for kind, text, value in numbers(results)}
    earlier = [
        result
        for result in card.data.eval_results or []
        if (result.dataset_name, result.dataset_split) != (name, split) or result.metric_type not in rows
    ]
    kind = next((r.dataset_type for r in card.data.eval_results or [] if r.dataset_name == name), Path(name).name.lower())
    card.data.model_name = card.data.model_name or Path(results["model"]).name
    card.data.eval_results = earlier + [
        EvalResult("image-classification", kind, name, metric, value, metric_name=text, dataset_split=split)
        for metric, (text, value) in rows.items()
    ]
    before, _, rest = card.text.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    card.text = f"{before.rstrip()}\n\n{MARKS[0]}\n{section}\n{MARKS[1]}\n{after.lstrip()}"
    card.save(path)


def main(argv: list[str]) -> None:
    parser = HfArgumentParser((DataArguments, EvaluationArguments), description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="A folder, or a repository of the Hub: of transformers, timm or ours.")
    data_args, args, rest, *unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if any(unknown):
        flags = [option for action in parser._actions for option in action.option_strings]
        raise ValueError(f"every argument must be known, got {unknown[0][0]!r}; {nearest(unknown[0][0], flags)}")
    for protocol in args.protocols:
        check_known("protocols", protocol, PROTOCOLS)
    if data_args.dataset_name is None and data_args.train_dir is None:
        data_args.dataset_name = "digits"
    transformers_logging.disable_progress_bar()
    hub = {"revision": args.model_revision, "token": args.token, "trust_remote_code": args.trust_remote_code}
    network = load_classifier(rest.checkpoint, **hub)
    form = ImageFormat.of_processor(AutoImageProcessor.from_pretrained(rest.checkpoint, **hub), data_args.image_size)
    images = load_images(data_args, token=args.token)
    if network.config.num_labels != len(images.label_names):
        raise ValueError(
            f"the network must know the classes of the data set, got {network.config.num_labels} and {len(images.label_names)}; look at both names."
        )
    known = {str(name): int(number) for name, number in (network.config.label2id or {}).items()}
    classes = [known[name] for name in images.label_names] if set(images.label_names) == set(known) else None
    evaluator = Evaluator(PixelModel(network, form.mean, form.std, classes), form, args)
    main_process = evaluator.accelerator.is_main_process
    logging.basicConfig(level=logging.INFO if main_process else logging.WARNING, format="%(message)s")
    results = evaluate(evaluator, images, form, args)
    if main_process:
        folder = Path(
            args.output_dir or (rest.checkpoint if Path(rest.checkpoint).is_dir() else f"runs/evaluation-{Path(rest.checkpoint).name}")
        )
        about = {
            "model": rest.checkpoint,
            "dataset": {"name": images.name, "split": images.evaluation_split, "images": len(images.evaluation)},
            "num_labels": len(images.label_names),
            "image_size": form.size,
            "command": shlex.join(["accelerate", "launch", "training_scripts/run_evaluation.py", *argv]),
        }
        write(folder, {**about, **results})
        for _, text, value in numbers(results):
            logger.info("%-58s %.4f", text, value)
        logger.info("everything is in %s", folder)
    evaluator.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])
