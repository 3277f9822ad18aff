"""Checks of the methods that rewrite labels against reference outputs. A case is a dict of tensors, named as in the reference."""

import random
import re
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from hf_mixup.core.geometry import box_plan, enlarged
from hf_mixup.core.losses import CrossEntropy, Decoupled, DecoupledBCE, decoupled_log_probs, rescale, smooth
from hf_mixup.core.plan import Dense, MixPlan, Share, blend, mix_targets, onehot
from hf_mixup.core.policy import Signals
from hf_mixup.labels import AlignedLabels, AttentionLabels, ProgressiveLabels, TokenLabels
from hf_mixup.labels.align import aligned
from hf_mixup.labels.attention import attention_shares
from hf_mixup.policies.smmix import extreme_squares, max_min_plan, square_sides
from hf_mixup.policies.tokenmix import block_mask, random_mask
from hf_mixup.steps.smmixing import consistency_loss, fine_grained_loss
from hf_mixup.steps.sumix import semantic_distances, uncertainties, uncertainty_loss, weighed


def close(actual, expected, tolerance=1e-5):
    assert_close(torch.as_tensor(actual).double(), torch.as_tensor(expected).double(), atol=tolerance, rtol=1e-6)


def two_class_targets(case, lam, second="y_b", classes=10):
    lam = torch.as_tensor(lam).double().reshape(-1, 1)
    own, partner = (onehot(case[name].long(), classes) for name in ("y_a", second))
    return (lam * own + (1 - lam) * partner).float()


def per_class(case, values):
    """(B, C): the value of either side at its class."""
    return sum(onehot(case[name].long(), 10) * value for name, value in zip(("y_a", "y_b"), values, strict=True))


def decouple_ce(case):
    """The reference leaves out the decoupled terms at one half, `loss_total` of which is therefore not to be met."""
    targets, logits = two_class_targets(case, case["lam"]), case["logits"]
    loss = Decoupled(eta=0.1)(logits, targets)
    eta = case["eta_a_b"]
    close(Decoupled(eta=0)(logits, targets).mean(), case["loss_mce"])
    if float(case["lam"]) == 0.5:
        assert (loss > case["loss_per_sample"]).all()
        return
    if not 1e-3 < float(case["lam"]) < 1 - 1e-3:
        close(loss, case["loss_per_sample"])
    if eta[0] != eta[1]:  # sides by share are the same as sides by own and partner at lam 0.3
        sides = "less" if (eta[0] > eta[1]) == (case["lam"] < 0.5) else "more"
        loss = Decoupled(eta=0.1, sides=sides)(logits, targets)
    if not case["loss_per_sample"].isnan().any():
        close(loss, case["loss_per_sample"])
    close(loss.mean(), case["loss_total"])


def decouple_swapped(case):
    """The reference gives eta_a to the partner here. Ours, with the two exchanged, is that of `etaB`."""
    targets = two_class_targets(case, case["lam"])
    right = Decoupled(eta=0.1, sides="less")(case["logits"], targets)
    swapped = Decoupled(eta=0.1, sides="more")(case["logits"], targets)
    close(swapped, case["loss_per_sample"])
    assert (right - swapped).abs().min() > 1e-3


def decouple_formula(case):
    targets, logits = two_class_targets(case, case["lam"]), case["logits"]
    alone = decoupled_log_probs(logits, targets > 0)
    differ = case["y_a"] != case["y_b"]
    rows = torch.arange(len(logits))
    close(-alone[rows, case["y_a"].long()][differ], case["dec_a_without_b"][differ])
    close(-alone[rows, case["y_b"].long()][differ], case["dec_b_without_a"][differ])
    plain = Decoupled(eta=0)(logits, targets)
    close(plain, case["mce"])
    eta = per_class(case, (case["eta_a"], case["eta_b"])) * differ[:, None]
    close(plain - (eta * alone).sum(1), case["per_sample"])
    if case["eta_a"] == case["eta_b"]:
        loss = Decoupled(eta=float(case["eta_a"]))(logits, targets)
        close(loss, case["per_sample"])
        close(loss.mean(), case["mean"])


def decouple_head(case):
    for key in case:
        if named := re.fullmatch(r"(both|less|more)_(none|pow)_([\d.]+)", key):
            sides, scale, lam = named.groups()
            loss = Decoupled(eta=0.1, sides=sides, power=float(scale == "pow"))
            close(loss(case["logits"], two_class_targets(case, float(lam))).mean(), case[key])


def decouple_bce(case):
    for key, expected in case.items():
        numbers = {name: float(value) for name, value in re.findall(r"(t|xi|lam|twohot|mixbce|neg0\.2)_?([\d.]+)(?=_|$)", key)}
        if key.startswith("lamadj_pow"):
            close(rescale(case["lamadj_in"].float(), numbers["t"], numbers["xi"]), expected)
            continue
        if key.startswith("twohot_pow"):
            loss, lam = DecoupledBCE(threshold=numbers["t"], power=numbers["xi"], reduction="sum"), numbers["lam"]
        elif key.startswith("twohot_"):
            loss, lam = DecoupledBCE(power=0.0, reduction="sum"), numbers["twohot"]
        elif key.startswith("mixbce_"):
            loss, lam = DecoupledBCE(reduction="sum"), numbers["mixbce"]
        elif key.startswith("neg0.2_"):
            loss, lam = DecoupledBCE(negative_weight=0.2, reduction="sum"), numbers["neg0.2"]
        elif key == "note_same_class":
            close(DecoupledBCE(reduction="sum")(case["logits"], two_class_targets(case, 0.3, "y_b_same")).mean(), expected)
            continue
        else:
            continue
        close(loss(case["logits"], two_class_targets(case, lam)).mean(), expected)


def transmix_loss(case):
    """OpenMixup's keys are those of a loss averaged before it is weighted, and are not to be met."""
    lam = case["lam"].float()
    batch = len(lam)
    # the partners' labels are given, not their places, so both halves of a batch of twice the size
    weight = torch.stack([lam, 1 - lam], 1)
    plan = MixPlan(torch.stack([torch.arange(batch), torch.arange(batch) + batch], 1), Share(weight), weight)
    targets = mix_targets(plan, onehot(torch.cat([case["y_a"], case["y_b"]]).long(), 10))
    loss = CrossEntropy(smoothing=0.1)(case["logits"], targets, plan)
    close(loss, case["correct_per_sample"])
    close(loss.mean(), case["correct_mean"])


def flipped_plan(batch, mask, lam):
    return MixPlan.pair(torch.arange(batch).flip(0), mask, torch.as_tensor(lam).reshape(-1).expand(batch))


def transmix_official(case):
    top, bottom, left, right = case["box_yl_yh_xl_xh"].tolist()
    height, width = case["img_hw"].tolist()
    attention = case["cls_attn"].float()
    batch, side = len(attention), int(attention.shape[1] ** 0.5)
    close(case["attn"].mean(1)[:, 0, 1:], attention)
    edges = torch.tensor([[top, bottom, left, right]]).expand(batch, -1)
    plan = box_plan(torch.arange(batch).flip(0), edges, (height, width))
    targets, epsilon = onehot(case["labels"].long(), int(case["num_classes"])), float(case["smoothing"])
    close(smooth(mix_targets(plan, targets), epsilon), case["area_target"])
    weights = AttentionLabels().weights(plan, Signals(attention=attention.view(batch, side, side)))
    close(weights[:, 1], case["lam_pasted"])
    close(smooth(mix_targets(plan.reweighted(weights), targets), epsilon), case["target"])


def transmix_openmixup(case):
    """Masks as images, one for all or one each; the share given need not be their area."""
    pasted = case["mask"].float()[:, 0]
    attention = case["attn"].float().mean(1)[:, 0, 1:]
    batch, side = len(attention), int(attention.shape[1] ** 0.5)
    plan = flipped_plan(batch, Dense(torch.stack([1 - pasted, pasted], 1)), case["lam0_keep"])
    weights = AttentionLabels().weights(plan, Signals(attention=attention.view(batch, side, side)))
    close(weights[:, 0], case["lam_keep"])


def tokenmix_block_masks(case):
    draws = random.Random(int(case["py_random_seed"]))
    cells = case["masks"][0].numel()
    count = int((1 - float(case["lam_in"])) * cells) + int(case["minimum_tokens"])
    masks = torch.stack([block_mask(tuple(case["masks"].shape[1:]), count, draws) for _ in case["masks"]])
    assert torch.equal(masks, case["masks"].bool())
    close(1 - masks.double().mean((1, 2)), case["lam"])
    close(masks.double().mean(0), case["mean_map"])


def tokenmix_block_stats(case):
    for lam, count, least, mean, most in case["table"].tolist():
        draws = random.Random(0)
        assert min(196, int((1 - lam) * 196) + 14) == count
        covered = torch.tensor([float(block_mask((14, 14), int(count), draws).sum()) for _ in range(200)])
        assert (covered.min(), covered.max()) == (least, most)
        close(covered.mean(), mean)


def tokenmix_random_mask(case):
    order = np.random.RandomState(int(case["np_seed"])).permutation(case["mask"].numel())
    mask = random_mask(torch.from_numpy(order), min(196, int(0.5 * 196) + 14), tuple(case["mask"].shape))
    assert torch.equal(mask, case["mask"].bool())
    close(1 - mask.double().mean(), case["lam"])


def tokenmix_label(case):
    labels, pasted = case["labels"].long(), case["mask"].float()
    batch, classes = len(labels), int(case["num_classes"])
    scores = case["maps"][torch.arange(batch), labels]
    plan = flipped_plan(batch, Dense(torch.stack([1 - pasted, pasted]).expand(batch, -1, -1, -1)), 1 - pasted.mean())
    weights = TokenLabels().weights(plan, Signals(token_scores=scores))
    close(weights, torch.stack([case["score_a"], case["score_b"]], 1))
    close(weights.sum(1), case["row_sum"])
    # the official smoothing, half of it from either source
    epsilon = float(case["smoothing"])
    target = mix_targets(plan.reweighted(weights - epsilon / 2), onehot(labels, classes)) + epsilon / classes
    close(target, case["target"])


def smmix_images(case):
    images, attention = case["x"].float(), case["attn"].float()
    batch, grid = len(images), int(attention.shape[1] ** 0.5)
    attention = attention.view(batch, grid, grid)
    side = int(case["rect"][0])
    assert [[r, r] for r in square_sides(grid, (0.25, 0.75))] == case["sizes"].tolist()
    least, most = extreme_squares(attention, side)
    width = torch.tensor([grid - side + 1, 1])
    assert torch.equal((least * width).sum(1), case["argmin"].long())
    assert torch.equal((most * width).sum(1), case["argmax"].long())
    sums = attention.unfold(1, side, 1).unfold(2, side, 1).sum((3, 4)).flatten(1)
    close(sums, case["region_sums"], 1e-4)
    plan = max_min_plan(images, attention, torch.arange(batch).flip(0), side)
    close(blend(plan, images), case["mixed"])
    close(plan.weight[:, 0], case["lam_keep"].expand(batch))
    pasted = plan.dense_mask((grid, grid))[:, 1].flatten(1).bool()
    assert torch.equal(pasted, case["source_mask"])
    assert torch.equal(~pasted, case["target_mask"])
    targets = onehot(case["labels"].long(), 10)
    close(smooth(mix_targets(plan, targets), 0.1), case["mixed_target"])
    for k, name in enumerate(["target_target", "source_target"]):
        close(smooth(targets[plan.index[:, k]], 0.1), case[name])


def smmix_losses(case):
    """The targets come smoothed, and as rows of their own: both halves of a batch of twice the size."""
    batch, lam = len(case["logits"]), float(case["lam_keep"])
    whole = CrossEntropy()(case["logits"], case["mixed_target"]).mean()
    close(whole, case["loss_cls"])
    weight = torch.tensor([lam, 1 - lam]).expand(batch, 2)
    plan = MixPlan(torch.stack([torch.arange(batch), torch.arange(batch) + batch], 1), Share(weight), weight)
    sources = torch.cat([case["target_target"], case["source_target"]])
    parts = torch.stack([case["target_logits"], case["source_logits"]], 1)
    fine = fine_grained_loss(parts, plan, sources, CrossEntropy())
    close(fine, case["loss_fine"])
    consistency = consistency_loss(case["logits"], case["unmixed_logits"], flipped_plan(batch, Share(weight), lam))
    close(consistency, case["loss_con"])
    close(whole + fine + consistency, case["loss"])


def tla_align(case):
    """Distributions of every token in the reference; ours on them, and on the sources' shares alone."""
    labels, classes, epsilon = case["labels"].long(), int(case["num_classes"]), float(case["smoothing"])
    attention = case["attn"].float().mean(2).transpose(0, 1)  # (B, L, N, N)
    batch = len(labels)
    for layer, tokens in enumerate(case["token_labels_per_layer"], start=1):
        close(aligned(case["token_labels_in"], attention[:, :layer]), tokens)
    pasted = case["grid_mask"].float()
    mask = torch.stack([1 - pasted, pasted]).expand(batch, -1, -1, -1)
    plan = flipped_plan(batch, Dense(mask), 1 - pasted.mean())
    signals = Signals(token_grid=pasted, attention_layers=attention)
    targets = onehot(labels, classes)
    close(smooth(mix_targets(plan.reweighted(AlignedLabels().weights(plan, signals)), targets), epsilon), case["final_cls_label"])
    if "x" in case:
        size = tuple(case["x"].shape[2:])
        enlarged_plan = flipped_plan(batch, Dense(enlarged(mask, size)), 1 - pasted.mean())
        close(blend(enlarged_plan, case["x"]), case["mixed"])


def tla_scalar(case):
    """Its attention is that of the case `tla_align`, of which the repository holds all but the images."""
    with np.load(Path(__file__).parent / "golden" / "tla_align_labels.npz") as other:
        attention = torch.from_numpy(other["attn"]).mean(2).transpose(0, 1)
        pasted = torch.from_numpy(other["grid_mask"]).float()
    batch, tokens = case["s_final"].shape
    own = torch.cat([case["lam"].float().reshape(1), 1 - pasted.flatten()]).expand(batch, tokens)
    shares = aligned(own[:, :, None], attention)[:, :, 0]
    close(shares, case["s_final"])
    close(shares[:, 0], case["s_cls"])


def mixpro(case):
    """The mask is on the grid of patches here, and the share of it kept in cells, as `mask_ratio`."""
    kept, attention = case["grid_mask"].float(), case["cls_attn"].float()
    targets = onehot(case["labels"].long(), 10)
    plan = MixPlan.pair(case["perm"].long(), Dense(torch.stack([kept, 1 - kept], 1)), case["mask_ratio"])
    close(plan.dense_mask(tuple(kept.shape[1:]))[:, 0].mean((1, 2)), case["area_true"])
    close(smooth(mix_targets(plan, targets), 0.1), case["target_area"])
    attention = attention.view_as(kept)
    close(attention_shares(plan, attention)[:, 0], case["lam_attn"])
    close(F.cosine_similarity(case["target_area"], case["logits"].softmax(1)), case["cos"])
    weights = ProgressiveLabels().weights(plan, Signals(attention=attention, logits=case["logits"], targets=targets))
    close(weights[:, 0], case["lam"])
    loss = CrossEntropy()(case["logits"], mix_targets(plan.reweighted(weights), targets))
    close(loss, case["loss_per_sample"])
    close(loss.mean(), case["loss"])


def sumix_head(case):
    """`loss` of the reference weighs the mean loss of the batch, and is not to be met."""
    lam, partner = float(case["lam"]), case["perm"].long()
    batch, targets = len(partner), onehot(case["labels"].long(), 10)
    weight = torch.tensor([lam, 1 - lam]).expand(batch, 2)
    plan = MixPlan.pair(partner, Share(weight), torch.full((batch,), lam))
    classes = case["labels"].long()[plan.index]
    for kind in ("one", "mix"):
        features = case[f"feat_{kind}"]
        close(F.linear(features, case["fc_w"], case["fc_b"]), case[f"logits_{kind}"])
        close(uncertainties(F.linear(features, case["un_w"], case["un_b"]), True), case[f"unc_{kind}"])
    distance = semantic_distances(case["logits_mix"], case["logits_one"], plan.index, classes)
    close(distance, torch.stack([case["alpha_a"], case["alpha_b"]], 1))
    both = case["unc_one"][plan.index] + case["unc_mix"][:, None]
    close(both, torch.stack([case["beta_a"], case["beta_b"]], 1))
    shares = weighed(plan.weight, distance, classes)
    close(shares[:, 0], case["lam_a"])
    regulariser = uncertainty_loss(distance, case["unc_one"], case["unc_mix"], plan, classes)
    close(regulariser, case["reg"])
    loss = CrossEntropy()(case["logits_mix"], mix_targets(plan.reweighted(shares), targets)).mean()
    close(loss + float(case["gamma"]) * regulariser, case["loss_per_sample_paired"])


CHECKS = {
    "tla_align": tla_align,
    "tla_scalar": tla_scalar,
    "mixpro_": mixpro,
    "sumix_head": sumix_head,
    "smmix_side": smmix_images,
    "smmix_losses": smmix_losses,
    "tokenmix_block_masks": tokenmix_block_masks,
    "tokenmix_block_stats": tokenmix_block_stats,
    "tokenmix_random_mask": tokenmix_random_mask,
    "tokenmix_label": tokenmix_label,
    "transmix_official_": transmix_official,
    "transmix_openmixup_": transmix_openmixup,
    "decouple_ce_": decouple_ce,
    "decouple_ce_etaA_swapped": decouple_swapped,
    "decouple_ce_formula_": decouple_formula,
    "decouple_ce_head": decouple_head,
    "decouple_bce_head": decouple_bce,
    "transmix_labelsmooth_loss": transmix_loss,
}
