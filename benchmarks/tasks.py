"""What mixing does for tasks that are not classes of images: sounds, videos, label maps, texts, numbers, rare classes, small students.

    python benchmarks/tasks.py --json benchmarks/results/tasks.json

All ways of training a task use the same seeds, data, network and number of steps, from scratch. So they are compared seed by seed. The first four
tasks are those of the scripts, with fewer examples. Alphas are those of the methods' authors; mixup of sounds uses 0.5. No setting was chosen by
the results.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import set_seed

from hf_mixup import MixupTrainer, MixupTrainingArguments
from hf_mixup.cli.tasks import parse
from hf_mixup.core.places import SCRIPTS
from hf_mixup.data.made import digit_pictures
from hf_mixup.networks.backbones import from_scratch

FOLDER = tempfile.TemporaryDirectory()
COMMON = {
    "output_dir": f"{FOLDER.name}/run", "use_cpu": True, "eval_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    "logging_strategy": "no", "dataloader_pin_memory": False,
}  # fmt: skip


def of_script(task: str, examples: int, epochs: int) -> Callable[[Mapping[str, Any], int], dict[str, float]]:
    """A run of `training_scripts/run_mixup_TASK.py` on fewer examples, without its card."""

    def run(way: Mapping[str, Any], seed: int) -> dict[str, float]:
        module = script(task)
        small = {"per_device_train_batch_size": 8} if task == "segmentation" else {}
        words = {**COMMON, "seed": seed, "num_train_epochs": epochs, "max_train_samples": examples, **small, **way}
        typed = [part for name, value in words.items() for part in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))]
        chosen, _, args = parse(typed, "benchmark", "", ["vanilla"], small)
        set_seed(seed)
        trainer, _ = module.build(chosen, args)
        trainer.train()
        return trainer.evaluate()

    return run


def script(task: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(task, SCRIPTS / f"run_mixup_{task}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Rows(Dataset):
    """Inputs (N, ...) and their labels (N,), class numbers or numbers."""

    def __init__(self, inputs: torch.Tensor, labels: torch.Tensor):
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"pixel_values": self.inputs[row], "labels": self.labels[row].item()}


def trained(network: nn.Module, train: Rows, evaluation: Rows, seed: int, epochs: int, **way: Any) -> MixupTrainer:
    args = MixupTrainingArguments(
        **{**COMMON, "seed": seed, "num_train_epochs": epochs, "learning_rate": 2e-3, "per_device_train_batch_size": 32, "weight_decay": 0.01, **way}
    )  # fmt: skip
    trainer = MixupTrainer(network, args, train_dataset=train, eval_dataset=evaluation)
    trainer.train()
    return trainer


def digits(part: int) -> Rows:
    """scikit-learn's digits, (N, 1, 8, 8), with a mean near 0: 1200 for training, or those of other writers for evaluation."""
    pictures, classes = digit_pictures()[part]
    return Rows(torch.from_numpy(pictures)[:, None] * 2 - 1, torch.from_numpy(classes).long())


def convolutions(outputs: int, width: int = 16) -> nn.Module:
    network = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.BatchNorm2d(2 * width), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, outputs),
    )  # fmt: skip
    network.num_classes = outputs
    return network


def regression(way: Mapping[str, Any], seed: int) -> dict[str, float]:
    """The progression of diabetes after a year, from ten measurements, all standardised: 300 patients for training, 142 for evaluation."""
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    order = np.random.default_rng(seed).permutation(len(data.target))
    inputs, numbers = (torch.tensor(part[order], dtype=torch.float32) for part in (data.data, data.target))
    inputs, numbers = ((part - part[:300].mean(0)) / part[:300].std(0) for part in (inputs, numbers))
    set_seed(seed)
    network = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    network.num_classes = 1
    train, evaluation = Rows(inputs[:300], numbers[:300]), Rows(inputs[300:], numbers[300:])
    return trained(network, train, evaluation, seed, 60, loss="mse", **way).evaluate()


def imbalance(way: Mapping[str, Any], seed: int) -> dict[str, float]:
    """Digits of which class c has 100 * 50 ** (-c / 9) images, from 100 to 2. The evaluation has about as many images of each class."""
    data, rng = digits(0), np.random.default_rng(seed)
    kept = []
    for number, place in enumerate(rng.permutation(10)):
        rows = np.flatnonzero(data.labels.numpy() == number)
        kept += rng.permutation(rows)[: round(100 * 50 ** (-place / 9))].tolist()
    set_seed(seed)
    return trained(convolutions(10), Rows(data.inputs[kept], data.labels[kept]), digits(1), seed, 60, **way).evaluate()


@cache
def teacher() -> str:
    """The folder of a ResNet-20 that was trained on all 1200 digits."""
    set_seed(100)
    network = from_scratch("cifar_resnet20", 10, 8, channels=1)
    network = trained(network, digits(0), digits(1), 100, 8, mix=["mixup"]).mixup_model.backbone
    network.save_pretrained(f"{FOLDER.name}/teacher")
    return f"{FOLDER.name}/teacher"


def distillation(way: Mapping[str, Any], seed: int) -> dict[str, float]:
    """A student with a hundredth of the teacher's parameters learns from 100 digits."""
    data = digits(0)
    few = np.random.default_rng(seed).permutation(len(data))[:100]
    way = {**way, "distill_from": teacher()} if "distillation_weight" in way else way
    set_seed(seed)
    student = Rows(data.inputs[few], data.labels[few])
    return trained(convolutions(10, 4), student, digits(1), seed, 200, **way).evaluate()


PLAIN: dict[str, Any] = {"mix": ["vanilla"]}
TAUGHT = {"distillation_weight": 1.0, "distillation_temperature": 2.0}
WEIGHED = {"name": "classbalanced", "start_epoch": 45}

# task: how it is run, the number that is compared, whether more of it is better, and the ways of training, plain first
TASKS: dict[str, tuple[Callable[[Mapping[str, Any], int], dict[str, float]], str, bool, dict[str, dict[str, Any]]]] = {
    "audio": (
        of_script("audio", 120, 150), "eval_top1", True,
        {"plain": PLAIN, "mixup 0.5": {"mix": ["mixup"], "alpha": [0.5]}, "cutmix": {"mix": ["cutmix"]}},
    ),
    "video": (
        of_script("video", 300, 60), "eval_top1", True,
        {"plain": PLAIN, "mixup 0.8 + cutmix": {"mix": ["mixup", "cutmix"], "alpha": [0.8, 1.0]}, "videomix": {"mix": ["videomix"]}},
    ),
    "segmentation": (
        of_script("segmentation", 120, 30), "eval_mean_iou", True, {"plain": PLAIN, "cutmix": {"mix": ["cutmix"]}},
    ),
    "text": (
        of_script("text", 200, 30), "eval_top1", True, {"plain": PLAIN, "wordmixup": {"mix": ["wordmixup"]}, "tmix": {"mix": ["tmix"]}},
    ),
    "regression": (
        regression, "eval_mse", False, {"plain": PLAIN, "mixup 2": {"mix": ["mixup"], "alpha": [2.0]}, "cmixup": {"mix": ["cmixup"]}},
    ),
    "imbalance": (
        imbalance, "eval_top1", True,
        {
            "plain": PLAIN, "mixup": {"mix": ["mixup"]}, "remix": {"mix": ["remix"]}, "balancedmixup": {"mix": ["balancedmixup"]},
            "cmo": {"mix": ["cmo"]}, "classbalanced": {**PLAIN, "loss": WEIGHED}, "mixup, classbalanced": {"mix": ["mixup"], "loss": WEIGHED},
        },
    ),
    "distillation": (
        distillation, "eval_top1", True,
        {
            "plain": PLAIN, "mixup": {"mix": ["mixup"]}, "teacher": {**PLAIN, **TAUGHT}, "teacher, mixup": {"mix": ["mixup"], **TAUGHT},
            "teacher, cutmix": {"mix": ["cutmix"], **TAUGHT},
        },
    ),
}  # fmt: skip


def measured(task: str, seeds: int) -> list[dict[str, Any]]:
    """A row for each way of training."""
    run, measure, more, ways = TASKS[task]
    rows = []
    for name, way in ways.items():
        values, seconds = [], []
        for seed in range(seeds):
            start = time.process_time()
            values.append(run(way, seed)[measure])
            seconds.append(time.process_time() - start)
        differences = [value - plain for value, plain in zip(values, rows[0]["values"] if rows else values, strict=True)]
        rows.append(
            {
                "task": task,
                "way": name,
                "measure": measure.removeprefix("eval_"),
                "more_is_better": more,
                "values": values,
                "mean": statistics.mean(values),
                "to_plain": statistics.mean(differences),
                "to_plain_sd": statistics.stdev(differences) if seeds > 1 else 0.0,
                "cpu_seconds": statistics.median(seconds),
            }
        )
        print(task, name, [round(value, 4) for value in values], f"{statistics.median(seconds):.1f} s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to put the numbers; tasks that are there already and not asked for stay")
    args = parser.parse_args()
    known = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    for task in args.tasks:
        known = [row for row in known if row["task"] != task] + measured(task, args.seeds)
        if args.json:
            known.sort(key=lambda row: list(TASKS).index(row["task"]))
            args.json.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
