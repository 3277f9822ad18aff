"""Pre-training without labels: laws of every pretext, states, checkpoints, the trainer, views, the script."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from contextlib import contextmanager
from dataclasses import fields
from functools import partial

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from datasets import Dataset, Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification, DeiTConfig, DeiTForImageClassificationWithTeacher, TrainerCallback
from transformers.utils import logging as transformers_logging

import killed
from hf_mixup import MixupModel, MixupPreTrainer, PreTrainingArguments, PreTrainingModel, pretext
from hf_mixup.cli.pretrain import parse
from hf_mixup.core.plan import MixPlan, Share, blend, mix_targets
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import MixKey
from hf_mixup.data.dataset import ImageDataset
from hf_mixup.data.processor import ImageFormat
from hf_mixup.method import Method
from hf_mixup.methods import METHODS
from hf_mixup.networks.backbones import from_scratch, load_classifier
from hf_mixup.networks.backbones.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from hf_mixup.networks.families import classifier_of, freeze_backbone
from hf_mixup.pretraining.clusters import Clusters
from hf_mixup.pretraining.contrast import Mixture
from hf_mixup.pretraining.knn import knn_classes
from hf_mixup.pretraining.losses import LogOfMean
from hf_mixup.pretraining.pretexts import BASES, PRETEXTS
from hf_mixup.pretraining.samix import SAMix
from hf_mixup.pretraining.sdmp import SDMP, in_common
from hf_mixup.pretraining.state import Batch, feature_of
from hf_mixup.pretraining.views import STYLES, Style, view_transform
from hf_mixup.report.examples import MaskPictures, masks_of_mixers
from hub_server import USER, WRITE, LoopbackHub
from pretrained import TwoViews, saves_every_step, trainer
from refusals import refuses
from run_script import ROOT, run_script
from small import Images, difference, losses, weights
from test_distributed import both, of_two
from test_hub import process, python

SMALL = {"projector": (16, 8)}
OTHERS = ("cutmix", "fmix", "gridmix", "resizemix")


def made(base, mix, **changes) -> Method:
    known = {field.name for field in fields(BASES[base])}
    known |= {field.name for field in fields({"samix": SAMix, "sdmp": SDMP}[mix])} if mix in ("samix", "sdmp") else set()
    small = {**SMALL, "predictor": (16, 8), "queue_size": 20, **changes}
    return pretext(mix, base, **{name: value for name, value in small.items() if name in known})


def fits(base, mix) -> bool:
    try:
        made(base, mix)
    except ValueError:
        return False
    return (base, mix) != ("barlowtwins", "resizemix")  # refused when its model is built


PAIRS = [(base, mix) for base in BASES for mix in [*PRETEXTS, *OTHERS] if fits(base, mix)]
KEY = MixKey(3, 0, 1, total_steps=10)


def model_of(base="moco", mix="imix", network="cifar_resnet20", size=16, **changes) -> PreTrainingModel:
    torch.manual_seed(0)
    return PreTrainingModel(from_scratch(network, 2, size), made(base, mix, **changes)).train()


def views(count=6, size=16, seed=0):
    return torch.randn(count, 2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def state_of(model):
    return model.states[model.pretext.name]


# -- laws -------------------------------------------------------------------------------------------------------------------


def test_most_pairs_are_there():
    assert len(PAIRS) >= 6 * 6 + 2


@pytest.mark.parametrize(("base", "mix"), PAIRS)
def test_every_pretext_trains_and_is_data(base, mix):
    model = model_of(base, mix)
    assert Method.from_dict(json.loads(json.dumps(model.pretext.to_dict()))) == model.pretext
    out = model(views(), mix_key=KEY)
    out.loss.backward()
    assert torch.isfinite(out.loss)
    torch.testing.assert_close(out.targets.sum(1), torch.ones(len(out.targets)))  # shares of instances
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing  # or several processes would wait for it
    assert all(p.grad is None for p in classifier_of(model.backbone).parameters())
    repeated = model_of(base, mix)(views(), mix_key=KEY)
    assert torch.equal(repeated.loss, out.loss)
    if mix != "vanilla":
        assert not torch.equal(model_of(base, mix)(views(), mix_key=KEY._replace(step=2)).loss, out.loss)


def alone(rows, columns):
    """A plan whose mask is the own image alone: of one image, or of two of which the second has no share."""
    if columns == 1:
        return MixPlan.identity(rows)
    plan = MixPlan.pair(torch.arange(rows).roll(1), None, torch.ones(rows))
    assert isinstance(plan.mask, Share)
    return plan


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize(("base", "mix"), [pair for pair in PAIRS if pair[0] != "barlowtwins" and pair[1] in ("imix", "unmix", "cutmix")])
def test_the_own_image_alone_gives_the_base_loss(base, mix, columns):
    """The mixed term of a mask of the own image alone is the clean term, exactly. MoCo with one softmax over the keys of the batch has
    those as candidates beside the queue, so there the law holds for plans of one image."""
    if (base, mix) in (("moco", "imix"), ("moco", "cutmix")) and columns == 2:
        pytest.skip("another set of candidates, by the formula")
    pair = views()
    found = []
    for clean in (1.0, 0.0):
        # batch statistics of one pass would differ with what else is in it
        model = model_of(base, mix, clean=clean, mixed=1.0 - clean)
        step, state = model.pretext.step, state_of(model)
        mixtures = {view: Mixture(alone(6, columns), Batch(pair[:, view])) for view in step.mixed_views}
        found.append(step.step(model.pretext.parts, state, model.backbone, list(pair.unbind(1)), mixtures, torch.Generator()).loss)
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-6)


def test_the_own_image_alone_gives_the_loss_of_barlow_twins():
    pair, found = views(), []
    for mix in ("vanilla", "mixedbarlow"):
        model = model_of("barlowtwins", mix)
        found.append(model.pretext.step.step(state_of(model), model.backbone, *pair.unbind(1), alone(6, 2)).loss)
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("base", ["moco", "mocov3", "byol"])
def test_key_network_moves_by_its_average_alone(base):
    model = model_of(base)
    state = state_of(model)
    before = weights(state.key), weights(state.key_projector)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(views(), mix_key=KEY).loss.backward()
    optimizer.step()
    parameters = {name for name, _ in state.key.named_parameters()}
    moved = {name: value for name, value in weights(state.key).items() if name in parameters}
    assert difference(moved, {name: before[0][name] for name in moved}) == 0
    assert all(p.grad is None and not p.requires_grad for p in [*state.key.parameters(), *state.key_projector.parameters()])
    model.after_optimizer_step(1, 10)
    momentum = model.pretext.step.momentum
    if base != "moco":
        momentum = 1 - (1 - momentum) * (1 + torch.cos(torch.tensor(torch.pi / 10)).item()) / 2
    for old, average, network in (
        (before[0], state.key.network, model.backbone),
        (before[1], state.key_projector.network, state.projector),
    ):
        now = dict(network.named_parameters())
        for name, value in average.named_parameters():
            torch.testing.assert_close(value, momentum * old[f"network.{name}"] + (1 - momentum) * now[name], atol=1e-6, rtol=0)


def test_the_momentum_of_moco_is_constant_unless_an_end_is_given():
    """As in MoCo v2. That of BYOL rises to 1."""
    for base, settings, wanted in (
        ("moco", {"momentum": 0.9}, 0.9),
        ("moco", {"momentum": 0.9999}, 0.9999),
        ("moco", {"momentum": 0.9, "end_momentum": 0.99}, 0.99),
        ("byol", {"momentum": 0.9}, 1.0),
        ("byol", {"momentum": 0.9, "end_momentum": None}, 0.9),
    ):
        model = model_of(base, **settings)
        key = state_of(model).key
        old = next(key.parameters()).clone()
        with torch.no_grad():
            next(model.backbone.parameters()).add_(1)
        model.after_optimizer_step(1000, 1000)  # at the end of a run
        torch.testing.assert_close(next(key.parameters()), old + (1 - wanted), atol=1e-6, rtol=0)
        assert Method.from_dict(json.loads(json.dumps(model.pretext.to_dict()))) == model.pretext


@pytest.mark.parametrize("base", ["moco", "mocov3", "byol"])
def test_key_network_trains_on_statistics_of_its_own_and_in_no_optimizer(base, tmp_path):
    """Also after an evaluation: it is in training mode, its running statistics are those of the keys, and no optimizer has its weights."""
    run = trainer(tmp_path, base, max_steps=3, save_strategy="no", eval_strategy="steps", eval_steps=1)
    state = state_of(run.mixup_model)
    before = {name: buffer.clone() for name, buffer in state.key.named_buffers()}
    run.train()
    assert state.key.training
    assert state.key_projector.training
    buffers, own = dict(state.key.network.named_buffers()), dict(run.mixup_model.backbone.named_buffers())
    for name, buffer in buffers.items():
        if name.endswith("running_mean"):
            assert not torch.equal(buffer, before[f"network.{name}"])
            assert not torch.equal(buffer, own[name])
    keys = {id(p) for part in (state.key, state.key_projector) for p in part.parameters()}
    assert not keys & {id(p) for group in run.optimizer.param_groups for p in group["params"]}


def test_saving_leaves_the_given_weights_alone(tmp_path):
    """transformers empties the dictionary that it is given."""
    model = model_of("moco", "imix")
    given = model.state_dict()
    names = list(given)
    model.save_pretrained(tmp_path, state_dict=given)
    assert list(given) == names


def test_simsiam_stops_the_gradient_of_its_targets():
    """The gradient is that of the loss whose targets are constants."""
    model = model_of("simsiam", "vanilla")
    pair = views()
    step, state = model.pretext.step, state_of(model)
    out = step.step(model.pretext.parts, state, model.backbone, list(pair.unbind(1)), {}, torch.Generator())
    out.loss.backward()
    gradient = {name: p.grad.clone() for name, p in state.projector.named_parameters()}

    other = model_of("simsiam", "vanilla")
    own = state_of(other)
    rows = own.projected(other.backbone, [Batch(pair[:, 0]), Batch(pair[:, 1])], one_pass=False)
    targets = [torch.nn.functional.normalize(row.data.clone()) for row in rows]
    queries = [torch.nn.functional.normalize(own.predictor(row)) for row in rows]
    (-((queries[0] * targets[1]).sum(1).mean() + (queries[1] * targets[0]).sum(1).mean()) / 2).backward()
    for name, p in own.projector.named_parameters():
        torch.testing.assert_close(gradient[name], p.grad, atol=1e-6, rtol=1e-4)


def test_nt_xent_is_the_formula():
    """Of 2 B rows against all others, written out."""
    model = model_of("simclr", "vanilla", temperature=0.3)
    pair = views()
    out = model(pair, mix_key=KEY)
    other = model_of("simclr", "vanilla", temperature=0.3)
    rows = state_of(other).projected(other.backbone, [Batch(pair[:, 0]), Batch(pair[:, 1])], one_pass=True)
    rows = torch.nn.functional.normalize(torch.cat(rows))
    scores = (rows @ rows.T / 0.3).fill_diagonal_(-torch.inf)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(scores, torch.arange(12).roll(6)))


def test_lightly_agrees():
    lightly = pytest.importorskip("lightly.loss")
    model = model_of("simclr", "vanilla", temperature=0.3)
    pair = views()
    other = model_of("simclr", "vanilla", temperature=0.3)
    rows = state_of(other).projected(other.backbone, [Batch(pair[:, 0]), Batch(pair[:, 1])], one_pass=True)
    torch.testing.assert_close(model(pair, mix_key=KEY).loss, lightly.NTXentLoss(temperature=0.3)(*rows))


# -- the queue --------------------------------------------------------------------------------------------------------------


def test_queue_of_any_length_keeps_the_newest():
    """20 places, 6 keys a step: not a multiple, so the last of a step go to the front."""
    model = model_of("moco", "vanilla")
    state = state_of(model)
    kept = [row.clone() for row in state.queue]
    for step in range(5):
        place = step * 6
        keys = torch.nn.functional.normalize(torch.randn(6, 8), dim=1)
        state.remember(keys=keys)
        for row, key in enumerate(keys):
            kept[(place + row) % 20] = key
    assert torch.equal(state.queue, torch.stack(kept))
    assert int(state.place) == 30 % 20


def test_queue_shorter_than_a_step_is_refused():
    with pytest.raises(ValueError, match="queue_size must be at least"):
        model_of("moco", "vanilla", queue_size=5)(views(), mix_key=KEY)


def test_split_keys_see_other_batches_than_their_queries():
    """With one pass in order, keys are those of one batch; in splits, statistics are of other images; each key is still its image's."""
    model, split = model_of("moco", "vanilla"), model_of("moco", "vanilla", bn_splits=3)
    images = views()[:, 1]
    whole = model.pretext.step.keys_of(state_of(model), images, torch.Generator().manual_seed(1))
    parts = split.pretext.step.keys_of(state_of(split), images, torch.Generator().manual_seed(1))
    assert (whole - parts).abs().max() > 1e-3
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    other = model_of("moco", "vanilla")
    for some in order.chunk(3):
        torch.testing.assert_close(parts[some], state_of(other).keys(images[some]))


# -- precision --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", list(BASES))
def test_similarities_are_float32_under_autocast(base):
    mix = "mixedbarlow" if base == "barlowtwins" else "unmix"
    model = model_of(base, mix)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(views(), mix_key=KEY)
    out.loss.backward()
    plain = model_of(base, mix)(views(), mix_key=KEY)
    assert out.logits.dtype is torch.float32
    assert torch.isfinite(out.loss)
    assert abs(float(out.loss - plain.loss)) < 0.1 * max(1, abs(float(plain.loss)))


def test_half_precision_weights_have_float32_averages():
    before, after = model_of("byol"), model_of("byol")
    exact = weights(state_of(after).key)
    after.to(torch.bfloat16)
    assert difference(exact, weights(state_of(after).key)) == 0  # not rounded on the way either
    torch.manual_seed(0)
    before = PreTrainingModel(from_scratch("cifar_resnet20", 2, 16).to(torch.bfloat16), made("byol", "imix"))
    for model in (before, after):
        key = state_of(model).key
        assert all(p.dtype is torch.float32 for p in key.parameters())
        model(views().to(next(model.parameters()).dtype), mix_key=KEY).loss.backward()
        old = weights(key)
        with torch.no_grad():
            next(model.backbone.parameters()).mul_(1.01)
        model.after_optimizer_step(0, 1000)  # a step of 1e-4 of the weight, which bfloat16 would round away
        assert difference(old, weights(key)) > 0
    averaged = MixupModel(from_scratch("cifar_resnet20", 4, 16), "cutmix", ema_decay=0.999).to(torch.bfloat16)
    assert all(p.dtype is torch.float32 for p in averaged.ema.parameters())
    assert averaged.eval()(torch.randn(2, 3, 16, 16)).logits.dtype is torch.float32


def test_the_log_of_a_mean_at_any_temperature():
    """SDMP's loss: the share of the other candidates stays 0, however much closer they are than the sources."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.nn.functional.normalize(torch.randn(2, 6, 3, generator=generator), dim=2)
    cosines = queries @ keys.T
    plan = MixPlan.pair(torch.arange(6).flip(0), None, torch.linspace(0.1, 0.9, 6))
    for temperature in (0.001, 0.01, 0.2, 10):
        scores = (cosines / temperature).requires_grad_()
        exact = scores.detach().double().requires_grad_()
        targets = mix_targets(plan, torch.arange(6), 6)
        found = LogOfMean()(scores, targets)
        log_p, rows = torch.log_softmax(exact, 1), torch.arange(6)
        own, other = plan.weight.double().log().unbind(1)
        wanted = -torch.logaddexp(log_p[rows, rows] + own, log_p[rows, rows.flip(0)] + other)
        torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-5)
        gradients = torch.autograd.grad(found.sum(), scores)[0], torch.autograd.grad(wanted.sum(), exact)[0]
        torch.testing.assert_close(gradients[0].double(), gradients[1], atol=1e-3, rtol=1e-3)


# -- compiled code ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("earlier", ["manifoldmix", "cutmix"])
def test_after_an_earlier_compiled_training(earlier):
    """The key network has its own weights, and layers are mixed, whatever was compiled before, in parts or as a whole."""
    found = []
    for backend in (None, "eager"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        network = from_scratch("cifar_resnet20", 2, 16)
        if backend:
            first = MixupModel(network, earlier).train()
            first.compile_backbone(backend=backend)
            first.compile_backbone(backend=backend)
        # without a mixed layer, whose graph must not serve the next one
        PreTrainingModel(network, made("moco", "imix")).train()(views(), mix_key=KEY)
        network.load_state_dict(from_scratch_weights())
        torch.manual_seed(1)
        model = PreTrainingModel(network, made("moco", "imix", layers=(1,))).train()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.2)
        found.append(model(views(), mix_key=KEY).loss.item())
        averaged = MixupModel(network, "cutmix", ema_decay=0.9).eval()
        with torch.no_grad():
            next(network.parameters()).mul_(5)
            found.append(averaged(views()[:, 0]).logits.sum().item())
    assert found[:2] == found[2:]


def from_scratch_weights():
    torch.manual_seed(7)
    return from_scratch("cifar_resnet20", 2, 16).state_dict()


def test_a_network_compiled_by_hand_is_refused_where_it_would_be_watched():
    """Hooks of later passes do nothing in its graph."""
    network = from_scratch("cifar_resnet20", 2, 16)
    network.compile(backend="eager")
    with refuses("must watch modules of the network, got them inside compiled code"):
        PreTrainingModel(network, made("moco", "imix"))
    with refuses("must watch modules of the network, got them inside compiled code"):
        MixupModel(torch.compile(from_scratch("cifar_resnet20", 2, 16), backend="eager"), "manifoldmix")
    MixupModel(network, "cutmix")


# -- layers, input mixing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["simclr", "moco", "byol"])
def test_a_layer_mixes_the_mixture_alone(base):
    """Mixing with no share of the partner in a layer changes nothing; with a share it does."""
    first = model_of(base, "imix", layers=(1,))
    out = first(views(), mix_key=KEY)
    out.loss.backward()
    at_images = model_of(base, "imix")(views(), mix_key=KEY)
    assert abs(float(out.loss - at_images.loss)) > 1e-4
    model, pair = model_of(base, "imix", layers=(1,)), views()
    step, state = model.pretext.step, state_of(model)
    plan = alone(6, 2)
    inside = {view: Mixture(plan, Batch(pair[:, view], state.layers[0], plan)) for view in step.mixed_views}
    other = model_of(base, "imix")
    outside = {view: Mixture(plan, Batch(pair[:, view])) for view in step.mixed_views}
    images = list(pair.unbind(1))
    one = step.step(model.pretext.parts, state, model.backbone, images, inside, torch.Generator())
    two = other.pretext.step.step(other.pretext.parts, state_of(other), other.backbone, images, outside, torch.Generator())
    torch.testing.assert_close(one.loss, two.loss)


def test_input_mixing_changes_views_not_targets():
    plain, mixed = (model_of("moco", "vanilla", input_mix=others)(views(), mix_key=KEY) for others in (0, 2))
    assert torch.equal(plain.targets, mixed.targets)
    assert not torch.equal(plain.loss, mixed.loss)


# -- refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mix", "base", "settings", "match"),
    [
        ("puzzlemix", "moco", {}, "images only"),
        ("automix", "moco", {}, "images only"),
        ("remix", "moco", {}, "images only, got 'remix', which needs labels of its own"),
        ("mixco", "byol", {}, "must have a base of simclr, moco"),
        ("mixup2", "moco", {}, "did you mean"),
        ("imix", "mocov4", {}, "did you mean"),
        ("imix", "byol", {"loss": "crossentropy"}, "must have the loss agreement"),
        ("imix", "moco", {"loss": {"name": "crossentropy", "smoothing": 0.1}}, "no smoothing"),
        ("imix", "simclr", {"both_ways": False}, "within_view needs both_ways"),
        ("cutmix", "moco", {"halved": True}, "mixes pairs of whole images"),
        ("mixco", "moco", {"layers": (1,)}, "halved mixes images"),
        ("cutmix", "moco", {"layers": (1,)}, "mixes pairs of whole images"),
        ("imix", "byol", {"projector": (16, 4)}, "projector's width"),
        ("imix", "moco", {"momentum": 1.0, "end_momentum": 0.5}, "end_momentum must be at least"),
        ("resizemix", "barlowtwins", {}, "moves pixels itself"),
        ("samix", "moco", {"mixer_loss": "cluster"}, "clusters must be at least 2 with mixer_loss='cluster'"),
        ("samix", "moco", {"clusters": 4}, "and 0 without, got 4 with 'infonce'"),
        ("samix", "moco", {"mixer_loss": "cluster", "clusters": 40, "queue_size": 20}, "clusters must be at most queue_size"),
        ("samix", "moco", {"mixer_loss": "cluster", "clusters": 4, "mixer": "x"}, "clusters are to train a mixer, got a trained one"),
        ("samix", "moco", {"mixer": "x", "extra": 0.5}, "extra is for a mixer that learns, got 0.5 with a trained one"),
        ("samix", "moco", {"mixer": "x", "mixer_loss": "pair"}, "mixer_loss is for a mixer that learns, got 'pair'"),
        ("samix", "moco", {"mixer_loss": "ce"}, "mixer_loss must be"),
    ],
)
def test_refusals_of_pretexts(mix, base, settings, match):
    with pytest.raises(ValueError, match=match):
        PreTrainingModel(from_scratch("cifar_resnet20", 2, 16), pretext(mix, base, **settings))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"base": "simclr", "gradient_accumulation_steps": 2}, "negatives from one batch"),
        ({"base": "mocov3", "gradient_accumulation_steps": 2}, "negatives from one batch"),
        ({"base": "npair", "gradient_accumulation_steps": 2}, "negatives from one batch"),
        ({"base": "mocov3", "mix": ["sdmp"], "gradient_accumulation_steps": 2}, "negatives from one batch"),
        ({"base": "barlowtwins", "mix": ["mixedbarlow"], "gradient_accumulation_steps": 2}, "negatives from one batch"),
        ({"base_args": {"queue_size": 7}}, "queue_size must be at least the 8 keys"),
        ({"base_args": {"queue_size": 15, "both_ways": True}}, "queue_size must be at least the 16 keys"),
        ({"mix_rate": 0.5}, "no effect on pre-training"),
        ({"ema_decay": 0.9}, "no effect on pre-training"),
        ({"mix": ["imix", "unmix"]}, "one way of mixing"),
        ({"mix": ["mixco"], "alpha": [1.0]}, "policies that have one"),
        ({"mix": [pretext("imix")], "base_args": {"temperature": 0.1}}, "got the object"),
        ({"mix": [pretext("imix", "byol")], "base": "simsiam"}, "base must come with a pretext by name, got the object"),
        ({"dataloader_drop_last": False}, "batches of one size"),
        ({"predictor_constant_lr": True}, "bases with a predictor"),
        ({"eval_strategy": "epoch"}, "kNN evaluation needs"),
        ({"base_args": {"bn_splits": 3}}, "bn_splits must divide a batch into parts of at least 2 images, got 3 and 8"),
        ({"base_args": {"bn_splits": 8}}, "bn_splits must divide a batch into parts of at least 2 images, got 8 and 8"),
        ({"bf16_full_eval": True}, "bf16_full_eval has no effect on pre-training"),
        ({"base": "simsiam", "predictor_constant_lr": True, "lr_scheduler_type": "reduce_lr_on_plateau"}, "functions of the step"),
        (
            {"base": "simsiam", "predictor_constant_lr": True, "lr_scheduler_type": "greedy", "eval_strategy": "steps"},
            "functions of the step, got lr_scheduler_type='greedy'",
        ),
        ({"load_best_model_at_end": True, "metric_for_best_model": "loss"}, "best model is that of knn_top1"),
    ],
)
def test_refusals_of_the_trainer(tmp_path, settings, match):
    with pytest.raises(ValueError, match=match):
        trainer(tmp_path, evaluate=False, **settings)


def test_a_search_cannot_minimise_the_neighbours(tmp_path):
    with refuses("hyperparameter_search must minimise a loss, got only knn_top1; set direction='maximize', or give compute_objective"):
        trainer(tmp_path).hyperparameter_search()


def test_one_view_is_refused(tmp_path):
    with pytest.raises(ValueError, match="two views of every image"):
        trainer(tmp_path, data=Images(), evaluate=False).train()


# -- checkpoints ------------------------------------------------------------------------------------------------------------


@contextmanager
def silent(caplog, *allowed):
    """Nothing is warned of inside, but what is allowed."""
    caplog.clear()
    with caplog.at_level("WARNING"), warnings.catch_warnings():
        warnings.simplefilter("error")
        transformers_logging.enable_propagation()
        try:
            yield
        finally:
            transformers_logging.disable_propagation()
    said = [record.getMessage() for record in caplog.records]
    assert not [text for text in said if not any(part in text for part in allowed)], said


@pytest.mark.parametrize("network", ["cifar_resnet20", "vit_mini", "resnet10t", "cifar_convnext_tiny"])
def test_checkpoints_are_backbones_without_classifier(network, tmp_path, caplog):
    """AutoModel, AutoModelForImageClassification, timm, MixupModel and load_classifier load them, with any number of classes. Of a fresh
    classifier transformers says so, and of a ViT's pooler, which AutoModel has and no pre-training trains."""
    model = model_of("moco", "unmix", network=network, size=32)
    model(views(4, 32), mix_key=KEY).loss.backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not config.get("id2label")
    assert config.get("num_classes", 0) == config.get("num_labels", 0) == 0
    assert model.backbone.config.num_labels == 2  # of the model itself nothing changes
    model.eval()
    images = torch.randn(2, 3, 32, 32)

    with torch.no_grad():
        wanted = model.features(images)
        for classes in (5, 2):
            with silent(caplog, "newly initialized"):
                plain = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=classes).eval()
            with silent(caplog):
                own = [
                    load_classifier(tmp_path, num_labels=classes).eval(),
                    MixupModel.from_pretrained(tmp_path, mix="mixup", num_labels=classes).eval().backbone,
                ]
            for loaded in (plain, *own):
                assert loaded(images).logits.shape == (2, classes)
                torch.testing.assert_close(feature_of(loaded, classifier_of(loaded), images), wanted)
        with silent(caplog, *(["pooler.dense"] if network == "vit_mini" else [])):
            headless = AutoModel.from_pretrained(tmp_path).eval()
        if network != "vit_mini":
            torch.testing.assert_close(headless(images).pooler_output.flatten(1), wanted)
        if network == "resnet10t":
            with silent(caplog):
                torch.testing.assert_close(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images), wanted)
                assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7).eval()(images).shape == (2, 7)
    with silent(caplog):
        again = PreTrainingModel.from_pretrained(tmp_path)
        assert Method.from_pretrained(tmp_path) == model.pretext
    other = PreTrainingModel(from_scratch(network, 10, 32), model.pretext)  # of as many classes as the data happen to have
    other.restore(tmp_path)
    assert difference(weights(state_of(other)), weights(state_of(model))) == 0
    kept = {name: value for name, value in again.state_dict().items() if name.removeprefix("backbone.") not in again.unsaved}
    assert difference(kept, {name: state[name] for name in kept}) == 0
    with refuses("a MixupModel must have classes, got .*; pass num_labels"):
        MixupModel.from_pretrained(tmp_path)


def test_a_backbone_that_lacks_more_than_its_classifier_is_refused(tmp_path):
    model_of("moco", "imix", network="vit_mini").save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: value for name, value in saved.items() if "layers.0" not in name and "layer.0" not in name},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with refuses("was expected to hold every weight of a backbone, got missing"):
        load_classifier(tmp_path, num_labels=3)


def test_methods_with_labels_and_without_have_models_of_their_own():
    network = from_scratch("cifar_resnet20", 2, 16)
    with refuses("methods of MixupModel must mix labelled images, got 'imix', which must pre-train .*; use PreTrainingModel"):
        MixupModel(network, made("moco", "imix"))
    with refuses("methods of PreTrainingModel must pre-train .*, got 'cutmix', which must mix labelled images; use MixupModel"):
        PreTrainingModel(network, METHODS["cutmix"])


def test_a_torn_or_foreign_checkpoint_is_refused(tmp_path):
    model_of("moco", "imix").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another"):
        model_of("byol", "imix").restore(tmp_path)
    with pytest.raises(ValueError, match="another"):
        model_of("moco", "imix", queue_size=24).restore(tmp_path)


def test_own_networks_without_classes():
    """Their config may promise no classes, as in transformers' networks: they give features then."""
    network = from_scratch("cifar_resnet20", 0, 16)
    assert network(torch.randn(2, 3, 16, 16)).logits.shape == (2, 64)


# -- the trainer ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "mix"), [("moco", "unmix"), ("byol", "cutmix"), ("simclr", "mixco"), ("barlowtwins", "mixedbarlow")])
def test_resumed_to_the_bit(base, mix, tmp_path):
    whole = trainer(tmp_path / "whole", base, [mix])
    whole.train()
    parts = trainer(tmp_path / "whole", base, [mix])
    parts.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    # the classifier, which no step uses, is not in a checkpoint; both are made with one seed here
    assert difference(weights(whole.mixup_model), weights(parts.mixup_model)) == 0
    assert losses(whole) == losses(parts)
    assert whole.evaluate()["eval_knn_top1"] == parts.evaluate()["eval_knn_top1"]


# base, mixing, and what else: queue and its place, averages, statistics of batch norms, a mixer, the global random stream, bf16
KILLED = {
    "moco": ("moco", "unmix", {"both_ways": True, "bn_splits": 2}),
    "moco bf16": ("moco", "imix", {"bf16": True}),
    "byol dropout": ("byol", "cutmix", {"dropout": True}),
    "samix": ("moco", "samix", {"extra": 0.5}),
    "simclr": ("simclr", "mixco", {}),
    "sdmp bf16": ("mocov3", "sdmp", {"bf16": True, "dropout": True}),
    "simsiam": ("simsiam", "unmix", {}),
    "barlowtwins": ("barlowtwins", "mixedbarlow", {}),
}


@pytest.fixture(scope="module")
def _server():
    killed.start_server()


@pytest.mark.slow
@pytest.mark.usefixtures("_server")
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", KILLED)
def test_killed_anywhere_and_resumed_is_bit_identical(tmp_path, name, processes):
    base, mix, more = KILLED[name]
    killed.ends_alike(tmp_path, partial(saves_every_step, base=base, mix=mix, **more), processes, 4 if name == "moco" else 2)


def test_accumulation_moves_the_key_network_once_a_step(tmp_path):
    run = trainer(tmp_path, "moco", evaluate=False, gradient_accumulation_steps=2, max_steps=2, save_strategy="no")
    run.train()
    assert int(state_of(run.mixup_model).place) == 4 * 8 % 20  # keys of every micro-batch
    assert all(torch.isfinite(p).all() for p in run.mixup_model.parameters())


def test_lars_leaves_biases_and_norms_alone(tmp_path):
    run = trainer(tmp_path, "simsiam", ["vanilla"], evaluate=False, optim="lars", optim_args="momentum=0.9", weight_decay=0.1)
    optimizer = run.create_optimizer()
    assert type(optimizer).__name__ == "Lars"
    assert optimizer.defaults["momentum"] == 0.9
    for group in optimizer.param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])


def test_the_predictor_may_keep_its_learning_rate(tmp_path):
    run = trainer(
        tmp_path, "simsiam", ["vanilla"], evaluate=False, predictor_constant_lr=True, lr_scheduler_type="cosine", warmup_steps=2, save_strategy="no"
    )  # fmt: skip
    run.train()
    rates = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    for name, p in run.mixup_model.named_parameters():
        if p.requires_grad:
            assert rates[id(p)] == (0.01 if ".predictor." in name else pytest.approx(0, abs=1e-8)), name


def test_features_are_in_order_and_leave_no_trace(tmp_path):
    run = trainer(tmp_path)
    before, data = weights(run.mixup_model), Images(11, seed=1)
    features, labels = run.features(data)
    assert labels.tolist() == data.labels.tolist()
    with torch.no_grad():
        run.mixup_model.eval()
        torch.testing.assert_close(features, run.mixup_model.features(data.pixels))
    assert difference(before, weights(run.mixup_model)) == 0


# -- what was silent --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lars_adapts_with_and_without_weight_decay(weight_decay, tmp_path):
    """One step at a trust coefficient of 0.01 moves a weight by a hundredth of its length, a bias or norm by its gradient."""
    run = trainer(
        tmp_path, "simsiam", ["vanilla"], evaluate=False, optim="lars", optim_args="momentum=0.9, trust_coeff=0.01", weight_decay=weight_decay,
        max_steps=1, save_strategy="no", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in run.mixup_model.named_parameters() if p.requires_grad}
    gradients = {}

    class Kept(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            gradients.update({name: p.grad.clone() for name, p in run.mixup_model.named_parameters() if p.grad is not None})

    run.add_callback(Kept())
    run.train()
    for name, p in run.mixup_model.named_parameters():
        if name in before and p.ndim > 1:
            moved = (p - before[name]).norm() / before[name].norm()
            assert 0.0099 / (1 + weight_decay * before[name].norm() / gradients[name].norm()) < moved < 0.0101, name
        elif name in before:
            torch.testing.assert_close(p.detach(), before[name] - gradients[name])


@pytest.mark.parametrize(
    ("optim_args", "match"),
    [
        ("momentum=0.9,eta=0.001", "optim_args of lars must be .*, got 'eta'"),
        ("momentum", "must give momentum a number, got ''"),
        ("momentum=0.9,nesterov=maybe", "must give nesterov True or False, got 'maybe'"),
    ],
)
def test_options_of_lars_are_refused(optim_args, match):
    with refuses(match):
        PreTrainingArguments("runs/x", optim="lars", optim_args=optim_args, report_to="none")
    assert PreTrainingArguments("runs/x", optim="lars", optim_args="momentum=0.9,nesterov=True").lars_options() == {
        "momentum": 0.9,
        "nesterov": True,
    }


def test_images_without_a_label_neither_vote_nor_count(tmp_path):
    run = trainer(tmp_path, save_strategy="no", knn_neighbours=5)
    measured = run.evaluate()["eval_knn_top1"]
    both_sets = []
    for data in (run.eval_dataset, run.bank_dataset):
        more = Images(len(data) + 9, seed=7)
        more.pixels[9:], more.labels[9:], more.labels[:9] = data.pixels, data.labels, -100
        both_sets.append(more)
    run.bank_dataset = both_sets[1]
    assert run.evaluate(both_sets[0])["eval_knn_top1"] == measured
    named = run.evaluate({"one": both_sets[0], "two": run.eval_dataset})
    assert named["eval_one_knn_top1"] == named["eval_two_knn_top1"] == measured
    both_sets[0].labels[:] = -1
    with refuses("eval_dataset must hold images with a label, got none of 25 .*; give some a label"):
        run.evaluate(both_sets[0])
    with refuses("no classifier to predict by, got a call of predict; call features"):
        run.predict(run.eval_dataset)


def test_a_given_optimizer_or_schedule_keeps_no_predictor_apart(tmp_path):
    model = model_of("simsiam", "vanilla")
    args = PreTrainingArguments(
        str(tmp_path), base="simsiam", mix=["vanilla"], base_args={"projector": [16, 8], "predictor": [16, 8]}, predictor_constant_lr=True,
        report_to="none", per_device_train_batch_size=8,
    )  # fmt: skip
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    with refuses("is for the Trainer's own optimizer and schedule, got optimizer given as optimizers"):
        MixupPreTrainer(model, args, train_dataset=TwoViews(), optimizers=(optimizer, None))


def test_heads_are_synchronised_where_the_backbone_is():
    network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(from_scratch("cifar_resnet20", 2, 16))
    state = state_of(PreTrainingModel(network, made("byol", "imix")))
    for head in (state.projector, state.predictor, state.key_projector, state.key):
        norms = [module for module in head.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
        assert norms
        assert all(isinstance(module, torch.nn.SyncBatchNorm) for module in norms)
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in model_of("byol").modules())


@pytest.mark.parametrize("count", [2, 3, 7])
def test_no_image_of_mocomix_is_its_own_partner(count):
    policy = pretext("mocomix").sample
    for seed in range(50):
        rng = torch.Generator().manual_seed(seed)
        plan = policy.plan(torch.Size([count, 3, 8, 8]), rng, Signals(torch.device("cpu")))
        assert sorted(plan.index[:, 1].tolist()) == list(range(count))
        assert not (plan.index[:, 1] == plan.index[:, 0]).any()
        assert (plan.weight == plan.weight[0]).all()


def test_icutmix_has_one_box_of_at_most_half():
    policy = pretext("icutmix").sample
    for seed in range(20):
        plan = policy.plan(torch.Size([5, 3, 16, 16]), torch.Generator().manual_seed(seed), Signals(torch.device("cpu")))
        assert (plan.mask.edges == plan.mask.edges[0]).all()
        assert (plan.weight[:, 0] >= 0.5).all()


# -- a linear probe ---------------------------------------------------------------------------------------------------------


def test_the_best_checkpoint_has_the_best_neighbours(tmp_path):
    run = trainer(tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=3)
    run.train()
    found = {row["step"]: row["eval_knn_top1"] for row in run.state.log_history if "eval_knn_top1" in row}
    assert len(found) == 2
    assert run.state.best_metric == max(found.values())
    assert run.evaluate()["eval_knn_top1"] == max(found.values())
    run.save_model()
    run.create_model_card()
    text = (tmp_path / "README.md").read_text()
    best = max(found, key=found.get)
    assert f"weights are those of step {best}, chosen by the same images" in text
    assert "last weights" not in text
    assert [line for line in text.splitlines() if re.match(r"\| \d", line)] == [
        f"| {step} | {100 * knn:.2f} |" for step, knn in found.items()
    ]


def test_features_that_are_not_finite_are_refused():
    """One such image of the bank would be the nearest neighbour of all."""
    bank, queries, labels = torch.randn(8, 4), torch.randn(3, 4), torch.arange(8) % 2
    assert knn_classes(bank, labels, queries, 2).shape == (3,)
    for name, broken in (("bank", bank), ("queries", queries)):
        kept = broken[1].clone()
        broken[1, 2] = torch.nan
        with refuses(f"the features of {name} must be finite, got 1 of {len(broken)} images"):
            knn_classes(bank, labels, queries, 2)
        broken[1] = kept


def test_less_than_a_batch_is_refused(tmp_path):
    with refuses("needs a whole batch of 8 images, got 7 in all; lower the batch size"):
        trainer(tmp_path, data=TwoViews(7), evaluate=False)


def test_a_frozen_backbone_keeps_all_but_its_classifier():
    network = from_scratch("cifar_resnet20", 4, 16)
    freeze_backbone(network)
    model = MixupModel(network, "mixup").train()
    before = weights(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(torch.randn(6, 3, 16, 16), labels=torch.arange(6) % 4, mix_key=KEY).loss.backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"backbone.classifier.weight", "backbone.classifier.bias"}


def test_a_network_after_its_pre_training_is_trained_with_its_classifier():
    """In one process. A classifier that the user froze stays so."""
    for frozen in (False, True):
        network = from_scratch("cifar_resnet20", 4, 16)
        classifier_of(network).requires_grad_(not frozen)
        for _ in range(2):
            model = PreTrainingModel(network, made("moco", "imix")).train()
            model(views(), mix_key=KEY).loss.backward()
            assert not any(p.requires_grad for p in classifier_of(network).parameters())
        model = MixupModel(network, "mixup").train()
        before = weights(classifier_of(network))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        model(torch.randn(6, 3, 16, 16), labels=torch.arange(6) % 4, mix_key=KEY).loss.backward()
        optimizer.step()
        assert (difference(before, weights(classifier_of(network))) == 0) == frozen


# -- views ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", list(STYLES))
def test_views_follow_from_seed_epoch_row_and_view(style):
    rng = np.random.default_rng(0)
    images = [PIL.Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)) for _ in range(4)]
    data = Dataset.from_dict({"image": images, "label": [0, 1, 0, 1]}).cast_column("image", Image())
    transform = view_transform(ImageFormat(16), style)

    def made_by(seed=0, epoch=0):
        found = ImageDataset(data, "image", "label", transform, seed=seed)
        found.set_epoch(epoch)
        return found

    whole = torch.stack([example["pixel_values"] for example in made_by().__getitems__([0, 1, 2, 3])])
    assert whole.shape == (4, 2, 3, 16, 16)
    for row in (3, 1):
        assert torch.equal(made_by()[row]["pixel_values"], whole[row])
    assert not torch.equal(whole[:, 0], whole[:, 1])
    assert not torch.equal(made_by(seed=1)[0]["pixel_values"], whole[0])
    assert not torch.equal(made_by(epoch=1)[0]["pixel_values"], whole[0])


# -- cards, recipes, the script ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["cifar_resnet20", "vit_mini", "resnet10t"])
def test_what_the_card_says_of_features_is_so(network, tmp_path, monkeypatch):
    torch.manual_seed(0)
    run = trainer(tmp_path, network=from_scratch(network, 2, 32), evaluate=False)
    run.save_model()
    run.create_model_card()
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    said = next(line for line in code.splitlines() if "features: " in line).split("features: ")[1].split(",")[0]
    names = {"__name__": "card"}
    exec(code.replace("path/or/hub-id/of/this/model", str(tmp_path)), names)
    images = torch.randn(2, 3, 32, 32)
    run.mixup_model.eval()
    with torch.no_grad():
        features = eval(f"backbone.eval()(images).{said}", {**names, "images": images})
        torch.testing.assert_close(features, run.mixup_model.features(images))
        assert names["classifier"].eval()(images).logits.shape == (2, 10)


def test_the_card_names_the_views_of_the_data_set(tmp_path):
    """Not those of the arguments, which only the script uses."""
    images = Dataset.from_dict({"image": [PIL.Image.new("RGB", (16, 16))] * 16, "label": [0, 1] * 8})
    for style in ("simclr", Style((0.3, 1.0), (0.1, 0.1, 0.1, 0.1))):
        data = ImageDataset(images, "image", "label", view_transform(ImageFormat(16), style))
        run = trainer(tmp_path, data=data, evaluate=False, max_steps=1)
        run.save_model()
        run.create_model_card()
        assert f"- **views:** {style}\n" in (tmp_path / "README.md").read_text()
    assert "views" not in trainer(tmp_path, evaluate=False)._hyperparameters()


def test_the_card_promises_features_not_classes(tmp_path):
    run = trainer(tmp_path, "byol", ["unmix"], save_strategy="no", eval_strategy="steps", eval_steps=3)
    run.train()
    run.save_model()
    run.create_model_card(model_name="small", dataset="images", license="mit")
    text = (tmp_path / "README.md").read_text()
    for wanted in ("image-feature-extraction", "**byol** with **unmix**", "2003.05438", "num_labels=10", "license: mit", "200 nearest"):
        assert wanted in text, wanted
    for wrong in ("pipeline_tag: image-classification", "To classify images", "names one of its"):
        assert wrong not in text
    knn = [entry["eval_knn_top1"] for entry in run.state.log_history if "eval_knn_top1" in entry]
    assert len(knn) == 2
    assert all(f"{100 * value:.2f}" in text for value in knn)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "training_scripts/recipes").glob("pretrain_*.yaml")))
def test_recipes(name, tmp_path):
    """Every recipe of run_pretraining.py is of arguments that it has, and of hyper-parameters that its base has."""
    _, _, run, args = parse(["--recipe", name, "--output_dir", str(tmp_path), "--report_to", "none"])
    assert run.recipe == name
    assert args.method_choice().methods[0].step == pretext(args.mix[0], args.base, **{
        key: tuple(value) if isinstance(value, list) else value for key, value in (args.base_args or {}).items()
    }).step  # fmt: skip


def test_the_script_is_thin():
    assert len((ROOT / "training_scripts/run_pretraining.py").read_text().splitlines()) < 250


def test_the_guide_says_what_was_measured_and_what_there_is():
    text = " ".join((ROOT / "docs/guides/pretraining.md").read_text().split())
    figures = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())["pretraining"]["figures"]
    ratio = {(base.split(",")[0], mix): row["ratio"][1] for base, rows in figures.items() for mix, row in rows.items()}
    assert all(ratio[base, "imix"] == pytest.approx(1, abs=0.06) for base in ("moco", "mocov3", "byol"))
    told = re.search(
        r"(\S+) times as much for SimSiam and (\S+) times for SimCLR. Un-Mix costs (\S+) to (\S+) times as much, SAMix (\S+) times \(", text
    )
    unmix = sorted(value for (_, mix), value in ratio.items() if mix == "unmix")
    wanted = ratio["simsiam", "imix"], ratio["simclr", "imix"], unmix[0], unmix[-1], ratio["moco", "samix"]
    assert [float(number) for number in told.groups()] == pytest.approx(wanted, abs=0.051)
    kinds = [pretext("samix", "moco", **json.loads(settings)).step for settings in re.findall(r"--base_args '(.*?)'", text)]
    assert [kind.mixer_loss for kind in kinds] == ["pair", "infonce", "cluster"]
    names = re.search(r"`--mix` takes (.*?). It also takes", text).group(1)
    assert set(re.findall(r"`(\w+)`", names)) == set(PRETEXTS)


def test_arguments_of_labels_are_refused():
    with pytest.raises(ValueError, match="--views sets how images are augmented"):
        parse(["--auto_augment", "rand-m9"])


@pytest.mark.slow
def test_the_table_of_neighbours_goes_on_cell_by_cell(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("train", "test"):
        images = [PIL.Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(140)]
        data = Dataset.from_dict({"img": images, "label": [row % 10 for row in range(140)]}).cast_column("img", Image())
        data.to_parquet(tmp_path / f"{name}.parquet")
    rows = []
    for bases in (["simclr"], ["simclr", "barlowtwins"], ["simclr", "barlowtwins"]):
        command = [sys.executable, str(ROOT / "benchmarks/knn.py"), "--dataset", tmp_path, "--csv", tmp_path / "knn.csv", "--epochs", "1"]
        subprocess.run([*map(str, command), "--seeds", "0", "--bases", *bases], check=True, capture_output=True)
        rows.append((tmp_path / "knn.csv").read_text().splitlines())
    assert [len(some) for some in rows] == [4, 6, 6]
    assert rows[1] == rows[2]
    assert rows[1][:4] == rows[0]
    committed = (ROOT / "docs/pretraining.csv").read_text().splitlines()
    assert rows[0][0] == committed[0]


@pytest.mark.slow
def test_the_script_pretrains_and_its_run_is_probed(tmp_path):
    small = ["--max_train_samples", 128, "--max_eval_samples", 64, "--use_cpu", "--num_train_epochs", 2]
    done = run_script("run_pretraining.py", *small, "--mix", "unmix", "--output_dir", tmp_path / "run", "--per_device_train_batch_size", 32)
    assert "kNN" in done.stderr
    folder = tmp_path / "run"
    assert {"README.md", "model.safetensors", "mixup_config.json", "preprocessor_config.json"} <= {path.name for path in folder.iterdir()}
    assert "untrained_knn_top1" in json.loads((folder / "eval_results.json").read_text())
    probe = run_script(
        "run_mixup.py", *small, "--recipe", "digits", "--model_name_or_path", folder, "--freeze_backbone", "--mix", "vanilla", "--output_dir",
        tmp_path / "probe",
    )  # fmt: skip
    assert "top-1" in probe.stderr
    before, after = (
        AutoModelForImageClassification.from_pretrained(path, num_labels=10).state_dict() for path in (folder, tmp_path / "probe")
    )
    kept = [name for name in before if not name.startswith("classifier")]
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert "newly initialized" not in probe.stderr  # nothing to be warned of
    tuned = run_script(
        "run_mixup.py",
        *small,
        "--model_name_or_path",
        folder,
        "--dataset_name",
        "digits",
        "--mix",
        "cutmix",
        "--output_dir",
        tmp_path / "tuned",
    )
    assert "top-1" in tuned.stderr
    moved = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned").state_dict()
    assert all(not torch.equal(before[name], moved[name]) for name in kept if name.endswith("conv1.weight"))
    assert len(json.loads((tmp_path / "tuned/config.json").read_text())["id2label"]) == 10


LOAD = """
import json, torch
from hf_mixup import MixupModel, PreTrainingModel
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoModelForImageClassification, TrainerCallback
import hf_mixup.networks.backbones
repo = "tester/backbone"
x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
card = ModelCard.load(repo)
card.validate()  # by the Hub
model = PreTrainingModel.from_pretrained(repo)
with torch.no_grad():
    print(json.dumps({
        "auto": AutoModel.from_pretrained(repo).eval()(x).pooler_output.flatten(1).tolist(),
        "features": model.eval().features(x).tolist(),
        "queue": model.states["unmix"].queue.tolist(),
        "classes": AutoModelForImageClassification.from_pretrained(repo, num_labels=7).eval()(x).logits.shape[1],
        "mixed": type(MixupModel.from_pretrained(repo, num_labels=7)).__name__,
        "card": card.data.to_dict(), "text": card.content,
    }))
"""


@pytest.mark.slow
def test_pushed_wiped_and_loaded(tmp_path):
    """To a Hub on the loopback and back, in a new process."""
    out, words = tmp_path / "backbone", ["--max_train_samples", "128", "--max_eval_samples", "60", "--max_steps", "4", "--mix", "unmix"]
    with LoopbackHub() as hub:
        script = ROOT / "training_scripts/run_pretraining.py"
        more = ["--image_size", "16", "--license", "mit", "--push_to_hub", "--hub_strategy", "checkpoint", "--hub_token", WRITE]
        process(hub, tmp_path, sys.executable, script, "--output_dir", out, *words, *more)
        measured = json.loads((out / "all_results.json").read_text())
        model = PreTrainingModel.from_pretrained(out).eval()
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            features = model.features(x).tolist()
        shutil.rmtree(out)
        files = hub.files(f"{USER}/backbone")
        found = python(hub, tmp_path, LOAD)
    assert {
        "README.md", "all_results.json", "config.json", "mixup_config.json", "model.safetensors", "mixup/state.safetensors",
        "preprocessor_config.json", "last-checkpoint/optimizer.pt", "last-checkpoint/mixup/state.safetensors",
    } <= set(files)  # fmt: skip
    assert not [name for name, data in files.items() if WRITE.encode() in data]
    assert found["auto"] == found["features"] == features
    assert found["queue"] == state_of(model).queue.tolist()
    assert (found["classes"], found["mixed"]) == (7, "MixupModel")
    card, text = found["card"], found["text"]
    assert (card["license"], card["pipeline_tag"], card["library_name"]) == ("mit", "image-feature-extraction", "transformers")
    assert "model-index" not in card  # the Hub has no task for neighbours
    assert f"{100 * measured['eval_knn_top1']:.2f}" in text
    assert "accuracy" not in text.replace("published accuracies", "")
    assert f'from_pretrained("{USER}/backbone")' in text


# -- several processes ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_are_one_with_both_batches(tmp_path):
    """Without batch norms: losses and gradients are those of one process, candidates come from both, all queues are equal."""
    one, two = both(tmp_path, of_two("two_pretraining.py", tmp_path))
    assert one["processes"] == 2
    for name, (loss, gradient, keys) in {k: v for k, v in one.items() if " " in k}.items():
        assert loss < 1e-5, name
        assert gradient < 1e-5, name
        assert keys < 1e-6, name
    for shared in ("queue", "place", "checksum", "labels"):
        assert one[shared] == two[shared]
    assert one["place"] == 3 * 2 * 2 * 8 % 40  # steps, processes, views, images
    assert one["labels"] == Images(11, seed=1).labels.tolist()
    assert one["features"] < 1e-4


# -- SAMix ------------------------------------------------------------------------------------------------------------------


def test_samix_trains_mixer_and_query_network_apart():
    """The mixer learns through the key network, whose weights get no gradient; the query network's do not depend on the mixer's loss."""
    pair, found = views(), []
    for settings in ({"mixer_loss": "infonce", "extra": 0.5}, {"mixer_loss": "pair", "mask_loss": 0.0}):
        model = model_of("moco", "samix", **settings)
        model(pair, mix_key=KEY).loss.backward()
        state = state_of(model)
        assert all(p.grad is None for p in [*state.key.parameters(), *state.key_projector.parameters()])
        assert all(p.grad.abs().sum() > 0 for name, p in state.mixer.named_parameters() if name.endswith("weight"))
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None and ".mixer." not in name})
    assert difference(*found) == 0


def test_samix_by_a_trained_mixer(tmp_path):
    """SAMix-P: the mixer of a run, frozen, with its own settings; it gives the same masks, and does not move."""
    model = model_of("moco", "samix", reduction=4)
    model.save_pretrained(tmp_path)
    other = model_of("moco", "samix", mixer=str(tmp_path))
    mixer = state_of(other).mixer
    assert difference(weights(mixer), weights(state_of(model).mixer)) == 0
    assert not any(p.requires_grad for p in mixer.parameters())
    assert not mixer.training
    out = other(views(), mix_key=KEY)
    out.loss.backward()
    assert all(p.grad is None for p in mixer.parameters())
    state_of(model).mixer.eval()  # by the statistics of its run, as a frozen one is
    learning = model(views(), mix_key=KEY)
    assert torch.equal(out.losses, learning.losses)  # of mixtures by the same masks
    assert out.loss < learning.loss  # without the mixer's own


def test_pictures_of_the_masks_of_samix(tmp_path):
    """By the code that draws those of methods with labels: masks add up to 1, and their mixtures are of the images by them."""
    form, pixels = ImageFormat(16), views(3)[:, 0]
    model = model_of("moco", "samix")
    before = weights(model)
    columns = masks_of_mixers(model, pixels, form)["samix"]
    assert difference(before, weights(model)) == 0
    masks = model.eval().states["samix"].masks(pixels, torch.tensor([[0, 1], [1, 2], [2, 0]]), torch.tensor([[0.1, 0.9]] * 3))
    torch.testing.assert_close(columns[1]["masks"][0], masks[1, 0])
    torch.testing.assert_close(masks.sum(1), torch.ones(3, 16, 16))
    mask = columns[1]["masks"][2]
    torch.testing.assert_close(columns[1]["mixed"][2], mask * columns[1]["own"] + (1 - mask) * columns[1]["partner"])
    run = trainer(tmp_path, "moco", ["samix"], evaluate=False, max_steps=8, callbacks=[MaskPictures(tmp_path, pixels, form)])
    run.train()
    assert [path.name for path in (tmp_path / "masks").iterdir()] == ["samix-000008.png"]


def test_masks_of_samix_follow_lam(tmp_path):
    """Seventy steps of the catalogue's settings: the area of the masks that training itself makes rises with lam, and so in the pictures."""
    torch.manual_seed(0)
    network = CifarResNetForImageClassification(CifarResNetConfig(depths=(1, 1, 1), widths=(8, 16, 32), embedding_size=8, num_labels=2))
    base_args = {"projector": [64, 32], "queue_size": 256, "momentum": 0.99, "end_momentum": 0.99}
    run = trainer(
        tmp_path, "moco", ["samix"], base_args, TwoViews(256), evaluate=False, network=network, max_steps=70, learning_rate=0.06,
        per_device_train_batch_size=32, save_strategy="no", logging_steps=70, lr_scheduler_type="cosine",
    )  # fmt: skip
    run.train()
    model, pixels = run.mixup_model.train(), torch.stack([TwoViews(64)[row]["pixel_values"][0] for row in range(64)])
    rng, drawn = torch.Generator().manual_seed(0), []
    for _ in range(8):
        plan = model.pretext.sample.plan(pixels.shape, rng, Signals(pixels.device, images=pixels))
        masks = state_of(model).masks(pixels, plan.index, plan.weight)  # by batch statistics, as in a step
        drawn.append((plan.weight[:, 0].float(), masks[:, 0].mean((1, 2))))
    lam, area = map(torch.cat, zip(*drawn, strict=True))
    slope = ((lam - lam.mean()) * (area - area.mean())).mean() / lam.var()
    pictures = torch.stack([column["masks"].mean((1, 2)) for column in masks_of_mixers(model, pixels, ImageFormat(16))["samix"]]).mean(0)
    assert slope > 0.4
    assert (area - lam).abs().mean() < 0.15
    assert (pictures.diff() > 0.01).all()
    assert pictures[-1] - pictures[0] > 0.2


def test_samix_resumes_to_the_bit(tmp_path):
    whole, parts = (trainer(tmp_path, "moco", ["samix"], base_args={"extra": 0.5}, evaluate=False) for _ in range(2))
    whole.train()
    parts.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert difference(weights(whole.mixup_model), weights(parts.mixup_model)) == 0


# -- SAMix-C ----------------------------------------------------------------------------------------------------------------

CLUSTERED = {"mixer_loss": "cluster", "clusters": 4, "cluster_interval": 2}


def test_clusters_are_found_again_from_where_they_are():
    """Of keys around five directions: every cluster is one of them, also after it lost all its keys; rarer ones weigh more."""
    torch.manual_seed(0)
    directions, sizes = torch.eye(5, 16), torch.tensor([14, 10, 20, 10, 26])
    keys = torch.nn.functional.normalize(directions.repeat_interleave(sizes, 0) + 0.05 * torch.randn(80, 16), dim=1)
    found = Clusters(5, 16)
    found.seen.fill_(3)
    found.find(keys)
    assert not found.weight.any()  # fewer keys than clusters
    found.seen.fill_(200)
    found.find(keys)
    nearest = (directions @ found.centroids.T).max(1)
    assert (nearest.values > 0.99).all()
    assert sorted(nearest.indices.tolist()) == list(range(5))
    rarity = sizes.float() ** -0.5
    torch.testing.assert_close(found.weight[nearest.indices], rarity / rarity.mean())
    before = found.centroids.clone()
    found.find(keys[torch.randperm(80)])
    torch.testing.assert_close(found.centroids, before)
    found.centroids[0] = -torch.nn.functional.normalize(keys.mean(0), dim=0)
    found.find(keys)
    torch.testing.assert_close(found.centroids, before)


def test_the_losses_of_clusters_are_the_formula():
    torch.manual_seed(0)
    found = Clusters(3, 8)
    found.centroids.copy_(torch.nn.functional.normalize(torch.randn(3, 8), dim=1))
    found.weight.copy_(torch.tensor([0.5, 1.0, 1.5]))
    torch.nn.init.normal_(found.fixed.weight)
    lam, partner = torch.rand(6), torch.tensor([1, 2, 0, 4, 5, 3])
    mixtures, clean, keys = (
        torch.randn(6, 8, requires_grad=True),
        torch.randn(6, 8),
        torch.nn.functional.normalize(torch.randn(6, 8), dim=1),
    )
    mixer, head = found.losses(mixtures, clean, keys, MixPlan.pair(partner, None, lam))
    classes = (keys @ found.centroids.T).argmax(1)
    assert len(classes.unique()) > 1

    def entropy(scores, numbers):
        return torch.nn.functional.cross_entropy(scores, numbers, found.weight, reduction="none")

    for scores, loss, other in ((found.fixed(mixtures), mixer, 0), (found.head(mixtures), head, entropy(found.head(clean), classes))):
        torch.testing.assert_close(loss, lam * entropy(scores, classes) + (1 - lam) * entropy(scores, classes[partner]) + other)
    head.sum().backward()
    assert mixtures.grad is None  # the classifier's loss does not teach the mixer
    assert found.head.weight.grad.abs().sum() > 0
    found.head.weight.grad = None
    mixer.sum().backward()
    assert mixtures.grad.abs().sum() > 0
    assert found.head.weight.grad is None
    assert found.fixed.weight.grad is None


def test_samix_c_resumes_to_the_bit(tmp_path):
    """Clusters are found after steps 2, 4 and 6; the copy of the classifier is that of the last step; checkpoints have all of it."""
    settings = {**CLUSTERED, "extra": 0.5}
    whole, parts = (trainer(tmp_path, "moco", ["samix"], base_args=settings, evaluate=False) for _ in range(2))
    whole.train()
    parts.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert difference(weights(whole.mixup_model), weights(parts.mixup_model)) == 0
    clusters = state_of(whole.mixup_model).clusters
    assert int(clusters.seen) == 6 * 8
    torch.testing.assert_close(clusters.weight.mean(), torch.tensor(1.0))
    assert difference(weights(clusters.head), weights(clusters.fixed)) == 0
    assert clusters.head.bias.abs().sum() > 0
    model = PreTrainingModel.from_pretrained(tmp_path / "checkpoint-6")
    assert difference(weights(state_of(model).clusters), weights(clusters)) == 0


def test_samix_c_teaches_the_mixer_once_there_are_clusters():
    model = model_of("moco", "samix", mask_loss=0.0, **CLUSTERED)
    state = state_of(model)
    norms = []
    for _ in range(2):
        model.zero_grad()
        model(views(), mix_key=KEY).loss.backward()
        assert all(p.grad is not None for p in [*state.mixer.parameters(), *state.clusters.head.parameters()])
        norms.append(sum(float(p.grad.norm()) for p in state.mixer.parameters()))
        torch.nn.init.normal_(state.clusters.head.weight)
        model.after_optimizer_step(1, 10)  # the second
    assert norms[0] == 0 < norms[1]


# -- SDMP -------------------------------------------------------------------------------------------------------------------


def test_sdmp_of_whole_images_is_mocov3():
    """Both directions: a mixture without a partner is its image, and has nothing in common with its partner's."""
    found, pair = [], views()
    for mix in ("vanilla", "sdmp"):
        model = model_of("mocov3", mix, projector_norm="none", predictor_norm="none", temperature=0.002)
        model.eval()  # statistics of batch norms, which the key network would take of one batch more
        step, state = model.pretext.step, state_of(model)
        images = list(pair.unbind(1))
        if mix == "vanilla":
            out = step.step(model.pretext.parts, state, model.backbone, images, {}, torch.Generator())
        else:
            plan = alone(6, 2)
            out = step.pasted(model.pretext.parts, state, model.backbone, images, [plan, plan], images)
        found.append(out.loss)
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


def test_sdmp_mixes_pixels_and_counts_what_mixtures_share():
    """Of one-hot images: what two mixtures have in common is what the formula says."""
    policy = pretext("sdmp", "mocov3").sample
    images = torch.eye(4)[:, :, None, None].expand(-1, -1, 32, 32).contiguous()
    rng = torch.Generator().manual_seed(0)
    sides = policy.sides(4, rng)
    plans = [policy.pasted(images, sides, rng) for _ in range(2)]
    assert torch.equal(plans[0].weight, plans[1].weight)  # the same sides
    assert not torch.equal(plans[0].mask.edges, plans[1].mask.edges)  # in places of their own
    mixed = blend(plans[0], images)
    shares = mixed.mean((2, 3))
    torch.testing.assert_close(shares, mix_targets(plans[0], torch.eye(4)), atol=1e-5, rtol=0)
    assert ((plans[0].weight > 0.05) & (plans[0].weight < 0.95)).all()
    common = torch.stack([torch.minimum(shares[i], shares[3 - i]).sum() for i in range(4)])
    weight = in_common(plans[0])
    torch.testing.assert_close(weight[:, 1] / weight[:, 0], common, atol=1e-5, rtol=0)


def test_networks_with_two_classifiers_are_refused():
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 8, "patch_size": 4}
    with refuses(
        "pre-training needs a network with one classifier, whose input it trains, got DeiTForImageClassificationWithTeacher with 2"
    ):
        PreTrainingModel(DeiTForImageClassificationWithTeacher(DeiTConfig(**shape, num_labels=3)), "imix", "simclr")
