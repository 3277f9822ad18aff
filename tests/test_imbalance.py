"""Class counts reach policies, labels and losses. Remix, Balanced-MixUp, CMO and deferred re-weighting follow papers and code."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import ConcatDataset, Subset
from transformers import Trainer

from hf_mixup import MethodChoice, MixupCallback, MixupCollator, MixupLoss, MixupModel, get_method
from hf_mixup.core.losses import ClassBalanced, CrossEntropy
from hf_mixup.core.plan import MixPlan, onehot
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import MixKey, keyed
from hf_mixup.data.dataset import class_counts_of, labels_of
from refusals import refuses
from small import Images, trainer, vit
from test_collator import plain_arguments

COUNTS = (500, 100, 20, 5)


def uneven(count=40):
    data = Images(count)
    data.labels = torch.tensor(([0] * 6 + [1] * 3 + [2])[:10] * (count // 10))
    return data


# -- Remix --------------------------------------------------------------------------------------------------------------------


def remix(n_i, n_j, lam, kappa, tau):
    """`remix_data` of github.com/ntucllab/imbalanced-DL (deepimblearn/utils), whose cases are those of the paper's lambda_y:
    `if n_i / n_j >= kappa and lam < tau: 0; elif n_i / n_j <= 1 / kappa and 1 - lam < tau: 1; else lam`."""
    if n_i / n_j >= kappa and lam < tau:
        return 0.0
    if n_i / n_j <= 1 / kappa and 1 - lam < tau:
        return 1.0
    return lam


@pytest.mark.parametrize(("kappa", "tau"), [(3.0, 0.5), (2.0, 0.75), (5.0, 0.125), (1.0, 1.0)])
def test_remix_weights_are_the_cases_of_the_paper(kappa, tau):
    labels = torch.arange(4).repeat_interleave(4)
    partner, lam = torch.arange(16) % 4 * 4, torch.rand(16, generator=keyed(1))
    lam[:4] = torch.tensor([0.0, tau, 1 - tau, 1.0])
    policy = get_method("remix", kappa=kappa, tau=tau, class_counts=COUNTS).label
    weight = policy.weights(MixPlan.pair(partner, None, lam), Signals(targets=onehot(labels, 4)))
    expected = [remix(COUNTS[labels[i]], COUNTS[labels[partner[i]]], float(lam[i]), kappa, tau) for i in range(16)]
    assert_close(weight[:, 0], torch.tensor(expected))
    assert_close(weight.sum(1), torch.ones(16))
    assert sum(value in (0, 1) for value in expected) > 0


def test_remix_in_every_way_to_mix():
    """Pixels are those of mixup, labels are not: in a call, in its plan, in the collator and in the model's step."""
    images, labels = torch.randn(12, 3, 16, 16), torch.tensor([0, 1, 2, 3] * 3)
    remixed, plain = get_method("remix", class_counts=COUNTS), get_method("mixup")
    (mixed, targets), (same, others) = (method(images, labels, 4, keyed(2)) for method in (remixed, plain))
    assert torch.equal(mixed, same)
    assert not torch.equal(targets, others)
    plan = remixed.plan(images, labels, keyed(2), num_labels=4)
    assert_close((plan.weight[:, :, None] * onehot(labels, 4)[plan.index]).sum(1), targets)
    out = MixupModel(vit(), remixed).train()(images, labels, MixKey(1, 0, 0))
    lam = plain.sample.plan(images.shape, MixKey(1, 0, 0).own_rng(), Signals())
    expected = remixed.label.weights(lam, Signals(targets=onehot(labels, 4)))
    assert_close(out.targets, (expected[:, :, None] * onehot(labels, 4)[lam.index]).sum(1))
    torch.manual_seed(3)
    collated = MixupCollator(remixed, 4)([{"pixel_values": image, "labels": int(y)} for image, y in zip(images, labels, strict=True)])
    torch.manual_seed(3)
    unlike = MixupCollator(plain, 4)([{"pixel_values": image, "labels": int(y)} for image, y in zip(images, labels, strict=True)])
    assert torch.equal(collated["pixel_values"], unlike["pixel_values"])
    assert not torch.equal(collated["labels"], unlike["labels"])


# -- draws by inverse class frequency -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cmo", "balancedmixup"])
@pytest.mark.parametrize("counts", [COUNTS, None])
def test_partners_are_drawn_by_inverse_class_frequency(name, counts):
    """As a WeightedRandomSampler with weights `1 / count` (agaldran/balanced_mixup utils/get_loaders.py, naver-ai/cmo) would of the batch."""
    labels, draws = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2]), 4000
    policy, signals = get_method(name, class_counts=counts).sample, Signals(targets=onehot(labels, 4))
    partners = torch.cat([policy.plan((8, 3, 8, 8), keyed(5, key), signals).partners[:, 0] for key in range(draws // 8)])
    weight = 1 / torch.tensor(counts or (4, 3, 1, 1)).double()[labels]
    expected = weight / weight.sum()
    seen = partners.bincount(minlength=8) / len(partners)
    assert ((seen - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt()).all(), (seen, expected)


def test_balanced_mixup_is_that_of_the_authors_code():
    """train_lt_mxp.py of github.com/agaldran/balanced_mixup: `lam = np.random.beta(a=do_mixup, b=1);
    inputs = (1 - lam) * inputs + lam * balanced_inputs`, labels alike."""
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 0])
    method = get_method("balancedmixup", class_counts=COUNTS)
    plan = method.plan(images, labels, keyed(1), num_labels=4)
    lam = 1 - plan.lam[:, None, None, None]
    mixed, targets = method(images, labels, 4, keyed(1))
    assert_close(mixed, (1 - lam) * images + lam * images[plan.partners[:, 0]], atol=1e-6, rtol=1e-5)
    flat = lam[:, 0, 0]
    assert_close(targets, (1 - flat) * onehot(labels, 4) + flat * onehot(labels, 4)[plan.partners[:, 0]])
    for alpha in (0.1, 0.5, 1.0):
        policy, signals = get_method("balancedmixup", alpha=alpha).sample, Signals(targets=onehot(labels, 4))
        drawn = torch.cat([1 - policy.plan((6, 3, 8, 8), keyed(key), signals).lam for key in range(500)])
        reference = torch.from_numpy(np.random.default_rng(0).beta(alpha, 1, 3000))
        assert abs(drawn.double().mean() - reference.mean()) < 5 * float(reference.std()) * (2 / 3000) ** 0.5


# -- deferred re-weighting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999])
def test_weights_are_those_of_ldam_drw(beta):
    """cifar_train.py of github.com/kaidic/LDAM-DRW: `effective_num = 1.0 - np.power(betas[idx], cls_num_list);
    per_cls_weights = (1.0 - betas[idx]) / np.array(effective_num); per_cls_weights / np.sum(per_cls_weights) * len(cls_num_list)`."""
    effective = 1.0 - np.power(beta, COUNTS)
    expected = (1.0 - beta) / np.array(effective)
    expected = expected / np.sum(expected) * len(COUNTS)
    loss = ClassBalanced(160, beta, COUNTS)
    assert_close(torch.tensor(loss.at(160, 200).weight), torch.from_numpy(expected).float())
    assert loss.at(159, 200) == CrossEntropy()
    logits, labels = torch.randn(8, 4), torch.arange(8) % 4
    reference = F.cross_entropy(logits, labels, weight=torch.from_numpy(expected).float(), reduction="none")
    assert_close(loss.at(199, 200)(logits, onehot(labels, 4)), reference)
    assert_close(torch.tensor(ClassBalanced(0, 1.0, COUNTS).at(0, 1).weight), (4 / sum(1 / n for n in COUNTS)) / torch.tensor(COUNTS))


def test_the_epoch_of_the_key_switches_the_weights_on():
    images, labels = Images(8).pixels, Images(8).labels
    loss = ClassBalanced(2, class_counts=COUNTS)
    for mixed in (0, 1):
        torch.manual_seed(0)
        model = MixupModel(vit(), "mixup", loss=loss).train()
        for epoch, expected in ((1, CrossEntropy()), (2, loss.at(2, 4))):
            key = MixKey(1, 0, 0, epoch=epoch, epochs=4)
            out = model(images, labels, key, mixed=mixed)
            assert_close(out.losses, expected(out.logits, out.targets))
    with refuses("classbalanced with start_epoch=2 needs the epoch, got none"):
        model(images, labels, MixKey(1, 0, 0))
    with refuses("needs the epoch, got none"):
        MixupLoss(loss=loss)(torch.randn(8, 4), labels)
    with refuses("classbalanced needs class_counts"):
        ClassBalanced()(torch.randn(8, 4), onehot(labels, 4))


# -- where counts come from ---------------------------------------------------------------------------------------------------


def test_data_sets_say_their_labels():
    from datasets import Dataset

    data = uneven()
    assert class_counts_of(data, 4) == (24, 12, 4, 0)
    assert class_counts_of(Subset(data, range(10)), 4) == (6, 3, 1, 0)
    assert class_counts_of(ConcatDataset([data, Subset(data, [9])]), 4) == (24, 12, 5, 0)
    table = Dataset.from_dict({"label": [0, 0, 2], "text": ["a", "b", "c"]})
    assert class_counts_of(table.with_transform(lambda row: pytest.fail("read a row")), 4) == (2, 0, 1, 0)
    assert class_counts_of(Dataset.from_dict({"label": ["a", "b"]}), 4) is None
    assert class_counts_of(Dataset.from_dict({"labels": [[1, 0, 1], [1, 0, 0]]}), 3) == (2, 0, 1)
    for nothing in (
        [{"labels": 1}],
        table.to_iterable_dataset(),
        Dataset.from_dict({"label": [0.5, 1.5]}),
        Dataset.from_dict({"label": [0, 9]}),
    ):
        assert class_counts_of(nothing, 4) is None
    assert labels_of(None) is None


@pytest.mark.parametrize("cache", [False, True])
def test_image_data_sets_say_their_labels_without_reading_an_image(cache, monkeypatch):
    import datasets

    from hf_mixup.data.dataset import ImageDataset
    from hf_mixup.data.processor import ImageFormat
    from images import picture

    table = datasets.Dataset.from_dict({"image": [picture(8, 8)] * 3, "label": [0, 0, 1]}).cast_column("image", datasets.Image())
    data = ImageDataset(table, "image", "label", ImageFormat(8).eval_transform(), cache=cache)
    monkeypatch.setattr(ImageDataset, "_read", lambda *args: pytest.fail("read an image"))
    assert class_counts_of(data, 4) == (2, 1, 0, 0)


@pytest.mark.parametrize("collator", [False, True])
def test_the_trainer_fills_counts_in_records_them_and_goes_on_from_them(tmp_path, collator):
    def run(**changes):
        if collator:
            return trainer(tmp_path, data=uneven(), data_collator=MixupCollator(["remix", "cmo"], 4), mix_rate=1.0, **changes)
        return trainer(tmp_path, data=uneven(), mix=["remix", "cmo"], **changes)

    done = run(max_steps=2, save_strategy="steps", save_steps=2)
    assert [method.counting for method in done.mixup_model.choice.methods] == [["label"], ["sample"]]
    done.train()
    done.save_model()
    described = json.loads((tmp_path / "mixup_config.json").read_text())["methods"]
    assert described[0]["label"]["class_counts"] == described[1]["sample"]["class_counts"] == [24, 12, 4, 0]
    if collator:
        assert done._train_collator.choice.methods[1].sample.class_counts == (24, 12, 4, 0)
    run(max_steps=4).train(resume_from_checkpoint=True)
    again = MixupModel.from_pretrained(tmp_path)
    assert again.choice.methods[1].sample.class_counts == (24, 12, 4, 0)
    if not collator:
        trainer(tmp_path / "again", again, data=uneven(), mix=["remix", "cmo"])


def test_a_stock_trainer_has_the_counts_of_its_data(tmp_path):
    callback = MixupCallback(MixupCollator("cmo", num_labels=4))
    Trainer(
        vit(), plain_arguments(tmp_path, max_steps=1), train_dataset=uneven(), compute_loss_func=MixupLoss(), callbacks=[callback]
    ).train()  # fmt: skip
    assert callback._mixing.choice.methods[0].sample.class_counts == (24, 12, 4, 0)


def test_deferred_weights_in_a_run(tmp_path):
    """From its epoch on the trainer's loss has weights of the data set's own counts."""
    done = trainer(tmp_path, data=uneven(), mix=["vanilla"], loss={"name": "classbalanced", "start_epoch": 1, "beta": 1}, max_steps=6)
    seen = []
    done.mixup_model.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((kwargs["mix_key"].epoch, out.losses.detach(), out.logits.detach(), out.targets)),
        with_kwargs=True,
    )
    done.train()
    weighted = ClassBalanced(0, 1, (24, 12, 4, 0))
    assert {epoch for epoch, *_ in seen} == {0, 1}
    for epoch, losses, logits, targets in seen:
        assert_close(losses, (weighted if epoch else CrossEntropy())(logits, targets))


def test_refusals_and_what_is_said_of_unknown_counts(tmp_path, caplog):
    rows = [uneven()[row] for row in range(8)]
    trainer(tmp_path, data=rows, mix=["cmo"])
    assert "cmo counts the classes of every batch, because the labels of list cannot be read" in caplog.text
    with refuses("classbalanced needs the number of images of each class, got list"):
        trainer(tmp_path, data=rows, loss="classbalanced")
    with refuses("class_counts needs one number for each of the 4 classes, got 3"):
        get_method("cmo", class_counts=(1, 2, 3))(Images(8).pixels, Images(8).labels, 4)
    with refuses("class_counts must list whole numbers of at least 0"):
        get_method("remix", class_counts=(1, -2))
    with refuses("'remix' weighs classes by how often they occur, got the loss MSE"):
        get_method("remix", loss="mse")
    with refuses("kappa must be a number from 1"):
        get_method("remix", kappa=0.5)
    with refuses("rebalancedlabels weighs pairs of images, got a plan of 4"):
        get_method("ricap", label="rebalancedlabels")(Images(8).pixels, Images(8).labels, 4)
    assert MethodChoice.build(["cmo", "mixup"]).counting == ["cmo"]
