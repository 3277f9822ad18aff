"""The course of a `MixupTrainer`'s run: its epochs, the keys of its steps, the end of mixing, updates after optimizer steps."""

from __future__ import annotations

from typing import Any

from hf_mixup.core.rng import MixKey
from hf_mixup.data.dataset import set_epoch


class Course:
    """The part of MixupTrainer that tracks the current step of the run."""

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
