"""For each family of networks: the names of its stages, its attention and its classifier, and the layout of its outputs.

The only file that knows timm and the families of transformers by name.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def bare(network: nn.Module) -> nn.Module:
    """The network without PEFT's wrapper."""
    return network.get_base_model() if hasattr(network, "get_base_model") else network


def is_timm(network: nn.Module) -> bool:
    """Whether the network is a timm model in transformers' wrapper."""
    return network.config.model_type == "timm_wrapper"


def fill_buffers(network: nn.Module) -> None:
    """Fills the buffers of a timm network that no checkpoint holds. transformers builds networks without values, and timm up to 1.0.30 then leaves
    some of them unfilled, such as the attention masks of Swin V2."""
    saved = network.state_dict().keys()
    waiting = {name: buffer for name, buffer in network.named_buffers() if name not in saved}
    if waiting:
        with torch.random.fork_rng(devices=[]):
            made = dict(type(network)(copy.deepcopy(network.config)).named_buffers())
        for name, buffer in waiting.items():
            if name in made and made[name].shape == buffer.shape:
                buffer.copy_(made[name])


def main_input_of(network: nn.Module) -> str:
    """The name of the input that is mixed: `pixel_values`, `input_values` of sound, ..."""
    name = getattr(network, "main_input_name", "pixel_values")
    # transformers gives input_ids for every network that names no other input
    return name if name == "pixel_values" or _takes(type(network), name) else "pixel_values"


@functools.cache
def _takes(cls: type[nn.Module], name: str) -> bool:
    taken = inspect.signature(cls.forward).parameters
    return name in taken or "pixel_values" not in taken


def takes_pictures(network: nn.Module) -> bool:
    """Whether the input is images (B, C, H, W), and not videos or sound, according to the network's class name."""
    return main_input_of(network) == "pixel_values" and "ForVideo" not in type(network).__name__


def reads_tokens(network: nn.Module) -> bool:
    """Whether the input is token ids (B, L), which can only be mixed after the embeddings."""
    return main_input_of(network) == "input_ids"


def is_decoder(network: nn.Module) -> bool:
    """Whether the network for texts reads from left to right, and classifies by the last word of the own text, where a mixture may go on."""
    # here, because importing hf_mixup must not import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind = network.config.model_type
    # transformers knows decoders as language models of the next word, and encoders as those of hidden words; some are both
    known = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return known or hasattr(bare(network), "score") or getattr(network.config, "is_encoder_decoder", False)


def word_embeddings(network: nn.Module) -> nn.Module:
    """Those of a network for texts. Raises ValueError where it has none."""
    try:
        return bare(network).get_input_embeddings()
    except NotImplementedError:
        raise ValueError(
            f"mixing words needs a network with one table of word embeddings, got {type(bare(network)).__name__}; use 'tmix', or another network."
        ) from None


def first_position(network: nn.Module) -> int | None:
    """The number before the first word's position, of networks that count positions from the words that are no padding, as RoBERTa does; None for
    others."""
    if "position_ids" not in inspect.signature(bare(network).forward).parameters:
        return None
    tables = (module for name, module in bare(network).named_modules() if name.endswith("position_embeddings"))
    return next((table.padding_idx for table in tables if isinstance(table, nn.Embedding)), None)


# -- stages -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Where a family of networks keeps the modules that methods need.

    Attributes:
        stages: names of the modules that end a stage, in order, with `*` for a number. The output of the last one is pooled.
        norm: the module that normalises the last map, or the pooled one, before the classifier.
        class_token: whether a class token is classified. Then the last map no longer changes the prediction.
    """

    stages: tuple[str, ...]
    norm: str | None = None
    class_token: bool = False


# by `config.model_type`; timm's networks list their stages themselves
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
# classes whose maps are (B, h, w, C), and which do not say so in `output_fmt`
_TIMM_NHWC = ("VOLO", "VisionTransformerSAM")


def family_of(network: nn.Module) -> Family:
    """The row of the table. Raises ValueError for networks that are not in it."""
    network = bare(network)
    kind = network.config.model_type
    if is_timm(network):
        names = {name for name, _ in network.timm_model.named_modules()}
        stages = [entry["module"] for entry in _timm_stages(network) if entry["module"] not in _TIMM_STEMS]
        # EfficientNet and MobileNetV2 have a convolution after the last stage that timm lists
        stages += ["bn2"] if {"conv_head", "bn2"} <= names else []
        norms = {name for name, module in network.timm_model.named_modules() if isinstance(module, nn.LayerNorm)}
        norm = next((f"timm_model.{name}" for name in ("norm", "fc_norm", "head.norm") if name in norms), None)
        pooled_token = getattr(network.timm_model, "global_pool", None) == "token"
        return Family(tuple(f"timm_model.{stage}" for stage in stages), norm, class_token=pooled_token)
    if kind not in FAMILIES:
        raise ValueError(
            f"the network must have known feature maps, which are those of {', '.join(sorted(FAMILIES))} and timm models, "
            f"got {kind!r}; use one of those, or a method that needs images only."
        )
    return FAMILIES[kind]


def _timm_stages(network: nn.Module) -> Sequence[dict[str, Any]]:
    info = getattr(network.timm_model, "feature_info", None)
    if info is None:
        raise ValueError(
            f"the network must be a timm model with feature_info, got {network.config.architecture!r}; use a timm model of a convolutional family, such as resnet18."
        )
    return info if isinstance(info, list) else info.info


def stage_names(network: nn.Module) -> list[str]:
    """Names of the modules whose outputs can be read or mixed, first to last. In transformers' models their outputs are the `hidden_states`."""
    if reads_tokens(network):
        return _blocks_of_text(network)
    names = [name for pattern in family_of(network).stages for name in numbered(network, pattern)]
    if not names:  # timm lists modules that some of its networks do not have
        raise ValueError(
            f"the network must have the stages that timm lists, got {bare(network).config.architecture!r} without; use another one."
        )
    return names


def _blocks_of_text(network: nn.Module) -> list[str]:
    """The encoder layers of a network for texts: the first list of modules whose length is the config's number of layers."""
    network = bare(network)
    layers = getattr(network.config, "num_hidden_layers", None)
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return [f"{name}.{place}" for place in range(layers)]
    raise ValueError(
        f"the network must have a list of its {layers} layers, got {type(network).__name__}, which has no such list; name the modules in layers."
    )


def numbered(network: nn.Module, pattern: str) -> list[str]:
    """Names of the modules that match the pattern, in order; `*` stands for a number."""
    wanted = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    return [name for name, _ in bare(network).named_modules() if wanted.fullmatch(name)]


def module_of(network: nn.Module, name: str) -> nn.Module:
    """The module with this name, from `stage_names` or `numbered`. For a sequence it is the last module, which has the same output."""
    module = bare(network).get_submodule(name)
    # timm's activation checkpointing calls the modules in the sequence, not the sequence itself
    while type(module) is nn.Sequential and len(module):
        module = module[-1]
    return module


@dataclass(frozen=True)
class Layout:
    """The layout of a stage's output: maps (B, C, h, w) or (B, h, w, C), or tokens (B, N, C) with the patches last.

    Attributes:
        patch: size of an image patch in pixels, (height, width).
        prefix: number of tokens before the patches, in the stages that have such tokens.
        alone: whether an output holds nothing but the map. If it holds more, as in networks of several branches, the map is not all that goes on.
    """

    patch: tuple[int, int]
    channels_last: bool = False
    prefix: int = 0
    alone: bool = False

    @classmethod
    def of(cls, network: nn.Module) -> Layout:
        network = bare(network)
        config = network.config
        if not takes_pictures(network):
            raise ValueError(
                f"feature maps are known for networks of images only, got {type(network).__name__}; use a method that needs only the input."
            )
        if is_timm(network):
            model, side = network.timm_model, _timm_stages(network)[-1]["reduction"]
            channels_last = type(model).__name__ in _TIMM_NHWC or str(getattr(model, "output_fmt", "")).endswith("NHWC")
            return cls((side, side), channels_last, getattr(model, "num_prefix_tokens", 0), alone=True)
        side = config.patch_sizes[0] if config.model_type == "pvt" else getattr(config, "patch_size", None) or 1
        prefix = BLOCKS[config.model_type].prefix if config.model_type in BLOCKS else 0
        return cls(tuple(side) if isinstance(side, (tuple, list)) else (side, side), prefix=prefix)

    def maps(self, output: Any, size: tuple[int, int]) -> Tensor:
        """A stage's output as (B, C, h, w), for images of `size` (H, W)."""
        hidden = first_tensor(output)
        if self.alone and not isinstance(output, Tensor):
            raise ValueError(
                f"a layer must give one tensor, got {type(output).__name__} of {len(output)}, as networks of several branches give; name another layer, "
                "or use another network."
            )
        if hidden.ndim == 4:
            return hidden.permute(0, 3, 1, 2) if self.channels_last else hidden
        if hidden.ndim != 3:
            raise ValueError(f"a layer must give maps (B, C, h, w) or tokens (B, N, C), got shape {tuple(hidden.shape)}; name another one.")
        h, w = self._grid(hidden.shape[1], size)
        return hidden[:, hidden.shape[1] - h * w :].transpose(1, 2).unflatten(2, (h, w))

    def put(self, maps: Tensor, output: Any, prefix: Callable[[Tensor], Tensor]) -> Any:
        """`output` with new maps; `prefix` changes the tokens before the patches (class, distillation, registers)."""
        hidden = first_tensor(output)
        if hidden.ndim == 4:
            return with_first(output, maps.permute(0, 2, 3, 1) if self.channels_last else maps)
        patches = maps.flatten(2).transpose(1, 2)
        before = prefix(hidden[:, : hidden.shape[1] - patches.shape[1]])
        return with_first(output, torch.cat([before, patches], 1))

    def _grid(self, tokens: int, size: tuple[int, int]) -> tuple[int, int]:
        """The grid of patches, halved until it has no more cells than there are tokens. Raises ValueError if it does not leave the tokens before the
        patches: those of another grid, or with patches left out, would be read at wrong places."""
        for half in (math.floor, math.ceil):  # what is left at the edge of an image is dropped, or padded
            h, w = (max(half(side / patch), 1) for side, patch in zip(size, self.patch, strict=True))
            while h * w > max(tokens, 1):
                h, w = max(half(h / 2), 1), max(half(w / 2), 1)
            if tokens - h * w in (0, self.prefix):
                return h, w
        raise ValueError(
            f"a layer of tokens must have one for each patch of {self.patch[0]}x{self.patch[1]} pixels, got {tokens} for an image of {size[0]}x{size[1]}; "
            "name another layer, or use another network."
        )


def first_tensor(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def with_first(output: Any, tensor: Tensor) -> Any:
    """`output` with its first tensor replaced."""
    return tensor if isinstance(output, Tensor) else (with_first(output[0], tensor), *output[1:])


def classifier_of(network: nn.Module) -> nn.Linear:
    """The last linear layer with an output for every class, or PEFT's layer around it. Raises ValueError if there is none."""
    heads: list[nn.Linear] = []
    inside: set[nn.Module] = set()
    for module in network.modules():
        if module in inside:
            continue
        adapted = hasattr(module, "get_delta_weight")  # its parts are linear layers too
        inside |= {*module.modules()} if adapted else set()
        if (adapted or isinstance(module, nn.Linear)) and module.out_features == network.config.num_labels:
            heads.append(module)
    if not heads:
        raise ValueError(
            f"activation maps need a network with a linear classifier, got {type(network).__name__}; use a network whose classifier is one nn.Linear, or another method."
        )
    return heads[-1]


def classifiers_of(network: nn.Module) -> list[nn.Linear]:
    """The classifiers of all heads: distilled networks have two, of which evaluation takes the mean."""
    last = classifier_of(network)

    named = bare(network).timm_model.pretrained_cfg.get("classifier") or () if is_timm(bare(network)) else ()
    known = [f".timm_model.{name}." for name in ([named] if isinstance(named, str) else named)]

    def equal(name: str, module: nn.Module) -> bool:
        if not isinstance(module, nn.Linear) or module.out_features != last.out_features:
            return False
        # a layer of a block may have this size too, and has the block's number in its name
        return any(head in f".{name}." for head in known) or (
            module.in_features == last.in_features and not re.search(r"\.\d+\.", f".{name}.")
        )

    others = [module for name, module in network.named_modules() if equal(name, module)]
    return [*(module for module in others if module is not last), last]


def freeze_backbone(network: nn.Module) -> None:
    """Freezes all but the classifier (a linear probe). `keep_frozen` keeps the rest in evaluation mode."""
    network.requires_grad_(False)
    for classifier in classifiers_of(network):
        classifier.requires_grad_(True)
    network.backbone_is_frozen = True


def leave_classifier(network: nn.Module) -> nn.Linear:
    """Excludes the classifier from training, until `take_classifier`, and returns it."""
    classifier = classifier_of(network)
    network._classifier_was_left = getattr(network, "_classifier_was_left", False) or any(p.requires_grad for p in classifier.parameters())
    return classifier.requires_grad_(False)


def take_classifier(network: nn.Module) -> None:
    """Trains the classifier again, if it was left out."""
    if getattr(network, "_classifier_was_left", False):
        network._classifier_was_left = False
        classifier_of(network).requires_grad_(True)


def keep_frozen(network: nn.Module, averages: Iterable[nn.Module] = ()) -> None:
    """For networks that `freeze_backbone` froze, call this after `train()`: all but the classifier go to evaluation mode, and so do `averages` of
    the network. So batch norms neither use nor follow the batch."""
    if getattr(network, "backbone_is_frozen", False):
        for part in (network, *averages):
            part.eval()
        for classifier in classifiers_of(network):
            classifier.train()


def final_norm(network: nn.Module) -> nn.LayerNorm | None:
    """The layer norm between the last map and the classifier, or None."""
    name = family_of(network).norm
    norm = None if name is None else module_of(network, name)
    return norm if isinstance(norm, nn.LayerNorm) else None


def check_pooled(network: nn.Module) -> None:
    """Raises ValueError if layers with weights stand between the last map and the classifier, other than the final layer norm: the classifier's weights
    say nothing of the map then. Networks define their layers in the order in which they run."""
    network, norm = bare(network), final_norm(network)
    last = set(network.get_submodule(stage_names(network)[-1]).modules())
    heads = {part for classifier in classifiers_of(network) for part in classifier.modules()}
    modules = list(network.named_modules())
    end = max(place for place, (_, module) in enumerate(modules) if module in last)
    between = [
        name
        for name, module in modules[end + 1 :]
        if module is not norm
        and module not in heads
        and (any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False)))
    ]
    if between:
        raise ValueError(
            f"activation maps need a network whose last map is only pooled, and normalised by a layer norm, before its classifier, got "
            f"{between[0].removeprefix('timm_model.')} between them in {getattr(network.config, 'architecture', type(network).__name__)}; use another "
            "network, or another method."
        )


# -- attention --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """Where a family of networks keeps the parts of its attention.

    Attributes:
        path: names of the blocks, with `*` for a number.
        norm, attention: names inside a block, of its first norm and its attention.
        projections: names inside the attention, of query and key; one name if one matrix makes both.
        heads: attribute of the attention with the number of heads.
        prefix: number of tokens before the patches.
        class_token: whether the first of them is classified.
        windows: whether patches attend only inside windows.
        reduction: attribute of the attention with the number of keys that are merged into one, if there is one.
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
# by `config.model_type`; timm's kinds are distinguished below
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
    """The table's row, and the blocks. Raises ValueError for networks whose attention is not known."""
    network = bare(network)
    kind = network.config.model_type
    row = _timm_blocks(network.timm_model) if is_timm(network) else BLOCKS.get(kind)
    if row is None:
        name = network.config.architecture if is_timm(network) else kind
        raise ValueError(
            f"the network must have attention that can be read, as these have: {', '.join(BLOCKS)}, and timm's vit, deit and swin; got "
            f"{name!r}, which can give saliency, and features if it is convolutional; use one of those, or another method."
        )
    return row, [module_of(network, name) for name in numbered(network, row.path)]


def _timm_blocks(model: nn.Module) -> Blocks | None:
    from timm.layers import Attention
    from timm.models.swin_transformer import SwinTransformer, WindowAttention
    from timm.models.vision_transformer import Block, VisionTransformer

    if isinstance(model, SwinTransformer) and type(model.layers[-1].blocks[-1].attn) is WindowAttention:
        return Blocks("timm_model.layers.*.blocks.*", "norm1", "attn", ("qkv",), "num_heads", windows=True)
    if isinstance(model, VisionTransformer):
        attention = getattr(model.blocks[-1], "attn", None)
        # subclasses, and queries and keys with their own norm, compute attention differently; so do blocks that normalise after it
        if type(model.blocks[-1]) is Block and type(attention) is Attention and isinstance(attention.q_norm, nn.Identity):
            return Blocks(
                "timm_model.blocks.*", "norm1", "attn", ("qkv",), "num_heads",
                prefix=model.num_prefix_tokens, class_token=model.cls_token is not None and model.global_pool == "token",
            )  # fmt: skip
    return None


def effective_weight(linear: nn.Module) -> Tensor:
    """The weight of a linear layer, including active LoRA adapters of PEFT."""
    weight = linear.weight
    if hasattr(linear, "get_delta_weight") and not (linear.merged or linear.disable_adapters):
        for adapter in linear.active_adapters:
            if adapter in linear.lora_A:
                weight = weight + linear.get_delta_weight(adapter).to(weight.dtype)
    return weight


def blocks_of_one_grid(network: nn.Module) -> tuple[Blocks, list[nn.Module]]:
    """As `blocks_of`. Raises ValueError if the network merges tokens, or has no class token."""
    row, blocks = blocks_of(network)
    if row.windows or row.reduction is not None or not row.class_token:
        raise ValueError(
            f"the network must have a class token and one grid of tokens from first to last block, got {type(network).__name__}; use a ViT or DeiT."
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
