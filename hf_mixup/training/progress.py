"""The progress of a training: one row for each epoch, and on a terminal a bar of the steps."""

from __future__ import annotations

import logging
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from hf_mixup.training.callbacks import OTHER_DATA, own_entries

logger = logging.getLogger(__name__)

HEAD = f"{'epoch':>8}  {'loss':>8}  {'top-1':>6}  {'best':>6}  {'images/s':>8}  {'time left':>9}"


class EpochTable(TrainerCallback):
    """Prints a table of the Trainer's logs, with the columns: epoch, training loss, top-1 accuracy, the best so far, images a second, time left.

    A row is printed when the next step begins, so that it has the evaluation that follows a log. A log file gets rows but no bars.
    """

    @classmethod
    def replace(cls, trainer: Trainer, measure: str = "eval_top1", title: str = "top-1", inputs: str = "images") -> None:
        """Replaces the dictionaries and bars of a Trainer. The column `title` shows `measure`; `inputs` are counted for the speed."""
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        if trainer.is_world_process_zero():
            trainer.add_callback(cls(measure, title, inputs))

    def __init__(self, measure: str = "eval_top1", title: str = "top-1", inputs: str = "images") -> None:
        self.measure, self.title, self.inputs = measure, title, inputs
        self.row: dict[str, float] = {}
        self.best: float | None = None
        self.bar: tqdm | None = None
        self.passes: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        seen = [entry[self.measure] for entry in own_entries(state.log_history) if self.measure in entry]
        self.best = max(seen, default=None)
        self.first, self.began = state.global_step, time.monotonic()
        self.from_step, self.from_epoch, self.since = state.global_step, state.epoch or 0.0, self.began
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, leave=False, disable=None, unit="step", dynamic_ncols=True)
        logger.info(HEAD.replace(" top-1", f" {self.title:>5}").replace("images/s", f"{self.inputs}/s"))

    def on_step_begin(self, args, state, control, **kwargs):
        if self.row:
            self._tell(state)
            self.from_step, self.from_epoch, self.since = state.global_step, state.epoch or 0.0, time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, train_dataloader=None, **kwargs):
        logs = logs or {}
        if "loss" in logs:
            if "loss" in self.row or self.row.get("epoch") != state.epoch:
                self._tell(state)
            epochs, seconds = (state.epoch or 0.0) - self.from_epoch, time.monotonic() - self.since
            try:
                images = epochs * len(train_dataloader.dataset) / args.repeated_augmentation
            except (AttributeError, TypeError):  # a stream without length
                total = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
                images = (state.global_step - self.from_step) * total
            self.row |= {"epoch": state.epoch or 0.0, "loss": logs["loss"], "speed": images / max(seconds, 1e-9)}
        if self.measure in logs and OTHER_DATA not in logs and self.bar is not None:
            self.row.setdefault("epoch", state.epoch or 0.0)
            self.row["top1"] = logs[self.measure]
            self.best = max(logs[self.measure], logs[self.measure] if self.best is None else self.best)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.passes is None:
            try:
                total = len(eval_dataloader)
            except TypeError:
                total = None
            self.passes = tqdm(total=total, leave=False, disable=None, unit="batch", desc="evaluating", dynamic_ncols=True)
        self.passes.update()

    def on_evaluate(self, args, state, control, **kwargs):
        if self.passes is not None:
            self.passes.close()
            self.passes = None

    on_predict = on_evaluate

    def on_train_end(self, args, state, control, **kwargs):
        self._tell(state)
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _tell(self, state: Any) -> None:
        row, self.row = self.row, {}
        if not row:
            return
        done = state.global_step - self.first
        left = (time.monotonic() - self.began) / done * (state.max_steps - state.global_step) if done else None
        epoch = row["epoch"]
        cells = (
            f"{epoch:8.0f}" if abs(epoch - round(epoch)) < 1e-6 else f"{epoch:8.2f}",
            f"{row['loss']:8.4f}" if "loss" in row else f"{'-':>8}",
            f"{row['top1']:6.4f}" if "top1" in row else f"{'-':>6}",
            f"{self.best:6.4f}" if self.best is not None else f"{'-':>6}",
            f"{row['speed']:8.0f}" if "speed" in row else f"{'-':>8}",
            f"{duration(left):>9}" if left is not None else f"{'-':>9}",
        )
        logger.info("  ".join(cells))


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as in 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
