"""AugMix: an image is mixed with chains of its own transforms, and a loss compares the views."""

import pytest
import torch
from torch.testing import assert_close
from transformers import Trainer

from hf_mixup import MixupCallback, MixupCollator, MixupLoss, MixupModel, get_method
from hf_mixup.core.jensenshannon import JensenShannon
from hf_mixup.core.losses import CrossEntropy
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import MixKey, keyed
from hf_mixup.policies import AugMix
from hf_mixup.steps import KeepClean
from refusals import refuses
from small import Images, difference, trainer, vit, weights
from test_collator import plain_arguments
from test_situations import batch

KEY = MixKey(3, 0, 5, 0, 0, 100)
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def augmented(images, key=1, **fields):
    return AugMix(**fields).plan(images.shape, keyed(key), Signals(images=images)).sources[0]


def bytes_as(images, mean, std):
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return (images / 255 - mean) / std


def test_views_differ_from_the_image_and_from_each_other():
    images, labels = batch(8)
    made = MixupModel(vit(), "augmix").train()(images, labels, KEY)
    assert made.logits.shape == (24, 4)
    first, second, clean = made.logits.chunk(3)
    assert not torch.allclose(first, clean)
    assert not torch.allclose(first, second)
    assert torch.equal(made.targets, torch.nn.functional.one_hot(labels, 4).float().repeat(3, 1))
    assert made.lam.eq(1).all()
    assert made.loss > made.losses.min()


def test_pixels_stay_in_range_and_near_the_image_where_the_share_is_small():
    raw = torch.randint(0, 256, (16, 3, 12, 20), generator=keyed(3)).float()
    images = bytes_as(raw, **IMAGENET)
    low, high = bytes_as(torch.zeros(1, 3, 1, 1), **IMAGENET), bytes_as(torch.full((1, 3, 1, 1), 255.0), **IMAGENET)
    for key in range(5):
        made = augmented(images, key, severity=10.0, **IMAGENET)
        assert (made >= low - 1e-4).all()
        assert (made <= high + 1e-4).all()
        assert not torch.equal(made, images)
    # a constant image is changed by no move of its inside, and by no contrast
    flat = bytes_as(torch.full((4, 3, 8, 8), 100.0), **IMAGENET)
    assert torch.isfinite(augmented(flat)).all()


def test_stretched_images_without_mean_and_std():
    """Without mean and std nothing but the range of values is lost."""
    raw = torch.randint(0, 256, (8, 3, 16, 16), generator=keyed(3)).float()
    raw[:, 0, 0, 0], raw[:, 0, 0, 1] = 0, 255
    scale = raw / 255 * 3 - 1
    known = augmented(bytes_as(raw, **IMAGENET), **IMAGENET)
    assert_close(
        augmented(scale),
        (known * torch.tensor(IMAGENET["std"])[:, None, None] + torch.tensor(IMAGENET["mean"])[:, None, None]) * 3 - 1,
        atol=1e-4,
        rtol=0,
    )


def test_an_image_is_augmented_alike_whatever_the_dtype_and_rows_have_draws_of_their_own():
    images = torch.randn(6, 3, 16, 16, generator=keyed(2)).bfloat16()
    assert augmented(images).dtype == torch.bfloat16
    same = images[:1].expand(6, -1, -1, -1).float()
    assert len({tuple(row.flatten()[:50].tolist()) for row in augmented(same, severity=10.0)}) == 6


def test_stock_loss_and_model_compare_the_collators_views_alike():
    """With repeats, whose views lie apart in the batch, and in batches that were not mixed."""
    data = Images(6)
    collator = MixupCollator("augmix", num_labels=4, mix_rate=0.5, mix_repeat=2)
    made = [collator.mixed([data[i] for i in range(6)]) for _ in range(20)]
    for wanted in ({"augmix"}, {"vanilla"}, {"augmix", "vanilla"}):
        found = next(found for found, _, names in made if set(names) == wanted)
        assert found["pixel_values"].shape == (36, 3, 16, 16)
        network = vit().train()
        network.classifier.weight.data.mul_(50)  # or all views would look alike to it
        logits = network(found["pixel_values"]).logits
        stock = MixupLoss(loss=JensenShannon())(logits, found["labels"])
        ours = MixupModel(network, "augmix").train()(found["pixel_values"], found["labels"], mixed=collator.choice.rows)
        assert_close(ours.loss, stock)
        # by hand: the views of an image are 12 rows apart
        p = logits.softmax(1).view(3, 12, 4)
        divergence = (p * (p.log() - p.mean(0).log())).sum(2).mean()
        clean = torch.nn.functional.cross_entropy(logits[24:], found["labels"][24:])
        assert_close(stock, clean + 12 * divergence, atol=1e-4, rtol=1e-4)
        assert (divergence > 1e-5) == ("augmix" in wanted)


def test_both_trainers_take_it(tmp_path):
    settings = {"max_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 6}
    collator = MixupCollator("augmix", num_labels=4, mix_rate=0.7)
    for network, data_collator in ((vit(), collator), (vit(), None)):
        before = weights(network)
        done = trainer(tmp_path, network, mix=["mixup", "cutmix"] if data_collator else ["augmix"], data_collator=data_collator, **settings)
        done.train()
        assert difference(before, weights(network)) > 0
    network = vit()
    Trainer(
        network, plain_arguments(tmp_path, **settings), train_dataset=Images(), compute_loss_func=MixupLoss(loss=JensenShannon()),
        callbacks=[MixupCallback(collator)],
    ).train()  # fmt: skip


def test_batches_that_were_not_mixed_have_the_plain_loss():
    """By mix_rate, after mix_off_epoch, of one image: rows by themselves, and no view to compare."""
    images, labels = batch(6)
    model = MixupModel(vit(), ["augmix"], mix_rate=0.0).train()
    plain = MixupModel(vit(), "vanilla").train()(images, labels, KEY).loss
    assert_close(model(images, labels, KEY).loss, plain)
    assert_close(model(images, labels, KEY, mixed=1).loss, plain)
    assert_close(model(images[:1], labels[:1], KEY).loss, MixupModel(vit(), "vanilla").train()(images[:1], labels[:1], KEY).loss)
    # the same image three times: the divergence of equal views is 0
    assert_close(model(images.repeat(3, 1, 1, 1), labels.repeat(3), mixed=3).loss, plain)


def test_a_loss_of_views_needs_views():
    with refuses(r"JensenShannon compares 3 views of every image in one pass, got 'cutmix' with the step Standard\(\); set step="):
        MixupModel(vit(), get_method("cutmix", loss=JensenShannon()))
    with refuses(r"JensenShannon compares 4 views of every image in one pass, got 'augmix' with the step KeepClean\(.*\); set step="):
        MixupModel(vit(), get_method("augmix", views=4))
    images, labels = batch(6)
    model = MixupModel(vit(), get_method("cutmix", loss=JensenShannon(), step=KeepClean(mixtures=2))).train()
    with refuses("JensenShannon compares views of one label, got 'cutmix', which mixes the labels of several images; use 'augmix'"):
        model(images, labels, KEY)
    loss = JensenShannon()
    with refuses(r"JensenShannon compares 3 views of every image, got 5 rows whose targets differ between the views; use"):
        loss(torch.randn(5, 4), torch.eye(4)[torch.arange(5) % 4])
    with refuses(r"JensenShannon compares 3 views of every image, got 6 rows whose targets differ between the views; use"):
        loss(torch.randn(6, 4), torch.eye(4)[torch.tensor([0, 1, 0, 1, 0, 2])])
    assert loss.single() == loss.plain() == CrossEntropy()
    for fields in ({"severity": 0.0}, {"width": 0}, {"depth": 0}, {"mean": (0.5,)}, {"weight": -1.0}):
        with pytest.raises(ValueError, match="must be"):
            get_method("augmix", **fields)


def test_without_the_divergence_it_is_augmentation():
    """`--no-jsd` of the authors: cross-entropy of the mixtures."""
    method = get_method("augmix", loss=CrossEntropy(), step={"name": "standard"})
    assert MixupModel(vit(), method).train()(*batch(6), KEY).logits.shape == (6, 4)
    assert get_method("augmix").step == KeepClean(mixtures=2)
