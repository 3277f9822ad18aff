"""The settings of a user: training arguments with mixing, and the other arguments of the command line."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_tf32_available

from hf_mixup.core.checks import (
    check_between,
    check_count,
    check_decay,
    check_known,
    check_listed,
    check_pairs,
    check_patterns,
    check_range,
    check_switch,
    from_json,
    one_line,
)
from hf_mixup.core.losses import Loss
from hf_mixup.core.rng import MODES
from hf_mixup.core.schedule import as_json, schedule_of
from hf_mixup.method import Method
from hf_mixup.methods import METHODS, MethodChoice
from hf_mixup.networks.distillation import Distillation

if TYPE_CHECKING:
    Probabilities, Rate = list[Any], float | list | dict
else:  # words of a command line, which may be numbers or JSON
    Probabilities, Rate = list[str], dict | str | list


# of transformers' own arguments, which takes most as they come: whole numbers by the least, numbers by their range
LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": -1,
    "save_total_limit": 1, "seed": 0, "dataloader_num_workers": 0, "dataloader_prefetch_factor": 1, "eval_accumulation_steps": 1,
    "data_seed": 0, "torch_empty_cache_steps": 1, "ddp_bucket_cap_mb": 1, "ddp_timeout": 1,
}  # fmt: skip
RANGES = {
    "learning_rate": (0, 1e6), "weight_decay": (0, 1e6), "adam_beta1": (0, 0.999999), "adam_beta2": (0, 0.999999999), "adam_epsilon": (0, 1),
    "max_grad_norm": (0, 1e9), "num_train_epochs": (0, 1e9), "warmup_steps": (0, 1e9), "label_smoothing_factor": (0, 1), "eval_delay": (0, 1e9),
    "logging_steps": (1e-9, 1e9), "eval_steps": (1e-9, 1e9), "save_steps": (1e-9, 1e9), "seed": (0, 2**32 - 1), "data_seed": (0, 2**63 - 1),
}  # fmt: skip


def value_of(choice: Any) -> str:
    """The word of a choice that transformers may have turned into a member of its enumeration."""
    return str(getattr(choice, "value", choice))


def check_numbers(args: Any) -> None:
    """Raises ValueError for numbers of a training that cannot be, before anything is loaded."""
    for name, least in LEAST.items():
        if getattr(args, name) is not None:
            check_count(least, **{name: getattr(args, name)})
    for name, (low, high) in RANGES.items():
        if isinstance(getattr(args, name), (int, float)):
            check_between(low, high, **{name: getattr(args, name)})


@dataclass
class MixupTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with mixing.

    Raises:
        ValueError: for methods, hyper-parameters and probabilities that contradict each other.
    """

    mix: list[str] = field(
        default_factory=lambda: ["mixup", "cutmix"],
        metadata={"help": f"One or several methods; each batch is mixed by one of them: {', '.join(METHODS)}."},
    )
    mix_prob: Probabilities | None = field(
        default=None,
        metadata={"help": "A probability for each method: a number, or a schedule as for mix_rate. Default: equal probabilities."},
    )
    alpha: list[float] | None = field(default=None, metadata={"help": "Alpha of each method, or one value for all."})
    mix_args: dict | str | None = field(
        default=None, metadata={"help": 'Other hyper-parameters by method, as JSON: \'{"cutmix": {"alpha": 0.2}}\'.'}
    )
    mode: str | None = field(
        default=None,
        metadata={
            "help": f"Which images share a draw of lam and box, for methods that allow it: {', '.join(MODES)} (the whole batch, as published)."
        },
    )
    loss: dict | str | None = field(
        default=None,
        metadata={
            "help": "Loss of all methods: crossentropy, bce, focal, mse, multihead, ... or JSON with its fields: "
            '\'{"name": "focal", "weight": [1, 1, 5]}\', \'{"name": "multihead", "classes": [3, 7]}\'.'
        },
    )
    mix_rate: Rate | None = field(
        default=1.0,
        metadata={
            "help": "Share of the batches that is mixed, 0 to 1, or a schedule as JSON: points of (epoch, share) such as "
            '[[0, 1], [60, 1], [100, 0]], with lines between them, or {"name": "withouthesitation"}.'
        },
    )
    mix_repeat: int = field(default=1, metadata={"help": "Number of independent mixtures of each batch; their losses are averaged."})
    mix_off_epoch: float | None = field(default=None, metadata={"help": "Train without mixing from this epoch on."})
    fast: bool = field(
        default=False,
        metadata={
            "help": "Train faster, with other rounding: fused optimizers, and on GPUs TF32 and torch.compile. --tf32 False, "
            "--torch_compile False and --optim_args fused=False turn a part off."
        },
    )
    torch_compile: bool | None = field(
        default=None, metadata={"help": "Compile the network with torch.compile, in place. Default: as set by --fast."}
    )
    mix_seed: int | None = field(default=None, metadata={"help": "Seed of all random draws for mixing. Default: `seed`."})
    min_lr: float | None = field(default=None, metadata={"help": "Learning rate at the end of a cosine schedule."})
    lr_per_epoch: bool = field(default=False, metadata={"help": "Change the learning rate of a cosine schedule once an epoch."})
    mixer_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of learned mixers. Default: learning_rate."})
    mixer_weight_decay: float | None = field(default=None, metadata={"help": "Weight decay of learned mixers. Default: weight_decay."})
    mixer_momentum: float | None = field(default=None, metadata={"help": "Momentum of learned mixers with SGD. Default: the optimizer's."})
    mixer_min_lr: float | None = field(default=None, metadata={"help": "Learning rate of learned mixers at the end of a cosine schedule."})
    warmup_epochs: float | None = field(
        default=None, metadata={"help": "Epochs in which the learning rate rises, at the start of a cosine over the whole run."}
    )
    warmup_start: float = field(default=0.0, metadata={"help": "Share of the learning rate at the start of warmup_epochs."})
    no_weight_decay: list[str] | None = field(
        default=None,
        metadata={
            "help": "Patterns for names of parameters without weight decay; 'none' decays all. Default, as in the Trainer: no decay for biases and LayerNorms, decay for BatchNorms."
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Evaluate and save an exponential moving average (EMA) of the weights, with this decay for each step, such as 0.9999."
        },
    )
    ema_warmup_epochs: float = field(default=0.0, metadata={"help": "Epochs in which ema_decay rises from 0.9 of its value to its value."})
    distill_from: str | None = field(
        default=None,
        metadata={
            "help": "Also learn from a teacher: the Hub id or folder of a classifier with the same classes. It sees the same mixtures."
        },
    )
    distillation_weight: float = field(default=0.5, metadata={"help": "Share of the teacher's term in the loss, 0 to 1."})
    distillation_temperature: float = field(default=1.0, metadata={"help": "Temperature of the softmax in the teacher's term."})
    hard_distillation: bool = field(
        default=False, metadata={"help": "Use the teacher's most probable class as a label, as DeiT does, instead of its probabilities."}
    )
    repeated_augmentation: int = field(
        default=1, metadata={"help": "Show this many augmentations of an image in a row. An epoch then has that many times fewer images."}
    )
    allow_method_change: bool = field(
        default=False, metadata={"help": "Resume from a checkpoint that was trained with other methods, seed or number of processes."}
    )
    remove_unused_columns: bool | None = field(
        default=False,
        metadata={
            "help": "Keep all columns: the collator chooses those that it needs. Dropping columns by the model's signature would drop the image."
        },
    )

    def __post_init__(self):
        self.mix = [self.mix] if isinstance(self.mix, (str, Method)) else self.mix
        check_listed("mix", self.mix, "of methods, whose shares mix_prob names")
        self.mix_args = parse_json("mix_args", self.mix_args)
        # the command line gives numbers as text
        self.mix_rate = as_json(schedule_of("mix_rate", 1.0 if self.mix_rate is None else self.mix_rate))
        if self.mix_prob is not None:
            check_listed("mix_prob", self.mix_prob, "with a probability for each method")
            self.mix_prob = [as_json(schedule_of("mix_prob", value)) if isinstance(value, str) else value for value in self.mix_prob]
        if isinstance(self.loss, str) and self.loss.lstrip().startswith("{"):
            self.loss = parse_json("loss", self.loss)
        if self.mode is not None:
            check_known("mode", self.mode, MODES)
        check_numbers(self)
        # words of a command line
        said = {"true": True, "false": None, "none": None}
        self.resume_from_checkpoint = said.get(str(self.resume_from_checkpoint).lower(), self.resume_from_checkpoint)
        for name in ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "liger_kernel_config"):
            if isinstance(getattr(self, name, None), str):
                setattr(self, name, parse_json(name, getattr(self, name), """JSON such as '{"a_name": 1}'"""))
        for name in ("accelerator_config", "fsdp_config", "deepspeed"):
            value = getattr(self, name)
            if isinstance(value, str) and value.lstrip().startswith("{"):
                parse_json(name, value, """JSON such as '{"a_name": 1}', or a file of it""")
            elif isinstance(value, str) and not os.path.isfile(value):
                raise ValueError(f"{name} must be JSON, or a file of it that exists, got {value!r}; check the path.")
        if self.optim_args:
            check_pairs("optim_args", self.optim_args, "momentum=0.9,nesterov=True")
        for name in self.include_for_metrics or ():
            check_known("include_for_metrics", name, ("inputs", "loss"))
        if value_of(self.save_strategy) == "best" and self.metric_for_best_model is None:
            raise ValueError("save_strategy 'best' needs metric_for_best_model, got none; pass --metric_for_best_model, such as top1.")
        check_count(1, mix_repeat=self.mix_repeat)
        if self.mix_off_epoch is not None:
            check_between(0, float("1e9"), mix_off_epoch=self.mix_off_epoch)
        self.distillation()
        check_count(1, repeated_augmentation=self.repeated_augmentation)
        check_between(0, 1, warmup_start=self.warmup_start)
        check_between(0, 1e6, ema_warmup_epochs=self.ema_warmup_epochs)
        check_switch(fast=self.fast, lr_per_epoch=self.lr_per_epoch, allow_method_change=self.allow_method_change)
        if self.mix_seed is not None:
            check_count(0, mix_seed=self.mix_seed)
        if self.no_weight_decay is not None:
            self.no_weight_decay = [self.no_weight_decay] if isinstance(self.no_weight_decay, str) else self.no_weight_decay
            check_patterns(no_weight_decay=self.no_weight_decay)
        if self.ema_decay is not None:
            check_decay(ema_decay=self.ema_decay)
        for name in ("min_lr", "mixer_learning_rate", "mixer_weight_decay", "mixer_momentum", "mixer_min_lr", "warmup_epochs"):
            if getattr(self, name) is not None:
                check_between(0, 1e6, **{name: getattr(self, name)})
        self.method_choice()
        # set automatically: without it transformers refuses bf16, and each of two processes looks for a GPU
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.fast and not self.use_cpu:
            self.torch_compile = True if self.torch_compile is None else self.torch_compile
            self.tf32 = True if self.tf32 is None and is_torch_tf32_available() else self.tf32
        self.torch_compile = bool(self.torch_compile)
        # transformers has no LAMB, and refuses unknown names
        lamb = self.optim == "lamb"
        self.optim = "adamw_torch" if lamb else self.optim
        if self.greater_is_better is None and re.search("(^|_)(mse|mae)$", self.metric_for_best_model or ""):
            self.greater_is_better = False  # transformers knows only of losses that less is better
        try:
            super().__post_init__()
        except (AttributeError, LookupError, TypeError) as error:  # its own sentences are ValueErrors and ImportErrors
            raise ValueError(
                f"every training argument must have a value that transformers takes, got an error of its checks ({one_line(error)}); correct the "
                "argument, or leave it out."
            ) from error
        self.optim = "lamb" if lamb else self.optim
        if self.warmup_epochs and self.warmup_steps:
            raise ValueError(
                f"only one of warmup_epochs and warmup_steps can be set, got {self.warmup_epochs} and {self.warmup_steps}; leave one out."
            )
        if self.own_schedule and self.lr_scheduler_type != "cosine":
            raise ValueError(
                f"min_lr, mixer_min_lr, lr_per_epoch and warmup_epochs are for lr_scheduler_type='cosine', got {str(self.lr_scheduler_type)!r}; set it."
            )
        if self.own_schedule and self.lr_scheduler_kwargs:
            raise ValueError(
                f"lr_scheduler_kwargs are for the Trainer's own schedules, got {self.lr_scheduler_kwargs} with min_lr, mixer_min_lr, lr_per_epoch or "
                "warmup_epochs; leave them out."
            )
        if self.warmup_start and not self.warmup_epochs:
            raise ValueError(f"warmup_start is for warmup_epochs, got {self.warmup_start} without it; set warmup_epochs.")
        if self.own_schedule and (self.learning_rate == 0 or self.mixer_learning_rate == 0):
            raise ValueError(
                "a cosine with a floor needs a learning rate above 0, got 0; set learning_rate, and mixer_learning_rate if given."
            )
        if lamb and self.optim_args:
            raise ValueError(f"optim_args has no effect on lamb, got {self.optim_args!r}; leave it out.")
        if self.label_smoothing_factor and self.loss is not None and not self.mixes:
            raise ValueError(
                f"label smoothing must be given once, got label_smoothing_factor={self.label_smoothing_factor} and loss={self.loss!r}; set it in the loss."
            )
        if self.mixes and self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor must be 0 when mixing, got {self.label_smoothing_factor}; smooth the mixed target with "
                '--loss \'{"name": "crossentropy", "smoothing": 0.1}\'.'
            )
        if self.mixes and self.per_device_train_batch_size < 2:
            raise ValueError("mixing needs at least 2 images in a batch, got per_device_train_batch_size=1; raise it.")

    def __getstate__(self) -> dict[str, Any]:
        # the Trainer pickles its arguments beside the model, and a push would publish the token
        return {**self.__dict__, "hub_token": None}

    def to_dict(self) -> dict[str, Any]:
        """The arguments as data for experiment trackers, including methods given as objects."""
        mix = [method.to_dict() if isinstance(method, Method) else method for method in self.mix]
        loss = {"name": type(self.loss).__name__.lower(), **asdict(self.loss)} if isinstance(self.loss, Loss) else self.loss
        kept = self.mix, self.loss
        try:
            self.mix, self.loss = mix, loss
            return super().to_dict()
        finally:
            self.mix, self.loss = kept

    @property
    def mixes(self) -> bool:
        return any((method.name if isinstance(method, Method) else method) != "vanilla" for method in self.mix)

    @property
    def own_schedule(self) -> bool:
        return self.lr_per_epoch or any(value is not None for value in (self.min_lr, self.mixer_min_lr, self.warmup_epochs))

    def distillation(self) -> Distillation | None:
        """The settings of the teacher, or None without one."""
        return Distillation.of(self.distill_from, self.distillation_temperature, self.distillation_weight, self.hard_distillation)

    def method_choice(self, loss: Any = None) -> MethodChoice:
        """The methods, with `loss` instead of the arguments' own loss if given."""
        loss = self.loss if loss is None else loss
        if loss is None and self.label_smoothing_factor:  # without mixing, label smoothing works as usual
            loss = {"name": "crossentropy", "smoothing": self.label_smoothing_factor}
        return MethodChoice.build(self.mix, self.mix_prob, self.alpha, self.mix_args, mode=self.mode, loss=loss, mix_rate=self.mix_rate)


def parse_json(name: str, value: Any, expected: str = """JSON such as '{"cutmix": {"alpha": 0.2}}'""") -> Any:
    """Parses JSON text into a dictionary; other values are returned unchanged. Raises ValueError."""
    if not isinstance(value, str):
        return value
    parsed = from_json(name, value, expected)
    if not isinstance(parsed, dict):
        raise ValueError(f"{name} must be a JSON object, got {value!r}; put it in braces.")
    return parsed


@dataclass
class ModelArguments:
    """Which network."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A checkpoint to start from: a Hub id or a folder, of transformers, timm or ours."}
    )
    architecture: str | None = field(
        default=None,
        metadata={
            "help": "A network from scratch: a name of timm or of the published tables (ResNet-18, DeiT-S, ...), or cifar_resnet20, vit_mini, ..."
        },
    )
    model_type: str | None = field(
        default=None, metadata={"help": "A network from scratch: a model type of transformers, such as vit or resnet, in its default size."}
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "A config to use instead of the checkpoint's. Without a checkpoint: a network from scratch with this config."},
    )
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of an image processor to use instead of the checkpoint's."}
    )
    drop_path: float = field(
        default=0.0, metadata={"help": "Stochastic depth: the probability that the last block of a network from scratch is skipped."}
    )
    sync_bn: bool = field(default=False, metadata={"help": "Compute batch norms over the batches of all GPUs."})
    channels_last: bool | None = field(
        default=None,
        metadata={
            "help": "Store the weights channels last in memory. Default: on for convolutional networks in half precision, which are faster so."
        },
    )
    freeze_backbone: bool = field(
        default=False, metadata={"help": "Train only the classifier; the rest of the network is frozen, in evaluation mode (linear probe)."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for downloads."})
    token: str | None = field(default=None, metadata={"help": "Hub token. Default: that of `hf auth login`."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code of the checkpoint's repository. Set it only if you trust that code."}
    )
    ignore_mismatched_sizes: bool = field(default=False, metadata={"help": "Start with a new classifier if the number of classes differs."})

    def __post_init__(self):
        given = [name for name in ("model_name_or_path", "architecture", "model_type") if getattr(self, name) is not None]
        given += ["config_name"] if self.config_name is not None and self.model_name_or_path is None else []
        if len(given) > 1:
            raise ValueError(f"a run must have one network, got {' and '.join(given)}; keep one of them.")
        if self.drop_path and given not in ([], ["architecture"]):
            raise ValueError(
                f"drop_path is for a network from scratch that architecture names, got {self.drop_path} with {given[0]}; leave it out."
            )


@dataclass
class DataArguments:
    """Which images."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A data set of the Hub, a folder of images, of parquet files or of save_to_disk, a file (csv, json, jsonl, parquet, arrow, "
            "tar of WebDataset), or 'digits' (embedded)."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the data set on the Hub."})
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read a data set of the Hub, a folder of parquet, arrow or WebDataset files, or one file during training, without a local copy; "
            "needs max_steps."
        },
    )
    train_split: str | None = field(
        default=None, metadata={"help": "Split to train on, or a slice of it, such as train[:10%]. Default: train."}
    )
    eval_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on, or a slice of it. Default: the first of validation, val, valid, dev, eval, test."},
    )
    allow_unseen_classes: bool = field(default=False, metadata={"help": "Allow evaluation images of classes that have no training images."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder of training images, with one folder for each class."})
    validation_dir: str | None = field(default=None, metadata={"help": "Folder of evaluation images, with one folder for each class."})
    train_val_split: float = field(
        default=0.15, metadata={"help": "Share of the training images to use for evaluation, if the data set has no evaluation split."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most this many images."})
    max_train_samples_per_class: int | None = field(
        default=None, metadata={"help": "Train on at most this many images of every class, chosen by the seed."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most this many images."})
    image_column_name: str | None = field(default=None, metadata={"help": "Column of the images. Default: the one of type Image."})
    label_column_name: str | None = field(default=None, metadata={"help": "Column of the classes. Default: the one of type ClassLabel."})
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side in pixels of the network's square images. Default: the checkpoint's; from scratch 32 or 64 if most images are that small, else 224."
        },
    )
    channels: int | None = field(
        default=None,
        metadata={"help": "Channels of the images: 1 for grey, 4 for RGBA, any number for arrays. Default: the checkpoint's, or 3."},
    )
    train_image_size: int | None = field(default=None, metadata={"help": "Side in pixels of the training images, if it is not image_size."})
    image_mean: list[float] | None = field(
        default=None,
        metadata={
            "help": "Mean of the normalisation of pixels in [0, 1], one value for each channel. Default: the checkpoint's, or ImageNet's."
        },
    )
    image_std: list[float] | None = field(default=None, metadata={"help": "Its standard deviation."})
    crop_ratio: float | None = field(
        default=None,
        metadata={
            "help": "From scratch: share of the resized image's side that evaluation keeps. Default: 0.875 if training crops at random sizes, else 1."
        },
    )
    train_crop: str | None = field(
        default=None,
        metadata={
            "help": "Crop of training images: pad (with zeros) or reflect, then crop; resized; or none. Default: pad up to 64 pixels, else resized."
        },
    )
    train_resize: int | None = field(
        default=None, metadata={"help": "Resize the shorter side of training images to this many pixels before the crop."}
    )
    crop_scale: list[float] | None = field(
        default=None, metadata={"help": "Smallest and largest share of the image in a resized crop. Default: 0.08 and 1."}
    )
    auto_augment: str | None = field(default=None, metadata={"help": "A policy of timm, such as rand-m9-mstd0.5-inc1."})
    random_erasing: float = field(default=0.0, metadata={"help": "Probability that a rectangle of a training image is replaced by noise."})
    horizontal_flip: bool | None = field(default=None, metadata={"help": "Flip training images at random. Default: on, except for digits."})
    cache_images: bool = field(
        default=False,
        metadata={"help": "Decode and resize all images before training, and keep them in the memory of every process. For small images."},
    )
    check_images: bool = field(
        default=False, metadata={"help": "Read all images once before training, and list those that cannot be read."}
    )

    def __post_init__(self):
        if self.dataset_name is not None and (self.train_dir is not None or self.validation_dir is not None):
            folder = f"train_dir {self.train_dir!r}" if self.train_dir is not None else f"validation_dir {self.validation_dir!r}"
            raise ValueError(
                f"only one of dataset_name and train_dir or validation_dir can be set, got {self.dataset_name!r} and {folder}; leave one out."
            )
        for name in ("dataset_config_name", "dataset_revision"):
            if self.dataset_name is None and getattr(self, name) is not None and (self.train_dir or self.validation_dir):
                raise ValueError(f"{name} is for dataset_name, got {getattr(self, name)!r} with folders of images; leave it out.")
        if self.streaming:
            whole = ("train_dir", "validation_dir", "cache_images", "check_images", "max_train_samples_per_class")
            refused = [f"{name} {getattr(self, name)!r}" for name in whole if getattr(self, name)]
            refused += ["dataset_name 'digits'"] if self.dataset_name == "digits" else []
            refused += [f"train_val_split {self.train_val_split}"] if self.train_val_split != type(self).train_val_split else []
            if refused:
                raise ValueError(f"streaming reads images in order from files or the Hub, got {refused[0]} with it; leave one of them out.")
        if not (isinstance(self.train_val_split, float) and 0 < self.train_val_split < 1):
            raise ValueError(f"train_val_split must be a share between 0 and 1, got {self.train_val_split}; give one such as 0.15.")
        if self.max_train_samples is not None and self.max_train_samples_per_class is not None:
            raise ValueError(
                f"only one of max_train_samples and max_train_samples_per_class can be set, got {self.max_train_samples} and "
                f"{self.max_train_samples_per_class}; leave one out."
            )
        counts = ("max_train_samples", "max_train_samples_per_class", "max_eval_samples", "channels", "image_size", "train_image_size",
                  "train_resize")  # fmt: skip
        check_count(1, **{name: getattr(self, name) for name in counts if getattr(self, name) is not None})
        for name in ("image_size", "train_image_size", "train_resize"):
            if getattr(self, name) == 1:
                raise ValueError(f"{name} must be a size that has a neighbourhood, of at least 2 pixels, got 1; give one such as 32.")
        check_between(0, 1, random_erasing=self.random_erasing)
        if self.crop_ratio is not None:
            check_between(0.01, 1, crop_ratio=self.crop_ratio)
        if self.crop_scale is not None:
            check_range(0, 1, crop_scale=self.crop_scale)
        for value in self.image_mean or ():
            check_between(0, 1, image_mean=value)
        for value in self.image_std or ():
            check_between(0.001, 1, image_std=value)
        if self.image_mean and self.image_std and len(self.image_mean) != len(self.image_std):
            raise ValueError(
                f"image_mean and image_std must have one value for each channel, got {len(self.image_mean)} and {len(self.image_std)}; "
                "give as many of both."
            )


# the fields of DataArguments that matter for training only
FOR_TRAINING = (
    "train_split", "max_train_samples", "max_train_samples_per_class", "train_image_size", "train_crop", "train_resize", "crop_scale", "auto_augment", "random_erasing",
    "horizontal_flip", "cache_images", "check_images", "streaming",
)  # fmt: skip


@dataclass
class RunArguments:
    """Recipe, output and report of a run."""

    recipe: str | None = field(
        default=None,
        metadata={
            "help": "A YAML file of arguments, or the name of a recipe. Arguments on the command line override it. Default: digits without a data "
            "set, finetune with a checkpoint, from_scratch without."
        },
    )
    report_dir: str | None = field(default=None, metadata={"help": "Folder for pictures of mixtures and masks. Default: output_dir."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start again in an output folder that is not empty; the files of the earlier run are removed."}
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence of the weights for the model card, such as mit. Default: that of the base model."}
    )
    recipe_hash: str | None = field(default=None, init=False)


def known_arguments() -> set[str]:
    """The names of the arguments of run_mixup.py, which a recipe may set."""
    kinds = (ModelArguments, DataArguments, RunArguments, MixupTrainingArguments)
    return {field.name for kind in kinds for field in fields(kind) if field.init} - {"recipe"}
