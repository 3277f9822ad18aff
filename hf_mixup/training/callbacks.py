"""What `MixupTrainer` does beside its steps: what follows the weights, the sums of a logging interval, the log of epochs."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_mixup.report.run_folder import LOG_NAME


class AtTheStart(TrainerCallback):
    """Calls `work` when a training begins, after checkpoint and settings were accepted."""

    def __init__(self, work: Callable[[], None]):
        self.work = work

    def on_train_begin(self, args, state, control, **kwargs):
        self.work()


class BesideSteps(TrainerCallback):
    """Tells the data set its epoch, and calls `follow` after every optimizer step."""

    def __init__(self, data: Any, follow: Callable[[], None]):
        self.data, self.follow = data, follow

    def on_epoch_begin(self, args, state, control, **kwargs):
        # accelerate tells the sampler, but where processes share one, not the data set, whose augmentation depends on it
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(int(state.epoch or 0))

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.follow()


class Tally:
    """Sums of a logging interval, kept on the device: reading them there would wait for it."""

    def __init__(self):
        self.methods: Counter[str] = Counter()
        self.sums: Tensor | None = None

    def add(self, method: str, accuracy: Tensor, lam: Tensor) -> None:
        self.methods[method] += 1
        sums = torch.stack([accuracy.sum(), lam.float().sum(), torch.ones_like(accuracy).sum()]).detach()
        self.sums = sums if self.sums is None else self.sums + sums

    def pop(self, accelerator) -> dict[str, float]:
        """`train_accuracy`, mean `lam`, and the share of batches of each method; over all processes."""
        if self.sums is None:
            return {}
        accuracy, lam, images = accelerator.reduce(self.sums, "sum").tolist()
        batches = sum(self.methods.values())
        shares = {f"mix/{name}": count / batches for name, count in sorted(self.methods.items())}
        self.__init__()
        return {"train_accuracy": accuracy / images, "lam": lam / images, **shares}


class EpochLog(TrainerCallback):
    """Keeps `train_log.jsonl`, one row an epoch. Made afresh from the Trainer's own history, so a resumed run has it whole."""

    def __init__(self, folder: str):
        self.path = Path(folder, LOG_NAME)

    def on_log(self, args, state, control, **kwargs):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = "".join(json.dumps(row) + "\n" for row in epoch_rows(state.log_history))
        temporary = self.path.with_name("_train_log.tmp")  # the underscore keeps a push in the background from taking it along
        temporary.write_text(rows)
        os.replace(temporary, self.path)


def epoch_rows(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row an epoch, from the `log_history` of a Trainer: means of what was logged in training, the last evaluation."""
    rows: dict[int, dict[str, Any]] = {}
    training: dict[int, list[dict[str, Any]]] = {}
    for entry in history:
        if "epoch" not in entry:
            continue
        epoch = max(1, math.ceil(entry["epoch"] - 1e-6))
        row = rows.setdefault(epoch, {"epoch": epoch})
        row["step"] = entry.get("step", row.get("step"))
        if "loss" in entry:
            training.setdefault(epoch, []).append(entry)
        row.update({key: value for key, value in entry.items() if key.startswith("eval_")})
    for epoch, entries in training.items():
        for name, key in (("train_loss", "loss"), ("train_accuracy", "train_accuracy"), ("lam", "lam")):
            values = [entry[key] for entry in entries if key in entry]
            if values:
                rows[epoch][name] = sum(values) / len(values)
        rows[epoch]["learning_rate"] = entries[-1].get("learning_rate")
    return [rows[epoch] for epoch in sorted(rows)]
