"""Edge cases of the training loop: overrides, second runs, shared objects, copies, and what is recorded."""

import copy
import pickle
import re

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_mixup import MixupCallback, MixupCollator, MixupLoss, MixupModel, MixupTrainer, MixupTrainingArguments
from hf_mixup.core.losses import CrossEntropy
from hf_mixup.data.dataset import ImageDataset, class_counts_of
from hf_mixup.data.processor import ImageFormat
from hf_mixup.evaluation.metrics import TrainerMetrics
from hf_mixup.methods import METHODS, MethodChoice
from hf_mixup.networks.families import freeze_backbone
from hf_mixup.training.callbacks import epoch_rows, results
from refusals import refuses
from small import Images, arguments, resnet, trainer, vit


def logged(run, key):
    return [row[key] for row in run.state.log_history if key in row]


# -- overrides --------------------------------------------------------------------------------------------------------------


def test_an_override_need_not_pass_on_how_many_images_there_are(tmp_path):
    class Own(MixupTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            return (loss, outputs) if return_outputs else loss

    runs = [
        cls(
            vit(),
            arguments(tmp_path, gradient_accumulation_steps=2, max_steps=2, logging_steps=1, optim="sgd"),
            train_dataset=Images(20),
        )
        for cls in (MixupTrainer, Own)
    ]
    for run in runs:
        run.train()
    assert logged(runs[1], "loss") == logged(runs[0], "loss")
    assert logged(runs[1], "grad_norm") == logged(runs[0], "grad_norm")


def test_an_optimizer_of_an_override_holds_every_parameter(tmp_path):
    class Own(MixupTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.AdamW(self.model.backbone.parameters())
            return self.optimizer

    with refuses(r"the optimizer must hold every parameter that is trained, got one that lacks 6, such as states\.automix"):
        Own(resnet(), arguments(tmp_path, mix=["automix"], max_steps=1), train_dataset=Images(8)).train()
    Own(resnet(), arguments(tmp_path, mix=["mixup"], max_steps=1), train_dataset=Images(8)).train()


def test_a_sampler_of_ones_own_says_how_long_an_epoch_is(tmp_path):
    class Own(MixupTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return torch.utils.data.WeightedRandomSampler([1.0] * 16, 48)

    run = Own(
        vit(),
        arguments(
            tmp_path, mix=["vanilla"], max_steps=-1, num_train_epochs=2, lr_scheduler_type="cosine", lr_per_epoch=True, logging_steps=1
        ),
        train_dataset=Images(16),
    )
    run.train()
    rates = logged(run, "learning_rate")
    assert len(rates) == 12
    assert rates == pytest.approx([3e-3] * 6 + [1.5e-3] * 6)


def pictures(count=8, on_device=False):
    pixels = torch.randint(0, 256, (count, 20, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"image": pixels.numpy().tolist(), "label": [row % 4 for row in range(count)]})
    return ImageDataset(data.with_format("numpy"), "image", "label", ImageFormat(16).train_transform(16), on_device=on_device)


def test_epochs_reach_the_data_of_a_loader_of_ones_own(tmp_path):
    data, seen = pictures(), []

    class Own(MixupTrainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(data, 8, collate_fn=self.data_collator)

        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(inputs["pixel_values"].clone())
            return super().compute_loss(model, inputs, *args, **kwargs)

    Own(vit(), arguments(tmp_path, max_steps=2), train_dataset=None).train()
    assert not torch.equal(*seen)


@pytest.mark.parametrize("label", ["label", "fine"])
def test_loaders_of_ones_own_may_name_labels_as_data_sets_do(tmp_path, label):
    images = Images(16)
    rows = [{"pixel_values": images.pixels[row], label: images.labels[row]} for row in range(16)]

    class Own(MixupTrainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(rows, 6)

        def get_eval_dataloader(self, eval_dataset=None):
            return torch.utils.data.DataLoader(rows, 6)

    changes = {"mix": ["vanilla"], "gradient_accumulation_steps": 3, "max_steps": 1, "logging_steps": 1, "label_names": [label]}
    own = Own(vit(), arguments(tmp_path, **changes), eval_dataset=rows)
    own.train()
    logits = vit()(images.pixels).logits
    assert logged(own, "loss") == [pytest.approx(nn.functional.cross_entropy(logits, images.labels).item(), rel=1e-5)]
    assert own.evaluate()["eval_loss"] > 0


def test_an_evaluation_of_bytes_by_an_override(tmp_path):
    class Own(MixupTrainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad():
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            return loss, outputs.logits, inputs["labels"]

    data = pictures(on_device=True)
    plain, own = (cls(vit(), arguments(tmp_path), eval_dataset=data).evaluate()["eval_loss"] for cls in (MixupTrainer, Own))
    assert own == plain


# -- optimizer and schedule -------------------------------------------------------------------------------------------------


def test_a_second_train_has_the_schedule_of_the_first(tmp_path):
    run = trainer(tmp_path, data=Images(16), lr_scheduler_type="cosine", min_lr=1e-4, max_steps=3, logging_steps=1)
    run.train()
    first = logged(run, "learning_rate")
    run.train()
    assert logged(run, "learning_rate") == first
    assert first[-1] < 0.4 * first[0]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_mixers_have_a_weight_decay_of_their_own(tmp_path, decay):
    run = trainer(tmp_path, resnet(), Images(8), mix=["automix"], max_steps=1, weight_decay=decay, mixer_weight_decay=0.3)
    names = {id(p): name for name, p in run.mixup_model.named_parameters()}
    run.create_optimizer()
    of = {names[id(p)]: group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    mixer = {name: value for name, value in of.items() if ".mixer." in name}
    assert {name: value for name, value in mixer.items() if "bias" not in name} == dict.fromkeys(
        [name for name in mixer if "bias" not in name], 0.3
    )
    assert not any(value for name, value in mixer.items() if "bias" in name)
    assert {value for name, value in of.items() if name not in mixer} == {0.0, decay}


def test_a_momentum_without_effect_is_refused(tmp_path):
    run = trainer(tmp_path, resnet(), Images(8), mix=["automix"], max_steps=1, mixer_momentum=0.5)
    with refuses("mixer_momentum is for optimizers that have a momentum, got AdamW"):
        run.train()


# -- what is recorded -------------------------------------------------------------------------------------------------------


def test_the_card_says_what_trained(tmp_path):
    def said(model=None, keep=None, **changes):
        run = MixupTrainer(
            vit() if model is None else model,
            arguments(tmp_path, **{"max_steps": 1, **changes}),
            train_dataset=Images(16),
            **(keep or {}),
        )
        run.train()
        return run._hyperparameters()

    network = vit()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.125, weight_decay=0.5)
    own = said(network, {"optimizers": (optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))})
    assert (own["learning rate"], own["optimizer"], own["schedule"]) == ("0.125", "SGD, weight decay 0.5", "ConstantLR")
    own = said(keep={"optimizer_cls_and_kwargs": (torch.optim.RMSprop, {"lr": 0.25})})
    assert (own["learning rate"], own["optimizer"]) == ("0.25", "RMSprop, weight decay 0")
    own = said(fp16=True, lr_scheduler_type="cosine", warmup_epochs=1, min_lr=1e-5)
    assert (own["precision"], own["schedule"]) == ("fp32", "cosine to 1e-05, 2 steps of warm-up")
    assert said(vit().bfloat16(), mix=["mixup"])["precision"] == "bf16 weights"
    assert said(bf16=True)["precision"] == "bf16"
    own = said(learning_rate=0.5, weight_decay=0.25, gradient_accumulation_steps=2)
    assert own["learning rate"] == "0.5"
    assert own["optimizer"].endswith("weight decay 0.25")
    assert own["batch size"] == "16, as 2 of 8"


def test_a_run_does_not_go_on_with_another_end_of_mixing_or_another_loss(tmp_path):
    def mean(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs.logits, labels)

    def run(loss=None, **changes):
        args = arguments(tmp_path, mix=["mixup"], **{"max_steps": 2, "save_strategy": "steps", "save_steps": 1, **changes})
        return MixupTrainer(vit(), args, train_dataset=Images(16), compute_loss_func=loss)

    run(mean, mix_off_epoch=1).train()
    for changes, message in (
        ({"loss": mean}, "mix_off_epoch: 1 then, null now"),
        ({"mix_off_epoch": 1}, 'compute_loss_func: "mean" then, null now'),
    ):
        with refuses(message):
            run(**changes).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    run(mean, mix_off_epoch=1).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_log_of_epochs_weighs_by_steps():
    history = [{"epoch": 0.1, "step": 1, "loss": 10.0}, {"epoch": 1.0, "step": 10, "loss": 0.0}, {"epoch": 2.0, "step": 20, "loss": 3.0}]
    assert [row["train_loss"] for row in epoch_rows(history)] == [1.0, 3.0]


def test_the_card_measures_the_weights_that_are_kept(tmp_path):
    (tmp_path / "all_results.json").write_text('{"eval_loss": 77.0, "eval_accuracy": 0.77}')
    run = trainer(
        tmp_path, resnet(), Images(16), Images(16, seed=1), max_steps=3, learning_rate=0.3, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True, mix=["vanilla"],
    )  # fmt: skip
    run.train()
    run.create_model_card()
    losses = logged(run, "eval_loss")
    assert losses[-1] < max(losses)
    assert f"{max(losses):.4f}" in (tmp_path / "README.md").read_text().split("## Training")[0]
    again = run.evaluate()["eval_loss"]
    assert again == pytest.approx(max(losses))
    assert results(run.state.log_history)["eval_loss"] == again
    assert epoch_rows(run.state.log_history)[-1]["eval_loss"] == losses[-1]


class Adding(TrainerCallback):
    """Adds a metric of its own, which is best after the second step."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_own"] = -abs(state.global_step - 2)


def test_a_metric_that_a_callback_adds_chooses_the_best(tmp_path):
    settings = {
        "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True,
        "metric_for_best_model": "own", "greater_is_better": True,
    }  # fmt: skip
    with refuses("metric_for_best_model must be a known name, got 'own'"):
        trainer(tmp_path / "none", resnet(), Images(16), Images(8), **settings).train()
    run = trainer(tmp_path / "one", resnet(), Images(16), Images(8), **settings)
    run.add_callback(Adding)
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")


@pytest.mark.parametrize("several", [False, True])
def test_other_data_sets_are_no_results_of_the_run(tmp_path, several):
    """Evaluated during and after the training: card and log have those of the Trainer's own data alone, one or several."""
    first, second, other = (Images(16, seed=seed) for seed in (1, 2, 3))

    class Looks(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            run.evaluate(other)

    own = {"a": first, "b": second} if several else first
    run = trainer(
        tmp_path, resnet(), Images(16), own, max_steps=2, mix=["vanilla"], eval_strategy="steps", eval_steps=2, callbacks=[Looks()]
    )
    run.train()
    measured = run.evaluate(first if not several else None)
    logs = (tmp_path / "train_log.jsonl").read_text()
    before = results(run.state.log_history)
    elsewhere = run.evaluate({"c": other, "d": first}) | run.evaluate(other)
    assert elsewhere["eval_loss"] != measured["eval_a_loss" if several else "eval_loss"]
    assert results(run.state.log_history) == before
    assert {name: measured[name] for name in measured if name.endswith("_loss")}.items() <= before.items()
    assert (tmp_path / "train_log.jsonl").read_text() == logs
    run.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert f"{elsewhere['eval_loss']:.4f}" not in card
    assert several or f"{measured['eval_loss']:.4f}" in card


def test_an_evaluation_that_was_broken_off_leaves_nothing():
    right, wrong = torch.eye(4), torch.eye(4).flip(0)

    class Batch:
        label_ids = torch.arange(4)

        def __init__(self, scores):
            self.predictions = scores

    measured = TrainerMetrics()
    measured(Batch(wrong), compute_result=False)
    assert measured(Batch(right))["top1"] == 1
    with pytest.raises(ValueError, match="dimension"):
        measured([measured(Batch(wrong), compute_result=False), Batch(torch.eye(5))][1], compute_result=True)
    assert measured(Batch(right), compute_result=True)["top1"] == 1


def test_a_trainer_forgets_an_evaluation_that_was_broken_off(tmp_path):
    class Stop(TrainerCallback):
        on = True

        def on_prediction_step(self, *args, **kwargs):
            if self.on:
                raise KeyboardInterrupt

    stop = Stop()
    run = trainer(tmp_path, evaluation=Images(8), batch_eval_metrics=True, per_device_eval_batch_size=8, callbacks=[stop])
    other = Images(24, seed=5)
    with pytest.raises(KeyboardInterrupt):
        run.evaluate(other)
    stop.on = False
    assert run.evaluate()["eval_accuracy"] == trainer(tmp_path, evaluation=Images(8)).evaluate()["eval_accuracy"]


# -- shared objects ---------------------------------------------------------------------------------------------------------


def test_arguments_are_shared_with_a_trainer_that_has_a_teacher(tmp_path):
    vit().save_pretrained(tmp_path / "teacher")
    args = arguments(tmp_path, mix=["mixup"])
    taught = MixupTrainer(vit(), args, train_dataset=Images(8), teacher=tmp_path / "teacher")
    plain = MixupTrainer(vit(), args, train_dataset=Images(8))
    assert taught.mixup_model.distiller is not None
    assert plain.mixup_model.distiller is None


def uneven(rare):
    data = Images(16)
    data.labels = torch.tensor([rare] + [row % 4 for row in range(15)])
    return data


def test_a_second_data_set_has_its_own_counts(tmp_path):
    model = MixupModel(vit(), "mixup", loss="classbalanced")
    collator = MixupCollator("cmo", num_labels=4)
    for rare in (0, 3):
        wanted = tuple(4 + (c == rare) - (c == 3) for c in range(4))
        MixupTrainer(model, arguments(tmp_path), train_dataset=uneven(rare))
        assert model.choice.methods[0].loss.class_counts == wanted
        run = MixupTrainer(vit(), arguments(tmp_path), train_dataset=uneven(rare), data_collator=collator)
        assert run.mixup_model.choice.methods[0].sample.class_counts == wanted
    assert collator.choice.methods[0].sample.class_counts is None
    told = MixupModel(vit(), "mixup", loss={"name": "classbalanced", "class_counts": [1, 2, 3, 4]})
    MixupTrainer(told, arguments(tmp_path), train_dataset=uneven(0))
    assert told.choice.methods[0].loss.class_counts == (1, 2, 3, 4)


def test_counts_are_those_of_the_column_that_is_learned(tmp_path):
    images = Images(8)
    columns = {"pixel_values": images.pixels.tolist(), "label": [0] * 8, "fine": [0, 1, 2, 3, 3, 3, 3, 3]}
    data = Dataset.from_dict(columns).with_format("torch")
    args = arguments(tmp_path, mix=["mixup"], loss="classbalanced", label_names=["fine"])
    assert MixupTrainer(vit(), args, train_dataset=data).mixup_model.choice.methods[0].loss.class_counts == (1, 1, 1, 5)
    assert class_counts_of(torch.utils.data.Subset(data, [0, 1]), 4, ["fine"]) == (1, 1, 0, 0)
    assert class_counts_of(images, 4, ["fine"]) is None


def test_a_training_inside_of_a_training_has_one_callback(tmp_path):
    callback, seen = MixupCallback(MixupCollator("mixup", num_labels=4)), {"outer": [], "inner": []}

    class Watched(MixupLoss):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def __call__(self, outputs, labels, num_items_in_batch=None):
            seen[self.name].append(labels.ndim)
            return super().__call__(outputs, labels, num_items_in_batch)

    def made(name, more=()):
        args = TrainingArguments(
            str(tmp_path), num_train_epochs=2, per_device_train_batch_size=8, report_to="none", use_cpu=True, save_strategy="no",
            disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        return Trainer(vit(), args, train_dataset=Images(8), compute_loss_func=Watched(name), callbacks=[callback, *more])

    class Inside(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                made("inner").train()

    made("outer", [Inside()]).train()
    assert seen == {"outer": [2, 2], "inner": [2, 2]}


def test_a_loader_of_ones_own_cannot_mix_beside_the_trainer(tmp_path):
    class Own(MixupTrainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(Images(8), 8, collate_fn=MixupCollator("mixup", num_labels=4))

    with refuses("MixupTrainer mixes by itself, got batches that a MixupCollator of the loader has mixed"):
        Own(vit(), arguments(tmp_path)).train()


def test_its_own_callback_cannot_be_taken_away(tmp_path):
    run = trainer(tmp_path, data=Images(8), ema_decay=0.5)
    run.callback_handler.callbacks = []
    with refuses("MixupTrainer counts steps and moves averages by its own BesideSteps, got callbacks without it", RuntimeError):
        run.train()


def test_a_callback_that_comes_later_is_refused(tmp_path):
    with refuses("MixupTrainer mixes by itself, got a MixupCallback too"):
        trainer(tmp_path).add_callback(MixupCallback(MixupCollator("mixup", num_labels=4)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["deepcopy", "pickle"])
def test_copies_tell_workers_what_the_originals_do(copied):
    images, data = copied(MixupCollator("cutmix", num_labels=4)), copied(pictures())
    loader = torch.utils.data.DataLoader(data, 8, collate_fn=images, num_workers=1, persistent_workers=True)
    first = next(iter(loader))
    images.mix_until_now()
    data.set_epoch(1)
    again = next(iter(loader))
    assert first["labels"].max(1).values.min() < 1
    assert again["labels"].max(1).values.min() == 1
    images.mix_until_now(False)
    assert not torch.equal(again["pixel_values"], first["pixel_values"])
    del loader


# -- forms of arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix": {"mixup": 0.3, "cutmix": 0.7}}, "mix must be a list of methods, whose shares mix_prob names, got {'mixup': 0.3"),
        ({"mix": {"mixup"}}, "mix must be a list of methods, whose shares mix_prob names, got {'mixup'}"),
        ({"mix": None}, "mix must be a list of methods, whose shares mix_prob names, got None"),
        ({"mix": (name for name in ["mixup"])}, "mix must be a list of methods, whose shares mix_prob names, got <generator"),
        ({"mix_prob": 0.5}, "mix_prob must be a list with a probability for each method, got 0.5"),
        ({"mix_prob": "0.5,0.5"}, "mix_prob must be a list with a probability for each method, got '0.5,0.5'"),
        ({"mix_prob": {0.3, 0.7}}, "mix_prob must be a list with a probability for each method, got {0."),
        ({"mix_args": {"mixup": 0.2}}, "mix_args of 'mixup' must map names to values, got 0.2"),
        ({"mix_args": 5}, "mix_args must map names to values, got 5"),
        ({"mix_args": {"mixup": {"loss": None}}}, "loss must be a name, a dictionary or a Loss, got None"),
        ({"loss": CrossEntropy}, "loss must be a name, a dictionary or a Loss, got <class"),
        ({"loss": nn.CrossEntropyLoss()}, "loss must be a name, a dictionary or a Loss, got CrossEntropyLoss()"),
        ({"loss": {"name": ["bce"]}}, "loss must be a known name, got ['bce']"),
    ],
)
def test_forms_that_would_lose_something_are_refused(tmp_path, changes, message):
    changes = {"mix": ["mixup", "cutmix"], **changes}
    with refuses(re.escape(message)):
        MethodChoice.build(**changes)
    with refuses(re.escape(message)):
        MixupTrainingArguments(str(tmp_path), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_scheduler_kwargs": {"num_cycles": 2}, "lr_scheduler_type": "cosine", "min_lr": 1e-5}, "lr_scheduler_kwargs are for the Trainer's own"),
        ({"no_weight_decay": ["*bias"]}, "no_weight_decay must hold regular expressions, got '*bias'"),
        ({"no_weight_decay": 1}, "no_weight_decay must be a list of regular expressions, got 1"),
        ({"ema_warmup_epochs": float("nan")}, "ema_warmup_epochs must be a number from 0 to"),
        ({"mix_seed": 0.5}, "mix_seed must be a whole number"),
        ({"lr_per_epoch": "False"}, "lr_per_epoch must be True or False, got 'False'"),
    ],
)  # fmt: skip
def test_arguments_that_would_have_no_effect_are_refused(tmp_path, changes, message):
    with refuses(re.escape(message)):
        MixupTrainingArguments(str(tmp_path), **changes)


def test_an_average_that_never_moves_and_a_floor_above_the_rate_are_refused(tmp_path):
    with refuses("ema_decay must be a number from 0 to below 1, got 1"):
        arguments(tmp_path, ema_decay=1)
    with refuses("ema_decay must be a number from 0 to below 1, got 1"):
        MixupModel(vit(), ema_decay=1)
    with refuses("min_lr and mixer_min_lr are where a learning rate ends, got 0.5 for one that starts at 0.003"):
        trainer(tmp_path, data=Images(8), lr_scheduler_type="cosine", min_lr=0.5).train()


def test_one_pattern_is_one_pattern(tmp_path):
    run = trainer(tmp_path, no_weight_decay="bias", weight_decay=0.1)
    decaying = set(run.get_decay_parameter_names(run.model))
    assert decaying == {name for name, _ in run.model.named_parameters() if "bias" not in name}
    run = trainer(tmp_path, no_weight_decay=["^vit.embeddings"], weight_decay=0.1)
    left = {name for name, _ in vit().named_parameters() if name.startswith("vit.embeddings")}
    assert {name for name, _ in run.model.named_parameters()} - {*run.get_decay_parameter_names(run.model)} == {
        f"backbone.{name}" for name in left
    }


def test_an_average_is_no_part_of_the_floating_point_operations(tmp_path):
    args = TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=8, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    stock = Trainer(vit(), args, train_dataset=Images(8))
    run = trainer(tmp_path, data=Images(8), max_steps=1, ema_decay=0.9)
    for one in (stock, run):
        one.train()
    assert run.state.total_flos == stock.state.total_flos > 0
    assert run.model.num_parameters() == stock.model.num_parameters()


@pytest.mark.parametrize("width", [16, 4])
def test_a_linear_probe_trains_every_head(width):
    """Also where layers of the blocks have as many outputs as there are classes."""
    shape = {
        "hidden_size": width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "image_size": 8,
        "patch_size": 4,
    }
    network = DeiTForImageClassificationWithTeacher(DeiTConfig(**shape, num_labels=4))
    freeze_backbone(network)
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert trained == [f"{head}.{part}" for head in ("cls_classifier", "distillation_classifier") for part in ("weight", "bias")]
    small = {"embed_dim": 12, "depth": 1, "img_size": 16}
    network = TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture="deit_tiny_distilled_patch16_224", num_labels=4, model_args=small)
    )
    freeze_backbone(network)
    trained = [name.removeprefix("timm_model.") for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert trained == ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"]


def test_a_frozen_backbone_stays_as_it_was_in_the_teacher_too(tmp_path):
    network = resnet()
    freeze_backbone(network)
    before = {name: value.clone() for name, value in network.resnet.state_dict().items()}
    run = trainer(tmp_path, network, Images(16), mix=["automix"], max_steps=2)
    run.train()
    assert run.mixup_model.deployed is not network
    after = run.mixup_model.deployed.resnet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_objects_of_another_kind_are_refused_before_training(tmp_path):
    images = Images(8)
    halves = DatasetDict(train=Dataset.from_dict({"label": [1]}), test=Dataset.from_dict({"label": [1]}))
    for keep, message in (
        ({"train_dataset": halves}, "train_dataset must be one data set, got DatasetDict of train, test"),
        ({"train_dataset": "cifar10"}, "train_dataset must be one data set, got 'cifar10'"),
        ({"data_collator": MixupCollator}, "data_collator must be a function, or an object that can be called, got <class"),
        ({"data_collator": "default"}, "data_collator must be a function, or an object that can be called, got 'default'"),
        ({"compute_metrics": "accuracy"}, "compute_metrics must be a function, or an object that can be called, got 'accuracy'"),
    ):
        with refuses(re.escape(message), TypeError):
            MixupTrainer(vit(), arguments(tmp_path), **{"train_dataset": images, **keep})
    with refuses(re.escape("compute_loss_func must take (outputs, labels, num_items_in_batch), got ['input', 'target']")):
        MixupTrainer(vit(), arguments(tmp_path), train_dataset=images, compute_loss_func=nn.CrossEntropyLoss())
    with refuses("training needs images, got a list without any"):
        MixupTrainer(vit(), arguments(tmp_path), train_dataset=[]).train()
    with refuses("training needs a whole batch of 8 for every process, got 4 images"):
        MixupTrainer(vit(), arguments(tmp_path, dataloader_drop_last=True), train_dataset=Images(4)).train()
    with refuses("repeated_augmentation shows images in an order of its own, got train_sampling_strategy='sequential'"):
        MixupTrainer(
            vit(), arguments(tmp_path, repeated_augmentation=2, train_sampling_strategy="sequential"), train_dataset=pictures()
        ).train()
    assert MethodChoice.build(["mixup", METHODS["cutmix"]]).probabilities == (0.5, 0.5)
