"""MixupTrainer: what it trains, logs, saves and restores."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForImageClassification, Trainer, TrainerCallback, TrainingArguments

import tiny
from hf_mixup import METHODS, Method, MethodChoice, MixupCollator, MixupModel, MixupTrainer
from hf_mixup.core.rng import MixKey
from hf_mixup.data.collator import MixedBatch
from hf_mixup.evaluation.metrics import mixed_accuracy
from hf_mixup.training.callbacks import epoch_rows
from refusals import refuses
from small import NETWORKS, Images, arguments, difference, losses, resnet, trainer, vit, weights

every_network = pytest.mark.parametrize("network", sorted(NETWORKS))


@every_network
@pytest.mark.parametrize("mix", [["vanilla"], ["mixup"], ["cutmix"], ["mixup", "cutmix"]], ids="+".join)
def test_learns(tmp_path, network, mix):
    done = trainer(tmp_path, NETWORKS[network](), Images(256), Images(64, seed=1), mix=mix, max_steps=600, logging_steps=200)
    done.train()
    assert done.evaluate()["eval_top1"] > 0.9


def test_two_runs_with_one_seed_agree_to_the_bit(tmp_path):
    def run(seed):
        done = trainer(tmp_path, vit(0.1), mix_seed=seed)
        done.train()
        return done

    one, two, other = run(1), run(1), run(2)
    assert difference(weights(one.model), weights(two.model)) == 0
    assert difference(weights(one.model), weights(other.model)) > 0


def test_micro_batches_and_steps_get_keys_of_their_own(tmp_path):
    run = trainer(tmp_path, gradient_accumulation_steps=2, max_steps=3, per_device_train_batch_size=4)
    keys = []
    model = run.model
    inner = model.method_for
    model.method_for = lambda key: keys.append(key) or inner(key)
    run.train()
    drawn = sorted({(key.step, key.micro_step) for key in keys})
    assert drawn == [(step, micro) for step in range(3) for micro in range(2)]
    assert {key.total_steps for key in keys} == {3}


@every_network
def test_row_29_evaluation_is_that_of_a_plain_trainer(tmp_path, network):
    """Evaluation is never mixed, and leaves no trace in training."""
    evaluation = Images(24, seed=1)
    run = trainer(tmp_path, NETWORKS[network](), evaluation=evaluation)
    run.train()
    metrics = run.evaluate()
    plain = Trainer(
        run.model.backbone, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True), eval_dataset=evaluation
    ).evaluate()
    assert metrics["eval_loss"] == pytest.approx(plain["eval_loss"], abs=1e-6)


def test_config_is_not_poisoned_by_soft_labels(tmp_path):
    """Finding F3: float labels would turn the config to multi-label for good."""
    run = trainer(tmp_path)
    run.train()
    assert run.model.config.problem_type is None
    run.save_model(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text()).get("problem_type") is None


def test_gradients_do_not_grow_with_accumulation(tmp_path):
    """Finding F2, for MixupTrainer: 16x1 and 4x4 on the same unmixed images."""

    def norm(batch, accumulation):
        run = trainer(
            tmp_path, mix=["vanilla"], max_steps=1, logging_steps=1, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation, data=Images(16),
        )  # fmt: skip
        run.train()
        return next(entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry)

    assert norm(16, 1) == pytest.approx(norm(4, 4), rel=1e-4)


class _StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = True
            control.should_training_stop = True


@every_network
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=["plain", "accumulation", "bf16"])
def test_stopped_in_mid_epoch_and_resumed_is_bit_identical(tmp_path, network, workers, changes):
    def run(folder, **more):
        model = vit(dropout=0.1) if network == "vit" else NETWORKS[network]()
        data = Images(40)
        return trainer(tmp_path / folder, model, data, max_steps=7, dataloader_num_workers=workers, **changes, **more)

    whole = run("whole")
    whole.train()
    run("cut", callbacks=[_StopAt(3)]).train()
    resumed = run("cut")
    resumed.train(resume_from_checkpoint=True)
    assert difference(weights(whole.model), weights(resumed.model)) == 0
    assert losses(whole)[-1] == losses(resumed)[-1]


def test_stock_trainer_would_not_restore_a_vit(tmp_path):
    """Finding F1, the reason for our own loaders: a checkpoint has the old names of a ViT's parameters, and the stock Trainer
    passes over them. If this fails, transformers has mended it, and `load_strictly` may go."""
    run = trainer(tmp_path, vit(), save_strategy="steps", save_steps=4, max_steps=4)
    run.train()
    fresh = vit()
    torch.nn.init.normal_(fresh.classifier.weight)
    stock = Trainer(fresh, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    stock._load_from_checkpoint(str(tmp_path / "checkpoint-4"))
    assert difference(weights(fresh), weights(run.model.backbone)) > 0


@every_network
def test_best_model_is_the_one_on_disk(tmp_path, network):
    run = trainer(
        tmp_path, NETWORKS[network](), evaluation=Images(24, seed=1), save_strategy="steps", eval_strategy="steps", save_steps=2,
        eval_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    run.train()
    best = AutoModelForImageClassification.from_pretrained(run.state.best_model_checkpoint)
    assert Path(run.state.best_model_checkpoint).name != f"checkpoint-{run.state.global_step}", "the last one would prove nothing"
    assert difference(weights(best), weights(run.model.backbone)) == 0


@every_network
def test_checkpoint_is_a_plain_model(tmp_path, network):
    evaluation = Images(24, seed=1)
    run = trainer(tmp_path, NETWORKS[network](), evaluation=evaluation)
    run.train()
    predicted = run.predict(evaluation).predictions
    run.save_model(tmp_path / "out")
    plain, report = AutoModelForImageClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        assert_close(plain.eval()(evaluation.pixels).logits, torch.from_numpy(predicted), atol=1e-6, rtol=1e-5)
    again = MixupModel.from_pretrained(tmp_path / "out")
    assert again.choice == run.model.choice
    assert difference(weights(again), weights(run.model)) == 0


def test_method_is_read_back(tmp_path):
    trainer(tmp_path, mix=["cutmix"], alpha=[0.2]).save_model(tmp_path)
    assert Method.from_pretrained(tmp_path) == METHODS["cutmix"].replaced(alpha=0.2)
    trainer(tmp_path, mix_prob=[0.3, 0.7]).save_model(tmp_path)
    assert MethodChoice.from_pretrained(tmp_path).probabilities == (0.3, 0.7)
    with pytest.raises(ValueError, match=r"got mixup \+ cutmix"):
        Method.from_pretrained(tmp_path)


def test_log_says_what_was_mixed(tmp_path):
    run = trainer(tmp_path, mix_prob=[0.25, 0.75], max_steps=20, logging_steps=20)
    run.train()
    entry = next(entry for entry in run.state.log_history if "loss" in entry)
    assert entry["mix/mixup"] + entry["mix/cutmix"] == pytest.approx(1)
    assert 0 < entry["mix/mixup"] < entry["mix/cutmix"]
    assert 0.4 < entry["lam"] < 0.9
    assert 0 <= entry["train_accuracy"] <= 1
    assert json.loads((tmp_path / "train_log.jsonl").read_text().splitlines()[-1])["epoch"] == 3


def test_accuracy_of_a_perfect_network_is_one():
    targets = torch.tensor([[0.7, 0.3, 0, 0], [0, 1, 0, 0], [0.2, 0, 0.8, 0]])
    assert_close(mixed_accuracy(targets * 5, targets), torch.ones(3))
    swapped = torch.tensor([[1.0, 2, 0, 0], [1, 0, 0, 0], [0, 0.5, 2, 0]])
    assert_close(mixed_accuracy(swapped, targets), torch.tensor([0.0, 0.0, 0.8]))


def test_epoch_rows():
    history = [
        {"loss": 2.0, "train_accuracy": 0.1, "learning_rate": 1.0, "epoch": 0.5, "step": 5},
        {"loss": 1.0, "train_accuracy": 0.3, "learning_rate": 0.5, "epoch": 1.0, "step": 10},
        {"eval_loss": 1.5, "eval_top1": 0.4, "epoch": 1.0, "step": 10},
        {"loss": 0.5, "learning_rate": 0.1, "epoch": 2.0, "step": 20},
        {"train_runtime": 3.0, "epoch": 2.0, "step": 20},
    ]
    first, second = epoch_rows(history)
    assert first == {
        "epoch": 1, "step": 10, "eval_loss": 1.5, "eval_top1": 0.4, "train_loss": 1.5, "train_accuracy": 0.2, "learning_rate": 0.5,
    }  # fmt: skip
    assert (second["epoch"], second["train_loss"]) == (2, 0.5)


def test_row_30_nan_loss_stops_the_run(tmp_path):
    """With step, method, learning rate and the key; the optimizer has not stepped."""
    model = vit()
    run = trainer(tmp_path, model)
    before = weights(model)

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                before.update(weights(model))
                self.undo = model.classifier.register_forward_hook(lambda module, args, out: out * math.nan)

    run.add_callback(Poison())
    with pytest.raises(FloatingPointError, match=r"got nan at step 2 with method '(mixup|cutmix)', learning rate .*MixKey\(seed=3"):
        run.train()
    assert difference(before, weights(model)) == 0


def test_row_20_collator_of_ours_mixes_training_only(tmp_path):
    seen = []

    class Watched(MixupTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append((model.training, type(inputs), inputs["labels"].ndim))
            if not model.training:
                return super().compute_loss(model, inputs, *args, **kwargs)
            loss, outputs = super().compute_loss(model, inputs, True, **kwargs)
            assert torch.equal(outputs.targets, inputs["labels"]), "a mixed batch is not mixed again"
            return loss

    run = Watched(
        vit(),
        arguments(tmp_path, max_steps=2),
        data_collator=MixupCollator("cutmix", num_labels=4),
        train_dataset=Images(),
        eval_dataset=Images(16),
    )
    run.train()
    run.evaluate()
    assert {(True, MixedBatch, 2), (False, dict, 1)} == set(seen)
    assert run.state.log_history[0]["mix/cutmix"] == 1, "the method of the collator is the one that mixed"
    assert run.state.log_history[0]["lam"] < 1


def test_row_20_plain_soft_labels_are_mixed_like_onehots(tmp_path):
    """Distillation targets."""
    model = MixupModel(vit(), "cutmix").train()
    images = torch.randn(6, 3, 16, 16)
    soft = torch.softmax(torch.randn(6, 4), 1)
    outputs = model(images, soft, mix_key=MixKey(0, 0, 0))
    plan = METHODS["cutmix"].sample.plan(images.shape, MixKey(0, 0, 0).own_rng(), {})
    assert_close(outputs.targets, plan.weight[:, :1] * soft + plan.weight[:, 1:] * soft[plan.index[:, 1]])


def test_mixing_ends_at_an_epoch(tmp_path):
    run = trainer(tmp_path, data=Images(32), max_steps=8, mix_off_epoch=1, logging_steps=4)
    run.train()
    first, second = (entry for entry in run.state.log_history if "loss" in entry)
    assert "mix/vanilla" not in first
    assert second["mix/vanilla"] == 1
    assert second["lam"] == 1


def test_mix_rate_leaves_batches_alone(tmp_path):
    run = trainer(tmp_path, mix_rate=0.5, max_steps=24, logging_steps=24)
    run.train()
    assert 0.2 < next(entry["mix/vanilla"] for entry in run.state.log_history if "loss" in entry) < 0.8


def test_repeats_average_independent_mixtures():
    model = MixupModel(vit(), "cutmix", mix_repeat=3).train()
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    outputs = model(images, labels, mix_key=MixKey(0, 0, 0))
    assert outputs.targets.shape == (12, 4)
    single = MixupModel(vit(), "cutmix").train()
    parts = [single(images, labels, mix_key=MixKey(0, 0, 0, 0, repeat)) for repeat in range(3)]
    assert_close(outputs.loss, torch.stack([part.loss for part in parts]).mean())
    assert not torch.equal(parts[0].targets, parts[1].targets)


def test_compiled_backbone_keeps_names_and_weights(tmp_path):
    runs = [
        trainer(tmp_path, max_steps=3, data=Images(32), **more)
        for more in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"})
    ]
    for run in runs:
        run.train()
    assert weights(runs[0].model).keys() == weights(runs[1].model).keys()
    assert difference(weights(runs[0].model), weights(runs[1].model)) < 1e-5
    runs[1].save_model(tmp_path / "out")
    AutoModelForImageClassification.from_pretrained(tmp_path / "out")


def test_cosine_of_the_published_recipes():
    from hf_mixup.training.schedules import cosine

    # OpenMixup's CIFAR recipe: changes once an epoch of 500 steps, 400 epochs
    for epoch in (0, 1, 200, 399):
        expected = (1 + math.cos(math.pi * epoch / 400)) / 2
        assert cosine(epoch * 500 + 499, 200_000, every=500) == pytest.approx(expected)
        assert cosine(epoch * 500, 200_000, floor=0.5, every=500) == pytest.approx(0.5 + 0.5 * expected)
    # the warm-up lies over the curve
    assert cosine(9, 100, warmup=19) == pytest.approx((1 + math.cos(math.pi * 0.09)) / 2 * 10 / 20)


def test_learned_mixers_have_a_learning_rate_of_their_own(tmp_path):
    run = trainer(
        tmp_path, vit(), mix=["automix"], learning_rate=0.1, min_lr=0.05, mixer_learning_rate=0.01, mixer_min_lr=0.001,
        mixer_momentum=0.5, mixer_weight_decay=0.3, weight_decay=0.1, optim="sgd", optim_args="momentum=0.9", lr_scheduler_type="cosine",
        max_steps=4,
    )  # fmt: skip
    run.train()
    mixer = {id(p) for p in run.model.states["automix"].mixer.parameters()}
    seen = set()
    for group in run.optimizer.param_groups:
        own = {id(p) for p in group["params"]} & mixer
        seen |= own
        assert len(own) in (0, len(group["params"]))
        assert group["initial_lr"] == (0.01 if own else 0.1)
        assert group["momentum"] == (0.5 if own else 0.9)
        assert group["weight_decay"] in ((0.3, 0.0) if own else (0.1, 0.0))
        assert group["lr"] == pytest.approx(0.001 if own else 0.05)
    assert seen == mixer


def test_two_gpus_in_one_process_are_refused(tmp_path):
    """Trap T7: DataParallel's replicas would share hooks, keys and plans."""
    settings = arguments(tmp_path)
    assert settings.n_gpu <= 1
    settings._n_gpu = 2
    with pytest.raises(
        ValueError, match=r"one process drives one GPU, got 2 GPUs in one process; start the script with `accelerate launch`"
    ):
        MixupTrainer(vit(), settings, train_dataset=Images())


def test_second_train_goes_on_with_the_same_groups(tmp_path):
    """Trap T9: the optimizer is there already."""
    run = trainer(tmp_path, vit(), mix=["automix"], mixer_learning_rate=0.01, max_steps=2)
    run.train()
    sizes = [len(group["params"]) for group in run.optimizer.param_groups]
    run.train()
    assert [len(group["params"]) for group in run.optimizer.param_groups] == sizes


@pytest.mark.parametrize("name", ["manifoldmix", "alignmix"])
def test_checkpointing_that_cannot_work_is_refused_before_training(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name} changes features inside the blocks that timm's activation checkpointing runs again"):
        trainer(tmp_path, tiny.network("timm_vit"), mix=[name], gradient_checkpointing=True)


@pytest.mark.parametrize("name", ["manifoldmix", "moex"])
def test_checkpointing_around_a_changed_part_of_a_layer_is_refused(tmp_path, name):
    """The part would run again in the backward pass, without its change."""
    part = {name: {"layers": ["vit.layers.0.mlp"]}}
    with refuses(
        rf"{name} must change whole layers where activation checkpointing runs them again, got a ViTMLP inside a ViTLayer; name the layer"
    ):
        trainer(tmp_path, mix=[name], mix_args=part, gradient_checkpointing=True)
    network = vit()
    network.gradient_checkpointing_enable()
    with refuses("must change whole layers"):
        MixupModel(network, name, mix_args=part)
    MixupModel(network, name, mix_args={name: {"layers": ["vit.layers.0"]}})


def test_checkpointing_of_a_network_without_it_is_refused_by_the_networks_name(tmp_path):
    with pytest.raises(ValueError, match="activation checkpointing needs a network that has it, got ResNetForImageClassification"):
        trainer(tmp_path, resnet(), gradient_checkpointing=True)


def test_timm_networks_are_checkpointed_by_the_argument(tmp_path):
    """The losses are those without it."""
    images = Images(16, size=tiny.SIDE)
    found = []
    for checkpointed in (False, True):
        done = trainer(
            tmp_path, tiny.network("timm_vit"), images, mix=["mixup"], max_steps=2, logging_steps=1, gradient_checkpointing=checkpointed
        )
        done.train()
        found.append(losses(done))
        assert done.mixup_model.backbone.timm_model.grad_checkpointing is checkpointed
    assert found[0] == pytest.approx(found[1], rel=1e-4)
