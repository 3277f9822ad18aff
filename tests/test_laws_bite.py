"""Every law finds the fault that it is for. Each policy, label policy, blend and method here is broken in one way."""

import inspect
import random
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

import laws
from hf_mixup import METHODS, Method, blend, get_method
from hf_mixup.core.geometry import centred_boxes
from hf_mixup.core.plan import Boxes, Dense, MixPlan, Share
from hf_mixup.core.policy import AreaLabels, LabelPolicy, SamplePolicy
from hf_mixup.core.rng import beta, keyed
from hf_mixup.policies import RICAP, CutMix, FMix, GMix, GridMix, HMix, Mixup, ResizeMix, SaliencyMix, SmoothMix

SHAPE = (5, 3, 16, 12)


class Spoilt(SamplePolicy):
    """A good policy whose plan is changed by `spoil(plan, shape, rng, signals)`."""

    def __init__(self, spoil, base=None):
        self.spoil, self.base = spoil, base or CutMix()

    def plan(self, shape, rng, signals):
        return self.spoil(self.base.plan(shape, rng, signals), shape, rng, signals)


class SpoiltLabels(LabelPolicy):
    def __init__(self, spoil):
        self.spoil = spoil

    def weights(self, plan, signals):
        return self.spoil(plan, signals)


def paired(plan, partner):
    return replace(plan, index=torch.stack([torch.arange(len(partner)), partner], 1))


# --- what can be wrong with a plan ---------------------------------------------------------------------------------------------


def inverted_lam(plan, shape, rng, signals):
    return plan.reweighted(plan.weight.flip(1))


def weight_of_unclipped_box(plan, shape, rng, signals):
    size = tuple(shape[2:])
    lam = beta(1.0, shape[0], rng)
    row, col = (torch.randint(length, (shape[0],), generator=rng) for length in size)
    return MixPlan.pair(plan.index[:, 1], Boxes(centred_boxes((1 - lam).sqrt(), row, col, size), size), lam)


def other_image_than_label(plan, shape, rng, signals):
    images = signals["images"]
    return replace(plan, sources=(images, images[plan.index[:, 1].roll(1)]))


def rows_for_columns(plan, shape, rng, signals):
    return replace(plan, mask=Boxes(plan.mask.edges[:, [2, 3, 0, 1]], plan.mask.size))


def one_mask_for_all(plan, shape, rng, signals):
    return replace(plan, mask=Boxes(plan.mask.edges[:1].expand(shape[0], -1), plan.mask.size))


def mask_above_one(plan, shape, rng, signals):
    own = plan.dense_mask(tuple(shape[2:]))[:, 0] * 1.2
    return replace(plan, mask=Dense(torch.stack([own, 1 - own], 1)))


def mask_sums_to_less(plan, shape, rng, signals):
    return replace(plan, mask=Dense(plan.dense_mask(tuple(shape[2:])) * 0.9))


def weights_sum_to_less(plan, shape, rng, signals):
    return plan.reweighted(plan.weight * 0.9)


def weight_below_zero(plan, shape, rng, signals):
    return plan.reweighted(torch.tensor([1.2, -0.2]).expand(shape[0], 2))


def partner_first(plan, shape, rng, signals):
    """Consistent, but own and partner have changed places."""
    mask = Dense(plan.dense_mask(tuple(shape[2:])).flip(1))
    return MixPlan(plan.index.flip(1), mask, plan.weight.flip(1))


def index_outside(plan, shape, rng, signals):
    return paired(plan, plan.index[:, 1] + 1)


def index_of_32_bits(plan, shape, rng, signals):
    return replace(plan, index=plan.index.int())


def draws_from_torch(plan, shape, rng, signals):
    return paired(plan, torch.randperm(shape[0]))


def draws_from_numpy(plan, shape, rng, signals):
    return paired(plan, torch.from_numpy(np.random.permutation(shape[0])))


def draws_from_random(plan, shape, rng, signals):
    random.random()
    return plan


def seeds_torch(plan, shape, rng, signals):
    torch.manual_seed(12345)
    return plan


def writes_into_images(plan, shape, rng, signals):
    signals["images"].mul_(1)
    return plan


def writes_into_saliency(plan, shape, rng, signals):
    signals["saliency"].div_(signals["saliency"].sum())
    return plan


def unkeyed(plan, shape, rng, signals):
    return CutMix().plan(shape, keyed(0), signals)


def from_entropy(plan, shape, rng, signals):
    fresh = torch.Generator()
    fresh.seed()
    return CutMix().plan(shape, fresh, signals)


def remembers(plan, shape, rng, signals, calls=[]):  # noqa: B006 (the fault: state that outlives the call)
    calls.append(None)
    return CutMix().plan(shape, keyed(int(torch.randint(100, (), generator=rng)), len(calls)), signals)


def roll_pairing(plan, shape, rng, signals):
    return paired(plan, torch.arange(shape[0]).roll(1))


def reversed_pairing(plan, shape, rng, signals):
    return paired(plan, torch.arange(shape[0]).flip(0))


def self_pairing(plan, shape, rng, signals):
    """Varies, but half of the images stay alone."""
    partner = plan.index[:, 1]
    return paired(plan, torch.where(torch.rand(shape[0], generator=rng) < 0.5, torch.arange(shape[0]), partner))


def weights_of_images_type(plan, shape, rng, signals):
    return plan.reweighted(plan.weight.to(signals["images"].dtype))


def weights_of_64_bits(plan, shape, rng, signals):
    return plan.reweighted(plan.weight.double())


def sources_of_32_bits(plan, shape, rng, signals):
    return replace(plan, sources=tuple(signals["images"].float()[plan.index.T]))


def folded_lam(plan, shape, rng, signals):
    """Keeps the larger share for the own image."""
    weight = torch.stack([plan.weight.amax(1), plan.weight.amin(1)], 1)
    return replace(plan, mask=Share(weight), weight=weight)


def squared_lam(plan, shape, rng, signals):
    lam = plan.weight[:, 0] ** 1.15
    weight = torch.stack([lam, 1 - lam], 1)
    return replace(plan, mask=Share(weight), weight=weight)


def every_key(law, *args, **kwargs):
    """As the laws are used: over some keys."""
    for key in range(5):
        law(*args, key=key, **kwargs)


PLANS = {
    laws.onehot_images: [inverted_lam, weight_of_unclipped_box, other_image_than_label, rows_for_columns, one_mask_for_all],
    laws.convex: [mask_above_one, mask_sums_to_less, weights_sum_to_less, weight_below_zero],
    laws.own_first: [partner_first, index_outside, index_of_32_bits],
    laws.pure: [draws_from_torch, draws_from_numpy, draws_from_random, seeds_torch, writes_into_images, writes_into_saliency],
    laws.keyed_plans: [unkeyed, from_entropy, remembers],
    laws.varied: [roll_pairing, reversed_pairing, self_pairing],
    laws.dtype: [weights_of_images_type, weights_of_64_bits, sources_of_32_bits],
    laws.share_distribution: [folded_lam, squared_lam],
}
HOLD = {
    laws.onehot_images: lambda policy: every_key(laws.onehot_images, policy, AreaLabels(), SHAPE),
    laws.convex: lambda policy: every_key(laws.convex, policy, SHAPE),
    laws.own_first: lambda policy: every_key(laws.own_first, policy, SHAPE),
    laws.pure: lambda policy: laws.pure(policy, AreaLabels(), SHAPE),
    laws.keyed_plans: lambda policy: laws.keyed_plans(policy, (8, 3, 32, 32)),
    laws.varied: lambda policy: laws.varied(policy, (8, 3, 32, 32)),
    laws.dtype: lambda policy: laws.dtype(policy, SHAPE),
    laws.share_distribution: lambda policy: laws.share_distribution(policy, (4, 3, 8, 8), mean=0.5),
}


@pytest.mark.parametrize(
    ("law", "spoil"), [(law, spoil) for law, all_spoilt in PLANS.items() for spoil in all_spoilt], ids=lambda f: f.__name__
)
def test_law_rejects_a_broken_plan(law, spoil):
    base = Mixup() if law is laws.share_distribution else CutMix()
    HOLD[law](Spoilt(lambda plan, *_: plan, base))
    with pytest.raises(AssertionError):
        HOLD[law](Spoilt(spoil, base))


# --- faults of the field, told by the settings that reproduce them --------------------------------------------------------------


def test_inverted_weights_of_published_smoothmix_are_rejected():
    laws.onehot_images(SmoothMix(), AreaLabels(), SHAPE)
    with pytest.raises(AssertionError):
        laws.onehot_images(SmoothMix(as_published=True), AreaLabels(), SHAPE)


@pytest.mark.parametrize(
    "policy",
    [FMix(), SmoothMix(), GridMix(), ResizeMix(), SaliencyMix(), HMix(), GMix(), RICAP()],
    ids=lambda policy: type(policy).__name__,
)
def test_an_inverted_lam_is_rejected_whatever_the_mask(policy):
    tolerance = 1e-5 + laws.PIXEL / (SHAPE[2] * SHAPE[3])
    every_key(laws.onehot_images, policy, AreaLabels(), SHAPE, tolerance=tolerance)
    with pytest.raises(AssertionError):
        every_key(laws.onehot_images, Spoilt(inverted_lam, policy), AreaLabels(), SHAPE, tolerance=tolerance)


# --- label policies and blends --------------------------------------------------------------------------------------------------


def swapped_labels(plan, signals):
    return plan.weight.flip(1)


def labels_from_elsewhere(plan, signals):
    share = signals["saliency"].mean((1, 2))
    return torch.stack([share, 1 - share], 1)


def labels_that_write(plan, signals):
    signals["attention"].zero_()
    return plan.weight


@pytest.mark.parametrize("spoil", [swapped_labels, labels_from_elsewhere], ids=lambda f: f.__name__)
def test_laws_reject_broken_label_policies(spoil):
    with pytest.raises(AssertionError):
        laws.identity(blend, SpoiltLabels(spoil), SHAPE)
    with pytest.raises(AssertionError):
        laws.onehot_images(CutMix(), SpoiltLabels(spoil), SHAPE)


def test_law_rejects_labels_that_write_into_their_evidence():
    with pytest.raises(AssertionError):
        laws.pure(CutMix(), SpoiltLabels(labels_that_write), SHAPE)


def sum_of_rounded_products(plan, images):
    share = plan.dense_mask(tuple(images.shape[2:]))[:, :, None] * 0.1
    return (share[:, 0] * images + share[:, 1] * images[plan.index[:, 1]]) / 0.1


def swapped_blend(plan, images):
    return blend(replace(plan, index=plan.index.flip(1)), images)[plan.index[:, 1]]


def half_precision_blend(plan, images):
    return blend(plan, images.bfloat16()).to(images.dtype)


@pytest.mark.parametrize("broken", [sum_of_rounded_products, swapped_blend, half_precision_blend], ids=lambda f: f.__name__)
def test_law_rejects_a_blend_that_changes_a_kept_image(broken):
    laws.identity(blend, AreaLabels(), SHAPE)
    with pytest.raises(AssertionError):
        laws.identity(broken, AreaLabels(), SHAPE)


# --- methods as data -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unspoken(SamplePolicy):
    """Its repr leaves out a field."""

    alpha: float = field(default=1.0, repr=False)

    def plan(self, shape, rng, signals):
        return Mixup(self.alpha).plan(shape, rng, signals)


@dataclass(frozen=True)
class Forgetful(SamplePolicy):
    """Pickling leaves out a field."""

    alpha: float = 1.0

    def __reduce__(self):
        return Forgetful, ()

    def plan(self, shape, rng, signals):
        return Mixup(self.alpha).plan(shape, rng, signals)


@dataclass(frozen=True)
class Shadowed(SamplePolicy):
    """A hyper-parameter with the name of a part of a method, which `replaced` would take it for."""

    loss: str = "measured"

    def plan(self, shape, rng, signals):
        return Mixup().plan(shape, rng, signals)


class Lossy(Method):
    """Its dictionary leaves out a field."""

    def to_dict(self):
        data = super().to_dict()
        data["sample"].pop("alpha")
        return data


@pytest.mark.parametrize("policy", [Unspoken(0.3), Forgetful(0.3), Shadowed()], ids=lambda policy: type(policy).__name__)
def test_law_rejects_a_policy_that_loses_a_field(policy, monkeypatch):
    method = Method("broken", policy)
    monkeypatch.setitem(METHODS, "broken", Method("broken", type(policy)()))
    with pytest.raises(AssertionError):
        laws.round_trip(method)


def test_law_rejects_a_method_that_loses_a_field():
    laws.round_trip(get_method("mixup", alpha=0.3))
    with pytest.raises(AssertionError):
        laws.round_trip(Lossy("mixup", Mixup(0.3)))


def test_every_law_is_shown_to_bite():
    numbered = {law for _, law in inspect.getmembers(laws, inspect.isfunction) if (law.__doc__ or "")[:1].isdigit()}
    assert numbered == {*PLANS, laws.identity, laws.round_trip}
