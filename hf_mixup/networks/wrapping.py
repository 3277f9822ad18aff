"""Any network as an image classifier of transformers: what MixupModel trains, saves and loads again."""

from __future__ import annotations

import inspect
import json
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
from hf_mixup.networks.backbones import load_classifier, load_strictly
from hf_mixup.networks.families import main_input_of

ADAPTER_NAME = "adapter_config.json"


class ModuleConfig(PreTrainedConfig):
    """Config of a `ModuleClassifier`.

    Args:
        architecture: class name of the module, for people.
    """

    model_type = "hf_mixup_module"
    architecture: str = ""


class ModuleClassifier(PreTrainedModel):
    """Any module that maps images (B, C, H, W) to logits (B, num_labels), in the form of a classifier of transformers.

    Its weights are saved under the module's own names, so that `module.load_state_dict(load_file(folder / "model.safetensors"))` reads
    them. The module's code is not saved: `MixupModel.from_pretrained(folder, backbone=module)` needs it given.

    Args:
        network: the module. It may return the logits, a mapping or an object with `logits`, or a tuple of the logits of equal heads, whose
            mean is taken, as timm's distilled networks do in evaluation.
        num_labels: of the logits.
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
                f"the network must return logits (B, {self.config.num_labels}), as its last layer promises, got {tuple(logits.shape)}; "
                "set its num_classes to their number."
            )
        return ImageClassifierOutput(logits=logits)

    def _init_weights(self, module):
        """The module comes initialised."""


def _logits(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return outputs["logits"]
    if hasattr(outputs, "_fields"):
        raise ValueError(
            f"the network must return logits alone, got {', '.join(outputs._fields)}, whose other heads would not be trained; "
            "turn them off, as with aux_logits=False."
        )
    if hasattr(outputs, "logits"):
        return outputs.logits
    if isinstance(outputs, (tuple, list)) and outputs and all(isinstance(o, Tensor) and o.shape == outputs[0].shape for o in outputs):
        return torch.stack(list(outputs)).mean(0)
    raise TypeError(f"the network must return logits (B, num_labels), got {type(outputs).__name__}; return a tensor.")


# what a class of transformers is called that gives logits (B, num_labels) of its whole input
_CLASSIFIER = re.compile("For(Image|Video|Audio|Sequence)Classification")


def _classifies(network: PreTrainedModel) -> bool:
    """Some, such as DeiT with its distillation token, are for use only: they take no labels, and train here all the same."""
    if _CLASSIFIER.search(type(network).__name__):
        return True
    # by its name, one of transformers gives something else: classes of pixels, boxes, words
    known = type(network).__module__.startswith("transformers.") and "For" in type(network).__name__
    return "labels" in inspect.signature(network.forward).parameters and not known and main_input_of(network) != "input_ids"


def as_classifier(network: Any) -> PreTrainedModel:
    """The network in the form that MixupModel takes; the parameters are the same objects.

    - a classifier of transformers, of images, videos, sounds or texts, or ours: as it is
    - a PEFT model: its base model, which holds the adapters, and is saved as adapters
    - a network that `torch.compile` returned: without that wrapper, still compiled
    - a timm model: in transformers' wrapper for them, where its name alone says how to build it
    - any other module: a `ModuleClassifier`

    Raises:
        TypeError: for what is no module.
        ValueError: for modules that are no classifiers, or whose number of classes cannot be told.
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
        # compiled in place from here on, so that names of parameters are the network's own
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
        raise ValueError(
            f"the number of classes must be known, got {type(network).__name__}, which does not tell; set its attribute num_classes."
        )
    return getattr(layers[-1], "out_features", None) or layers[-1].out_channels


def _of_timm(network: nn.Module, classes: int) -> PreTrainedModel | None:
    """In transformers' wrapper, if that builds the same network again from its name, and the size of its images where it has one."""
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
    """What two networks share that compute alike; rates of dropout, which evaluation has none of, may differ."""
    layers = re.sub(r"DropPath\([^)]*\)|Dropout\([^)]*\)", "Identity()", repr(network))
    return layers, {name: tuple(value.shape) for name, value in network.state_dict().items()}


# -- adapters of PEFT -------------------------------------------------------------------------------------------------------


def _adapted(model: nn.Module) -> PreTrainedModel:
    """The base model with the adapters in it. It keeps the PEFT model beside itself, unseen by `modules()`, which knows how to save them."""
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise ValueError(
            f"a PEFT model must have its adapters in its layers, got {type(model).__name__} with {model.active_adapter!r}; take LoRA, or another of that kind."
        )
    base = model.get_base_model()
    object.__setattr__(base, "_peft_model", model)
    return base


def save_network(network: PreTrainedModel, folder: str | os.PathLike, state_dict: Mapping[str, Tensor], **kwargs: Any) -> None:
    """As `network.save_pretrained`, which is what it is for most: of a PEFT model the adapters, and its config beside them."""
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
    """Loads what `save_network` wrote, in place; weights that are `unsaved`, by name, stay. Raises ValueError when anything is missing, left over or of another shape."""
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
    # base weights are not saved; those of embeddings neither, which images have none of
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
            f"{folder} was expected to hold every weight of this network, got {len(odd)} that differ ({', '.join(odd[:3])}); it is a checkpoint of another one."
        )


def load_network(folder: str | os.PathLike, backbone: nn.Module | None = None, **kwargs: Any) -> PreTrainedModel:
    """The network of a run, from its folder: as `load_classifier`, and adapters of PEFT upon their base model.

    Args:
        backbone: the network to load into, where the folder cannot say how it is built: a module of one's own, or the base of adapters
            that came from no checkpoint.
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
                f"{folder} was expected to name the network of its adapters, got one that came from no checkpoint; give it as backbone=."
            )
        labels = (
            {"id2label": {int(k): v for k, v in config["id2label"].items()}, "label2id": config["label2id"]} if "id2label" in config else {}
        )
        return _with_adapters(load_classifier(base, **labels, ignore_mismatched_sizes=True, **kwargs), folder)
    if config.get("model_type") == ModuleConfig.model_type:
        raise ValueError(
            f"{folder} was expected to hold a network of transformers, got the weights of a {config.get('architecture')}, whose code is not saved; give the network as backbone=."
        )
    return load_classifier(folder, **kwargs)


def _with_adapters(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    from peft import PeftModel

    return as_classifier(PeftModel.from_pretrained(base, str(folder), is_trainable=True))
