"""Methods that look at the images or the network: what laws and reference outputs do not cover."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from hf_mixup import METHODS, get_method
from hf_mixup.core.plan import Dense, MixPlan, Share, blend
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import MixKey
from hf_mixup.labels import SaliencyLabels
from hf_mixup.policies.guidedmixup import greedy_circle
from hf_mixup.policies.saliencygrafting import candidates
from hf_mixup.policies.snapmix import snap_plan

SHAPE = torch.Size((4, 3, 32, 32))


def rng(step=0):
    return MixKey(1, 0, step).own_rng()


@pytest.mark.parametrize(("beta", "mean"), [(2.0, 0.490), (8.0, 0.190)])
def test_attentivemix_keeps_the_documented_share_of_cells(beta, mean):
    method = get_method("attentivemix", beta=beta)
    features = torch.rand(400, 2, 7, 7, generator=torch.Generator().manual_seed(0))
    plans = [method.sample.plan(torch.Size((400, 3, 49, 49)), rng(step), Signals(features=features)) for step in range(20)]
    share = torch.cat([plan.weight[:, 0] for plan in plans])
    assert abs(share.mean().item() - mean) < 4 * share.std().item() / len(share) ** 0.5 + 0.001


def test_attentivemix_keeps_the_most_active_cells_of_the_own_image():
    features = torch.zeros(3, 2, 2, 2)
    features[0, :, 0, 1], features[1, :, 1, 0], features[2, :, 1, 1] = 5, 5, 5
    plan = get_method("attentivemix", top_k=1).sample.plan(torch.Size((3, 3, 4, 4)), rng(), Signals(features=features))
    kept = plan.dense_mask((2, 2))[:, 0]
    assert torch.equal(kept.flatten(1).argmax(1), torch.tensor([1, 2, 3]))
    assert_close(plan.weight[:, 0], torch.full((3,), 0.25))


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0, 50.0])
def test_saliencygrafting_thresholds_between_the_mean_and_the_maximum(temperature):
    saliency = torch.rand(6, 4, 4, generator=torch.Generator().manual_seed(0)) ** 4
    saliency = saliency / saliency.sum((1, 2), keepdim=True)
    scaled = saliency * 16
    level = temperature * ((scaled / temperature).flatten(1).logsumexp(1) - math.log(16))
    assert torch.equal(candidates(saliency, temperature), scaled > level[:, None, None])
    if temperature == 50.0:
        assert torch.equal(candidates(saliency, temperature), scaled > 1)


def test_saliencygrafting_without_saliency_mixes_nothing():
    method = METHODS["saliencygrafting"]
    signals = Signals(saliency=torch.zeros(SHAPE[0], 32, 32))
    plan = method.sample.plan(SHAPE, rng(), signals)
    assert torch.equal(method.label.weights(plan, signals), torch.tensor([[1.0, 0.0]]).expand(4, 2))


@pytest.mark.parametrize("batch", [2, 3, 9])
def test_guidedmixup_pairs_are_one_circle(batch):
    distance = torch.rand(batch, batch, generator=torch.Generator().manual_seed(batch))
    following = greedy_circle(distance + distance.T)
    visited, image = [], 0
    for _ in range(batch):
        visited.append(image)
        image = int(following[image])
    assert sorted(visited) == list(range(batch))
    assert image == 0


def test_guidedmixup_mixes_the_images_it_pairs():
    """Not random ones, as the authors' script does: the partners' salient places are far from the own."""
    saliency = torch.zeros(4, 32, 32)
    for i, (row, col) in enumerate([(4, 4), (5, 5), (27, 27), (26, 26)]):
        saliency[i, row, col] = 1
    for step in range(5):
        plan = get_method("guidedmixup").sample.plan(SHAPE, rng(step), Signals(saliency=saliency))
        assert plan.index[0, 1] in (2, 3)
        own = plan.dense_mask((32, 32))[:, 0]
        assert own[0, 4, 4] > 0.99
        assert own[0, 27, 27] < 0.01
    random = {
        tuple(get_method("guidedmixup", pairing="random").sample.plan(SHAPE, rng(step), Signals(saliency=saliency)).index[:, 1].tolist())
        for step in range(20)
    }
    assert len(random) > 8


@pytest.mark.parametrize(("batch", "m_part"), [(8, 4), (9, 4), (5, 2), (4, 64)])
def test_guidedmixup_blocks(batch, m_part):
    saliency = torch.rand(batch, 16, 16, generator=torch.Generator().manual_seed(0))
    partners = set()
    for step in range(10):
        plan = get_method("guidedmixup", m_part=m_part).sample.plan(torch.Size((batch, 3, 16, 16)), rng(step), Signals(saliency=saliency))
        partner = plan.index[:, 1]
        assert (partner != plan.index[:, 0]).all()
        assert sorted(partner.tolist()) == list(range(batch))
        partners.add(tuple(partner.tolist()))
    assert (len(partners) > 5) == (m_part < batch)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (3, 1, 7, 5), (2, 4, 40, 24), (2, 3, 150, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_guidedmixup_by_spectral_residual_needs_no_model(shape, dtype):
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    method = get_method("guidedmixup", guided_type="sr")
    mixed, targets = method(images, torch.arange(shape[0]), num_labels=5)
    assert mixed.dtype == dtype
    assert torch.isfinite(mixed).all()
    assert_close(targets.sum(1), torch.ones(shape[0]))
    # an image of one colour has no residual to speak of, and nothing becomes NaN
    flat, _ = method(torch.zeros(shape, dtype=dtype), torch.arange(shape[0]), num_labels=5)
    assert torch.equal(flat, torch.zeros(shape, dtype=dtype))


def test_snapmix_resizes_every_box_on_its_own():
    images = torch.randn(5, 3, 20, 14, generator=torch.Generator().manual_seed(0))
    partner = torch.tensor([2, 0, 1, 4, 3])
    into = torch.tensor([[0, 8, 2, 9], [4, 5, 0, 14], [1, 20, 3, 4], [0, 20, 0, 14], [5, 5, 2, 9]])
    taken = torch.tensor([[3, 5, 0, 14], [0, 20, 1, 7], [2, 10, 5, 11], [0, 20, 0, 14], [1, 4, 1, 4]])
    maps = torch.rand(5, 20, 14, generator=torch.Generator().manual_seed(1))
    maps = maps / maps.sum((1, 2), keepdim=True)
    maps[1] = math.nan
    plan = snap_plan(images, partner, into, taken, maps, None)
    expected = images.clone()
    weight = torch.tensor([[1.0, 0.0]]).repeat(5, 1)
    for i in range(4):  # the last box is empty
        (r1, r2, c1, c2), (s1, s2, t1, t2) = into[i].tolist(), taken[i].tolist()
        crop = images[partner[i], :, s1:s2, t1:t2]
        expected[i, :, r1:r2, c1:c2] = F.interpolate(crop[None], (r2 - r1, c2 - c1), mode="bilinear", align_corners=True)[0]
        weight[i, 0] = 1 - maps[i, r1:r2, c1:c2].sum()
        weight[i, 1] = maps[partner[i], s1:s2, t1:t2].sum()
    weight[1, 0] = 1 - 14 / 280  # no map, so by area
    weight[2, 1] = 8 * 6 / 280
    assert_close(blend(plan, images), expected)
    assert_close(plan.weight, weight)


def test_snapmix_doubles_images_of_one_class():
    images, maps = torch.randn(2, 3, 8, 8), torch.full((2, 8, 8), 1 / 64)
    box = torch.tensor([[0, 4, 0, 8]]).expand(2, 4)
    partner, targets = torch.tensor([1, 0]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert_close(snap_plan(images, partner, box, box, maps, targets).weight, torch.ones(2, 2))
    assert_close(snap_plan(images, partner, box, box, maps, torch.eye(2)).weight, torch.full((2, 2), 0.5))


@pytest.mark.parametrize("norm", [1, 2])
def test_saliency_labels_by_hand(norm):
    saliency = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])
    keep = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]]])
    plan = MixPlan.pair(torch.tensor([1, 0]), Dense(torch.stack([keep, 1 - keep], 1)), keep.mean((1, 2)))
    weight = SaliencyLabels(norm).weights(plan, Signals(saliency=saliency))
    own, partner = (3 / 7, 3 / 4) if norm == 1 else (3 / 5, 3**0.5 / 2)
    assert_close(weight[0], torch.tensor([own, partner]) / (own + partner))
    assert_close(weight[1], torch.tensor([1.0, 0.0]))  # nothing of image 0 is salient below
    # evidence on any scale gives the same
    assert_close(SaliencyLabels(norm).weights(plan, Signals(saliency=saliency * 1e-6)), weight)


def test_saliency_labels_refuse_moved_pixels():
    plan = MixPlan.pair(torch.tensor([1, 0]), Share(torch.full((2, 2), 0.5)), torch.full((2,), 0.5), torch.zeros(2, 2, 3, 8, 8))
    with pytest.raises(ValueError, match="leaves pixels in place"):
        SaliencyLabels().weights(plan, Signals(saliency=torch.ones(2, 8, 8)))
