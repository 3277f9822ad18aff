"""Methods that look at the images or the network, where laws and reference outputs do not reach."""

import math

import pytest
import torch
from torch.testing import assert_close

from hf_mixup import METHODS, get_method
from hf_mixup.labels import SaliencyLabels
from hf_mixup.plan import Dense, MixPlan, Share
from hf_mixup.policies.saliencygrafting import candidates
from hf_mixup.policy import Signals
from hf_mixup.rng import MixKey

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
    with pytest.raises(ValueError, match="leaves pixels where they are"):
        SaliencyLabels().weights(plan, Signals(saliency=torch.ones(2, 8, 8)))
