"""Every method of `METHODS` trains, resumes bit by bit, and works with DDP. A new row is tested without a change here."""

import json
import re

import pytest
import torch
from transformers import AutoModelForImageClassification, Trainer

from hf_mixup import METHODS, MixupCallback, MixupCollator, MixupLoss
from hf_mixup.core.losses import CrossEntropy
from hf_mixup.method import needs_of_model
from hf_mixup.methods import MethodChoice
from hf_mixup.report.examples import default_architecture
from refusals import refuses
from run_script import run_mixup
from small import Images, difference, losses, network_for, trainer, weights
from test_collator import plain_arguments
from test_trainer import _StopAt

every_method = pytest.mark.parametrize("name", sorted(METHODS))


def run(folder, name, **changes):
    return trainer(folder, network_for(name), Images(40), mix=[name], **{"max_steps": 6, **changes})


@every_method
def test_stopped_and_resumed_is_bit_identical(tmp_path, name):
    whole = run(tmp_path / "whole", name)
    before = weights(whole.model.backbone)
    whole.train()
    assert difference(before, weights(whole.model.backbone)) > 0
    run(tmp_path / "cut", name, callbacks=[_StopAt(3)]).train()
    resumed = run(tmp_path / "cut", name)
    resumed.train(resume_from_checkpoint=True)
    assert difference(weights(whole.model), weights(resumed.model)) == 0
    assert losses(whole)[-1] == losses(resumed)[-1]


@every_method
def test_accumulation_and_half_precision(tmp_path, name):
    done = run(tmp_path, name, max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=4, bf16=True, logging_steps=1)
    done.train()
    assert all(0 < loss < 20 for loss in losses(done))


@every_method
def test_saved_classifier_is_the_evaluated_one(tmp_path, name):
    evaluation = Images(16, seed=1)
    done = trainer(tmp_path, network_for(name), Images(40), evaluation, mix=[name], max_steps=3)
    done.train()
    predicted = torch.from_numpy(done.predict(evaluation).predictions)
    done.save_model(tmp_path / "out")
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        logits = torch.cat([plain(batch).logits for batch in evaluation.pixels.split(done.args.per_device_eval_batch_size)])
    assert torch.equal(logits, predicted)


@every_method
def test_row_17_collator_takes_it_or_names_what_it_lacks(name):
    if needs_of_model(METHODS[name]):
        with refuses(rf"methods that mix by images only, got '{name}', which needs .*, so the model; use MixupTrainer"):
            MixupCollator(name, num_labels=4)
    else:
        data = Images(8)
        mixed = MixupCollator(name, num_labels=4)([data[i] for i in range(8)])
        assert torch.isfinite(mixed["pixel_values"]).all()


@pytest.mark.parametrize("name", [name for name in sorted(METHODS) if not needs_of_model(METHODS[name])])
def test_stock_trainer(tmp_path, name):
    model, own = network_for(name), METHODS[name].loss
    before = weights(model)

    def train(loss):
        Trainer(
            model, plain_arguments(tmp_path, max_steps=3), train_dataset=Images(40), compute_loss_func=loss,
            callbacks=[MixupCallback(MixupCollator(name, num_labels=4))],
        ).train()  # fmt: skip

    if own != CrossEntropy():
        with refuses(
            re.escape(f"MixupLoss must have the loss of the method, got {CrossEntropy()} with {name!r}, whose loss is {own}; give it as")
        ):
            train(MixupLoss())
    train(MixupLoss(loss=own))
    assert difference(before, weights(model)) > 0


@pytest.mark.slow
@every_method
def test_digits(tmp_path, name):
    """Through run_mixup.py: a few epochs of digits with the default network of the method."""
    epochs = 8 if default_architecture(MethodChoice.build(name)) == "vit_mini" else 3
    run_mixup("--mix", name, "--output_dir", tmp_path / "out", "--num_train_epochs", epochs, "--eval_strategy", "no")
    results = json.loads((tmp_path / "out/all_results.json").read_text())
    print(name, results["eval_top1"], results["train_images_per_second"])
    assert results["eval_top1"] > 0.2  # twice chance
    assert (tmp_path / "out/gallery.png").is_file()
