"""Checks of the methods that need evidence from a model, or a training step of their own, against reference outputs."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.testing import assert_close

from hf_mixup.geometry import centred_boxes
from hf_mixup.losses import BCE, CrossEntropy
from hf_mixup.plan import MixPlan, Share, blend, mix_targets, onehot
from hf_mixup.policies.attentivemix import attentive_plan
from hf_mixup.policies.recursivepaste import recursive_plan
from hf_mixup.signals.features import Tap
from hf_mixup.signals.saliency import clean_gradient, input_saliency, saliency_of
from hf_mixup.steps.alignmix import aligned_mix, transport
from hf_mixup.steps.manifoldmix import mixed_output
from hf_mixup.steps.recursivemix import region_loss, roi_features


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
    tap = Tap(stage.train(), mixed_output)
    tap.arm(plan.index[:, 1], plan.mask.value[:, 0])
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


CHECKS = {
    "recursivemix": recursivemix,
    "recursivemix_roialign": recursivemix_roialign,
    "alignmix": alignmix,
    "manifoldmix": manifoldmix,
    "attentivemix": attentivemix,
    "puzzlemix_saliency": puzzlemix_saliency,
}
