"""Any network as an image classifier of transformers: the form that MixupModel trains, saves and loads."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from hf_mixup.core.hub import told_plainly
from hf_mixup.networks.backbones import load_classifier, load_strictly, of_classifier
from hf_mixup.networks.families import main_input_of

logger = logging.getLogger(__name__)

ADAPTER_NAME = "adapter_config.json"


class ModuleConfig(PreTrainedConfig):
    """Config of a `ModuleClassifier`.

    Args:
        architecture: class name of the module, shown to people.
    """

    model_type = "hf_mixup_module"
    architecture: str = ""


class ModuleClassifier(PreTrainedModel):
    """A module that maps images (B, C, H, W) to logits (B, num_labels), in the form of a classifier of transformers.

    Its weights are saved under the module's own names, so that `module.load_state_dict(load_file(folder / "model.safetensors"))` reads
    them. The module's code is not saved, so `MixupModel.from_pretrained(folder, backbone=module)` needs the module.

    Args:
        network: the module. It may return the logits, a mapping or an object with `logits`, or a tuple of the logits of equal heads. The mean
            of such heads is taken, as timm's distilled networks do in evaluation.
        num_labels: number of classes in the logits.
    """

    config_class = ModuleConfig
    main_input_name = "pixel_values"
    base_model_prefix = "network"

    def __init__(self, network: nn.Module, num_labels: int):
        super().__init__(ModuleConfig(num_labels=num_labels, architecture=type(network).__name__))
        self.network = network
        self.post_init()

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        logits = _logits(self.network(pixel_values))
        if logits.ndim != 2 or logits.shape[1] != self.config.num_labels:
            raise ValueError(
                f"the network must return logits (B, {self.config.num_labels}), as its last layer suggests, got {tuple(logits.shape)}; "
                "set its num_classes to the size of the logits."
            )
        return ImageClassifierOutput(logits=logits)

    def _init_weights(self, module):
        """The module is already initialised."""


def _logits(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return outputs["logits"]
    if hasattr(outputs, "_fields"):
        raise ValueError(
            f"the network must return only logits, got {', '.join(outputs._fields)}, whose other heads would not be trained; "
            "turn them off, as with aux_logits=False."
        )
    if hasattr(outputs, "logits"):
        return outputs.logits
    if isinstance(outputs, (tuple, list)) and outputs and all(isinstance(o, Tensor) and o.shape == outputs[0].shape for o in outputs):
        return torch.stack(list(outputs)).mean(0)
    raise TypeError(f"the network must return logits (B, num_labels), got {type(outputs).__name__}; return a tensor.")


# names of classes of transformers that return logits (B, num_labels) of the whole input
_CLASSIFIER = re.compile("For(Image|Video|Audio|Sequence)Classification")


def _classifies(network: PreTrainedModel) -> bool:
    """Whether the class is a classifier. Some, such as DeiT with its distillation token, take no labels; they can be trained here too."""
    if _CLASSIFIER.search(type(network).__name__):
        return True
    # other classes of transformers return something else: classes of pixels, boxes, words
    known = type(network).__module__.startswith("transformers.") and "For" in type(network).__name__
    return "labels" in inspect.signature(network.forward).parameters and not known and main_input_of(network) != "input_ids"


def as_classifier(network: Any) -> PreTrainedModel:
    """The network in the form that MixupModel takes; the parameters are the same objects.

    - a classifier of transformers, of images, videos, sounds or texts, or ours: unchanged
    - a PEFT model: its base model, which holds the adapters, and is saved as adapters
    - a network that `torch.compile` returned: without that wrapper, but still compiled
    - a timm model: in transformers' wrapper, if it can be built from its name
    - any other module: a `ModuleClassifier`

    Raises:
        TypeError: if it is not a module.
        ValueError: if it is not a classifier, or its number of classes is unknown.
    """
    if not isinstance(network, nn.Module):
        way_out = (
            f"load it with AutoModelForImageClassification.from_pretrained({network!r})"
            if isinstance(network, str)
            else "give a torch.nn.Module"
        )
        raise TypeError(f"model must be a network, got {type(network).__name__}; {way_out}.")
    if hasattr(network, "_orig_mod"):
        inner = as_classifier(network._orig_mod)
        # compiled in place, so that parameters keep the network's own names
        inner._compiled_call_impl = network.dynamo_ctx(inner._call_impl)
        return inner
    if hasattr(network, "peft_config") and hasattr(network, "get_base_model"):
        return _adapted(network)
    if isinstance(network, PreTrainedModel):
        if isinstance(network, ModuleClassifier) or _classifies(network):
            return network
        if "labels" not in inspect.signature(network.forward).parameters:
            raise ValueError(
                f"model must be an image classifier, got {type(network).__name__}, which has no labels; load it with AutoModelForImageClassification."
            )
        raise ValueError(
            f"model must classify whole images, videos, sounds or texts, got {type(network).__name__}; for a network that labels pixels use a stock "
            "Trainer with MixupCallback, for others train without mixing."
        )
    classes = _number_of_classes(network)
    return _of_timm(network, classes) or ModuleClassifier(network, classes)


def _number_of_classes(network: nn.Module) -> int:
    config = getattr(network, "config", None)
    for owner, name in ((network, "num_classes"), (network, "num_labels"), (config, "num_labels")):
        found = getattr(owner, name, None)
        if isinstance(found, int) and found > 0:
            return found
    layers = [module for module in network.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    if not layers:
        raise ValueError(f"the number of classes must be known, got {type(network).__name__} without it; set its attribute num_classes.")
    return getattr(layers[-1], "out_features", None) or layers[-1].out_channels


def _of_timm(network: nn.Module, classes: int) -> PreTrainedModel | None:
    """The network in transformers' wrapper; None if its name, and its image size, do not build the same network again."""
    import timm
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    name = (getattr(network, "pretrained_cfg", None) or {}).get("architecture")
    if name is None or not timm.is_model(name):
        return None
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    for model_args in ({}, *([{"img_size": size[0] if size[0] == size[1] else tuple(size)}] if size else [])):
        config = TimmWrapperConfig(architecture=name, num_labels=classes, model_args=model_args)
        with torch.random.fork_rng(devices=[]):
            wrapped = TimmWrapperForImageClassification(config)
        if _shape(wrapped.timm_model) == _shape(network):
            wrapped.timm_model = network
            return wrapped
    return None


def _shape(network: nn.Module) -> tuple:
    """Equal for two networks that compute the same. Dropout rates may differ, because evaluation does not use them."""
    layers = re.sub(r"DropPath\([^)]*\)|Dropout\([^)]*\)", "Identity()", repr(network))
    # transformers of timm pool without a layer
    return layers, str(getattr(network, "global_pool", "")), {name: tuple(value.shape) for name, value in network.state_dict().items()}


# -- adapters of PEFT -------------------------------------------------------------------------------------------------------


def _adapted(model: nn.Module) -> PreTrainedModel:
    """The base model with the adapters in it. It also keeps the PEFT model, hidden from `modules()`, because that model saves the adapters."""
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise ValueError(
            f"a PEFT model must have its adapters in its layers, got {type(model).__name__} with {model.active_adapter!r}; use LoRA or another method of that kind."
        )
    if model.active_adapters != ["default"]:
        raise ValueError(
            f"a PEFT model must train its adapter 'default', which is saved beside the config, got {', '.join(model.active_adapters) or 'none'}; call "
            "get_peft_model without adapter_name."
        )
    base = model.get_base_model()
    if not any(value.requires_grad for name, value in base.named_parameters() if of_classifier(base, name)):
        logger.warning(
            "the classifier is neither trained nor saved with the adapters; if it is new, name it in modules_to_save of the PEFT config"
        )
    object.__setattr__(base, "_peft_model", model)
    return base


def save_network(network: PreTrainedModel, folder: str | os.PathLike, state_dict: Mapping[str, Tensor], **kwargs: Any) -> None:
    """As `network.save_pretrained`. For a PEFT model it saves the adapters and their config."""
    adapters = getattr(network, "_peft_model", None)
    if adapters is not None:
        named = {f"base_model.model.{name}": value for name, value in state_dict.items()}
        adapters.save_pretrained(str(folder), state_dict=named, **{k: v for k, v in kwargs.items() if k == "is_main_process"})
        if kwargs.get("is_main_process", True):
            network.config.save_pretrained(folder)
        return
    if isinstance(network, ModuleClassifier):
        state_dict = {name.removeprefix("network."): value for name, value in state_dict.items()}
    network.save_pretrained(folder, state_dict=state_dict, **kwargs)


def restore_network(network: PreTrainedModel, folder: str | os.PathLike, unsaved: frozenset[str] = frozenset()) -> None:
    """Loads what `save_network` wrote, in place. Weights named in `unsaved` stay. Raises ValueError for missing, unexpected or misshapen weights."""
    adapters = getattr(network, "_peft_model", None)
    if adapters is not None:
        _restore_adapters(adapters, Path(folder))
    elif isinstance(network, ModuleClassifier):
        _load(network.network, Path(folder, "model.safetensors"))
    else:
        load_strictly(network, folder, unsaved)


def _restore_adapters(model: nn.Module, folder: Path) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    found = _read(folder / "adapter_model.safetensors")
    # base weights are not saved; neither are word embeddings, which networks of images do not have
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    _compare(folder, {name: value.shape for name, value in wanted.items()}, {name: value.shape for name, value in found.items()})
    set_peft_model_state_dict(model, found)


def _load(module: nn.Module, path: Path) -> None:
    found = _read(path)
    _compare(path.parent, {n: v.shape for n, v in module.state_dict().items()}, {n: v.shape for n, v in found.items()})
    module.load_state_dict(found)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path.parent} was expected to hold {path.name}, got none; give the folder of a complete checkpoint.")
    with told_plainly(path.parent):
        return load_file(path)


def _compare(folder: Path, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if odd:
        raise ValueError(
            f"{folder} was expected to hold every weight of this network, got {len(odd)} that differ ({', '.join(odd[:3])}); it is a checkpoint of another network."
        )


def load_network(folder: str | os.PathLike, backbone: nn.Module | None = None, **kwargs: Any) -> PreTrainedModel:
    """The network of a run, from its folder: as `load_classifier`, and with PEFT's adapters on their base model.

    Args:
        backbone: the network to load into, if the folder does not say how to build it: your own module, or the base of adapters that was made
            from no checkpoint.
    """
    folder = Path(folder)
    if backbone is not None:
        network = as_classifier(backbone)
        if (folder / ADAPTER_NAME).is_file() and not hasattr(network, "_peft_model"):
            network = _with_adapters(network, folder)
        return network
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    if (folder / ADAPTER_NAME).is_file():
        base = json.loads((folder / ADAPTER_NAME).read_text()).get("base_model_name_or_path")
        if not base:
            raise ValueError(
                f"{folder} was expected to name the network of its adapters, got adapters of a network that came from no checkpoint; give that network as backbone=."
            )
        labels = (
            {"id2label": {int(k): v for k, v in config["id2label"].items()}, "label2id": config["label2id"]} if "id2label" in config else {}
        )
        network = load_classifier(base, **labels, ignore_mismatched_sizes=True, fresh_classifier=True, **kwargs)
        saved = {name.removeprefix("base_model.model.") for name in _read(folder / "adapter_model.safetensors")}
        if network.classifier_is_fresh and not any(of_classifier(network, name) for name in saved & network.state_dict().keys()):
            raise ValueError(
                f"{folder} was expected to hold the classifier that its network {base} lacks, got adapters alone; train them again with the classifier in "
                "modules_to_save of the PEFT config."
            )
        return _with_adapters(network, folder)
    if config.get("model_type") == ModuleConfig.model_type:
        raise ValueError(
            f"{folder} was expected to hold a network of transformers, got the weights of a {config.get('architecture')}, whose code is not saved; give the network as backbone=."
        )
    return load_classifier(folder, **kwargs)


def _with_adapters(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    from peft import PeftModel

    return as_classifier(PeftModel.from_pretrained(base, str(folder), is_trainable=True))
