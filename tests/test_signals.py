"""Saliency, features and attention are right for every family of networks, and reading them does not change the network."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import tiny
from hf_mixup.core.policy import Signals
from hf_mixup.networks.families import classifier_of, stage_names
from hf_mixup.networks.passes import watched
from hf_mixup.networks.signals import SIGNALS
from hf_mixup.networks.signals.features import Stages, last_feature_map
from hf_mixup.networks.signals.saliency import clean_gradient, input_saliency
from hf_mixup.networks.signals.signal import reading

every_family = pytest.mark.parametrize("family", tiny.FAMILIES)
POLICY = SimpleNamespace(teacher=None, teacher_size=None, clean_lam=0.0)


def hidden_states(network, images):
    """Stage maps by transformers' own account, (B, C, h, w); tokens of PVT and ViT as they are."""
    with torch.no_grad():
        outputs = network.eval()(pixel_values=images, output_hidden_states=True)
    return outputs.get("reshaped_hidden_states") or outputs.hidden_states


@every_family
def test_stages_are_the_hidden_states(family):
    network = tiny.network(family)
    images, _ = tiny.batch()
    names = stage_names(network)
    with reading(network):
        _, stages = watched(network, images, Stages(network, names).taps((tiny.SIDE, tiny.SIDE)))
    known = list(hidden_states(network, images))
    if family == "pvt":
        known = known[:-1]  # its last entry is the fourth stage again, normalised
    if family in ("mobilenet_v2", "efficientnet", "timm_efficientnet"):
        stages = stages[:-1]  # hidden_states leave out the convolution that is pooled
    for stage, state in zip(stages[::-1], known[::-1], strict=False):
        if state.ndim == 3:
            state = state[:, -stage[0, 0].numel() :].transpose(1, 2).reshape(stage.shape)
        assert_close(stage, state)
    assert len(stages) >= 2


@pytest.mark.parametrize("family", sorted(set(tiny.FAMILIES) - {"vit", "deit", "timm_vit", "pvt"}))  # those classify a class token
def test_the_last_map_is_what_the_classifier_reads(family):
    """Through the network's own norm, pooling and classifier, it gives the logits."""
    network = tiny.network(family)
    images, _ = tiny.batch()
    features = last_feature_map(network, images)
    pooled = features.mean((2, 3))
    if "convnext" in family:
        norm = network.get_submodule("timm_model.head.norm" if "timm" in family else f"{family.removeprefix('cifar_')}.layernorm")
        pooled = F.layer_norm(pooled, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    elif "swin" in family:
        norm = network.get_submodule("timm_model.norm" if "timm" in family else f"{family}.layernorm")
        pooled = F.layer_norm(features.permute(0, 2, 3, 1), norm.normalized_shape, norm.weight, norm.bias, norm.eps).mean((1, 2))
    with torch.no_grad():
        assert_close(classifier_of(network)(pooled), network.eval()(pixel_values=images).logits, atol=1e-5, rtol=1e-5)


# their features are not negative, so the relu keeps them
@pytest.mark.parametrize("family", ["resnet", "cifar_resnet", "timm_resnet"])
def test_activation_maps_average_to_the_logits(family):
    network = tiny.network(family)
    images, targets = tiny.batch()
    activation = SIGNALS["activation"](network, POLICY).take(images, targets, Signals())
    with torch.no_grad():
        logits = network.eval()(pixel_values=images).logits
    assert_close(activation.mean((1, 2)), (logits * targets).sum(1), atol=1e-5, rtol=1e-5)
    assert activation.std((1, 2)).min() > 0


@every_family
@pytest.mark.parametrize("name", ["input_grad", "saliency", "features", "activation"])
def test_row_32_taking_a_signal_leaves_no_trace(family, name):
    network = tiny.network(family)
    network.config.hidden_dropout_prob = 0.5
    frozen = next(module for module in network.modules() if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)))
    frozen.eval()  # a mode of its own, as when part of a network is kept frozen
    images, targets = tiny.batch()
    network(pixel_values=images).logits.sum().backward()  # gradients of an accumulation in progress
    signal = SIGNALS[name](network, POLICY)
    gradients = {key: None if p.grad is None else p.grad.clone() for key, p in network.named_parameters()}
    state = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    stream = torch.get_rng_state()
    value = signal.take(images, targets, Signals())
    assert not value.requires_grad
    assert images.grad is None
    assert not images.requires_grad
    assert torch.equal(torch.get_rng_state(), stream)
    assert [module.training for module in network.modules()] == modes
    for key, old in state.items():
        assert torch.equal(network.state_dict()[key], old), key
    for key, parameter in network.named_parameters():
        assert (parameter.grad is None) if gradients[key] is None else torch.equal(parameter.grad, gradients[key]), key


@every_family
def test_saliency_is_the_gradient_of_each_image_alone(family):
    network = tiny.network(family)
    images, targets = tiny.batch()
    saliency = input_saliency(network, images, targets)
    network.eval()
    for i in (0, 2):
        alone = images[i : i + 1].clone().requires_grad_()
        loss = F.cross_entropy(network(pixel_values=alone).logits, targets[i : i + 1])
        expected = torch.autograd.grad(loss, alone)[0].pow(2).mean(1).sqrt()[0]
        assert_close(saliency[i], expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
    assert saliency.dtype == torch.float32
    assert saliency.std((1, 2)).min() > 0


def test_row_31_saliency_of_a_sure_network_survives_half_precision():
    network = tiny.network("cifar_resnet")
    images, targets = tiny.batch()
    with torch.no_grad():
        logits = network.eval()(pixel_values=images).logits
        # sure of the right class to the last bit that float32 can tell: gradients at the logits of about 1e-7
        network.classifier.bias += 15 * targets[0] - logits[0]
    expected = input_saliency(network, images[:1], targets[:1])
    assert expected.max() < 1e-6
    network.half()
    saliency = input_saliency(network, images[:1].half(), targets[:1])
    assert_close(saliency / saliency.sum(), expected / expected.sum(), rtol=0.2, atol=2e-4)


def test_clean_gradients_train_on_the_clean_images():
    network = tiny.network("resnet")
    twin = copy.deepcopy(network)
    images, targets = tiny.batch()
    gradient, loss = clean_gradient(network, images, targets)
    loss.backward()
    inputs = images.clone().requires_grad_()
    expected = F.cross_entropy(twin(pixel_values=inputs).logits, targets)
    expected.backward()
    assert_close(loss, expected)
    assert_close(gradient / len(images), inputs.grad)
    for mine, its in zip(network.parameters(), twin.parameters(), strict=True):
        assert_close(mine.grad, its.grad)
    for mine, its in zip(network.buffers(), twin.buffers(), strict=True):
        assert_close(mine, its)


def test_saliency_passes_gradients_of_the_training_pass_under_autocast():
    network = tiny.network("cifar_resnet")
    images, targets = tiny.batch()
    features = SIGNALS["features"](network, POLICY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features.take(images, targets, Signals())
        input_saliency(network, images, targets)
        loss = network(pixel_values=images).logits.float().sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_teachers_see_images_of_their_size():
    network = tiny.network("resnet")
    images, targets = tiny.batch()
    small, large = (
        SIGNALS["features"](network, SimpleNamespace(teacher_size=size)).take(images, targets, Signals()) for size in (None, 4 * tiny.SIDE)
    )
    assert large.shape[2:] == (4 * small.shape[2], 4 * small.shape[3])
    enlarged = F.interpolate(images, (4 * tiny.SIDE, 4 * tiny.SIDE), mode="bilinear")
    assert_close(large, last_feature_map(network, enlarged))


def test_unknown_networks_are_refused():
    network = tiny.network("vit")
    network.config.model_type = "novel"
    with pytest.raises(ValueError, match=r"must have known .*resnet.*got 'novel'"):
        SIGNALS["features"](network, POLICY)
    with pytest.raises(ValueError, match=r"stage must be a known name, got 'vit\.layer\.0'; did you mean"):
        Stages(tiny.network("vit"), ["vit.layer.0"])
