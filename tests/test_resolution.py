"""A checkpoint at another resolution: its positions are interpolated, or an error says that this is not possible."""

import sys

import pytest
import timm
import torch
import transformers
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_mixup.networks.backbones import at_resolution, channels_of, check_takes, from_scratch, load_classifier
from images import COLOURS, evaluate, folder, train
from refusals import refuses

_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "num_labels": 3}
_WIDE = {**_VIT, "intermediate_size": 64}
_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "num_labels": 3}
_TOWER = {key: value for key, value in _WIDE.items() if key != "num_labels"}
NETWORKS = {
    "ViT": _WIDE,
    "DeiT": _WIDE,
    "Beit": {**_WIDE, "use_relative_position_bias": True, "use_absolute_position_embeddings": True},
    "Dinov2": _VIT,
    "Dinov2WithRegisters": _VIT,
    "Swin": {**_SWIN, "use_absolute_embeddings": True},
    "Swinv2": _SWIN,
    "Siglip": {"vision_config": _TOWER, "num_labels": 3},
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3},
}


def network(name):
    """With weights that are not 0 anywhere."""
    torch.manual_seed(0)
    made = getattr(transformers, f"{name}ForImageClassification")(getattr(transformers, f"{name}Config")(**NETWORKS[name]))
    for parameter in made.parameters():
        if parameter.detach().abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    return made.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_positions_are_those_of_transformers(tmp_path, name):
    """The logits are those of transformers' own interpolation on the fly; saved and loaded, the network has the new size."""
    old = network(name)
    images = torch.randn(2, 3, 48, 48)
    state = torch.random.get_rng_state()
    new = at_resolution(old, 48)
    assert torch.equal(torch.random.get_rng_state(), state)
    new.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        flies = {} if name in ("Dinov2", "Dinov2WithRegisters", "ResNet") else {"interpolate_pos_encoding": True}
        wanted = old(pixel_values=images, **flies).logits
        assert torch.allclose(new(pixel_values=images).logits, wanted, atol=1e-4)
        assert torch.allclose(again(pixel_values=images).logits, wanted, atol=1e-4)
    config = getattr(again.config, "vision_config", again.config)
    assert name == "ResNet" or config.image_size == 48
    assert at_resolution(new, 48) is new


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224", "resnet10t"])
def test_positions_are_those_of_timm(tmp_path, architecture):
    """As timm's `create_model(..., img_size=...)` makes them of a checkpoint."""
    torch.manual_seed(0)
    old = from_scratch(architecture, 3, 224).eval()
    new = at_resolution(old, 256)
    kind = {} if architecture == "resnet10t" else {"img_size": 256}
    theirs = timm.create_model(architecture, num_classes=3, **kind).eval()
    torch.save(old.timm_model.state_dict(), tmp_path / "weights.pth")
    prepare = getattr(sys.modules[type(theirs).__module__], "checkpoint_filter_fn", None)
    timm.models.load_checkpoint(theirs, str(tmp_path / "weights.pth"), filter_fn=prepare or (lambda state, model: state))
    images = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        assert torch.allclose(new(pixel_values=images).logits, theirs(images), atol=1e-5)
    new.save_pretrained(tmp_path)
    with torch.no_grad():
        again = load_classifier(tmp_path).eval()
        assert torch.allclose(again(pixel_values=images).logits, theirs(images), atol=1e-5)


def test_what_cannot_be_had_is_refused():
    with refuses("image_size must be one that LevitForImageClassification can take, got 96 .*; leave it out, or use"):
        config = {"hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}
        at_resolution(transformers.LevitForImageClassification(transformers.LevitConfig(image_size=64, **config)), 96)
    with refuses("image_size must be one that TimmWrapperForImageClassification can take, got 256 .*; leave it out"):
        at_resolution(from_scratch("mixer_s32_224", 3, 224), 256)
    vit = network("ViT").train()
    with refuses("ViTForImageClassification must take images of 48x48 pixels and 3 channels, .*; pass the --image_size that it was"):
        check_takes(vit, 3, 48, 48)
    assert vit.training
    check_takes(vit, 3, 32, 32)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("architecture", ["cifar_resnet20", "vit_mini", "resnet10t", "cifar_convnext_tiny"])
def test_channels_of_networks(architecture, channels):
    made = from_scratch(architecture, 3, 32, channels=channels)
    assert channels_of(made) == channels
    check_takes(made, channels, 32, 32)


def test_the_scripts_at_another_resolution(tmp_path):
    """A ViT of 32 pixels fine-tuned at 48: saved with that size, and a processor that gives it; without a size both are named."""
    vit = network("ViT")
    vit.config.id2label, vit.config.label2id = dict(enumerate(COLOURS)), {name: row for row, name in enumerate(COLOURS)}
    vit.save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    data = folder(tmp_path / "data", 4)
    words = ("--model_name_or_path", tmp_path / "vit", "--train_dir", data, "--validation_dir", data, "--max_steps", 2)
    words = (*words, "--per_device_train_batch_size", 6)
    trained = train(tmp_path / "out", *words, "--image_size", 48)
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.image_size == 48
    assert dict(AutoImageProcessor.from_pretrained(tmp_path / "out").size)["height"] == 48
    found = evaluate(tmp_path / "out", tmp_path / "evaluated", "--validation_dir", data, "--protocols", "occlusion")
    assert found["clean"]["top1"] == pytest.approx(trained["eval_top1"])
    transformers.ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(tmp_path / "vit")
    with refuses("ViTForImageClassification must take images of 48x48 pixels and 3 channels, got"):
        train(tmp_path / "other", *words)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    with refuses("ViTForImageClassification must take images of 24x24 pixels and 3 channels, got"):
        train(tmp_path / "smaller", *words, "--train_image_size", 24)
    with refuses("crop_ratio must be left out with a checkpoint"):
        train(tmp_path / "third", *words, "--crop_ratio", 0.9)
