"""`MixupTrainer`: a Trainer that mixes on the device, by keys, and restores strictly."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, has_length

from hf_mixup.arguments import MixupTrainingArguments
from hf_mixup.core.checks import check_transformers
from hf_mixup.core.hub import told_plainly
from hf_mixup.core.rng import MixKey
from hf_mixup.core.secrets import keep_secret
from hf_mixup.data.collator import CheckedCollator, MixedBatch, MixupCollator
from hf_mixup.data.dataset import ImageDataset, RepeatedAugmentation
from hf_mixup.evaluation.metrics import classification_metrics, mixed_accuracy
from hf_mixup.methods import CONFIG_NAME, taught_by_the_network
from hf_mixup.model import STATE_FOLDER, MixupModel
from hf_mixup.report.card import write_model_card
from hf_mixup.report.run_folder import RunFolder, list_files
from hf_mixup.training.callbacks import BesideSteps, EpochLog, Tally, epoch_rows
from hf_mixup.training.checkpoints import LAST_NAME, RUN_NAME, last_complete_checkpoint, what_is_wrong, whole_or_absent
from hf_mixup.training.hub import check_token, push_folder, without_secrets
from hf_mixup.training.schedules import cosine

logger = logging.getLogger(__name__)


class MixupTrainer(Trainer):
    """Trains an image classifier with mixing. A Trainer in every other way.

    The batch is mixed on the device inside the model's forward pass. All that is drawn follows from (mix_seed, rank, step,
    micro-step), so a resumed run repeats it to the bit, at any number of workers, on the same number of processes.
    Evaluation is plain.

    Args:
        model: any Hugging Face image classifier, or a MixupModel.
        args: with the methods to mix by.
        data_collator: makes batches with `pixel_values` and `labels`. A MixupCollator mixes training batches in the workers
            instead of on the device; evaluation uses its base collator.
        compute_metrics: top-1 and top-5 accuracy where not given.
        **kwargs: as in `transformers.Trainer`.

    Raises:
        ValueError: for methods that the model cannot serve, and settings that would train something else than meant.
    """

    # the loss is a mean over the batch; without this the Trainer would take it for one over the accumulated batch
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel,
        args: MixupTrainingArguments | None = None,
        data_collator: Callable | None = None,
        *,
        compute_metrics: Callable | None = classification_metrics,
        **kwargs: Any,
    ):
        check_transformers()
        args = MixupTrainingArguments("runs/trainer") if args is None else args
        keep_secret(args.hub_token)
        if args.n_gpu > 1:
            raise ValueError(
                f"one process drives one GPU, got {args.n_gpu} GPUs in one process; start with `accelerate launch`, or set CUDA_VISIBLE_DEVICES."
            )
        if not isinstance(model, MixupModel):
            model = MixupModel(model, args.method_choice(), mix_repeat=args.mix_repeat, ema=args.ema_decay is not None)
        if sum(p.requires_grad for p in model.states.parameters()) and len(model.choice.methods) > 1:
            # the mixer of one method gets no gradient in a batch of another
            args.ddp_find_unused_parameters = True
        self._train_collator = None
        if isinstance(data_collator, MixupCollator):
            if data_collator.num_labels not in (None, model.num_labels):
                raise ValueError(
                    f"the collator and the model must agree on num_labels, got {data_collator.num_labels} and {model.num_labels}; make them equal."
                )
            self._train_collator, data_collator = data_collator, data_collator.base_collator
        data = kwargs.get("train_dataset")
        if data is not None and not has_length(data) and args.max_steps <= 0:
            raise ValueError(
                f"a data set without length needs max_steps, got {type(data).__name__} and {args.max_steps}; set the steps to train."
            )
        if args.hub_strategy == HubStrategy.ALL_CHECKPOINTS:
            args.hub_always_push = True  # or a checkpoint is left out while the one before is on its way
        # the Trainer would log the mean of earlier losses in the place of a NaN
        args.logging_nan_inf_filter = False
        super().__init__(model=model, args=args, data_collator=data_collator, compute_metrics=compute_metrics, **kwargs)
        if self.is_fsdp_enabled and "FULL" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            raise ValueError(
                f"FSDP must gather what it saves, got {self.accelerator.state.fsdp_plugin.state_dict_type}, which leaves no model behind; "
                "set fsdp_state_dict_type to FULL_STATE_DICT."
            )
        self.mixup_model = model  # `self.model` may be wrapped, and unwrapping it takes as long as many a network's forward pass
        self._keyed_step, self._micro_step = -1, 0
        self._tally = Tally()
        self.add_callback(BesideSteps(self.train_dataset, self._follow))
        if self.is_world_process_zero():
            self.add_callback(EpochLog(args.output_dir))

    # -- mixing ---------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self):
        plain = self.data_collator
        on_device = getattr(self.train_dataset, "on_device", False)
        collator = self._train_collator or CheckedCollator(plain, self.mixup_model.num_labels, self._multi_label, on_device)
        try:
            # the Trainer has one collator for training and evaluation; evaluation keeps the plain one
            self.data_collator = collator
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        images, labels = inputs["pixel_values"], inputs.get("labels")
        if not model.training:
            outputs = model(pixel_values=images, labels=labels)
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        if "augmentation_keys" in inputs:
            images = self.train_dataset.transform.tail(images, inputs["augmentation_keys"])
        key = self._next_key()
        mixed = isinstance(inputs, MixedBatch) or self._mixing_is_over()
        outputs = model(pixel_values=images, labels=labels, mix_key=key, mixed=mixed)
        name = "given" if mixed else self.mixup_model.method_for(key).name
        self._tally.add(name, mixed_accuracy(outputs.logits.detach(), outputs.targets), outputs.lam)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        # one read a step, as in the Trainer itself, and after the backward pass is under way
        if not torch.isfinite(loss):
            key = self._last_key
            name = "vanilla" if self._mixing_is_over() else self.mixup_model.method_for(key).name
            raise FloatingPointError(
                f"the loss must stay finite, got {loss.item()} at step {key.step} with method {name!r}, learning rate "
                f"{self._get_learning_rate():g} and {key}; lower the learning rate, or look at the images of that batch."
            )
        return loss

    @property
    def _multi_label(self) -> bool:
        return self.mixup_model.choice.methods[0].loss.multi_label

    @property
    def _mix_seed(self) -> int:
        return self.args.seed if self.args.mix_seed is None else self.args.mix_seed

    def _next_key(self) -> MixKey:
        step = self.state.global_step
        self._micro_step = self._micro_step + 1 if step == self._keyed_step else 0
        self._keyed_step = step
        self._last_key = MixKey(self._mix_seed, self.args.process_index, step, self._micro_step, 0, self.state.max_steps)
        return self._last_key

    def _mixing_is_over(self) -> bool:
        off = self.args.mix_off_epoch
        return off is not None and (self.state.epoch or 0) >= off

    def _follow(self) -> None:
        """What follows the weights: EMA teachers. Not after a step that the gradient scaler skipped."""
        if self.accelerator.optimizer_step_was_skipped:
            return
        model, state = self.mixup_model, self.state
        for method in model.choice.methods:
            method.step.after_optimizer_step(model.states[method.name], model.backbone, state.global_step, state.max_steps)
        if model.ema is not None:
            rising = self.args.ema_warmup_epochs * self._steps_per_epoch() if self.args.ema_warmup_epochs else 0
            model.follow(self.args.ema_decay * (0.9 + 0.1 * min(1.0, (state.global_step + 1) / rising) if rising else 1.0))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._tally.pop(self.accelerator))
        super().log(logs, start_time)

    # -- optimizer ------------------------------------------------------------------------------------------------------

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        """The Trainer's, and timm's LAMB, which clips the norm of all gradients at 1 by itself."""
        if args.optim != "lamb":
            return Trainer.get_optimizer_cls_and_kwargs(args, model)
        from timm.optim import Lamb

        return Lamb, {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The Trainer's, or all but those that match `no_weight_decay`."""
        patterns = self.args.no_weight_decay
        if patterns is None:
            return super().get_decay_parameter_names(model)
        return [name for name, _ in model.named_parameters() if not any(re.search(pattern, name) for pattern in patterns)]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's, with groups of their own for learned mixers where the arguments treat those differently."""
        first = self.optimizer is None  # the second `train()` of a trainer finds its optimizer here
        optimizer = super().create_optimizer(model)
        own = {"lr": self.args.mixer_learning_rate, "momentum": self.args.mixer_momentum}
        own = {key: value for key, value in own.items() if value is not None}
        mixers = {id(p) for name, p in (model or self.model).named_parameters() if name.startswith("states.") and ".mixer." in name}
        if first and mixers and (own or self.args.mixer_weight_decay is not None or self.args.mixer_min_lr is not None):
            for group in list(optimizer.param_groups):
                moved = [p for p in group["params"] if id(p) in mixers]
                group["params"] = [p for p in group["params"] if id(p) not in mixers]
                decay = self.args.mixer_weight_decay if group["weight_decay"] and self.args.mixer_weight_decay is not None else None
                changed = {**own, "mixer": True, **({} if decay is None else {"weight_decay": decay})}
                if moved:
                    optimizer.add_param_group({**{k: v for k, v in group.items() if k != "params"}, "params": moved, **changed})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """The Trainer's, or the cosine of the published recipes: with floors, of mixers too, changing every step or epoch."""
        if not self.args.own_schedule or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = self.optimizer if optimizer is None else optimizer
        every = self._steps_per_epoch() if self.args.lr_per_epoch else 1
        warmup, start = self.args.get_warmup_steps(num_training_steps), None
        if self.args.warmup_epochs:
            warmup, start = round(self.args.warmup_epochs * self._steps_per_epoch()), self.args.warmup_start

        def factor_of(group: dict[str, Any]) -> Callable[[int], float]:
            floor = self.args.mixer_min_lr if group.get("mixer") else self.args.min_lr
            return functools.partial(
                cosine,
                total=num_training_steps,
                floor=(floor or 0.0) / group["lr"],
                warmup=warmup,
                every=every,
                start=start,
            )

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [factor_of(group) for group in optimizer.param_groups])
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _steps_per_epoch(self) -> int:
        """Optimizer steps."""
        batches = len(self.train_dataset) / (self._train_batch_size * self.args.world_size)
        drop = self.args.dataloader_drop_last or self.args.repeated_augmentation > 1
        return math.ceil((math.floor(batches) if drop else math.ceil(batches)) / self.args.gradient_accumulation_steps)

    def _get_train_sampler(self, train_dataset=None):
        data = self.train_dataset if train_dataset is None else train_dataset
        repeats = self.args.repeated_augmentation
        if repeats == 1:
            return super()._get_train_sampler(train_dataset)
        if not isinstance(data, ImageDataset):
            raise ValueError(
                f"repeated_augmentation is for a hf_mixup.data.dataset.ImageDataset, got {type(data).__name__}; leave it at 1."
            )
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return RepeatedAugmentation(len(data), repeats, self._train_batch_size, self.args.world_size, seed)

    # -- checkpoints ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """`resume_from_checkpoint`: True for the newest whole checkpoint of `output_dir`, or the folder of one."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"{self.args.output_dir} was expected to hold a whole checkpoint, got none; start without resume_from_checkpoint."
                )
        if resume_from_checkpoint and not self.is_fsdp_enabled:
            wrong = what_is_wrong(resume_from_checkpoint)
            if wrong:
                raise ValueError(
                    f"{resume_from_checkpoint} was expected to be a whole checkpoint, got one where {wrong}; resume from another one."
                )
            self._refuse_another_run(resume_from_checkpoint)
        try:
            return super().train(resume_from_checkpoint or None, **kwargs)
        except UnpicklingError:
            raise ValueError(
                f"{resume_from_checkpoint} was expected to hold tensors alone, got a pickle that would run code; resume from one that you made."
            ) from None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # resumed in the middle of an epoch after its last step, the Trainer would make another one
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _run_facts(self) -> dict[str, Any]:
        """What must be the same for a resumed run to go on as the old one."""
        return {**self.mixup_model.choice.to_dict(), "mix_seed": self._mix_seed, "processes": self.args.world_size}

    def _refuse_another_run(self, checkpoint: str) -> None:
        path = Path(checkpoint, RUN_NAME)
        if not path.is_file() or self.args.allow_method_change:
            return
        old, new = json.loads(path.read_text()), json.loads(json.dumps(self._run_facts()))
        changed = [f"{key}: {json.dumps(old.get(key))} then, {json.dumps(new[key])} now" for key in new if old.get(key) != new[key]]
        if changed:
            raise ValueError(
                f"a resumed run must mix as before, got other settings ({'; '.join(changed)}); restore them, or pass allow_method_change=True."
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call=True)
        if self.args.should_save:
            RunFolder(output_dir or self.args.output_dir).record(**self._run_facts())
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
        # or the first process may say that a checkpoint is whole before the others have written what is theirs
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

    # -- the Hub --------------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in the Trainer, before training: the token is tried, and the branch of `hub_revision` made."""
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
        """Writes `README.md` from the files of the run, see `hf_mixup.report.card`; nothing is asked of the Hub.

        Args:
            finetuned_from: Hub id of the checkpoint it started from; None for a network from scratch, or the model's own.
            dataset: name of the data set, as people know it.
            dataset_tags: its Hub id, if it has one.
            dataset_args: the split of the evaluation.
            command: that trained the model; the one of this process if None.
        """
        if not self.is_world_process_zero():
            return
        name = self.mixup_model.config.name_or_path
        for part in (self.mixup_model.deployed.config, self.mixup_model.choice):
            part.save_pretrained(self.args.output_dir)  # which the card is made from, saved or not
        write_model_card(
            self.args.output_dir,
            model_name=model_name,
            dataset=_one(dataset),
            dataset_id=_one(dataset_tags),
            split=_one(dataset_args),
            command=command or shlex.join(["python", *without_secrets(sys.argv)]),
            base_model=finetuned_from or name or None,
            repo=self.hub_model_id,
            license=license,
            language=language,
            tags=[tags] if isinstance(tags, str) else tags or [],
            hyperparameters=self._hyperparameters(),
            rows=epoch_rows(self.state.log_history),
        )

    def _hyperparameters(self) -> dict[str, Any]:
        """Those that a reader asks for first; the command has all that was set."""
        args = self.args
        precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
        parts = args.gradient_accumulation_steps * args.world_size
        total, data = args.train_batch_size * parts, self.train_dataset
        return {
            **({"images": _images(data)} if isinstance(data, ImageDataset) else {}),
            "learning rate": args.learning_rate,
            "schedule": f"{getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}, {args.get_warmup_steps(self.state.max_steps)} steps of warm-up",
            "optimizer": f"{getattr(args.optim, 'value', args.optim)}, weight decay {args.weight_decay:g}",
            "batch size": f"{total}, as {parts} of {args.train_batch_size}" if parts > 1 else total,
            "processes": args.world_size,
            "epochs": round(self.state.epoch or 0, 2),
            "steps": self.state.global_step,
            "precision": precision,
            "seed": args.seed,
            "seed of mixing": self._mix_seed,
            **{f"teacher of {name}": "the network in training" for name in taught_by_the_network(self.mixup_model.choice)},
            **({"mixtures of each batch": args.mix_repeat} if args.mix_repeat > 1 else {}),
            **({"unmixed from epoch": args.mix_off_epoch} if args.mix_off_epoch is not None else {}),
        }

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ):
        """Saves, writes the card (`kwargs` are those of `create_model_card`) and pushes the folder, trying again when the network fails.

        Raises ConnectionError with the command to push by hand when it fails for good; nothing on the disk is lost.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self._finish_current_push()  # it may still be reading what is written now
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
        """The Trainer takes along the classifier alone; this takes what else there is of the model."""
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
            logger.warning("%d pushes during training did not reach the Hub (%s); the last one brings everything", len(failed), failed[0])
            self.push_in_progress = None

    # -- compilation ----------------------------------------------------------------------------------------------------

    def _build_accelerator_args(self, **kwargs) -> dict[str, Any]:
        built = super()._build_accelerator_args(**kwargs)
        if self.args.torch_compile:
            from accelerate.utils import TorchDynamoPlugin

            # the backbone alone is compiled, in place: mixing stays outside the graph, and names of parameters stay as they are
            built["dynamo_plugin"] = TorchDynamoPlugin(backend="no")
            self.model.backbone.compile(backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode)
        return built


def _images(data: ImageDataset) -> str:
    height, width = data[0]["pixel_values"].shape[1:]
    return f"{len(data)} of {width} x {height} pixels"


def _one(value: str | list[str] | None) -> str | None:
    """The Trainer takes lists in its cards; a model of ours is evaluated on one data set."""
    return value[0] if isinstance(value, (list, tuple)) and value else value or None
