"""What keeps training fast: no breaks in compiled graphs, no waiting for the device, a benchmark that runs."""

import contextlib
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from hf_mixup import METHODS, MixupModel
from hf_mixup.core import precision
from hf_mixup.core.rng import MixKey
from hf_mixup.method import needs_of_model
from hf_mixup.policies import fmix, puzzlemix
from hf_mixup.recipes import read_recipe
from hf_mixup.steps import noisymix, patchup
from hf_mixup.training import agreement
from small import arguments, difference, resnet, trainer, vit, weights

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("mix", "network"), [("mixup cutmix", resnet), ("transmix", vit), ("puzzlemix", resnet)])
def test_mixing_breaks_no_graph_and_compiles_nothing_again(tmp_path, mix, network):
    """`--torch_compile`: the first step compiles the backbone, those of other plans use what is there."""
    torch._dynamo.reset()
    counters.clear()
    compiled = {}

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            compiled[state.global_step] = counters["stats"]["unique_graphs"]

    settings = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 4}
    trainer(tmp_path, network(), mix=mix.split(), callbacks=[Count()], **settings).train()
    assert not counters["graph_break"]
    assert compiled[1] >= 1
    assert compiled[4] == compiled[1]


# their pairs or masks are found by search on the host
READ_THE_DEVICE = {"comixup", "supermix", "guidedmixup", "kmixup"}


@pytest.mark.parametrize("name", METHODS)
def test_no_step_waits_for_the_device(name, monkeypatch):
    """On the device `meta`, whose tensors have no values: whatever the host would have to wait for raises."""
    # it has neither random numbers nor autocast
    for module in (fmix, puzzlemix, noisymix, patchup):
        monkeypatch.setattr(module, "normal", lambda size, rng, device="cpu": torch.empty(size, device=device))
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    method, images, labels = METHODS[name], torch.empty(8, 3, 16, 16, device="meta"), torch.zeros(8, dtype=torch.long, device="meta")
    if not needs_of_model(method) and name not in READ_THE_DEVICE:
        mixed, targets = method(images, labels, num_labels=4)
        assert mixed.device.type == targets.device.type == "meta"
    for network in (vit, resnet):
        try:
            model = MixupModel(network(), method).to("meta").train()
        except ValueError:
            continue  # no method of attention for a ResNet
        with (
            pytest.raises((RuntimeError, NotImplementedError), match="meta tensor") if name in READ_THE_DEVICE else contextlib.nullcontext()
        ):
            model(pixel_values=images, labels=labels, mix_key=MixKey(0, 0, 3, 0, 0, 10)).loss.backward()


# -- what the machine has -----------------------------------------------------------------------------------------------------


def test_emulated_bfloat16_is_answered_with_what_it_costs(tmp_path, monkeypatch, caplog):
    """One sentence with the measured ratio, where bfloat16 is emulated and slower; nothing elsewhere, and nothing is measured there."""
    monkeypatch.setattr(agreement, "has_bfloat16", lambda: False)
    monkeypatch.setattr(agreement, "bfloat16_ratio", lambda: 8.14)
    trainer(tmp_path, bf16=True)
    found = [record.getMessage() for record in caplog.records if "bf16" in record.getMessage()]
    assert found == [
        "bf16 is emulated by this CPU, where a convolution takes 8.1 times as long as in float32 (measured now); leave out --bf16"
    ]
    caplog.clear()
    monkeypatch.setattr(agreement, "bfloat16_ratio", lambda: 0.9)
    trainer(tmp_path, bf16=True)
    monkeypatch.setattr(agreement, "has_bfloat16", lambda: True)
    monkeypatch.setattr(agreement, "bfloat16_ratio", lambda: pytest.fail("there is nothing to measure"))
    trainer(tmp_path, bf16=True)
    assert not [record for record in caplog.records if "bf16" in record.getMessage()]


def test_the_ratio_is_measured_and_draws_nothing():
    before = torch.get_rng_state()
    precision.bfloat16_ratio.cache_clear()
    assert 0.01 < precision.bfloat16_ratio(0.05) < 1000
    precision.bfloat16_ratio.cache_clear()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("native", [False, True])
def test_recipes_take_bfloat16_where_the_machine_has_it(tmp_path, monkeypatch, native):
    monkeypatch.setattr("hf_mixup.recipes.has_bfloat16", lambda: native)
    (tmp_path / "own.yaml").write_text("bf16: auto\n")
    assert read_recipe(str(tmp_path / "own.yaml"), tmp_path) == {"bf16": native}
    assert read_recipe("cifar10_small", ROOT / "training_scripts/recipes")["bf16"] is native


def test_channels_last_is_for_convolutions_in_half_precision():
    assert precision.prefers_channels_last(resnet(), True)
    assert not precision.prefers_channels_last(resnet(), False)
    assert not precision.prefers_channels_last(vit(), True)


def test_fast_takes_fused_optimizers_and_resumes_to_the_bit(tmp_path):
    """On a CPU there is no more to it: no compiling, no TF32."""

    def run(folder, **changes):
        return trainer(tmp_path / folder, optim="sgd", save_strategy="steps", save_steps=3, max_steps=6, **{"fast": True, **changes})

    whole = run("whole")
    whole.train()
    assert whole.optimizer.defaults["fused"] is True
    assert not whole.args.torch_compile
    assert whole.args.tf32 is None
    again = run("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert difference(weights(whole.model), weights(again.model)) == 0
    for changes in ({"optim_args": "momentum=0.9,fused=False"}, {"fast": False}):
        part = run("part", **changes)
        part.create_optimizer()
        assert not part.optimizer.defaults["fused"]


def test_fast_on_a_gpu_can_be_taken_apart(tmp_path, monkeypatch):
    """What the arguments are on a machine with a GPU; nothing is trained."""
    monkeypatch.setattr("hf_mixup.arguments.is_torch_tf32_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    seen = {}
    monkeypatch.setattr(
        "transformers.TrainingArguments.__post_init__", lambda self: seen.update(tf32=self.tf32, torch_compile=self.torch_compile)
    )
    for changes, wanted in (
        ({"fast": True}, {"tf32": True, "torch_compile": True}),
        ({"fast": True, "torch_compile": False}, {"tf32": True, "torch_compile": False}),
        ({"fast": True, "tf32": False}, {"tf32": False, "torch_compile": True}),
        ({}, {"tf32": None, "torch_compile": False}),
    ):
        arguments(tmp_path, use_cpu=False, **changes)
        assert seen == wanted
