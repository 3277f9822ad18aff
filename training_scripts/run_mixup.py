"""Trains an image classifier with mixing: `accelerate launch training_scripts/run_mixup.py --help` lists all there is to set.

Without arguments it trains on the embedded digits. It takes the arguments of transformers' run_image_classification.py, all
training arguments, and those of mixing.
"""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import sys
import time
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from transformers import HfArgumentParser, PreTrainedModel, set_seed
from transformers.utils import logging as transformers_logging

from hf_mixup import MixupTrainer, MixupTrainingArguments
from hf_mixup.arguments import DataArguments, ModelArguments, RunArguments
from hf_mixup.core.checks import nearest
from hf_mixup.data.dataset import ImageDataset, check_readable
from hf_mixup.data.labels import network_classes
from hf_mixup.data.processor import ImageFormat, format_from_scratch, format_of_checkpoint
from hf_mixup.data.sources import ImageData, KnownClasses, check_loss, load_images, record_held_out
from hf_mixup.methods import taught_by_the_network
from hf_mixup.networks.backbones import channels_of, check_takes, checkpoint_config, describe_for_timm, from_scratch, load_classifier
from hf_mixup.recipes import read_recipe
from hf_mixup.report.examples import MaskPictures, default_architecture, mixed_examples, varied
from hf_mixup.report.plots import gallery
from hf_mixup.training.hub import without_secrets

RECIPES = Path(__file__).parent / "recipes"
DEFAULTS = {
    "eval_strategy": "epoch",
    "logging_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": "none",
    "per_device_eval_batch_size": 64,
    "dataloader_pin_memory": torch.accelerator.is_available(),
}
Arguments = tuple[ModelArguments, DataArguments, RunArguments, MixupTrainingArguments]

logger = logging.getLogger("run_mixup")


def parse(argv: list[str]) -> Arguments:
    """The arguments: what is typed, over the recipe, over the defaults."""
    kinds = (ModelArguments, DataArguments, RunArguments, MixupTrainingArguments)
    parser = HfArgumentParser(kinds, description=__doc__.splitlines()[0])
    parser.set_defaults(**DEFAULTS)
    early = HfArgumentParser((ModelArguments, DataArguments, RunArguments), add_help=False)
    early.add_argument("--mix", nargs="+")
    model, data, run, typed, _ = early.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if run.recipe is None and data.dataset_name is None and data.train_dir is None:
        run.recipe = "digits"
    if run.recipe is not None:
        values = read_recipe(run.recipe, RECIPES, mix=typed.mix, architecture=model.architecture)
        if data.train_dir or data.validation_dir:  # what is typed stands for the data set of the recipe
            values = {key: value for key, value in values.items() if not key.startswith("dataset_")}
        if model.model_name_or_path or model.architecture:  # what is typed stands for the network of the recipe, of either kind
            values = {key: value for key, value in values.items() if key not in ("model_name_or_path", "architecture")}
        parser.set_defaults(**values)
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        raise ValueError(f"every argument must be known, got {unknown[0]!r}; {nearest(unknown[0], flags)}")
    return tuple(parsed)


def prepare_folder(run: RunArguments, args: MixupTrainingArguments, argv: list[str]) -> None:
    """A new folder for a run that names none; refuses one that is in use."""
    if not any(word.split("=")[0] == "--output_dir" for word in argv):
        name = [f"runs/{'+'.join(args.mix)}-{time.strftime('%Y%m%d-%H%M%S')}"]
        args.output_dir = broadcast_object_list(name)[0]  # the clocks of processes differ
    folder = Path(args.output_dir)
    used = folder.is_dir() and any(folder.iterdir())
    if used and not (run.overwrite_output_dir or args.resume_from_checkpoint):
        raise ValueError(
            f"output_dir must be new or empty, got {args.output_dir}; go on with --resume_from_checkpoint, or start over with --overwrite_output_dir."
        )
    if used and run.overwrite_output_dir and not args.resume_from_checkpoint and args.should_save:
        for old in folder.glob("checkpoint-*"):
            shutil.rmtree(old)
    folder.mkdir(parents=True, exist_ok=True)


def hub_of(model: ModelArguments) -> dict:
    """How to read the checkpoint."""
    return {
        "revision": model.model_revision,
        "cache_dir": model.cache_dir,
        "token": model.token,
        "trust_remote_code": model.trust_remote_code,
    }


def classes_of_checkpoint(model: ModelArguments, args: MixupTrainingArguments) -> KnownClasses | None:
    if model.model_name_or_path is None:
        return None
    if model.architecture is not None:
        raise ValueError(
            f"give one of model_name_or_path and architecture, got {model.model_name_or_path} and {model.architecture}; drop one."
        )
    names = network_classes(checkpoint_config(model.model_name_or_path, **hub_of(model)))
    trains = args.max_steps > 0 or args.num_train_epochs > 0
    return KnownClasses(names, fresh=model.ignore_mismatched_sizes, trains=trains)


def build_model(model: ModelArguments, data: DataArguments, args: MixupTrainingArguments, images: ImageData):
    """The network and the format of its images."""
    labels = {"id2label": dict(enumerate(images.label_names)), "label2id": {name: i for i, name in enumerate(images.label_names)}}
    if model.model_name_or_path is None:
        form = format_from_scratch(data, images.train, images.image_column)
        architecture = model.architecture or default_architecture(args.method_choice())
        classes = len(images.label_names)
        network = from_scratch(architecture, classes, form.size, channels=form.channels, drop_path=model.drop_path, **labels)
        return described(network, form.of_timm() if network.config.model_type == "timm_wrapper" else form, data.train_image_size)
    hub = hub_of(model)
    network = load_classifier(
        model.model_name_or_path,
        image_size=data.image_size,
        num_labels=len(images.label_names),
        **labels,
        ignore_mismatched_sizes=model.ignore_mismatched_sizes,
        **hub,
    )
    form = format_of_checkpoint(data, model.model_name_or_path, channels_of(network), **hub)
    check_takes(network, form.channels, *form.sides)
    return described(network, form, data.train_image_size)


def described(network: PreTrainedModel, form: ImageFormat, train_size: int | None):
    """Both, with the form written into the config of a timm network, where timm and transformers read it."""
    if train_size is not None:
        check_takes(network, form.channels, train_size, train_size)
    if network.config.model_type == "timm_wrapper":
        describe_for_timm(network, **form.timm_config())
    return network, form


def main(argv: list[str]) -> None:
    model_args, data_args, run, args = parse(argv)
    logging.basicConfig(level=logging.INFO if args.should_log else logging.WARNING, format="%(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for every request to the Hub
    transformers_logging.disable_progress_bar()  # of every save; training keeps its own
    prepare_folder(run, args, argv)
    set_seed(args.seed)

    known = classes_of_checkpoint(model_args, args)
    losses = [method.loss for method in args.method_choice().methods]
    images = load_images(
        data_args,
        args.seed,
        token=model_args.token,
        cache_dir=model_args.cache_dir,
        known=known,
        regression=any(loss.problem_type == "regression" for loss in losses),
    )
    check_loss(images, losses)
    if data_args.check_images:
        for split, name in ((images.train, "training"), (images.evaluation, "evaluation")):
            check_readable(split, images.image_column, name, args.dataloader_num_workers)
    network, form = build_model(model_args, data_args, args, images)
    flip = data_args.dataset_name != "digits" if data_args.horizontal_flip is None else data_args.horizontal_flip
    columns = (images.image_column, images.label_column)
    augmentation = form.train_transform(
        flip,
        size=data_args.train_image_size,
        crop=data_args.train_crop,
        scale=data_args.crop_scale or (0.08, 1.0),
        resize=data_args.train_resize,
        auto_augment=data_args.auto_augment,
        random_erasing=data_args.random_erasing,
    )
    how = {"cache": data_args.cache_images, "on_device": data_args.augment_on_device}
    train = ImageDataset(images.train, *columns, augmentation, seed=args.seed, **how)
    evaluation = ImageDataset(images.evaluation, *columns, form.eval_transform(), cache=data_args.cache_images)
    logger.info(
        "%s: %d training and %d evaluation images of %d classes, %s px; %s, %.2f M parameters; mixing by %s",
        images.name,
        len(train),
        len(evaluation),
        len(images.label_names),
        "x".join(map(str, dict.fromkeys(form.sides))),
        network.config.to_dict().get("architecture") or type(network).__name__,
        sum(p.numel() for p in network.parameters()) / 1e6,
        args.method_choice(),
    )

    for name in taught_by_the_network(args.method_choice()):
        logger.info("%s: no teacher is named, so the network in training is the teacher, in evaluation mode and without gradients", name)
    if model_args.sync_bn and args.world_size > 1 and args.device.type == "cuda":
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if model_args.channels_last:
        network = network.to(memory_format=torch.channels_last)  # convolutions take the form of their images from it
    trainer = MixupTrainer(network, args, train_dataset=train, eval_dataset=evaluation, processing_class=form.processor())
    looked_at = torch.stack([example["pixel_values"] for example in varied(evaluation, 3)])
    trainer.add_callback(MaskPictures(run.report_dir or args.output_dir, looked_at, form))
    resume = {"true": True}.get(str(args.resume_from_checkpoint).lower(), args.resume_from_checkpoint)
    if args.should_save:
        record_held_out(args.output_dir, images)  # for evaluations of the checkpoints of a run that is cut off
    result = trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(_internal_call=True)  # pushed at the end, with the results
    if args.should_save:
        record_held_out(args.output_dir, images)
    metrics = {"train_loss": result.metrics["train_loss"], "train_images_per_second": result.metrics["train_samples_per_second"]}
    last = next((row for row in reversed(trainer.state.log_history) if "eval_loss" in row), {})
    evaluated = last.get("step") == trainer.state.global_step and not args.load_best_model_at_end
    metrics.update({key: value for key, value in last.items() if key.startswith("eval_")} if evaluated else trainer.evaluate())
    trainer.save_state()

    card = {
        "model_name": f"{network.config.to_dict().get('architecture') or network.config.model_type}-{Path(images.name).name}-{'-'.join(args.mix)}",
        "dataset": images.name,
        "dataset_tags": images.repository,
        "dataset_args": images.evaluation_split,
        "command": shlex.join(["accelerate", "launch", "training_scripts/run_mixup.py", *without_secrets(argv)]),
        "finetuned_from": model_args.model_name_or_path,
    }
    if trainer.is_world_process_zero():
        folder, reports = Path(args.output_dir), Path(run.report_dir or args.output_dir)
        reports.mkdir(parents=True, exist_ok=True)
        (folder / "all_results.json").write_text(json.dumps(metrics, indent=2) + "\n")
        gallery(reports / "gallery.png", mixed_examples(trainer.mixup_model, evaluation, form, args.seed), images.label_names)
        trainer.create_model_card(**card)
        logger.info(
            "top-1 %.4f, top-5 %.4f on %s (%s); everything is in %s",
            metrics["eval_top1"],
            metrics["eval_top5"],
            images.name,
            images.evaluation_split,
            folder,
        )
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    trainer.end()


if __name__ == "__main__":
    main(sys.argv[1:])
