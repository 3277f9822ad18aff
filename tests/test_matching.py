"""Partners that look alike: k-mixup and local mixup."""

import itertools

import pytest
import torch

import laws
from hf_mixup import METHODS, get_method
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import keyed


def planned(name, images, key=0, **fields):
    return get_method(name, **fields).sample.plan(images.shape, keyed(key), Signals(images=images))


@pytest.mark.parametrize(("batch", "k"), [(16, 4), (17, 3), (16, 100), (2, 16), (3, 16), (18, 4)])
def test_kmixup_matches_disjoint_groups_at_the_least_cost(batch, k):
    """Every image has one partner and is one; no image meets itself; no other matching of its groups is shorter."""
    images = torch.randn(batch, 3, 6, 5, generator=keyed(batch, k))
    size = max(min(k, batch // 4), 1)
    apart = torch.cdist(images.flatten(1).double(), images.flatten(1).double())
    for key in range(5):
        partner = planned("kmixup", images, key, k=k).index[:, 1]
        assert sorted(partner.tolist()) == list(range(batch))
        assert (partner != torch.arange(batch)).all()
        order = torch.randperm(batch, generator=keyed(key))
        for rows in order.split(size):
            others = partner[rows]
            least = min(apart[rows, others[list(some)]].sum() for some in itertools.permutations(range(len(rows))))
            assert apart[rows, others].sum() <= least + 1e-4


def test_kmixup_of_one_is_mixup_of_any_pairs_and_of_many_is_nearer():
    images = torch.randn(32, 3, 6, 6, generator=keyed(1))
    images[16:] += 3  # two kinds

    def mean_distance(k):
        pairs = [(images - images[planned("kmixup", images, key, k=k).index[:, 1]]).flatten(1).norm(dim=1).mean() for key in range(20)]
        return torch.stack(pairs).mean()

    one, many = mean_distance(1), mean_distance(16)
    assert many < 0.8 * one


def test_kmixup_alone_in_its_batch_stays_as_it_is():
    images = torch.randn(1, 3, 4, 4)
    plan = planned("kmixup", images)
    assert plan.index.tolist() == [[0, 0]]


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("locality", [0.0, 2.0])
def test_localmixup_draws_partners_in_proportion(locality, size):
    """At any size: the frequencies over many keys are the softmax of minus the distances."""
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, size, size)
    apart = (torch.arange(4.0)[:, None] - torch.arange(4.0)).abs()
    wanted = (-locality * apart).softmax(1)
    found = torch.zeros(4, 4)
    for key in range(400):
        found[torch.arange(4), planned("localmixup", images, key, locality=locality).index[:, 1]] += 1
    assert (found / 400 - wanted).abs().max() < 4 * 0.5 / 400**0.5


@pytest.mark.parametrize("name", ["kmixup", "localmixup"])
def test_partners_are_the_same_for_bytes_normalised_and_in_half_precision(name):
    images = torch.randn(8, 3, 16, 16, generator=keyed(3))
    one, half = planned(name, images), planned(name, images.bfloat16())
    assert (one.index == half.index).float().mean() > 0.8
    assert half.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["kmixup", "localmixup"])
def test_lam_follows_the_mode(name):
    images = torch.randn(8, 3, 8, 8, generator=keyed(3))
    assert planned(name, images, mode="batch").lam.unique().numel() == 1
    assert planned(name, images).lam.unique().numel() == 8
    laws.share_distribution(METHODS[name].replaced(alpha=1.0).sample, (4, 3, 8, 8), mean=0.5, keys=500)
    with pytest.raises(ValueError, match="mode must be"):
        get_method(name, mode="pair")


@pytest.mark.parametrize(("name", "fields"), [("kmixup", {"k": 0}), ("localmixup", {"locality": -1.0}), ("localmixup", {"alpha": 0.0})])
def test_settings_that_mean_nothing_are_refused(name, fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        get_method(name, **fields)
