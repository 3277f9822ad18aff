"""Pictures for tests, and the scripts run in this process."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from run_script import ROOT

COLOURS = {"blue": (40, 40, 220), "green": (40, 220, 40), "red": (220, 40, 40)}


def picture(width: int, height: int, colour=(128, 128, 128), seed: int = 0, spread: float = 20) -> Image.Image:
    """RGB noise around a colour."""
    noise = np.random.default_rng(seed).normal(0, spread, (height, width, 3))
    return Image.fromarray(np.clip(noise + np.array(colour), 0, 255).astype(np.uint8))


def folder(path: Path, count: int = 8, size=(40, 40), classes=COLOURS, change=lambda image: image, ext: str = "png") -> Path:
    """One folder a class, of noise around its colour."""
    for name, colour in classes.items():
        (path / name).mkdir(parents=True)
        for row in range(count):
            change(picture(*size, colour, row)).save(path / name / f"{row:03d}.{ext}")
    return path


def script(name: str):
    """The module of a training script."""
    sys.path.insert(0, str(ROOT / "training_scripts"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def train(output: Path, *words) -> dict:
    """What run_mixup.py measures."""
    script("run_mixup").main(["--output_dir", str(output), "--use_cpu", "--disable_tqdm", "true", *map(str, words)])
    return json.loads((output / "all_results.json").read_text())


def evaluate(checkpoint: Path, output: Path, *words) -> dict:
    """What run_evaluation.py measures."""
    script("run_evaluation").main([str(checkpoint), "--output_dir", str(output), "--use_cpu", *map(str, words)])
    return json.loads((output / "evaluation.json").read_text())
