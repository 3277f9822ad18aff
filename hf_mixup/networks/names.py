"""The names of networks in the published tables. This file imports no package, because the command line reads it for its help."""

# published name: (architecture, architecture for images of up to 64 pixels, where CNNs have a 3x3 stem)
TABLE_NAMES: dict[str, tuple[str, str]] = {
    "ResNet-18": ("resnet18", "cifar_resnet18"),
    "ResNet-34": ("resnet34", "cifar_resnet34"),
    "ResNet-50": ("resnet50", "cifar_resnet50"),
    "ResNet-101": ("resnet101", "cifar_resnet101"),
    "ResNeXt-50-32x4d": ("resnext50_32x4d", "cifar_resnext50_32x4d"),
    "ResNeXt-101-32x4d": ("resnext101_32x4d", "resnext101_32x4d"),
    "WRN-28-8": ("cifar_wrn28_8", "cifar_wrn28_8"),
    "EfficientNet-B0": ("efficientnet_b0", "efficientnet_b0"),
    "MobileNetV2-1x": ("mobilenetv2_100", "mobilenetv2_100"),
    "DeiT-T": ("deit_tiny_patch16_224", "deit_tiny_patch16_224"),
    "DeiT-S": ("deit_small_patch16_224", "deit_small_patch16_224"),
    "DeiT-B": ("deit_base_patch16_224", "deit_base_patch16_224"),
    "ViT-S": ("openmixup_vit_small", "openmixup_vit_small"),
    "ViT-L": ("vit_large_patch16_224", "vit_large_patch16_224"),
    "PVT-T": ("pvt_tiny", "pvt_tiny"),
    "PVT-S": ("pvt_small", "pvt_small"),
    "Swin-T": ("swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224"),
    "ConvNeXt-T": ("convnext_tiny", "cifar_convnext_tiny"),
    "MogaNet-T": ("moganet_tiny", "moganet_tiny"),
}


def architecture_of(name: str, image_size: int) -> str:
    """The architecture of a published name for images of this size; other names are returned as they are."""
    return TABLE_NAMES[name][image_size <= 64] if name in TABLE_NAMES else name


def same_architecture(one: str, other: str) -> bool:
    """Whether two names may mean the same network: `ResNet-18` is `resnet18`, and `cifar_resnet18` too."""
    return one == other or one in TABLE_NAMES.get(other, ()) or other in TABLE_NAMES.get(one, ())
