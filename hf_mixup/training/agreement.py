"""Checks that model, arguments, collator and loss of a `MixupTrainer` agree on how to mix."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers.trainer_utils import HubStrategy, has_length

from hf_mixup.arguments import MixupTrainingArguments
from hf_mixup.core.losses import ClassBalanced, CrossEntropy, Loss, MultiHead
from hf_mixup.core.precision import bfloat16_ratio, has_bfloat16
from hf_mixup.core.secrets import keep_secret
from hf_mixup.data.callback import MixupCallback, check_label_names
from hf_mixup.data.collator import MixupCollator
from hf_mixup.data.dataset import class_counts_of
from hf_mixup.data.loss import MixupLoss
from hf_mixup.method import needs_of_model
from hf_mixup.methods import MethodChoice
from hf_mixup.model import MixupModel
from hf_mixup.networks.distillation import Distillation
from hf_mixup.networks.wrapping import as_classifier

logger = logging.getLogger(__name__)

CHOICE = ("mix", "mix_prob", "alpha", "mix_args", "mode", "loss", "mix_rate")


def changed(args: MixupTrainingArguments, *names: str) -> list[str]:
    """The names of those arguments that differ from their defaults."""
    fields = {field.name: field for field in dataclasses.fields(args)}
    defaults = {name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for name, f in fields.items()}
    return [name for name in names if getattr(args, name) != defaults[name]]


def counted(choice: MethodChoice, data: Any, num_labels: int, label_names: Sequence[str] | None = None) -> MethodChoice:
    """The choice with the class counts of the training set, if a method needs them. Raises ValueError if a loss needs them and they are unknown."""
    asking = choice.counting
    counts = class_counts_of(data, num_labels, label_names) if asking and data is not None else None
    if counts is not None:
        return choice.with_class_counts(counts)
    if asking and data is not None:
        if any(isinstance(method.loss, ClassBalanced) and method.loss.class_counts is None for method in choice.methods):
            raise ValueError(
                f"classbalanced needs the number of images of each class, got {type(data).__name__}, whose labels cannot be read; give "
                "class_counts with the loss."
            )
        logger.warning(
            "%s counts the classes of every batch, because the labels of %s cannot be read; give class_counts in mix_args",
            " and ".join(asking), type(data).__name__,
        )  # fmt: skip
    return choice


def agreed(
    network: nn.Module,
    args: MixupTrainingArguments,
    collator: MixupCollator | None = None,
    loss_func: Callable | None = None,
    data: Any = None,
    distillation: Distillation | None = None,
) -> MixupModel:
    """The MixupModel to train on `data`. It holds the settings that are used.

    Raises:
        ValueError: if two of them set mixing differently, or a setting would have no effect.
    """
    loss = args.loss
    if isinstance(loss_func, MixupLoss):
        if loss is not None:
            raise ValueError(f"the loss must be given once, got loss={loss!r} and compute_loss_func=MixupLoss(...); drop one.")
        loss_func.check_methods((args.method_choice() if collator is None else collator.choice).methods)
        loss = loss_func.loss
    network = network if isinstance(network, MixupModel) else as_classifier(network)
    num_labels = network.num_labels if isinstance(network, MixupModel) else network.config.num_labels
    count = functools.partial(counted, data=data, num_labels=num_labels, label_names=args.label_names)
    if isinstance(network, MixupModel):
        # counts that it was told by a Trainer were those of another data set
        asked = network.uncounted if network.choice is network.counted else network.choice
        network.uncounted, network.choice = asked, count(asked)
        network.counted = network.choice
    taught = {} if distillation is None else distillation.arguments()
    if collator is not None:
        collator.choice = count(collator.choice)
        model = _with_collator(network, args, collator, loss, count, taught)
    elif isinstance(network, MixupModel):
        model = network
        wanted = count(args.method_choice(loss))
        if (changed(args, *CHOICE) or loss is not None) and wanted != model.choice:
            _refuse(model.choice.to_dict(), wanted.to_dict())
        if changed(args, "mix_repeat") and args.mix_repeat != model.mix_repeat:
            _refuse(model.mix_repeat, args.mix_repeat, "mix_repeat")
    else:
        model = MixupModel(network, count(args.method_choice(loss)), mix_repeat=args.mix_repeat, ema_decay=args.ema_decay, **taught)
    if args.ema_decay is not None and args.ema_decay != model.ema_decay:
        _refuse(model.ema_decay, args.ema_decay, "ema_decay")
    known = None if model.distiller is None else model.distiller.how
    if distillation is not None and distillation != known:
        _refuse(None if known is None else dataclasses.asdict(known), dataclasses.asdict(distillation), "distillation")
    if args.ema_warmup_epochs and model.ema_decay is None:
        raise ValueError(f"ema_warmup_epochs is for ema_decay, got {args.ema_warmup_epochs} without it; set ema_decay.")
    if getattr(args, "activation_checkpointing", False) or getattr(
        args, "gradient_checkpointing", False
    ):  # the name depends on the release
        model.check_checkpointing(True)
    if args.neftune_noise_alpha is not None and model.get_input_embeddings() is None:
        raise ValueError(
            f"neftune_noise_alpha adds noise to the input embeddings of a network, got {type(model.backbone).__name__}, which has none; leave "
            "it out."
        )
    _check_losses(model)
    if loss_func is not None and not isinstance(loss_func, MixupLoss):
        _check_own_loss(model, args)
    return model


def _with_collator(
    network: nn.Module,
    args: MixupTrainingArguments,
    collator: MixupCollator,
    loss: Any,
    count: Callable[[MethodChoice], MethodChoice],
    taught: dict[str, Any],
) -> MixupModel:
    choice = MethodChoice.build(collator.choice.methods, collator.choice.probabilities, loss=loss, mix_rate=collator.choice.rate)
    choice = count(choice)  # with the counts in the loss
    dead = changed(args, *CHOICE, "mix_seed", "mix_repeat")
    dead = [name for name in dead if not (name == "loss" or (name == "mix_repeat" and args.mix_repeat == collator.mix_repeat))]
    if dead and (set(dead) - set(CHOICE) or count(args.method_choice(loss)) != choice):
        raise ValueError(
            f"mixing must be set once, got a MixupCollator and {dead[0]}={getattr(args, dead[0])!r}; set it in the collator, "
            "or leave out the collator, so that MixupTrainer mixes on the device."
        )
    losses = [method.loss.single() for method in choice.methods]
    other = next((method for method, loss in zip(choice.methods, losses, strict=True) if loss != losses[0]), None)
    if other is not None:  # a batch does not tell the model which of them mixed it
        raise ValueError(
            f"methods of a MixupCollator must have one loss, got {losses[0]} and, of {other.name!r}, {other.loss}; set loss for all, or leave out the "
            "collator, so that MixupTrainer mixes on the device."
        )
    check_label_names(args.label_names)
    off = args.mix_off_epoch
    if off is not None and off != int(off):
        raise ValueError(f"mix_off_epoch must be a whole number with a MixupCollator, because its workers prefetch, got {off}; round it.")
    if isinstance(network, MixupModel):
        if network.choice != choice or network.mix_repeat != collator.mix_repeat:
            own, other = ({**c.to_dict(), "mix_repeat": part.mix_repeat} for c, part in ((network.choice, network), (choice, collator)))
            _refuse(own, other)
        model = network
    else:
        model = MixupModel(network, choice, mix_repeat=collator.mix_repeat, ema_decay=args.ema_decay, **taught)
    if collator.outputs not in (None, model.num_labels):
        raise ValueError(
            f"the collator and the model must agree on num_labels, got {collator.outputs} and {model.num_labels}; make them equal."
        )
    return model


def _refuse(of_model: Any, of_arguments: Any, what: str = "") -> None:
    """Raises ValueError with the first setting that differs."""
    if isinstance(of_model, dict) and isinstance(of_arguments, dict):
        key = next(key for key in [*of_model, *of_arguments] if of_model.get(key) != of_arguments.get(key))
        _refuse(of_model.get(key), of_arguments.get(key), f"{what}.{key}" if what else key)
    if isinstance(of_model, list) and isinstance(of_arguments, list):
        pairs = list(zip(of_model, of_arguments, strict=False))
        if len(of_model) == len(of_arguments) and all(isinstance(part, dict) for pair in pairs for part in pair):
            _refuse(*next(pair for pair in pairs if pair[0] != pair[1]), what)
        of_model, of_arguments = (
            [part.get("name") if isinstance(part, dict) else part for part in side] for side in (of_model, of_arguments)
        )
    raise ValueError(
        f"the model and the arguments must agree on how to mix, got {what}={of_model!r} in the MixupModel and {of_arguments!r} in the "
        "arguments; leave it out of the arguments, or pass the network without MixupModel."
    )


def _check_losses(model: MixupModel) -> None:
    losses = [method.loss for method in model.choice.methods]
    first = losses[0]
    special = [loss for loss in losses if loss.regression or isinstance(loss, MultiHead)]
    if special and any(loss != special[0] for loss in losses):
        raise ValueError(f"methods that take turns must have the same loss, got {first} and {losses[-1]}; set loss for all.")
    if isinstance(first, MultiHead) and sum(first.classes) != model.num_labels:
        raise ValueError(
            f"the network must have one output for each of the {sum(first.classes)} classes of all heads, got num_labels={model.num_labels}; "
            "build it with their sum."
        )
    if model.num_labels < 2 and not (first.regression or first.multi_label):
        raise ValueError(
            f"{type(first).__name__} needs at least 2 outputs, got num_labels={model.num_labels}; set loss='bce' for a single yes or no, 'mse' for a number."
        )
    if special:
        for method in model.choice.methods:
            if needs_of_model(method):
                raise ValueError(
                    f"{type(special[0]).__name__} works with methods that mix by images only, got {method.name!r}, which needs "
                    f"{' and '.join(needs_of_model(method))}; use another method."
                )


def _check_own_loss(model: MixupModel, args: MixupTrainingArguments) -> None:
    """compute_loss_func replaces the loss. Raises ValueError if a setting of the loss would have no effect."""
    if args.loss is not None:
        raise ValueError(f"the loss must be given once, got loss={args.loss!r} and compute_loss_func; drop one.")
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor has no effect with compute_loss_func, got {args.label_smoothing_factor}; smooth in the function."
        )
    if model.distiller is not None:
        raise ValueError(
            f"compute_loss_func replaces the loss, got a teacher {model.distiller.how.teacher!r}, whose predictions would have no effect; set loss, or leave "
            "out the teacher."
        )
    for method in model.choice.methods:
        own = method.step.rows is None or method.loss != CrossEntropy() or method.sample.clean_lam or method.label.clean_lam
        if own:
            raise ValueError(
                f"compute_loss_func replaces the loss, got {method.name!r}, whose training step has its own losses; "
                "set loss, or use another method."
            )


def check_fsdp(plugin: Any, args: MixupTrainingArguments) -> None:
    """Raises ValueError for settings of FSDP that save only shards, and for noise on sharded embeddings."""
    if args.neftune_noise_alpha is not None:
        raise ValueError(f"neftune_noise_alpha must be left out under FSDP, got {args.neftune_noise_alpha}; leave it out, or use DDP.")
    if "FULL" not in str(plugin.state_dict_type):
        raise ValueError(
            f"FSDP must gather the weights that it saves, got {plugin.state_dict_type}, which saves no whole model; set fsdp_state_dict_type to "
            "FULL_STATE_DICT."
        )


def check_functions(**functions: Any) -> None:
    """Refuses what cannot be called; classes too, where a call would make another instance."""
    for name, function in functions.items():
        if function is not None and (isinstance(function, type) or not callable(function)):
            way_out = f"write {function.__name__}(...)" if isinstance(function, type) else "give one"
            raise TypeError(f"{name} must be a function, or an object that can be called, got {function!r}; {way_out}.")


def check_callback(callback: Any) -> None:
    if isinstance(callback, MixupCallback) or callback is MixupCallback:
        raise ValueError("MixupTrainer mixes by itself, got a MixupCallback too; leave it out, or give its MixupCollator as data_collator.")


def check_callable(loss_func: Callable | None) -> None:
    if loss_func is None or isinstance(loss_func, MixupLoss):
        return
    called = loss_func.forward if isinstance(loss_func, nn.Module) else loss_func
    parameters = inspect.signature(called).parameters.values()
    if "num_items_in_batch" not in {p.name for p in parameters} and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"compute_loss_func must take (outputs, labels, num_items_in_batch), got {list(inspect.signature(called).parameters)}; "
            "add num_items_in_batch=None, and divide the sum by it if it is given."
        )


def check_no_processor(collator: MixupCollator) -> None:
    if collator.processor is not None:
        raise ValueError(
            f"processor of a MixupCollator is for a stock Trainer, got {type(collator.processor).__name__} with MixupTrainer, whose data set defines "
            "how bytes are normalised; leave it out, and give an ImageDataset with on_device=True."
        )


def distillation_of(args: MixupTrainingArguments, teacher: str | os.PathLike | None) -> Distillation | None:
    """The distillation from the teacher of the Trainer, or of its arguments, which stay unchanged: another Trainer may share them."""
    if teacher is None:
        return args.distillation()
    if isinstance(teacher, nn.Module):
        raise TypeError(
            f"teacher must be the Hub id or folder of a classifier, which a checkpoint can record by name, got {type(teacher).__name__}; save it with "
            "save_pretrained, and pass the folder."
        )
    if args.distill_from not in (None, str(teacher)):
        raise ValueError(f"the teacher must be given once, got {str(teacher)!r} and distill_from={args.distill_from!r}; drop one.")
    return Distillation.of(str(teacher), args.distillation_temperature, args.distillation_weight, args.hard_distillation)


def loss_of(model: MixupModel) -> Loss:
    """The loss, which also defines the labels. Methods that take turns have the same."""
    return model.choice.methods[0].loss


def check_arguments(args: Any, data: Any, callbacks: list | None) -> None:
    """Refuses arguments that the Trainer would accept, but that would not train what was meant."""
    if not isinstance(args, MixupTrainingArguments):
        raise TypeError(
            f"args must be MixupTrainingArguments, got {type(args).__name__}; use MixupTrainingArguments instead, which takes every argument of TrainingArguments."
        )
    keep_secret(args.hub_token)
    if args.bf16 and args.device.type == "cpu" and not has_bfloat16() and (ratio := bfloat16_ratio()) > 1:
        logger.warning(
            "bf16 is emulated by this CPU, where a convolution takes %.1f times as long as in float32 (measured now); leave out --bf16",
            ratio,
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"one process drives one GPU, got {args.n_gpu} GPUs in one process; start the script with `accelerate launch`, or set CUDA_VISIBLE_DEVICES."
        )
    for callback in callbacks or []:
        check_callback(callback)
    if isinstance(data, (str, Mapping)):
        found = f"{type(data).__name__} of {', '.join(map(str, data))}" if isinstance(data, Mapping) else repr(data)
        raise TypeError(f"train_dataset must be one data set, got {found}; give a split of it, such as data['train'].")
    if data is not None and not has_length(data) and args.max_steps <= 0:
        raise ValueError(f"a data set without length needs max_steps, got {type(data).__name__} and {args.max_steps}; set max_steps.")
    if args.hub_strategy == HubStrategy.ALL_CHECKPOINTS:
        args.hub_always_push = True  # otherwise a checkpoint is skipped while an earlier one is being pushed
