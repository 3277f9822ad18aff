"""The arguments of a training: typed values override a recipe, which overrides the defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from transformers import TrainingArguments

from hf_mixup.arguments import DataArguments, MixupTrainingArguments, ModelArguments, RunArguments, parse_json
from hf_mixup.cli.parser import Parser
from hf_mixup.core.checks import check_known
from hf_mixup.core.places import RECIPES
from hf_mixup.recipes import read_recipe
from hf_mixup.report.run_folder import hash_of

DEFAULTS = {
    "eval_strategy": "epoch",
    "logging_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": "none",
    "per_device_eval_batch_size": 64,
    "dataloader_pin_memory": torch.accelerator.is_available(),
}
TASKS = ("do_train", "do_eval", "do_predict")
Arguments = tuple[ModelArguments, DataArguments, RunArguments, MixupTrainingArguments]

_MIXING = [f.name for f in fields(MixupTrainingArguments) if f.name not in {g.name for g in fields(TrainingArguments)}]
_SCHEDULES = [name for name in _MIXING if name.startswith(("warmup_", "ema_", "min_lr", "lr_per", "no_weight", "repeated_"))]
_TEACHER = [name for name in _MIXING if "distil" in name]
_TRAINING = [
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "learning_rate", "weight_decay", "lr_scheduler_type", "warmup_steps", "optim", "seed", "bf16", "fast", "use_cpu",
]  # fmt: skip
_RUN = ["recipe", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", *TASKS, "push_to_hub", "hub_model_id", "license"]
GROUPS = {
    "mixing": [name for name in _MIXING if name not in (*_SCHEDULES, *_TEACHER, *_TRAINING) and not name.startswith("mixer_")],
    "model": [f.name for f in fields(ModelArguments)],
    "data": [f.name for f in fields(DataArguments)],
    "run": [*_RUN, *(f.name for f in fields(RunArguments) if f.name not in _RUN)],
    "training": _TRAINING,
    "schedules and averages": _SCHEDULES,
    "distillation": _TEACHER,
    "learned mixers": [name for name in _MIXING if name.startswith("mixer_")],
}
SHORT = (
    "mix", "mix_prob", "alpha", "mix_args", "loss", "mix_rate", "mix_off_epoch", "model_name_or_path", "architecture",
    "ignore_mismatched_sizes", "dataset_name", "train_dir", "validation_dir", "train_val_split", "image_size", "cache_images",
    "max_train_samples", "max_eval_samples", *_RUN, *_TRAINING,
)  # fmt: skip

# replaces transformers' help, which is about its own scripts
TOLD = {
    "output_dir": "Folder of the run. Default: runs/<methods>-<time>.",
    "resume_from_checkpoint": "True for the newest complete checkpoint of output_dir, or the folder of a checkpoint.",
    "do_train": "Train. Without --do_train, --do_eval and --do_predict: train and evaluate.",
    "do_eval": "Evaluate on the evaluation images. Without --do_train it measures a checkpoint unchanged.",
    "do_predict": "Write the prediction for every evaluation image to predict_results.txt. Its index counts the images that are evaluated: without rows that have no label, and with --max_eval_samples in the order of the draw.",
    "push_to_hub": "Push the run to the Hub at its end.",
    "hub_model_id": "Repository to push to. Default: the name of the folder.",
}

REPLACED = ("label_names",)  # --label_column_name names the labels


def parser(prog: str = "run_mixup.py") -> Parser:
    kinds = (ModelArguments, DataArguments, RunArguments, MixupTrainingArguments)
    usage = "[--mix METHOD ...] [--train_dir FOLDER] [...]"
    about = "Trains an image classifier with mixing. Without arguments it trains on the embedded digits."
    return Parser(kinds, prog, usage, about, GROUPS, SHORT, TOLD, REPLACED, choices={"optim": ["lamb"]})


def settings(argv: list[str], prog: str = "run_mixup.py") -> tuple[Parser, dict[str, Any], str]:
    """The parser; the values by name, where typed ones override the recipe, which overrides the defaults; the hash of the recipe.

    Raises ValueError in one sentence. Exits after the help, if it was requested.
    """
    reader = parser(prog)
    typed = reader.typed(argv)
    values, recipe = {**DEFAULTS, **typed}, {}
    network = [name for name in NETWORK if name in typed]
    if "recipe" not in typed:
        own = {"dataset_name", "train_dir", "validation_dir"} & set(typed)
        values["recipe"] = "digits" if not own else "finetune" if "model_name_or_path" in typed else "from_scratch"
    mix = typed.get("mix")
    if mix is not None and any("," in name for name in mix):
        raise ValueError(f"methods must be separated by spaces, got {' '.join(mix)!r}; write --mix {' '.join(mix).replace(',', ' ')}")
    if values["recipe"] is not None:
        recipe = read_recipe(values["recipe"], RECIPES, mix=mix, network=typed[network[0]] if network else None)
        recipe = of_network(of_data(recipe, typed), network)
        recipe = without_options(reader.converted(recipe, f"recipe {values['recipe']!r}"), typed)
        values = {**DEFAULTS, **recipe, **typed, "recipe": values["recipe"]}
    # as in transformers' scripts: only the requested tasks are done; if none is requested, training and evaluation
    asked = [name for name in TASKS if values.get(name)]
    for name in TASKS:
        values[name] = name in asked if asked else values.get(name, name != "do_predict")
    if not any(values[name] for name in TASKS):
        raise ValueError("a run must train, evaluate or predict, got do_train, do_eval and do_predict all false; leave one of them out.")
    if not values["do_eval"] and "eval_strategy" not in {**recipe, **typed}:
        values["eval_strategy"] = "no"
    reader.help_if_asked(typed, values)
    return reader, values, hash_of(recipe)


# arguments that name a network
NETWORK = ("model_name_or_path", "architecture", "model_type", "config_name")
# options of an argument, which have no meaning with another value of it
OPTIONS = {"optim": "optim_args", "lr_scheduler_type": "lr_scheduler_kwargs"}


def of_data(recipe: dict[str, Any], typed: dict[str, Any]) -> dict[str, Any]:
    """The recipe without its data set and the columns of that, if folders are typed."""
    if not {"train_dir", "validation_dir"} & set(typed):
        return recipe
    return {name: value for name, value in recipe.items() if not name.startswith("dataset_") and not name.endswith("_column_name")}


def of_network(recipe: dict[str, Any], typed: Sequence[str]) -> dict[str, Any]:
    """The recipe without its network, of either kind, if another one is `typed`: the names of those arguments."""
    replaced = ["model_name_or_path", "architecture"] if typed else []
    replaced += ["drop_path"] if typed and "architecture" not in typed else []  # which only those of an architecture have
    replaced += ["crop_ratio", "image_mean", "image_std"] if "model_name_or_path" in typed else []  # its image processor has its own
    return {name: value for name, value in recipe.items() if name not in replaced}


def without_options(recipe: dict[str, Any], typed: dict[str, Any]) -> dict[str, Any]:
    """The recipe without the options of an optimizer or a schedule that a typed one replaces, and without what is typed for all methods."""
    replaced = [options for name, options in OPTIONS.items() if name in typed and typed[name] != recipe.get(name)]
    recipe = {name: value for name, value in recipe.items() if name not in replaced}
    if recipe.get("mix_args"):
        own = parse_json("mix_args", recipe["mix_args"])
        recipe["mix_args"] = {
            method: {name: value for name, value in fields.items() if name not in {"alpha", "mode"} & set(typed)}
            for method, fields in own.items()
        }
    return recipe


def parse(argv: list[str], prog: str = "run_mixup.py") -> Arguments:
    """The arguments of `settings` as dataclasses. Without an output folder, `output_dir` is None."""
    reader, values, recipe_hash = settings(argv, prog)
    model, data, run, args = reader.built({name: value for name, value in values.items() if name not in TASKS})
    for name in TASKS:  # after transformers, which evaluates if there is an eval_strategy
        setattr(args, name, values[name])
    if "output_dir" not in values:
        args.output_dir = None
    run.recipe_hash = recipe_hash
    if args.resume_from_checkpoint and not args.do_train:
        raise ValueError(
            f"resume_from_checkpoint is for training, got {args.resume_from_checkpoint!r} without it; give the folder as --model_name_or_path."
        )
    if data.streaming:
        check_streaming(model, data, args, training=args.do_train)
    check_installed(args)
    return model, data, run, args


def check_installed(args: TrainingArguments) -> None:
    """Raises ValueError for trackers, and ways to compile, that this machine does not have."""
    from transformers.integrations import get_available_reporting_integrations

    for name in args.report_to or ():
        if name not in get_available_reporting_integrations():
            raise ValueError(f"report_to must name packages that are installed, got {name!r}; run `pip install {name}`, or leave it out.")
    if args.torch_compile_backend not in (None, "inductor"):
        from torch._dynamo import list_backends

        check_known("torch_compile_backend", args.torch_compile_backend, list_backends(exclude_tags=()))
    if args.torch_compile_mode not in (None, "default"):
        from torch._inductor import list_mode_options

        check_known("torch_compile_mode", args.torch_compile_mode, ["default", *list_mode_options()])


def check_streaming(model: ModelArguments, data: DataArguments, args: MixupTrainingArguments, training: bool) -> None:
    """Raises ValueError for settings that do not work with a stream, which has no length and is read in order."""
    if training and args.max_steps <= 0:
        raise ValueError(f"streaming needs max_steps, got {args.max_steps}; pass --max_steps.")
    if model.model_name_or_path is None and data.image_size is None:
        raise ValueError("streaming needs image_size, got neither that nor a checkpoint that has it; pass --image_size.")
    if args.repeated_augmentation != 1:
        raise ValueError(
            f"streaming shows each image once in a pass, got repeated_augmentation {args.repeated_augmentation}; leave it out."
        )
