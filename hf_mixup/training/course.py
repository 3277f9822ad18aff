"""The course of a `MixupTrainer`'s run: its epochs, the keys of its steps, the end of mixing, updates after optimizer steps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from hf_mixup.core.rng import MixKey
from hf_mixup.data.dataset import set_epoch


class Course:
    """The part of MixupTrainer that tracks the current step of the run."""

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """The passes that were done, and the batches of the next one. The Trainer takes all steps on a stream without length for one pass."""
        passes, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None or num_train_epochs < sys.maxsize:
            return passes, batches
        before = TrainerState.load_from_json(str(Path(resume_from_checkpoint, TRAINER_STATE_NAME)))
        if before.epoch <= 1:  # in the first pass
            return passes, batches
        # the number of the pass, and the share of all steps that were done in it
        passes, share = divmod(before.epoch, 1)
        return int(passes), 0 if self.args.ignore_data_skip else round(share * before.max_steps * self.args.gradient_accumulation_steps)

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        # resumed after the last step of an unfinished epoch, the Trainer would do another step
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        self._epoch = epoch
        # with several processes accelerate calls set_epoch on the sampler but not on the data set, whose augmentation needs it
        for data in (self.train_dataset, getattr(kwargs.get("train_dataloader"), "dataset", None)):
            set_epoch(data, epoch)
        if self._train_collator is not None:
            self._train_collator.mix_until_now(self._mixing_is_over())
            self._train_collator.set_epoch(epoch, self.state.num_train_epochs)
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    @property
    def _mix_seed(self) -> int:
        return self.args.seed if self.args.mix_seed is None else self.args.mix_seed

    def _next_key(self) -> MixKey:
        place = self.state.global_step, self._beside.micro_step, 0, self.state.max_steps, self._epoch, self.state.num_train_epochs
        return MixKey(self._mix_seed, self.args.process_index, *place)

    def _mixing_is_over(self) -> bool:
        off = self.args.mix_off_epoch
        # for a stream without length, state.epoch is too small until the first step of an epoch is done
        return off is not None and max(self.state.epoch or 0, self._epoch) >= off

    def _follow(self) -> None:
        """Updates EMAs and teachers, but not after a step that the gradient scaler skipped."""
        if self.accelerator.optimizer_step_was_skipped:
            return
        rising = self.args.ema_warmup_epochs * self._steps_per_epoch() if self.args.ema_warmup_epochs else 0.0
        self.mixup_model.after_optimizer_step(self.state.global_step, self.state.max_steps, rising)
