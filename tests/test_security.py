"""No foreign code is run, and no secret is written or sent (fault row 38). `test_hub.py` has the tests of the Hub and of tokens in a push."""

import json
import pickle
import sys

import pytest
import torch

from hf_mixup import MethodChoice, MixupModel
from hf_mixup.arguments import ModelArguments
from hf_mixup.mixers import MixBlock
from hf_mixup.networks.backbones import load_classifier
from hf_mixup.recipes import read_recipe
from hf_mixup.report.benchmark import about
from hf_mixup.report.card import write_model_card
from hf_mixup.report.plots import gallery, overview
from refusals import refuses
from small import resnet, trainer
from test_cards import HOSTILE


class Evil:
    """A pickle that leaves a file where it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.fixture
def mark(tmp_path):
    """What must not be there in the end."""
    path = tmp_path / "owned"
    yield path
    assert not path.exists()


def test_the_pickle_is_one(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "owned"))).close()
    assert (tmp_path / "owned").exists()


def test_row_38_pickled_weights(tmp_path, mark):
    """By every way in: a checkpoint, a run of ours, a teacher, a mixer."""
    resnet().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"classifier.weight": Evil(mark)}, tmp_path / "pytorch_model.bin")
    MethodChoice.build("cutmix").save_pretrained(tmp_path)
    for load in (
        load_classifier,
        MixupModel.from_pretrained,
        lambda folder: MixupModel(resnet(), "attentivemix", mix_args={"attentivemix": {"teacher": str(folder)}}),
    ):
        with refuses("must hold its weights as safetensors, got none; pickled weights can run code and are not loaded"):
            load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises((ValueError, OSError)):
        MixBlock.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_row_38_pickle_in_a_checkpoint(tmp_path, mark, name):
    trainer(tmp_path, resnet(), save_strategy="steps", save_steps=2, max_steps=2).train()
    torch.save({"state": Evil(mark)}, tmp_path / "checkpoint-2" / name)
    torch.save(Evil(mark), tmp_path / "checkpoint-2/training_args.bin")  # which nobody reads
    with refuses(
        "checkpoint-2 was expected to hold only tensors, got a pickle that would run code; resume from a checkpoint that you made"
    ):
        trainer(tmp_path, resnet(), max_steps=4).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("tag", ["apply:builtins.open", "new:builtins.open"])
def test_row_38_python_in_yaml(tmp_path, mark, tag):
    (tmp_path / "evil.yaml").write_text(f"mix: !!python/object/{tag} [{mark}, w]\n")
    for read in (lambda path: read_recipe(str(path), tmp_path), lambda path: about(str(path), tmp_path)):
        with refuses("must be plain YAML, got could not determine a constructor for the tag .*; correct the file"):
            read(tmp_path / "evil.yaml")


@pytest.fixture
def own_code(tmp_path, mark):
    """A checkpoint with a network of its own, whose module leaves a file when it is imported."""
    folder = tmp_path / "own_code"
    resnet().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "novel", "auto_map": {"AutoConfig": "novel.NovelConfig", "AutoModelForImageClassification": "novel.Novel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "novel.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import ResNetConfig, ResNetForImageClassification\n"
        "class NovelConfig(ResNetConfig): model_type = 'novel'\n"
        "class Novel(ResNetForImageClassification): config_class = NovelConfig\n"
    )
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}})
    )
    MethodChoice.build("cutmix").save_pretrained(folder)
    return folder


def test_row_38_code_of_a_checkpoint(own_code, tmp_path, monkeypatch):
    """Not run, and nobody is asked at the keyboard, unless the argument says so, of which the card tells."""
    assert ModelArguments().trust_remote_code is False
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked"))
    for load in (
        load_classifier,
        MixupModel.from_pretrained,
        lambda folder: MixupModel(resnet(), "attentivemix", mix_args={"attentivemix": {"teacher": str(folder)}}),
    ):
        with refuses("must be a network that transformers knows, got one with its own code, which is not run; read that code, then pass"):
            load(own_code)
    write_model_card(own_code)  # looks at the network, and does not run it either


def test_code_that_was_asked_for_is_in_the_card(own_code, tmp_path, mark, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    network = load_classifier(own_code, trust_remote_code=True)
    assert mark.exists()
    mark.unlink()
    run = trainer(tmp_path / "out", network, max_steps=1)
    run.train()
    run.save_model()
    run.create_model_card()
    assert "its own; read it, then load it with trust_remote_code=True" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_of_classes_in_pictures(tmp_path, name):
    """A dollar would make a formula of the name, and a bad one would end the run after its training."""
    column = {"title": "cutmix", "target": torch.tensor([0.6, 0.4])} | {part: torch.rand(3, 8, 8) for part in ("own", "partner", "mixed")}
    gallery(tmp_path / "gallery.png", [column], [name, name])
    overview(tmp_path / "overview.png", [column], [name, name])
