"""Learned mixing: which loss trains which part, what happens after the step, and what is saved."""

import functools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForImageClassification

from hf_mixup import METHODS, MixupModel
from hf_mixup.core.plan import MixPlan, Share, onehot
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import MixKey, keyed
from hf_mixup.data.dataset import ImageDataset
from hf_mixup.data.processor import ImageFormat
from hf_mixup.data.sources import digits
from hf_mixup.mixers import AdaptiveMask, MixBlock
from hf_mixup.mixers.masks import adjust_mask, mask_loss, rescale_lam
from hf_mixup.networks.average import ema_momentum
from hf_mixup.policies import MultiMixup
from hf_mixup.report.examples import LAMS, MaskPictures, masks_of_mixers
from hf_mixup.steps.learned.automix import decay
from hf_mixup.steps.learned.mixing import EVAL_NETS, pair_plan, within_margin
from hf_mixup.steps.learned.state import LearnedState
from run_script import run_mixup, run_script
from small import resnet, trainer
from tiny import FAMILIES, NUM_LABELS, batch, network

LEARNED = ["automix", "samix", "adautomix"]
IMAGES, LABELS = torch.randn(6, 3, 16, 16, generator=keyed(0)), torch.arange(6) % NUM_LABELS


def cifar():
    return network("cifar_resnet")


def model_of(name, **fields):
    model = MixupModel(cifar(), METHODS[name].replaced(**fields)).train()
    torch.manual_seed(0)
    for module in model.states[name].mixer.modules():
        if isinstance(module, nn.Conv2d):  # masks with a shape to them
            nn.init.normal_(module.weight, std=0.5)
    return model


def gradients(name, step=0, **fields):
    """Of one training step: by part of the model, all in one vector."""
    model = model_of(name, **fields)
    state = model.states[name]
    model(pixel_values=IMAGES, labels=LABELS, mix_key=MixKey(0, 0, step, 0, 0, 100)).loss.backward()
    parts = {"mixer": state.mixer, "backbone": model.backbone, "head": state.head}
    assert all(p.grad is None for module in (state.teacher, state.teacher_head) for p in module.parameters())
    return {part: torch.cat([p.grad.flatten() for p in module.parameters()]) for part, module in parts.items()}


# -- who is trained by what -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["automix", "samix"])
def test_mixer_is_trained_by_the_teacher_and_the_area_alone(name):
    usual = gradients(name, mask_loss_margin=0.0)
    assert all(grad.abs().max() > 1e-6 for grad in usual.values())
    student = gradients(name, mask_loss_margin=0.0, onehot_weight=3.0, mix_weight=3.0)
    assert_close(student["mixer"], usual["mixer"])
    assert_close(student["backbone"], 3 * usual["backbone"], atol=1e-5, rtol=1e-4)
    mixer = gradients(name, mask_loss_margin=0.0, mixer_weight=2.0, mask_loss=0.2)
    assert_close(mixer["mixer"], 2 * usual["mixer"], atol=1e-5, rtol=1e-4)
    assert_close(mixer["backbone"], usual["backbone"])
    assert_close(mixer["head"], usual["head"])
    nothing = gradients(name, mixer_weight=0.0, mask_loss=0.0)
    assert nothing["mixer"].abs().max() == 0


def test_adversarial_steps_take_turns_and_turn_the_loss_round():
    plain, hard = gradients("adautomix", step=1, beta=1.0), gradients("adautomix", step=1, beta=1.0, adv_interval=1)
    assert plain["mixer"].abs().max() > 1e-6
    assert_close(hard["mixer"], -plain["mixer"])
    assert_close(hard["backbone"], plain["backbone"])
    even = gradients("adautomix", step=2, beta=1.0)["mixer"], gradients("adautomix", step=2, beta=1.0, adv_interval=3)["mixer"]
    assert_close(even[0], -even[1])
    unlike = gradients("adautomix", step=0, beta=0.0)["mixer"]
    assert_close(gradients("adautomix", step=0, beta=0.0, keep_similar=True)["mixer"], -unlike)


@pytest.mark.parametrize("eval_net", EVAL_NETS)
def test_evaluated_network_and_head(eval_net, tmp_path):
    """The deployed network's own head is the one that `eval_net` names, and a plain classifier is shipped."""
    clean, mixed = ({"onehot_weight": 0.0}, {"mix_weight": 0.0})
    own, other = (mixed, clean) if eval_net.endswith("onehot") else (clean, mixed)
    without_own = gradients("automix", eval_net=eval_net, **(clean if own is mixed else mixed))
    without_other = gradients("automix", eval_net=eval_net, **(clean if other is mixed else mixed))
    classifier = slice(-NUM_LABELS * 17, None)  # 16 channels and a bias
    assert without_own["backbone"][classifier].abs().max() == 0
    assert without_own["head"].abs().max() > 0
    assert without_other["backbone"][classifier].abs().max() > 0
    assert without_other["head"].abs().max() == 0

    model = model_of("automix", eval_net=eval_net)
    model(pixel_values=IMAGES, labels=LABELS, mix_key=MixKey(0, 0, 0))
    model.eval().save_pretrained(tmp_path)
    state = model.states["automix"]
    expected = state.teacher if eval_net.startswith("teacher") else model.backbone
    logits = expected(pixel_values=IMAGES).logits
    assert torch.equal(model(pixel_values=IMAGES).logits, logits)
    assert_close(AutoModelForImageClassification.from_pretrained(tmp_path).eval()(pixel_values=IMAGES).logits, logits)
    restored = MixupModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, restored.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", LEARNED)
def test_same_key_same_step(name):
    losses = [model_of(name)(pixel_values=IMAGES, labels=LABELS, mix_key=MixKey(0, 0, step)).loss for step in (3, 3, 4)]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_every_parameter(family):
    """DistributedDataParallel waits for each of them."""
    images, targets = batch()
    model = MixupModel(network(family), "samix").train()
    model(pixel_values=images, labels=targets, mix_key=MixKey(0, 0, 0)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert model.states["samix"].mixer.query.conv.weight.grad.abs().max() > 0


# -- what follows the step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["automix", "samix", "adautomix", "recursivemix"])
def test_weights_in_double_precision(name):
    images, labels = torch.randn(4, 3, 16, 16, generator=keyed(0)), torch.arange(4)
    found = []
    for dtype in (torch.float32, torch.float64):
        backbone = resnet().to(dtype)
        torch.manual_seed(1)
        model = MixupModel(backbone, name).train()
        found.append([model(images.to(dtype), labels, MixKey(3, 0, step)).loss.item() for step in range(2)])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_momentum_is_constant_and_then_a_cosine_of_the_whole_run():
    of = [ema_momentum(step, 1000, 0.999, 0.999999, 0.1, warmup=False) for step in (0, 99, 100, 1000)]
    assert of[:2] == [0.999, 0.999]
    assert math.isclose(of[2], 0.9990244, abs_tol=1e-7)
    assert of[3] == 0.999999
    assert ema_momentum(500, 0, 0.999, 0.999999, 0.1, warmup=False) == 0.999
    assert ema_momentum(500, 1000, 1.0, 0.999999, 0.1, warmup=True) == 1.0


def test_momentum_is_warmed_up():
    of = [ema_momentum(step, 10**6, 0.999, 0.999999, 0.1, warmup=True) for step in (0, 8, 8_989, 8_990, 10**6)]
    assert of[:2] == [0.1, 0.5]
    assert of[2] < 0.999
    assert of[3:] == [0.999, 0.999999]


def test_teacher_follows_parameters_and_keeps_its_own_statistics():
    model = model_of("automix", momentum_warmup=False)
    state, method = model.states["automix"], model.choice.methods[0]
    assert all(
        torch.equal(a, b) for a, b in zip(state.teacher.network.state_dict().values(), model.backbone.state_dict().values(), strict=True)
    )
    model(pixel_values=IMAGES, labels=LABELS, mix_key=MixKey(0, 0, 0)).loss.backward()
    with torch.no_grad():
        for parameter in [*model.backbone.parameters(), *state.head.parameters()]:
            parameter.add_(torch.ones(()))
    before = {name: value.clone() for name, value in state.teacher.network.state_dict().items()}
    method.step.after_optimizer_step(state, model.backbone, 0, 100)
    parameters = dict(state.teacher.network.named_parameters())
    for name, value in state.teacher.network.state_dict().items():
        assert_close(value, before[name] + 0.001 if name in parameters else before[name], atol=1e-6, rtol=0)
    assert_close(state.teacher_head.network.weight, state.head.weight - 0.999, atol=1e-6, rtol=0)
    # student: clean and mixed images; teacher: the same numbers of passes, of other mixtures
    own = dict(model.backbone.named_buffers())
    moved = [not torch.equal(value, own[name]) for name, value in state.teacher.network.named_buffers() if "running" in name]
    assert all(moved)


def test_mask_loss_schedules():
    assert decay("constant", 99, 100) == 1
    assert decay("cosine", 0, 100) == 1
    assert math.isclose(decay("cosine", 50, 100), 0.5)
    assert decay("constant", 99, 100, compounding=True) == 1
    compounded = functools.partial(decay, "cosine", compounding=True)
    assert math.isclose(compounded(2, 4), (1 + math.cos(math.pi / 4)) / 2 / 2)
    # as the reference's hook was measured
    steps = 500_400
    assert compounded(6726, steps) > 1 / math.e >= compounded(6727, steps)
    assert compounded(int(0.022 * steps), steps) > 0.009 > compounded(int(0.023 * steps), steps)
    assert 0.1 * compounded(int(0.42 * steps), steps) == 0
    assert compounded(10, 0) == 1


@pytest.mark.parametrize("name", LEARNED)
def test_switched_off_steps_leave_the_teachers_pass_out(name):
    model = model_of(name, switch_off=0.8)
    method, state = model.choice.methods[0], model.states[name]
    passes, kept = [], []
    state.teacher.register_forward_pre_hook(lambda *_: passes.append(1))
    keys = [MixKey(0, 0, step) for step in range(400)]
    for key in keys:
        drawn = method.step.draw(method, IMAGES.shape, Signals(), state.mixer, key)
        other = method.step.draw(method, IMAGES.shape, Signals(), state.mixer, key._replace(rank=1))
        kept.append(drawn.keep)
        # the choice is shared by all processes, the pairs are not
        assert (other.keep, other.settings) == (drawn.keep, drawn.settings)
    assert abs(sum(kept) / len(kept) - 0.8) < 4 * (0.16 / 400) ** 0.5
    for keep in (True, False):
        passes.clear()
        model.zero_grad()
        model(pixel_values=IMAGES, labels=LABELS, mix_key=keys[kept.index(keep)]).loss.backward()
        assert len(passes) == 1 + keep
        assert all(p.grad is not None for p in state.mixer.parameters())


# -- masks ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [{}, {"lam_input": "multiply_residual", "x_qk_concat": True, "value_neck": True, "upsampling": "bilinear"}]
)
def test_masks_learn_to_follow_lam(fields):
    """From the area loss alone, masks that are told lam get its area, image by image; before training all are even."""
    torch.manual_seed(0)
    block, features = MixBlock(8, **fields), torch.rand(8, 8, 4, 4) + 0.5
    lam = torch.linspace(0.2, 0.8, 8)
    index, weight = torch.stack([torch.arange(8), torch.arange(8).roll(1)], 1), torch.stack([lam, 1 - lam], 1)
    assert_close(block(features, index, weight, (8, 8)), torch.full((8, 2, 8, 8), 0.5), atol=1e-2, rtol=0)
    optimizer = torch.optim.Adam(block.parameters(), lr=0.03)
    for _ in range(300):
        loss = mask_loss(block(features, index, weight, (8, 8)), lam, "L1", 0.0, per_sample=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    area = block(features, index, weight, (8, 8))[:, 0].mean((1, 2))
    assert (area - lam).abs().max() < 0.1, area
    assert (area.diff() > 0).all()


def test_masks_are_free_of_lam_where_the_mixer_is_not_told():
    block, features, index = MixBlock(8, lam_input="none"), torch.randn(4, 8, 4, 4), torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])
    weights = [torch.tensor([[lam, 1 - lam]] * 4) for lam in (0.3, 0.85)]
    masks = [block(features, index, weight, (8, 12)) for weight in weights]
    assert torch.equal(*masks)
    told = MixBlock(8, lam_input="concat")
    assert not torch.equal(*(told(features, index, weight, (8, 12)) for weight in weights))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_mixers_work_in_float32_under_autocast(kind):
    features, index, weight = (
        torch.randn(4, 8, 4, 4).to(kind),
        torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]]),
        torch.tensor([[0.3, 0.7]] * 4),
    )
    for mixer in (MixBlock(8), AdaptiveMask(8)):
        plain = mixer(features, index, weight, (8, 12))
        with torch.autocast("cpu", torch.bfloat16):
            under = mixer(features, index, weight, (8, 12))
        assert under.dtype == torch.float32
        assert torch.equal(under, plain)
        assert_close(plain.sum(1), torch.ones(4, 8, 12))


def test_adjusted_masks_have_the_area_of_lam():
    mask = torch.rand(6, 1, 8, 8) ** torch.linspace(0.2, 5, 6)[:, None, None, None]
    mask, lam = torch.cat([mask, 1 - mask], 1), torch.linspace(0.1, 0.9, 6)
    adjusted = adjust_mask(mask, lam)
    assert_close(adjusted[:, 0].mean((1, 2)), lam)
    assert adjusted.min() >= 0
    # pixels keep their order
    assert torch.equal(adjusted.flatten(2).argsort(2), mask.flatten(2).argsort(2))


def test_area_of_the_batch_or_of_every_image():
    mask = torch.stack([torch.full((2, 4, 4), share) for share in (0.2, 0.8)])
    mask[:, 0] = 1 - mask[:, 1]
    # areas 0.8 and 0.2 of the own image: half of the batch, but far from a half each
    assert_close(mask_loss(mask, torch.full((2,), 0.5), "L1", 0.0), torch.tensor(0.0))
    assert_close(mask_loss(mask, torch.full((2,), 0.5), "L1", 0.1, per_sample=True), torch.tensor(0.2))
    assert_close(mask_loss(mask, torch.tensor([0.8, 0.2]), "L1", 0.0, per_sample=True), torch.tensor(0.0))


def test_rescaled_lam_keeps_the_ends_and_the_middle():
    lam = torch.linspace(0, 1, 5)
    for k in (0, 0.25, 1, 50):
        assert_close(rescale_lam(lam, k)[[0, 2, 4]], lam[[0, 2, 4]])
    assert torch.equal(rescale_lam(lam, -1), lam)
    assert torch.equal(rescale_lam(lam, 50), rescale_lam(lam, 10))


def test_no_image_meets_itself_under_no_repeat():
    method = METHODS["automix"]
    for count in (2, 3, 8):
        for step in range(100):
            plan = pair_plan(method, torch.Size((count, 3, 8, 8)), MixKey(0, 0, step).own_rng(), Signals(), no_repeat=True)
            assert (plan.index[:, 0] != plan.index[:, 1]).all()
            assert torch.equal(plan.index[:, 1].sort().values, torch.arange(count))


def test_margin_is_at_both_ends():
    lam = torch.tensor([0.0, 0.08, 0.09, 0.91, 0.93, 1.0])
    shares = torch.stack([lam, 1 - lam], 1)
    plan, learned = MixPlan.pair(torch.arange(6), Share(shares), lam), torch.rand(6, 2, 4, 4)
    kept = (within_margin(learned, plan, 0.08) == learned).flatten(1).all(1)
    assert kept.tolist() == [False, False, True, True, False, False]


def test_plans_own_masks_near_the_ends_of_lam():
    """With every lam within the margin, AutoMix's student is trained on plain mixup."""
    model = model_of("automix", lam_margin=0.5)
    step, state, method = model.choice.methods[0].step, model.states["automix"], model.choice.methods[0]
    drawn = step.draw(method, IMAGES.shape, Signals(), state.mixer, MixKey(0, 0, 0))
    output = step.run(method, state, model.backbone, IMAGES, onehot(LABELS, NUM_LABELS), MixKey(0, 0, 0))
    assert_close(output.plan.dense_mask((16, 16)), drawn.plans[0].dense_mask((16, 16)))
    learned = replace(step, lam_margin=0.0).run(method, state, model.backbone, IMAGES, onehot(LABELS, NUM_LABELS), MixKey(0, 0, 0))
    assert learned.plan.dense_mask((16, 16)).var((2, 3)).min() > 0
    assert torch.equal(learned.lam, output.lam)


# -- reuse and refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "mixer"), [("samix", MixBlock(8, value_neck=True)), ("adautomix", AdaptiveMask(8, attention_norm="bn"))])
def test_a_trained_mixer_is_reused_frozen(name, mixer, tmp_path):
    for buffer in mixer.buffers():
        buffer.add_(1)
    mixer.save_pretrained(tmp_path / "mixer")
    assert {file.name for file in (tmp_path / "mixer").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    model = MixupModel(cifar(), METHODS[name].replaced(mixer=str(tmp_path / "mixer"))).train()
    state, before = model.states[name], {key: value.clone() for key, value in mixer.state_dict().items()}
    passes = []
    state.teacher.register_forward_pre_hook(lambda *_: passes.append(1))
    model(pixel_values=IMAGES, labels=LABELS, mix_key=MixKey(0, 0, 0)).loss.backward()
    assert len(passes) == 1
    assert all(p.grad is None for p in state.mixer.parameters())
    for key, value in state.mixer.state_dict().items():
        assert torch.equal(value, before[key])
    with pytest.raises(ValueError, match="16 channels"):
        MixupModel(cifar(), METHODS[name].replaced(mixer=str(tmp_path / "mixer"), stage=-1))


def test_a_mixer_of_other_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    MixBlock(8).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("value.bias")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"value\.bias"):
        MixBlock.from_pretrained(tmp_path)


@pytest.mark.parametrize("stage", [7, -8, 0.5, True, "stages.9", "stem"])
def test_a_wrong_stage_lists_the_right_ones(stage):
    with pytest.raises(ValueError, match=r"stages\.0|stages\.2|stages\.1"):
        MixupModel(cifar(), METHODS["automix"].replaced(stage=stage))
    assert isinstance(MixupModel(cifar(), METHODS["automix"].replaced(stage="stages.0")).states["automix"], LearnedState)


@pytest.mark.parametrize("name", LEARNED)
def test_a_teacher_of_half_precision_weights_moves(name):
    """In bfloat16 a step of a thousandth is lost; the average is kept in float32."""
    model = MixupModel(cifar().bfloat16(), name, mix_args={name: {"momentum_warmup": False}}).train()
    state = model.states[name]
    model(pixel_values=IMAGES.bfloat16(), labels=LABELS, mix_key=MixKey(0, 0, 0)).loss.backward()
    before = torch.cat([p.flatten() for p in state.teacher.parameters()])
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(1.0)
    model.after_optimizer_step(0, 100)
    moved = torch.cat([p.flatten() for p in state.teacher.parameters()]) - before
    assert moved.dtype == torch.float32
    # bfloat16 of the student rounds what was added
    assert_close(moved, torch.full_like(moved, 0.001), atol=1e-5, rtol=0)
    model.eval()(pixel_values=IMAGES.bfloat16(), labels=LABELS)


def test_three_images_are_refused_by_a_mixer_of_two():
    model = model_of("automix", sample={"name": "multimixup"})
    with pytest.raises(ValueError, match="mixes 3"):
        model(pixel_values=IMAGES, labels=LABELS, mix_key=MixKey(0, 0, 0))


@pytest.mark.parametrize(
    "fields",
    [
        {"lam_input": "concatenate"},
        {"lam_input": "concat", "x_qk_concat": True},
        {"upsampling": ("nearest", "linear")},
        {"mask_loss_mode": "L2"},
        {"eval_net": "teacher"},
        {"switch_off": 1.5},
        {"momentum": float("nan")},
        {"reduction": 0},
        {"lam_mul_k": (1.0, float("inf"))},
    ],
)
def test_wrong_settings_are_refused(fields):
    with pytest.raises(ValueError, match=r"got .*; |cannot be used with"):
        METHODS["automix"].replaced(**fields)


# -- what belongs to the published methods ----------------------------------------------------------------------------------


def test_shares_of_several_images():
    counts, shares = set(), []
    for step in range(500):
        plan = MultiMixup(mix_samples=4, is_random=True, mode="batch").plan(
            torch.Size((5, 3, 8, 8)), MixKey(0, 0, step).own_rng(), Signals()
        )
        counts.add(plan.index.shape[1])
        shares.append(plan.weight[0, 0] * plan.index.shape[1])
        assert (plan.weight == plan.weight[:1]).all()
        for partners in plan.index.unbind(1):
            assert torch.equal(partners.sort().values, torch.arange(5))
    assert counts == {2, 3, 4}
    shares = torch.stack(shares)
    assert abs(shares.mean() - 1) < 4 * shares.std() / 500**0.5


def test_masks_are_adjusted_to_the_students_lam_or_as_published():
    plans = {}
    for as_published in (False, True):
        model = model_of("samix", mask_adjust=1.0, as_published=as_published, lam_margin=0.0)
        method, state = model.choice.methods[0], model.states["samix"]
        drawn = method.step.draw(method, IMAGES.shape, Signals(), state.mixer, MixKey(0, 0, 1))
        output = method.step.run(method, state, model.backbone, IMAGES, onehot(LABELS, NUM_LABELS), MixKey(0, 0, 1))
        plans[as_published] = output.plan.dense_mask((16, 16))[:, 0].mean((1, 2)), drawn.plans[as_published].weight[:, 0]
    for area, lam in plans.values():
        assert_close(area, lam, atol=1e-5, rtol=0)
    assert not torch.allclose(plans[False][1], plans[True][1])


# -- pictures ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNED)
def test_pictures_of_masks_are_what_the_mixer_makes_and_change_nothing(name):
    model, form = model_of(name), ImageFormat(16)
    before, stream = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    found = masks_of_mixers(model, IMAGES[:3], form)[name]
    assert model.training
    assert torch.equal(torch.get_rng_state(), stream)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    state, lam = model.eval().states[name], LAMS[1]
    index, weight = torch.tensor([[0, 1], [1, 2], [2, 0]]), torch.tensor([[lam, 1 - lam]] * 3)
    assert_close(found[2]["masks"][1], state.masks(IMAGES[:3], index, weight)[2, 0])
    clean, mask = form.unnormalised(IMAGES[:3]), found[2]["masks"][1]
    assert_close(found[2]["mixed"][1], mask * clean[2] + (1 - mask) * clean[0])
    if name == "samix":  # told lam, untrained as it is
        assert not torch.equal(found[0]["masks"][0], found[0]["masks"][-1])


def test_pictures_of_masks_follow_training(tmp_path):
    run = trainer(tmp_path, resnet(), mix=["automix", "mixup"], max_steps=16, mixer_learning_rate=0.05)
    run.add_callback(MaskPictures(tmp_path / "reports", IMAGES[:2], ImageFormat(16)))
    run.train()
    first, last = sorted((tmp_path / "reports/masks").iterdir())
    assert (first.name, last.name) == ("automix-000008.png", "automix-000016.png")
    assert np.abs(np.asarray(Image.open(first), float) - np.asarray(Image.open(last), float)).max() > 50


@pytest.mark.slow
@pytest.mark.parametrize("name", ["automix", "samix"])
def test_masks_follow_lam_after_digits(tmp_path, name):
    """Through run_mixup.py: the pictures are there, and the area of the masks rises with lam."""
    run_mixup("--mix", name, "--image_size", 16, "--eval_strategy", "no", "--output_dir", tmp_path / "out")
    assert len(list((tmp_path / "out/masks").glob("*.png"))) == 10
    data = digits()["test"]
    form = ImageFormat.of_images(data, "image", 16)
    images = ImageDataset(data, "image", "label", form.eval_transform())
    pixels = torch.stack([images[row]["pixel_values"] for row in range(32)])
    pairs = masks_of_mixers(MixupModel.from_pretrained(tmp_path / "out"), pixels, form)[name]
    area = torch.stack([pair["masks"].mean((1, 2)) for pair in pairs]).mean(0)
    print(name, area.tolist(), json.loads((tmp_path / "out/all_results.json").read_text())["eval_top1"])
    assert (area.diff() > 0.01).all(), area
    assert area[-1] - area[0] > 0.2, area
    run_script(
        "visualize_mixup.py", "--checkpoint", tmp_path / "out", "--masks", "--dataset_name", "digits", "--output", tmp_path / "masks.png"
    )
    assert np.asarray(Image.open(tmp_path / "masks.png").convert("RGB")).std() > 20
