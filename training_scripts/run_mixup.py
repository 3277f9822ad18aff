"""Trains an image classifier with mixing. Without arguments it trains on the embedded digits.

`hf-mixup train --help` lists the usual arguments, `--help-all` all of them: those of transformers' run_image_classification.py,
all training arguments, and those of mixing. `accelerate launch training_scripts/run_mixup.py` starts the same script.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from hf_mixup import MixupTrainer, MixupTrainingArguments
from hf_mixup.arguments import DataArguments, ModelArguments, RunArguments
from hf_mixup.cli.folder import choose_folder
from hf_mixup.cli.launch import command_of
from hf_mixup.cli.network import build_model, classes_of_checkpoint
from hf_mixup.cli.refusals import log_to_screen, run
from hf_mixup.cli.train import parse
from hf_mixup.core.precision import prefers_channels_last
from hf_mixup.data.dataset import ImageDataset, check_readable
from hf_mixup.data.labels import NUMBER, SEVERAL_CLASSES
from hf_mixup.data.sources import ImageData, check_loss, load_images
from hf_mixup.data.stream import ImageStream, load_stream
from hf_mixup.method import KINDS
from hf_mixup.methods import MethodChoice, taught_by_the_network
from hf_mixup.networks.families import freeze_backbone
from hf_mixup.report.card import licence_of
from hf_mixup.report.examples import MaskPictures, mixed_examples, varied
from hf_mixup.report.plots import gallery
from hf_mixup.report.run_folder import GALLERY_NAME, RunFolder
from hf_mixup.training.callbacks import AtTheStart
from hf_mixup.training.progress import EpochTable

# arguments that decide which images a run evaluates on
DATA_FACTS = (
    "dataset_name",
    "dataset_config_name",
    "dataset_revision",
    "train_dir",
    "validation_dir",
    "train_split",
    "eval_split",
    "train_val_split",
    "image_column_name",
    "label_column_name",
)
logger = logging.getLogger("run_mixup")


def main(argv: list[str], prog: str = "run_mixup.py") -> None:
    model_args, data_args, run_args, args = parse(argv, prog)
    log_to_screen(logging.INFO if args.should_log else logging.WARNING)
    transformers_logging.disable_progress_bar()  # the bar of every save; training keeps its own
    folder = choose_folder(run_args, args, "+".join(args.mix), args.do_train)
    set_seed(args.seed)
    with folder.gone_if_refused():
        work(folder, model_args, data_args, run_args, args, command_of("train", argv, args.world_size))


def work(
    folder: RunFolder, model_args: ModelArguments, data_args: DataArguments, run_args: RunArguments, args: MixupTrainingArguments,
    command: str,
) -> None:  # fmt: skip
    """The run itself."""
    known = classes_of_checkpoint(model_args, args)
    losses = [method.loss for method in args.method_choice().methods]
    where = {"token": model_args.token, "cache_dir": model_args.cache_dir, "known": known}
    if data_args.streaming:
        images = load_stream(data_args, **where)
    else:
        images = load_images(data_args, args.seed, **where, regression=any(loss.problem_type == "regression" for loss in losses))
    check_loss(images, losses)
    for line in numbers_by_class(args.method_choice(), images.label_names):
        logger.info("%s", line)
    if data_args.check_images:
        for split, name in ((images.train, "training"), (images.evaluation, "evaluation")):
            check_readable(split, images.image_column, name, args.dataloader_num_workers)
    network, form = build_model(model_args, data_args, args, images)
    if model_args.freeze_backbone:
        freeze_backbone(network)
    flip = data_args.dataset_name != "digits" if data_args.horizontal_flip is None else data_args.horizontal_flip
    columns = (images.image_column, images.label_column)
    augmentation = form.train_transform(
        flip,
        size=data_args.train_image_size,
        crop=data_args.train_crop,
        scale=data_args.crop_scale,
        resize=data_args.train_resize,
        auto_augment=data_args.auto_augment,
        random_erasing=data_args.random_erasing,
    )
    if data_args.streaming:
        train = ImageStream(images.train, augmentation, args.seed, shuffle=True, batch_size=args.train_batch_size, on_device=True)
        evaluation = ImageStream(images.evaluation, form.eval_transform(), batch_size=args.eval_batch_size, on_device=True)
        counts = "a stream of"
    else:
        how = {"cache": data_args.cache_images, "on_device": True}
        train = ImageDataset(images.train, *columns, augmentation, seed=args.seed, **how)
        evaluation = ImageDataset(images.evaluation, *columns, form.eval_transform(), **how)
        counts = f"{len(train)} training and {len(evaluation)} evaluation"
    name = network.config.to_dict().get("architecture") or type(network).__name__
    logger.info("recipe   %s", run_args.recipe or "none")
    logger.info("data     %s: %s images of %d classes", images.name, counts, len(images.label_names))
    sides = "x".join(map(str, dict.fromkeys(form.sides)))
    logger.info("network  %s, %.2f M parameters, %s px", name, sum(p.numel() for p in network.parameters()) / 1e6, sides)
    logger.info("mixing   %s", args.method_choice())
    logger.info("folder   %s", folder.path)
    for method in taught_by_the_network(args.method_choice()):
        logger.info("%s: no teacher is given, so the network in training is the teacher, in evaluation mode and without gradients", method)

    if model_args.sync_bn and args.world_size > 1 and args.device.type == "cuda":
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    channels_last = model_args.channels_last
    if prefers_channels_last(network, args.bf16 or args.fp16) if channels_last is None else channels_last:
        network = network.to(memory_format=torch.channels_last)  # convolutions then use this memory format for images too
    trainer = MixupTrainer(
        network, args, train_dataset=train if args.do_train else None, eval_dataset=evaluation, processing_class=form.processor()
    )
    EpochTable.replace(trainer)
    looked_at = torch.stack([example["pixel_values"] for example in varied(evaluation.finished(), 3)])
    trainer.add_callback(MaskPictures(run_args.report_dir or args.output_dir, looked_at, form))
    licence = {"license": run_args.license} if run_args.license else {}
    if not licence and model_args.model_name_or_path:
        licence = licence_of(model_args.model_name_or_path, token=model_args.token)
    first = trainer.is_world_process_zero()
    facts = {
        "seed": args.seed,
        "data": {name: getattr(data_args, name) for name in DATA_FACTS},
        "evaluation_split": images.evaluation_split,
        "held_out": images.held_out,
        "command": command,
        "license": licence.get("license"),
        "recipe": run_args.recipe,
        "recipe_hash": run_args.recipe_hash,
    }

    def begin() -> None:
        Path(run_args.report_dir or folder.path).mkdir(parents=True, exist_ok=True)  # fails before training, not after it
        if run_args.overwrite_output_dir and not args.resume_from_checkpoint:
            folder.clear()
        folder.record(**facts)

    if first:
        trainer.add_callback(AtTheStart(begin))  # after all checks
    if args.do_train:
        started = time.process_time()
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        cpu_seconds = time.process_time() - started
        trainer.save_model(_internal_call=True)  # it is pushed at the end, with the results
        speed = {"train_images_per_second": result.metrics["train_samples_per_second"], "train_runtime": result.metrics["train_runtime"]}
        speed["train_cpu_seconds"] = round(cpu_seconds, 2)
        trainer.save_metrics("train", {"train_loss": result.metrics["train_loss"], **speed})
        trainer.save_state()
    metrics = measured(trainer) if args.do_eval else {}
    if args.do_predict:
        predict(trainer, evaluation, folder, images)
    if args.do_train:
        card = {
            "model_name": f"{network.config.to_dict().get('architecture') or network.config.model_type}-{Path(images.name).name}-{'-'.join(args.mix)}",
            "dataset": images.name,
            "dataset_tags": images.repository,
            "dataset_args": images.evaluation_split,
            "command": command,
            "finetuned_from": model_args.model_name_or_path,
            "license": licence,
        }
        if first:
            reports = Path(run_args.report_dir or folder.path)
            reports.mkdir(parents=True, exist_ok=True)
            gallery(reports / GALLERY_NAME, mixed_examples(trainer.mixup_model, evaluation.finished(), form, args.seed), images.label_names)
            trainer.create_model_card(**card)
            folder.record(files=folder.files())
            if args.push_to_hub and not licence:
                logger.info("the card has no licence; add one with --license")
        if args.push_to_hub:
            pushed = trainer.push_to_hub(**card)
            logger.info("pushed to %s", getattr(pushed, "repo_url", None) or trainer.hub_model_id)
    if first and "eval_top1" in metrics:
        top5 = f", top-5 {metrics['eval_top5']:.4f}" if len(images.label_names) > 5 else ""
        logger.info("top-1 %.4f%s on %s (%s)", metrics["eval_top1"], top5, images.name, images.evaluation_split)
    if first:
        logger.info("everything is in %s", folder.path)
    trainer.accelerator.end_training()


def numbers_by_class(choice: MethodChoice, names: Sequence[str]) -> list[str]:
    """Says which class each number of `weight` and `class_counts` is for: they have the order of the network's outputs, as a checkpoint has them."""
    given = [
        (name, values)
        for method in choice.methods
        for kind in KINDS
        for name in ("weight", "class_counts")
        if isinstance(values := getattr(getattr(method, kind), name, None), tuple)
    ]
    return [
        f"{name}: {', '.join(f'{value:g} for {own!r}' for value, own in zip(values, names, strict=False))}"
        for name, values in dict.fromkeys(given)
    ]


def measured(trainer: MixupTrainer) -> dict[str, float]:
    """The evaluation of the final weights; training may already have done it, but before a resumed one it may have had other images."""
    last = next((row for row in reversed(trainer.state.log_history) if "eval_loss" in row), {})
    args = trainer.args
    trained = args.do_train and not args.resume_from_checkpoint and not args.load_best_model_at_end
    done = trained and last.get("step") == trainer.state.global_step
    metrics = {key: value for key, value in last.items() if key.startswith("eval_")} if done else trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    return metrics


def predict(trainer: MixupTrainer, evaluation: ImageDataset | ImageStream, folder: RunFolder, images: ImageData) -> None:
    """Writes the prediction for every evaluation image to predict_results.txt, in the format of transformers' scripts: the index counts them."""
    found = trainer.predict(evaluation, metric_key_prefix="predict")
    trainer.save_metrics("predict", found.metrics, combined=False)
    if trainer.is_world_process_zero():
        scores = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
        rows = "".join(f"{row}\t{said}\n" for row, said in enumerate(told(scores, images)))
        (folder.path / "predict_results.txt").write_text("index\tprediction\n" + rows)


def told(scores: np.ndarray, images: ImageData) -> list[Any]:
    """What the scores (N, outputs) predict, by the kind of the labels: a class, a list of classes, or a number."""
    names = images.label_names
    if images.problem_type == NUMBER:
        return [f"{number:.6g}" for number in scores[:, 0]]
    if images.problem_type == SEVERAL_CLASSES:
        return [[name for name, score in zip(names, row, strict=True) if score > 0] for row in scores]
    return [names[number] for number in scores.argmax(1)]


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "run_mixup.py"))
