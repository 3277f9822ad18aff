"""MogaNet: gated convolutions of several orders. Neither transformers nor timm has it."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_mixup.networks.backbones.staged import Headless, StagedClassifier, classifier_for


class MogaNetConfig(PreTrainedConfig):
    """The defaults are MogaNet-T.

    Args:
        depths, widths: numbers of blocks and of channels of each stage; widths are multiples of 8.
        ffn_ratios: width of the channel mixers, as a multiple of their stage's.
        drop_path_rate: rate of the last block; it rises linearly from 0.
        layer_scale: initial value of residual branches and element-wise scales.
        num_channels: number of channels of the images.
    """

    model_type = "moganet"

    depths: list[int] | tuple[int, ...] = (3, 3, 12, 2)
    widths: list[int] | tuple[int, ...] = (32, 64, 128, 256)
    ffn_ratios: list[int] | tuple[int, ...] = (8, 8, 4, 4)
    drop_path_rate: float = 0.0
    layer_scale: float = 1e-5
    num_channels: int = 3


class _Scale(nn.Module):
    def __init__(self, channels: int, value: float):
        super().__init__()
        self.value = value
        self.scale = nn.Parameter(torch.full((1, channels, 1, 1), value))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.scale * hidden


class _DropPath(nn.Module):
    """Drops the branch for a share of the images, in training."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return branch
        keep = 1 - self.rate
        return branch * (branch.new_empty(len(branch), 1, 1, 1).bernoulli_(keep) / keep)


class _MultiOrder(nn.Module):
    """Depth-wise convolutions of growing size: on all channels, then on three eighths and on four eighths of them."""

    def __init__(self, channels: int):
        super().__init__()
        self.split = [channels - channels * 3 // 8 - channels // 2, channels * 3 // 8, channels // 2]
        near, far = self.split[1:]
        self.reach5 = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.reach9 = nn.Conv2d(near, near, 5, padding=4, dilation=2, groups=near)
        self.reach19 = nn.Conv2d(far, far, 7, padding=9, dilation=3, groups=far)
        self.point = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        low, middle, high = self.reach5(hidden).split(self.split, 1)
        return self.point(torch.cat([low, self.reach9(middle), self.reach19(high)], 1))


class _Spatial(nn.Module):
    """Gated aggregation of several orders: the difference from the mean is scaled, then gate and values are multiplied."""

    def __init__(self, channels: int, value: float):
        super().__init__()
        self.first, self.gate, self.last = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.values = _MultiOrder(channels)
        self.sigma = _Scale(channels, value)
        self.act = nn.SiLU()

    def forward(self, hidden: Tensor) -> Tensor:
        shortcut = hidden
        hidden = self.first(hidden)
        hidden = self.act(hidden + self.sigma(hidden - hidden.mean((2, 3), keepdim=True)))
        return self.last(self.act(self.gate(hidden)) * self.act(self.values(hidden))) + shortcut


class _Channels(nn.Module):
    """A feed-forward layer with a depth-wise convolution, which scales the difference of the channels from their common part."""

    def __init__(self, channels: int, inner: int, value: float):
        super().__init__()
        self.first = nn.Conv2d(channels, inner, 1)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.common = nn.Conv2d(inner, 1, 1)
        self.sigma = _Scale(inner, value)
        self.last = nn.Conv2d(inner, channels, 1)
        self.act = nn.GELU()

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.act(self.depthwise(self.first(hidden)))
        return self.last(hidden + self.sigma(hidden - self.act(self.common(hidden))))


class _Block(nn.Module):
    def __init__(self, channels: int, inner: int, value: float, drop_path: float):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.spatial, self.channels = _Spatial(channels, value), _Channels(channels, inner, value)
        self.layer_scale1, self.layer_scale2 = _Scale(channels, value), _Scale(channels, value)
        self.drop_path = _DropPath(drop_path)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.drop_path(self.layer_scale1(self.spatial(self.norm1(hidden))))
        return hidden + self.drop_path(self.layer_scale2(self.channels(self.norm2(hidden))))


def _halve(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(inputs, outputs, 3, 2, 1), norm=nn.BatchNorm2d(outputs)))


class MogaNetForImageClassification(StagedClassifier):
    """MogaNet (Li et al., ICLR 2024, arXiv:2211.03295; github.com/Westlake-AI/MogaNet), tiny: 5,197,332 parameters with 1000 classes.

    Deviation from the official code: the gated product is not forced to float32 under mixed precision.
    """

    config_class = MogaNetConfig
    base_model_prefix = "moganet"

    def __init__(self, config: MogaNetConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        half = config.widths[0] // 2
        self.stem = nn.Sequential(_halve(config.num_channels, half), nn.GELU(), _halve(half, config.widths[0]))
        total, place, stages = sum(config.depths), 0, []
        for stage, (depth, width, ratio) in enumerate(zip(config.depths, config.widths, config.ffn_ratios, strict=True)):
            modules: OrderedDict[str, nn.Module] = OrderedDict(halve=_halve(config.widths[stage - 1], width)) if stage else OrderedDict()
            for block in range(depth):
                rate = config.drop_path_rate * place / max(total - 1, 1)
                modules[f"block{block}"] = _Block(width, width * ratio, config.layer_scale, rate)
                place += 1
            modules["norm"] = nn.BatchNorm2d(width)
            stages.append(nn.Sequential(modules))
        self.stages = nn.ModuleList(stages)
        self.classifier = classifier_for(config.widths[-1], config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, _Scale):
            nn.init.constant_(module.scale, module.value)


class MogaNetModel(Headless, MogaNetForImageClassification):
    """The network without its classifier."""
