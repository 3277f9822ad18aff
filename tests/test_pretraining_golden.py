"""Pre-training formulas on the inputs, weights and random draws of the reference implementations: one test for each file of
`golden/selfsup`. A file without a check fails."""

import itertools
from collections import OrderedDict
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch.testing import assert_close

from hf_mixup.core.geometry import box_plan, centred_boxes
from hf_mixup.core.losses import CrossEntropy
from hf_mixup.core.plan import Boxes, MixPlan, Share, blend, mix_targets
from hf_mixup.method import Method
from hf_mixup.mixers.masks import adjust_mask
from hf_mixup.mixers.mixblock import from_openmixup
from hf_mixup.networks.average import ema_momentum
from hf_mixup.networks.passes import Tap
from hf_mixup.networks.wrapping import as_classifier
from hf_mixup.policies import Mixup, Vanilla
from hf_mixup.pretraining.barlow import BarlowTwins
from hf_mixup.pretraining.byol import BYOL
from hf_mixup.pretraining.contrast import Mixture
from hf_mixup.pretraining.knn import knn_classes
from hf_mixup.pretraining.losses import Agreement, LogOfMean, Separate
from hf_mixup.pretraining.moco import MoCo
from hf_mixup.pretraining.mocov3 import MoCoV3
from hf_mixup.pretraining.policies import auxiliary, folded
from hf_mixup.pretraining.samix import SAMix
from hf_mixup.pretraining.simclr import SimCLR
from hf_mixup.pretraining.simsiam import SimSiam
from hf_mixup.pretraining.state import Batch, mlp

VALUE, GRADIENT = 5e-6, 2e-5  # stated with the files


def close(actual, expected, atol=VALUE):
    assert_close(actual, torch.as_tensor(expected).to(actual), atol=atol, rtol=1e-6)


def part(case, prefix):
    return {key.removeprefix(prefix): value for key, value in case.items() if key.startswith(prefix)}


class Tiny(nn.Module):
    """Two convolutions and the mean over pixels; a classifier that pre-training leaves alone."""

    def __init__(self, weights):
        super().__init__()
        self.c1, self.c2 = (nn.Conv2d(*weights[f"{name}.weight"].shape[1::-1], 3, 2, 1) for name in ("c1", "c2"))
        self.load_state_dict({name: weights[name] for name in ("c1.weight", "c1.bias", "c2.weight", "c2.bias")})
        self.classifier = nn.Linear(self.c2.out_channels, 2)

    def forward(self, pixel_values):
        return self.classifier(self.c2(self.c1(pixel_values).relu()).relu().mean((2, 3)))


def head_of(weights):
    """The projector or predictor whose weights these are: linear layers, batch norms, and ReLUs between them."""
    places = OrderedDict()
    for name, value in weights.items():
        places.setdefault(name.rpartition(".")[0], {})[name.rpartition(".")[2]] = value
    layers = []
    for tensors in places.values():
        if "running_mean" in tensors:
            layer = nn.BatchNorm1d(len(tensors["running_mean"]), affine="weight" in tensors)
            layers.append(layer)
        else:
            if layers:
                layers.append(nn.ReLU())
            layer = nn.Linear(*tensors["weight"].shape[::-1], bias="bias" in tensors)
            layers.append(layer)
        layer.load_state_dict(tensors)
    return nn.Sequential(*layers)


def named(module, names):
    """The parameters of a head, by the names of the case, in order."""
    return dict(zip(names, module.parameters(), strict=True))


class Case:
    """A step of a reference: network, state and method, with its weights."""

    def __init__(self, case, step, loss, query, head, key="", key_head="", predictor=""):
        self.case, self.step = case, step
        self.network = as_classifier(Tiny(part(case, f"before.{query}"))).train()
        method = Method("golden", Vanilla() if not step.mixed else Mixup(), loss=loss, step=step)
        self.parts, self.state = method.parts, method.step.build(method.parts, self.network).train()
        self.head, self.prefix = head, query
        self.state.projector = head_of(part(case, f"before.{head}"))
        if predictor:
            self.state.predictor = head_of(part(case, f"before.{predictor}"))
        if key:
            self.state.key.network.network.load_state_dict(
                {
                    **self.state.key.network.network.state_dict(),
                    **{n: v for n, v in part(case, f"before.{key}").items() if n.startswith("c")},
                }
            )
            self.state.key_projector.network = head_of(part(case, f"before.{key_head}")).requires_grad_(False)
            # the reference moves it before the step, with the weights of the last one
            self.state.follow(self.network, float(case["momentum"]))
        if "before.queue" in case:
            self.state.queue = case["before.queue"].T.contiguous()
            self.state.place = case["before.queue_ptr"].flatten()[0].clone()
        self.key, self.key_head = key, key_head

    def run(self, mixtures=None):
        views = [self.case["x1"], self.case["x2"]]
        out = self.step.step(self.parts, self.state, self.network, views, mixtures or {}, torch.Generator())
        out.loss.backward()
        return out

    def check(self, out):
        close(out.loss, self.case["loss"])
        backbone = self.network.network
        gradients = part(self.case, "grad.")
        # float32 sums: the error of an element goes with the largest one
        atol = GRADIENT * max([1.0, *(float(gradient.abs().max()) for gradient in gradients.values())])
        for name, gradient in gradients.items():
            if name.startswith(self.head):
                names = [n for n in part(self.case, f"before.{self.head}") if n.endswith(("weight", "bias"))]
                close(named(self.state.projector, names)[name.removeprefix(self.head)].grad, gradient, atol)
            elif name.startswith(self.prefix):
                close(backbone.get_parameter(name.removeprefix(self.prefix)).grad, gradient, atol)
        if self.key:
            assert all(p.grad is None for p in [*self.state.key.parameters(), *self.state.key_projector.parameters()])
            for name, value in part(self.case, f"after.{self.key}").items():
                if name.startswith("c"):
                    close(self.state.key.network.network.state_dict()[name], value)
            after = part(self.case, f"after.{self.key_head}")
            for mine, theirs in zip(self.state.key_projector.network.state_dict().values(), after.values(), strict=True):
                close(mine, theirs)
        if "after.queue" in self.case:
            self.state.remember(**out.memory)
            close(self.state.queue, self.case["after.queue"].T)
            assert int(self.state.place) == int(self.case["after.queue_ptr"])


def pair(case, suffix=""):
    """The mixture of a case, as a plan and its images."""
    rows = len(case["x1"])
    partner = case.get(f"partner{suffix}", torch.arange(rows).flip(0)).long()
    lam = case[f"lam{suffix}"].double().expand(rows)
    return Mixture(MixPlan.pair(partner, None, lam), Batch(case[f"mixed{suffix}"].float()))


# -- i-Mix ------------------------------------------------------------------------------------------------------------------


def imix_mixup(case):
    lam = folded(case["lam_drawn"].double())
    close(lam.float(), case["lam"].float())
    close(blend(MixPlan.pair(case["partner"].long(), None, lam), case["x"]), case["mixed"])


def imix_cutmix(case):
    lam = folded(case["lam_drawn"].double())
    close(lam.float(), case["lam_before_box"].float())
    top, left, bottom, right = case["box_r1c1r2c2"].tolist()
    rows, size = len(case["x"]), tuple(case["x"].shape[2:])
    edges = torch.tensor([[top, bottom, left, right]])
    plan = box_plan(case["partner"].long(), edges.expand(rows, -1), size)
    close(plan.weight[:, 0], case["lam"].float().expand(rows))
    close(blend(plan, case["x"]), case["mixed"])
    # the box is that of our own rule, around some centre
    made = [
        centred_boxes((1 - lam).sqrt().view(1), torch.tensor([r]), torch.tensor([c]), size) for r in range(size[0]) for c in range(size[1])
    ]
    assert any(torch.equal(box, edges) for box in made)


def imix_inputmix1(case):
    index = torch.stack([torch.arange(6), case["draw0_randperm"].long()], 1)
    close(blend(auxiliary(index, case["draw1_beta"].double().view(-1, 1)), case["x"]), case["mixed"])


def imix_inputmix2(case):
    index = torch.stack([torch.arange(6), case["draw0_randperm"].long(), case["draw1_randperm"].long()], 1)
    close(blend(auxiliary(index, case["dirichlet"].double()), case["x"]), case["mixed"])


def imix_npair(case):
    mixed = {"_1": 0, "_2": 1} if "mixed_1" in case else {"": 0} if "mixed" in case else {}
    step = SimCLR(
        clean=float(not mixed), mixed=float(bool(mixed)), both_ways="mixed_1" in case, within_view=False,
        temperature=float(case["temperature"]), projector=(8,),
    )  # fmt: skip
    run = Case(case, step, CrossEntropy(), "encoder_q.", "encoder_q.fc.")
    out = run.run({view: pair(case, suffix) for suffix, view in mixed.items()})
    run.check(out)
    close(out.logits, case["logits"][: len(out.logits)])


def imix_moco(case):
    step = MoCo(
        clean=float("mixed" not in case),
        mixed=float("mixed" in case),
        temperature=float(case["temperature"]),
        queue_size=18,
        projector=(8,),
    )
    run = Case(case, step, CrossEntropy(), "encoder_q.", "encoder_q.fc.", "encoder_k.", "encoder_k.fc.")
    out = run.run({0: pair(case)} if "mixed" in case else {})
    run.check(out)
    if "mixed" in case:
        close(out.logits, case["logits"])


def imix_byol(case):
    step = BYOL(clean=float("mixed" not in case), mixed=float("mixed" in case), both_ways=False, projector=(8,), predictor=(8,))
    run = Case(case, step, Agreement(), "encoder_q.", "encoder_q.fc.", "encoder_k.", "encoder_k.fc.", "pred.")
    out = run.run({0: pair(case)} if "mixed" in case else {})
    run.check(out)
    close(out.logits, case["logits"])


# -- Un-Mix, MixCo ----------------------------------------------------------------------------------------------------------


def unmix_images(case):
    rows = len(case["x"])
    partner = torch.arange(rows).flip(0)
    if "draw1_npbeta" in case and float(case["draw0_nprand"].flatten()[0]) < 0.5:
        lam = case["draw1_npbeta"].double().expand(rows)
        close(lam.float(), case["lam"].float().expand(rows))
        plan = MixPlan.pair(partner, None, lam)
    else:
        changed = (case["x"] != case["mixed"]).any(1).any(0)
        edges = [(axis.nonzero().min(), axis.nonzero().max() + 1) for axis in (changed.any(1), changed.any(0))]
        plan = box_plan(partner, torch.tensor([[*edges[0], *edges[1]]]).expand(rows, -1), tuple(case["x"].shape[2:]))
        close(plan.weight[:, 0], case["lam"].float().expand(rows))
    mixed = blend(plan, case["x"])
    close(mixed, case["mixed"])
    close(mixed.flip(0), case["mixed_flip"])


def unmix_moco(case, symmetric):
    both = {"both_ways": True, "positives": "both"} if symmetric else {}
    step = MoCo(temperature=float(case["temperature"]), queue_size=24, projector=(8,), **both)
    run = Case(case, step, Separate(), "encoder_q.", "encoder_q.fc.", "encoder_k.", "encoder_k.fc.")
    run.check(run.run({0: pair(case)}))


def mixco(case, step, *where):
    run = Case(case, step, CrossEntropy(), *where)
    lam = torch.cat([case["lam"], 1 - case["lam"]])
    mixtures = {}
    for view in step.mixed_views:
        images, half = case[f"x{view + 1}"], len(case["lam"])
        plan = MixPlan.pair(torch.arange(2 * half).roll(half), None, lam)
        plan = MixPlan(plan.index[:half], Share(plan.mask.value[:half]), plan.weight[:half], (images[:half], images[half:]))
        mixtures[view] = Mixture(plan, Batch(blend(plan, images[:half])))
    out = run.run(mixtures)
    run.check(out)
    if "logits_mix" in case:
        close(out.logits, case["logits_mix"], atol=2e-5)  # divided by a temperature of 0.05
        close(out.targets, case["targets_mix"])


def mixco_moco(case):
    settings = {"temperature": float(case["temperature"]), "mix_temperature": float(case["mix_temperature"])}
    step = MoCo(**settings, mixed=float(case["mix_weight"]), queue_size=24, projector=(8,), halved=True, one_pass=True)
    mixco(case, step, "encoder_q.", "encoder_q.fc.", "encoder_k.", "encoder_k.fc.")


def mixco_simclr(case):
    step = SimCLR(temperature=float(case["temperature"]), projector=(8,), halved=True, mixed_within_view=False)
    mixco(case, step, "encoder.", "encoder.fc.")


# -- the other bases --------------------------------------------------------------------------------------------------------


def mixed_barlow_twins(case):
    scale = float(case["mix_scale"])
    run = Case(case, BarlowTwins(float(case["lambda_bt"]), scale, (8,)), CrossEntropy(), "", "fc.")
    plan = MixPlan.pair(case["draw0_randperm"].long(), None, case["draw1_npbeta"].double().expand(6))
    out = run.step.step(run.state, run.network, case["x1"], case["x2"], plan)
    out.loss.backward()
    run.check(out)
    alone = BarlowTwins(float(case["lambda_bt"]), 0.0, (8,)).step(run.state, run.network, case["x1"], case["x2"], plan)
    close(alone.loss, case["loss_bt"])


def momentum_schedules(case):
    total, scope = int(case["total"]), float(case["openmixup_scope"])
    made = [ema_momentum(int(step), total, float(case["base"]), 1.0, scope, False) for step in case["iters"]]
    close(torch.tensor(made, dtype=torch.float64), case["openmixup_momentum"].double())
    # with the fractional epoch for a step: 1000 steps an epoch
    steps = [round(float(epoch) * 1000) for epoch in case["epochs"]]
    made = [ema_momentum(step, 1000 * int(case["total_epochs"]), 0.99, 1.0, 0.0, False) for step in steps]
    close(torch.tensor(made, dtype=torch.float64), case["mocov3_momentum"].double())


def knn_monitor(case):
    neighbours, temperature = int(case["k"]), float(case["temperature"])
    found = knn_classes(case["bank"], case["bank_labels"].long(), case["query"], int(case["num_classes"]), neighbours, temperature)
    assert torch.equal(found, case["ranked_classes"][:, 0].long())


def om_contrastive_head(case):
    scores = torch.cat([case["pos"], case["neg"]], 1)
    first = torch.zeros_like(scores)
    first[:, 0] = 1
    for temperature, loss in zip(case["temperatures"], case["losses"], strict=True):
        for kind in (CrossEntropy(), Separate()):
            close(kind(scores / temperature.float(), first).mean(), loss)


def om_samix_pbce(case):
    scores = torch.cat([case["l_own"], case["l_partner"]], 1) / float(case["temperature"])
    lam = float(case["lam"])
    targets = torch.tensor([[lam, 1 - lam]]).expand(len(scores), -1)
    close(CrossEntropy()(scores, targets).mean(), case["loss"])


def om_latent_predict(case):
    predictor = head_of(part(case, "before.predictor.")).train()
    one, two = case["z1"].clone().requires_grad_(), case["z2"].clone().requires_grad_()
    eye = torch.eye(6)
    loss = Agreement(2.0, 0.0)
    ways = [loss(nn.functional.normalize(predictor(a)) @ nn.functional.normalize(b).T, eye).mean() for a, b in ((one, two), (two, one))]
    close(ways[0], case["loss_12"])
    close(ways[1], case["loss_21"])
    close(sum(ways), case["byol_loss"])
    close(SimSiam().direction_weight * sum(ways), case["simsiam_loss"])
    sum(ways).backward()
    close(one.grad, case["grad_z1"], GRADIENT)
    close(two.grad, case["grad_z2"], GRADIENT)


def om_mocov3_head(case):
    predictor = head_of(part(case, "before.predictor.")).train()
    step = MoCoV3(temperature=float(case["temperature"]), projector=(8,), predictor=(8,))
    query = case["q"].clone().requires_grad_()
    scores = nn.functional.normalize(predictor(query)) @ nn.functional.normalize(case["k"]).T / step.temperature
    loss = step.factor * CrossEntropy()(scores, torch.eye(6)).mean()
    close(loss, case["loss"])
    loss.backward()
    close(query.grad, case["grad_q"], GRADIENT)
    widths = [tensor.shape for name, tensor in part(case, "before.predictor.").items() if name in ("fc0.weight", "fc1.weight")]
    made = mlp(8, (12, 8), "all_plain")
    assert [tuple(layer.weight.shape) for layer in made if isinstance(layer, nn.Linear)] == [tuple(shape) for shape in widths]


def om_simclr(case):
    step = SimCLR(mixed=0.0, temperature=float(case["temperature"]), projector=(8,))
    run = Case(case, step, CrossEntropy(), "backbone.", "neck.mlp.")
    run.check(run.run())


def om_moco_v2(case):
    step = MoCo(mixed=0.0, temperature=float(case["temperature"]), queue_size=12, projector=(8,))
    run = Case(case, step, CrossEntropy(), "encoder_q.0.", "encoder_q.1.mlp.", "encoder_k.0.", "encoder_k.1.mlp.")
    run.check(run.run())


def om_mocomix(case):
    step = MoCo(temperature=float(case["temperature"]), queue_size=12, projector=(8,), positives="same")
    run = Case(case, step, Separate(), "encoder_q.", "neck_q.mlp.", "encoder_k.", "neck_k.mlp.")
    run.check(run.run({0: pair(case)}))


def sdmp_mix_loss(case):
    query = case["q"].clone().requires_grad_()
    scores = nn.functional.normalize(query) @ nn.functional.normalize(case["k"]).T / float(case["temperature"])
    rows = len(scores)
    plan = MixPlan.pair(torch.arange(rows).flip(0), Boxes(torch.zeros(rows, 4, dtype=torch.int64), (1, 1)), case["lam_own"])
    plan = plan.reweighted(torch.stack([case["lam_own"], case["lam_reversed"]], 1).float())
    factor = 2 * float(case["temperature"])
    loss = factor * LogOfMean()(scores, mix_targets(plan, torch.arange(rows), rows)).mean()
    close(loss, case["loss"])
    loss.backward()
    close(query.grad, case["grad_q"], GRADIENT)
    close(factor * LogOfMean()(scores.detach(), torch.eye(rows)).mean(), case["loss_unmixed"])


class TwicePermuted(nn.Module):
    """The mixer as the reference calls it for its own branch: partners' features are permuted by the other branch's pairing first."""

    def __init__(self, mixer, first, masks):
        super().__init__()
        self.mixer, self.first, self.masks = mixer, first, masks

    def forward(self, features, index, weight, size, others):
        made = self.mixer(features, index, weight, size, others=others[self.first] if torch.is_grad_enabled() else others)
        self.masks.append(made.detach())
        return made


def samix_ssl(case):
    """The step, but for the reference's wrong pairing of features, and where it says so for its weight of the backbone's loss."""
    extended = "extension_mask" in case
    adjusts = not torch.equal(case["mask_bb"], case["mask_bb_before_adjust"])
    between = torch.zeros(6, 8)
    if extended:
        keys, wanted = (case["key_2"], case["key_1"]), case["mix_pos_q"]
        ways = case["extension_mask"].float(), case["extension_mask"].float() + 1  # interpolation, and extrapolation
        off = [(nn.functional.normalize(way * keys[0] + (1 - way) * keys[1]) - wanted).abs().max() for way in ways]
        between = ways[int(off[1] < off[0])]
        close(nn.functional.normalize(between * keys[0] + (1 - between) * keys[1]), wanted)
    # the reference's weight of the mixer's loss acts on the backbone's too
    for kind, weight in itertools.product(("infonce", "pair"), (1.0, 2.0)):
        step = SAMix(
            temperature=float(case["temperature"]), queue_size=12, projector=(8,), mixer_loss=kind, extra=0.5 * extended,
            mask_margin=0.1 if adjusts else 1.0, stage=0, mixed=weight, mixer_weight=weight,
        )  # fmt: skip
        with patch_stages():
            run = Case(case, step, Separate(), "encoder_q.", "neck_q.mlp.", "encoder_k.", "neck_k.mlp.")
        state, masks = run.state, []
        state.mixer.load_state_dict(from_openmixup(part(case, "before.mix_block.")))
        mixer = state.mixer
        first = case["idx_shuffle_bb"].long()
        state.mixer = TwicePermuted(mixer, first, masks)
        plans = [MixPlan.pair(case[f"idx_shuffle_{name}"].long(), None, case[f"lam_{name}"].double().expand(6)) for name in ("bb", "mb")]
        out = step.learned(run.parts, state, run.network, [case["x1"], case["x2"]], plans, between)
        close(out.plan.mask.value[:, 0], case["mask_bb"][:, 0])
        close(masks[0][:, 0], case["mask_bb_before_adjust"][:, 0])
        close(masks[1][:, 0], case["mask_mb"][:, 0])
        close(blend(out.plan, case["x1"]), case["im_mixed_bb"])
        close(out.memory["keys"], case["key_2"])
        if abs(float(out.loss.detach() - case["loss"])) < 1e-4:
            break
    close(weight * out.losses.mean(), case["loss_bb"])
    out.loss.backward()
    run.check(out)
    for name, gradient in from_openmixup(part(case, "grad.mix_block.")).items():
        close(mixer.get_parameter(name).grad, gradient, GRADIENT)


def patch_stages():
    """The mixer's feature is what the first convolution and its ReLU give; the tiny network has no stages with names."""

    class FirstMap:
        def __init__(self, network, names):
            self.module = network.network.c1

        def taps(self, size):
            return [Tap(self.module, lambda args, output: output.relu())]

    return patch.multiple("hf_mixup.pretraining.samix", Stages=FirstMap, choose_stage=lambda network, stage: ("c1", 6))


def samix_mask_adjust_auto(case):
    """As in SAMix's step: masks whose area is off lam by more than the margin are brought to it."""
    mask, lam = case["mask"], case["lam"].float().expand(6)
    far = (mask[:, 0].mean((1, 2)) - lam).abs() > float(case["mean_margin"])
    close(torch.where(far[:, None, None, None], adjust_mask(mask, lam), mask), case["adjusted"])


def samix_pre_one_infonce(case):
    rows = nn.functional.normalize(case["z"], dim=2)
    scores = torch.cat([rows[:, 0], rows[:, 1]]) @ torch.cat([rows[:, 0], rows[:, 1]]).T / float(case["temperature"])
    close(CrossEntropy()(scores.fill_diagonal_(-1e9), torch.eye(12).roll(6, 1)).mean(), case["loss"])


CHECKS = {
    "samix_ssl": samix_ssl,
    "samix_mask_adjust_auto": samix_mask_adjust_auto,
    "samix_pre_one_infonce": samix_pre_one_infonce,
    "imix_mixup": imix_mixup,
    "imix_cutmix": imix_cutmix,
    "imix_inputmix1": imix_inputmix1,
    "imix_inputmix2": imix_inputmix2,
    "imix_npair": imix_npair,
    "imix_moco": imix_moco,
    "imix_byol": imix_byol,
    "unmix_images": unmix_images,
    "unmix_moco_asym": lambda case: unmix_moco(case, False),
    "unmix_moco_sym": lambda case: unmix_moco(case, True),
    "mixco_moco": mixco_moco,
    "mixco_simclr": mixco_simclr,
    "knn_monitor": knn_monitor,
    "mixed_barlow_twins": mixed_barlow_twins,
    "momentum_schedules": momentum_schedules,
    "om_contrastive_head": om_contrastive_head,
    "om_samix_pbce": om_samix_pbce,
    "om_latent_predict": om_latent_predict,
    "om_mocov3_head": om_mocov3_head,
    "om_simclr": om_simclr,
    "om_moco_v2": om_moco_v2,
    "om_mocomix": om_mocomix,
    "sdmp_mix_loss": sdmp_mix_loss,
}


def pytest_generate_tests(metafunc):
    if "file" in metafunc.fixturenames:
        folder = metafunc.config.getoption("--golden-dir") / "selfsup"
        metafunc.parametrize("file", sorted(folder.glob("*.npz")), ids=lambda file: file.stem)


def test_golden(file):
    names = [name for name in CHECKS if file.stem.startswith(name)]
    assert names, f"no check knows {file.name}"
    with np.load(file, allow_pickle=False) as arrays:
        case = {key: torch.from_numpy(arrays[key]) if arrays[key].dtype.kind in "biuf" else arrays[key] for key in arrays.files}
    CHECKS[max(names, key=len)](case)
