"""Trains a classifier of videos with mixing. Without arguments it trains a tiny VideoMAE on moving digits that it makes.

`--dataset_name` takes data sets with a column of frames (a list of images) and one of classes, `--model_name_or_path` any checkpoint for video
classification, such as VideoMAE or TimeSformer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import AutoImageProcessor, VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEImageProcessor

from hf_mixup import MixupTrainer, MixupTrainingArguments
from hf_mixup.cli.tasks import TaskArguments, column_of, data_sets, load_splits, named, numbered, script, train, with_classes
from hf_mixup.data.made import digit_pictures, digit_videos
from hf_mixup.data.pixels import read_image
from hf_mixup.networks.backbones import load_classifier


def main(argv: list[str], prog: str = "run_mixup_video.py") -> dict[str, float]:
    return train(argv, prog, "Trains a classifier of videos with mixing.", ["mixup", "cutmix"], build)


def build(task: TaskArguments, args: MixupTrainingArguments) -> tuple[MixupTrainer, str]:
    data, evaluation, names, read = made() if task.dataset_name is None else loaded(task, args.seed)
    names, number = numbered(task, names)
    labels = named(names)
    if task.model_name_or_path is None:
        network, processor = from_scratch(**labels)
    else:
        network = load_classifier(task.model_name_or_path, num_labels=len(names), ignore_mismatched_sizes=True, **labels)
        processor = AutoImageProcessor.from_pretrained(task.model_name_or_path)
    wanted = network.config.num_frames

    def example(row: Any) -> dict[str, Any]:
        frames, label = read(row)
        # as many frames as the network takes, evenly spaced
        chosen = [frames[at] for at in np.linspace(0, len(frames) - 1, wanted).round().astype(int)]
        return {"pixel_values": processor(chosen, return_tensors="pt")["pixel_values"][0], "labels": number.get(label, label)}

    sets = data_sets(task, data, evaluation, example, args.seed)
    trainer = MixupTrainer(network, args, **sets, processing_class=processor)
    return trainer, task.dataset_name or "moving digits"


def made() -> tuple[list, list, list[str], Any]:
    """Moving digits: training rows, evaluation rows, names of the classes, and the function that reads a row."""
    rows = []
    for (pictures, classes), count, seed in zip(digit_pictures(), (1200, 400), (0, 1), strict=True):
        videos, shown = digit_videos(pictures, count, seed)
        rows.append(list(zip((videos * 255).astype(np.uint8), classes[shown], strict=True)))
    return *rows, list(map(str, range(10))), lambda row: (list(row[0]), row[1])


def loaded(task: TaskArguments, seed: int) -> tuple[Any, Any, list[str], Any]:
    from datasets import ClassLabel, List

    train, evaluation = load_splits(task, seed)
    frames = column_of(train, task.input_column_name, List, "frames")
    label = column_of(train, task.label_column_name, ClassLabel, "labels")
    return *with_classes(train, evaluation, label), lambda row: ([np.array(read_image(frame)) for frame in row[frames]], row[label])


def from_scratch(**labels: Any) -> tuple[VideoMAEForVideoClassification, VideoMAEImageProcessor]:
    """A tiny VideoMAE for 4 frames of 10 x 10 pixels."""
    config = VideoMAEConfig(
        image_size=10, patch_size=5, num_frames=4, tubelet_size=2, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **labels,
    )  # fmt: skip
    return VideoMAEForVideoClassification(config), VideoMAEImageProcessor(size={"shortest_edge": 10}, crop_size={"height": 10, "width": 10})


if __name__ == "__main__":
    script(main, __file__)
