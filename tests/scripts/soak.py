"""Trains digits by every method in turn, in one process, and says what the process holds after each. `soak.py MINUTES OUTPUT.jsonl`."""

import ctypes
import gc
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

import psutil
from transformers.utils import logging as transformers_logging

from hf_mixup import METHODS, MixupTrainer, MixupTrainingArguments
from hf_mixup.data.dataset import ImageDataset
from hf_mixup.data.processor import ImageFormat
from hf_mixup.data.sources import digits
from hf_mixup.methods import MethodChoice
from hf_mixup.networks.backbones import from_scratch
from hf_mixup.report.examples import default_architecture

STEPS, LEAST_ROUNDS = 12, 3


def held() -> dict[str, float]:
    """By this process, when what may go has gone: MB of memory, open files, threads, children."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what is free, but not given back, would count
    process = psutil.Process()
    return {
        "megabytes": process.memory_info().rss / 2**20, "files": process.num_fds(), "threads": process.num_threads(),
        "children": len(process.children(recursive=True)),
    }  # fmt: skip


def train(name: str, data: ImageDataset, evaluation: ImageDataset, form: ImageFormat, workers: int) -> float:
    """The last loss of a short run with all that belongs to one: workers, evaluation, checkpoints, going on from one."""
    network = default_architecture(MethodChoice.build(name))
    with tempfile.TemporaryDirectory() as folder:
        for last in (STEPS // 2, STEPS):
            args = MixupTrainingArguments(
                folder, mix=[name], per_device_train_batch_size=16, max_steps=last, logging_steps=1, save_strategy="steps",
                save_steps=STEPS // 2, eval_strategy="steps", eval_steps=STEPS // 2, dataloader_num_workers=workers, report_to="none",
                use_cpu=True, disable_tqdm=True,
            )  # fmt: skip
            run = MixupTrainer(
                from_scratch(network, 10, form.size), args, train_dataset=data, eval_dataset=evaluation, processing_class=form.processor()
            )
            run.train(resume_from_checkpoint=last == STEPS)
    return next(entry["loss"] for entry in reversed(run.state.log_history) if "loss" in entry)


def main(minutes: float, output: Path) -> None:
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    splits, form = digits(), ImageFormat(16)
    data = ImageDataset(splits["train"].select(range(256)), "image", "label", form.train_transform(False), seed=0)
    evaluation = ImageDataset(splits["test"].select(range(64)), "image", "label", form.eval_transform())
    begun, turn = time.monotonic(), 0
    with output.open("w") as file:
        while turn < LEAST_ROUNDS or time.monotonic() - begun < 60 * minutes:
            for name in METHODS:
                loss = train(name, data, evaluation, form, workers=2 * (turn % 2))
                row = {"round": turn, "method": name, "loss": loss, "seconds": time.monotonic() - begun, **held()}
                file.write(json.dumps(row) + "\n")
                file.flush()
            print({key: value for key, value in row.items() if key != "method"}, flush=True)
            turn += 1


if __name__ == "__main__":
    main(float(sys.argv[1]), Path(sys.argv[2]))
