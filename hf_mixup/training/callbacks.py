"""Callbacks of `MixupTrainer`: updates after optimizer steps, sums of a logging interval, the log of epochs."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_mixup.report.run_folder import LOG_NAME

# marks an entry of the Trainer's history that was measured on another data set than its own
OTHER_DATA = "other_data"


class AtTheStart(TrainerCallback):
    """Calls `work` when training begins, after checkpoint and settings were checked."""

    def __init__(self, work: Callable[[], None]):
        self.work = work

    def on_train_begin(self, args, state, control, **kwargs):
        self.work()


class BesideSteps(TrainerCallback):
    """Counts the micro-batches of a step for the keys, and calls `follow` after every optimizer step.

    The training loop alone sets the count. So a second `train()`, a resumed run in the same object, and a batch size that was found after a
    failure draw the same numbers as a fresh run.
    """

    def __init__(self, start: Callable[[Any], None], follow: Callable[[], None]):
        self.start, self.follow = start, follow
        self.micro_step = 0

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.start(train_dataloader)

    def on_step_begin(self, args, state, control, **kwargs):
        self.micro_step = 0

    def on_substep_end(self, args, state, control, **kwargs):
        self.micro_step += 1

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.follow()


class Tally:
    """Sums of a logging interval. They stay on the device, because reading them makes the host wait.

    `names` are the names of the methods; larger numbers count as vanilla.
    """

    def __init__(self, names: Sequence[str]):
        self.names = [*names, "vanilla"]
        self.methods: Counter[str] = Counter()
        self.sums: Tensor | None = None

    def add(self, methods: Sequence[str] | Tensor, accuracy: Tensor | None, lam: Tensor) -> None:
        """`methods`: a name for each repeat of the batch, or a number for every row (B,). `accuracy` and `lam` are (B,); `accuracy` may be None."""
        correct = lam.new_zeros(()) if accuracy is None else accuracy.sum()
        rows = lam.new_full((), len(lam))
        counts = lam.new_zeros(len(self.names))
        if isinstance(methods, Tensor):
            counts = torch.bincount(methods, minlength=len(self.names)).float() / len(methods)
        else:
            self.methods.update(methods)
        sums = torch.cat(
            [torch.stack([correct.float(), rows if accuracy is not None else rows * 0, lam.float().sum(), rows]), counts]
        ).detach()
        self.sums = sums if self.sums is None else self.sums + sums

    def pop(self, accelerator) -> dict[str, float]:
        """`train_accuracy`, mean `lam`, and the share of batches of each method, over all processes."""
        if self.sums is None:
            return {}
        correct, scored, lam, rows, *counts = accelerator.reduce(self.sums, "sum").tolist()
        found = (
            Counter({name: count / accelerator.num_processes for name, count in zip(self.names, counts, strict=True) if count})
            + self.methods
        )
        batches = sum(found.values())
        shares = {f"mix/{name}": count / batches for name, count in sorted(found.items())}
        self.__init__(self.names[:-1])
        return {**({"train_accuracy": correct / scored} if scored else {}), "lam": lam / rows, **shares}


class EpochLog(TrainerCallback):
    """Keeps `train_log.jsonl`, one row for each epoch. It is written anew from the Trainer's history, so that of a resumed run is complete.

    `folder` gives the folder of the current run, which trials of a search have of their own.
    """

    def __init__(self, folder: Callable[[], str]):
        self.folder = folder

    def on_log(self, args, state, control, **kwargs):
        path = Path(self.folder(), LOG_NAME)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = "".join(json.dumps(row) + "\n" for row in epoch_rows(state.log_history))
        temporary = path.with_name("_train_log.tmp")  # because of the underscore, a push in the background ignores it
        temporary.write_text(rows)
        os.replace(temporary, path)


def own_entries(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The `log_history` of a Trainer without what was measured on data sets other than its own."""
    return [entry for entry in history if OTHER_DATA not in entry]


def trained_until(history: Sequence[Mapping[str, Any]]) -> int:
    """The place in a history where its last training ended; what follows was measured of the weights that it left."""
    return max((place for place, entry in enumerate(history) if "train_runtime" in entry), default=len(history))


def epoch_rows(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each epoch, from the `log_history` of a Trainer: means over the steps of the training logs, and the last evaluation."""
    rows: dict[int, dict[str, Any]] = {}
    training: dict[int, list[tuple[int, dict[str, Any]]]] = {}
    logged, over = 0, False
    for entry in own_entries(history):
        if "epoch" not in entry:
            continue
        epoch = max(1, math.ceil(entry["epoch"] - 1e-6))
        row = rows.setdefault(epoch, {"epoch": epoch})
        row["step"] = entry.get("step", row.get("step"))
        if "loss" in entry:
            steps = entry.get("step", logged + 1) - logged
            training.setdefault(epoch, []).append((max(steps, 1), entry))
            logged = entry.get("step", logged + 1)
        found = {key: value for key, value in entry.items() if key.startswith("eval_")}
        row.update({**found, **row} if over else found)  # what is measured after the training may be of the best weights
        over = "train_runtime" in entry or (over and "loss" not in entry)
    for epoch, entries in training.items():
        for name, key in (("train_loss", "loss"), ("train_accuracy", "train_accuracy"), ("lam", "lam")):
            values = [(steps, entry[key]) for steps, entry in entries if key in entry]
            if values:
                rows[epoch][name] = sum(steps * value for steps, value in values) / sum(steps for steps, _ in values)
        rows[epoch]["learning_rate"] = entries[-1][1].get("learning_rate")
    return [rows[epoch] for epoch in sorted(rows)]


def results(history: list[dict[str, Any]], best_step: int | None = None) -> dict[str, float]:
    """What was measured of the weights that a training left: after it, or else at `best_step`, where the best ones were taken, or at last."""
    history = own_entries(history)
    end = trained_until(history)
    measured = [{key: value for key, value in entry.items() if key.startswith("eval_") or key == "step"} for entry in history]
    after = [entry for entry in measured[end:] if len(entry) > 1]
    if not after:
        before = [entry for entry in measured[:end] if len(entry) > 1]
        step = best_step if best_step is not None else before[-1].get("step") if before else None
        after = [entry for entry in before if entry.get("step") == step]
    return {key: value for entry in after for key, value in entry.items() if key != "step"}
