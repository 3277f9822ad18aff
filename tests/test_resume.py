"""Checkpoints and resuming: which are complete, which are refused, and that killed runs end like uninterrupted ones (fault rows 33 to 37, 41)."""

import json
import logging
import resource
from functools import partial
from pathlib import Path

import pytest
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

import killed
from hf_mixup import METHODS
from hf_mixup.training.checkpoints import last_complete_checkpoint, what_is_wrong
from refusals import refuses
from small import Images, difference, resnet, trainer, vit, weights


def test_row_35_changed_run(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=4, max_steps=4).train()
    with refuses(r"must mix as before, got other settings \(mix_seed: 3 then, 9 now\); restore them, or pass"):
        trainer(tmp_path, mix_seed=9).train(resume_from_checkpoint=True)
    with refuses(r"methods: .*cutmix.* then"):
        trainer(tmp_path, mix=["mixup"]).train(resume_from_checkpoint=True)
    trainer(tmp_path, mix_seed=9, allow_method_change=True).train(resume_from_checkpoint=True)


class Passes(IterableDataset):
    """A stream without length, of 32 images in another order in every pass."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        rows = list(Images(32))
        return iter(rows[self.epoch :] + rows[: self.epoch])


@pytest.mark.parametrize(("accumulation", "step"), [(1, 3), (1, 4), (1, 7), (1, 9), (2, 5), (2, 6)])
def test_a_stream_goes_on_in_its_pass(tmp_path, accumulation, step):
    """Its end of mixing too. A pass has 4 batches."""
    settings = dict(mix_off_epoch=2, save_strategy="steps", save_steps=1, gradient_accumulation_steps=accumulation, max_steps=10)
    whole = trainer(tmp_path / "whole", data=Passes(), **settings)
    whole.train()
    assert whole.state.epoch == (2.2 if accumulation == 1 else 4.2)
    resumed = trainer(tmp_path / "half", data=Passes(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"))
    assert resumed.state.epoch == whole.state.epoch
    assert difference(weights(resumed.model), weights(whole.model)) == 0


TORN = (
    "trainer_state.json",
    "config.json",
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "mixup/state.safetensors",
)


def test_row_33_torn_checkpoint_is_passed_over_by_name(tmp_path, caplog):
    """Whichever file is torn, or missing."""
    trainer(tmp_path, mix=["automix"], save_strategy="steps", save_steps=4, max_steps=8).train()
    whole = str(tmp_path / "checkpoint-8")
    assert last_complete_checkpoint(tmp_path) == whole
    for name in TORN:
        torn = tmp_path / "checkpoint-8" / name
        content = torn.read_bytes()
        for left in (content[: len(content) // 2], b"", None):
            if left is None:
                torn.unlink()
            else:
                torn.write_bytes(left)
            caplog.clear()
            with caplog.at_level(logging.WARNING, "hf_mixup.training.checkpoints"):
                found = last_complete_checkpoint(tmp_path)
            assert found == str(tmp_path / "checkpoint-4"), name
            assert f"passing over {whole}: {name} is" in caplog.text
        torn.write_bytes(content)
    (tmp_path / "checkpoint-8/optimizer.pt").unlink()
    steps = []

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    run = trainer(tmp_path, mix=["automix"], max_steps=8, callbacks=[Steps()])
    run.train(resume_from_checkpoint=True)
    assert steps == [5, 6, 7, 8]
    assert [row["step"] for row in run.state.log_history if "loss" in row] == [2, 4, 6, 8]


def test_row_34_torn_checkpoint_named_explicitly(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=8, max_steps=8).train()
    (tmp_path / "checkpoint-8/trainer_state.json").unlink()
    with refuses(r"complete checkpoint, got one where trainer_state.json is missing, incomplete or corrupted; resume from another"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    with refuses("expected to hold a complete checkpoint, got none"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_row_36_what_the_method_learned_is_missing(tmp_path):
    trainer(tmp_path, mix=["automix"], save_strategy="steps", save_steps=8, max_steps=8).train()
    checkpoint = tmp_path / "checkpoint-8"
    (checkpoint / "mixup/state.safetensors").unlink()
    with refuses(r"complete checkpoint, got one where mixup/state.safetensors is missing; resume from another"):
        trainer(tmp_path, mix=["automix"]).train(resume_from_checkpoint=str(checkpoint))
    # where the list of its files does not tell, loading does
    facts = json.loads((checkpoint / "mixup_run.json").read_text())
    (checkpoint / "mixup_run.json").write_text(json.dumps({**facts, "files": []}))
    for resume in (True, str(checkpoint)):
        with refuses(
            r"expected to hold mixup/state.safetensors with the state of automix, got none; it is not a checkpoint of this method"
        ):
            trainer(tmp_path, mix=["automix"]).train(resume_from_checkpoint=resume)


def test_row_37_checkpoint_of_another_network(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=4, max_steps=4).train()
    with refuses(r"expected to hold every weight of ViTForImageClassification, got (missing|mismatched) keys"):
        trainer(tmp_path, vit(num_labels=5), Images(num_labels=4)).train(resume_from_checkpoint=True)


class FullDisk(TrainerCallback):
    """Lets no file grow beyond `largest` bytes while the checkpoint of `step` is written."""

    def __init__(self, step, largest):
        self.step, self.largest = step, largest

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.largest, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def saving(folder, **more):
    changes = {"mix": ["automix"], "save_strategy": "steps", "save_steps": 4, "max_steps": 8, "logging_strategy": "no"}
    return trainer(folder, vit(), **changes, **more)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    run = saving(tmp_path_factory.mktemp("saved"))
    run.train()
    return run


@pytest.mark.parametrize("full_at", ["config.json", "model.safetensors", "mixup/state.safetensors", "optimizer.pt"])
def test_row_41_disk_full(tmp_path, saved, full_at):
    largest = Path(saved.args.output_dir, "checkpoint-4", full_at).stat().st_size - 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with refuses(r"checkpoint-8 needs about \d{6} bytes that can be written, got \d+ bytes free and .*; make room", OSError):
            saving(tmp_path, callbacks=[FullDisk(8, largest)]).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    assert what_is_wrong(tmp_path / "checkpoint-4") is None
    again = saving(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert difference(weights(saved.model), weights(again.model)) == 0


def test_a_checkpoint_that_is_written_over_is_not_whole_until_it_is_done(tmp_path):
    """Gone on with from an older one, then killed: what is left must not be half of each run."""
    trainer(tmp_path, save_strategy="steps", save_steps=4, max_steps=8).train()

    class Killed(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            run._save_optimizer_and_scheduler = None  # the next save dies after the model

    run = trainer(tmp_path, save_strategy="steps", save_steps=4, max_steps=8, callbacks=[Killed()])
    with pytest.raises(TypeError):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_a_run_that_was_killed_after_its_last_checkpoint_makes_no_step_more(tmp_path):
    """Its last step lies in the middle of an epoch, of 8 steps."""
    done = trainer(tmp_path, max_steps=5, save_strategy="steps", save_steps=5)
    done.train()
    again = trainer(tmp_path, max_steps=5, save_strategy="steps", save_steps=5)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5
    assert difference(weights(done.model), weights(again.model)) == 0
    longer = trainer(tmp_path, max_steps=7)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 7


@pytest.fixture(scope="module")
def _server():
    killed.start_server()


OFTEN = ("cutmix", "puzzlemix", "recursivemix", "automix")


@pytest.mark.slow
@pytest.mark.usefixtures("_server")
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("method", sorted(METHODS, key=lambda name: name not in OFTEN))
def test_killed_anywhere_and_resumed_is_bit_identical(tmp_path, method, processes):
    killed.ends_alike(tmp_path, partial(killed.by, method=method), processes, 20 if method in OFTEN else 1)


def test_classes_of_another_order_are_refused(tmp_path):
    """The weights of the classifier would go on for other classes."""
    network = resnet()
    network.config.id2label = dict(enumerate(["ant", "bee", "cow", "dog"]))
    trainer(tmp_path, network, max_steps=2, save_strategy="steps", save_steps=2).train()
    for names in (["bee", "cow", "dog", "owl"], ["ant", "cow", "bee", "dog"]):
        network = resnet()
        network.config.id2label = dict(enumerate(names))
        for changes in ({}, {"allow_method_change": True}):
            with refuses("a resumed run must have the classes of before, got '(bee|cow)' in the place of '(ant|bee)', number [01]"):
                trainer(tmp_path, network, max_steps=3, **changes).train(resume_from_checkpoint=True)
