"""ResNets for small images: a 3x3 stem without pooling, as every CIFAR and Tiny-ImageNet table uses."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from hf_mixup.networks.backbones.staged import Headless, StagedClassifier, classifier_for


class CifarResNetConfig(PreTrainedConfig):
    """
    Args:
        layer_type: `basic` (two 3x3 convolutions) or `bottleneck` (1x1, 3x3, 1x1, the output 4 times as wide).
        depths: number of blocks of each stage; every stage but the first halves the image.
        widths: channels of the 3x3 convolutions of each stage, before `groups` and `base_width` are applied.
        embedding_size: channels of the stem.
        groups, base_width: 32 and 4 make a ResNeXt 32x4d.
        num_channels: number of channels of the images.
    """

    model_type = "cifar_resnet"

    layer_type: str = "basic"
    depths: list[int] | tuple[int, ...] = (2, 2, 2, 2)
    widths: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    embedding_size: int = 64
    groups: int = 1
    base_width: int = 64
    num_channels: int = 3


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs))


class _Block(nn.Module):
    def __init__(self, config: CifarResNetConfig, inputs: int, width: int, stride: int):
        super().__init__()
        if config.layer_type == "basic":
            outputs = width
            self.convs = nn.ModuleList([_conv(inputs, width, 3, stride), _conv(width, width, 3)])
        else:
            outputs = 4 * width
            inner = width * config.base_width // 64 * config.groups
            self.convs = nn.ModuleList([_conv(inputs, inner, 1), _conv(inner, inner, 3, stride, config.groups), _conv(inner, outputs, 1)])
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, 1, stride)
        self.outputs = outputs

    def forward(self, hidden: Tensor) -> Tensor:
        residual = self.shortcut(hidden)
        for conv in self.convs[:-1]:
            hidden = F.relu(conv(hidden))
        return F.relu(self.convs[-1](hidden) + residual)


class CifarResNetForImageClassification(StagedClassifier):
    """ResNet-18/34/50/101, ResNeXt-50 32x4d with a 3x3 stem (arXiv:1512.03385 section 4.2 for the stem), and the thin
    ResNet-20 of that section. With 10 classes: 11,173,962 parameters (ResNet-18), 22,992,714 (ResNeXt-50 32x4d)."""

    config_class = CifarResNetConfig
    base_model_prefix = "resnet"

    def __init__(self, config: CifarResNetConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.stem = _conv(config.num_channels, config.embedding_size, 3).append(nn.ReLU())
        stages, channels = [], config.embedding_size
        for stage, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
            blocks = []
            for block in range(depth):
                blocks.append(_Block(config, channels, width, stride=2 if stage and block == 0 else 1))
                channels = blocks[-1].outputs
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.classifier = classifier_for(channels, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            # by torch.nn.init, which transformers guards, so loaded values stay
            nn.init.zeros_(module.running_mean)
            nn.init.ones_(module.running_var)
            nn.init.zeros_(module.num_batches_tracked)
        elif isinstance(module, nn.Linear):
            # torch's initialisation, because transformers builds the modules without values
            module.reset_parameters()


class CifarResNetModel(Headless, CifarResNetForImageClassification):
    """The network without its classifier."""
