"""ConvNeXt for small images: transformers' network with a 3x3 stem that keeps the image size."""

from __future__ import annotations

from torch import nn
from transformers import ConvNextConfig, ConvNextForImageClassification, ConvNextModel


class CifarConvNextConfig(ConvNextConfig):
    """transformers' config; the defaults are ConvNeXt-T. `patch_size` is one pixel."""

    model_type = "cifar_convnext"

    patch_size: int = 1
    image_size: int = 32
    layer_norm_eps: float = 1e-6


class CifarConvNextForImageClassification(ConvNextForImageClassification):
    """ConvNeXt (arXiv:2201.03545) as in OpenMixup's CIFAR-100 tables: images of 32 pixels give maps of 32, 16, 8 and 4 pixels.
    27,895,012 parameters with 100 classes."""

    config_class = CifarConvNextConfig

    def __init__(self, config: CifarConvNextConfig):
        super().__init__(config)
        self.convnext.embeddings.patch_embeddings = _stem(config)
        self.post_init()  # initialises the new stem; initialised weights stay


class CifarConvNextModel(ConvNextModel):
    """The network without its classifier."""

    config_class = CifarConvNextConfig
    _keys_to_ignore_on_load_unexpected = (r"^classifier\.",)

    def __init__(self, config: CifarConvNextConfig):
        super().__init__(config)
        self.embeddings.patch_embeddings = _stem(config)
        self.post_init()


def _stem(config: CifarConvNextConfig) -> nn.Conv2d:
    return nn.Conv2d(config.num_channels, config.hidden_sizes[0], 3, padding=1)
