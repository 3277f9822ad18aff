"""Checkpoints with missing weights. transformers only warns, and fills in random weights; we refuse them."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, BeitConfig, BeitForMaskedImageModeling, DeiTConfig, DeiTForImageClassification

from hf_mixup import MixupModel
from hf_mixup.networks.backbones import from_scratch, load_classifier
from refusals import refuses
from small import resnet, vit

NETWORKS = {"vit": vit, "resnet": resnet, "timm": lambda: from_scratch("resnet10t", 4, 16)}


@pytest.fixture
def saved(tmp_path):
    """Saves a network, with other weights and other fields of its config."""

    def save(network, weights=lambda found: found, **config):
        network.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        save_file({name: value.clone() for name, value in weights(load_file(path)).items()}, path, metadata={"format": "pt"})
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return tmp_path

    return save


def without(*words):
    return lambda found: {name: value for name, value in found.items() if not any(word in name for word in words)}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("prefix", ["module.", "model.", "ema."])
def test_weights_of_other_names_are_refused(saved, name, prefix):
    folder = saved(NETWORKS[name](), lambda found: {prefix + key: value for key, value in found.items()})
    for labels in ({}, {"num_labels": 4}):
        with refuses("was expected to hold every weight of a backbone, got missing .*; it is incomplete, or of another network"):
            load_classifier(folder, **labels)


@pytest.mark.parametrize(
    ("name", "weights", "config", "message"),
    [
        ("vit", without("layer.0.attention.output.dense.weight", "layers.0.attention.o_proj.weight"), {}, "got missing vit.layers.0.attention"),
        ("resnet", without("running_mean"), {}, "got missing resnet.*running_mean"),
        ("timm", without("layer2.0.conv1"), {}, "got missing timm_model.layer2.0.conv1.weight"),
        ("vit", dict, {"num_hidden_layers": 3}, "got missing vit.layers.2"),
        ("vit", dict, {"num_hidden_layers": 1}, "as many layers as its config says, got vit.layers.1"),
        ("vit", dict, {"image_size": 32}, r"got vit.embeddings.position_embeddings of \(1, 17, 32\) in place of \(1, 65, 32\)"),
        ("vit", dict, {"patch_size": 8}, "shapes that its config says, got vit.embeddings"),
        ("resnet", dict, {"num_channels": 1}, "shapes that its config says, got resnet.embedder"),
        ("resnet", dict, {"hidden_sizes": [8, 24]}, "shapes that its config says, got resnet.encoder"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("arguments", [{}, {"num_labels": 4}, {"num_labels": 4, "ignore_mismatched_sizes": True}])
def test_no_weight_of_a_backbone_is_fresh(saved, name, weights, config, message, arguments):
    with refuses(message):
        load_classifier(saved(NETWORKS[name](), weights, **config), **arguments)


@pytest.mark.parametrize(("name", "head"), [("vit", "classifier"), ("resnet", "classifier"), ("timm", "fc.")])
def test_a_classifier_is_fresh_only_where_it_is_trained(saved, caplog, name, head):
    folder = saved(NETWORKS[name](), without(head))
    with refuses("was expected to hold a classifier, got missing .*; fine-tune it first"):
        load_classifier(folder)
    with refuses("was expected to hold a classifier"):
        load_classifier(folder, num_labels=4, fresh_classifier=False)
    with caplog.at_level(logging.INFO):
        assert load_classifier(folder, num_labels=4).classifier_is_fresh
    assert "starts with a new classifier" in caplog.text


def test_what_stands_upon_a_backbone_may_be_fresh(tmp_path):
    """BEiT's pre-training has no pooler, which its classifier has."""
    config = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 32,
        "patch_size": 8,
    }
    BeitForMaskedImageModeling(BeitConfig(**config)).save_pretrained(tmp_path)
    assert load_classifier(tmp_path, num_labels=3).config.num_labels == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NETWORKS)
def test_half_precision_is_loaded_as_float32(saved, name, dtype):
    """float32 images pass, and small steps are not lost."""
    network = NETWORKS[name]().to(dtype)
    loaded = load_classifier(saved(network)).eval()
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.isfinite(loaded(pixel_values=torch.randn(2, 3, 16, 16)).logits).all()
    assert all(torch.equal(loaded.state_dict()[key].double(), value.double()) for key, value in network.state_dict().items())
    assert load_classifier(saved(network), dtype=dtype).dtype == dtype


def test_a_config_that_names_no_class(saved):
    """DeiT has two classifiers, of which transformers looks for the named one."""
    config = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 16,
        "patch_size": 8,
    }
    folder = saved(DeiTForImageClassification(DeiTConfig(num_labels=3, **config)), architectures=None)
    assert type(load_classifier(folder)) is DeiTForImageClassification


def test_adapters_are_no_network(tmp_path):
    vit().config.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with refuses("must hold a whole network, got adapters of PEFT; merge them"):
        load_classifier(tmp_path)


@pytest.mark.parametrize("whole", [False, True])
def test_the_classes_of_a_timm_network_are_those_that_it_was_given_last(tmp_path, whole):
    """Its config.json lists their names, and transformers would write the list of the first checkpoint again."""
    for place, names in enumerate((["ant", "bee", "cow"], ["owl", "pig", "rat"], ["elk", "fox"])):
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
        network = (
            load_classifier(tmp_path / str(place - 1), num_labels=len(names), ignore_mismatched_sizes=True, **labels)
            if place
            else from_scratch("resnet10t", len(names), 16, **labels)
        )
        (MixupModel(network, "mixup") if whole else network).save_pretrained(tmp_path / str(place))
        assert list(load_classifier(tmp_path / str(place)).config.id2label.values()) == names
        network = AutoModelForImageClassification.from_pretrained(
            tmp_path / str(place), num_labels=2, id2label={0: "new", 1: "one"}, ignore_mismatched_sizes=True
        )
        if whole:
            MixupModel(network, "mixup").save_pretrained(tmp_path / "again")
            assert list(load_classifier(tmp_path / "again").config.id2label.values()) == ["new", "one"]
