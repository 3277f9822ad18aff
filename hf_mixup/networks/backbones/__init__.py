"""Networks: from scratch by name, and from checkpoints of transformers, timm or this library, loaded strictly."""

from __future__ import annotations

import copy
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForVideoClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PvtConfig,
    ViTConfig,
)
from transformers.models.auto import modeling_auto as auto

from hf_mixup.core.checks import nearest
from hf_mixup.core.hub import told_plainly
from hf_mixup.networks.backbones.cifar_convnext import CifarConvNextConfig, CifarConvNextForImageClassification, CifarConvNextModel
from hf_mixup.networks.backbones.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification, CifarResNetModel
from hf_mixup.networks.backbones.cifar_wide_resnet import CifarWideResNetConfig, CifarWideResNetForImageClassification, CifarWideResNetModel
from hf_mixup.networks.backbones.moganet import MogaNetConfig, MogaNetForImageClassification, MogaNetModel
from hf_mixup.networks.families import classifier_of, fill_buffers, is_timm
from hf_mixup.networks.names import TABLE_NAMES, architecture_of

logger = logging.getLogger(__name__)

for _config, _network, _headless in (
    (CifarConvNextConfig, CifarConvNextForImageClassification, CifarConvNextModel),
    (CifarResNetConfig, CifarResNetForImageClassification, CifarResNetModel),
    (CifarWideResNetConfig, CifarWideResNetForImageClassification, CifarWideResNetModel),
    (MogaNetConfig, MogaNetForImageClassification, MogaNetModel),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _headless, exist_ok=True)
    AutoModelForImageClassification.register(_config, _network, exist_ok=True)

_WIDE = {"layer_type": "bottleneck", "depths": (3, 4, 6, 3)}
# our own names, for networks that timm lacks: the config and its fields. All other names are timm's
ARCHITECTURES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "cifar_resnet20": (CifarResNetConfig, {"depths": (3, 3, 3), "widths": (16, 32, 64), "embedding_size": 16}),
    "cifar_resnet18": (CifarResNetConfig, {}),
    "cifar_resnet34": (CifarResNetConfig, {"depths": (3, 4, 6, 3)}),
    "cifar_resnet50": (CifarResNetConfig, _WIDE),
    "cifar_resnet101": (CifarResNetConfig, {**_WIDE, "depths": (3, 4, 23, 3)}),
    "cifar_resnext50_32x4d": (CifarResNetConfig, {**_WIDE, "groups": 32, "base_width": 4}),
    "cifar_convnext_tiny": (CifarConvNextConfig, {}),
    "cifar_wrn28_8": (CifarWideResNetConfig, {}),
    "moganet_tiny": (MogaNetConfig, {}),
    # from transformers; timm lacks this first version
    "pvt_tiny": (PvtConfig, {}),
    "pvt_small": (PvtConfig, {"depths": (3, 4, 6, 3)}),
    # for digits and tests: a vision transformer that trains within a minute on a CPU
    "vit_mini": (
        ViTConfig,
        {
            "hidden_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 192,
            "patch_size": 4,
            "hidden_dropout_prob": 0.0,
        },
    ),
}

# timm's networks with other fields; OpenMixup's ViT-S is wider and shallower than timm's
TIMM_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "openmixup_vit_small": ("vit_base_patch16_224", {"depth": 8, "num_heads": 8, "mlp_ratio": 3.0}),
}


def from_scratch(
    architecture: str, num_labels: int, image_size: int, *, channels: int = 3, drop_path: float = 0.0, **labels: Any
) -> PreTrainedModel:
    """A network with fresh weights.

    Args:
        architecture: a name of `TABLE_NAMES`, of `ARCHITECTURES`, or any model of timm, with timm's own initialisation.
        num_labels: number of classes.
        image_size: side of the square images in pixels; vision transformers are built for this size.
        channels: number of channels of the images.
        drop_path: stochastic depth rate of the last block; it rises linearly from 0. Only for networks that have it.
        **labels: `id2label` and `label2id` of the config.

    Raises:
        ValueError: for unknown names, and for a `drop_path` above 0 if the network has no stochastic depth.
    """
    architecture = architecture_of(architecture, image_size)
    if architecture not in ARCHITECTURES:
        return _timm_from_scratch(architecture, num_labels, image_size, channels, drop_path, **labels)
    config, fields = ARCHITECTURES[architecture]
    fields = {**fields, "num_labels": num_labels, "num_channels": channels, **labels}
    if drop_path:
        if not hasattr(config, "drop_path_rate"):
            raise ValueError(f"drop_path must be 0 for {architecture!r}, which drops no paths, got {drop_path}; leave it out.")
        fields["drop_path_rate"] = drop_path
    if hasattr(config, "image_size"):
        fields["image_size"] = image_size
    return AutoModelForImageClassification.from_config(config(**fields))


def _timm_from_scratch(
    architecture: str, num_labels: int, image_size: int, channels: int, drop_path: float, **labels: Any
) -> PreTrainedModel:
    import timm
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    architecture, fields = TIMM_VARIANTS.get(architecture, (architecture, {}))
    if not timm.is_model(architecture):
        known = [*timm.list_models(), *ARCHITECTURES, *TIMM_VARIANTS, *TABLE_NAMES]
        raise ValueError(f"architecture must be a name of timm or of ours, got {architecture!r}; {nearest(architecture, known)}")
    model_args: dict[str, Any] = {**fields, **({"drop_path_rate": drop_path} if drop_path else {})}
    model_args |= {"in_chans": channels} if channels != 3 else {}
    default = timm.get_pretrained_cfg(architecture)
    if default is not None and default.input_size[-1] != image_size:
        try:
            model = timm.create_model(architecture, num_classes=num_labels, img_size=image_size, **model_args)
            model_args["img_size"] = image_size
        except TypeError:  # a convolutional network has no image size
            model = timm.create_model(architecture, num_classes=num_labels, **model_args)
    else:
        model = timm.create_model(architecture, num_classes=num_labels, **model_args)
    config = TimmWrapperConfig(architecture=architecture, num_labels=num_labels, model_args=model_args, **labels)
    wrapped = TimmWrapperForImageClassification(config)
    # transformers has overwritten timm's initialisation with normal noise, which is bad for convolutional networks
    wrapped.timm_model.load_state_dict(model.state_dict())
    return wrapped


def describe_for_timm(network: PreTrainedModel, **image: Any) -> None:
    """Adds to the config of a timm network what timm needs: the format of its images. Default: timm's own.

    Args:
        **image: `input_size` (channels, height, width), `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`.
    """
    config = network.config
    config.model_args = config.model_args or {}
    _forget_names(config)
    known = {**network.timm_model.pretrained_cfg, **(getattr(config, "pretrained_cfg", None) or {}), **image}
    if "img_size" in config.model_args and "input_size" not in image:
        side = config.model_args["img_size"]
        known["input_size"] = (known["input_size"][0], *((side, side) if isinstance(side, int) else side))
    wanted = (
        "input_size",
        "fixed_input_size",
        "interpolation",
        "crop_pct",
        "crop_mode",
        "mean",
        "std",
        "pool_size",
        "first_conv",
        "classifier",
    )
    config.pretrained_cfg = {key: known[key] for key in wanted if known.get(key) is not None}


def _forget_names(config: PreTrainedConfig) -> None:
    """Drops timm's list of class names, which `id2label` repeats: transformers would save this list even for other classes."""
    vars(config).pop("label_names", None)


def checkpoint_config(repo_or_folder: str | os.PathLike, **kwargs: Any) -> PreTrainedConfig:
    """The config of a checkpoint from a folder or the Hub, without its weights.

    Args:
        **kwargs: `revision`, `token`, `cache_dir`, `trust_remote_code`, and fields to replace, such as `num_labels`.
    """
    kwargs.setdefault("trust_remote_code", False)  # otherwise transformers asks at the keyboard
    with told_plainly(repo_or_folder, kwargs.get("revision")):
        return AutoConfig.from_pretrained(repo_or_folder, **kwargs)


def load_classifier(
    repo_or_folder: str | os.PathLike,
    *,
    image_size: int | None = None,
    config_name: str | os.PathLike | None = None,
    fresh_classifier: bool | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Loads a classifier from a folder or the Hub, of transformers, timm or this library. The config decides whether it is one of images,
    videos, sounds or texts. Only safetensors are loaded, and no code of the repository is run. Weights
    are float32, unless `dtype` says otherwise.

    Every weight comes from the checkpoint, except for those of a new classifier.

    Args:
        image_size: side of the square images, if not the checkpoint's; see `at_resolution`.
        config_name: folder or Hub id of another config.
        fresh_classifier: allows a new classifier if the checkpoint contains none. By default if `num_labels` or names are given, as in training; a
            network that is used as it is must have a classifier.
        **kwargs: arguments of `from_pretrained`, such as `num_labels`, `revision`, `ignore_mismatched_sizes`, `trust_remote_code`.

    Raises:
        ValueError: if the checkpoint cannot be loaded, lacks weights, has weights that do not fit its config, or has another number of classes
            and `ignore_mismatched_sizes` is not set.
    """
    folder = Path(repo_or_folder)
    if (folder / "adapter_config.json").is_file() and not any(folder.glob("model*.safetensors")):
        raise ValueError(
            f"{repo_or_folder} must hold a whole network, got adapters of PEFT; merge them with merge_and_unload(), and save that with save_pretrained()."
        )
    kwargs = {"trust_remote_code": False, "dtype": torch.float32, **kwargs}
    config_kwargs = {key: kwargs.pop(key) for key in ("num_labels", "id2label", "label2id") if key in kwargs}
    hub_kwargs = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "trust_remote_code") if key in kwargs}
    config = checkpoint_config(config_name or repo_or_folder, **config_kwargs, **hub_kwargs)
    config.architectures = config.architectures or []  # transformers looks into it where a family has several classifiers
    if config.model_type == "timm_wrapper":
        _forget_names(config)
        # timm writes num_classes there, and the wrapper would pass it a second time
        (config.model_args or {}).pop("num_classes", None)
    mismatches = kwargs.pop("ignore_mismatched_sizes", False)
    with told_plainly(repo_or_folder, kwargs.get("revision")), _quiet():
        network, report = TASKS[task_of(config.model_type)][1].from_pretrained(
            repo_or_folder, config=config, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    promised = checkpoint_config(repo_or_folder, **hub_kwargs).num_labels
    _check_loaded(
        network, report, str(repo_or_folder), promised, mismatches, bool(config_kwargs) if fresh_classifier is None else fresh_classifier
    )
    if is_timm(network) and Version(version("timm")) < Version("1.0.31"):  # it builds the network once more
        fill_buffers(network)
    return network if image_size is None else at_resolution(network, image_size)


def _check_loaded(
    network: PreTrainedModel, report: Mapping[str, Any], repo: str, promised: int, mismatches: bool, fresh_classifier: bool
) -> None:
    """Raises ValueError for weights that are not the checkpoint's, and may not be: transformers only warns of them.

    Args:
        report: what `from_pretrained` says beside the network.
        promised: classes of the checkpoint.
        mismatches: the classifier may have another number of classes.
        fresh_classifier: it may be missing.
    """
    weights = network.state_dict()
    # numbers that follow from the config, or count batches, are no weights
    missing = sorted(name for name in report["missing_keys"] if name in weights and weights[name].is_floating_point())
    lost = [name for name in missing if not of_classifier(network, name)]
    no_classifier = len(lost) < len(missing)
    other = sorted((str(name), *map(tuple, shapes)) for name, *shapes in report.get("mismatched_keys") or ())
    wrong = [one for one in other if not of_classifier(network, one[0])]
    if not lost and not wrong and other and network.config.num_labels != promised and not mismatches:
        raise ValueError(
            f"the checkpoint and the data set must have as many classes, got {promised} in {repo} and {network.config.num_labels} "
            "in the data set; pass --ignore_mismatched_sizes to start with a new classifier."
        )
    wrong = wrong or ([] if mismatches else other)
    if lost:
        raise ValueError(
            f"{repo} was expected to hold every weight of a backbone, got missing {', '.join(lost[:3])}; it is incomplete, or of another network."
        )
    if wrong:
        name, *shapes = wrong[0]
        raise ValueError(
            f"{repo} was expected to hold weights of the shapes that its config says, got {name} of {' in place of '.join(map(str, shapes))}; "
            "correct config.json, or take another checkpoint."
        )
    if no_classifier and not fresh_classifier:
        raise ValueError(
            f"{repo} was expected to hold a classifier, got missing {', '.join(missing[:3])}; fine-tune it first, or take another checkpoint."
        )
    patterns = {re.sub("[0-9]+", "#", name) for name in weights}
    prefix = f"{network.base_model_prefix}."
    left = sorted(name for name in report["unexpected_keys"] if {re.sub("[0-9]+", "#", one) for one in (name, prefix + name)} & patterns)
    if left:
        raise ValueError(
            f"{repo} was expected to hold as many layers as its config says, got {', '.join(left[:3])} beside them; correct config.json."
        )
    network.classifier_is_fresh = bool(no_classifier or other)
    if network.classifier_is_fresh:
        logger.info("%s: starts with a new classifier", repo)


def of_classifier(network: PreTrainedModel, name: str) -> bool:
    """Whether a weight is of what stands upon the backbone: the classifier, and what pools for it."""
    if "pooler" in name.split("."):
        return True
    if network.config.model_type == "timm_wrapper":
        found = network.timm_model.pretrained_cfg.get("classifier") or ()
        heads = [f"timm_model.{head}." for head in ([found] if isinstance(found, str) else found)]
        return name.startswith(tuple(heads))
    prefix = network.base_model_prefix
    if prefix and hasattr(network, prefix):
        return not name.startswith(f"{prefix}.")
    last = classifier_of(network)
    return any(module is last and name.startswith(f"{head}.") for head, module in network.named_modules())


def task_of(model_type: str) -> str:
    """The pipeline task of a classifier with this `config.model_type`: `image-classification`, `audio-classification`, ..."""
    return next((task for task, (known, _) in TASKS.items() if model_type in known), "image-classification")


# a network for several tasks gets the first
TASKS: dict[str, tuple[Mapping[str, Any], type]] = {
    "image-classification": (auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, AutoModelForImageClassification),
    "video-classification": (auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES, AutoModelForVideoClassification),
    "audio-classification": (auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES, AutoModelForAudioClassification),
    "text-classification": (auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, AutoModelForSequenceClassification),
}


def channels_of(network: PreTrainedModel) -> int:
    """The number of channels of the network's images."""
    config = network.config
    if config.model_type == "timm_wrapper":
        return (config.model_args or {}).get("in_chans", 3)
    return next((found for part in _parts(config) if isinstance(found := getattr(part, "num_channels", None), int)), 3)


def at_resolution(network: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """The network for square images of another size. Weights for each place in the image are interpolated, as in the networks' papers.

    Absolute positions are interpolated bicubically (ViT, DeiT, DINOv2, Swin) and tables of relative positions bilinearly (BEiT), as
    transformers does in a forward pass. timm's networks are changed as timm does it. Networks without such weights are returned unchanged.
    `config` has the new size.

    Raises:
        ValueError: if the network cannot have this size.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            return _timm_at(network, image_size) if network.config.model_type == "timm_wrapper" else _transformers_at(network, image_size)
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"image_size must be one that {type(network).__name__} can take, got {image_size} ({' '.join(str(error).split())[:200]}); "
            "leave it out, or use a checkpoint of that size."
        ) from None


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The config, and that of its part for images, if it has several parts."""
    return [config, *(part for part in [getattr(config, "vision_config", None)] if isinstance(part, PreTrainedConfig))]


def _transformers_at(network: PreTrainedModel, image_size: int) -> PreTrainedModel:
    config = copy.deepcopy(network.config)
    sized = [part for part in _parts(config) if getattr(part, "image_size", None) is not None]
    if all(part.image_size in (image_size, [image_size] * 2, (image_size,) * 2) for part in sized):
        return network
    for part in sized:
        part.image_size = image_size
    new = type(network)(config).to(network.dtype).train(network.training)
    wanted, weights = new.state_dict(), network.state_dict()
    new.load_state_dict({name: _interpolated(name, weights[name], wanted[name].shape) for name in wanted})
    return new


def _interpolated(name: str, weights: Tensor, shape: torch.Size) -> Tensor:
    if weights.shape == shape:
        return weights
    if name.endswith("relative_position_bias_table"):  # (places, heads); the last three places are for the class token
        grid = _resized(weights[:-3], math.isqrt(shape[0] - 3), "bilinear")
        return torch.cat([grid, weights[-3:]])
    flat = weights.flatten(0, -2)  # (tokens, width)
    count = math.prod(shape[:-1])
    # class tokens come first; only one number of them, 0 to 2, leaves a square grid before and after
    first = next((n for n in range(3) if all(math.isqrt(rows - n) ** 2 == rows - n for rows in (len(flat), count))), None)
    if first is None or weights.shape[-1] != shape[-1] or "position" not in name:
        raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(weights.shape)}; it cannot be interpolated")
    return torch.cat([flat[:first], _resized(flat[first:], math.isqrt(count - first), "bicubic")]).view(shape)


def _resized(grid: Tensor, side: int, mode: str) -> Tensor:
    """Resizes (old * old, width) to (side * side, width)."""
    old = math.isqrt(len(grid))
    images = grid.float().view(1, old, old, -1).permute(0, 3, 1, 2)
    return (
        F.interpolate(images, size=(side, side), mode=mode, align_corners=False).permute(0, 2, 3, 1).reshape(side * side, -1).to(grid.dtype)
    )


def _timm_at(network: PreTrainedModel, image_size: int) -> PreTrainedModel:
    from transformers import TimmWrapperForImageClassification

    old, config = network.timm_model, copy.deepcopy(network.config)
    model_args = config.model_args or {}
    known = {**old.pretrained_cfg, **(getattr(config, "pretrained_cfg", None) or {})}
    if model_args.get("img_size", known["input_size"][-1]) in (image_size, (image_size,) * 2, [image_size] * 2):
        return network
    config.model_args = {**model_args, "img_size": image_size}
    try:
        new = TimmWrapperForImageClassification(config)
    except TypeError:  # a convolutional network has no image size
        return network
    weights = old.state_dict()
    if any(weights[name].shape != value.shape for name, value in new.timm_model.state_dict().items() if name in weights):
        weights = sys.modules[type(old).__module__].checkpoint_filter_fn(weights, new.timm_model)
    new.timm_model.load_state_dict(weights)
    return new.to(network.dtype).train(network.training)


def check_takes(network: PreTrainedModel, channels: int, height: int, width: int) -> None:
    """Raises ValueError if the network cannot take images of `channels` channels and `height` x `width` pixels."""
    training = network.training
    try:
        with torch.no_grad():
            network.eval()(pixel_values=torch.zeros(1, channels, height, width, dtype=network.dtype, device=network.device))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        if "not implemented for" in str(error):  # this device lacks the dtype, so the error is not about the images
            return
        raise ValueError(
            f"{type(network).__name__} must take images of {height}x{width} pixels and {channels} channels, "
            f"got {type(error).__name__} ({' '.join(str(error).split())[:200]}); pass the --image_size that it was trained with."
        ) from None
    finally:
        network.train(training)


@contextmanager
def _quiet() -> Iterator[None]:
    """Context manager that keeps transformers quiet: it does not ask the Hub to convert pickled weights, and prints no table of missing
    weights; the caller checks those."""
    name, library = "DISABLE_SAFETENSORS_CONVERSION", logging.getLogger("transformers.modeling_utils")
    before = os.environ.get(name)

    def wanted(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    os.environ.setdefault(name, "1")
    library.addFilter(wanted)
    try:
        yield
    finally:
        library.removeFilter(wanted)
        if before is None:
            del os.environ[name]


def load_strictly(model: nn.Module, folder: str | os.PathLike, unsaved: frozenset[str] = frozenset()) -> None:
    """Loads the weights that `model.save_pretrained(folder)` wrote, in place. Weights named in `unsaved` stay as they are.

    It goes through `from_pretrained`, which knows old names of parameters. A plain `load_state_dict`, as in the Trainer, would leave half of
    a resumed ViT with fresh weights. Raises ValueError if any weight is missing, unexpected or of another shape.
    """
    if not any(Path(folder).glob("*.safetensors")):
        raise ValueError(f"{folder} was expected to hold a model in safetensors, got none; give the folder of a complete checkpoint.")
    # on the CPU, and without a change of the run's random streams
    with torch.random.fork_rng(devices=[]), _quiet():
        loaded, report = type(model).from_pretrained(
            folder, config=model.config, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    report["missing_keys"] = set(report["missing_keys"]) - unsaved
    wrong = {kind: list(report[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if report.get(kind)}
    if wrong:
        shown = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(map(str, sorted(keys)[:3]))}" for kind, keys in wrong.items())
        raise ValueError(
            f"{folder} was expected to hold every weight of {type(model).__name__}, got {shown}; it is a checkpoint of another network."
        )
    own = model.state_dict()
    model.load_state_dict({**loaded.state_dict(), **{name: own[name] for name in unsaved}}, strict=True)


__all__ = [
    "ARCHITECTURES",
    "CifarConvNextConfig",
    "CifarConvNextForImageClassification",
    "CifarResNetConfig",
    "CifarResNetForImageClassification",
    "CifarWideResNetConfig",
    "CifarWideResNetForImageClassification",
    "MogaNetConfig",
    "MogaNetForImageClassification",
    "at_resolution",
    "channels_of",
    "check_takes",
    "describe_for_timm",
    "from_scratch",
    "load_classifier",
    "load_strictly",
    "of_classifier",
]
