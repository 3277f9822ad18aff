"""The card of a `MixupTrainer`'s run, and its pushes to the Hub."""

from __future__ import annotations

import functools
import json
import logging
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy

from hf_mixup.core.hub import told_plainly
from hf_mixup.data.dataset import ImageDataset
from hf_mixup.method import CONFIG_NAME
from hf_mixup.methods import taught_by_the_network
from hf_mixup.model import STATE_FOLDER
from hf_mixup.networks.distillation import Distiller
from hf_mixup.report.card import write_model_card
from hf_mixup.training.callbacks import epoch_rows, results
from hf_mixup.training.hub import check_token, push_folder, without_secrets

logger = logging.getLogger(__name__)


class Publishing:
    """The part of MixupTrainer that writes its card and pushes."""

    _weights: torch.dtype | None = None  # of the network, as training began

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in the Trainer. It also checks the token, and creates the branch of `hub_revision`, before training."""
        if not self.is_world_process_zero():
            return
        token = self.args.hub_token if token is None else token
        check_token(token)
        with told_plainly(self.args.hub_model_id or Path(self.args.output_dir).absolute().name):
            super().init_hf_repo(token, private)
            if self.args.hub_revision is not None:
                HfApi(token=token).create_branch(self.hub_model_id, branch=self.args.hub_revision, exist_ok=True)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        *,
        command: str | None = None,
    ) -> None:
        """Writes `README.md` from the files of the run, see `hf_mixup.report.card`. It does not contact the Hub.

        Args:
            finetuned_from: Hub id of the checkpoint it started from; None reads it from the model, which has none if it is from scratch.
            dataset: name of the data set, for people.
            dataset_tags: its Hub id, if it has one.
            dataset_args: split of the evaluation.
            command: the command that trained the model; that of this process if None.
        """
        if self.is_world_process_zero():
            self._write_card(
                model_name=model_name,
                dataset=_one(dataset),
                dataset_id=_one(dataset_tags),
                split=_one(dataset_args),
                command=command or shlex.join(["python", *without_secrets(sys.argv)]),
                base_model=finetuned_from,
                repo=self.hub_model_id,
                license=license,
                language=language,
                tags=[tags] if isinstance(tags, str) else tags or [],
                hyperparameters=self._hyperparameters(),
            )

    def _write_card(self, base_model: str | None, **facts: Any) -> None:
        """Writes the card; `facts` are arguments of `write_model_card`."""
        if not self._saved:  # the card reads the saved files
            Path(self.args.output_dir, CONFIG_NAME).write_text(json.dumps(self.mixup_model.to_dict(), indent=2) + "\n")
            self.mixup_model.deployed.config.save_pretrained(self.args.output_dir)
        base_model = base_model or self.mixup_model.config.name_or_path or None
        history, loaded = self.state.log_history, self.args.load_best_model_at_end
        measured = results(history, self.state.best_global_step if loaded else None)
        # files of the folder may be of a run before this one
        measured = measured if measured or self.state.global_step else None
        write_model_card(self.args.output_dir, base_model=base_model, rows=epoch_rows(history), results=measured, **facts)

    def _hyperparameters(self) -> dict[str, Any]:
        """The most important settings; the command in the card has all of them."""
        args, data = self.args, self.train_dataset
        split = args.world_size if self.accelerator.split_batches else 1
        parts, batch = args.gradient_accumulation_steps * args.world_size, self._train_batch_size // split
        return {
            **({"images": _images(data)} if isinstance(data, ImageDataset) else {}),
            **self._optimization(),
            "batch size": f"{batch * parts}, as {parts} of {batch}" if parts > 1 else batch,
            "processes": args.world_size,
            "epochs": round(self.state.epoch or 0, 2),
            "steps": self.state.global_step,
            "precision": self._precision,
            "seed": args.seed,
            "seed of mixing": self._mix_seed,
            **{f"teacher of {name}": "the network in training" for name in taught_by_the_network(self.mixup_model.choice)},
            **_teacher(self.mixup_model.distiller),
            **({"mixtures of each batch": self.mixup_model.mix_repeat} if self.mixup_model.mix_repeat > 1 else {}),
            **({"loss": self._run_facts()["compute_loss_func"]} if self._loss_func is not None else {}),
            **({"unmixed from epoch": args.mix_off_epoch} if args.mix_off_epoch is not None else {}),
        }

    @property
    def _precision(self) -> str:
        """As it was, not as it was asked for: without an accelerator fp16 has no effect."""
        names = {"no": "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
        mixed = self.accelerator.mixed_precision if self.accelerator.native_amp or self.is_deepspeed_enabled else "no"
        weights = names.get(self._weights or self.mixup_model.backbone.dtype, str(self._weights))
        return names.get(mixed, mixed) if weights == "fp32" else f"{weights} weights"

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ):
        """Saves, writes the card (`kwargs` as in `create_model_card`) and pushes the folder. It tries again if the network fails.

        Raises ConnectionError, with the command to push by hand, if all attempts fail. All files stay on the disk.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self._finish_current_push()  # it may still read files that are written now
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**{"model_name": self.hub_model_id.split("/")[-1], **kwargs})
        push = functools.partial(
            push_folder,
            self.hub_model_id,
            self.args.output_dir,
            commit_message or "End of training",
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            private=self.args.hub_private_repo if private is None else private,
        )
        return push() if blocking else HfApi().run_as_future(push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """The Trainer pushes only the classifier of a checkpoint. This also pushes the rest of the model."""
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done() if self.is_world_process_zero() else True
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END and (self.args.hub_always_push or not busy):
            if Path(checkpoint_folder, CONFIG_NAME).is_file():
                shutil.copy(Path(checkpoint_folder, CONFIG_NAME), self.args.output_dir)
            if Path(checkpoint_folder, STATE_FOLDER).is_dir():
                shutil.copytree(Path(checkpoint_folder, STATE_FOLDER), Path(self.args.output_dir, STATE_FOLDER), dirs_exist_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        jobs = getattr(getattr(self, "push_in_progress", None), "jobs", [])
        failed = [job.exception() for job in jobs if job.done() and not job.cancelled() and job.exception() is not None]
        if failed:
            logger.warning("%d pushes during training did not reach the Hub (%s); the last one has everything", len(failed), failed[0])
            self.push_in_progress = None


def _teacher(distiller: Distiller | None) -> dict[str, str]:
    if distiller is None:
        return {}
    how = distiller.how
    said = "its most probable class" if how.hard else f"at temperature {how.temperature:g}"
    return {"teacher": f"{how.teacher}, {said}, {how.weight:g} of the loss"}


def _images(data: ImageDataset) -> str:
    height, width = data[0]["pixel_values"].shape[-2:]
    return f"{len(data)} of {width} x {height} pixels"


def _one(value: str | list[str] | None) -> str | None:
    """The Trainer takes lists for its cards; a model of this library is evaluated on one data set."""
    return value[0] if isinstance(value, (list, tuple)) and value else value or None
