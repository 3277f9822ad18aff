"""Converts a checkpoint of OpenMixup to a folder of hf_mixup: `hf-mixup convert checkpoint.pth out --architecture resnet50`.

It converts ResNets and ResNeXts (ImageNet's and those for small images), DeiT and other plain vision transformers. They may be trained by any
method of `MixUpClassification`, or by AutoMix and SAMix, whose student, teacher, heads and Mix Block are kept. No code in the file is run.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_mixup import Method, MixupModel, get_method
from hf_mixup.cli.network import described
from hf_mixup.cli.parser import Parser
from hf_mixup.cli.refusals import log_to_screen, run
from hf_mixup.core.checks import check_between, check_count
from hf_mixup.data.processor import IMAGENET_MEAN, IMAGENET_STD, ImageFormat
from hf_mixup.mixers.mixblock import from_openmixup, renamed
from hf_mixup.networks.backbones import from_scratch
from hf_mixup.networks.families import is_timm

logger = logging.getLogger("convert_openmixup")

CIFAR = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201)  # mean and standard deviation in OpenMixup's configurations

TO_TIMM = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
    (r"^(blocks\.\d+)\.ln([12])\.", r"\1.norm\2."),
    (r"^(blocks\.\d+)\.ffn\.layers\.0\.0\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.ffn\.layers\.1\.", r"\1.mlp.fc2."),
    (r"^ln1\.", "norm."),
)


def to_cifar_resnet(name: str) -> str:
    """`layer2.0.bn1.weight` becomes `stages.1.0.convs.0.1.weight`: our block holds pairs of a convolution and its norm."""
    name = re.sub(r"^conv1\.", "stem.0.", re.sub(r"^bn1\.", "stem.1.", name))
    match = re.fullmatch(r"layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)\.(.+)", name)
    if match is None:
        return name
    stage, block, kind, number, rest = match.groups()
    inside = f"shortcut.{number}" if kind == "downsample." else f"convs.{int(number) - 1}.{int(kind == 'bn')}"
    return f"stages.{int(stage) - 1}.{block}.{inside}.{rest}"


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def read(path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint, by OpenMixup's names. Raises ValueError for files with code, or without weights."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a file of another kind makes of it
        raise ValueError(
            f"{path} must be a checkpoint of tensors only, got {(str(error).splitlines() or [type(error).__name__])[0]!r}; if you trust it, save only its `state_dict`."
        ) from None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    state = {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
    if not any(name.startswith(("backbone.", "backbone_q.")) for name in state):
        raise ValueError(f"{path} must hold `backbone.` or `backbone_q.`, got {sorted(state)[:3]}; it is not a classifier of OpenMixup.")
    return state


def head_of(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """`weight` and `bias` of a head, which is `fc` for CNNs, and `layers.head`, or `head`, for transformers."""
    for inside in ("fc.", "layers.head.", "head."):
        found = part(state, f"{name}.{inside}")
        if found:
            return found
    return {}


def classifier(architecture: str, state: Mapping[str, Tensor], backbone: str, head: Mapping[str, Tensor], size: int) -> PreTrainedModel:
    """Our network with the weights of a backbone and a head. Raises ValueError if they do not fit completely."""
    network = from_scratch(architecture, len(head["weight"]), size)
    weights = part(state, f"{backbone}.")
    if architecture.startswith("cifar_"):
        named = {to_cifar_resnet(name): value for name, value in weights.items()}
        named |= {f"classifier.{name}": value for name, value in head.items()}
    else:
        last = network.timm_model.pretrained_cfg["classifier"]
        named = {renamed(name, TO_TIMM): value for name, value in weights.items()} | {f"{last}.{name}": v for name, v in head.items()}
        named = {f"timm_model.{name}": value for name, value in named.items()}
    load(network, named, f"{backbone} of the checkpoint", architecture)
    return network


def load(module: torch.nn.Module, weights: Mapping[str, Tensor], what: str, where: str) -> None:
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip()
        raise ValueError(f"{what} must fit {where}, got {detail}; choose another architecture.") from None


def learned_method(block: Mapping[str, Tensor]) -> Method:
    """AutoMix or SAMix with the settings that follow from a Mix Block's weights; the other settings are as published."""
    told, inner = block["query.conv.weight"].shape[1], block["query.conv.weight"].shape[0]
    both = "key.conv.weight" in block
    told = told // 2 if both else told
    channels = told - told % 2  # an odd number has one channel for lam
    norms = {name: "bn" if f"{name}.norm.running_mean" in block else "ln" for name in ("query", "value") if f"{name}.norm.weight" in block}
    neck = "value.hidden.weight" in block
    values = block["value.hidden.weight" if neck else "value.weight"].shape[1]
    lam_input = "concat" if told % 2 else "multiply_residual" if both else "concat_v" if values == channels + 1 else "none"
    fields: dict[str, Any] = {
        "reduction": round(channels / inner),
        "lam_input": lam_input,
        "value_neck": neck,
        "value_norm": norms.get("value", "none") if neck else "bn",
        "x_qk_concat": both,
        "x_v_concat": values == 2 * told,
        "attention_norm": norms.get("query", "none"),
    }
    return get_method("samix" if both else "automix", **fields)


def convert(state: Mapping[str, Tensor], architecture: str, size: int) -> MixupModel:
    """Our model, with all parts that the checkpoint holds."""
    if not any(name.startswith("backbone_q.") for name in state):
        return MixupModel(classifier(architecture, state, "backbone", head_of(state, "head"), size), "vanilla")
    heads = {name: head_of(state, f"head_{name}") for name in ("one_q", "mix_q", "one_k", "mix_k")}
    # a run without a head for clean images is evaluated by the head for mixed images
    own_q, own_k = heads["one_q"] or heads["mix_q"], heads["one_k"] or heads["one_q"] or heads["mix_k"]
    student, teacher = (
        classifier(architecture, state, backbone, head, size) for backbone, head in (("backbone_q", own_q), ("backbone_k", own_k))
    )
    block = from_openmixup(part(state, "mix_block."))
    method = learned_method(block)
    channels = block["query.conv.weight"].shape[1] // (2 if "key.conv.weight" in block else 1) // 2 * 2
    for stage in (None, -1, -2, -3, -4):
        model = MixupModel(student, method.replaced(stage=stage))
        learned = model.states[method.name]
        if learned.mixer.channels == channels:
            break
    load(learned.mixer, block, "the Mix Block", f"features of {channels} channels of {architecture}")
    learned.teacher.network.load_state_dict(teacher.state_dict())
    learned.head.load_state_dict(heads["mix_q"] or own_q)
    learned.teacher_head.network.load_state_dict(heads["mix_k"] or own_k)
    return model


@dataclass
class ConvertArguments:
    """The content of the checkpoint."""

    architecture: str = field(metadata={"help": "resnet50, cifar_resnet18, deit_small_patch16_224, ...: a name of timm or hf_mixup."})
    image_size: int | None = field(default=None, metadata={"help": "Side of the images in pixels. Default: 32 for cifar_*, else 224."})
    crop_ratio: float | None = field(
        default=None, metadata={"help": "Share of the image's side that evaluation keeps. Default: 1 up to 64 pixels, else 0.875."}
    )
    image_mean: list[float] | None = field(
        default=None,
        metadata={
            "help": "Mean of the normalisation, one number for each channel. Default: ImageNet's, or CIFAR's for cifar_* with 32 pixels, as in "
            "OpenMixup's configurations."
        },
    )
    image_std: list[float] | None = field(
        default=None, metadata={"help": "Standard deviation of the normalisation, one number for each channel. Default: as for the mean."}
    )

    def __post_init__(self):
        small = self.architecture.startswith("cifar_")
        self.image_size = (32 if small else 224) if self.image_size is None else self.image_size
        usual = CIFAR if small and self.image_size == 32 else (IMAGENET_MEAN, IMAGENET_STD)
        self.image_mean, self.image_std = (list(own or other) for own, other in zip((self.image_mean, self.image_std), usual, strict=True))
        if len(self.image_mean) != 3 or len(self.image_std) != 3:
            raise ValueError(
                f"image_mean and image_std must be 3 numbers each, got {self.image_mean} and {self.image_std}; give one for each channel."
            )
        for low, numbers in ((0, self.image_mean), (0.001, self.image_std)):
            for number in numbers:
                check_between(low, 1, **{"image_mean" if low == 0 else "image_std": number})
        check_count(1, image_size=self.image_size)
        if self.crop_ratio is not None:
            check_between(0.01, 1, crop_ratio=self.crop_ratio)


def parser(prog: str = "convert_openmixup.py") -> Parser:
    groups = {"conversion": ["checkpoint", "output_dir", *(field.name for field in fields(ConvertArguments))]}
    made = Parser((ConvertArguments,), prog, "CHECKPOINT OUTPUT_DIR --architecture NAME [...]", __doc__.splitlines()[0], groups)
    made.add_argument("checkpoint", type=Path, help="A .pth file of OpenMixup.")
    made.add_argument("output_dir", type=Path, help="Folder for the converted model.")
    return made


def main(argv: list[str], prog: str = "convert_openmixup.py") -> None:
    reader = parser(prog)
    typed = reader.typed(argv)
    reader.help_if_asked(typed)
    [args] = reader.built(typed)
    log_to_screen()
    checkpoint, output_dir = typed["checkpoint"], typed["output_dir"]
    size = args.image_size
    ratio = args.crop_ratio or (1.0 if size <= 64 else 0.875)
    model = convert(read(checkpoint), args.architecture, size)
    _, form = described(model.backbone, ImageFormat(size, ratio, tuple(args.image_mean), tuple(args.image_std)), None)
    model.save_pretrained(output_dir)
    (form.of_timm() if is_timm(model.backbone) else form).processor().save_pretrained(output_dir)
    logger.info("%s, trained by %s, is in %s", args.architecture, model.choice, output_dir)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "convert_openmixup.py"))
