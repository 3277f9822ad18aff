"""What must hold with every allowed version of the libraries. `make test-oldest` runs it with the oldest versions."""

import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from hf_mixup import METHODS
from hf_mixup.networks.backbones import ARCHITECTURES, from_scratch, load_classifier
from hf_mixup.networks.families import fill_buffers
from run_script import ROOT
from small import Images, difference, losses, network_for, trainer, weights

BOUNDS = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', (ROOT / "setup.py").read_text().split("extras_require")[0]))


def test_what_is_installed_is_allowed():
    for name, least in BOUNDS.items():
        numbers = [tuple(map(int, re.findall(r"\d+", text)[:3])) for text in (version(name), least)]
        assert numbers[0] >= numbers[1], name


def test_bounds_are_the_true_ones():
    """Measured: older ones fail, see the table of docs/benchmarks.md."""
    wanted = {"transformers": "5.17", "huggingface-hub": "1.31", "accelerate": "1.7", "timm": "1.0.23", "datasets": "4.8.4", "torch": "2.6"}
    assert wanted.items() <= BOUNDS.items()


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_wrn28_8", "moganet_tiny", "resnet10t"])
def test_statistics_of_batch_norms_survive_loading(name, tmp_path):
    network = from_scratch(name, 4, 32)
    for key, buffer in network.named_buffers():
        if key.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
        elif key.endswith("num_batches_tracked"):
            buffer.fill_(7)
    network.save_pretrained(tmp_path)
    assert difference(weights(network), weights(load_classifier(tmp_path))) == 0
    assert name not in ARCHITECTURES or len(list(network.buffers())) > 0


def test_buffers_that_no_checkpoint_holds_are_filled(tmp_path):
    """Of Swin V2: timm up to 1.0.30 leaves its attention masks as they lie in memory. Other random draws stay as they are."""
    network = from_scratch("swinv2_tiny_window8_256", 3, 256)
    network.save_pretrained(tmp_path)
    again = load_classifier(tmp_path)
    loaded, state = dict(again.named_buffers()), torch.get_rng_state()
    fill_buffers(again)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, loaded[name]) for name, buffer in network.named_buffers())


@pytest.mark.parametrize("name", ["mixup", "automix", "transmix", "puzzlemix"])
def test_training_resumes_to_the_bit(name, tmp_path):
    settings = {"mix": [name], "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "logging_steps": 1}
    whole = trainer(tmp_path / "whole", network_for(name), Images(24), gradient_accumulation_steps=2, **settings)
    whole.train()
    again = trainer(tmp_path / "whole", network_for(name), Images(24), gradient_accumulation_steps=2, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert difference(weights(whole.mixup_model), weights(again.mixup_model)) == 0
    assert losses(whole) == losses(again)
    again.accelerator.end_training()


WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("datasets", "evaluate", "sklearn", "matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in ("datasets", "evaluate", "sklearn", "matplotlib") else real(name, *rest)
before = set(__import__("os").environ)
import torch
from transformers import Trainer, TrainingArguments
from hf_mixup import MixupCallback, MixupCollator, MixupLoss, MixupModel, MixupTrainer
from small import Images, resnet, trainer
own = TrainingArguments("stock", max_steps=2, use_cpu=True, report_to="none", save_strategy="no", remove_unused_columns=False, disable_tqdm=True)
mixing = MixupCallback(MixupCollator(["mixup", "cutmix"], num_labels=4))
Trainer(resnet(), own, train_dataset=Images(16), eval_dataset=Images(8), callbacks=[mixing], compute_loss_func=MixupLoss()).train()
run = trainer("ours", resnet(), Images(16), Images(8), mix=["automix"], max_steps=4, eval_strategy="steps", eval_steps=2, logging_steps=1, save_strategy="steps", save_steps=2)
run.train()
run.save_model()
run.create_model_card()
MixupModel.from_pretrained("ours")
assert not {"datasets", "evaluate", "sklearn", "matplotlib"} & set(sys.modules)
assert "DISABLE_SAFETENSORS_CONVERSION" not in __import__("os").environ
for code, package in (("from hf_mixup.data.sources import load_images", "datasets"), ("import hf_mixup.evaluation.measures", "datasets"),
                      ("from hf_mixup.report import plots; plots.training_curve('x.png', [])", "matplotlib")):
    try:
        exec(code)
    except ImportError as error:
        print(package, "|", error)
"""


def test_training_works_without_what_only_scripts_need(tmp_path):
    """Without datasets, evaluate, scikit-learn and matplotlib; what needs one of them says so. Nothing is set in the environment."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*sys.path[:1], str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [line for line in done.stdout.splitlines() if " | " in line]
    assert len(told) == 3
    for line in told:
        package, sentence = line.split(" | ")
        assert f"must have the package {package}, got No module named '{package}" in sentence
        assert sentence.endswith(f"run `pip install {package}`.")
    assert "the card has no training curve" in done.stderr


def test_nothing_is_set_in_the_environment(tmp_path, monkeypatch):
    from small import resnet

    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION", raising=False)
    resnet().save_pretrained(tmp_path)
    load_classifier(tmp_path)
    assert "DISABLE_SAFETENSORS_CONVERSION" not in os.environ
    monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", "0")
    load_classifier(tmp_path)
    assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "0"
    assert METHODS
    assert torch.is_grad_enabled()
