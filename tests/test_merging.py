"""MergeMix: attention of a pass that merges similar patches."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

import tiny
from hf_mixup import MixupModel, get_method
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import MixKey, keyed
from hf_mixup.networks.signals.merging import MergedAttention, merge_counts
from hf_mixup.policies import MergeMix
from refusals import refuses
from test_attention import eager, hooks, made

FAMILIES = ["vit", "deit", "timm_vit"]
every_family = pytest.mark.parametrize("family", FAMILIES)


def read(network, images, **fields):
    return MergedAttention(network, MergeMix(**fields)).take(images, torch.empty(0), Signals())


def by_hand(network, images, counts, read_at):
    """The same of a ViT or DeiT of transformers, token by token: what each patch attends to the class token in block `read_at`."""
    base = getattr(network.eval(), network.config.model_type)
    prefix = 2 if network.config.model_type == "deit" else 1
    found = []
    for image in images:
        tokens = base.embeddings(image[None])[0]
        groups = [[patch] for patch in range(len(tokens) - prefix)]  # of the patches, those that are in each token
        for block, layer in enumerate(base.layers):
            normalised = layer.layernorm_before(tokens)
            heads = network.config.num_attention_heads
            query, key = (
                projection(normalised).unflatten(1, (heads, -1)) for projection in (layer.attention.q_proj, layer.attention.k_proj)
            )
            if block == read_at:
                attention = (torch.einsum("nhd,mhd->hnm", query, key) / query.shape[2] ** 0.5).softmax(2).mean(0)
                worth = torch.empty(sum(map(len, groups)))
                for token, group in enumerate(groups):
                    worth[group] = attention[prefix + token, 0]
                found.append(worth)
                break
            tokens = layer(tokens[None])
            tokens = (tokens if isinstance(tokens, torch.Tensor) else tokens[0])[0]
            metric = torch.nn.functional.normalize(key.mean(1), dim=1)
            moving = [t for t in range(prefix, len(tokens)) if t % 2 == 0]
            staying = [t for t in range(prefix, len(tokens)) if t % 2 == 1]
            best = {t: max(staying, key=lambda s, t=t: float(metric[t] @ metric[s])) for t in moving}
            gone = sorted(moving, key=lambda t: -float(metric[t] @ metric[best[t]]))[: counts[block]]
            members = {t: [t] + [g for g in gone if best[g] == t] for t in moving + staying if t not in gone}
            order = [t for t in members if t in moving] + [t for t in members if t in staying]
            size = [len(groups[t - prefix]) for t in range(prefix, len(tokens))]
            merged = [sum(size[m - prefix] * tokens[m] for m in members[t]) / sum(size[m - prefix] for m in members[t]) for t in order]
            groups = [[patch for m in members[t] for patch in groups[m - prefix]] for t in order]
            tokens = torch.stack([*tokens[:prefix], *merged])
    return torch.stack(found)


@pytest.mark.parametrize("family", ["vit", "deit"])
def test_it_is_what_merging_by_hand_gives(family):
    network, (images, _) = made(family), tiny.batch(3)
    counts = merge_counts(int(0.5 * 16), 3)
    assert sum(counts[:2]) >= 5
    with torch.no_grad():
        wanted = by_hand(network, images, counts, 2)
    assert_close(read(network, images, merged=0.5, depth=1.0), wanted.view(3, 4, 4), atol=1e-6, rtol=1e-4)
    # what is merged has one value, and it is another network's answer than without merging
    assert (wanted.sort(1).values.diff(dim=1).abs() < 1e-9).sum(1).ge(5).all()
    assert not torch.allclose(read(network, images, merged=0.0, depth=1.0).flatten(1), wanted, atol=1e-4)


@every_family
def test_without_merging_it_is_the_attention_to_the_class_token(family):
    network, (images, _) = made(family), tiny.batch()
    attention = eager(network, images).mean(1)
    share = read(network, images, merged=0.0, depth=1.0)
    assert_close(share.flatten(1), attention[:, -16:, 0], atol=1e-6, rtol=1e-4)


@every_family
def test_it_leaves_no_trace(family):
    network, (images, labels) = made(family).train(), tiny.batch()
    before, modes = hooks(network), [module.training for module in network.modules()]
    with torch.no_grad():
        plain = network.eval()(pixel_values=images).logits
    network.train()
    state = torch.get_rng_state()
    share = read(network, images)
    assert torch.equal(torch.get_rng_state(), state)
    assert not share.requires_grad
    assert hooks(network) == before
    assert [module.training for module in network.modules()] == modes
    with torch.no_grad():
        assert torch.equal(network.eval()(pixel_values=images).logits, plain)
    model = MixupModel(network, get_method("mergemix")).train()
    out = model(images, labels.argmax(1), MixKey(0, 0, 0))
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@every_family
def test_autocast_merges_the_same(family):
    network, (images, _) = made(family), tiny.batch()
    plain = read(network, images)
    with torch.autocast("cpu", torch.bfloat16):
        half = read(network, images)
    assert half.dtype == torch.float32
    assert_close(half, plain, atol=0.02, rtol=0.3)


def test_all_may_be_merged_that_can_be():
    """Half of what is left goes at most in each block; tokens are never lost."""
    network, (images, _) = made("vit"), tiny.batch()
    share = read(network, images, merged=1.0, depth=1.0)
    assert torch.isfinite(share).all()
    assert max(len(set(of_one.flatten().tolist())) for of_one in share) <= 4


@pytest.mark.parametrize(("total", "blocks"), [(98, 12), (49, 12), (8, 3), (0, 4), (1, 1), (5, 2)])
def test_counts_add_up_and_fall(total, blocks):
    counts = merge_counts(total, blocks)
    assert sum(counts) == total
    assert len(counts) == blocks
    assert all(one >= other - 1 for one, other in pairwise(counts))
    if total == 98:
        assert counts[0] in (12, 13)
        assert counts[-1] in (4, 5)


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.5, 1), (0.75, 1), (1.0, 2)])
def test_depth_is_a_share_of_the_blocks(depth, place):
    network = made("vit")
    signal = MergedAttention(network, MergeMix(depth=depth))
    assert signal.modules[-1] is network.vit.layers[place]


def test_the_most_important_patches_stay():
    worth = torch.rand(6, 5, 4, generator=keyed(2))
    plan = get_method("mergemix").sample.plan(torch.Size((6, 3, 20, 16)), keyed(3), Signals(merged_attention=worth))
    mask = plan.dense_mask((5, 4))[:, 0].bool()
    assert_close(plan.lam, mask.float().mean((1, 2)))
    assert ((plan.lam * 20).round() > 0).any()
    for stays, of_one in zip(mask, worth, strict=True):
        if stays.any() and not stays.all():
            assert of_one[stays].min() >= of_one[~stays].max()


def test_partners_by_overlap_complement_each_other():
    worth = torch.zeros(4, 2, 2)
    worth[0, 0] = worth[1, 0] = worth[2, 1] = worth[3, :, 0] = 1
    worth += 1e-3 * torch.rand(4, 2, 2, generator=keyed(0))
    method = get_method("mergemix", pairing="overlap", mode="batch", alpha=1e4)
    plans = (method.sample.plan(torch.Size((4, 3, 8, 8)), keyed(key), Signals(merged_attention=worth)) for key in range(20))
    plan = next(plan for plan in plans if plan.lam[0] == 0.5)  # lam is a hair over a half, not under it
    assert plan.index[:3, 1].tolist() == [2, 2, 0]
    assert (plan.index[:, 1] != plan.index[:, 0]).all()


def test_networks_without_a_class_token_of_one_grid_are_refused():
    with refuses("the network must have a class token and one grid of tokens"):
        MixupModel(tiny.network("swin"), get_method("mergemix"))
    with refuses("images must be whole multiples"):
        get_method("mergemix").sample.plan(torch.Size((2, 3, 9, 8)), keyed(0), Signals(merged_attention=torch.rand(2, 2, 2)))
