"""The arguments of a pre-training: typed values override a recipe, which overrides the defaults."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from hf_mixup.arguments import DataArguments, MixupTrainingArguments, ModelArguments, RunArguments
from hf_mixup.cli.parser import Parser
from hf_mixup.cli.train import (
    DEFAULTS,
    NETWORK,
    REPLACED,
    TASKS,
    TOLD,
    check_installed,
    check_streaming,
    of_data,
    of_network,
    without_options,
)
from hf_mixup.core.places import RECIPES
from hf_mixup.pretraining.arguments import PreTrainingArguments
from hf_mixup.recipes import read_recipe
from hf_mixup.report.run_folder import hash_of

KINDS = (ModelArguments, DataArguments, RunArguments, PreTrainingArguments)
OWN = [f.name for f in fields(PreTrainingArguments) if f.name not in {g.name for g in fields(MixupTrainingArguments)}]
# arguments of training with labels that have no meaning here, beside those that PreTrainingArguments refuses
OF_LABELS = {
    "freeze_backbone": "there is no classifier to train",
    "ignore_mismatched_sizes": "no classifier is kept",
    "train_crop": "--views sets how images are cropped",
    "crop_scale": "--views sets how images are cropped",
    "train_resize": "--views sets how images are cropped",
    "auto_augment": "--views sets how images are augmented",
    "random_erasing": "--views sets how images are augmented",
    "train_image_size": "views have image_size",
    "report_dir": "the card and the pictures are in output_dir",
}
OF_KNN = ("eval_strategy", "eval_steps", "load_best_model_at_end", "metric_for_best_model", "knn_neighbours", "knn_temperature")
GROUPS = {
    "pre-training": ["mix", "alpha", "mix_args", *OWN, "mix_seed"],
    "model": ["model_name_or_path", "architecture", "model_type", "config_name", "drop_path", "sync_bn", "channels_last"],
    "data": [f.name for f in fields(DataArguments) if f.name not in OF_LABELS],
    "run": ["recipe", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "license"],
    "training": [
        "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay",
        "no_weight_decay", "lr_scheduler_type", "warmup_steps", "warmup_epochs", "min_lr", "lr_per_epoch", "optim", "optim_args", "seed", "bf16",
        "use_cpu",
    ],
}  # fmt: skip
SHORT = [
    "mix", "base", "base_args", "views", "model_name_or_path", "architecture", "dataset_name", "train_dir", "validation_dir", "image_size",
    "cache_images", "max_train_samples", *GROUPS["run"], "num_train_epochs", "per_device_train_batch_size", "learning_rate", "optim", "seed",
]  # fmt: skip
TOLD_HERE = {
    **TOLD,
    "output_dir": "Folder of the run. Default: runs/<base>-<mix>-<time>.",
    "recipe": "A YAML file of arguments, or the name of a recipe. Arguments on the command line override it. Default without a data set: pretrain_digits.",
}


def parser(prog: str = "run_pretraining.py") -> Parser:
    """The parser of the command line."""
    about = "Pre-trains an image network without labels, with mixing. Without arguments it trains on the embedded digits."
    usage = "[--base BASE] [--mix MIX] [--train_dir FOLDER] [...]"
    return Parser(KINDS, prog, usage, about, GROUPS, SHORT, TOLD_HERE, (*TASKS, *REPLACED), {"optim": ["lamb", "lars"]})


def settings(argv: list[str], prog: str = "run_pretraining.py") -> tuple[Parser, dict[str, Any], dict[str, Any], str]:
    """The parser; the values by name, where typed ones override the recipe, which overrides the defaults; the typed ones; the hash of the recipe.

    Raises ValueError in one sentence. Exits after the help, if it was requested.
    """
    reader = parser(prog)
    typed = reader.typed(argv)
    own_data = {"dataset_name", "train_dir", "validation_dir"} & set(typed)
    name, recipe = typed.get("recipe", None if own_data else "pretrain_digits"), {}
    if name is not None:
        known = {field.name for kind in KINDS for field in fields(kind) if field.init} - {"recipe"}
        network = [key for key in NETWORK if key in typed]
        recipe = read_recipe(name, RECIPES, known, typed.get("mix"), typed[network[0]] if network else None, usual=["imix"])
        recipe = of_network(of_data(recipe, typed), network)
        if typed.get("base", recipe.get("base")) != recipe.get("base"):
            recipe.pop("base_args", None)  # they belong to another base
        recipe = without_options(reader.converted(recipe, f"recipe {name!r}"), typed)
    values = {**DEFAULTS, **recipe, **typed, "recipe": name}
    reader.help_if_asked(typed, values)
    for key, why in OF_LABELS.items():
        if values.get(key):
            raise ValueError(f"--{key} has no effect on pre-training, got {values[key]!r}: {why}; leave it out.")
    return reader, values, typed, hash_of(recipe)


def parse(argv: list[str], prog: str = "run_pretraining.py") -> tuple[ModelArguments, DataArguments, RunArguments, PreTrainingArguments]:
    """The arguments of `settings` as dataclasses. Without an output folder, `output_dir` is None."""
    reader, values, typed, recipe_hash = settings(argv, prog)
    model, data, run, args = reader.built(values)
    if "output_dir" not in values:
        args.output_dir = None
    run.recipe_hash = recipe_hash
    if data.streaming:
        check_streaming(model, data, args, training=True)
    check_installed(args)
    args.knn_asked_by = [name for name in OF_KNN if name in typed]
    return model, data, run, args
