"""The attention that we read equals the network's own, for every family, and reading it does not change the network."""

import copy

import pytest
import torch
import transformers
from timm.models import swin_transformer as timm_swin
from torch.testing import assert_close
from transformers.models.swin import modeling_swin as swin

import tiny
from hf_mixup import MixupModel, get_method
from hf_mixup.core.plan import blend
from hf_mixup.core.rng import MixKey
from hf_mixup.networks.passes import compile_around, watched
from hf_mixup.networks.signals.attention import GridAttention
from refusals import refuses

FAMILIES = ["vit", "deit", "swin", "pvt", "pvt_v2", "timm_vit", "timm_swin"]
TINY = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 64}
every_family = pytest.mark.parametrize("family", FAMILIES)


def eager(network, images):
    """(B, heads, N, N) of the last block by the network's own account, from a copy without fused attention."""
    other = copy.deepcopy(network).eval()
    if other.config.model_type == "timm_wrapper":
        seen = []
        block = other.timm_model.blocks[-1] if hasattr(other.timm_model, "blocks") else other.timm_model.layers[-1].blocks[-1]
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, output: seen.append(args[0]))
        with torch.no_grad():
            other(pixel_values=images)
        return seen[0]
    if other.config.model_type not in ("pvt", "pvt_v2"):
        other.set_attn_implementation("eager")
    with torch.no_grad():
        attention = other(pixel_values=images, output_attentions=True).attentions[-1]
    return attention[-1] if isinstance(attention, tuple) else attention


def expected(network, images, kind):
    """What the official codes make of it, on the grid."""
    attention = eager(network, images).mean(1)
    family = network.config.model_type
    tokens = attention.shape[-1]
    side = int(tokens**0.5)
    first = tokens - side * side
    class_token = first > 0
    share = attention[:, 0, first:] if class_token and kind == "importance" else attention[:, first:, first:].mean(1)
    if family == "swin" or "swin" in getattr(network.config, "architecture", ""):
        return from_windows(share, len(images))
    return share.view(len(images), side, side)


def from_windows(share, batch):
    """(B * n, side * side) of windows that are not shifted, back on the grid."""
    side, count = int(share.shape[1] ** 0.5), int((len(share) // batch) ** 0.5)
    grid = share.view(batch, count, count, side, side).transpose(2, 3)
    return grid.reshape(batch, count * side, count * side)


def made(family, sharp=True):
    """In training mode; only the depth is not random, so that two passes can be compared."""
    network = tiny.sharpened(tiny.network(family)) if sharp else tiny.network(family)
    for module in network.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return network


def taken(network, attention, images):
    _, (share,) = watched(network, images, [attention.tap(tuple(images.shape[2:]))])
    return share


def hooks(network):
    return [hook for module in network.modules() for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())]


@every_family
@pytest.mark.parametrize("kind", ["importance", "received"])
def test_it_is_the_eager_attention(family, kind):
    network = made(family)
    images, _ = tiny.batch()
    taps = GridAttention(network, kind)
    share = taken(network, taps, images)
    assert_close(share, expected(network, images, kind), atol=1e-6, rtol=1e-4)
    assert not share.requires_grad
    assert share.std((1, 2)).min() > 0.002


@pytest.mark.parametrize(("height", "width"), [(64, 32), (32, 96)])
@pytest.mark.parametrize("family", ["vit", "deit", "timm_vit", "swin"])
def test_images_that_are_not_square(family, height, width):
    """Of the size of the network, which is not square either."""
    network = made_for(family, (height, width))
    images = torch.randn(3, 3, height, width)
    share = taken(network, GridAttention(network, "importance"), images)
    attention = eager(network, images).mean(1)
    if family == "swin":  # one stage, windows of two by two
        attention = attention.mean(1).view(3, height // 8, width // 8, 2, 2).transpose(2, 3).reshape(3, height // 4, width // 4)
    else:
        grid = (height // 16, width // 16)
        attention = attention[:, 0, -grid[0] * grid[1] :].view(3, *grid)
    assert_close(share, attention, atol=1e-6, rtol=1e-4)


def made_for(family, size):
    if family == "timm_vit":
        arguments = {"img_size": size, "depth": 2}
        config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=5, model_args=arguments)
        return transformers.TimmWrapperForImageClassification(config).train()
    if family == "swin":
        config = transformers.SwinConfig(
            embed_dim=8, depths=[1], num_heads=[2], window_size=2, image_size=size, num_labels=5, drop_path_rate=0.0
        )
        return transformers.SwinForImageClassification(config).train()
    name = {"vit": "ViT", "deit": "DeiT"}[family]
    config = getattr(transformers, f"{name}Config")(**{**TINY, "image_size": size}, num_hidden_layers=2, num_labels=5)
    return getattr(transformers, f"{name}ForImageClassification")(config).train()


def window_of(family, side):
    """The windows of a last stage whose second block is shifted, `side` patches wide: (network, its last block)."""
    if family == "swin":
        config = transformers.SwinConfig(
            embed_dim=8, depths=[2], num_heads=[2], window_size=4, image_size=4 * side, num_labels=5, drop_path_rate=0.0
        )
        network = transformers.SwinForImageClassification(config)
        return network.train(), network.swin.encoder.layers[-1].blocks[-1]
    arguments = {"img_size": 4 * side, "depths": (2,), "embed_dim": 8, "num_heads": (2,), "window_size": 4, "drop_path_rate": 0.0}
    config = transformers.TimmWrapperConfig(architecture="swin_tiny_patch4_window7_224", num_labels=5, model_args=arguments)
    network = transformers.TimmWrapperForImageClassification(config)
    return network.train(), network.timm_model.layers[-1].blocks[-1]


@pytest.mark.parametrize("family", ["swin", "timm_swin"])
@pytest.mark.parametrize("side", [8, 12, 10])
def test_shifted_windows(family, side):
    """10 patches to a side take padding. The way back from the windows is the libraries' own."""
    network, block = window_of(family, side)
    for module in network.modules():  # fresh networks have zeros there
        table = getattr(module, "relative_position_bias_table", None)
        if table is not None:
            torch.nn.init.normal_(table)
    images = torch.randn(2, 3, 4 * side, 4 * side)
    share = taken(network, GridAttention(network, "importance"), images)
    received = eager(network, images).mean((1, 2)).view(-1, 4, 4, 1)  # (B * n, 4, 4, 1)
    padded = side + -side % 4
    if family == "swin":
        back = block.cyclic_shift(swin.window_reverse(received, 4, padded, padded), reverse=True)[:, :side, :side]
    else:
        back = timm_swin.window_reverse(received, (4, 4), padded, padded)[:, :side, :side].roll((2, 2), (1, 2))
    assert block.shift_size in (2, (2, 2))
    assert_close(share, back[..., 0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_before_dropout_and_draws_nothing(family):
    network = made(family)
    for module in network.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    last = GridAttention(network, "importance")
    images, _ = tiny.batch()
    torch.manual_seed(0)
    taken(network, last, images)
    after = torch.rand(())
    torch.manual_seed(0)
    network(pixel_values=images)
    assert torch.equal(after, torch.rand(()))


def test_dropped_attention_is_seen_whole():
    """One block only, whose input has no dropout: its own weights are dropped and scaled, ours are the softmax."""
    config = transformers.ViTConfig(**TINY, num_hidden_layers=1, attention_probs_dropout_prob=0.5)
    network = transformers.ViTForImageClassification(config).train()
    images = torch.randn(2, 3, 64, 64)
    assert_close(taken(network, GridAttention(network, "importance"), images), expected(network, images, "importance"))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["vit", "deit", "swin", "timm_vit", "timm_swin"])
def test_checkpointing(family, reentrant):
    """Layers that run again in the backward pass neither change what was taken nor keep anything; gradients stay the same."""
    network = made(family)
    images, _ = tiny.batch()
    images.requires_grad_()
    taps = GridAttention(network, "importance")
    plain = taken(network, taps, images)
    network(pixel_values=images).logits.square().sum().backward()
    gradients = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    network.gradient_checkpointing_enable({"use_reentrant": reentrant})
    logits, (share,) = watched(network, images, [taps.tap((64, 64))])
    assert_close(share, plain)
    logits.square().sum().backward()
    assert not hooks(network)
    for old, new in zip(gradients, (p.grad for p in network.parameters() if p.grad is not None), strict=True):
        assert_close(new, old)


@every_family
def test_half_precision(family):
    """Under autocast, and of weights in bfloat16, it is float32 and near that of float32."""
    network = made(family, sharp=False)  # the errors before would be sharpened too
    images, _ = tiny.batch()
    taps = GridAttention(network, "importance")
    exact = taken(network, taps, images)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = taken(network, taps, images)
    half = taken(network.to(torch.bfloat16), taps, images.to(torch.bfloat16))
    for share in (mixed, half):
        assert share.dtype == torch.float32
        assert_close(share, exact, atol=2e-3, rtol=5e-2)


@pytest.mark.parametrize("family", ["vit", "swin", "timm_vit", "pvt"])
def test_compiled(family):
    """Traced, not only run: before and after a pass that nobody watches, and with the block that is watched outside of the graphs."""
    network = made(family)
    images, _ = tiny.batch()
    taps = GridAttention(network, "importance")
    plain = taken(network, taps, images)
    compile_around(network, taps.modules, backend="eager")
    logits = network(pixel_values=images).logits
    assert_close(taken(network, taps, images), plain)
    assert_close(network(pixel_values=images).logits, logits)
    assert (taken(network, taps, images.flip(0)) - plain.flip(0)).abs().max() < 1e-5


def test_compiled_and_checkpointed():
    network = made("vit")
    images, _ = tiny.batch()
    taps = GridAttention(network, "importance")
    plain = taken(network, taps, images)
    network.gradient_checkpointing_enable()
    compile_around(network, taps.modules, backend="eager")
    logits, (share,) = watched(network, images, [taps.tap((64, 64))])
    assert_close(share, plain)
    logits.sum().backward()


@pytest.mark.parametrize("method", ["transmix", "tokenmix", "smmix", "tlalign", "mixpro"])
@pytest.mark.parametrize("family", ["resnet", "convnext", "cifar_resnet", "timm_resnet"])
def test_row_18_networks_without_attention_are_refused(family, method):
    with refuses(r"must have attention that can be read.*got .*which can give"):
        MixupModel(tiny.network(family), method)


def test_keys_that_are_merged_are_refused():
    config = transformers.PvtV2Config(**tiny._PVT, linear_attention=True, num_labels=5)
    with pytest.raises(ValueError, match="merges keys"):
        MixupModel(transformers.PvtV2ForImageClassification(config), "transmix")


@every_family
def test_transmix_step(family):
    """The targets of a step are those of the formula, from the attention of the mixed images, on every family."""
    model = MixupModel(made(family), "transmix").train()
    images, targets = tiny.batch()
    key = MixKey(1, 0, 0)
    out = model(images, targets, key)
    plan = get_method("cutmix").sample.plan(images.shape, key.own_rng(), None)
    attention = expected(model.backbone, blend(plan, images), "importance")
    pasted = plan.dense_mask(tuple(attention.shape[1:]))[:, 1]
    lam = 0.5 * plan.weight[:, 0] + 0.5 * (1 - (attention * pasted).sum((1, 2)) / attention.sum((1, 2)))
    assert_close(out.lam, lam, atol=1e-5, rtol=1e-5)
    assert (out.lam - plan.weight[:, 0]).abs().max() > 1e-3
    assert_close(out.loss, -(out.targets * out.logits.log_softmax(1)).sum(1).mean())
    out.loss.backward()


def test_both_heads_of_a_distilled_network_share_the_target():
    network = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**TINY, num_hidden_layers=2, num_labels=5))
    model = MixupModel(network, "transmix").train()
    images, targets = tiny.batch()
    out = model(images, targets, MixKey(1, 0, 0))
    assert_close(out.targets.sum(1), torch.ones(4))
    out.loss.backward()
    assert all(head.weight.grad.abs().sum() > 0 for head in (network.cls_classifier, network.distillation_classifier))


def test_other_methods_and_evaluation_do_not_see_the_hook():
    model = MixupModel(made("vit"), ["transmix", "mixup"]).train()
    images, targets = tiny.batch()
    for step in range(6):
        model(images, targets, MixKey(1, 0, step))
        assert not hooks(model)
    model.eval()(images)
    assert not hooks(model)
