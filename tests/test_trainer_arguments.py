"""Every field of TrainingArguments and every parameter of Trainer: as effective as in the stock Trainer, or refused."""

import dataclasses
import inspect
from pathlib import Path

import accelerate
import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_mixup import MixupTrainer, MixupTrainingArguments
from hf_mixup.data.processor import ImageFormat
from refusals import refuses
from small import Images, difference, resnet, vit, weights

BASE = {
    "per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 3e-3, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
    "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 3, "remove_unused_columns": False,
}  # fmt: skip
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
SAVED = {"save_strategy": "steps", "save_steps": 1}
WORKERS = {"dataloader_num_workers": 1}
TIMES = ("_runtime", "_per_second", "_time", "mem_")


# a value that is not the default, and what else it takes to have an effect: trained with it, both Trainers do the same
SAME = {
    "per_device_train_batch_size": (5, {}),
    "num_train_epochs": (2.0, {"max_steps": -1}),
    "max_steps": (2, {}),
    "learning_rate": (1e-2, {}),
    "lr_scheduler_type": ("cosine", {}),
    "lr_scheduler_kwargs": ({"num_cycles": 2}, {"lr_scheduler_type": "cosine_with_restarts"}),
    "warmup_steps": (2, {}),
    "optim": ("adafactor", {}),
    "optim_args": ("momentum=0.5", {"optim": "sgd"}),
    "weight_decay": (0.5, {}),
    "adam_beta1": (0.1, {}),
    "adam_beta2": (0.1, {}),
    "adam_epsilon": (1e-2, {}),
    "gradient_accumulation_steps": (2, {}),
    "max_grad_norm": (0.1, {}),
    "label_smoothing_factor": (0.5, EVALUATED),
    "bf16": (True, EVALUATED),
    "bf16_full_eval": (True, {}),
    "activation_checkpointing": (True, {}),
    "activation_checkpointing_kwargs": ({"use_reentrant": False}, {"activation_checkpointing": True}),
    "torch_empty_cache_steps": (1, {}),
    "auto_find_batch_size": (True, {}),
    "logging_strategy": ("epoch", {}),
    "logging_steps": (2, {}),
    "logging_first_step": (True, {"logging_steps": 2}),
    "include_num_input_tokens_seen": ("all", {}),
    "disable_tqdm": (False, {}),
    "eval_strategy": ("steps", {"eval_steps": 2}),
    "eval_steps": (2, {"eval_strategy": "steps"}),
    "eval_delay": (2, EVALUATED),
    "per_device_eval_batch_size": (3, EVALUATED),
    "prediction_loss_only": (True, EVALUATED),
    "eval_on_start": (True, EVALUATED),
    "eval_do_concat_batches": (False, EVALUATED),
    "eval_use_gather_object": (True, EVALUATED),
    "eval_accumulation_steps": (1, EVALUATED),
    "include_for_metrics": (["inputs", "loss"], EVALUATED),
    "batch_eval_metrics": (True, EVALUATED),
    "save_only_model": (True, SAVED),
    "save_strategy": ("steps", {"save_steps": 2}),
    "save_steps": (2, {"save_strategy": "steps"}),
    "save_on_each_node": (True, SAVED),
    "save_total_limit": (1, SAVED),
    "enable_jit_checkpoint": (True, {}),
    "load_best_model_at_end": (True, {**EVALUATED, **SAVED}),
    "metric_for_best_model": ("eval_accuracy", {**EVALUATED, **SAVED, "load_best_model_at_end": True}),
    "greater_is_better": (False, {**EVALUATED, **SAVED, "load_best_model_at_end": True, "metric_for_best_model": "eval_accuracy"}),
    "full_determinism": (False, {}),
    "seed": (4, {}),
    "data_seed": (5, {}),
    "accelerator_config": ({"split_batches": True}, {}),
    "dataloader_num_workers": (1, {}),
    "dataloader_pin_memory": (True, {}),
    "dataloader_persistent_workers": (True, WORKERS),
    "dataloader_prefetch_factor": (3, WORKERS),
    "dataloader_multiprocessing_context": ("fork", WORKERS),
    "dataloader_in_order": (False, WORKERS),
    "remove_unused_columns": (True, {}),
    "label_names": (["labels"], EVALUATED),
    "train_sampling_strategy": ("sequential", {}),
    "skip_memory_metrics": (False, {}),
    "debug": ("underflow_overflow", {}),
    "use_cache": (True, {}),
    "report_to": ("none", {}),
    "run_name": ("a run", {}),
    "log_level": ("error", {}),
    "log_level_replica": ("error", {}),
    "log_on_each_node": (False, {}),
    "restore_callback_states_from_checkpoint": (True, {}),
    "output_dir": (None, {}),
    "use_cpu": (True, {}),
    "average_tokens_across_devices": (False, {"gradient_accumulation_steps": 2}),
    "fp16": (True, {}),
    "fp16_full_eval": (True, {}),
    "neftune_noise_alpha": (5.0, {}),
    "length_column_name": ("size", {"train_sampling_strategy": "group_by_length"}),
    # accelerate has it from 1.10 on
    "parallelism_config": (getattr(accelerate, "ParallelismConfig", lambda: None)(), {}),
    "ddp_timeout": (77, {}),
    "local_rank": (0, {}),
    "do_train": (True, {}),
    "do_eval": (True, {}),
    "do_predict": (True, {}),
}
# what else the stock Trainer refuses where a library, an accelerator or a second process is not there: both run alike, or refuse alike
ALIKE = {
    "tf32": (True, {}),
    "use_liger_kernel": (True, {}),
    "liger_kernel_config": ({"rope": True}, {"use_liger_kernel": True}),
    "optim_target_modules": ("all-linear", {"optim": "galore_adamw"}),
    "project": ("one", {"report_to": "trackio"}),
    "trackio_space_id": ("one", {"report_to": "trackio"}),
    "trackio_bucket_id": ("one", {"report_to": "trackio"}),
    "trackio_static_space_id": ("one", {"report_to": "trackio"}),
    "deepspeed": ({"train_batch_size": 4}, {}),
    "ddp_backend": ("gloo", {}),
    "fsdp": (True, {}),
    "fsdp_config": ({"version": 2}, {"fsdp": True}),
}
# needs a Hub, or a second process: the test that sets it
ELSEWHERE = {
    "push_to_hub": "test_hub.py",
    "hub_token": "test_hub.py",
    "hub_private_repo": "test_hub.py",
    "hub_model_id": "test_hub.py",
    "hub_strategy": "test_hub.py",
    "hub_revision": "test_hub.py",
    "ddp_bucket_cap_mb": "scripts/uneven.py",
    "ddp_broadcast_buffers": "scripts/uneven.py",
    "ddp_static_graph": "scripts/uneven.py",
}
# MixupTrainer does otherwise, on purpose
OTHERWISE = {
    "logging_nan_inf_filter": "a loss that is not finite ends the run (fault row 30)",
    "dataloader_drop_last": "of training alone: evaluation sees every image (test_evaluation_and_prediction_see_every_image)",
    "hub_always_push": "set by hub_strategy all_checkpoints (tests/test_hub.py)",
    "resume_from_checkpoint": "of scripts, as in transformers; train() is strict (tests/test_resume.py)",
    "ignore_data_skip": "keys follow from the step, the order of the data as in the stock Trainer (tests/test_resume.py)",
    "ddp_find_unused_parameters": "set where a batch may leave a mixer out (test_processes_look_for_unused_parameters)",
    "torch_compile": "compiles the backbone alone (tests/test_trainer.py, tests of passes)",
    "torch_compile_backend": "the same",
    "torch_compile_mode": "the same",
    "gradient_checkpointing": "the older name of activation_checkpointing",
    "gradient_checkpointing_kwargs": "the older name of activation_checkpointing_kwargs",
}

# fields that the oldest transformers lacks
for newer in ("activation_checkpointing", "activation_checkpointing_kwargs"):
    if newer not in {field.name for field in dataclasses.fields(TrainingArguments)}:
        del SAME[newer]


def test_no_field_is_left_out():
    fields = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    tables = (SAME, ALIKE, OTHERWISE, ELSEWHERE)
    assert fields == set().union(*tables), "a field that is new in transformers needs a place in these tables"
    assert sum(map(len, tables)) == len(fields), "one place"
    for field, file in ELSEWHERE.items():
        assert field in (Path(__file__).parent / file).read_text()


def by_images(outputs, labels, num_items_in_batch=None):
    """The loss of an accumulated batch, which the stock Trainer leaves to a function."""
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def accuracy(prediction, compute_result=True):
    scores = prediction.predictions
    scores, labels = (scores, prediction.label_ids) if not isinstance(scores, list) else (scores[0], prediction.label_ids[0])
    return {"accuracy": float((scores.argmax(-1) == labels).mean() if not isinstance(scores, torch.Tensor) else 0.5), "inputs": float(prediction.inputs is not None)}  # fmt: skip


def outcome(cls, settings, folder, **keep):
    """All that can be seen of a run: logs, checkpoints, weights, an evaluation."""
    parameters = {"train_dataset": Images(18), "eval_dataset": Images(7, seed=1), "compute_metrics": accuracy, **keep}
    ours = issubclass(cls, MixupTrainer)
    kind = MixupTrainingArguments if ours else TrainingArguments
    if not ours and not settings.get("label_smoothing_factor"):
        parameters.setdefault("compute_loss_func", by_images)
    settings = {**BASE, **settings, "output_dir": str(folder), **({"mix": ["vanilla"]} if ours else {})}
    model = None if "model_init" in keep else parameters.pop("model", None) or vit()
    run = cls(model, kind(**settings), **parameters)
    run.train()
    rows = [{k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in run.state.log_history]
    metrics = {k: v for k, v in run.evaluate().items() if not any(t in k for t in TIMES)}
    network = run.model.backbone if ours else run.model
    return rows, metrics, sorted(path.name for path in folder.glob("checkpoint-*")), weights(network), run.state.num_input_tokens_seen, run


def assert_same(ours, theirs, rel=2e-4):
    for row, other in zip(ours[0], theirs[0], strict=True):
        row = {k: v for k, v in row.items() if k in other}
        assert row == pytest.approx(other, rel=rel, abs=1e-6)
    assert {k: ours[1][k] for k in theirs[1]} == pytest.approx(theirs[1], rel=rel, abs=1e-6)
    assert ours[2] == theirs[2]
    assert difference(ours[3], theirs[3]) < 1e-4
    assert ours[4] == theirs[4]


@pytest.mark.parametrize("field", [f for f in SAME if f != "output_dir"])
def test_a_field_does_what_it_does_in_the_stock_trainer(tmp_path, field):
    value, rest = SAME[field]
    settings = {**rest, field: value}
    keep = {"train_dataset": sized(), "eval_dataset": sized(), "data_collator": collate} if field == "length_column_name" else {}
    ours, theirs = (outcome(cls, settings, tmp_path / cls.__name__, **keep) for cls in (MixupTrainer, Trainer))
    if field == "load_best_model_at_end" or rest.get("load_best_model_at_end"):
        # finding F1 of tests/test_trainer.py: the stock Trainer does not put a ViT's best weights back
        ours, theirs = ((rows, {}, names, {}, tokens) for rows, _, names, _, tokens, _ in (ours, theirs))
        assert ours[0][-1]["step"] == theirs[0][-1]["step"]
        assert ours[2] == theirs[2]
        return
    # the loss is taken in float32, where the stock Trainer takes that of half precision logits in half precision
    assert_same(ours, theirs, rel=5e-3 if field in ("bf16_full_eval", "fp16_full_eval") else 2e-4)


@pytest.mark.parametrize("field", ALIKE)
def test_a_field_that_cannot_work_here_is_refused_as_by_the_stock_trainer(tmp_path, field):
    value, rest = ALIKE[field]
    found = []
    for cls in (MixupTrainer, Trainer):
        try:
            found.append(outcome(cls, {**rest, field: value}, tmp_path / cls.__name__))
        except (ValueError, ImportError, RuntimeError) as error:
            found.append((type(error), str(error)))
    if isinstance(found[1][0], type):
        assert found[0] == found[1]
    else:
        assert_same(*found)


def test_noise_on_embeddings_needs_embeddings(tmp_path):
    with refuses("neftune_noise_alpha adds noise to the input embeddings of a network, got ResNetForImageClassification, which has none"):
        outcome(MixupTrainer, {"neftune_noise_alpha": 5.0}, tmp_path, model=resnet())


@pytest.mark.parametrize("field", [f for f in SAME if f not in ("output_dir", "use_cpu")])
def test_the_arguments_keep_what_was_set(tmp_path, field):
    value, rest = SAME[field]
    args = MixupTrainingArguments(**{**BASE, **rest, field: value, "output_dir": str(tmp_path), "mix": ["vanilla"]})
    plain = TrainingArguments(**{**BASE, **rest, field: value, "output_dir": str(tmp_path)})
    before = getattr(plain, field)
    MixupTrainer(vit(), args, train_dataset=Images(8), eval_dataset=Images(8))
    assert str(getattr(args, field)) == str(before)


def test_processes_look_for_unused_parameters(tmp_path):
    def wanted(**changes):
        args = MixupTrainingArguments(**{**BASE, **changes, "output_dir": str(tmp_path)})
        MixupTrainer(vit(), args, train_dataset=Images(8))
        return args.ddp_find_unused_parameters

    assert wanted(mix=["automix"]) is None
    assert wanted(mix=["mixup"], mix_rate=0.5) is None
    for changes in ({"mix_rate": 0.5}, {"mix_off_epoch": 1.0}, {"mix": ["automix", "cutmix"]}):
        assert wanted(**{"mix": ["automix"], **changes}) is True


class Count(TrainerCallback):
    def __init__(self):
        self.steps = 0

    def on_step_end(self, *args, **kwargs):
        self.steps += 1


def collate(examples):
    return {"pixel_values": torch.stack([e["pixel_values"] for e in examples]) * 2, "labels": torch.tensor([e["labels"] for e in examples])}


def sized():
    """Images of several sizes on paper, by which batches are grouped."""
    images = Images(18)
    return Dataset.from_dict(
        {"pixel_values": images.pixels.tolist(), "labels": images.labels.tolist(), "size": list(range(18))}
    ).with_transform(lambda rows: {name: [torch.tensor(value) for value in values] for name, values in rows.items()})


PARAMETERS = {
    "model": lambda: vit(num_labels=5),
    "data_collator": lambda: collate,
    "train_dataset": lambda: Images(18, seed=7),
    "eval_dataset": lambda: {"a": Images(5, seed=8), "b": Images(6, seed=9)},
    "model_init": lambda: lambda: vit(num_labels=6),
    "compute_loss_func": lambda: lambda outputs, labels, num_items_in_batch=None: 3 * by_images(outputs, labels, num_items_in_batch),
    "compute_metrics": lambda: lambda prediction: {"seven": 7.0},
    "optimizer_cls_and_kwargs": lambda: (torch.optim.SGD, {"lr": 0.1}),
    "preprocess_logits_for_metrics": lambda: lambda logits, labels: logits.flip(-1),
}
# with tests of their own, below
OWN = {"args", "processing_class", "callbacks", "optimizers"}


def test_no_parameter_is_left_out():
    assert set(inspect.signature(Trainer.__init__).parameters) - {"self"} == PARAMETERS.keys() | OWN
    ours = [name for name in inspect.signature(MixupTrainer.__init__).parameters if name not in ("self", "kwargs")]
    assert ours == list(inspect.signature(Trainer.__init__).parameters)[1 : len(ours) + 1], "positional ones are in their places"


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_a_parameter_does_what_it_does_in_the_stock_trainer(tmp_path, parameter):
    given = [{parameter: PARAMETERS[parameter]()} for _ in range(2)]
    ours, theirs = (
        outcome(cls, EVALUATED, tmp_path / cls.__name__, **keep) for cls, keep in zip((MixupTrainer, Trainer), given, strict=True)
    )
    assert_same(ours, theirs)
    if parameter != "model":
        changed = outcome(MixupTrainer, EVALUATED, tmp_path / "plain")
        assert (ours[0], ours[1]) != (changed[0], changed[1]), "it has an effect at all"


def test_the_other_parameters(tmp_path):
    count, model = Count(), vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    processor = ImageFormat(16).processor()
    *_, run = outcome(
        MixupTrainer, {}, tmp_path, model=model, callbacks=[count], optimizers=(optimizer, schedule), processing_class=processor
    )
    assert count.steps == 3
    assert run.state.log_history[0]["learning_rate"] == 0.25
    run.save_model()
    assert (tmp_path / "preprocessor_config.json").is_file()
    with refuses("args must be MixupTrainingArguments, got TrainingArguments", TypeError):
        MixupTrainer(vit(), TrainingArguments(str(tmp_path), use_cpu=True))
