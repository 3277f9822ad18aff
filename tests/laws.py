"""The laws of mixing, as functions that raise AssertionError. `test_laws.py` holds every method to them; `test_laws_bite.py`
shows that each of them rejects at least one broken policy."""

import random

import numpy as np
import torch
from torch.testing import assert_close

from hf_mixup.core.plan import MixPlan, blend, mix_targets
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import MixKey, keyed

SHAPES = [(2, 3, 7, 5), (3, 1, 8, 8), (5, 4, 16, 12), (64, 3, 32, 32)]
# a policy of one mask for the whole batch, or of whole cells, may label with the share it drew: one pixel
PIXEL = 1.5


def signals_for(shape, key=0, device="cpu"):
    """Stand-ins for everything a policy may ask for, from a key: evidence is positive, uneven and different per image."""
    batch, _, height, width = shape
    rng = keyed(7, key)

    def positive(*size):
        return torch.rand(size, generator=rng) ** 3 + 1e-3

    return Signals(
        device,
        images=torch.randn(shape, generator=rng),
        history=torch.randn(shape, generator=rng),
        saliency=positive(batch, height, width),
        features=positive(batch, 8, 4, 4),
        activation=positive(batch, height, width),
        attention=positive(batch, 4, 4),
        patch_attention=positive(batch, 4, 4),
        token_scores=positive(batch, 4, 4),
        merged_attention=positive(batch, 4, 4),
        object_masks=(positive(batch, height, width) > 0.1).float(),
        token_grid=torch.zeros(4, 4),
        attention_layers=torch.randn(batch, 3, 17, 17, generator=rng).softmax(3),
        logits=torch.randn(batch, 10, generator=rng),
        targets=torch.eye(10)[torch.randint(10, (batch,), generator=rng)],
        maps=torch.randint(5, (batch, height, width), generator=rng),
    )


def plan_of(policy, shape, key=0, signals=None):
    signals = signals_for(shape, key) if signals is None else signals
    return policy.plan(torch.Size(shape), MixKey(1, 0, key).own_rng(), signals)


def onehot_images(policy, label, shape, key=0, tolerance=1e-5):
    """1. Images that are their own label: the mean pixel of the mixture is the mixed target.

    Every image has one colour, and its C values are its soft label of C classes, so policies that look at images can be asked too.
    """
    batch, channels, height, width = shape
    targets = torch.rand(batch, channels, generator=keyed(11, key))
    images = targets[:, :, None, None].expand(-1, -1, height, width)
    signals = signals_for(shape, key)
    signals["images"] = signals["history"] = images
    plan = plan_of(policy, shape, key, signals)
    plan = plan.reweighted(label.weights(plan, signals))
    assert_close(blend(plan, images).mean((2, 3)), mix_targets(plan, targets), atol=tolerance, rtol=0)


def convex(policy, shape, key=0, whole=True):
    """2. Masks are at least 0 and sum to 1; so do the weights, unless not `whole`."""
    plan = plan_of(policy, shape, key)
    mask = plan.dense_mask(tuple(shape[2:]))
    assert mask.min() >= 0
    assert_close(mask.sum(1), torch.ones_like(mask[:, 0]), atol=1e-5, rtol=0)
    assert plan.weight.min() >= 0
    if whole:
        assert_close(plan.weight.sum(1), torch.ones(shape[0]), atol=1e-5, rtol=0)


def own_first(policy, shape, key=0):
    """3. Column 0 is the own image, and every index is in the batch."""
    plan = plan_of(policy, shape, key)
    assert plan.index.dtype == torch.int64
    assert torch.equal(plan.index[:, 0], torch.arange(shape[0]))
    assert plan.index.min() >= 0
    assert plan.index.max() < shape[0]


def identity(blend_function, label, shape):
    """4. A plan that keeps the whole own image returns it bit for bit, and every label policy gives it weight 1."""
    batch = shape[0]
    images = torch.randn(shape)
    for mask in _whole_masks(shape):
        plan = MixPlan.pair(torch.arange(batch).roll(1), mask, torch.ones(batch))
        assert torch.equal(blend_function(plan, images), images)
        weight = label.weights(plan, signals_for(shape))
        assert_close(weight[:, 0], torch.ones(batch), atol=1e-6, rtol=0)


def _whole_masks(shape):
    from hf_mixup.core.plan import Boxes, Dense, Share

    batch, _, height, width = shape
    whole = torch.tensor([1.0, 0.0]).expand(batch, 2)
    return (
        Share(whole),
        Boxes(torch.zeros(batch, 4, dtype=torch.int64), (height, width)),
        Dense(whole[:, :, None, None].expand(-1, -1, height, width)),
    )


def _numpy_state():
    _, keys, position, *_ = np.random.get_state()
    return keys.tolist(), position


def pure(policy, label, shape, key=0):
    """5. No input is written to, and no global random stream is read."""
    images, targets = torch.randn(shape), torch.eye(shape[0])
    signals = signals_for(shape, key)
    signals["images"] = images
    versions = {name: value._version for name, value in signals.items()}
    before = (torch.get_rng_state(), _numpy_state(), random.getstate())
    plan = plan_of(policy, shape, key, signals)
    plan = plan.reweighted(label.weights(plan, signals))
    blend(plan, images)
    mix_targets(plan, targets)
    assert {name: value._version for name, value in signals.items()} == versions
    assert targets._version == 0
    assert torch.equal(torch.get_rng_state(), before[0])
    assert _numpy_state() == before[1]
    assert random.getstate() == before[2]


def keyed_plans(policy, shape, mixes=True):
    """6. The same key gives the same plan; another seed, rank, step, micro-step or repeat another."""
    signals = signals_for(shape)

    def drawn(key):
        plan = policy.plan(torch.Size(shape), key.own_rng(), signals)
        return torch.cat([plan.index.flatten().float(), plan.dense_mask(tuple(shape[2:])).flatten().float(), plan.weight.flatten()])

    base = drawn(MixKey(1, 0, 0))
    assert torch.equal(base, drawn(MixKey(1, 0, 0)))
    if mixes:
        for other in (MixKey(2, 0, 0), MixKey(1, 1, 0), MixKey(1, 0, 1), MixKey(1, 0, 0, 1), MixKey(1, 0, 0, 0, 1)):
            assert not torch.equal(base, drawn(other)), other


def varied(policy, shape, keys=50, mixes=True):
    """7. Pairings vary between keys, and an image is its own partner no more often than by chance."""
    if not mixes:
        return
    signals = signals_for(shape)
    plans = [policy.plan(torch.Size(shape), MixKey(1, 0, key).own_rng(), signals) for key in range(keys)]
    assert len({tuple(plan.index[:, 1].tolist()) for plan in plans}) > keys // 4
    alone = torch.stack([plan.index[:, 1] == plan.index[:, 0] for plan in plans]).double().mean().item()
    chance = 1 / shape[0]
    assert alone <= chance + 4 * (chance * (1 - chance) / (keys * shape[0])) ** 0.5, alone


def dtype(policy, shape, key=0):
    """8. Half precision in, half precision out; weights stay float32, and so does class 999."""
    for kind in (torch.bfloat16, torch.float16):
        signals = signals_for(shape, key)
        signals["images"] = signals["images"].to(kind)
        plan = plan_of(policy, shape, key, signals)
        assert blend(plan, signals["images"]).dtype == kind
        assert plan.weight.dtype == torch.float32
    labels = torch.full((shape[0],), 999)
    targets = torch.nn.functional.one_hot(labels, 1000)
    mixed = mix_targets(plan, targets)
    assert mixed.dtype == torch.float32
    assert_close(mixed[:, 999], plan.weight.sum(1).clamp(max=1) if plan.united else plan.weight.sum(1))


def share_distribution(policy, shape, mean, keys=2000, tolerance=0.0):
    """9. The mean share of the own image over many keys is the paper's, within 4 sigma of the sample."""
    signals = signals_for(shape)
    shares = torch.cat([policy.plan(torch.Size(shape), MixKey(1, 0, key).own_rng(), signals).weight[:1, 0] for key in range(keys)])
    error = 4 * shares.std().item() / len(shares) ** 0.5 + tolerance
    assert abs(shares.mean().item() - mean) <= error, (shares.mean().item(), mean, error)


def round_trip(method):
    """10. A method survives its dictionary, JSON, pickling and its own repr, and every hyper-parameter can be set by its name."""
    import dataclasses
    import json
    import pickle

    from hf_mixup.method import KINDS, Method, parts_of

    assert Method.from_dict(json.loads(json.dumps(method.to_dict()))) == method
    assert pickle.loads(pickle.dumps(method)) == method
    names = {cls.__name__: cls for kind in KINDS for cls in parts_of(kind).values()}
    assert eval(repr(method), {**names, "Method": Method}) == method
    for field in dataclasses.fields(method.sample):
        assert field.name not in KINDS, field.name
        assert method.replaced(**{field.name: getattr(method.sample, field.name)}) == method, field.name
