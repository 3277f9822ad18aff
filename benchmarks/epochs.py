"""Whole epochs of `run_mixup.py` on the embedded digits: `python benchmarks/epochs.py`.

It compares with a stock Trainer whose collator does not mix, or mixes by another library. All train the same network on the same cached images with
the same augmentation. Only training is timed, by the Trainer's own number of images a second.
"""

import json
import sys
import tempfile
from pathlib import Path

from peers import peers
from timing import parse, reported, show, write
from transformers import Trainer, TrainingArguments
from transformers.data import default_data_collator

from hf_mixup import MixupLoss
from hf_mixup.arguments import DataArguments
from hf_mixup.data.dataset import ImageDataset
from hf_mixup.data.processor import ImageFormat
from hf_mixup.data.sources import load_images
from hf_mixup.networks.backbones import from_scratch

sys.path.insert(0, str(Path(__file__).parents[1] / "training_scripts"))
import run_mixup

args = parse(__doc__, rounds=5)
SETTINGS = {
    "num_train_epochs": 1, "per_device_train_batch_size": 64, "learning_rate": 3e-3, "weight_decay": 0.05, "optim": "adamw_torch",
    "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no",
    "report_to": "none", "disable_tqdm": True, "use_cpu": args.device == "cpu", "dataloader_pin_memory": args.device != "cpu",
    "dataloader_drop_last": True,
}  # fmt: skip
ARCHITECTURE = "cifar_resnet20"


def ours(mix: str):
    words = ["--architecture", ARCHITECTURE, "--mix", mix, *(word for key, value in SETTINGS.items() for word in (f"--{key}", str(value)))]

    def seconds() -> float:
        with tempfile.TemporaryDirectory() as folder:
            run_mixup.main([*words, "--output_dir", folder, "--overwrite_output_dir"])
            return len(train) / json.loads(Path(folder, "all_results.json").read_text())["train_images_per_second"]

    return seconds


images = load_images(DataArguments("digits"))
form = ImageFormat.of_images(images.train, images.image_column)
train = ImageDataset(images.train, images.image_column, images.label_column, form.train_transform(horizontal_flip=False), cache=True)


def stock(mix):
    def collate(examples: list) -> dict:
        batch = default_data_collator(examples)
        if mix is not None:
            batch["pixel_values"], batch["labels"] = mix(batch["pixel_values"], batch["labels"])
        return batch

    def seconds() -> float:
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                from_scratch(ARCHITECTURE, 10, 32),
                TrainingArguments(folder, remove_unused_columns=False, **SETTINGS),
                train_dataset=train,
                data_collator=collate,
                compute_loss_func=MixupLoss(),
            )
            return len(train) / trainer.train().metrics["train_samples_per_second"]

    return seconds


contenders = {"Trainer, no mixing": stock(None)}
contenders |= {f"run_mixup.py --mix {name}": ours(name) for name in ("vanilla", "mixup", "cutmix")}
others = peers(10)
contenders |= {f"Trainer, {name}": stock(others[name]) for name in others if "per image" not in name}

rows = reported(contenders, args.rounds)
title = f"digits, {ARCHITECTURE}, batches of 64"
show(f"epochs of {title}, on {args.device}, {args.threads} thread(s)", rows)
write(args, {title: rows})
