"""What a `MixupTrainer` saves, and how a run is resumed: strictly, and bit by bit."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_mixup.report.run_folder import RUN_NAME, RunFolder, list_files
from hf_mixup.training.checkpoints import LAST_NAME, last_complete_checkpoint, what_is_wrong, whole_or_absent


class Resuming:
    """The part of MixupTrainer that writes checkpoints and resumes from them."""

    _saved = False  # whether the output folder holds this model

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """`resume_from_checkpoint`: True for the newest complete checkpoint of `output_dir`, or the folder of one."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"{self.args.output_dir} was expected to hold a complete checkpoint, got none; start without resume_from_checkpoint."
                )
        if resume_from_checkpoint and not self.is_fsdp_enabled:
            wrong = what_is_wrong(resume_from_checkpoint)
            if wrong:
                raise ValueError(
                    f"{resume_from_checkpoint} was expected to be a complete checkpoint, got one where {wrong}; resume from another one."
                )
            self._refuse_another_run(resume_from_checkpoint)
        self._check_evaluation_labels()
        try:
            return super().train(resume_from_checkpoint or None, **kwargs)
        except UnpicklingError:
            raise ValueError(
                f"{resume_from_checkpoint} was expected to hold only tensors, got a pickle that would run code; resume from a checkpoint that you made."
            ) from None

    def _run_facts(self) -> dict[str, Any]:
        """Settings that must be equal, so that the resumed run repeats the old one."""
        where = "device" if self._train_collator is None else "collator"
        facts = {**self.mixup_model.to_dict(), "mix_seed": self._mix_seed, "processes": self.args.world_size, "mixed_on": where}
        return {**facts, "mix_off_epoch": self.args.mix_off_epoch, "compute_loss_func": _name(self._loss_func)}

    @property
    def _classes(self) -> list[str]:
        """Names of the network's outputs, in their order."""
        config = self.mixup_model.deployed.config
        return [str((config.id2label or {}).get(number, number)) for number in range(config.num_labels)]

    def _refuse_another_run(self, checkpoint: str) -> None:
        path = Path(checkpoint, RUN_NAME)
        if not path.is_file():
            return
        old, new = json.loads(path.read_text()), json.loads(json.dumps(self._run_facts()))
        classes = old.get("classes", self._classes)
        # another number of classes is refused with the weights
        for number, (before, now) in enumerate(zip(classes, self._classes, strict=False)):
            if before != now and len(classes) == len(self._classes):
                raise ValueError(
                    f"a resumed run must have the classes of before, got {now!r} in the place of {before!r}, number {number}; restore the names "
                    "of the folders or labels, or start a new run with --model_name_or_path."
                )
        if self.args.allow_method_change:
            return
        changed = [f"{key}: {json.dumps(old.get(key))} then, {json.dumps(new[key])} now" for key in new if old.get(key) != new[key]]
        if changed:
            raise ValueError(
                f"a resumed run must mix as before, got other settings ({'; '.join(changed)}); restore them, or pass allow_method_change=True."
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call=True)
        self._saved = self._saved or output_dir is None
        if self.args.should_save:
            RunFolder(output_dir or self.args.output_dir).record(**self._run_facts(), classes=self._classes)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        values = [value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        size = sum(value.numel() * value.element_size() for value in [*self.mixup_model.state_dict().values(), *values])
        with whole_or_absent(checkpoint, size) if self.args.should_save else contextlib.nullcontext():
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # process 0 must not mark the checkpoint complete before the others have saved their random state
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            list_files(output_dir, LAST_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.mixup_model.restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self.mixup_model.restore(self.state.best_model_checkpoint)


def _name(function: Any) -> str | None:
    return None if function is None else getattr(function, "__name__", type(function).__name__)
