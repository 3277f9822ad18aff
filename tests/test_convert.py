"""Checkpoints with OpenMixup's parameter names, made here, give the same logits after the conversion."""

import re
import sys

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_mixup import MixupModel
from hf_mixup.data.processor import IMAGENET_MEAN, IMAGENET_STD, ImageFormat
from hf_mixup.mixers import MixBlock
from run_script import ROOT

sys.path.insert(0, str(ROOT / "training_scripts"))
from convert_openmixup import main

sys.path.pop(0)


class Block(nn.Module):
    """A basic block under the names of OpenMixup, which are torchvision's."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        same = stride == 1 and inputs == width
        self.downsample = None if same else nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (out + (x if self.downsample is None else self.downsample(x))).relu()


class SmallResNet(nn.Module):
    """The ResNet-18 with a 3x3 stem, without its head."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
        inputs = 64
        for stage, width in enumerate((64, 128, 256, 512), 1):
            self.add_module(f"layer{stage}", nn.Sequential(Block(inputs, width, 1 if stage == 1 else 2), Block(width, width, 1)))
            inputs = width

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return x.mean((2, 3))


def shaken(module):
    """Statistics of batch norms that are not those of a fresh network."""
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5) if "var" in name else buffer.normal_(std=0.1)
    return module.eval()


def named(prefix, module):
    return {f"{prefix}.{name}": value for name, value in module.state_dict().items()}


@torch.no_grad()
def converted(tmp_path, state, *words):
    torch.save({"meta": {"epoch": 3, "config": "model = dict()"}, "state_dict": state}, tmp_path / "epoch_3.pth")
    main([str(tmp_path / "epoch_3.pth"), str(tmp_path / "out"), *words])
    return AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()


def seen(tmp_path):
    """What the folder's image processor does: size and crop of the images, mean and standard deviation."""
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    ramp = PIL.Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1))).convert("RGB")
    pixels = np.asarray(processor(ramp, return_tensors="pt")["pixel_values"][0])
    size = pixels.shape[-1]
    form = ImageFormat.of_checkpoint(tmp_path / "out")
    values = pixels[0] * form.std[0] + form.mean[0]  # from the left to the right they rise by the share that is kept
    ratio = (values[:, -1].mean() - values[:, 0].mean()) / (size - 1) * size * 255 / 256
    return size, pytest.approx(ratio, abs=0.02), *(pytest.approx(given, abs=1e-4) for given in (form.mean, form.std))


@torch.no_grad()
def test_small_resnet(tmp_path):
    backbone, head, x = shaken(SmallResNet()), nn.Linear(512, 7), torch.randn(2, 3, 32, 32)
    ours = converted(tmp_path, named("module.backbone", backbone) | named("module.head.fc", head), "--architecture", "cifar_resnet18")
    torch.testing.assert_close(ours(pixel_values=x).logits, head(backbone(x)))
    assert seen(tmp_path) == (32, 1.0, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201))


@torch.no_grad()
def test_imagenet_resnet(tmp_path):
    network, x = shaken(timm.create_model("resnet18", num_classes=7)), torch.randn(1, 3, 64, 64)
    state = {("head." if name.startswith("fc.") else "backbone.") + name: value for name, value in network.state_dict().items()}
    ours = converted(tmp_path, state, "--architecture", "resnet18")
    torch.testing.assert_close(ours(pixel_values=x).logits, network(x))
    assert seen(tmp_path) == (224, 0.875, IMAGENET_MEAN, IMAGENET_STD)
    own = ("--image_size", "128", "--crop_ratio", "0.8", "--image_mean", "0.5", "0.4", "0.3", "--image_std", "0.1", "0.2", "0.3")
    converted(tmp_path, state, "--architecture", "resnet18", *own)
    assert seen(tmp_path) == (128, 0.8, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))


@torch.no_grad()
def test_deit(tmp_path):
    network, x = timm.create_model("deit_tiny_patch16_224", num_classes=7).eval(), torch.randn(1, 3, 224, 224)
    theirs = (
        (r"^patch_embed\.proj\.", "backbone.patch_embed.projection."),
        (r"^(cls_token|pos_embed)", r"backbone.\1"),
        (r"^norm\.", "backbone.ln1."),
        (r"^head\.", "head.layers.head."),
        (r"^blocks\.(\d+)\.", r"backbone.layers.\1."),
        (r"\.norm([12])\.", r".ln\1."),
        (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
        (r"\.mlp\.fc2\.", ".ffn.layers.1."),
    )
    state = {}
    for name, value in network.state_dict().items():
        for pattern, replacement in theirs:
            name = re.sub(pattern, replacement, name)
        state[name] = value
    assert "backbone.layers.11.ffn.layers.0.0.weight" in state
    ours = converted(tmp_path, state, "--architecture", "deit_tiny_patch16_224")
    torch.testing.assert_close(ours(pixel_values=x).logits, network(x))


def mix_block(kind):
    """A Mix Block under OpenMixup's names."""
    if kind == "automix":
        layers = {"query.conv": nn.Conv2d(257, 128, 1), "value": nn.Conv2d(257, 1, 1)}
    else:
        layers = {
            "query.conv": nn.Conv2d(512, 128, 1),
            "key.conv": nn.Conv2d(512, 128, 1),
            "value.conv.0.conv": nn.Conv2d(256, 128, 1, bias=False),
            "value.conv.0.bn": nn.BatchNorm2d(128),
            "value.conv.1.conv": nn.Conv2d(128, 1, 1, bias=False),
        }
    return {f"mix_block.{name}.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["automix", "samix"])
def test_learned_mixers(tmp_path, kind):
    """The teacher by its head of clean images is what is deployed; student, other heads and Mix Block are kept."""
    student, teacher, x = shaken(SmallResNet()), shaken(SmallResNet()), torch.randn(2, 3, 32, 32)
    heads = {name: nn.Linear(512, 7) for name in ("head_one_q", "head_mix_q", "head_one_k", "head_mix_k")}
    state = named("backbone_q", student) | named("backbone_k", teacher) | named("backbone", teacher) | mix_block(kind)
    for name, head in heads.items():
        state |= named(f"{name}.fc", head)
    state |= named("head.fc", heads["head_one_k"])
    ours = converted(tmp_path, state, "--architecture", "cifar_resnet18")
    torch.testing.assert_close(ours(pixel_values=x).logits, heads["head_one_k"](teacher(x)))
    model = MixupModel.from_pretrained(tmp_path / "out").eval()
    assert model.choice.methods[0].name == kind
    torch.testing.assert_close(model.backbone(pixel_values=x).logits, heads["head_one_q"](student(x)))
    learned = model.states[kind]
    torch.testing.assert_close(learned.student_logits(model.backbone, x, clean=False), heads["head_mix_q"](student(x)))
    torch.testing.assert_close(learned.teacher_logits(x, clean=False), heads["head_mix_k"](teacher(x)))
    alone = MixBlock.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(alone.query.conv.weight, state["mix_block.query.conv.weight"])


def test_refusals(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("owned",))

    path = tmp_path / "bad.pth"
    torch.save({"state_dict": {}, "hook": Evil()}, path)
    with pytest.raises(ValueError, match="must be a checkpoint of tensors only"):
        main([str(path), str(tmp_path / "out"), "--architecture", "resnet18"])
    torch.save({"conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"must hold `backbone\.` or `backbone_q\.`"):
        main([str(path), str(tmp_path / "out"), "--architecture", "resnet18"])
    torch.save(named("backbone", SmallResNet()) | named("head.fc", nn.Linear(512, 7)), path)
    with pytest.raises(ValueError, match="backbone of the checkpoint must fit resnet18"):
        main([str(path), str(tmp_path / "out"), "--architecture", "resnet18"])
