"""Labels by object masks that come with the data set: OA-CutMix."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import Trainer

import laws
from hf_mixup import MethodChoice, MixupCallback, MixupCollator, MixupLoss, MixupModel, get_method
from hf_mixup.core.plan import Boxes, MixPlan, Share
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import MixKey, keyed
from hf_mixup.labels import ObjectLabels
from refusals import refuses
from small import Images, difference, resnet, trainer, weights
from test_every_method import plain_arguments

METHOD = get_method("cutmix", label="objectlabels")


class WithObjects(Images):
    """The object is the brightest quadrant."""

    def __getitem__(self, row):
        example = super().__getitem__(row)
        mask, half = torch.zeros(16, 16), 8
        top, left = half * (example["labels"] // 2 % 2), half * (example["labels"] % 2)
        mask[top : top + half, left : left + half] = 1
        return {**example, "object_masks": mask}


def stacked(count=8, data=None):
    data = WithObjects(count) if data is None else data
    return {
        name: torch.stack([torch.as_tensor(data[row][name]) for row in range(count)]) for name in ("pixel_values", "labels", "object_masks")
    }


def halves():
    """The left half of the own image, the right half of the partner; an object left, one of two thirds left, one right."""
    masks = torch.zeros(3, 2, 6)
    masks[0, :, 0] = 1
    masks[1, 0, 2:5] = 1
    masks[2, 1, 4] = 1
    boxes = Boxes(torch.tensor([[0, 2, 3, 6]] * 3), (2, 6))
    return MixPlan.pair(torch.tensor([1, 2, 0]), boxes, 1 - boxes.area()), masks


def test_what_can_be_seen_counts():
    plan, masks = halves()
    # 2 of the own object and 2 of the partner's; 1 and 1; nothing of either, so areas
    absolute = ObjectLabels().weights(plan, Signals(object_masks=masks))
    assert_close(absolute, torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]))
    # all of the own object and two thirds of the partner's; a third and all
    relative = ObjectLabels(kind="relative").weights(plan, Signals(object_masks=masks))
    assert_close(relative, torch.tensor([[0.6, 0.4], [0.25, 0.75], [0.5, 0.5]]))
    # without an own object, nothing of it is hidden, but no pixel shows either; without one of the partner nothing was pasted
    own, partner = masks.clone(), masks.clone()
    own[0], partner[1] = 0, 0
    assert_close(ObjectLabels(kind="relative").weights(plan, Signals(object_masks=own))[0], torch.tensor([0.6, 0.4]))
    assert_close(ObjectLabels().weights(plan, Signals(object_masks=own))[0], torch.tensor([0.0, 1.0]))
    for kind in ("absolute", "relative"):
        assert_close(ObjectLabels(kind=kind).weights(plan, Signals(object_masks=partner))[0], torch.tensor([1.0, 0.0]))
    masks[0, :, 1] = 1  # a larger own object
    assert_close(ObjectLabels().weights(plan, Signals(object_masks=masks))[0], torch.tensor([2 / 3, 1 / 3]))
    assert_close(ObjectLabels(rho=1.0).weights(plan, Signals(object_masks=masks)), plan.weight)
    # a mask of another size says the same
    finer = masks.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert_close(ObjectLabels().weights(plan, Signals(object_masks=finer)), ObjectLabels().weights(plan, Signals(object_masks=masks)))


def test_class_numbers_of_a_segmentation_do_not_weigh():
    plan, masks = halves()
    numbers = (masks * torch.tensor([20, 3, 255]).view(3, 1, 1)).long()
    for kind in ("absolute", "relative"):
        assert_close(
            ObjectLabels(kind).weights(plan, Signals(object_masks=numbers)), ObjectLabels(kind).weights(plan, Signals(object_masks=masks))
        )


def test_where_no_object_shows_the_area_counts_and_whole_images_keep_their_label():
    plan, _ = halves()
    nothing = Signals(object_masks=torch.zeros(3, 2, 6))
    for kind in ("absolute", "relative"):
        assert_close(ObjectLabels(kind).weights(plan, nothing), plan.weight)
        own = torch.tensor([[1.0, 0.0]] * 3)
        whole = MixPlan.pair(torch.tensor([1, 2, 0]), Share(own), own[:, 0])
        assert_close(ObjectLabels(kind).weights(whole, nothing), own)
    for shape in laws.SHAPES:
        laws.identity(lambda plan, images: images, ObjectLabels(), shape)


def by_hand(plan, masks):
    own, partner = plan.dense_mask((16, 16)).unbind(1)
    seen = (own * masks).sum((1, 2)), (partner * masks[plan.index[:, 1]]).sum((1, 2))
    return torch.where(sum(seen) > 0, seen[0] / sum(seen), plan.weight[:, 0])


def test_a_call_a_choice_the_collator_and_the_model_weigh_alike():
    batch = stacked()
    images, labels, masks = batch.values()
    plain = get_method("cutmix").plan(images, labels, keyed(4))
    wanted = by_hand(plain, masks)
    assert (wanted - plain.lam).abs().max() > 0.05
    plan = METHOD.plan(images, labels, keyed(4), columns={"object_masks": masks})
    assert_close(plan.lam, wanted)
    mixed, targets = METHOD(images, labels, 4, keyed(4), {"object_masks": masks})
    choice = MethodChoice.build(METHOD, num_labels=4)
    again = choice(images, labels, generator=keyed(4), columns={"object_masks": masks[:, None]})
    assert torch.equal(again[0], mixed)
    assert torch.equal(again[1], targets)
    eye = torch.eye(4)
    assert_close(targets, wanted[:, None] * eye[labels] + (1 - wanted)[:, None] * eye[labels[plain.index[:, 1]]])

    torch.manual_seed(0)
    out = MixupModel(resnet(), METHOD).train()(images, labels, MixKey(0, 0, 1), object_masks=masks)
    plan = get_method("cutmix").sample.plan(images.shape, MixKey(0, 0, 1).own_rng(), Signals())
    assert_close(out.lam, by_hand(plan, masks))

    data = WithObjects(8)
    found = MixupCollator(METHOD, num_labels=4)([data[row] for row in range(8)])
    assert "object_masks" not in found
    torch.manual_seed(1)
    seed = int(torch.randint(2**62, ()))
    torch.manual_seed(1)
    found = MixupCollator(METHOD, num_labels=4)([data[row] for row in range(8)])
    plan = get_method("cutmix").sample.plan(images.shape, keyed(seed, 0, 0), Signals())
    kept = by_hand(plan, masks)
    assert_close(found["labels"], kept[:, None] * eye[labels] + (1 - kept)[:, None] * eye[labels[plan.index[:, 1]]])


def test_training_reads_the_column_and_resumes_to_the_bit(tmp_path):
    data = WithObjects(40)
    mix = {"mix": ["cutmix"], "mix_args": {"cutmix": {"label": {"name": "objectlabels"}}}}
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, **mix}
    whole = trainer(tmp_path / "whole", resnet(), data, WithObjects(8), **settings)
    whole.train()
    again = trainer(tmp_path / "again", resnet(), data, WithObjects(8), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert difference(weights(whole.model), weights(again.model)) == 0
    area = trainer(tmp_path / "area", resnet(), data, mix=["cutmix"], max_steps=6)
    area.train()
    assert difference(weights(whole.model), weights(area.model)) > 0
    assert "eval_top1" in whole.evaluate()
    collated = trainer(tmp_path / "collated", resnet(), data, max_steps=2, data_collator=MixupCollator(METHOD, num_labels=4))
    collated.train()


def test_a_stock_trainer_takes_it(tmp_path):
    model = resnet()
    before = weights(model)
    Trainer(
        model, plain_arguments(tmp_path, max_steps=3, remove_unused_columns=False), train_dataset=WithObjects(40), compute_loss_func=MixupLoss(),
        callbacks=[MixupCallback(MixupCollator(METHOD, num_labels=4))],
    ).train()  # fmt: skip
    assert difference(before, weights(model)) > 0


def test_a_stock_trainer_evaluates_a_set_that_has_the_column_too(tmp_path):
    """`remove_unused_columns=False`, which training needs, keeps it in the evaluation, where the network knows no such input."""
    run = Trainer(
        resnet(), plain_arguments(tmp_path, max_steps=2, remove_unused_columns=False, eval_strategy="steps", eval_steps=1),
        train_dataset=WithObjects(16), eval_dataset=WithObjects(8), compute_loss_func=MixupLoss(),
        callbacks=[MixupCallback(MixupCollator(METHOD, num_labels=4))],
    )  # fmt: skip
    before = run.evaluate()["eval_loss"]
    plain = Trainer(run.model, plain_arguments(tmp_path), eval_dataset=Images(8), compute_loss_func=MixupLoss())
    assert before == pytest.approx(plain.evaluate()["eval_loss"])
    run.train()
    assert run.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"])


def test_workers_and_repeats_and_clean_rows():
    loader = DataLoader(WithObjects(16), 8, collate_fn=MixupCollator(METHOD, num_labels=4, mix_repeat=2), num_workers=1)
    for batch in loader:
        assert len(batch["labels"]) == 16
        assert_close(batch["labels"].sum(1), torch.ones(16))
    kept = get_method("cutmix", label="objectlabels", step={"name": "keepclean"})
    data = WithObjects(8)
    batch = MixupCollator(kept, num_labels=4)([data[row] for row in range(8)])
    assert_close(batch["labels"][8:], torch.eye(4)[data.labels[:8]])


def test_a_missing_column_is_named(tmp_path):
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    column = "'cutmix' reads a column 'object_masks' of shape"
    with refuses(column):
        METHOD(images, labels, 4)
    with refuses(column):
        METHOD(images, labels, 4, columns={"object_masks": torch.zeros(3, 8, 8)})
    with refuses(column):
        MixupModel(resnet(), METHOD).train()(images, labels, MixKey(0, 0, 0))
    data = Images(8)
    with refuses(column):
        MixupCollator(METHOD, num_labels=4)([data[row] for row in range(8)])
    with refuses("a batch must have 'pixel_values' and 'labels' and 'object_masks'"):
        trainer(tmp_path, resnet(), Images(16), mix=["cutmix"], mix_args={"cutmix": {"label": {"name": "objectlabels"}}}).train()
    with refuses("a sample policy that leaves pixels in place"):
        get_method("resizemix", label="objectlabels")(images, labels, 4, columns={"object_masks": torch.ones(4, 8, 8)})
    with refuses("kind must be"):
        ObjectLabels(kind="both")
