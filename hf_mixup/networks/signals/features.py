"""Where each model family keeps its stages, and how their outputs are read, or replaced, in passing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_mixup.core.checks import check_known
from hf_mixup.core.policy import Policy, Signals
from hf_mixup.networks.signals.signal import EarlySignal, reading, resized


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
    kind = network.config.model_type
    if kind == "timm_wrapper":
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
        raise ValueError(f"a timm model with feature_info is needed, got {network.config.architecture!r}; take another.")
    return info if isinstance(info, list) else info.info


def stage_names(network: nn.Module) -> list[str]:
    """The modules whose outputs can be read or mixed, first to last; in transformers' models they give the `hidden_states`."""
    return [name for pattern in family_of(network).stages for name in numbered(network, pattern)]


def numbered(network: nn.Module, pattern: str) -> list[str]:
    """The modules of this name, in order; `*` stands for a number."""
    wanted = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    return [name for name, _ in network.named_modules() if wanted.fullmatch(name)]


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
        config = network.config
        if config.model_type == "timm_wrapper":
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
            return _with_first(output, maps.permute(0, 2, 3, 1) if self.channels_last else maps)
        patches = maps.flatten(2).transpose(1, 2)
        before = prefix(hidden[:, : hidden.shape[1] - patches.shape[1]])
        return _with_first(output, torch.cat([before, patches], 1))

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


def _with_first(output: Any, tensor: Tensor) -> Any:
    return tensor if isinstance(output, Tensor) else (_with_first(output[0], tensor), *output[1:])


class Tap:
    """Sees the output of a module in passing; with a `change`, replaces it. Does nothing until armed.

    What is armed to change stays so until `disarm`, at the start of the next forward, since checkpointed layers run again in
    the backward pass; and acts in training only, whoever uses the network in between.
    """

    def __init__(self, module: nn.Module, change: Callable[..., Any] | None = None):
        self.change, self.data, self.armed, self.output = change, (), False, None
        self.handle = module.register_forward_hook(self._passing)

    def arm(self, *data: Any) -> None:
        """`data` goes to `change`, after the output; tensors, which a compiled network takes without compiling anew."""
        self.armed, self.data = True, data

    def disarm(self) -> None:
        self.armed, self.data, self.output = False, (), None

    def take(self) -> Any:
        """The output of the last pass, which is not kept."""
        output = self.output
        self.disarm()
        return output

    def _passing(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.armed:
            return None
        if self.change is None:
            self.output = output
            return None
        return self.change(output, *self.data) if module.training else None


class StageTaps:
    """Reads feature maps of stages, of any forward pass. `names` are of `stage_names`; by default the last one."""

    def __init__(self, network: nn.Module, names: Sequence[str] | None = None):
        known = stage_names(network)
        for name in names or ():
            check_known("stage", name, known)
        self.layout = Layout.of(network)
        self.taps = [Tap(network.get_submodule(name)) for name in names or known[-1:]]

    def arm(self) -> None:
        for tap in self.taps:
            tap.arm()

    def disarm(self) -> None:
        for tap in self.taps:
            tap.disarm()

    def take(self, size: tuple[int, int]) -> list[Tensor]:
        """(B, C, h, w) for each stage; `size` is (H, W) of the images that have just passed."""
        return [self.layout.maps(tap.take(), size) for tap in self.taps]

    def remove(self) -> None:
        for tap in self.taps:
            tap.handle.remove()


def last_feature_map(network: nn.Module, images: Tensor) -> Tensor:
    """(B, C, h, w): what the network pools, in evaluation mode and without gradients. For single uses; hooks come and go."""
    taps = StageTaps(network)
    try:
        taps.arm()
        with reading(network):
            network(pixel_values=images)
        return taps.take(tuple(images.shape[2:]))[0]
    finally:
        taps.remove()


def classifier_of(network: nn.Module) -> nn.Linear:
    """The last linear layer with an output for every class. Raises ValueError where there is none."""
    heads = [module for module in network.modules() if isinstance(module, nn.Linear) and module.out_features == network.config.num_labels]
    if not heads:
        raise ValueError(
            f"a network with a linear classifier is needed for activation maps, got {type(network).__name__}; take another one."
        )
    return heads[-1]


def final_norm(network: nn.Module) -> nn.LayerNorm | None:
    """The layer norm between the last map and the classifier, where there is one."""
    name = family_of(network).norm
    norm = None if name is None else network.get_submodule(name)
    return norm if isinstance(norm, nn.LayerNorm) else None


def normalised(network: nn.Module, features: Tensor) -> Tensor:
    """The last map (B, C, h, w) in float32, every place through the network's final norm, where it has one."""
    norm = final_norm(network)
    if norm is None:
        return features.float()
    with torch.autocast(features.device.type, enabled=False):
        weight, bias = (None if value is None else value.float() for value in (norm.weight, norm.bias))
        places = F.layer_norm(features.float().permute(0, 2, 3, 1), norm.normalized_shape, weight, bias, norm.eps)
        return places.permute(0, 3, 1, 2)


def class_activation(network: nn.Module, features: Tensor, targets: Tensor) -> Tensor:
    """(B, h, w) float32: what every place of the last map (B, C, h, w) says for the image's own class (arXiv:1512.04150).

    Where a layer normalises what is classified, every place is normalised by it; elsewhere negative features count as none,
    as in SnapMix's code.
    """
    classifier = classifier_of(network)
    with torch.autocast(features.device.type, enabled=False):
        features = normalised(network, features) if final_norm(network) is not None else features.float().relu()
        weight = targets.float() @ classifier.weight.float()
        bias = 0 if classifier.bias is None else (targets.float() @ classifier.bias.float())[:, None, None]
        return (features * weight[:, :, None, None]).sum(1) + bias


class Features(EarlySignal):
    """(B, C, h, w) float32: the last feature map of the clean images."""

    def __init__(self, network: nn.Module, policy: Policy):
        self.network, self.policy, self.taps = network, policy, StageTaps(network)

    def take(self, images: Tensor, targets: Tensor, signals: Signals) -> Tensor:
        seen = resized(images, self.policy.teacher_size)
        self.taps.arm()
        with reading(self.network):
            self.network(pixel_values=seen)
        return self.taps.take(tuple(seen.shape[2:]))[0].float()

    def disarm(self) -> None:
        self.taps.disarm()


class Activation(Features):
    """(B, h, w) float32: the class activation map of every clean image for its own label."""

    def __init__(self, network: nn.Module, policy: Policy):
        super().__init__(network, policy)
        classifier_of(network)

    @torch.no_grad()
    def take(self, images: Tensor, targets: Tensor, signals: Signals) -> Tensor:
        return class_activation(self.network, super().take(images, targets, signals), targets)
