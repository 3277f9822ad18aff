"""What is known of each family of networks: where it keeps its stages, its attention and its classifier, and how it lays them out.

The only file that knows timm and the families of transformers by name.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def bare(network: nn.Module) -> nn.Module:
    """The network inside of PEFT's wrapper, where it has one."""
    return network.get_base_model() if hasattr(network, "get_base_model") else network


def is_timm(network: nn.Module) -> bool:
    """Whether it is a timm model in transformers' wrapper."""
    return network.config.model_type == "timm_wrapper"


def main_input_of(network: nn.Module) -> str:
    """The name of the input that is mixed: `pixel_values`, `input_values` of sound, ..."""
    name = getattr(network, "main_input_name", "pixel_values")
    # transformers says input_ids of every network that does not say another
    return name if name == "pixel_values" or _takes(type(network), name) else "pixel_values"


@functools.cache
def _takes(cls: type[nn.Module], name: str) -> bool:
    taken = inspect.signature(cls.forward).parameters
    return name in taken or "pixel_values" not in taken


def takes_pictures(network: nn.Module) -> bool:
    """Whether the network is given images (B, C, H, W), and not videos or sound, as far as its name tells."""
    return main_input_of(network) == "pixel_values" and "ForVideo" not in type(network).__name__


def reads_tokens(network: nn.Module) -> bool:
    """Whether the network is given numbers of words (B, L), which cannot be mixed before its embeddings."""
    return main_input_of(network) == "input_ids"


# -- stages -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Where a family of networks keeps what mixing methods ask for.

    Attributes:
        stages: names of the modules that end a stage, in order, with `*` for a number; the last one gives what is pooled.
        norm: the module that normalises the last map, or the pooled one, before the classifier.
        class_token: whether it is a token that is classified, which the last map itself does not reach any more.
    """

    stages: tuple[str, ...]
    norm: str | None = None
    class_token: bool = False


# by `config.model_type`; timm's networks name their stages themselves
FAMILIES: dict[str, Family] = {
    "cifar_resnet": Family(("stages.*",)),
    "cifar_wide_resnet": Family(("stages.*",)),
    "moganet": Family(("stages.*",)),
    "resnet": Family(("resnet.encoder.stages.*",)),
    "regnet": Family(("regnet.encoder.stages.*",)),
    "cifar_convnext": Family(("convnext.encoder.stages.*",), "convnext.layernorm"),
    "convnext": Family(("convnext.encoder.stages.*",), "convnext.layernorm"),
    "convnextv2": Family(("convnextv2.encoder.stages.*",), "convnextv2.layernorm"),
    "mobilenet_v2": Family(("mobilenet_v2.layer.*", "mobilenet_v2.conv_1x1")),
    "efficientnet": Family(("efficientnet.encoder.blocks.*", "efficientnet.encoder.top_activation")),
    "vit": Family(("vit.layers.*",), "vit.layernorm", class_token=True),
    "deit": Family(("deit.layers.*",), "deit.layernorm", class_token=True),
    "swin": Family(("swin.encoder.layers.*",), "swin.layernorm"),
    "swinv2": Family(("swinv2.encoder.layers.*",), "swinv2.layernorm"),
    "pvt": Family(("pvt.encoder.block.*.*",), "pvt.encoder.layer_norm", class_token=True),
    "pvt_v2": Family(("pvt_v2.encoder.layers.*",)),
}


_TIMM_STEMS = ("act1", "bn1", "stem")


def family_of(network: nn.Module) -> Family:
    """Raises ValueError for networks that the table does not know."""
    network = bare(network)
    kind = network.config.model_type
    if is_timm(network):
        names = {name for name, _ in network.timm_model.named_modules()}
        stages = [entry["module"] for entry in _timm_stages(network) if entry["module"] not in _TIMM_STEMS]
        # the convolution that EfficientNet and MobileNetV2 have after the last stage that timm lists
        stages += ["bn2"] if {"conv_head", "bn2"} <= names else []
        norms = {name for name, module in network.timm_model.named_modules() if isinstance(module, nn.LayerNorm)}
        norm = next((f"timm_model.{name}" for name in ("norm", "fc_norm", "head.norm") if name in norms), None)
        pooled_token = getattr(network.timm_model, "global_pool", None) == "token"
        return Family(tuple(f"timm_model.{stage}" for stage in stages), norm, class_token=pooled_token)
    if kind not in FAMILIES:
        raise ValueError(
            f"the network's feature maps are needed, and known for {', '.join(sorted(FAMILIES))} and timm models, "
            f"got {kind!r}; take one of those, or a method that needs images only."
        )
    return FAMILIES[kind]


def _timm_stages(network: nn.Module) -> Sequence[dict[str, Any]]:
    info = getattr(network.timm_model, "feature_info", None)
    if info is None:
        raise ValueError(
            f"a timm model with feature_info is needed, got {network.config.architecture!r}; use a timm model of a convolutional family, such as resnet18."
        )
    return info if isinstance(info, list) else info.info


def stage_names(network: nn.Module) -> list[str]:
    """The modules whose outputs can be read or mixed, first to last; in transformers' models they give the `hidden_states`."""
    if reads_tokens(network):
        return _blocks_of_text(network)
    return [name for pattern in family_of(network).stages for name in numbered(network, pattern)]


def _blocks_of_text(network: nn.Module) -> list[str]:
    """The encoder layers of a network for texts: its first list of as many modules as the config says that there are layers."""
    network = bare(network)
    layers = getattr(network.config, "num_hidden_layers", None)
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return [f"{name}.{place}" for place in range(layers)]
    raise ValueError(
        f"the network must have a list of its {layers} layers, got {type(network).__name__}, which has none; name the modules in layers."
    )


def numbered(network: nn.Module, pattern: str) -> list[str]:
    """The modules of this name, in order; `*` stands for a number."""
    wanted = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    return [name for name, _ in bare(network).named_modules() if wanted.fullmatch(name)]


def module_of(network: nn.Module, name: str) -> nn.Module:
    """The module of a name that `stage_names` or `numbered` gave; of a sequence of modules the last, which gives the same."""
    module = bare(network).get_submodule(name)
    # timm's activation checkpointing runs what is in the sequence, but not the sequence itself
    while type(module) is nn.Sequential and len(module):
        module = module[-1]
    return module


@dataclass(frozen=True)
class Layout:
    """How outputs of a network's stages are laid out: as maps (B, C, h, w) or (B, h, w, C), or as tokens (B, N, C), those of the
    patches last.

    Attributes:
        patch: pixels of an image patch, (high, wide).
    """

    patch: tuple[int, int]
    channels_last: bool

    @classmethod
    def of(cls, network: nn.Module) -> Layout:
        network = bare(network)
        config = network.config
        if not takes_pictures(network):
            raise ValueError(
                f"feature maps are known for networks of images, got {type(network).__name__}; take a method that needs the input alone."
            )
        if is_timm(network):
            side = _timm_stages(network)[-1]["reduction"]
            return cls((side, side), str(getattr(network.timm_model, "output_fmt", "")).endswith("NHWC"))
        side = config.patch_sizes[0] if config.model_type == "pvt" else getattr(config, "patch_size", None) or 1
        return cls(tuple(side) if isinstance(side, (tuple, list)) else (side, side), channels_last=False)

    def maps(self, output: Any, size: tuple[int, int]) -> Tensor:
        """(B, C, h, w) of a stage's output, for images of `size`, (H, W)."""
        hidden = first_tensor(output)
        if hidden.ndim == 4:
            return hidden.permute(0, 3, 1, 2) if self.channels_last else hidden
        h, w = self._grid(hidden.shape[1], size)
        return hidden[:, hidden.shape[1] - h * w :].transpose(1, 2).unflatten(2, (h, w))

    def put(self, maps: Tensor, output: Any, prefix: Callable[[Tensor], Tensor]) -> Any:
        """`output` with other maps, and with `prefix` of the tokens before the patches (class, distillation, registers)."""
        hidden = first_tensor(output)
        if hidden.ndim == 4:
            return with_first(output, maps.permute(0, 2, 3, 1) if self.channels_last else maps)
        patches = maps.flatten(2).transpose(1, 2)
        before = prefix(hidden[:, : hidden.shape[1] - patches.shape[1]])
        return with_first(output, torch.cat([before, patches], 1))

    def _grid(self, tokens: int, size: tuple[int, int]) -> tuple[int, int]:
        """The grid of patches, halved as often as it takes to be no more than there are tokens."""
        h, w = (max(side // patch, 1) for side, patch in zip(size, self.patch, strict=True))
        while h * w > tokens:
            h, w = math.ceil(h / 2), math.ceil(w / 2)
        return h, w


def first_tensor(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def with_first(output: Any, tensor: Tensor) -> Any:
    """`output` with another first tensor."""
    return tensor if isinstance(output, Tensor) else (with_first(output[0], tensor), *output[1:])


def classifier_of(network: nn.Module) -> nn.Linear:
    """The last linear layer with an output for every class. Raises ValueError where there is none."""
    heads = [module for module in network.modules() if isinstance(module, nn.Linear) and module.out_features == network.config.num_labels]
    if not heads:
        raise ValueError(
            f"a network with a linear classifier is needed for activation maps, got {type(network).__name__}; use a network whose classifier is one nn.Linear, or another method."
        )
    return heads[-1]


def freeze_backbone(network: nn.Module) -> None:
    """Leaves the classifier alone to be trained (a linear probe). `keep_frozen` keeps the rest in evaluation mode."""
    network.requires_grad_(False)
    classifier_of(network).requires_grad_(True)
    network.backbone_is_frozen = True


def keep_frozen(network: nn.Module) -> None:
    """After `train()`: all but the classifier in evaluation mode, so that batch norms neither use nor follow the batch, where the
    network went through `freeze_backbone`."""
    if getattr(network, "backbone_is_frozen", False):
        network.eval()
        classifier_of(network).train()


def final_norm(network: nn.Module) -> nn.LayerNorm | None:
    """The layer norm between the last map and the classifier, where there is one."""
    name = family_of(network).norm
    norm = None if name is None else module_of(network, name)
    return norm if isinstance(norm, nn.LayerNorm) else None


# -- attention --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """Where a family of networks keeps its attention.

    Attributes:
        path: names of the blocks, with `*` for a number.
        norm, attention: of a block, what is normalised and what attends.
        projections: of the attention, query and key, or one name where both are made by one matrix.
        heads: of the attention, the attribute with their number.
        prefix: tokens before the patches.
        class_token: whether the first of them is what is classified.
        windows: whether only patches of one window see each other.
        reduction: of the attention, the attribute with the number of keys that are merged into one, where there is one.
    """

    path: str
    norm: str
    attention: str
    projections: tuple[str, ...]
    heads: str = "num_attention_heads"
    prefix: int = 0
    class_token: bool = False
    windows: bool = False
    reduction: str | None = None


_VIT = ("layernorm_before", "attention", ("q_proj", "k_proj"))
_PVT = ("layer_norm_1", "attention", ("query", "key"))
# by `config.model_type`; the kinds of timm are told apart below
BLOCKS: dict[str, Blocks] = {
    "vit": Blocks("vit.layers.*", *_VIT, prefix=1, class_token=True),
    "deit": Blocks("deit.layers.*", *_VIT, prefix=2, class_token=True),
    "swin": Blocks("swin.encoder.layers.*.blocks.*", *_VIT, windows=True),
    "pvt": Blocks(
        "pvt.encoder.block.*.*", "layer_norm_1", "attention.self", ("query", "key"), prefix=1, class_token=True,
        reduction="sequences_reduction_ratio",
    ),
    "pvt_v2": Blocks("pvt_v2.encoder.layers.*.blocks.*", *_PVT, reduction="spatial_reduction_ratio"),
}  # fmt: skip


def blocks_of(network: nn.Module) -> tuple[Blocks, list[nn.Module]]:
    """The table's row and the blocks themselves. Raises ValueError for networks whose attention is not known."""
    network = bare(network)
    kind = network.config.model_type
    row = _timm_blocks(network.timm_model) if is_timm(network) else BLOCKS.get(kind)
    if row is None:
        name = network.config.architecture if is_timm(network) else kind
        raise ValueError(
            f"a network whose attention can be read is needed, which are {', '.join(BLOCKS)} and timm's vit, deit and swin, got "
            f"{name!r}, which can give saliency, and features if it is convolutional; take one of those, or another method."
        )
    return row, [module_of(network, name) for name in numbered(network, row.path)]


def _timm_blocks(model: nn.Module) -> Blocks | None:
    from timm.layers import Attention
    from timm.models.swin_transformer import SwinTransformer, WindowAttention
    from timm.models.vision_transformer import VisionTransformer

    if isinstance(model, SwinTransformer) and type(model.layers[-1].blocks[-1].attn) is WindowAttention:
        return Blocks("timm_model.layers.*.blocks.*", "norm1", "attn", ("qkv",), "num_heads", windows=True)
    if isinstance(model, VisionTransformer):
        attention = getattr(model.blocks[-1], "attn", None)
        # subclasses, and queries and keys with a norm of their own, attend in other ways
        if type(attention) is Attention and isinstance(attention.q_norm, nn.Identity):
            return Blocks(
                "timm_model.blocks.*", "norm1", "attn", ("qkv",), "num_heads",
                prefix=model.num_prefix_tokens, class_token=model.cls_token is not None and model.global_pool == "token",
            )  # fmt: skip
    return None


def effective_weight(linear: nn.Module) -> Tensor:
    """The weight of a linear layer, with what active LoRA adapters of PEFT add to it."""
    weight = linear.weight
    if hasattr(linear, "get_delta_weight") and not (linear.merged or linear.disable_adapters):
        for adapter in linear.active_adapters:
            if adapter in linear.lora_A:
                weight = weight + linear.get_delta_weight(adapter).to(weight.dtype)
    return weight


def blocks_of_one_grid(network: nn.Module) -> tuple[Blocks, list[nn.Module]]:
    """Raises ValueError where tokens are merged on the way, or no class token gathers them."""
    row, blocks = blocks_of(network)
    if row.windows or row.reduction is not None or not row.class_token:
        raise ValueError(
            f"one grid of tokens from first to last is needed, with a class token, got {type(network).__name__}; take a ViT or DeiT."
        )
    return row, blocks


# -- images -----------------------------------------------------------------------------------------------------------------


def input_shape(network: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of images that the network takes."""
    network = bare(network)
    config = network.config
    if is_timm(network):
        channels, height, width = network.timm_model.pretrained_cfg["input_size"]
        arguments = config.model_args or {}
        side = arguments.get("img_size", (height, width))
        channels = arguments.get("in_chans", channels)
    else:
        # convolutional networks take any size
        side, channels = getattr(config, "image_size", 64), config.num_channels
    return channels, *((side, side) if isinstance(side, int) else side)
