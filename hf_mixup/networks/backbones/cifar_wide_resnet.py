"""Wide ResNets for small images, in the form of OpenMixup's CIFAR-100 table."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_mixup.networks.backbones.staged import Headless, StagedClassifier, classifier_for


class CifarWideResNetConfig(PreTrainedConfig):
    """The defaults are WRN-28-8.

    Args:
        depth: number of layers, 6 n + 4: n blocks of two convolutions in each of three stages.
        widen_factor: factor of the 16, 32 and 64 channels of the stages.
        num_channels: number of channels of the images.
    """

    model_type = "cifar_wide_resnet"

    depth: int = 28
    widen_factor: int = 8
    num_channels: int = 3


def _activation(channels: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(norm=nn.BatchNorm2d(channels, eps=1e-3, momentum=1e-3), act=nn.LeakyReLU(0.1)))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, activated: bool):
        super().__init__()
        self.activated = activated
        self.before, self.conv1 = _activation(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.between, self.conv2 = _activation(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, hidden: Tensor) -> Tensor:
        active = self.before(hidden)
        return self.conv2(self.between(self.conv1(active))) + self.shortcut(active if self.activated else hidden)


class CifarWideResNetForImageClassification(StagedClassifier):
    """WRN-28-8 (Zagoruyko and Komodakis, BMVC 2016, arXiv:1605.07146): 23,409,092 parameters with 100 classes.

    Deviations: as in OpenMixup, and unlike the paper, convolutions have biases, ReLUs have a negative slope of 0.1, batch norms update
    slowly, and the very first block uses its activated input in the shortcut.
    """

    config_class = CifarWideResNetConfig
    base_model_prefix = "wide_resnet"

    def __init__(self, config: CifarWideResNetConfig):
        super().__init__(config)
        if (config.depth - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4, got {config.depth}; take 28, or another one.")
        self.num_labels = config.num_labels
        self.stem = nn.Conv2d(config.num_channels, 16, 3, padding=1)
        stages, channels = [], 16
        for stage in range(3):
            modules: OrderedDict[str, nn.Module] = OrderedDict()
            for block in range((config.depth - 4) // 6):
                width = 16 * 2**stage * config.widen_factor
                modules[f"block{block}"] = _Block(channels, width, 2 if stage and block == 0 else 1, activated=stage == block == 0)
                channels = width
            stages.append(modules)
        stages[-1]["activation"] = _activation(channels)
        self.stages = nn.ModuleList(nn.Sequential(modules) for modules in stages)
        self.classifier = classifier_for(channels, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d | nn.Linear):
            # torch's initialisation, because transformers builds the modules without values
            module.reset_parameters()


class CifarWideResNetModel(Headless, CifarWideResNetForImageClassification):
    """The network without its classifier."""
