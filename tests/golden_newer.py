"""Checks of the methods beyond the published tables against reference outputs. A case is a dict of tensors."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn
from torch.testing import assert_close

from hf_mixup.core.jensenshannon import JensenShannon
from hf_mixup.core.losses import CrossEntropy
from hf_mixup.core.plan import MixPlan, blend, onehot
from hf_mixup.core.policy import AreaLabels, SamplePolicy
from hf_mixup.core.rng import MixKey
from hf_mixup.policies.augmix import OPERATIONS, AugMix, augmented, chained, rotate, shear_x, shear_y
from hf_mixup.steps import KeepClean
from hf_mixup.steps.step import MethodState, Parts

KEY = MixKey(0, 0, 0)


@dataclass(frozen=True)
class Drawn(SamplePolicy):
    """The plan that the reference drew."""

    drawn: MixPlan

    def plan(self, shape, rng, signals):
        return self.drawn


def pair_of(case):
    """One lam for the whole batch."""
    batch = len(case["x"])
    return MixPlan.pair(case["perm"].long(), None, torch.as_tensor(case["lam"]).double().reshape(1).expand(batch))


def regmixup(case):
    plan = pair_of(case)
    assert_close(blend(plan, case["x"]), case["mixed"], atol=1e-5, rtol=0)
    norm = nn.BatchNorm1d(case["W"].shape[1])  # which tells one pass from two

    def network(pixel_values):
        return SimpleNamespace(logits=norm(pixel_values.flatten(1) @ case["W"]))

    parts = Parts("regmixup", Drawn(plan), AreaLabels(), CrossEntropy())
    targets = onehot(case["y"], case["W"].shape[1])
    done = KeepClean().run(parts, MethodState(), network, case["x"], targets, KEY)
    mixed, clean = done.logits.chunk(2)
    assert_close(torch.cat([clean, mixed]), case["logits"], atol=1e-5, rtol=1e-5)
    assert_close(done.loss.double(), case["loss"], atol=1e-5, rtol=1e-5)
    apart = KeepClean(one_pass=False).run(parts, MethodState(), network, case["x"], targets, KEY)
    assert abs(apart.loss - case["loss"]) > 1e-4


def augmix(case):
    # every transform by itself: by rounding, at most one of 255 is different, and nothing at the edge of what is black
    done = chained(case["images"].float(), *(case[name][None] for name in ("operation", "level", "sign")))
    exact = ~torch.isin(case["operation"], torch.tensor([OPERATIONS.index(move) for move in (rotate, shear_x, shear_y)]))
    assert torch.equal(done[exact], case["out"][exact].float())
    away = (done - case["out"].float()).abs()
    assert away.max() <= 1, away.flatten(1).amax(1)
    assert (away > 0).float().mean() < 0.02
    # the whole mixture of normalised images
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    images = (case["x"].float() / 255 - 0.5) / 0.5
    width, batch = case["operations"].shape[1:]
    made = chained(case["x"].float().repeat(width, 1, 1, 1), *(case[name].flatten(1) for name in ("operations", "levels", "signs")))
    mixed = augmented(
        images, case["x"].float(), made.unflatten(0, (width, batch)), case["shares"], case["share"], AugMix(mean=mean, std=std)
    )
    assert_close(mixed, case["mixed"], atol=2.1 / 255, rtol=0)
    assert (mixed - case["mixed"]).abs().mean() < 0.02 / 255


def jensenshannon(case):
    clean, first, second = case["logits"]
    logits, targets = torch.cat([first, second, clean]), onehot(case["y"], 7).repeat(3, 1)
    losses = JensenShannon()(logits, targets)
    assert losses.shape == (15,)
    assert_close(losses.mean().double(), case["loss"], atol=1e-5, rtol=1e-5)


CHECKS = {
    "augmix": augmix,
    "jensenshannon": jensenshannon,
    "regmixup": regmixup,
}
