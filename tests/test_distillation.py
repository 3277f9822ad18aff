"""Distillation with every method: the teacher sees the student's mixtures, the student learns from it, and no checkpoint contains it."""

import dataclasses
import json

import pytest
import torch
import transformers
from safetensors import safe_open
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForImageClassification

import tiny
from hf_mixup import METHODS, MixupCollator, MixupModel, MixupTrainer, get_method
from hf_mixup.core.rng import MixKey
from hf_mixup.networks.teachers import Normalisation
from refusals import refuses
from small import Images, arguments, difference, network_for, resnet, trainer, vit, weights
from test_situations import FEW, batch, still
from test_teachers import PROCESSORS
from test_trainer import _StopAt

KEY = MixKey(3, 0, 5, 0, 0, 100)
HIDDEN = {"manifoldmix", "alignmix", "patchup", "moex", "nfm", "mixstyle", "tmix"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    model = vit()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # or it would say the same of everything
    model.save_pretrained(folder)
    return str(folder)


def passed(network):
    """What comes to a network from here on."""
    seen = []
    network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["pixel_values"].detach().clone(), module.training)), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_shows_its_mixtures_to_the_teacher_or_says_that_it_has_none(name, teacher):
    method = get_method(name, **FEW.get(name, {}))
    if name in HIDDEN:
        with refuses(f"a teacher must see the network's mixtures, got '{name}', which mixes inside the network"):
            MixupModel(network_for(name), method, teacher=teacher)
        return
    images, labels = batch()
    torch.manual_seed(0)
    plain = MixupModel(still(network_for(name)), method).train()(images, labels, KEY)
    torch.manual_seed(0)
    model = MixupModel(still(network_for(name)), method, teacher=teacher, distillation_weight=0.3, distillation_temperature=2.0).train()
    shown, told = passed(model.backbone), passed(model.distiller.teacher.network)
    out = model(images, labels, KEY)
    assert out.loss.requires_grad
    assert_close(out.logits, plain.logits)
    assert_close(out.targets, plain.targets)
    rows = torch.cat([seen for seen, _ in told])
    assert len(rows) == len(out.logits)
    assert not any(training for _, training in told)
    assert any(torch.equal(seen, rows[: len(seen)]) for seen, training in shown if training)
    if name not in ("vanilla", "recursivemix"):  # whose first step is not mixed
        assert not torch.equal(rows[: len(images)], images)
    # the formula of Hinton et al., with their factor T squared
    with torch.no_grad():
        answers = model.distiller.teacher.network(pixel_values=rows).logits
    p, q = (logits.detach() / 2 for logits in (out.logits, answers))
    taught = 4 * (q.softmax(1) * (q.log_softmax(1) - p.log_softmax(1))).sum(1)
    assert_close(out.losses, 0.7 * plain.losses + 0.3 * taught, atol=1e-5, rtol=1e-4)
    assert_close(out.loss, 0.7 * plain.loss + 0.3 * taught.mean(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [(8, 1), (1, 0)], ids=["mixed by a collator", "one image"])
def test_batches_that_come_mixed_or_stay_unmixed_are_taught_too(rows, teacher):
    count, mixed = rows
    images, labels = Images(count).pixels, torch.rand(count, 4).softmax(1)
    model = MixupModel(vit(), "cutmix", teacher=teacher, distillation_weight=1.0).train()
    told = passed(model.distiller.teacher.network)
    out = model(images, labels, KEY, mixed=mixed)
    assert torch.equal(told[0][0], images)
    answers = model.distiller.teacher.network(pixel_values=images).logits
    assert_close(out.losses, F.kl_div(out.logits.log_softmax(1), answers.softmax(1), reduction="none").sum(1), atol=1e-6, rtol=1e-4)


def test_function_matching_learns_nothing_of_labels(teacher):
    images, labels = batch()
    found = []
    for order in (labels, labels.flip(0)):
        model = MixupModel(vit(), "mixup", teacher=teacher, distillation_weight=1.0).train()
        out = model(images, order, KEY)
        out.loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert difference(*found) == 0
    assert all(p.grad is None and not p.requires_grad for p in model.distiller.teacher.network.parameters())


def two_heads(**config):
    torch.manual_seed(0)
    return transformers.DeiTForImageClassificationWithTeacher(
        transformers.DeiTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4, num_labels=4,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **config,
        )
    )  # fmt: skip


@pytest.mark.parametrize("hard", [True, False])
def test_two_heads_learn_labels_and_teacher_apart(hard, teacher):
    """losses.py of github.com/facebookresearch/deit: `base_loss = base_criterion(outputs, labels)`; hard: `cross_entropy(outputs_kd,
    teacher_outputs.argmax(dim=1))`, soft: `kl_div(log_softmax(outputs_kd / T), log_softmax(teacher_outputs / T), reduction='sum',
    log_target=True) * (T * T) / outputs_kd.numel()`, whose mean over classes too is ours over rows alone;
    `loss = base_loss * (1 - alpha) + distillation_loss * alpha`."""
    images, labels = batch()
    student = two_heads()
    heat = 1.0 if hard else 3.0
    model = MixupModel(student, "cutmix", teacher=teacher, hard_distillation=hard, distillation_temperature=heat).train()
    told = passed(model.distiller.teacher.network)
    out = model(images, labels, KEY)
    heads = student(pixel_values=told[0][0])
    with torch.no_grad():
        answers = model.distiller.teacher.network(pixel_values=told[0][0]).logits
    assert_close(out.logits, heads.cls_logits)
    base = -(out.targets * heads.cls_logits.log_softmax(1)).sum(1).mean()
    if hard:
        kd = F.cross_entropy(heads.distillation_logits, answers.argmax(1))
    else:
        soft = [(logits / heat).log_softmax(1) for logits in (heads.distillation_logits, answers)]
        kd = F.kl_div(*soft, reduction="sum", log_target=True) * heat**2 / len(answers)
    assert_close(out.loss, 0.5 * base + 0.5 * kd)
    out.loss.backward()
    assert student.distillation_classifier.weight.grad.abs().sum() > 0
    model.eval()
    assert_close(model(told[0][0]).logits, (heads.cls_logits + heads.distillation_logits) / 2)


def test_two_heads_through_the_trainer(tmp_path, teacher):
    fields = {"mix": ["mixup", "cutmix"], "distill_from": teacher, "hard_distillation": True, "max_steps": 6}
    data = Images(40)
    whole = trainer(tmp_path / "whole", two_heads(), data, Images(16, seed=1), **fields)
    before = weights(whole.model)
    whole.train()
    assert all((whole.mixup_model.state_dict()[name] != value).any() for name, value in before.items() if "classifier.weight" in name)
    trainer(tmp_path / "cut", two_heads(), data, callbacks=[_StopAt(3)], **fields).train()
    resumed = trainer(tmp_path / "cut", two_heads(), data, **fields)
    resumed.train(resume_from_checkpoint=True)
    assert difference(weights(whole.model), weights(resumed.model)) == 0
    whole.save_model(tmp_path / "out")
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert type(plain) is transformers.DeiTForImageClassificationWithTeacher
    with torch.no_grad():
        assert_close(plain(Images(16, seed=1).pixels).logits, torch.from_numpy(whole.predict(Images(16, seed=1)).predictions))


def test_a_checkpoint_names_the_teacher_and_does_not_hold_it(tmp_path, teacher):
    fields = {"mix": ["mixup"], "max_steps": 4, "distillation_weight": 0.25}
    done = trainer(tmp_path / "run", resnet(), Images(40), distill_from=teacher, save_strategy="steps", save_steps=2, **fields)
    assert not [name for name in done.model.state_dict() if "teacher" in name or "distil" in name]
    frozen = weights(done.mixup_model.distiller.teacher.network)
    done.train()
    assert difference(frozen, weights(done.mixup_model.distiller.teacher.network)) == 0
    done.save_model()
    config = json.loads((tmp_path / "run/mixup_config.json").read_text())
    assert config["distillation"] == {"teacher": teacher, "temperature": 1.0, "weight": 0.25, "hard": False}
    with safe_open(tmp_path / "run/model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(resnet().state_dict())
    assert not (tmp_path / "run/mixup").exists()
    again = MixupModel.from_pretrained(tmp_path / "run")
    assert again.to_dict() == done.mixup_model.to_dict()
    assert f"{teacher}, at temperature 1, 0.25 of the loss" in str(done._hyperparameters())
    with refuses(r"a resumed run must mix as before, got other settings \(distillation: .*0.25.* then, null now\)"):
        trainer(tmp_path / "run", resnet(), Images(40), mix=["mixup"], max_steps=6).train(resume_from_checkpoint=True)


def test_the_teacher_sees_its_own_normalisation_and_size(tmp_path):
    """A larger teacher, of another normalisation: the same pixels reach both."""
    student, own = (Normalisation.of_processor(PROCESSORS[name]) for name in ("vit", "bit"))
    tiny.network("vit").save_pretrained(tmp_path)
    PROCESSORS["bit"].save_pretrained(tmp_path)
    model = MixupModel(vit(num_labels=5), "vanilla", teacher=tmp_path).train()
    pixels = torch.rand(4, 3, 16, 16)
    told = passed(model.distiller.teacher.network)
    with refuses("training images of unknown normalisation"):
        model(student.images(pixels), torch.arange(4), KEY)
    model.normalisation = student
    model(student.images(pixels), torch.arange(4), KEY)
    expected = own.images(F.interpolate(pixels, (tiny.SIDE, tiny.SIDE), mode="bilinear", align_corners=False))
    assert_close(told[-1][0], expected, atol=1e-5, rtol=1e-4)


def test_classes_are_matched_by_name(tmp_path):
    def named(network, names):
        network.config.id2label, network.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
        return network

    named(vit(), "dcba").save_pretrained(tmp_path / "turned")
    images, labels = batch()
    outputs = [
        MixupModel(student, "mixup", teacher=tmp_path / "turned", distillation_weight=1.0).train()(images, labels, KEY)
        for student in (named(resnet(), "abcd"), resnet())
    ]
    answers = vit()(pixel_values=images).logits
    told = MixupModel(named(resnet(), "abcd"), "vanilla", teacher=tmp_path / "turned", distillation_weight=1.0).train()
    out = told(images, labels, KEY)
    assert_close(
        out.losses, F.kl_div(out.logits.log_softmax(1), answers[:, [3, 2, 1, 0]].softmax(1), reduction="none").sum(1), atol=1e-6, rtol=1e-4
    )
    assert not torch.allclose(outputs[0].losses, outputs[1].losses)
    with refuses("a teacher must know the classes of the network by name, got .*turned without 'x'"):
        MixupModel(named(resnet(), "abcx"), "mixup", teacher=tmp_path / "turned")
    with refuses("a teacher must know the 5 classes of the network, got .*turned with 4"):
        MixupModel(vit(num_labels=5), "mixup", teacher=tmp_path / "turned")


def test_several_labels_have_a_sigmoid(tmp_path):
    """Against the divergence of two Bernoulli distributions from torch."""
    vit(problem_type="multi_label_classification").save_pretrained(tmp_path)
    images, labels = Images(8).pixels, torch.randint(2, (8, 4)).float()
    model = MixupModel(resnet(), "mixup", loss="bce", teacher=tmp_path, distillation_weight=1.0, distillation_temperature=2.0).train()
    told = passed(model.distiller.teacher.network)
    out = model(images, labels, KEY)
    answers = model.distiller.teacher.network(pixel_values=told[0][0]).logits
    q, p = (torch.distributions.Bernoulli(logits=logits / 2) for logits in (answers, out.logits))
    assert_close(out.losses, 4 * torch.distributions.kl_divergence(q, p).mean(1), atol=1e-6, rtol=1e-4)


def test_training_in_half_precision_with_compilation_and_accumulation(tmp_path, teacher):
    done = trainer(
        tmp_path, resnet(), Images(40), mix=["cutmix"], distill_from=teacher, bf16=True, gradient_accumulation_steps=2, max_steps=2, logging_steps=1
    )  # fmt: skip
    done.train()
    model = MixupModel(vit(), "cutmix", teacher=teacher).train()
    images, labels = batch()
    expected = model(images, labels, KEY).loss
    model.compile_backbone(backend="eager")
    assert_close(model(images, labels, KEY).loss, expected)


def test_refusals(tmp_path, teacher):
    with refuses("distillation_weight is for a teacher, got 0.9 without one"):
        arguments(tmp_path, distillation_weight=0.9)
    with refuses("hard_distillation is for a teacher, got True without one"):
        arguments(tmp_path, hard_distillation=True)
    with refuses("hard distillation has no temperature, got distillation_temperature=2"):
        arguments(tmp_path, distill_from=teacher, hard_distillation=True, distillation_temperature=2.0)
    with refuses("distillation_temperature must be a positive"):
        MixupModel(vit(), "cutmix", teacher=teacher, distillation_temperature=0.0)
    with refuses("distillation_weight must be a number from 0 to 1"):
        MixupModel(vit(), "cutmix", teacher=teacher, distillation_weight=1.5)
    with refuses("'automix' learns to mix from the loss on labels, got distillation_weight=1"):
        MixupModel(resnet(), "automix", teacher=teacher, distillation_weight=1.0)
    with refuses("a teacher must give probabilities of classes, got the loss MSE"):
        MixupModel(vit(), "mixup", loss="mse", teacher=teacher)
    with refuses("teacher must be the Hub id or folder of a classifier", TypeError):
        MixupTrainer(vit(), arguments(tmp_path), teacher=vit())
    with refuses("the teacher must be given once, got 'other' and"):
        MixupTrainer(vit(), arguments(tmp_path, distill_from=teacher), teacher="other")
    with refuses("compute_loss_func replaces the loss, got a teacher"):
        MixupTrainer(vit(), arguments(tmp_path), teacher=teacher, compute_loss_func=lambda outputs, labels, num_items_in_batch=None: 0)
    with refuses("must agree on how to mix, got distillation=None in the MixupModel"):
        MixupTrainer(MixupModel(vit(), "cutmix"), arguments(tmp_path, mix=["cutmix"]), teacher=teacher)
    with pytest.raises((ValueError, OSError), match="nobody/nothing"):
        MixupTrainer(vit(), arguments(tmp_path), teacher="nobody/nothing")


def test_with_a_collator_and_ema(tmp_path, teacher):
    done = trainer(
        tmp_path, vit(), Images(40), data_collator=MixupCollator("cutmix", 4),
        distill_from=teacher, ema_decay=0.9, max_steps=3,
    )  # fmt: skip
    told = passed(done.mixup_model.distiller.teacher.network)
    done.train()
    assert len(told) == 3
    assert dataclasses.asdict(done.mixup_model.distiller.how)["teacher"] == teacher
