"""What people call in their own code: the plan of a method, MethodChoice instead of timm's Mixup, pairs of a torchvision data set, the loss."""

import pytest
import timm.data.mixup as timm_mixup
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader

from hf_mixup import METHODS, MethodChoice, MixupCollator, MixupLoss, MixupModel, blend, get_method, mix_targets
from hf_mixup.core.rng import keyed
from hf_mixup.method import needs_of_model
from small import vit

CLASSES = 7
IMAGE_ONLY = [name for name, method in METHODS.items() if not needs_of_model(method)]
DEIT = {"mix": ["mixup", "cutmix"], "alpha": [0.8, 1.0], "loss": {"name": "crossentropy", "smoothing": 0.1}}


def batch(size=6):
    rng = keyed(5)
    return torch.randn(size, 3, 20, 16, generator=rng), torch.randint(CLASSES, (size,), generator=rng)


@pytest.mark.parametrize("name", IMAGE_ONLY)
def test_a_call_mixes_by_the_plan(name):
    images, labels = batch()
    method = get_method(name)
    plan = method.plan(images, labels, keyed(1))
    mixed, targets = (rows[:6] for rows in method(images, labels, CLASSES, keyed(1)))  # the first mixture, where an image has several rows
    assert torch.equal(blend(plan, images), mixed)
    assert_close(mix_targets(plan, labels, CLASSES), targets)
    # what the docstring says of the plan holds
    masks = plan.dense_mask((20, 16))
    assert plan.partners.shape == (6, masks.shape[1] - 1)
    assert_close(masks.sum(1), torch.ones(6, 20, 16))
    assert_close(plan.lam, plan.weight[:, 0])
    if plan.sources is None:
        rows = torch.cat([torch.arange(6)[:, None], plan.partners], 1)
        assert_close((masks[:, :, None] * images[rows]).sum(1), mixed, atol=1e-5, rtol=1e-5)


def test_a_plan_is_refused_as_a_call_is():
    images, labels = batch()
    with pytest.raises(ValueError, match=r"transmix.*MixupTrainer"):
        get_method("transmix").plan(images)
    with pytest.raises(ValueError, match="one row for each of the 6 images, got 5"):
        get_method("cutmix").plan(images, labels[:5])
    with pytest.raises(TypeError, match="images must be a tensor"):
        get_method("cutmix").plan(None)


def test_a_choice_draws_each_method_as_often_as_it_says_and_mixes_by_it():
    images, labels = batch()
    choice = MethodChoice.build(["mixup", "cutmix"], [0.25, 0.75], num_labels=CLASSES)
    cut = 0
    for key in range(200):
        mixed, targets = choice(images, labels, generator=keyed(key))
        rng = keyed(key)
        method = choice.draw(rng)
        assert_close((mixed, targets), method(images, labels, CLASSES, rng))
        cut += method.name == "cutmix"
    assert abs(cut - 150) < 4 * (200 * 0.25 * 0.75) ** 0.5


def test_a_choice_stands_in_for_timm(monkeypatch):
    """timm's own training script calls `mixup_fn(input, target)`, and turns it off by `mixup_enabled`."""
    images, labels = batch()
    ours = MethodChoice.build(**DEIT, num_labels=CLASSES)
    theirs = timm_mixup.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    for step in range(20):
        torch.manual_seed(step)
        before = images.clone()
        mixed, targets = ours(images, labels)
        assert torch.equal(images, before)
        assert not torch.equal(mixed, images)
        expected = theirs(images.clone(), labels)[1]
        # both share the classes of a pair and smooth alike: each row sums to 1, and every class keeps the same least weight
        assert_close(targets.sum(1), torch.ones(6))
        assert_close(targets.amin(1), expected.amin(1))
    ours.mixup_enabled = theirs.mixup_enabled = False
    mixed, targets = ours(images, labels)
    assert torch.equal(mixed, images)
    assert_close(targets, theirs(images.clone(), labels)[1])
    ours.mixup_enabled = True
    assert not torch.equal(ours(images, labels)[0], images)


def test_a_choice_follows_the_global_seed_and_needs_the_number_of_classes():
    images, labels = batch()
    choice = MethodChoice.build(**DEIT)
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(choice(images, labels, CLASSES)[0])
    assert torch.equal(*drawn)
    with pytest.raises(ValueError, match="num_labels is needed"):
        choice(images, labels)
    with pytest.raises(ValueError, match="num_labels"):
        MethodChoice.build("cutmix", num_labels=1)
    # refused at every batch, not only at those that draw it
    with pytest.raises(ValueError, match="puzzlemix"):
        MethodChoice.build(["mixup", "puzzlemix"], [1.0, 0.0])(images, labels, CLASSES)
    with pytest.raises(ValueError, match="agree on num_labels, got 7 and 4"):
        MixupModel(vit(num_labels=4), MethodChoice.build("cutmix", num_labels=7))


def test_pairs_of_a_data_set_and_logits_of_a_loop():
    """`DataLoader(..., collate_fn=MixupCollator(...))` over (image, label), and `MixupLoss()(logits, targets)`."""
    images, labels = batch(8)
    data = [(image, int(label)) for image, label in zip(images, labels, strict=True)]
    loader = DataLoader(data, 4, collate_fn=MixupCollator(["mixup", "cutmix"], num_labels=CLASSES))
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 20 * 16, CLASSES))
    rows = 0
    for mixed in loader:
        logits = network(mixed["pixel_values"])
        loss = MixupLoss()(logits, mixed["labels"])
        assert_close(loss, torch.nn.functional.cross_entropy(logits, mixed["labels"]))
        loss.backward()
        rows += len(logits)
    assert rows == 8
    assert network[1].weight.grad.abs().sum() > 0
