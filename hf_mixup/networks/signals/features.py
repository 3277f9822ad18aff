"""Feature maps: read from a network's stages during a pass, and the signals made from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_mixup.core.checks import check_known
from hf_mixup.core.policy import Policy, Signals
from hf_mixup.networks.families import Layout, check_pooled, classifier_of, effective_weight, final_norm, module_of, stage_names
from hf_mixup.networks.passes import Tap, watched
from hf_mixup.networks.signals.signal import EarlySignal, reading, resized


class Stages:
    """Reads stages of a network as maps. `names` are from `stage_names`; default: the last stage."""

    def __init__(self, network: nn.Module, names: Sequence[str] | None = None):
        known = stage_names(network)
        for name in names or ():
            check_known("stage", name, known)
        self.layout = Layout.of(network)
        self.modules = [module_of(network, name) for name in names or known[-1:]]

    def taps(self, size: tuple[int, int]) -> list[Tap]:
        """One tap for each stage, which reads maps (B, C, h, w). `size` is (H, W) of the images of the pass."""
        return [Tap(module, lambda args, output: self.layout.maps(output, size)) for module in self.modules]


def last_feature_map(network: nn.Module, images: Tensor) -> Tensor:
    """(B, C, h, w): the map that the network pools, in evaluation mode and without gradients."""
    return _read(network, Stages(network), images)


def _read(network: nn.Module, stages: Stages, images: Tensor) -> Tensor:
    with reading(network):
        _, (maps,) = watched(network, images, stages.taps(tuple(images.shape[2:])))
    return maps


def normalised(network: nn.Module, features: Tensor) -> Tensor:
    """The last map (B, C, h, w) in float32, with every place normalised by the network's final norm, if it has one."""
    norm = final_norm(network)
    if norm is None:
        return features.float()
    with torch.autocast(features.device.type, enabled=False):
        weight, bias = (None if value is None else value.float() for value in (norm.weight, norm.bias))
        places = F.layer_norm(features.float().permute(0, 2, 3, 1), norm.normalized_shape, weight, bias, norm.eps)
        return places.permute(0, 3, 1, 2)


def class_activation(network: nn.Module, features: Tensor, targets: Tensor) -> Tensor:
    """(B, h, w) float32: how much each place of the last map (B, C, h, w) speaks for the image's own class (arXiv:1512.04150).

    If a layer normalises what is classified, it normalises every place. Otherwise negative features count as 0, as in SnapMix's code.
    """
    classifier = classifier_of(network)
    with torch.autocast(features.device.type, enabled=False):
        features = normalised(network, features) if final_norm(network) is not None else features.float().relu()
        weight = targets.float() @ effective_weight(classifier).float()
        bias = 0 if classifier.bias is None else (targets.float() @ classifier.bias.float())[:, None, None]
        return (features * weight[:, :, None, None]).sum(1) + bias


class Features(EarlySignal):
    """(B, C, h, w) float32: the last feature map of the clean images."""

    def __init__(self, network: nn.Module, policy: Policy):
        self.network, self.policy, self.stages = network, policy, Stages(network)
        self.modules = self.stages.modules

    def take(self, images: Tensor, targets: Tensor, signals: Signals) -> Tensor:
        return _read(self.network, self.stages, resized(images, self.policy.teacher_size)).float()


class Activation(EarlySignal):
    """(B, h, w) float32: the class activation map of every clean image for its own label."""

    of_classes = True

    def __init__(self, network: nn.Module, policy: Policy):
        check_pooled(network)
        self.network, self.features = network, Features(network, policy)
        self.modules = self.features.modules

    @torch.no_grad()
    def take(self, images: Tensor, targets: Tensor, signals: Signals) -> Tensor:
        return class_activation(self.network, self.features.take(images, targets, signals), targets)
