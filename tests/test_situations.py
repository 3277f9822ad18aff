"""Every method in every situation: methods are rows, situations are columns."""

import copy

import pytest
import torch
from torch.testing import assert_close

import tiny
from hf_mixup import METHODS, MixupModel, get_method
from hf_mixup.core.rng import MixKey
from small import difference, network_for, vit, weights

every_method = pytest.mark.parametrize("name", sorted(METHODS))
FEW = {"supermix": {"max_iter": 2}}  # steps of its search
# change features inside the blocks that timm's checkpointing runs again
CHANGES_FEATURES = ("manifoldmix", "alignmix", "mixstyle", "moex", "nfm", "patchup", "tmix")


def method_of(name, **fields):
    return get_method(name, **FEW.get(name, {}), **fields)


def batch(count=6, size=16, num_labels=4):
    rng = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, size, size, generator=rng), torch.arange(count) % num_labels


def keys(count):
    return [MixKey(3, 0, step, 0, 0, 100) for step in range(count)]


def hooks(network):
    return [hook for module in network.modules() for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())]


def still(network):
    """Running statistics stay, which every pass would move: saliency and the like are taken with them."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    return network


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def stepped(model, images, labels, key):
    """Loss and gradients of one step, with dropout and the like drawn alike every time."""
    model.zero_grad()
    torch.manual_seed(0)
    out = model(images, labels, key)
    out.loss.backward()
    return out, gradients(model)


@every_method
def test_repeats_are_steps_of_their_own(name):
    """`mix_repeat=2` gives the mixtures of its two repeats, and the mean of their losses."""
    images, labels = batch()
    both = MixupModel(still(network_for(name)), method_of(name), mix_repeat=2).train()
    both(images, labels, keys(1)[0])  # a history, where a method has one
    state = copy.deepcopy(both.state_dict())
    for key in keys(5)[1:]:
        both.load_state_dict(state)
        out = both(images, labels, key)
        alone = []
        for repeat in range(2):
            single = MixupModel(still(network_for(name)), method_of(name)).train()
            single.load_state_dict(state)
            alone.append(single(images, labels, key._replace(repeat=repeat)))
        assert_close(out.logits, torch.cat([one.logits for one in alone]), atol=1e-5, rtol=1e-4)
        assert_close(out.targets, torch.cat([one.targets for one in alone]), atol=1e-5, rtol=1e-4)
        assert_close(out.loss, torch.stack([one.loss for one in alone]).mean(), atol=1e-5, rtol=1e-4)
        assert out.methods == (name, name)


@every_method
def test_nothing_stays_on_the_network(name):
    """No hook is left by a step, by an evaluation, or by a step that fails; a second stage finds the network as it was."""
    network = network_for(name)
    model = MixupModel(network, method_of(name)).train()
    images, labels = batch()
    for key in keys(4):
        model(images, labels, key)
        assert not hooks(model)
    model.eval()(images)
    assert not hooks(model)
    fresh = copy.deepcopy(network).train()
    torch.manual_seed(0)
    expected = fresh(pixel_values=images).logits
    torch.manual_seed(0)
    assert torch.equal(network.train()(pixel_values=images).logits, expected)
    with torch.no_grad():
        broken = images.clone()
    original = network.forward
    network.forward = lambda *args, **kwargs: (original(*args, **kwargs), 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.train()(broken, labels, keys(1)[0])
    del network.forward
    assert not hooks(model)


@every_method
def test_a_second_method_on_the_same_network(name):
    """Manifold mixing, then another method: the loss of the second is that of a network which the first never saw."""
    images, labels = batch()
    network = network_for(name)
    first = MixupModel(network, method_of("manifoldmix", layers=(1,))).train()
    first(images, labels, keys(1)[0])
    twin = copy.deepcopy(network)
    out, _ = stepped(MixupModel(network, method_of(name)).train(), images, labels, keys(2)[1])
    torch.manual_seed(0)
    expected, _ = stepped(MixupModel(twin, method_of(name)).train(), images, labels, keys(2)[1])
    assert_close(out.targets, expected.targets)
    if not list(MixupModel(copy.deepcopy(twin), method_of(name)).states[name].parameters()):  # else heads and mixers are drawn anew
        assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.logits, expected.logits) or name in ("automix", "samix", "adautomix")


@every_method
def test_bfloat16_weights(name):
    """A step is finite, reaches every weight that it reaches in float32, and teachers move."""
    images, labels = batch()
    model = MixupModel(network_for(name), method_of(name)).train()
    _, reached = stepped(model, images, labels, keys(2)[1])
    half = MixupModel(network_for(name).bfloat16(), method_of(name)).train()
    before = weights(half)
    out, found = stepped(half, images.bfloat16(), labels, keys(2)[1])
    assert out.loss.dtype == torch.float32
    assert torch.isfinite(out.loss)
    assert found.keys() == reached.keys()
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    torch.optim.SGD([p for p in half.parameters() if p.requires_grad], 0.1).step()
    half.after_optimizer_step(0, 100)
    for key, value in half.state_dict().items():
        if ".teacher" in key and key in dict(half.named_parameters()) and reached.get(key.split("network.")[-1]) is not None:
            assert not torch.equal(value, before[key]), key
    assert torch.isfinite(half.eval()(images.bfloat16()).logits).all()


@every_method
@pytest.mark.parametrize("family", ["vit", "timm_vit", "timm_resnet"])
@pytest.mark.parametrize("repeat", [1, 2])
def test_activation_checkpointing(name, family, repeat):
    """Gradients are those without it; a pair that cannot work is refused by name when the model is made."""
    torch.manual_seed(0)
    network = still(tiny.network(family))  # they would move a second time in the pass that runs again
    images, targets = tiny.batch()
    labels = targets.argmax(1)
    try:
        plain = MixupModel(network, method_of(name), mix_repeat=repeat).train()
    except ValueError:
        pytest.skip("this network cannot give what the method reads")
    checkpointed = copy.deepcopy(plain)
    if name in CHANGES_FEATURES and family.startswith("timm"):
        with pytest.raises(ValueError, match=rf"{name} changes features inside the blocks that timm's activation checkpointing runs again"):
            _checkpoint(checkpointed)
        tiny_network = tiny.network(family)
        tiny_network.timm_model.set_grad_checkpointing(True)
        with pytest.raises(ValueError, match=rf"{name} changes features"):
            MixupModel(tiny_network, method_of(name))
        return
    _checkpoint(checkpointed)
    for key in keys(4)[1:]:
        expected_out, expected = stepped(plain, images, labels, key)
        out, found = stepped(checkpointed, images, labels, key)
        assert_close(out.loss, expected_out.loss)
        assert found.keys() == expected.keys()
        for parameter in expected:
            assert_close(found[parameter], expected[parameter], atol=1e-6, rtol=1e-4)


def _checkpoint(model):
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    switch({"use_reentrant": False})


def compiled_losses(name, network):
    images, labels = batch()
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = MixupModel(copy.deepcopy(network), method_of(name, **({"layers": (1,)} if name == "manifoldmix" else {}))).train()
        if compiled:
            model.compile_backbone(backend="eager")
        found.append([])
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for key in keys(3):
            out, _ = stepped(model, images, labels, key)
            found[-1].append(out.loss.item())
            optimizer.step()
        found[-1].append(model.eval()(images).logits.abs().sum().item())
    return found


@pytest.mark.parametrize("name", ["manifoldmix", "transmix", "automix"])
def test_compiled_after_another_compiled_run(name):
    """Graphs are kept by code: a network of the same class was compiled in this process before, without what the method watches."""
    torch._dynamo.reset()
    network = vit()
    compiled_losses("mixup", network)
    plain, compiled = compiled_losses(name, network)
    assert compiled == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
@every_method
def test_every_method_compiled_after_another(name):
    torch._dynamo.reset()
    network = network_for(name)
    compiled_losses("mixup", network)
    plain, compiled = compiled_losses(name, network)
    assert compiled == pytest.approx(plain, rel=1e-4)


@every_method
def test_an_evaluation_between_two_steps_changes_nothing(name):
    images, labels = batch()
    one, other = (MixupModel(network_for(name), method_of(name)).train() for _ in range(2))
    other.load_state_dict(one.state_dict())
    for key in keys(2):
        torch.manual_seed(0)
        expected = one(images, labels, key).logits
        other.eval()(images)
        other.train()
        torch.manual_seed(0)
        assert torch.equal(other(images, labels, key).logits, expected)
    assert difference(weights(one), weights(other)) == 0
