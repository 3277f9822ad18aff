"""Mixing in an unmodified Trainer: collator, loss and callback."""

import warnings

import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from hf_mixup import MixupCallback, MixupCollator, MixupLoss
from hf_mixup.core.losses import BCE
from hf_mixup.networks.backbones import from_scratch
from small import Images, difference, resnet, vit, weights


def examples(count=6, shape=(3, 8, 8), num_labels=5):
    return [{"pixel_values": torch.randn(shape), "labels": i % num_labels} for i in range(count)]


def plain_arguments(folder, **changes):
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 8, "max_steps": 6, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "remove_unused_columns": False, "dataloader_pin_memory": False, "logging_steps": 1,
    }  # fmt: skip
    return TrainingArguments(**{**settings, **changes})


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 9, 5), (3, 80, 64)])
@pytest.mark.parametrize("mix", ["mixup", "cutmix", ["mixup", "cutmix"]])
def test_pixels_and_labels_are_mixed_alike(shape, mix):
    # each image is constant and says which one it is, so its share can be read off the pixels
    batch = [{"pixel_values": torch.full(shape, float(i)), "labels": i} for i in range(6)]
    mixed = MixupCollator(mix, num_labels=6)(batch)
    assert mixed["pixel_values"].shape == (6, *shape)
    expected = mixed["labels"] @ torch.arange(6.0)
    assert_close(mixed["pixel_values"].mean((1, 2, 3)), expected, atol=1e-4, rtol=0)
    assert_close(mixed["labels"].sum(1), torch.ones(6))
    assert (mixed["labels"].max(1).values < 1).any()


def test_base_collator_gives_the_same_as_stacking():
    batch = examples()
    torch.manual_seed(5)
    stacked = MixupCollator("cutmix", num_labels=5)(batch)

    def base(rows):
        return {"pixel_values": torch.stack([r["pixel_values"] for r in rows]), "labels": torch.tensor([r["labels"] for r in rows])}

    torch.manual_seed(5)
    wrapped = MixupCollator("cutmix", num_labels=5, base_collator=base)(batch)
    assert torch.equal(stacked["pixel_values"], wrapped["pixel_values"])
    assert torch.equal(stacked["labels"], wrapped["labels"])


def test_examples_are_not_written_to():
    batch = examples()
    before = [example["pixel_values"].clone() for example in batch]
    MixupCollator("cutmix", num_labels=5)(batch)
    assert all(torch.equal(example["pixel_values"], old) for example, old in zip(batch, before, strict=True))


def test_repeat_gives_independent_mixtures_of_the_same_batch():
    batch = [{"pixel_values": torch.full((3, 8, 8), float(i)), "labels": i} for i in range(6)]
    mixed = MixupCollator("mixup", num_labels=6, mix_repeat=3)(batch)
    assert mixed["labels"].shape == (18, 6)
    one, two, three = mixed["labels"].chunk(3)
    assert not torch.equal(one, two)
    assert not torch.equal(two, three)
    assert_close(mixed["pixel_values"].mean((1, 2, 3)), mixed["labels"] @ torch.arange(6.0), atol=1e-4, rtol=0)


def test_row_25_workers_and_processes_do_not_repeat_each_other(monkeypatch):
    """Every worker has its own stream; a plain loader seeds the workers of all processes alike."""
    rows = [{"pixel_values": torch.full((3, 8, 8), float(i)), "labels": i % 4} for i in range(4)] * 8

    def draws(rank):
        monkeypatch.setenv("RANK", str(rank))
        loader = DataLoader(
            rows, 4, collate_fn=MixupCollator("mixup", num_labels=4), num_workers=2, generator=torch.Generator().manual_seed(1)
        )
        return [batch["labels"] for batch in loader]

    first, second = draws(0), draws(1)
    seen = [tuple(labels.flatten().tolist()) for labels in first + second]
    assert len(set(seen)) == len(seen)
    assert all(torch.equal(a, b) for a, b in zip(first, draws(0), strict=True))


@pytest.mark.parametrize("build", [vit, lambda: from_scratch("resnet10t", 4, 32)], ids=["vit", "timm"])
def test_callback_mixes_in_training_only(tmp_path, build):
    """A stock Trainer: training batches are mixed, the evaluation is that of a Trainer that never heard of mixing."""
    size = 16 if build is vit else 32
    seen = []

    def base(rows):
        seen.append(len(rows))
        return {"pixel_values": torch.stack([r["pixel_values"] for r in rows]), "labels": torch.tensor([r["labels"] for r in rows])}

    train, evaluation = Images(48, size), Images(24, size, seed=1)
    loss = MixupLoss()
    received = []

    def watched(outputs, labels, num_items_in_batch=None):
        received.append((torch.is_grad_enabled(), labels))
        return loss(outputs, labels, num_items_in_batch)

    model = build()
    trainer = Trainer(
        model,
        plain_arguments(tmp_path),
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=base,
        compute_loss_func=watched,
        callbacks=[MixupCallback(MixupCollator("cutmix", num_labels=4))],
    )
    before = weights(model)
    trainer.train()
    assert difference(before, weights(model)) > 0
    soft = [labels for training, labels in received if training]
    assert soft
    assert all(labels.shape[1] == 4 for labels in soft)
    assert any((labels.max(1).values < 1).any() for labels in soft)
    metrics = trainer.evaluate()
    plain = Trainer(model, plain_arguments(tmp_path), eval_dataset=evaluation, data_collator=base).evaluate()
    assert metrics["eval_loss"] == pytest.approx(plain["eval_loss"], abs=1e-6)
    assert model.config.problem_type in (None, "single_label_classification")  # the soft labels never reached the model
    assert seen, "the Trainer's own collator makes the batches"


def test_callback_without_the_loss_is_refused(tmp_path):
    trainer = Trainer(
        vit(), plain_arguments(tmp_path), train_dataset=Images(), callbacks=[MixupCallback(MixupCollator("mixup", num_labels=4))]
    )
    with pytest.raises(RuntimeError, match=r"compute_loss_func=MixupLoss\(\)"):
        trainer.train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"), ({"per_device_train_batch_size": 1}, "at least 2 images")],
)
def test_callback_refuses_settings(tmp_path, changes, message):
    trainer = Trainer(
        vit(),
        plain_arguments(tmp_path, **changes),
        train_dataset=Images(),
        compute_loss_func=MixupLoss(),
        callbacks=[MixupCallback(MixupCollator("mixup", num_labels=4))],
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_mixed_evaluation_is_warned_about(tmp_path):
    trainer = Trainer(
        vit(),
        plain_arguments(tmp_path),
        train_dataset=Images(),
        eval_dataset=Images(16),
        data_collator=MixupCollator("mixup", num_labels=4),
        compute_loss_func=MixupLoss(),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.evaluate()
    messages = [str(warning.message) for warning in caught if "MixupCallback" in str(warning.message)]
    assert len(messages) == 1


def gradients(build, rows, accumulation, tmp_path, loss):
    """The gradient that one optimizer step of a stock Trainer sees, for 16 rows given in order."""

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows["labels"])

        def __getitem__(self, i):
            return {name: value[i] for name, value in rows.items()}

    found = {}

    class Frozen(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, model, *args, **kwargs):
            out = super().training_step(model, *args, **kwargs)
            found.update({name: p.grad.clone() for name, p in model.named_parameters()})
            return out

    model = build()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train = lambda mode=True, module=module: module  # stays in evaluation mode
            module.training = False
    Frozen(
        model,
        plain_arguments(
            tmp_path, max_steps=1, per_device_train_batch_size=16 // accumulation, gradient_accumulation_steps=accumulation, max_grad_norm=0
        ),
        train_dataset=Rows(),
        compute_loss_func=loss,
    ).train()
    return found


@pytest.mark.parametrize("build", [vit, resnet], ids=["vit", "resnet"])
@pytest.mark.parametrize("loss", [MixupLoss(), MixupLoss(label_smoothing=0.1), MixupLoss(loss=BCE())], ids=["ce", "smoothed", "bce"])
def test_gradients_do_not_depend_on_accumulation(tmp_path, build, loss):
    """Finding F2: the stock loss of most Hugging Face classifiers gives gradients 4 times too large at 4x4."""
    data = Images(16)
    rows = MixupCollator("mixup", num_labels=4)([data[i] for i in range(16)])
    whole, parts = (gradients(build, rows, accumulation, tmp_path, loss) for accumulation in (1, 4))
    scale = max(gradient.abs().max() for gradient in whole.values())
    assert scale > 1e-3
    for name, gradient in whole.items():
        assert_close(parts[name], gradient, atol=1e-5 * scale.item(), rtol=1e-4, msg=name)


def test_hard_labels_give_the_ordinary_loss():
    logits, labels = torch.randn(6, 5), torch.randint(5, (6,))
    assert_close(MixupLoss()({"logits": logits}, labels), torch.nn.functional.cross_entropy(logits, labels))
    smoothed = torch.nn.functional.cross_entropy(logits.requires_grad_(), labels, label_smoothing=0.1)
    assert_close(MixupLoss(label_smoothing=0.1)({"logits": logits}, labels), smoothed)
    with torch.no_grad():
        assert_close(MixupLoss(label_smoothing=0.1)({"logits": logits}, labels), torch.nn.functional.cross_entropy(logits, labels))
