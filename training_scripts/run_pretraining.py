"""Pre-trains an image network without labels, with mixing. Without arguments it trains on the embedded digits.

`hf-mixup pretrain --help` lists the usual arguments, `--help-all` all of them. `accelerate launch training_scripts/run_pretraining.py`
starts the same script. Only the kNN monitor reads labels. Afterwards `hf-mixup train --model_name_or_path runs/... --freeze_backbone` trains a
linear probe; without --freeze_backbone it fine-tunes.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
from transformers import IntervalStrategy, set_seed
from transformers.utils import logging as transformers_logging

from hf_mixup import MixupPreTrainer, PreTrainingArguments
from hf_mixup.arguments import DataArguments, ModelArguments, RunArguments
from hf_mixup.cli.folder import choose_folder
from hf_mixup.cli.launch import command_of
from hf_mixup.cli.network import build_model
from hf_mixup.cli.pretrain import parse
from hf_mixup.cli.refusals import log_to_screen, run
from hf_mixup.core.precision import prefers_channels_last
from hf_mixup.data.dataset import ImageDataset, check_readable
from hf_mixup.data.stream import ImageStream
from hf_mixup.pretraining.data import load_pretraining_images
from hf_mixup.pretraining.views import view_transform
from hf_mixup.report.examples import MaskPictures, varied
from hf_mixup.report.run_folder import RunFolder
from hf_mixup.training.callbacks import AtTheStart
from hf_mixup.training.progress import EpochTable

logger = logging.getLogger("run_pretraining")


def main(argv: list[str], prog: str = "run_pretraining.py") -> None:
    model_args, data_args, run_args, args = parse(argv, prog)
    log_to_screen(logging.INFO if args.should_log else logging.WARNING)
    transformers_logging.disable_progress_bar()  # the bar of every save; training keeps its own
    folder = choose_folder(run_args, args, f"{args.base}-{args.mix[0]}")
    set_seed(args.seed)
    command = command_of("pretrain", argv, args.world_size)
    with folder.gone_if_refused():
        work(folder, model_args, data_args, run_args, args, command)


def work(
    folder: RunFolder,
    model_args: ModelArguments,
    data_args: DataArguments,
    run_args: RunArguments,
    args: PreTrainingArguments,
    command: str,
) -> None:
    """The run itself."""
    found = load_pretraining_images(data_args, args.seed, token=model_args.token, cache_dir=model_args.cache_dir, asked=args.knn_asked_by)
    images, monitored = found.images, len(found.bank) > 0
    if not monitored:
        args.eval_strategy = IntervalStrategy.NO
    if data_args.check_images:
        for split, name in ((images.train, "training"), (images.evaluation, "evaluation")):
            check_readable(split, images.image_column, name, args.dataloader_num_workers)
    model_args.ignore_mismatched_sizes = True  # a checkpoint's classifier is not used
    network, form = build_model(model_args, data_args, args, images)
    flip = data_args.dataset_name != "digits" if data_args.horizontal_flip is None else data_args.horizontal_flip
    columns, how = (images.image_column, images.label_column), {"cache": data_args.cache_images, "on_device": True}
    views = view_transform(form, args.views, flip)
    if data_args.streaming:
        train = ImageStream(images.train, views, args.seed, shuffle=True, batch_size=args.train_batch_size, on_device=True)
        clean, count = ImageStream(images.train, form.eval_transform()), "a stream of"
    else:
        train = ImageDataset(images.train, *columns, views, seed=args.seed, **how)
        clean, count = ImageDataset(images.train, *columns, form.eval_transform()), str(len(train))
    bank, evaluation = (
        ImageDataset(data, *columns, form.eval_transform(), **how) if monitored else None for data in (found.bank, images.evaluation)
    )
    if model_args.sync_bn and args.world_size > 1 and args.device.type == "cuda":
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    channels_last = model_args.channels_last
    if prefers_channels_last(network, args.bf16 or args.fp16) if channels_last is None else channels_last:
        network = network.to(memory_format=torch.channels_last)
    name = network.config.to_dict().get("architecture") or type(network).__name__
    logger.info("recipe   %s", run_args.recipe or "none")
    logger.info("data     %s: %s training images, %d to classify by their neighbours", images.name, count, len(images.evaluation))
    logger.info("network  %s, %.2f M parameters, %s px", name, sum(p.numel() for p in network.parameters()) / 1e6, form.sides[0])
    logger.info("pretext  %s on %s", args.mix[0], args.base)
    logger.info("folder   %s", folder.path)
    trainer = MixupPreTrainer(
        network, args, train_dataset=train, eval_dataset=evaluation, bank_dataset=bank, processing_class=form.processor()
    )
    EpochTable.replace(trainer, "eval_knn_top1", "kNN")
    looked_at = torch.stack([example["pixel_values"] for example in varied(clean, 3)])
    trainer.add_callback(MaskPictures(args.output_dir, looked_at, form))
    facts = {
        "seed": args.seed, "command": command, "license": run_args.license, "recipe": run_args.recipe, "recipe_hash": run_args.recipe_hash,
        "evaluation_split": images.evaluation_split or None,
    }  # fmt: skip

    def begin() -> None:
        if run_args.overwrite_output_dir and not args.resume_from_checkpoint:
            folder.clear()
        folder.record(**facts)

    first = trainer.is_world_process_zero()
    if first:
        trainer.add_callback(AtTheStart(begin))  # after all checks
    before = trainer.evaluate(metric_key_prefix="untrained") if monitored and not args.resume_from_checkpoint else {}
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(_internal_call=True)  # it is pushed at the end, with the results
    trainer.save_metrics("train", {"train_loss": result.metrics["train_loss"]})
    trainer.save_state()
    metrics = {**trainer.evaluate(), **{name: value for name, value in before.items() if "knn" in name}} if monitored else {}
    trainer.save_metrics("eval", metrics)
    card = {
        "model_name": f"{name}-{Path(images.name).name}-{args.base}-{args.mix[0]}", "dataset": images.name, "dataset_tags": images.repository,
        "dataset_args": images.evaluation_split or None, "command": command, "finetuned_from": model_args.model_name_or_path,
        "license": run_args.license,
    }  # fmt: skip
    if first:
        trainer.create_model_card(**card)
        folder.record(files=folder.files())
    if args.push_to_hub:
        pushed = trainer.push_to_hub(**card)
        logger.info("pushed to %s", getattr(pushed, "repo_url", None) or trainer.hub_model_id)
    if first and monitored:
        knn = [
            f"{metrics['eval_knn_top1']:.4f}",
            *(f"{value:.4f} before training" for name, value in metrics.items() if "untrained" in name),
        ]
        logger.info("kNN %s, %d neighbours, on %s (%s)", ", ".join(knn), args.knn_neighbours, images.name, images.evaluation_split)
    if first:
        logger.info("everything is in %s", folder.path)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "run_pretraining.py"))
