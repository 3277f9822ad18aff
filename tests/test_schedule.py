"""`mix_rate` and `mix_prob` over epochs: as data, in both Trainers, and resumed bit by bit."""

import json
import sys

import pytest
import torch
from transformers import Trainer

from hf_mixup import MixupCallback, MixupCollator, MixupLoss, MixupModel
from hf_mixup.core.rng import MixKey
from hf_mixup.core.schedule import Points, WithoutHesitation, schedule_of
from hf_mixup.methods import MethodChoice
from refusals import refuses
from small import Images, arguments, difference, losses, resnet, trainer, weights
from test_collator import plain_arguments
from test_trainer import _StopAt

FALLING = [[0, 1], [2, 1], [4, 0]]
# epochs that are mixed, and those that are not
ON_AND_OFF = [[0, 1], [1, 1], [1, 0], [2, 0], [2, 1]]


def test_points_are_joined_by_lines_and_jump_where_two_are_of_one_epoch():
    falling = Points(tuple(map(tuple, FALLING)))
    assert [falling.at(epoch, 0) for epoch in range(6)] == [1, 1, 1, 0.5, 0, 0]
    assert [Points(((1, 0.2), (3, 0.8))).at(epoch, 0) for epoch in range(5)] == pytest.approx([0.2, 0.2, 0.5, 0.8, 0.8])
    assert [Points(tuple(map(tuple, ON_AND_OFF))).at(epoch, 0) for epoch in range(4)] == [1, 0, 1, 1]
    assert falling.extremes() == (0, 1)


def test_mixup_without_hesitation_is_that_of_the_authors():
    """Their script, 100 epochs: up to 60 always, up to 90 in even epochs, then (100 - epoch) / 10."""
    found = [WithoutHesitation().at(epoch, 100) for epoch in range(100)]
    assert found[:60] == [1.0] * 60
    assert found[60:90] == [1.0, 0.0] * 15
    assert found[90:] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert [WithoutHesitation(0.5, 1.0).at(epoch, 4) for epoch in range(4)] == [1, 1, 1, 0]
    for epochs in (0, sys.maxsize):
        with refuses(
            r"withouthesitation needs to know the epochs of the run, got a run whose length is given in steps only; set num_train_epochs"
        ):
            WithoutHesitation().at(0, epochs)


@pytest.mark.parametrize("rate", [0.3, FALLING, {"name": "withouthesitation", "always": 0.5, "turns": 0.75}], ids=str)
def test_a_choice_with_schedules_survives_json(rate, tmp_path):
    choice = MethodChoice.build(["mixup", "cutmix"], [[[0, 1], [9, 0]], [[0, 0], [9, 1]]], mix_rate=rate)
    assert MethodChoice.from_dict(json.loads(json.dumps(choice.to_dict()))) == choice
    choice.save_pretrained(tmp_path)
    assert MethodChoice.from_pretrained(tmp_path) == choice
    assert choice.at(3, 10).probabilities == pytest.approx((2 / 3, 1 / 3))
    assert MethodChoice.build("mixup", mix_rate=json.dumps(rate)) == MethodChoice.build("mixup", mix_rate=rate)


@pytest.mark.parametrize(
    ("mix_prob", "mix_rate", "message"),
    [
        ([[[0, 1], [9, 0]], 0.5], 1.0, r"mix_prob must sum to 1, got \[1.0, 0.5\]"),
        ([[[0, 1], [9, 0.5]], [[0, 0], [8, 0.5]]], 1.0, r"mix_prob must sum to 1"),
        ([{"name": "withouthesitation"}, 0.5], 1.0, r"mix_prob takes numbers and schedules of points, got"),
        (None, [[5, 1], [2, 0]], r"the epochs of a schedule must increase, got \[5, 2\]"),
        (None, [[0, 2]], r"value must be a number from 0 to 1, got 2"),
        (None, [], r"a schedule must be a list of points"),
        (None, [0.5, 0.5], r"a schedule must be a list of points"),
        (None, "[[0, 1]", r"mix_rate must be a number or a schedule as JSON"),
        (None, "half", r"mix_rate must be a number or a schedule as JSON"),
        (None, {"name": "cosine"}, r"the schedule of mix_rate must be a known name, got 'cosine'"),
        (None, {"name": "withouthesitation", "end": 1}, r"withouthesitation takes always and turns, got 'end'"),
        (None, 1.5, r"mix_rate must be a number from 0 to 1, got 1.5"),
    ],
)  # fmt: skip
def test_what_is_no_schedule_is_refused(mix_prob, mix_rate, message):
    with pytest.raises(ValueError, match=message):
        MethodChoice.build(["mixup", "cutmix"], mix_prob, mix_rate=mix_rate)


def test_a_schedule_without_an_epoch_is_refused():
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    model = MixupModel(resnet(), "mixup", mix_rate=FALLING).train()
    with refuses(r"a schedule needs the epoch, got none; train with MixupTrainer or MixupCallback, call set_epoch of the collator, or"):
        model(images, labels, MixKey(0, 0, 0))
    collator = MixupCollator("mixup", num_labels=4, mix_rate=FALLING)
    rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]
    with refuses(r"a schedule needs the epoch, got none"):
        collator(rows)
    collator.set_epoch(0)
    assert (collator(rows)["labels"].max(1).values < 1).any()
    collator.set_epoch(4)
    assert torch.equal(collator(rows)["labels"], torch.eye(4))


def shares(run):
    """Of every epoch the share of batches that were mixed."""
    return [1 - entry.get("mix/vanilla", 0.0) for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("where", ["device", "collator"])
def test_epochs_are_mixed_by_the_schedule(tmp_path, where):
    """64 images are 8 steps an epoch; two processes' worth of accumulation makes them 4."""
    settings = {"max_steps": -1, "num_train_epochs": 3, "logging_strategy": "epoch", "gradient_accumulation_steps": 2, "mix": ["mixup"]}
    if where == "collator":
        settings = {**settings, "mix": ["mixup", "cutmix"], "data_collator": MixupCollator("mixup", num_labels=4, mix_rate=ON_AND_OFF)}
    else:
        settings["mix_rate"] = ON_AND_OFF
    run = trainer(tmp_path, resnet(), **settings)
    run.train()
    assert shares(run) == [1, 0, 1]


def test_methods_take_over_from_each_other(tmp_path):
    run = trainer(
        tmp_path, resnet(), max_steps=-1, num_train_epochs=2, logging_strategy="epoch", mix=["mixup", "cutmix"],
        mix_prob=["[[0, 1], [1, 0]]", "[[0, 0], [1, 1]]"],
    )  # fmt: skip
    run.train()
    seen = [{key for key in entry if key.startswith("mix/")} for entry in run.state.log_history if "loss" in entry]
    assert seen == [{"mix/mixup"}, {"mix/cutmix"}]
    assert json.loads(run.args.method_choice().to_dict() and json.dumps(run.args.mix_prob)) == [[[0, 1], [1, 0]], [[0, 0], [1, 1]]]


def test_a_stock_trainer_follows_the_schedule_with_workers(tmp_path):
    labels = []
    loss = MixupLoss()

    def watched(outputs, targets, num_items_in_batch=None):
        labels.append(targets)
        return loss(outputs, targets, num_items_in_batch)

    Trainer(
        resnet(), plain_arguments(tmp_path, max_steps=-1, num_train_epochs=3, dataloader_num_workers=1, dataloader_persistent_workers=True),
        train_dataset=Images(16), compute_loss_func=watched, callbacks=[MixupCallback(MixupCollator("mixup", num_labels=4, mix_rate=ON_AND_OFF))],
    ).train()  # fmt: skip
    assert [bool((batch.max(1).values < 1).any()) for batch in labels] == [True, True, False, False, True, True]


@pytest.mark.parametrize("rate", [{"name": "withouthesitation"}, FALLING], ids=["mwh", "points"])
def test_resumed_in_the_middle_of_an_epoch_is_bit_identical(tmp_path, rate):
    def run(folder, **changes):
        settings = {"max_steps": -1, "num_train_epochs": 4, "mix_rate": rate, "per_device_train_batch_size": 8, "logging_steps": 1}
        return trainer(folder, resnet(), Images(24), mix=["cutmix"], **settings, **changes)

    whole = run(tmp_path / "whole")
    whole.train()
    run(tmp_path / "cut", callbacks=[_StopAt(8)]).train()
    resumed = run(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert difference(weights(whole.model), weights(resumed.model)) == 0
    assert losses(whole)[-4:] == losses(resumed)[-4:]
    with pytest.raises(ValueError, match=r"a resumed run must mix as before, got other settings .*mix_rate"):
        trainer(tmp_path / "cut", resnet(), Images(24), mix=["cutmix"], mix_rate=0.5).train(resume_from_checkpoint=True)


def test_from_the_command_line(tmp_path):
    from transformers import HfArgumentParser

    from hf_mixup import MixupTrainingArguments

    words = ["--output_dir", str(tmp_path), "--mix", "mixup", "cutmix", "--use_cpu", "--report_to", "none"]
    (args,) = HfArgumentParser(MixupTrainingArguments).parse_args_into_dataclasses(
        [*words, "--mix_rate", "0.25", "--mix_prob", "0.3", "0.7"]
    )
    assert (args.mix_rate, args.mix_prob) == (0.25, [0.3, 0.7])
    words += ["--mix_rate", "[[0, 1], [60, 0]]", "--mix_prob", "[[0, 1], [9, 0]]", "[[0, 0], [9, 1]]"]
    (args,) = HfArgumentParser(MixupTrainingArguments).parse_args_into_dataclasses(words)
    assert args.method_choice().rate == schedule_of("mix_rate", [[0, 1], [60, 0]])
    assert args.method_choice().at(9, 0).probabilities == (0, 1)
    assert arguments(tmp_path, mix_rate=None).mix_rate == 1.0
