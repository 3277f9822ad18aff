"""Clean images beside their mixtures: in the model, in the collator, in both Trainers."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hf_mixup import MixupCollator, MixupLoss, MixupModel, get_method
from hf_mixup.core.losses import BCE, CrossEntropy, Decoupled
from hf_mixup.core.rng import MixKey, keyed
from hf_mixup.methods import MethodChoice
from hf_mixup.steps import KeepClean
from refusals import refuses
from small import Images, difference, resnet, trainer, vit, weights
from test_situations import batch, keys, still

KEY = MixKey(3, 0, 5, 0, 0, 100)


def loss_of(name, network, images, labels, key=KEY, **fields):
    torch.manual_seed(0)
    return MixupModel(network, get_method(name, **fields)).train()(images, labels, key)


@pytest.mark.parametrize("weight", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("loss", [CrossEntropy(), CrossEntropy(0.1), Decoupled(), BCE()], ids=str)
@pytest.mark.parametrize(("name", "network"), [("mixup", resnet), ("transmix", vit)])
def test_the_loss_is_the_weighted_mean_of_mixed_and_clean(name, network, loss, weight):
    """Two passes, each normalised by itself: exactly those of the method alone and of plain training."""
    images, labels = batch()
    step = KeepClean(clean_weight=weight, one_pass=False)
    both = loss_of(name, still(network()), images, labels, loss=loss, step=step)
    mixed, clean = (loss_of(part, still(network()), images, labels, loss=loss) for part in (name, "vanilla"))
    assert_close(both.loss, (mixed.loss + weight * clean.loss) / (1 + weight), atol=1e-6, rtol=1e-6)
    assert_close(both.losses.mean(), both.loss)
    assert_close(both.logits, torch.cat([mixed.logits, clean.logits]), atol=1e-6, rtol=1e-5)
    assert_close(both.targets, torch.cat([mixed.targets, clean.targets]))
    assert torch.equal(both.lam, torch.cat([mixed.lam, torch.ones(len(images))]))


@pytest.mark.parametrize(("name", "network"), [("cutmix", resnet), ("mergemix", vit)])
def test_a_mixup_batch_beside_the_mixtures(name, network):
    """With `clean_alpha` the rows beside are those of Mixup with one lam, the second loss of MergeMix."""
    images, labels = batch()
    lams = []
    for key in keys(4):
        both = loss_of(name, still(network()), images, labels, key, step=KeepClean(clean_alpha=0.8, one_pass=False))
        alone = loss_of(name, still(network()), images, labels, key, step={"name": "standard"})
        (lam,) = set(both.lam[6:].tolist())
        other = (both.targets[6:] - lam * torch.eye(4)[labels]) / (1 - lam)
        assert_close(other.sum(0), torch.eye(4)[labels].sum(0), atol=1e-4, rtol=0)  # a permutation of the labels
        assert_close(both.targets[:6], alone.targets)
        assert_close(both.logits[:6], alone.logits, atol=1e-6, rtol=1e-5)
        second = nn.functional.cross_entropy(both.logits[6:].float(), both.targets[6:])
        assert_close(both.loss, (alone.loss + second) / 2)
        lams.append(lam)
    assert len(set(lams)) == 4
    # of images of one colour, the mixture has its label's share of each
    colours = torch.eye(4)[labels][:, :3, None, None].expand(-1, -1, 16, 16).contiguous()
    seen = []
    model = MixupModel(still(network()), get_method("cutmix", step=KeepClean(clean_alpha=0.8))).train()
    handle = model.backbone.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True)
    out = model(colours, labels, KEY)
    handle.remove()
    assert_close(seen[0][6:].mean((2, 3)), out.targets[6:, :3], atol=1e-5, rtol=0)


def test_one_pass_gives_batch_norms_all_rows():
    images, labels = batch()
    together, apart = (loss_of("regmixup", resnet(), images, labels, one_pass=one_pass) for one_pass in (True, False))
    assert_close(together.targets, apart.targets)
    assert not torch.allclose(together.logits, apart.logits, atol=1e-3)
    moved = [module for module in resnet().modules() if isinstance(module, nn.BatchNorm2d)]
    assert moved
    # without batch norms there is no difference
    together, apart = (loss_of("regmixup", vit(), images, labels, one_pass=one_pass) for one_pass in (True, False))
    assert_close(together.logits, apart.logits, atol=1e-6, rtol=1e-5)
    assert_close(together.loss, apart.loss)


def test_transmix_reads_the_attention_of_its_own_rows():
    """In one pass with clean images, and with two mixtures, whose attention lies beside each other."""
    images, labels = batch()
    alone = loss_of("transmix", vit(), images, labels)
    beside = loss_of("transmix", vit(), images, labels, step=KeepClean(mixtures=2))
    assert_close(beside.targets[: len(images)], alone.targets)
    apart = loss_of("transmix", vit(), images, labels, step=KeepClean(mixtures=2, one_pass=False))
    assert_close(beside.targets, apart.targets)
    first, second, clean = beside.targets.chunk(3)
    assert not torch.allclose(first, second)
    assert torch.equal(clean, nn.functional.one_hot(labels, 4).float())


def test_an_unmixed_batch_counts_as_much_as_a_mixed_one(tmp_path):
    """Under accumulation, with mix_rate: the gradient is the mean over images, whatever rows each micro-batch had."""
    model = MixupModel(vit(), "regmixup", mix_rate=0.5).train()
    images, labels = batch(8)
    plain = {}
    for key in keys(12):
        out = model(images, labels, key)
        plain.setdefault(out.methods[0], []).append(out)
    assert set(plain) == {"regmixup", "vanilla"}
    clean = loss_of("vanilla", vit(), images, labels)
    for out in plain["vanilla"]:
        assert_close(out.loss, clean.loss)
    for out in plain["regmixup"]:
        assert_close(out.loss, (out.losses[:8].mean() + clean.loss) / 2)


@pytest.mark.parametrize("mix_repeat", [1, 2])
def test_stock_loss_and_model_weigh_the_collators_batches_alike(mix_repeat):
    """Two micro-batches, one mixed and one not: both Trainers divide by all rows, so the loss is the mean over images."""
    data = Images(12)
    collator = MixupCollator("regmixup", num_labels=4, mix_rate=0.5, mix_repeat=mix_repeat)
    made = [collator.mixed([data[i] for i in range(6 * k, 6 * k + 6)]) for k in (0, 1) for _ in range(20)]
    batches = [next(found for found, _, names in made if set(names) == {name}) for name in ("regmixup", "vanilla")]
    network = vit()
    images, rows = [], sum(len(found["labels"]) for found in batches)
    stock = ours = 0.0
    for mixed in batches:
        outputs = network.train()(mixed["pixel_values"])
        images.append(MixupLoss()(outputs, mixed["labels"]).item())
        stock += MixupLoss()(outputs, mixed["labels"], num_items_in_batch=rows * 4).item()
        model = MixupModel(network, "regmixup").train()
        ours += model(mixed["pixel_values"], mixed["labels"], mixed=collator.choice.rows).loss.item() * len(mixed["labels"]) / rows
    assert len(batches[0]["labels"]) == len(batches[1]["labels"]) == 12 * mix_repeat
    assert stock == pytest.approx(sum(images) / 2, rel=1e-5)
    assert ours == pytest.approx(stock, rel=1e-5)


def test_our_trainer_takes_the_collator(tmp_path):
    collator = MixupCollator(["regmixup", "cutmix"], num_labels=4, mix_rate=0.7)
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_steps": 6, "logging_steps": 6}
    done = trainer(tmp_path, vit(), data_collator=collator, **settings)
    done.train()
    entry = next(entry for entry in done.state.log_history if "loss" in entry)
    assert {"mix/regmixup", "mix/cutmix", "mix/vanilla"} <= set(entry)


def test_collator_lays_out_all_mixtures_then_all_clean_images():
    rows = [{"pixel_values": torch.full((3, 8, 8), float(i)), "labels": i, "column": torch.tensor(i)} for i in range(6)]
    made = MixupCollator("regmixup", num_labels=6, mix_repeat=2)(rows)
    first, second, clean, again = made["labels"].chunk(4)
    assert torch.equal(clean, torch.eye(6))
    assert torch.equal(again, torch.eye(6))
    assert not torch.equal(first, second)
    assert (first.max(1).values < 1).any()
    assert_close(made["pixel_values"].mean((1, 2, 3)), made["labels"] @ torch.arange(6.0), atol=1e-4, rtol=0)
    assert torch.equal(made["column"], torch.arange(6).repeat(4))


@pytest.mark.parametrize("size", [8, 96])
def test_every_batch_of_a_collator_has_as_many_rows(size):
    """Mixed, not mixed, by a method without clean images, of one image, or after mixing ended."""
    rows = [{"pixel_values": torch.full((3, size, size), float(i)), "labels": i % 4} for i in range(4)]
    collator = MixupCollator(["regmixup", "resizemix"], num_labels=4, mix_rate=0.6)
    seen = set()
    for _ in range(40):
        made, lam, names = collator.mixed(rows)
        assert len(made["labels"]) == len(made["pixel_values"]) == len(lam) == 8
        seen.add(names[0])
        if names[0] != "regmixup":
            assert torch.equal(*made["pixel_values"].chunk(2))
            assert torch.equal(*made["labels"].chunk(2))
        if names[0] == "vanilla":
            assert torch.equal(made["labels"][:4], torch.eye(4))
    assert seen == {"regmixup", "resizemix", "vanilla"}
    assert len(collator(rows[:1])["labels"]) == 2
    collator.mix_until_now()
    assert len(collator(rows)["labels"]) == 8


def test_a_plain_call_gives_the_clean_images_too():
    images, labels = batch()
    mixed, targets = get_method("regmixup", loss=CrossEntropy(0.1))(images, labels, 4, keyed(1))
    assert torch.equal(mixed[6:], images)
    assert mixed.shape == (12, 3, 16, 16)
    assert_close(targets.sum(1), torch.ones(12))
    assert_close(targets[6:].max(1).values, torch.full((6,), 0.925))


def test_what_a_collator_cannot_do_is_refused():
    for fields in ({"clean_weight": 2.0}, {"one_pass": False}, {"clean_alpha": 0.8}):
        with refuses(
            r"got 'regmixup', which needs a weight, a pass or a mixture of its own for clean images, so the model; use MixupTrainer"
        ):
            MixupCollator("regmixup", num_labels=4, mix_args={"regmixup": fields})
    two = get_method("cutmix", step=KeepClean(mixtures=2))
    with refuses(r"methods of a MixupCollator must keep the same number of clean images, got regmixup \+ cutmix; use one"):
        MixupCollator(["regmixup", two], num_labels=4)
    for fields in ({"clean_weight": 0.0}, {"mixtures": 0}, {"clean_alpha": -1.0}):
        with pytest.raises(ValueError, match=r"must be a"):
            get_method("regmixup", **fields)


def test_any_method_keeps_clean_images_by_its_step():
    choice = MethodChoice.build(["cutmix", "mixup"], mix_args={"cutmix": {"step": {"name": "keepclean", "clean_weight": 0.5}}})
    assert choice.methods[0].step == KeepClean(clean_weight=0.5)
    assert MethodChoice.from_dict(copy.deepcopy(choice.to_dict())) == choice
    out = MixupModel(resnet(), choice).train()(*batch(), KEY)
    assert len(out.targets) in (6, 12)


def test_resumed_with_accumulation_is_bit_identical(tmp_path):
    from test_trainer import _StopAt

    def run(folder, **changes):
        settings = {"mix_rate": 0.6, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_steps": 6}
        return trainer(folder, resnet(), Images(40), mix=["regmixup", "cutmix"], **settings, **changes)

    whole = run(tmp_path / "whole")
    whole.train()
    run(tmp_path / "cut", callbacks=[_StopAt(3)]).train()
    resumed = run(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert difference(weights(whole.model), weights(resumed.model)) == 0
