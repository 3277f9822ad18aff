"""Checks of the learned mixers and of their training steps against reference outputs."""

import json
from collections import OrderedDict
from types import SimpleNamespace

import torch
from torch import nn
from torch.testing import assert_close

from hf_mixup.core.losses import CrossEntropy, Decoupled, DecoupledBCE
from hf_mixup.core.plan import Dense, MixPlan, Share, blend, onehot
from hf_mixup.method import Method
from hf_mixup.mixers.adaptive_mask import AdaptiveMask, from_official
from hf_mixup.mixers.masks import mask_loss, rescale_lam
from hf_mixup.mixers.mixblock import MixBlock, from_openmixup, renamed
from hf_mixup.policies import Mixup, MultiMixup
from hf_mixup.steps.learned.adautomix import AdversarialMixing
from hf_mixup.steps.learned.automix import LearnedMixing
from hf_mixup.steps.learned.mixing import Drawn


def close(actual, expected):
    # float32 sums: the error of an element goes with the largest one
    assert_close(actual, expected.to(actual), atol=1e-5 * max(1.0, float(expected.abs().max())), rtol=0)


def part(case, prefix):
    return {key.removeprefix(prefix): value for key, value in case.items() if key.startswith(prefix)}


def norm_of(cfg):
    return {"none": "none", "BN": "bn", "LN2d": "ln"}[(cfg or {"type": "none"})["type"]]


def mixblock_arguments(cfg):
    """OpenMixup's arguments of a PixelMixBlock as ours."""
    lam_input = "none"
    if cfg.get("lam_concat"):
        lam_input = "concat"
    elif cfg.get("lam_concat_v"):
        lam_input = "concat_v"
    elif cfg.get("lam_mul"):
        lam_input = "multiply_residual" if cfg.get("lam_residual") else "multiply"
    neck = cfg.get("value_neck_cfg")
    return {
        "channels": cfg["in_channels"],
        "reduction": cfg["reduction"],
        "lam_input": lam_input,
        "lam_mul_k": cfg.get("lam_mul_k", -1),
        "value_neck": neck is not None,
        "value_norm": norm_of(neck and neck["norm_cfg"]) if neck else "bn",
        "value_dropout": float(neck["with_last_dropout"]) if neck else 0.0,
        "x_qk_concat": cfg.get("x_qk_concat", False),
        "x_v_concat": cfg.get("x_v_concat", False),
        "attention_norm": norm_of(cfg.get("att_norm_cfg")),
        "upsampling": cfg["unsampling_mode"],
    }


def mixblock(case):
    cfg = json.loads(str(case["cfg"]))
    block = MixBlock(**mixblock_arguments(cfg))
    block.load_state_dict(from_openmixup(part(case, "sd.")), strict=True)
    block.train(bool(case["training"]))
    x, partner, img = case["x"], case["index"].long(), case["img"]
    lam = case["lam"].double().expand(len(x))

    index, weight = torch.stack([torch.arange(len(x)), partner], 1), torch.stack([lam, 1 - lam], 1)
    mask = block(x, index, weight, tuple(img.shape[2:]))
    close(mask, case["mask"])
    for name, value in from_openmixup(part(case, "sd_after.")).items():
        close(block.state_dict()[name], value)
    plan = MixPlan.pair(partner, Dense(mask), lam)
    mixed = blend(plan, img)
    close(mixed, case["mixed"])
    shape_loss = mask_loss(mask, lam, cfg["mask_loss_mode"], cfg["mask_loss_margin"])
    close(shape_loss, case["mask_loss"])
    parameters = dict(block.named_parameters())
    for total, prefix in (((mixed * case["R"]).sum(), "grad_mixR."), (shape_loss, "grad_maskloss.")):
        grads = torch.autograd.grad(total, list(parameters.values()), retain_graph=True, allow_unused=True)
        expected = from_openmixup(part(case, prefix))
        for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
            close(torch.zeros_like(parameter) if grad is None else grad, expected[name])

    block.load_state_dict(from_openmixup(part(case, "sd.")))
    attention, value = block.attend(x, partner, lam, block.lam_mul_ks[0])
    close(attention, case["attn"])
    close(value[:, 0], case["value"])


def adaptive_mask(case):
    arrays = from_official(part(case, "sd."))
    lam_concat, norm = case["sd.conv_v.weight"].shape[1] == 17, "bn" if "query.norm.weight" in arrays else "none"
    # the names of the files tell the modes apart: nearest for ada_lamcat alone
    mode = "nearest" if lam_concat and norm == "none" else "bilinear"
    mixer = AdaptiveMask(16, lam_concat=lam_concat, attention_norm=norm, upsampling=mode)
    mixer.load_state_dict(arrays, strict=True)
    mixer.eval()
    x, partner = case["x"], case["index"].long()
    pair, lam = torch.stack([torch.arange(len(x)), partner], 1), case["lam2"].double().expand(len(x))
    lam = torch.stack([lam, 1 - lam], 1)
    close(mixer(x, pair, lam, (32, 32)), case["mask2"])
    close(mixer.attend(x, pair, lam)[0][0], case["attn2"])
    close(mixer(x, case["i3"].long().T, case["lam3"].expand(len(x), -1), (32, 32)), case["mask3"])


def maskloss(case):
    for key in part(case, "loss|"):
        kind, margin, lam = key.split("|")
        mask = case["mask"].clone().requires_grad_()
        loss = mask_loss(mask, torch.full((len(mask),), float(lam[3:])), kind, float(margin[1:]))
        close(loss, case[f"loss|{key}"])
        close(torch.autograd.grad(loss, mask)[0], case[f"grad|{key}"])
    for k, expected in part(case, "rescale|k").items():
        close(rescale_lam(case["lams"].double(), float(k)), expected)


def mixlosses(case):
    onehots = {name: torch.nn.functional.one_hot(case[name].long(), 7).float() for name in ("ya", "yb", "yc")}
    for key in part(case, "loss|"):
        tag, _, lam = key.partition("|lam")
        shares = [float(part) for part in lam.split(",")] if lam else [1.0]
        if len(shares) == 1:
            shares.append(1 - shares[0])
        targets = sum(share * onehot for share, onehot in zip(shares, onehots.values(), strict=False))
        logits = case["logits"].clone().requires_grad_()
        if tag.startswith("BCE_neg"):
            loss = DecoupledBCE(negative_weight=float(tag.removeprefix("BCE_neg")), reduction="sum")
        elif tag.startswith("decoupleCE_eta"):
            loss = Decoupled(eta=float(tag.removeprefix("decoupleCE_eta").removesuffix("_both")))
        else:
            loss = CrossEntropy(smoothing=0.1 if tag in ("labelsmooth0.1", "onehotLS") else 0.0)
        losses = loss(logits, targets)
        close(losses.mean(), case[f"loss|{key}"])
        close(torch.autograd.grad(losses.mean(), logits)[0], case[f"grad|{key}"])


# -- whole steps -------------------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """The network of the reference's steps, named as a network whose stages are known."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(model_type="cifar_resnet", num_labels=10, num_channels=3)
        self.stages = nn.ModuleList(
            nn.Sequential(OrderedDict(conv=nn.Conv2d(*channels, bias=False), bn=nn.BatchNorm2d(channels[1]), act=nn.ReLU()))
            for channels in ((3, 16, 3, 4, 1), (16, 24, 3, 2, 1))
        )
        self.classifier = nn.Linear(24, 10)

    def forward(self, pixel_values):
        for stage in self.stages:
            pixel_values = stage(pixel_values)
        return SimpleNamespace(logits=self.classifier(pixel_values.mean((2, 3))))


TOY_NAMES = (
    (r"^mix_block\.", "states.m.mixer."),
    (r"^backbone_q\.(conv|bn)1\.", r"backbone.stages.0.\1."),
    (r"^backbone_q\.(conv|bn)2\.", r"backbone.stages.1.\1."),
    (r"^backbone_k\.(conv|bn)1\.", r"states.m.teacher.network.stages.0.\1."),
    (r"^backbone_k\.(conv|bn)2\.", r"states.m.teacher.network.stages.1.\1."),
    (r"^head_one_q\.fc\.", "backbone.classifier."),
    (r"^head_one_k\.fc\.", "states.m.teacher.network.classifier."),
    (r"^head_mix_q\.fc\.", "states.m.head."),
    (r"^head_mix_k\.fc\.", "states.m.teacher_head.network."),
)


def ours(arrays, table):
    """Arrays of the reference under our names; those of the mixer by its own table."""
    mixer = part(arrays, "mix_block.")
    rest = {renamed(name, TOY_NAMES): value for name, value in arrays.items() if not name.startswith("mix_block.")}
    return rest | {f"states.m.mixer.{name}": value for name, value in table(mixer).items()}


def toy_model(case, method, table):
    model = nn.Module()
    model.backbone = Toy()
    model.states = nn.ModuleDict({"m": method.step.build(method, model.backbone)})
    model.load_state_dict(ours(part(case, "sd."), table), strict=True)
    return model.train()


def check_trained(case, model, loss, method, table):
    """The loss, gradients, statistics and, after one step of SGD, the teacher."""
    close(loss, case["loss"])
    loss.backward()
    expected = ours(part(case, "grad."), table)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            close(parameter.grad, expected.pop(name))
        else:
            assert parameter.grad is None
    assert not expected
    buffers = dict(model.named_buffers())
    for name, value in ours(part(case, "buf_after_fwd."), table).items():
        close(buffers[name], value)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    method.step.after_optimizer_step(model.states["m"], model.backbone, 0, 100)
    parameters = dict(model.named_parameters())
    for name, value in ours(part(case, "ema_after."), table).items():
        close(parameters[name], value)


def mixup_plan(partner, lam):
    lam = lam.double().expand(len(partner))
    return MixPlan.pair(partner.long(), Share(torch.stack([lam, 1 - lam], 1).float()), lam)


def learned_step(case):
    cfg = json.loads(str(case["cfg"]))
    block = mixblock_arguments(cfg["mix_block"])
    del block["channels"]
    block["lam_mul_k"], block["upsampling"] = float(block["lam_mul_k"]), block["upsampling"][0]
    step = LearnedMixing(
        **block,
        mask_loss=cfg["mask_loss"],
        mask_loss_mode=cfg["mix_block"]["mask_loss_mode"],
        mask_loss_margin=cfg["mix_block"]["mask_loss_margin"],
        mask_adjust=float(cfg["mask_adjust"]),
        as_published=True,  # the reference's mistake: the wrong one of the two lam
        lam_margin=cfg["lam_margin"],
        momentum=cfg["momentum"],
        momentum_warmup=False,
    )
    method = Method("m", Mixup(alpha=cfg["alpha"], mode="batch"), step=step)
    model = toy_model(case, method, from_openmixup)
    images, targets = case["img"], onehot(case["y"].long(), 10)
    lam_mixer, lam_student = case["lam"].double()
    plans = mixup_plan(case["perms"][0], lam_student), mixup_plan(case["perms"][1], lam_mixer)
    settings = (step.upsampling, step.lam_mul_k)
    drawn = Drawn(plans, (settings, settings), adjust_to=1 if step.mask_adjust == 1 else None, mask_weight=cfg["mask_loss"])
    state = model.states["m"]

    seen = record_inputs(state.teacher.network, model.backbone)
    output = step.step(method, state, model.backbone, images, targets, state.before(images, targets), drawn)
    close(seen[0][1], case["rec.img_mix_mb"])
    close(seen[1][1], case["rec.img_mix_bb"])
    close(method.loss(output.logits, output.targets).mean(), case["rec.loss_mix_q"])
    check_trained(case, model, output.loss, method, from_openmixup)


def adversarial_step(case):
    cfg = json.loads(str(case["cfg"]))
    block, count = cfg["mix_block"], cfg["mix_samples"]
    step = AdversarialMixing(
        reduction=block["reduction"],
        lam_concat=block["lam_concat"],
        upsampling=block["unsampling_mode"],
        beta=cfg["beta_radio"],
        mixup_ratio=cfg.get("mixup_radio", 0.5),
        # the reference's mistake for three images: it compares the wrong way round, and so leaves every mask out
        lam_margin=cfg["lam_margin"] if count == 2 else 1.0,
        momentum=cfg["momentum"],
        momentum_warmup=False,
    )
    method = Method("m", MultiMixup(mix_samples=count, mode="batch"), step=step)
    model = toy_model(case, method, from_official)
    images, targets = case["img"], onehot(case["y"].long(), 10)
    perms, lam, batch = case["perms"].long(), case["lam"].double(), len(case["img"])
    if count == 2:
        plans = mixup_plan(perms[0], lam[1]), mixup_plan(perms[1], lam[0])
    else:
        share = (lam / lam.sum()).float().expand(batch, -1)
        plans = [MixPlan(perms[slots].T, Share(share), share) for slots in ([3, 4, 5], [1, 0, 2])]
    state = model.states["m"]

    seen = record_inputs(state.teacher.network, model.backbone)
    adversarial = not adds_up(case)
    drawn = Drawn(plans, ((step.upsampling,), (step.upsampling,)), adversarial=adversarial)
    output = step.step(method, state, model.backbone, images, targets, state.before(images, targets), drawn)
    close(seen[0][1], case["rec.img_mix_mb"])
    close(seen[1][-1], case["rec.img_mix_bb"])
    close(method.loss(output.logits, output.targets).mean(), case["rec.loss_mix_q"])
    # the reference passes the clean images once more for each slot, for their logits
    replay_clean_passes(state.teacher.network, case, images, seen[0][1], count)
    check_trained(case, model, output.loss, method, from_official)


def replay_clean_passes(teacher, case, images, mixed, count):
    """The teacher's statistics as the reference's passes leave them: clean, mixed, and clean once more for each slot."""
    start = ours(part(case, "sd."), from_official)
    for name, buffer in teacher.named_buffers():
        buffer.data.copy_(start[f"states.m.teacher.network.{name}"])  # unseen by autograd
    with torch.no_grad():
        for batch in (images, mixed, *[images] * count):
            teacher(pixel_values=batch)


def adds_up(case):
    """Whether the step's loss is the plain sum: not an adversarial one."""
    return abs(float(case["loss"] - case["rec.loss_mix_k"] - case["rec.loss_one_q"] - case["rec.loss_mix_q"])) < 1e-4


def record_inputs(*networks):
    """What each network is given, pass by pass."""
    seen = [[] for _ in networks]
    for network, inputs in zip(networks, seen, strict=True):
        network.register_forward_pre_hook(
            lambda module, args, kwargs, inputs=inputs: inputs.append(kwargs["pixel_values"]), with_kwargs=True
        )
    return seen


CHECKS = {
    "mixblock": mixblock,
    "adaptivemask": adaptive_mask,
    "maskloss": maskloss,
    "mixlosses": mixlosses,
    "step_automix": learned_step,
    "step_samix": learned_step,
    "step_adautomix": adversarial_step,
}
