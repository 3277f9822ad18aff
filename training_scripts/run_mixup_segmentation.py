"""Trains a network for semantic segmentation with mixing: a stock Trainer, the callback, and the network's loss. Without arguments it trains a
tiny SegFormer on maps of digits that it makes.

`--dataset_name` takes data sets with two columns of images, the second one label maps, `--model_name_or_path` any checkpoint for semantic
segmentation whose image processor takes label maps, such as SegFormer or UperNet.
"""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    EvalPrediction,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    Trainer,
    TrainingArguments,
)

from hf_mixup import MixupCallback, MixupCollator, MixupTrainingArguments
from hf_mixup.cli.tasks import TaskArguments, column_of, data_sets, load_splits, script, train
from hf_mixup.data.made import IGNORED, digit_maps, digit_pictures
from hf_mixup.data.pixels import read_image
from hf_mixup.training.agreement import changed

USED = ("mix", "mix_prob", "alpha", "mix_args", "mode", "mix_rate", "mix_repeat", "mix_off_epoch")


def main(argv: list[str], prog: str = "run_mixup_segmentation.py") -> dict[str, float]:
    return train(argv, prog, "Trains a network that labels pixels with mixing.", ["cutmix"], build, {"per_device_train_batch_size": 8})


def build(task: TaskArguments, args: MixupTrainingArguments) -> tuple[Trainer, str]:
    refuse_unused(args)
    mixing = {name: getattr(args, name) for name in USED if name != "mix_off_epoch"}
    callback = MixupCallback(MixupCollator(**mixing), mix_off_epoch=args.mix_off_epoch)
    data, evaluation, read = made() if task.dataset_name is None else loaded(task, args.seed)
    if task.model_name_or_path is None:
        network, processor = from_scratch()
    else:
        network = AutoModelForSemanticSegmentation.from_pretrained(task.model_name_or_path)
        processor = AutoImageProcessor.from_pretrained(task.model_name_or_path)

    def example(row: Any) -> dict[str, Any]:
        image, labels = read(row)
        if labels.ndim != 2:
            raise ValueError(
                f"label maps must hold one class for each pixel, got {labels.shape[-1]} channels; save them as images of mode L or P."
            )
        given = processor(image, labels, return_tensors="pt")
        check_map(given["labels"], network.config)
        return {"pixel_values": given["pixel_values"][0], "labels": given["labels"][0]}

    sets = data_sets(task, data, evaluation, example, args.seed)
    trainer = Trainer(
        network,
        args,
        **sets,
        processing_class=processor,
        callbacks=[callback],
        compute_metrics=partial(mean_iou, ignored=ignored_by(network.config)),
        preprocess_logits_for_metrics=classes_of_pixels,
    )
    return trainer, task.dataset_name or "maps of digits"


def check_map(labels: torch.Tensor, config: Any) -> None:
    """Raises ValueError for classes that the network does not have."""
    ignored = ignored_by(config)
    other = labels[(labels != ignored) & ((labels < 0) | (labels >= config.num_labels))]
    if other.numel():
        raise ValueError(
            f"label maps must hold the network's classes, 0 to {config.num_labels - 1}, or {ignored} for pixels without one, got {int(other[0])}; "
            "use another checkpoint, or renumber the classes."
        )


def ignored_by(config: Any) -> int:
    """The class number that the network's loss ignores."""
    return getattr(config, "semantic_loss_ignore_index", getattr(config, "loss_ignore_index", IGNORED))


def refuse_unused(args: MixupTrainingArguments) -> None:
    """Raises ValueError for arguments of mixing that have no effect in a stock Trainer with the network's own loss."""
    own = {field.name for field in fields(MixupTrainingArguments)} - {field.name for field in fields(TrainingArguments)} - set(USED)
    if dead := changed(args, *sorted(own)):
        raise ValueError(f"--{dead[0]} has no effect on a network that labels pixels, got {getattr(args, dead[0])!r}; leave it out.")


def classes_of_pixels(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The predicted class of every pixel of the label map, (B, H, W), so that no logits are kept."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return torch.nn.functional.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False).argmax(1)


def mean_iou(found: EvalPrediction, ignored: int = IGNORED) -> dict[str, float]:
    """The mean intersection over union of the classes, and the share of correct pixels, without ignored ones."""
    known = (found.label_ids != ignored) & (found.label_ids >= 0)
    right, seen = found.label_ids[known], found.predictions[known]
    classes = int(max(right.max(), seen.max())) + 1
    table = np.bincount(right * classes + seen, minlength=classes**2).reshape(classes, classes)
    both, either = table.diagonal(), table.sum(0) + table.sum(1) - table.diagonal()
    return {"mean_iou": float((both[either > 0] / either[either > 0]).mean()), "pixel_accuracy": float(both.sum() / table.sum())}


def made() -> tuple[list, list, Any]:
    """Maps of digits: training rows, evaluation rows, and the function that reads a row."""
    rows = []
    for (pictures, classes), count, seed in zip(digit_pictures(), (400, 200), (0, 1), strict=True):
        few = classes < 5
        images, maps = digit_maps(pictures[few], classes[few], count, seed)
        rows.append(list(zip((images * 255).astype(np.uint8), maps, strict=True)))
    return *rows, lambda row: row


def loaded(task: TaskArguments, seed: int) -> tuple[Any, Any, Any]:
    from datasets import Image

    train, evaluation = load_splits(task, seed)
    images = [name for name, feature in train.features.items() if isinstance(feature, Image)]
    first, second = task.input_column_name or (images or [None])[0], task.label_column_name or (images[1:] or [None])[0]
    image, labels = column_of(train, first, Image, "images"), column_of(train, second, Image, "label maps")
    return train, evaluation, lambda row: (np.array(read_image(row[image])), np.array(row[labels]))


def from_scratch() -> tuple[SegformerForSemanticSegmentation, SegformerImageProcessor]:
    """A tiny SegFormer for images of 32 x 32 pixels and 6 classes: the background, and the digits 0 to 4."""
    config = SegformerConfig(
        num_labels=6, hidden_sizes=[32, 64, 64, 64], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 2], decoder_hidden_size=64, patch_sizes=[3, 3, 3, 3],
        strides=[2, 2, 2, 2], sr_ratios=[4, 2, 1, 1], drop_path_rate=0.0, classifier_dropout_prob=0.0, semantic_loss_ignore_index=IGNORED,
    )  # fmt: skip
    return SegformerForSemanticSegmentation(config), SegformerImageProcessor(size={"height": 32, "width": 32})


if __name__ == "__main__":
    script(main, __file__)
