"""Tiny networks of every family that methods read, with fresh weights."""

import torch
import transformers
from torch import nn

from hf_mixup.networks import backbones

SIDE = 64  # pixels of the images that all of them take
NUM_LABELS = 5

_CONV = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 2]}
_VIT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "image_size": SIDE, "patch_size": 16}
_SWIN = {"embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 2, 4], "window_size": 2, "image_size": SIDE, "patch_size": 4}
_PVT = {"hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2], "depths": [1, 1, 1, 2], "image_size": SIDE}
_BLOCKS = {
    "num_block_repeats": [1, 2],
    "in_channels": [32, 16],
    "out_channels": [16, 24],
    "kernel_sizes": [3, 3],
    "strides": [1, 2],
    "expand_ratios": [1, 6],
}
_CONFIGS = {
    "resnet": ("ResNet", {"embedding_size": 8, "layer_type": "basic", **_CONV}),
    "regnet": ("RegNet", {"embedding_size": 8, "groups_width": 8, **_CONV}),
    "convnext": ("ConvNext", _CONV),
    "convnextv2": ("ConvNextV2", _CONV),
    "mobilenet_v2": ("MobileNetV2", {"depth_multiplier": 0.35, "image_size": SIDE}),
    "efficientnet": ("EfficientNet", {"width_coefficient": 0.25, "hidden_dim": 320, "image_size": SIDE, **_BLOCKS}),
    "vit": ("ViT", _VIT),
    "deit": ("DeiT", _VIT),
    "swin": ("Swin", _SWIN),
    "swinv2": ("Swinv2", _SWIN),
    "pvt": ("Pvt", _PVT),
    "pvt_v2": ("PvtV2", _PVT),
}
_OWN = {
    "cifar_resnet": ("CifarResNet", {"depths": (1, 1, 1), "widths": (8, 8, 16), "embedding_size": 8}),
    "cifar_convnext": ("CifarConvNext", _CONV),
    "cifar_wide_resnet": ("CifarWideResNet", {"depth": 10, "widen_factor": 1}),
    "moganet": ("MogaNet", {"depths": (1, 1, 1, 1), "widths": (8, 8, 16, 16)}),
}
_TIMM = {
    "timm_resnet": ("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}),
    "timm_vit": ("vit_tiny_patch16_224", {"img_size": SIDE, "depth": 2, "embed_dim": 48}),
    "timm_swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": SIDE, "depths": (1, 1, 1), "embed_dim": 12, "num_heads": (1, 1, 2), "window_size": 2},
    ),
    "timm_convnext": ("convnext_atto", {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 2)}),
    "timm_efficientnet": ("efficientnet_lite0", {}),
}
FAMILIES = [*_OWN, *_CONFIGS, *_TIMM]


def network(family: str) -> nn.Module:
    """In training mode, with BatchNorm buffers that differ from fresh ones."""
    torch.manual_seed(0)
    if family in _TIMM:
        architecture, arguments = _TIMM[family]
        config = transformers.TimmWrapperConfig(architecture=architecture, num_labels=NUM_LABELS, model_args=arguments)
        made = transformers.TimmWrapperForImageClassification(config)
    else:
        (name, fields), library = (_OWN[family], backbones) if family in _OWN else (_CONFIGS[family], transformers)
        config = getattr(library, f"{name}Config")(num_labels=NUM_LABELS, **fields)
        made = getattr(library, f"{name}ForImageClassification")(config)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
        elif isinstance(module, nn.Conv2d):  # transformers' noise of 0.02 would let no gradient through a deep one
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return made.train()


def sharpened(network: nn.Module) -> nn.Module:
    """Attention that differs from place to place, which fresh weights hardly give."""
    for name, parameter in network.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight", "query.weight", "key.weight", "qkv.weight")):
            nn.init.normal_(parameter)
    return network


def batch(count: int = 4, side: int = SIDE) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and one-hot targets."""
    rng = torch.Generator().manual_seed(1)
    labels = torch.randint(NUM_LABELS, (count,), generator=rng)
    return torch.randn(count, 3, side, side, generator=rng), nn.functional.one_hot(labels, NUM_LABELS).float()
