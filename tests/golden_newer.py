"""Checks against reference outputs: methods that the published tables do not have. A case is a dict of tensors."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hf_mixup.core.geometry import centred_boxes, dense_pair
from hf_mixup.core.jensenshannon import JensenShannon
from hf_mixup.core.losses import BCE, CrossEntropy
from hf_mixup.core.plan import Boxes, Dense, MixPlan, blend, mix_targets, onehot
from hf_mixup.core.policy import AreaLabels, SamplePolicy, Signals
from hf_mixup.core.rng import MixKey
from hf_mixup.labels import ObjectLabels
from hf_mixup.networks.signals.merging import matched_tokens, merged_tokens
from hf_mixup.policies.augmix import OPERATIONS, AugMix, augmented, autocontrast, chained, rotate, shear_x, shear_y
from hf_mixup.policies.gmix import own_share as gmix_share
from hf_mixup.policies.hmix import own_share as hmix_share
from hf_mixup.policies.kmixup import matched
from hf_mixup.policies.localmixup import distances
from hf_mixup.policies.mergemix import important, least_overlap
from hf_mixup.policies.ricap import patch
from hf_mixup.policies.splicemix import cell_masks, spliced
from hf_mixup.steps import KeepClean
from hf_mixup.steps.hidden import Change
from hf_mixup.steps.mixstyle import restyled
from hf_mixup.steps.moex import exchanged
from hf_mixup.steps.noisymix import with_noise
from hf_mixup.steps.patchup import Patched, PatchUp, block_chance, holes
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


@dataclass(frozen=True)
class Beside(KeepClean):
    """The batch beside the mixtures that the reference drew."""

    clean_alpha: float = 0.8
    drawn: MixPlan | None = None

    def plan_beside(self, batch, rng):
        return self.drawn


def mergemixloss(case):
    """Both losses of MergeMix: of its mixtures, and of a Mixup batch. Ours is the mean, theirs the sum."""
    batch, targets = len(case["x"]), onehot(case["y"].long(), len(case["head"]))
    plan = MixPlan.pair(case["perm"].long(), dense_pair(case["stay"], torch.arange(batch)), case["stay"].double().mean((1, 2)))
    beside = MixPlan.pair(case["base_perm"].long(), None, case["base_lam"].double().expand(batch))

    def network(pixel_values):
        return SimpleNamespace(logits=pixel_values.flatten(1) @ case["W"] @ case["head"].T + case["bias"])

    parts = Parts("mergemix", Drawn(plan), AreaLabels(), CrossEntropy(float(case["smoothing"])))
    done = Beside(drawn=beside).run(parts, MethodState(), network, case["x"], targets, KEY)
    assert_close(blend(plan, case["x"]), case["mixed"], atol=1e-6, rtol=0)
    assert_close(blend(beside, case["x"]), case["base_mixed"], atol=1e-6, rtol=1e-5)
    assert_close(done.logits, torch.cat([case["logits"], case["base_logits"]]), atol=1e-5, rtol=1e-4)
    assert_close(2 * done.loss.double(), case["loss"], atol=1e-5, rtol=1e-5)
    own, other = (part.mean().double() for part in done.losses.chunk(2))
    assert_close(own, case["loss_mix"], atol=1e-5, rtol=1e-5)
    assert_close(other, case["loss_base"], atol=1e-5, rtol=1e-5)


def augmix(case):
    # every transform by itself: by rounding, at most one of 255 is different, and nothing at the edge of what is black
    done = chained(case["images"].float(), *(case[name][None] for name in ("operation", "level", "sign")))
    exact = ~torch.isin(case["operation"], torch.tensor([OPERATIONS.index(move) for move in (autocontrast, rotate, shear_x, shear_y)]))
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


def ricap(case):
    # their axis x is our rows; their second and third patch are our third and second
    order = torch.tensor([0, 2, 1, 3])
    index = case["index"].long()[order].T
    size = tuple(case["x"].shape[2:])
    batch, corner = len(index), torch.stack([case["w"], case["h"]]).long()
    lower = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    shift = torch.stack([case["crop_x"], case["crop_y"]], 1)[order] - lower * corner
    patched, mask = patch(case["x"], index, corner.expand(batch, -1), shift.expand(batch, -1, -1))
    assert torch.equal(patched, case["out"])
    weight = mask.mean((2, 3))
    assert_close(weight[0].double(), case["weight"][order], atol=1e-6, rtol=0)
    plan = MixPlan(index, Dense(mask), weight, (patched,) * 4)
    assert torch.equal(blend(plan, case["x"]), case["out"])
    losses = CrossEntropy()(case["logits"], mix_targets(plan, case["y"].long(), 6))
    assert_close(losses.mean(), case["loss"], atol=1e-5, rtol=1e-5)
    assert size == tuple(mask.shape[2:])


def with_gradient(case, change):
    hidden = case["x"].clone().requires_grad_()
    out = change(hidden)
    assert_close(out, case["out"], atol=1e-5, rtol=1e-5)
    assert_close(torch.autograd.grad((out * case["probe"]).sum(), hidden)[0], case["grad"], atol=2e-5, rtol=1e-4)


def moex(case):
    with_gradient(case, lambda hidden: exchanged(hidden, case["perm"].long(), 1, 1e-5))
    tokens = case["x"].flatten(2).mT
    assert_close(exchanged(tokens, case["perm"].long(), 2, 1e-5), case["out"].flatten(2).mT, atol=1e-5, rtol=1e-5)


def mixstyle(case):
    with_gradient(case, lambda hidden: restyled(hidden, case["perm"].long(), case["lam"], 1e-6))


def nfm(case):
    mixed = blend(pair_of(case), case["x"])
    additive, multiplicative = (float(case[name]) for name in ("additive", "multiplicative"))
    assert_close(
        with_noise(mixed, additive * case["normal"], multiplicative * (2 * case["uniform"] - 1)), case["out"], atol=1e-5, rtol=1e-5
    )


def patchup(case):
    block, hard = int(case["block"]), bool(case["hard"])
    assert block_chance(float(case["gamma"]), block, tuple(case["x"].shape[2:])) == pytest.approx(float(case["chance"]))
    batch, plan = len(case["x"]), pair_of(case)
    lam = torch.zeros(batch) if hard else plan.weight[:, 0]
    mask = holes(case["centres"].expand(batch, -1, -1, -1), block)
    change = Patched(PatchUp(hard=hard), lambda *_: mask, case["perm"].long(), lam, None)
    assert_close(change(case["x"]), case["out"], atol=1e-6, rtol=1e-5)
    labelled = PatchUp().labelled(plan, [Change(0, change)])
    targets = mix_targets(labelled, case["y"])
    assert_close(targets, case["target"], atol=1e-6, rtol=1e-5)
    # binary cross-entropy of the softmax, as there: of probabilities it is that of their log odds
    p = case["logits"].double().softmax(1)
    assert_close(2 * BCE()(p.log() - (1 - p).log(), targets).mean(), case["loss"], atol=1e-5, rtol=1e-5)


def hmix(case):
    size, batch = tuple(case["x"].shape[2:]), len(case["x"])
    lam = torch.as_tensor(case["lam"]).double().reshape(1)
    edges = centred_boxes(((1 - lam) * case["ratio"]).sqrt(), case["c_row"].reshape(1), case["c_col"].reshape(1), size)
    smooth_pair(case, hmix_share(Boxes(edges, size), lam), batch)


def gmix(case):
    size, batch = tuple(case["x"].shape[2:]), len(case["x"])
    centre = torch.stack([case["c_row"], case["c_col"]]).reshape(1, 2)
    smooth_pair(case, gmix_share(torch.as_tensor(case["lam"]).double().reshape(1), centre, size), batch)


def smooth_pair(case, own, batch):
    mask = dense_pair(own, torch.zeros(batch, dtype=torch.int64))
    plan = MixPlan.pair(torch.arange(batch).flip(0), mask, own.double().mean().expand(batch))
    assert_close(blend(plan, case["x"]), case["out"], atol=1e-5, rtol=1e-5)
    assert_close(plan.weight[0, 0].double(), torch.as_tensor(case["weight"]).double(), atol=1e-5, rtol=0)


def splicemix(case):
    grid, index, kept = (int(case["rows"]), int(case["cols"])), case["index"].long(), case["kept"]
    place = torch.arange(index.shape[1]).expand(len(index), -1)
    assert_close(spliced(case["x"], index, kept, place, grid), case["out"], atol=1e-6, rtol=1e-5)
    # the images may stand in any order, each with its cell
    order = torch.randperm(index.shape[1])
    assert_close(spliced(case["x"], index[:, order], kept[:, order], place[:, order], grid), case["out"], atol=1e-6, rtol=1e-5)
    plan = MixPlan(index, Dense(cell_masks(place, grid, tuple(case["x"].shape[2:]))), kept)
    targets = mix_targets(plan, case["y"])
    logits = torch.randn(targets.shape)
    assert_close(BCE()(logits, targets), BCE()(logits, case["target"]))


def kmixup(case):
    k, batch = int(case["k"]), len(case["x"])
    rows, others = torch.arange(batch).split(k), case["index"].long().split(k)
    partner = torch.cat(matched(case["x"], rows, others))
    assert torch.equal(partner, case["match"].long())
    plan = MixPlan.pair(partner, None, case["lam"].double().expand(batch))
    assert_close(blend(plan, case["x"]), case["out"], atol=1e-6, rtol=1e-5)


def localmixup(case):
    locality = float(case["alpha"]) * case["x"][0].numel() ** 0.5
    assert_close((-locality * distances(case["x"])).softmax(1), case["probabilities"].float(), atol=1e-6, rtol=1e-5)


def mergemix(case):
    prefix, tokens, sizes = int(case["prefix"]), case["x"], None
    place = torch.arange(tokens.shape[1] - prefix).expand(len(tokens), -1)
    for step, count in enumerate(case["counts"].tolist()):
        into, left = matched_tokens(case[f"keys{step}"][:, prefix:], count, prefix % 2)
        patches, sizes = merged_tokens(tokens[:, prefix:], sizes, into, left)
        tokens, place = torch.cat([tokens[:, :prefix], patches], 1), into.gather(1, place)
        assert_close(tokens, case[f"tokens{step}"], atol=1e-6, rtol=1e-5)
        if prefix == 1:  # of two, the second moves among the merged tokens there, and its map does not follow
            assert torch.equal(into + 1, case[f"level{step}"][:, 1:])
    if prefix > 1:
        return
    worth = case["attention"].sum(1)[:, 1:, 0].gather(1, place)
    assert_close(worth, case["worth"], atol=1e-6, rtol=0)
    grid = (len(worth), 4, 4)
    stay = important(worth.view(grid), torch.full((len(worth),), 0.45, dtype=torch.float64))
    ours = dense_pair(stay, torch.arange(len(worth))).dense(tuple(case["mask"].shape[2:]))
    assert stay.flatten(1).sum(1).eq(case["keep"]).all()
    assert_close(stay.float().mean((1, 2)), case["lam"].float())
    # patches that were merged are worth the same: which of them comes first is nobody's choice
    for own, theirs, value in zip(stay.flatten(1), case["mask"][:, 0, ::2, ::2].flatten(1).bool(), worth, strict=True):
        assert_close(value[own].sort().values, value[theirs].sort().values, atol=1e-6, rtol=0)
    assert ours.shape == case["mask"].shape
    assert torch.equal(least_overlap(case["masks"].view(grid).bool()), case["partner"].long())


def objectlabels(case):
    top, left, bottom, right = case["box"].tolist()
    batch, size = len(case["x"]), tuple(case["x"].shape[2:])
    boxes = Boxes(torch.tensor([[top, bottom, left, right]] * batch), size)
    plan = MixPlan.pair(case["perm"].long(), boxes, 1 - boxes.area())
    assert torch.equal(blend(plan, case["x"]), case["out"])
    label = ObjectLabels(kind="relative" if case["relative"] else "absolute")
    weight = label.weights(plan, Signals(object_masks=case["mask"]))
    own, partner = plan.dense_mask(size).unbind(1)
    shows = (own * case["mask"] + partner * case["mask"][plan.index[:, 1]]).sum((1, 2)) > 0
    assert_close(weight[shows, 0], case["weight"][shows, 0].float(), atol=1e-5, rtol=0)
    assert torch.equal(weight[~shows], plan.weight[~shows])  # a half there
    assert_close(weight.sum(1), torch.ones(batch))
    assert torch.equal(label.weights(plan, Signals(object_masks=(255 * case["mask"]).byte())), weight)


CHECKS = {
    "objectlabels": objectlabels,
    "mergemix": mergemix,
    "mergemixloss": mergemixloss,
    "kmixup": kmixup,
    "localmixup": localmixup,
    "splicemix": splicemix,
    "gmix": gmix,
    "hmix": hmix,
    "moex": moex,
    "mixstyle": mixstyle,
    "nfm": nfm,
    "patchup": patchup,
    "ricap": ricap,
    "augmix": augmix,
    "jensenshannon": jensenshannon,
    "regmixup": regmixup,
}
