"""Checks of the learned mixers and of their training steps against reference outputs."""

import json

import torch
from torch.testing import assert_close

from hf_mixup.losses import CrossEntropy
from hf_mixup.mixers.masks import mask_loss, rescale_lam
from hf_mixup.mixers.mixblock import MixBlock, from_openmixup
from hf_mixup.plan import Dense, MixPlan, blend
from hf_mixup.steps.mixer_losses import positive_bce


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

    mask = block(x, partner, lam, tuple(img.shape[2:]))
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
            losses = positive_bce(logits, targets, float(tag.removeprefix("BCE_neg")))
        elif tag.startswith("decouple"):
            continue
        else:
            losses = CrossEntropy(smoothing=0.1 if tag in ("labelsmooth0.1", "onehotLS") else 0.0)(logits, targets)
        close(losses.mean(), case[f"loss|{key}"])
        close(torch.autograd.grad(losses.mean(), logits)[0], case[f"grad|{key}"])


CHECKS = {"mixblock": mixblock, "maskloss": maskloss, "mixlosses": mixlosses}
