"""Checks against reference outputs: methods that need saliency, features or attention, or have their own training step."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.testing import assert_close

import tiny
from hf_mixup.core.geometry import centred_boxes
from hf_mixup.core.losses import BCE, CrossEntropy
from hf_mixup.core.plan import Dense, MixPlan, Share, blend, mix_targets, onehot
from hf_mixup.networks.passes import changing
from hf_mixup.networks.signals.features import class_activation
from hf_mixup.networks.signals.saliency import clean_gradient, input_saliency, saliency_of
from hf_mixup.policies.attentivemix import attentive_plan
from hf_mixup.policies.guidedmixup import blurred, distances, greedy_circle, guided_plan, normalised, spectral_residual
from hf_mixup.policies.recursivepaste import recursive_plan
from hf_mixup.policies.snapmix import semantic_maps, snap_plan
from hf_mixup.steps.alignmix import aligned_mix, transport
from hf_mixup.steps.manifoldmix import mixed_output
from hf_mixup.steps.recursivemix import region_loss, roi_features
from hf_mixup.steps.supermix import masks, search, smoothed


class Classifier(nn.Module):
    """A sequence of layers that answers as a Hugging Face classifier does."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.layers(pixel_values))


def puzzlemix_saliency(case):
    network = Classifier(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )
    network.layers.load_state_dict({key.replace("_", "."): value for key, value in case.items() if key[0] in "026" and key[1] == "_"})
    batch, targets = len(case["y"]), onehot(case["y"], 10)
    # of the mean over the batch there, of the sum here
    assert_close(input_saliency(network, case["x"], targets) / batch, case["sal_clean0"], rtol=1e-4, atol=1e-9)
    gradient, loss = clean_gradient(network, case["x"], targets)
    assert_close(loss.detach().double(), case["loss_clean0"].reshape(()), rtol=1e-5, atol=0)
    assert_close(saliency_of(gradient) / batch * 2 / 10, case["sal_clean1"], rtol=1e-4, atol=1e-9)
    (2 * 1.0 / 10 * loss).backward()
    assert_close(network.layers[6].weight.grad, case["grad_fc_w_clean1"], rtol=1e-4, atol=1e-7)


def attentivemix(case):
    features, size = case["features"], tuple(case["x"].shape[2:])
    cells = features[0, 0].numel()
    count = int(case["top_k"]) if case["top_k"] > 0 else max(1, min(cells, int(cells * float(case["lam"]))))
    plan = attentive_plan(features, case["perm"].long(), torch.full((len(features),), count), size)
    assert torch.equal(plan.dense_mask(size)[:, :1], case["mask"])
    assert_close(plan.weight[:, 0], case["lam_per_sample"], atol=1e-6, rtol=0)
    assert torch.equal(blend(plan, case["x"]), case["out"])


def manifoldmix(case):
    batch = len(case["h"])
    lam = case["lam"].double().expand(batch)
    plan = MixPlan.pair(case["perm"].long(), Share(torch.stack([lam, 1 - lam], 1).float()), lam)
    stage = nn.Conv2d(case["h"].shape[1], case["h"].shape[1], 1)
    nn.init.dirac_(stage.weight)
    nn.init.zeros_(stage.bias)
    with changing(stage.train(), lambda output: mixed_output(output, plan.index[:, 1], plan.mask.value[:, 0])):
        assert_close(stage(case["h"]), case["out"], atol=1e-5, rtol=0)
    targets = mix_targets(plan, onehot(case["y"].long(), 10))
    assert_close(targets, case["target"], atol=1e-6, rtol=0)
    assert_close(CrossEntropy()(case["logits"], targets).mean(), case["loss_ce"], atol=1e-5, rtol=0)
    # BCE of probabilities, the authors' loss, is BCE of their log odds
    p = case["logits"].double().softmax(-1)
    loss = BCE()((p.log() - (1 - p).log()).float(), targets).mean()
    assert_close(loss, case["loss_bce_softmax_official"], atol=1e-5, rtol=0)


def alignmix(case):
    own, other, eps = case["feat1"], case["feat2"], float(case["eps"])
    used = int(case["n_iter_used"])
    plan = transport(own, other, eps, used)
    assert_close(plan, case["plan"], atol=1e-6, rtol=1e-3)
    assert_close(plan.shape[1] * plan, case["assign"], atol=1e-4, rtol=0)
    # the stop of the reference comes at the same iteration
    assert torch.equal(transport(own, other, eps, int(case["max_iter"]), tol=0.1), plan)
    assert used == 1 or not torch.equal(transport(own, other, eps, used - 1), plan)
    lam = case["lam"].float().expand(len(own))
    assert_close(aligned_mix(own, other, plan, lam, own_places=True), case["mixed_dir0"], atol=1e-4, rtol=0)
    assert_close(aligned_mix(own, other, plan, lam, own_places=False), case["mixed_dir1"], atol=1e-4, rtol=0)


def recursivemix(case):
    images, old, size = case["x"], case["old_x"], tuple(case["x"].shape[2:])
    batch = len(images)
    edges = centred_boxes(case["r"].double().sqrt().reshape(1), case["c_y"].long().reshape(1), case["c_x"].long().reshape(1), size)
    plan = recursive_plan(images, old, torch.arange(batch), edges, str(case["interp"]))
    assert torch.equal(edges[0], case["boxes_x1y1x2y2"][0].long()[[1, 3, 0, 2]])
    assert_close(plan.weight[:, 0], case["lam"].float().expand(batch), atol=1e-6, rtol=0)
    assert_close(blend(plan, images), case["out"], atol=1e-5, rtol=0)
    own, other = plan.weight.unbind(1)
    targets = own[:, None] * case["y_onehot"] + other[:, None] * case["old_y"][:batch]
    assert_close(targets, case["target"], atol=1e-6, rtol=0)
    region = roi_features(case["feat"], edges[0].tolist(), size)
    assert_close(region, case["roi_feat"], atol=1e-5, rtol=0)
    logits = region @ case["w_fc"].T
    assert_close(logits, case["logits_roi"], atol=1e-5, rtol=0)
    whole, part = CrossEntropy()(case["logits"], targets).mean(), region_loss(logits, case["old_logits"][:batch])
    assert_close(whole, case["loss_cls"], atol=1e-5, rtol=0)
    assert_close(part.mean(), case["loss_roi"], atol=1e-5, rtol=0)
    assert_close(whole + case["omega"].float() * (other * part).mean(), case["loss_total"], atol=1e-5, rtol=0)


def recursivemix_roialign(case):
    scale, places = float(case["spatial_scale"]), case["feat"].shape[2:]
    size = tuple(round(side / scale) for side in places)
    for i, (row, x1, y1, x2, y2) in enumerate(case["boxes"].tolist()):
        features = roi_features(case["feat"][int(row)][None], [y1, y2, x1, x2], size)
        assert_close(features[0], case["out"][i], atol=1e-5, rtol=0)


def supermix_smooth(case):
    assert_close(smoothed(case["inp"], int(case["sigma"])), case["out"], atol=1e-6, rtol=1e-5)


def supermix_maskproc(case):
    side = int(case["size"])
    assert_close(masks(case["mask_logits"][:, :, 0], (side, side)), case["out"][:, :, 0], atol=1e-6, rtol=0)


def supermix_step(case):
    conv, fc = nn.Conv2d(3, 12, 5, 2, 2), nn.Linear(192, 10)
    for layer, name in ((conv, "conv"), (fc, "fc")):
        layer.load_state_dict({"weight": case[f"net_{name}_w"], "bias": case[f"net_{name}_b"]})

    def teacher(images):
        return 4 * fc(nn.functional.adaptive_avg_pool2d(conv(images).tanh(), 4).flatten(1))

    images, count = case["x"], int(case["K"])
    index = (torch.arange(len(images))[:, None] + torch.arange(count)) % len(images)
    found = search(
        teacher, images, index, case["dirichlet"], int(case["mask_w"]), float(case["lambda_s"]), int(case["sigma"]),
        int(case["iters_max"]), tol=0.7,
    )  # fmt: skip
    assert torch.equal(teacher(images).argmax(1), case["pred_labels"].long())
    assert_close(found.soft, case["soft_targets"], atol=1e-6, rtol=0)
    assert found.steps == int(case["iters_run"])
    wide = {"atol": 2e-4, "rtol": 2e-4}
    assert_close(found.mask_logits, case["mask_logits_final"][:, :, 0], atol=2e-4 * float(case["mask_logits_final"].abs().max()), rtol=2e-4)
    assert_close(found.mask, case["mask_final"][:, :, 0], **wide)
    mixed = blend(MixPlan(index, Dense(found.mask), case["dirichlet"]), images)
    assert_close(mixed, case["mixed"], **wide)
    assert_close(found.logits, case["pred_mixed"], atol=1e-3, rtol=1e-3)
    distinct = torch.tensor([len(set(row.tolist())) == count for row in case["pred_labels"][index]])
    assert torch.equal(found.success[distinct], case["success"][distinct])


def snapmix(case):
    images, size, labels = case["x"], tuple(case["x"].shape[2:]), onehot(case["y"].long(), 10)
    network = tiny.network("cifar_resnet")
    network.config.num_labels = 10
    network.classifier = nn.Linear(6, 10)
    network.classifier.load_state_dict({"weight": case["w_cls"], "bias": case["b_cls"]})
    with torch.no_grad():
        maps = semantic_maps(class_activation(network, case["feat"], labels), size)
    assert_close(maps, case["spm"], atol=1e-6, rtol=1e-4)
    into, taken = (case[f"box_{box}_r1c1r2c2"][[0, 2, 1, 3]].expand(len(images), 4) for box in ("dst", "src"))
    plan = snap_plan(images, case["perm"].long(), into, taken, maps, labels)
    assert_close(blend(plan, images), case["out"], atol=1e-5, rtol=0)
    assert_close(plan.weight, torch.stack([case["lam_a"], case["lam_b"]], 1), atol=1e-5, rtol=0)
    assert torch.equal(case["y"].long()[plan.index[:, 1]], case["y_b"].long())
    assert_close(CrossEntropy()(case["logits"], mix_targets(plan, labels)).mean(), case["loss"], atol=1e-5, rtol=1e-5)


def guidedmix(case):
    images = case["x"]
    raw = saliency_of(case["grad"]) if "grad" in case else spectral_residual(images, 7, 3.0)
    assert_close(raw, case["saliency_raw"], atol=1e-5, rtol=1e-4)
    if "saliency_norm" not in case:
        return
    saliency = normalised(raw, 7, 3.0)
    assert_close(saliency, case["saliency_norm"], atol=1e-7, rtol=1e-3)
    assert_close(distances(saliency) / saliency[0].numel(), case["dist"], atol=1e-6, rtol=1e-3)
    partner = greedy_circle(case["dist"])
    assert torch.equal(partner, case["pair"].long())
    plan = guided_plan(case["saliency_norm"], partner)
    assert_close(plan.dense_mask(tuple(images.shape[2:]))[:, 0], case["mask"], atol=1e-5, rtol=0)
    assert_close(plan.weight[:, 0], case["lam_a"], atol=1e-5, rtol=0)
    assert_close(blend(plan, images), case["out"], atol=1e-5, rtol=0)


def guidedmix_gaussblur(case):
    assert_close(blurred(case["inp"], len(case["kernel1d"]), 3.0), case["out"], atol=1e-6, rtol=0)


def guidedmix_pairing(case):
    assert torch.equal(greedy_circle(case["dist"]), case["pair"].long())
    assert torch.equal(greedy_circle(case["dist"]), case["pair_zeromask"].long())


CHECKS = {
    "guidedmix": guidedmix,
    "guidedmix_gaussblur": guidedmix_gaussblur,
    "guidedmix_pairing": guidedmix_pairing,
    "snapmix": snapmix,
    "supermix_smooth": supermix_smooth,
    "supermix_maskproc": supermix_maskproc,
    "supermix_step": supermix_step,
    "recursivemix": recursivemix,
    "recursivemix_roialign": recursivemix_roialign,
    "alignmix": alignmix,
    "manifoldmix": manifoldmix,
    "attentivemix": attentivemix,
    "puzzlemix_saliency": puzzlemix_saliency,
}
