"""Checks of the hand-crafted methods against reference outputs. A case is a dict of tensors, named as in the reference."""

import torch
from torch.testing import assert_close

from hf_mixup.core.geometry import box_plan, centred_boxes, dense_pair
from hf_mixup.core.losses import BCE, CrossEntropy, smooth
from hf_mixup.core.plan import Boxes, Dense, MixPlan, Share, blend, mix_targets, onehot
from hf_mixup.policies.fmix import brightest, published_field
from hf_mixup.policies.gridmix import holes
from hf_mixup.policies.resizemix import cut_boxes, moved_boxes, paste_resized
from hf_mixup.policies.saliencymix import blur8, bytes_of, fine_grained, gray8, peaks, published_saliency
from hf_mixup.policies.smoothmix import windows


def row(value, kind=torch.float64):
    """A reference's one draw for the batch, as our tensor of one draw."""
    return torch.as_tensor(value).to(kind).reshape(1)


def hard(case, own):
    """A plan of one mask (1, H, W) for all images, whose pixels must be the reference's to the bit."""
    partner = case["perm"].long()
    lam = own.double().mean().expand(len(partner))
    plan = MixPlan.pair(partner, dense_pair(own, torch.zeros_like(partner)), lam)
    assert torch.equal(blend(plan, case["x"]), case["out"])
    return plan


def mixup(case):
    batch = len(case["x"])
    lam = row(case["lam"]).expand(batch)
    plan = MixPlan.pair(case["perm"].long(), Share(torch.stack([lam, 1 - lam], 1).float()), lam)
    assert_close(blend(plan, case["x"]), case["out"], atol=1e-5, rtol=0)
    assert_close(case["y"].long()[plan.index], torch.stack([case["y_a"], case["y_b"]], 1).long())


def cutmix(case):
    size = tuple(case["x"].shape[2:])
    batch = len(case["x"])
    edges = centred_boxes((1 - row(case["lam"])).sqrt(), row(case["c_row"], torch.int64), row(case["c_col"], torch.int64), size)
    plan = box_plan(case["perm"].long(), edges.expand(batch, -1), size)
    if not case["mask_paste"].any():
        assert case["lam_adj"] == 1  # of an empty box the reference keeps no edges worth comparing
    else:
        assert torch.equal(edges[0], case["box_r1r2c1c2"].long())
    assert_close(plan.dense_mask(size)[0, 1], case["mask_paste"].float().reshape(size))
    assert_close(plan.weight[:, 0], case["lam_adj"].float().expand(batch), atol=1e-6, rtol=0)
    assert torch.equal(blend(plan, case["x"]), case["out"])
    assert_close(case["y"].long()[plan.index[:, 1]], case["y_b"].long())


def timm_switch(case):
    """timm switches between the two for every image: a box where it takes CutMix, a share where Mixup."""
    batch, _, *size = case["x"].shape
    per_image = {"batch": lambda v: v.expand(batch), "elem": lambda v: v, "pair": lambda v: torch.cat([v, v.flip(0)])}[str(case["mode"])]
    use_cutmix, lam = case["use_cutmix"].bool(), case["lam_drawn"].double()
    boxed = use_cutmix & (lam != 1)
    edges = torch.zeros(len(lam), 4, dtype=torch.int64)
    edges[boxed] = case["boxes_yl_yh_xl_xh"].long()
    boxes = Boxes(edges, tuple(size))
    share = torch.where(boxed, 1 - boxes.area(), lam)
    assert_close(share[boxed], case["box_lams"].double(), atol=1e-6, rtol=0)
    own = torch.where(boxed[:, None, None], (~boxes.inside(tuple(size))).float(), share.float()[:, None, None])
    draw = per_image(torch.arange(len(lam)))
    plan = MixPlan.pair(torch.arange(batch).flip(0), Dense(torch.stack([own, 1 - own], 1)[draw]), share[draw])
    assert_close(blend(plan, case["x"]), case["out"], atol=1e-5, rtol=0)
    # timm smooths every label before it mixes; we smooth the mixture
    target = smooth(mix_targets(plan, onehot(case["y"].long(), case["target"].shape[1])), float(case["label_smoothing"]))
    assert_close(target, case["target"], atol=1e-6, rtol=0)


def fmix(case):
    size = tuple(case["x"].shape[2:])
    field = published_field(case["noise"][:, :2].double(), size, float(case["decay_power"]))
    low, high = field.aminmax()
    assert_close(((field - low) / (high - low))[0].float(), case["gray"], atol=1e-5, rtol=0)
    own = brightest(field, row(case["lam"]), row(case["use_ceil"], torch.bool), float(case["max_soft"]))
    assert_close(own[0].float(), case["mask"], atol=1e-5, rtol=0)
    assert_close(own.double().mean(), case["mask_mean"].double(), atol=1e-6, rtol=0)
    partner = case["perm"].long()
    plan = MixPlan.pair(partner, dense_pair(own, torch.zeros_like(partner)), row(case["lam"]).expand(len(partner)))
    assert_close(blend(plan, case["x"]), case["out"], atol=1e-5, rtol=0)


def smoothmix(case):
    size = tuple(case["x"].shape[2:])
    sigma = row(case["sigma"]) / size[0]
    rows, cols = windows(row(case["u_h"], torch.int64), row(case["u_w"], torch.int64), sigma, size)
    window = (rows[:, :, None] * cols[:, None]).float()
    assert_close(window[0], case["kernel"], atol=1e-5, rtol=0)
    visible = (rows.mean(1) * cols.mean(1))[0]
    assert_close(visible, case["openmixup_lam"].double(), atol=1e-6, rtol=0)
    assert_close(1 - visible, case["correct_lam_a"].double(), atol=1e-6, rtol=0)
    partner = case["perm"].long()
    plan = MixPlan.pair(partner, dense_pair(1 - window, torch.zeros_like(partner)), 1 - visible.expand(len(partner)))
    assert_close(blend(plan, case["x"]), case["out"], atol=1e-5, rtol=0)


def gridmix(case):
    size = tuple(case["x"].shape[2:])

    def crossed(as_published):
        place = (row(case["u_y"]), row(case["u_x"]))
        draws = [row(case[name]) for name in ("cut_area_ratio", "cut_aspect")]
        n_holes = row(case["n_holes"], torch.int64)
        rows, cols = holes(row(case["lam"]), n_holes, float(case["hole_aspect"]), *draws, place, size, as_published)
        return rows[:, :, None] & cols[:, None]

    pasted = crossed(True)
    assert_close(pasted[0].float(), case["mask_paste"])
    plan = hard(case, ~pasted)
    assert_close(plan.weight[:, 0], case["lam_adj"].float().expand(len(plan.weight)), atol=1e-6, rtol=0)
    # where the cut is within the image, our default is the same
    width = int((size[0] * size[1] * case["cut_area_ratio"] // 1 / case["cut_aspect"]) ** 0.5)
    if width <= size[1] and int(width * case["cut_aspect"]) <= size[0]:
        assert torch.equal(crossed(False), pasted)


def resizemix_openmixup(case):
    batch, _, *size = case["x"].shape
    edges, step = cut_boxes(row(case["tau"]), row(case["c_y"], torch.int64), row(case["c_x"], torch.int64), tuple(size))
    interpolation = str(case["interp"])
    plan = paste_resized(case["x"], case["perm"].long(), edges.expand(batch, -1), step.expand(batch, -1), interpolation)
    same_pixels(plan, case, exact=interpolation == "nearest")


def resizemix_official(case):
    size = tuple(case["x"].shape[2:])
    tau = row(case["tau"]).expand(len(case["x"]))
    edges, step = moved_boxes(tau, case["c_row"].long(), case["c_col"].long(), size)
    assert torch.equal(edges, torch.stack([case[name].long() for name in ("r1", "r2", "c1", "c2")], 1))
    same_pixels(paste_resized(case["x"], case["perm"].long(), edges, step, "nearest"), case, exact=True)


def same_pixels(plan, case, exact):
    mixed = blend(plan, case["x"])
    assert torch.equal(mixed, case["out"]) if exact else torch.allclose(mixed, case["out"], atol=1e-5, rtol=0)
    assert_close(plan.weight[:, 0], case["lam_adj"].float().expand(len(mixed)), atol=1e-6, rtol=0)


def saliencymix(case):
    size = tuple(case["x"].shape[2:])
    pixels = case["img_u8"].permute(0, 3, 1, 2).float()
    # the images were normalised with these
    assert torch.equal(bytes_of(case["x"], (0.45,) * 3, (0.25,) * 3), pixels)
    saliency = fine_grained(blur8(gray8(pixels)))
    assert_close(saliency / 255, case["saliency_u8in"], atol=1e-5, rtol=0)
    assert torch.equal(torch.stack(peaks(saliency), 1), case["peak_u8in"].long())
    side = (1 - row(case["lam"])).sqrt()
    assert torch.equal(centred_boxes(side, *peaks(saliency), size), case["box_u8in_r1r2c1c2"].long())
    # the published box: one for all, from floats; their saliency is known up to rounding noise in the lowest bits
    ours, theirs = published_saliency(case["x"]).flatten(1).double(), case["saliency_f32in"].flatten(1).double()
    for image in range(len(ours)):
        assert torch.corrcoef(torch.stack([ours[image], theirs[image]]))[0, 1] > 0.9
    peak = peaks(case["saliency_f32in"])
    assert torch.equal(torch.stack(peak, 1), case["peak_f32in"].long())
    partner = case["perm"].long()
    edges = centred_boxes(side, peak[0][partner[:1]], peak[1][partner[:1]], size)
    plan = box_plan(partner, edges.expand(len(partner), -1), size)
    assert_close(plan.dense_mask(size)[0, 1], case["mask_openmixup"].float())
    assert_close(plan.weight[:, 0], case["lam_openmixup"].float().expand(len(partner)), atol=1e-6, rtol=0)
    assert torch.equal(blend(plan, case["x"]), case["out_openmixup"])


def hcloss(case):
    logits, own, partner = case["logits"], case["y_a"].long(), case["y_b"].long()
    batch, classes = logits.shape
    lam, lam_vec = row(case["lam"]).expand(batch), case["lam_vec"].double()

    def mixed(share):
        share = share.double()[:, None]
        return (share * onehot(own, classes) + (1 - share) * onehot(partner, classes)).float()

    def check(loss, targets, *names, logits=logits):
        rows = loss(logits, targets)
        assert rows.shape == (batch,)
        for name in names:
            assert_close(rows.mean(), case[name], atol=2e-5, rtol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
        return rows

    check(CrossEntropy(), mixed(lam), "two_hard_ce", "soft_ce")
    rows = check(CrossEntropy(), mixed(lam_vec), "persample_two_hard_ce", "persample_soft_ce")
    hard_rows = [torch.nn.functional.cross_entropy(logits, labels, reduction="none") for labels in (own, partner)]
    assert_close(rows.double(), lam_vec * hard_rows[0] + (1 - lam_vec) * hard_rows[1], atol=1e-5, rtol=1e-5)
    # OpenMixup averages the losses before it weighs them, which leaves of every lam its mean
    check(CrossEntropy(), mixed(lam_vec.mean().expand(batch)), "openmixup_persample_lam_loss")
    check(CrossEntropy(0.1), mixed(lam), "labelsmooth_original_two_hard")
    check(CrossEntropy(0.1 / 1.1), mixed(lam), "labelsmooth_classy_two_hard")
    check(BCE("sum"), mixed(lam), "openmixup_bce_sum_over_classes_div_N", "timm_bce_sum_classes")
    check(BCE(), mixed(lam), "timm_bce_mean")
    check(BCE(target_threshold=0.2), mixed(lam), "timm_bce_mean_thr0p2")
    # BCE of probabilities is BCE of their log odds
    p = logits.double().softmax(-1)
    check(BCE(), mixed(lam), "bce_of_softmax_manifold", logits=p.log() - (1 - p).log())
    flipped = MixPlan.pair(torch.arange(batch).flip(0), Share(torch.ones(batch, 2) / 2), lam)
    targets = mix_targets(flipped, onehot(own, classes))
    assert_close(smooth(targets, 0.1), case["timm_target_flip_ls0p1"], atol=1e-6, rtol=0)
    check(CrossEntropy(0.1), targets, "timm_soft_ce")


CHECKS = {
    "mixup": mixup,
    "cutmix": cutmix,
    "timm_switch": timm_switch,
    "fmix": fmix,
    "smoothmix": smoothmix,
    "gridmix": gridmix,
    "resizemix_openmixup": resizemix_openmixup,
    "resizemix_official": resizemix_official,
    "saliencymix": saliencymix,
    "hcloss": hcloss,
}
