"""MixupTrainer with networks from everywhere: timm, torchvision, your own modules, compiled modules, PEFT, model_init."""

import copy
import json

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForImageClassification, ViTModel

from hf_mixup import METHODS, MixupModel, MixupTrainer
from hf_mixup.core.rng import MixKey
from hf_mixup.networks.wrapping import ModuleClassifier, as_classifier
from refusals import refuses
from small import Images, arguments, difference, losses, trainer, vit, weights


class Plain(nn.Module):
    """No config, no attribute that tells its classes."""

    def __init__(self, heads=1, form=lambda outputs: outputs[0]):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.fc = nn.ModuleList(nn.Linear(8, 4) for _ in range(heads))
        self.form = form

    def forward(self, x):
        pooled = self.stem(x).relu().mean((2, 3))
        return self.form(tuple(head(pooled) for head in self.fc))


def predicted(run, count=6):
    return torch.from_numpy(run.predict(Images(count, run.train_dataset.pixels.shape[-1])).predictions)


def test_a_timm_model_is_saved_as_timm_and_transformers_read_it(tmp_path):
    network = timm.create_model("resnet10t", num_classes=4, drop_rate=0.1)
    run = trainer(tmp_path, network, Images(16, 32), max_steps=2)
    assert run.mixup_model.backbone.timm_model is network, "the parameters are the same objects"
    run.train()
    run.save_model(tmp_path / "out")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert_close(loaded(Images(6, 32).pixels).logits, predicted(run), atol=1e-5, rtol=1e-4)
    again = MixupModel.from_pretrained(tmp_path / "out")
    assert difference(weights(again), weights(run.mixup_model)) == 0


def test_a_timm_transformer_of_another_size_is_built_for_it(tmp_path):
    network = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=32)
    assert as_classifier(network).config.model_args == {"img_size": 32}
    MixupModel(network, "transmix")


def test_a_timm_transformer_that_pools_otherwise_is_not_rebuilt_by_its_name():
    """Its layers and weights are the same; only an attribute says how it pools, so a rebuilt one would pool otherwise."""
    network = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=32)
    network.reset_classifier(4, global_pool="avg")
    assert isinstance(as_classifier(network), ModuleClassifier)


@pytest.mark.parametrize(
    "build",
    [
        Plain,
        lambda: torchvision.models.squeezenet1_1(num_classes=4),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)),
        lambda: Plain(form=lambda outputs: {"logits": outputs[0]}),
        lambda: Plain(heads=2, form=tuple),
        lambda: timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=32, depth=1, embed_dim=48),
    ],
    ids=["module", "torchvision", "sequential", "mapping", "two heads", "timm of other arguments"],
)
def test_a_module_trains_resumes_saves_and_loads(tmp_path, build):
    data = Images(16, 32)

    def run(folder, **changes):
        torch.manual_seed(0)
        return trainer(tmp_path / folder, build(), data, data, max_steps=4, **changes)

    whole = run("a", save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss")  # fmt: skip
    whole.train()
    resumed = run("b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    best = MixupModel.from_pretrained(whole.state.best_model_checkpoint, backbone=build())
    assert difference(weights(best), weights(whole.mixup_model)) == 0
    last = MixupModel.from_pretrained(tmp_path / "a/checkpoint-4", backbone=build())
    assert difference(weights(last), weights(resumed.mixup_model)) == 0
    own = build()
    own.load_state_dict(load_file(tmp_path / "a/checkpoint-4/model.safetensors"))
    with refuses("was expected to hold a network of transformers, got the weights of a"):
        MixupModel.from_pretrained(tmp_path / "a/checkpoint-4")
    with refuses("was expected to hold every weight of this network, got"):
        MixupModel.from_pretrained(tmp_path / "a/checkpoint-4", backbone=nn.Sequential(nn.Flatten(), nn.Linear(8, 4)))
    whole.create_model_card()


def test_heads_that_would_not_be_trained_are_refused(tmp_path):
    network = torchvision.models.googlenet(num_classes=4, aux_logits=True, init_weights=False)
    with refuses(r"the network must return only logits, got logits, aux_logits2, aux_logits1"):
        trainer(tmp_path, network, Images(4, 64), per_device_train_batch_size=4).train()
    with refuses(r"the network must return logits \(B, 5\), as its last layer suggests, got \(2, 2\)"):
        ModuleClassifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), 5)(torch.randn(2, 3, 2, 2))


def test_a_compiled_network_stays_compiled_and_is_saved_without_the_wrapper(tmp_path):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    run = trainer(tmp_path, torch.compile(vit(), backend=backend), max_steps=2, save_strategy="steps", save_steps=1)
    run.train()
    assert graphs
    assert losses(run) == losses_of_plain(tmp_path)
    run.save_model(tmp_path / "out")
    plain, report = AutoModelForImageClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert difference(weights(plain), weights(run.mixup_model.backbone)) == 0
    trainer(tmp_path, torch.compile(vit(), backend=backend), max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def losses_of_plain(folder):
    run = trainer(folder / "plain", max_steps=2)
    run.train()
    return losses(run)


@pytest.mark.parametrize(
    ("model", "message", "kind"),
    [
        ("someone/model", r"got str; load it with AutoModelForImageClassification.from_pretrained\('someone/model'\)", TypeError),
        (None, "needs a network, got neither model nor model_init", ValueError),
        (ViTModel(vit().config), "must be an image classifier, got ViTModel, which has no labels", ValueError),
        (nn.Flatten(), "the number of classes must be known, got Flatten", ValueError),
        (3, "model must be a network, got int", TypeError),
    ],
    ids=str,
)
def test_what_is_no_classifier_is_refused(tmp_path, model, message, kind):
    with refuses(message, kind):
        MixupTrainer(model, arguments(tmp_path), train_dataset=Images())


def test_model_init_makes_the_model_anew(tmp_path):
    def run(**given):
        done = MixupTrainer(None, arguments(tmp_path, mix=["automix"], max_steps=2, mixer_learning_rate=0.1), train_dataset=Images(), **given)  # fmt: skip
        done.train()
        return done

    for init in (lambda: vit(), lambda trial: vit()):
        done = run(model_init=init)
        first, expected = done.mixup_model, losses(done)
        done.train()
        assert done.mixup_model is not first
        assert done.model is done.mixup_model
        assert losses(done) == expected
        mixer = {id(p) for p in done.mixup_model.states["automix"].mixer.parameters()}
        assert mixer & {id(p) for group in done.optimizer.param_groups for p in group["params"]}


def test_hyperparameter_search(tmp_path):
    pytest.importorskip("optuna")
    seen = []

    class Watched(MixupTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append((self.args.learning_rate, self.mixup_model.choice.rate))
            return super().compute_loss(model, inputs, *args, **kwargs)

    run = Watched(args=arguments(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1), model_init=lambda: vit(), train_dataset=Images(), eval_dataset=Images(8))  # fmt: skip
    best = run.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2), "mix_rate": trial.suggest_categorical("mix_rate", [0.25])},
        n_trials=2, direction="maximize", compute_objective=lambda metrics: metrics["eval_accuracy"],
    )  # fmt: skip
    assert best.run_id is not None
    # a log for each trial, beside its checkpoints
    logs = [[json.loads(line) for line in (tmp_path / f"run-{trial}/train_log.jsonl").read_text().splitlines()] for trial in range(2)]
    assert [log[-1]["eval_accuracy"] for log in logs].index(best.objective) == int(best.run_id)
    assert not (tmp_path / "train_log.jsonl").exists()
    assert len({rate for rate, _ in seen}) == 2
    assert {rate for _, rate in seen} == {0.25}


def test_a_search_without_an_objective_minimises_the_loss(tmp_path):
    pytest.importorskip("optuna")
    run = MixupTrainer(args=arguments(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1), model_init=lambda: vit(), train_dataset=Images(8), eval_dataset=Images(8))  # fmt: skip
    best = run.hyperparameter_search(lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)}, n_trials=2)
    logs = [json.loads((tmp_path / f"run-{trial}/train_log.jsonl").read_text().splitlines()[-1]) for trial in range(2)]
    assert best.objective == min(log["eval_loss"] for log in logs)
    run.compute_objective = None
    run.compute_metrics = lambda prediction: {"own": 1.0}
    best = run.hyperparameter_search(lambda trial: {}, n_trials=1)
    assert best.objective == 1.0


# -- PEFT -------------------------------------------------------------------------------------------------------------------


def lora(dropout=0.0):
    peft = pytest.importorskip("peft")
    network = vit(dropout)
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"], r=4, init_lora_weights=False)
    return peft.get_peft_model(network, config)


@pytest.mark.parametrize("method", METHODS)
def test_lora_trains_adapters_alone(tmp_path, method):
    network = lora()
    before = weights(network)
    run = trainer(tmp_path, network, Images(16), mix=[method], max_steps=2)
    run.train()
    moved = {name for name, value in weights(network).items() if not torch.equal(before[name], value)}
    assert moved
    assert all("lora" in name or "modules_to_save" in name for name in moved)


@pytest.mark.parametrize("method", ["automix", "recursivemix", "smmix", "snapmix", "sumix"])
def test_lora_of_the_classifier_too_is_the_merged_network(method):
    """`all-linear` adapts the classifier; its adapters are linear layers, one of which has an output for every class."""
    peft = pytest.importorskip("peft")
    found, images = [], Images(8)
    adapted = peft.get_peft_model(vit(), peft.LoraConfig(target_modules="all-linear", r=4, init_lora_weights="gaussian"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    for network in (adapted, copy.deepcopy(adapted).merge_and_unload()):
        torch.manual_seed(1)
        model = MixupModel(network, method).train()
        found.append([model(images.pixels, images.labels, MixKey(3, 0, step)).loss.item() for step in range(2)])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.5}, {"mix": ["automix"]}], ids=str)
def test_lora_resumes_is_chosen_described_loaded_and_merged(tmp_path, changes):
    peft = pytest.importorskip("peft")
    evaluation = Images(8, seed=1)

    def run(folder, **more):
        return trainer(tmp_path / folder, lora(0.1), Images(24), evaluation, max_steps=4, **changes, **more)

    whole = run("a", save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True)  # fmt: skip
    whole.train()
    best, last = whole.state.best_model_checkpoint, tmp_path / "a/checkpoint-4"
    assert not (last / "model.safetensors").exists()
    resumed = run("b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    again = MixupModel.from_pretrained(last, backbone=vit(0.1))
    assert difference(weights(again), weights(resumed.mixup_model)) == 0
    assert difference(weights(MixupModel.from_pretrained(best, backbone=vit(0.1))), weights(whole.mixup_model)) == 0
    whole.save_model()
    whole.create_model_card()
    adapters = peft.PeftModel.from_pretrained(vit(0.1), tmp_path / "a").eval()
    expected = torch.from_numpy(whole.predict(evaluation).predictions)
    with torch.no_grad():
        assert_close(adapters(pixel_values=evaluation.pixels).logits, expected, atol=1e-5, rtol=1e-4)
        assert_close(adapters.merge_and_unload()(evaluation.pixels).logits, expected, atol=1e-5, rtol=1e-4)
    with refuses("was expected to name the network of its adapters"):
        MixupModel.from_pretrained(last)


def test_adapters_without_the_new_classifier_are_told_of_and_not_loaded(tmp_path, caplog):
    """The classifier is fresh, and in no file: what is loaded would have another one."""
    peft = pytest.importorskip("peft")
    vit(num_labels=7).save_pretrained(tmp_path / "base")
    network = AutoModelForImageClassification.from_pretrained(tmp_path / "base", num_labels=4, ignore_mismatched_sizes=True)
    model = MixupModel(peft.get_peft_model(network, peft.LoraConfig(target_modules=["q_proj"])), "mixup")
    assert "if it is new, name it in modules_to_save" in caplog.text
    model.save_pretrained(tmp_path / "run")
    with refuses("was expected to hold the classifier that its network .* lacks, got adapters alone"):
        MixupModel.from_pretrained(tmp_path / "run")
    caplog.clear()
    kept = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    model = MixupModel(peft.get_peft_model(kept, peft.LoraConfig(target_modules=["q_proj"])), "mixup")
    model.save_pretrained(tmp_path / "kept")
    assert difference(weights(MixupModel.from_pretrained(tmp_path / "kept")), weights(model)) == 0
    with refuses("must train its adapter 'default', .* got mine"):
        MixupModel(peft.get_peft_model(vit(), peft.LoraConfig(target_modules=["q_proj"]), adapter_name="mine"), "mixup")


def test_lora_upon_a_checkpoint_finds_its_base(tmp_path):
    peft = pytest.importorskip("peft")
    vit(num_labels=7).save_pretrained(tmp_path / "base")
    network = AutoModelForImageClassification.from_pretrained(tmp_path / "base", num_labels=4, ignore_mismatched_sizes=True)
    network = peft.get_peft_model(network, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"]))
    run = trainer(tmp_path / "run", network, max_steps=2)
    run.train()
    run.save_model()
    again = MixupModel.from_pretrained(tmp_path / "run").eval()
    with torch.no_grad():
        assert_close(again(Images(6).pixels).logits, predicted(run), atol=1e-6, rtol=1e-5)
