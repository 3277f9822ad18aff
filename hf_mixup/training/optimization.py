"""Optimizer and schedule of a `MixupTrainer`: groups of learned mixers, LAMB, the cosines of the published recipes."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import has_length

from hf_mixup.arguments import MixupTrainingArguments, value_of
from hf_mixup.core.checks import one_line
from hf_mixup.model import MixupModel
from hf_mixup.training.schedules import cosine

# torch's optimizers with fused kernels, also on CPUs
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
MIXER_FIELDS = ("mixer_learning_rate", "mixer_weight_decay", "mixer_momentum", "mixer_min_lr")


class Optimization:
    """The part of MixupTrainer that makes its optimizer and its schedule."""

    _updates: int | None = None  # optimizer steps of an epoch, once there is a loader
    _made_optimizer = False

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        """As the Trainer's, plus timm's LAMB, which clips the norm of all gradients at 1. `fast` uses torch's fused kernels."""
        if args.optim != "lamb":
            cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
            wanted = "fused=false" not in (args.optim_args or "").replace(" ", "").lower()
            if args.fast and wanted and cls in FUSED:
                kwargs["fused"] = True
            return cls, kwargs
        from timm.optim import Lamb

        return Lamb, {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As the Trainer's, or all names but those that match `no_weight_decay`."""
        patterns = self.args.no_weight_decay
        if patterns is None:
            return super().get_decay_parameter_names(model)
        # by the network's own names too, for patterns such as ^vit.embeddings
        named = {name: (name, name.removeprefix("backbone.")) for name, _ in model.named_parameters()}
        return [name for name, both in named.items() if not any(re.search(pattern, one) for pattern in patterns for one in both)]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer's, with separate groups for learned mixers if the arguments set other values for them."""
        first = self.optimizer is None  # in a second `train()` the optimizer exists already
        named: AbstractContextManager[None] = nullcontext()
        if first and self.optimizer_cls_and_kwargs is None:
            self._refuse_idle_options(model or self.model)
            seen = f"{value_of(self.args.optim)!r} and {self.args.optim_args!r}"
            named = _named("optim and optim_args must make an optimizer", seen, "optim_args")
        with named:
            optimizer = super().create_optimizer(model)
        self._made_optimizer |= first
        own = {"lr": self.args.mixer_learning_rate, "momentum": self.args.mixer_momentum}
        own = {key: value for key, value in own.items() if value is not None}
        mixers = {id(p) for name, p in (model or self.model).named_parameters() if name.startswith("states.") and ".mixer." in name}
        if first and mixers and (own or self.args.mixer_weight_decay is not None or self.args.mixer_min_lr is not None):
            names, decay = {*self.get_decay_parameter_names(model or self.model)}, self.args.mixer_weight_decay
            # by name: where weight_decay is 0, the groups do not tell
            decaying = {id(p) for name, p in (model or self.model).named_parameters() if name in names}
            for group in list(optimizer.param_groups):
                if "momentum" in own and "momentum" not in group:
                    raise ValueError(
                        f"mixer_momentum is for optimizers that have a momentum, got {type(optimizer).__name__}; leave it out, or set optim='sgd'."
                    )
                moved = [p for p in group["params"] if id(p) in mixers]
                group["params"] = [p for p in group["params"] if id(p) not in mixers]
                for decays in (True, False):
                    part = [p for p in moved if (id(p) in decaying) == decays]
                    changed = {**own, "mixer": True, **({"weight_decay": decay} if decays and decay is not None else {})}
                    if part:
                        optimizer.add_param_group({**{k: v for k, v in group.items() if k != "params"}, "params": part, **changed})
        return optimizer

    def _refuse_idle_options(self, model: nn.Module) -> None:
        """Raises ValueError for entries of `optim_args` that the optimizer does not look at: transformers drops them."""
        args = self.args
        pairs = [pair for pair in (args.optim_args or "").replace(" ", "").split(",") if pair]
        names = [pair.partition("=")[0] for pair in pairs]

        def made(*pairs: str) -> Any:
            changed = copy.copy(args)
            changed.optim_args = ",".join(pairs)
            try:
                return self.get_optimizer_cls_and_kwargs(changed, model)
            except Exception as error:  # a value that it cannot read, or a package that is missing
                return repr(error)

        whole = made(*pairs)
        for place, name in enumerate(names):
            others = [[*pairs[:place], *new, *pairs[place + 1 :]] for new in ([], [f"{name}=1"], [f"{name}=0"], [f"{name}=x"])]
            if not (name == "fused" and args.fast) and all(made(*other) == whole for other in others):
                raise ValueError(
                    f"optim_args must hold options that {value_of(args.optim)} has and transformers passes on, got {pairs[place]!r}, which has no effect; "
                    "leave it out, or check the spelling."
                )

    def _refuse_missing_parameters(self) -> None:
        """Raises ValueError for an optimizer of the user, or one made before the model was wrapped, that lacks the parameters of the methods."""
        if self._made_optimizer or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        missing = [name for name, p in self.mixup_model.named_parameters() if p.requires_grad and id(p) not in held]
        if missing:
            raise ValueError(
                f"the optimizer must hold every parameter that is trained, got one that lacks {len(missing)}, such as {', '.join(missing[:3])}; "
                "make it over the parameters of a MixupModel, built first, use optimizer_cls_and_kwargs, or freeze them with requires_grad_(False)."
            )

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """As the Trainer's, or the cosine of the published recipes: with a floor, also for mixers, changed every step or every epoch."""
        if not self.args.own_schedule or self.lr_scheduler is not None:
            seen = f"{value_of(self.args.lr_scheduler_type)!r} and {self.args.lr_scheduler_kwargs}"
            with _named("lr_scheduler_type and lr_scheduler_kwargs must make a schedule", seen, "lr_scheduler_kwargs"):
                return super().create_scheduler(num_training_steps, optimizer)
        optimizer = self.optimizer if optimizer is None else optimizer
        every = self._steps_per_epoch() if self.args.lr_per_epoch else 1
        warmup, start = self._warmup_steps(num_training_steps), self.args.warmup_start if self.args.warmup_epochs else None

        def factor_of(group: dict[str, Any]) -> Callable[[int], float]:
            floor = self.args.mixer_min_lr if group.get("mixer") else self.args.min_lr
            top = group.get("initial_lr", group["lr"])  # a second `train()` finds the rate where the first one left it
            if floor and floor > top:
                raise ValueError(
                    f"min_lr and mixer_min_lr are where a learning rate ends, got {floor:g} for one that starts at {top:g}; lower it, or raise the learning rate."
                )
            return functools.partial(
                cosine,
                total=num_training_steps,
                floor=(floor or 0.0) / top if top else 0.0,
                warmup=warmup,
                every=every,
                start=start,
            )

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [factor_of(group) for group in optimizer.param_groups])
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _optimization(self) -> dict[str, Any]:
        """What trained, for the card: of the optimizer and the schedule that there are, whoever made them."""
        args = self.args
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        groups = [{"lr": args.learning_rate, "weight_decay": args.weight_decay}] if optimizer is None else optimizer.param_groups
        groups = [group for group in groups if group.get("params", True)]
        rates = [group.get("initial_lr", group["lr"]) for group in groups]
        decays = [group.get("weight_decay", 0.0) for group in groups]
        own = optimizer is None or (self._made_optimizer and self.optimizer_cls_and_kwargs is None)
        schedule = type(scheduler).__name__
        if scheduler is None or self._created_lr_scheduler:
            floor = f" to {args.min_lr:g}" if args.min_lr else ""
            warmup = self._warmup_steps(self.state.max_steps)
            schedule = f"{value_of(args.lr_scheduler_type)}{floor}, {warmup} steps of warm-up"
        return {
            "learning rate": _numbers(rates),
            "schedule": schedule,
            "optimizer": f"{value_of(args.optim) if own else type(optimizer).__name__}, weight decay "
            f"{_numbers([decay for decay in decays if decay] or [0.0])}",
        }

    def _warmup_steps(self, num_training_steps: int) -> int:
        if self.args.warmup_epochs:
            return round(self.args.warmup_epochs * self._steps_per_epoch())
        return self.args.get_warmup_steps(num_training_steps)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple:
        values = super().set_initial_training_values(args, dataloader)
        self._updates = values[1]
        return values

    def _steps_per_epoch(self) -> int:
        """Optimizer steps: of the loader, whose sampler may draw more rows than the data set has; of the data set where there is none yet."""
        if self._updates is not None:
            return self._updates
        batches = len(self.train_dataset) / (self._train_batch_size * self.args.world_size)
        drop = self.args.dataloader_drop_last or self.args.repeated_augmentation > 1
        return math.ceil((math.floor(batches) if drop else math.ceil(batches)) / self.args.gradient_accumulation_steps)


@contextmanager
def _named(wanted: str, seen: str, argument: str) -> Iterator[None]:
    """Raises ValueError, in one sentence, for what torch or transformers say of a wrong argument."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # an ImportError says what to install
        raise ValueError(f"{wanted}, got {seen} ({one_line(error)}); correct {argument}, or choose another.") from error


def _numbers(values: list[float]) -> str:
    """Each once, in their order."""
    return " and ".join(f"{value:g}" for value in dict.fromkeys(map(float, values)))


def check_optimization(args: MixupTrainingArguments, model: MixupModel, data: Any, optimizers: tuple) -> None:
    """Raises ValueError for settings that an optimizer or a schedule given by the user, a data set without length, or a method without a mixer would ignore."""
    optimizer, scheduler = optimizers
    mixer = [name for name in MIXER_FIELDS if getattr(args, name) is not None]
    if mixer and not any(".mixer." in name for name, _ in model.states.named_parameters()):
        raise ValueError(f"{mixer[0]} is for methods with a learned mixer, got {model.choice}; leave it out.")
    ours = [*mixer, *(["no_weight_decay"] if args.no_weight_decay is not None else [])]
    if optimizer is not None and ours:
        raise ValueError(f"{ours[0]} is for the Trainer's own optimizer, got one given as optimizers; set it in the groups of that one.")
    if args.own_schedule and scheduler is not None:
        raise ValueError(
            "min_lr, mixer_min_lr, lr_per_epoch and warmup_epochs are for the Trainer's own schedule, got one given as optimizers; drop one of them."
        )
    by_epoch = {"lr_per_epoch": args.lr_per_epoch, "warmup_epochs": args.warmup_epochs, "ema_warmup_epochs": args.ema_warmup_epochs}
    wanted = [name for name, value in by_epoch.items() if value]
    if wanted and data is not None and not has_length(data):
        raise ValueError(f"{wanted[0]} needs a data set with a length, got {type(data).__name__}; set steps instead, or leave it out.")
