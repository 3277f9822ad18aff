"""Networks of timm outside the usual families: their maps, attention and heads are right, or they are refused by name."""

import pytest
import torch
import transformers
from torch.testing import assert_close

from hf_mixup import MixupModel
from hf_mixup.networks.families import blocks_of, check_pooled, freeze_backbone, stage_names
from hf_mixup.networks.passes import watched
from hf_mixup.networks.signals.features import Stages
from hf_mixup.networks.signals.signal import reading

VIT = {"img_size": (32, 64), "depth": 2, "embed_dim": 48}


def made(architecture, **arguments):
    config = transformers.TimmWrapperConfig(architecture=architecture, num_labels=5, model_args=arguments)
    return transformers.TimmWrapperForImageClassification(config).eval()


def maps_of(network, size, place):
    with torch.no_grad():
        _, (maps,) = watched(network, torch.randn(2, 3, *size), Stages(network, [stage_names(network)[place]]).taps(size))
    return maps


@pytest.mark.parametrize(
    ("architecture", "arguments", "size"),
    [
        ("vit_tiny_patch16_224", {**VIT, "reg_tokens": 3}, (32, 64)),
        ("vit_tiny_patch16_224", {**VIT, "dynamic_img_size": True, "dynamic_img_pad": True}, (40, 72)),
        ("naflexvit_base_patch16_gap", {"depth": 2, "embed_dim": 48, "num_heads": 3}, (32, 64)),
        ("samvit_base_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3, "global_attn_indexes": ()}, (32, 32)),
        ("volo_d1_224", {"img_size": 64}, (64, 64)),
        ("levit_128s", {"img_size": 80, "embed_dim": (16, 32, 32), "num_heads": (2, 2, 2), "key_dim": 8, "depth": (1, 1, 1)}, (80, 80)),
    ],
)
def test_the_last_map_is_timms_own(architecture, arguments, size):
    network = made(architecture, **arguments)
    torch.manual_seed(0)
    ours = maps_of(network, size, -1)
    torch.manual_seed(0)
    with torch.no_grad():
        theirs = network.timm_model.forward_intermediates(torch.randn(2, 3, *size), indices=1, intermediates_only=True, output_fmt="NCHW")
    assert_close(ours, theirs[-1])


@pytest.mark.parametrize(
    ("architecture", "arguments", "size", "message"),
    [
        # tokens in the order of mask units
        ("hiera_tiny_224", {"stages": (1, 1, 1, 1), "embed_dim": 16}, (224, 224), "must have one for each patch"),
        ("levit_128s", {"img_size": 80, "embed_dim": (16, 32, 32), "num_heads": (2, 2, 2), "key_dim": 8}, (80, 80), "must have one for each patch"),
        ("vit_tiny_patch16_224", {**VIT, "img_size": 64, "patch_drop_rate": 0.5}, (64, 64), "must have one for each patch"),
        ("crossvit_tiny_240", {}, (240, 240), "must give one tensor, got list of 2|a timm model with feature_info"),
        ("twins_svt_small", {"depths": (1, 1, 1, 1)}, (224, 224), "must have the stages that timm lists"),
    ],
)  # fmt: skip
def test_maps_that_would_be_at_wrong_places_are_refused(architecture, arguments, size, message):
    network = made(architecture, **arguments).train()
    with pytest.raises(ValueError, match=message):
        maps_of(network, size, 0)


@pytest.mark.parametrize(
    ("architecture", "arguments", "layer"),
    [
        ("test_vit3", {}, "attn_pool"),
        ("test_vit4", {}, "fc_norm"),  # RMSNorm
        ("starnet_s050", {}, "norm"),
        ("repvit_m0_9", {"depth": (1, 1, 1, 1), "embed_dim": (8, 8, 8, 16)}, "head.head.bn"),
        ("mobilenetv3_small_050", {}, "conv_head"),
    ],
)
def test_activation_maps_need_a_classifier_of_the_map(architecture, arguments, layer):
    with pytest.raises(ValueError, match=f"got {layer}.* between them in {architecture}"):
        MixupModel(made(architecture, **arguments), "snapmix")


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [("vit_tiny_patch16_224", {**VIT, "class_token": False, "global_pool": "avg"}), ("test_convnext", {}), ("test_efficientnet", {}), ("test_nfnet", {})],
)  # fmt: skip
def test_pooling_and_a_layer_norm_are_taken(architecture, arguments):
    check_pooled(made(architecture, **arguments))


def test_attention_of_blocks_that_normalise_after_it_is_refused():
    with pytest.raises(ValueError, match="attention that can be read"):
        blocks_of(made("vit_base_patch16_rpn_224", img_size=32, depth=1, embed_dim=48, num_heads=3))


def test_a_linear_probe_trains_every_head_of_several_branches():
    network = made("crossvit_tiny_240")
    freeze_backbone(network)
    assert {name for name, value in network.named_parameters() if value.requires_grad} == {
        f"timm_model.head.{branch}.{kind}" for branch in (0, 1) for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("size", [(50, 50), (36, 52)])
def test_maps_of_swin_for_images_that_are_padded(size):
    config = transformers.SwinConfig(embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 4], window_size=2, image_size=size, num_labels=5)
    network = transformers.SwinForImageClassification(config).eval()
    images = torch.randn(2, 3, *size)
    with reading(network):
        _, maps = watched(network, images, Stages(network, stage_names(network)).taps(size))
        known = network(pixel_values=images, output_hidden_states=True).reshaped_hidden_states
    for ours, theirs in zip(maps, known[1:], strict=True):
        assert_close(ours, theirs)
