"""Mixing in an unmodified Trainer: collator, loss and callback."""

import warnings

import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import BitImageProcessor, Trainer, TrainingArguments, ViTImageProcessor
from transformers.data import default_data_collator

from hf_mixup import METHODS, MixupCallback, MixupCollator, MixupLoss, MixupTrainer, get_method
from hf_mixup.core.losses import BCE
from hf_mixup.data.dataset import ImageDataset
from hf_mixup.data.processor import ImageFormat
from hf_mixup.data.sources import digits
from hf_mixup.data.stacking import stack_examples
from hf_mixup.method import needs_of_model
from hf_mixup.networks.backbones import from_scratch
from refusals import refuses
from small import Images, arguments, difference, resnet, vit, weights


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


@pytest.mark.parametrize("names", [("label", "labels"), ("labels", "label")])
def test_of_two_columns_of_labels_training_and_evaluation_read_the_same(tmp_path, names):
    data = [
        {"pixel_values": image, **{name: row % 4 if name == "labels" else 0 for name in names}}
        for row, image in enumerate(Images(8).pixels)
    ]
    assert stack_examples(data)["labels"].tolist() == [row % 4 for row in range(8)]
    assert MixupCollator("vanilla", num_labels=4)(data)["labels"].argmax(1).tolist() == [row % 4 for row in range(8)]
    for asked, wanted in ((None, [0, 1, 2, 3, 0, 1, 2, 3]), (["label"], [0] * 8)):
        run = MixupTrainer(vit(), arguments(tmp_path, label_names=asked), train_dataset=data, eval_dataset=data)
        assert next(iter(run.get_eval_dataloader()))["labels"].tolist() == wanted


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


# -- bytes --------------------------------------------------------------------------------------------------------------------

IMAGE_ONLY = [name for name, method in METHODS.items() if not needs_of_model(method)]
PROCESSOR = BitImageProcessor(
    size={"height": 32, "width": 32}, do_center_crop=False, image_mean=[0.5, 0.45, 0.4], image_std=[0.2, 0.25, 0.3]
)
LEVEL = 0.5 + 1e-3  # of 255: what rounding to bytes may change, and that of float32


def byte_examples(count=8, shape=(3, 32, 32)):
    rng = torch.Generator().manual_seed(2)
    return [{"pixel_values": torch.randint(256, shape, dtype=torch.uint8, generator=rng), "labels": i % 5} for i in range(count)]


@pytest.mark.parametrize("name", IMAGE_ONLY)
@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 96, 72)], ids=str)
@pytest.mark.parametrize("base", [False, True])
def test_bytes_mix_as_floats_do(name, shape, base):
    """The same plan, labels and, to half a level, pixels: mixed as bytes and then normalised, or normalised and then mixed."""
    batch = byte_examples(shape=shape)
    form = ImageFormat.of_processor(PROCESSOR).normalisation()
    # stretched from its smallest value to its largest, a normalised image leaves the range of bytes: AugMix is told the normalisation
    method = get_method(name, mean=form.mean, std=form.std) if name == "augmix" else name
    made = {}
    for kind in (torch.uint8, torch.float32):
        rows = batch
        if kind == torch.float32:
            rows = [{**row, "pixel_values": form.normalised(row["pixel_values"])} for row in batch]
        base_collator = default_data_collator if base else None
        collator = MixupCollator(
            method, num_labels=5, mix_repeat=2, base_collator=base_collator, processor=PROCESSOR if kind == torch.uint8 else None
        )
        torch.manual_seed(9)
        made[kind] = collator(rows)
        assert made[kind]["pixel_values"].dtype == kind
    raw, floats = made[torch.uint8], made[torch.float32]
    assert torch.equal(raw["labels"], floats["labels"])
    std = torch.tensor(form.std)[:, None, None]
    assert ((form.normalised(raw["pixel_values"]) - floats["pixel_values"]) * std * 255).abs().max() <= LEVEL
    if name in ("cutmix", "resizemix"):  # copies
        assert_close(form.normalised(raw["pixel_values"]), floats["pixel_values"], atol=0, rtol=0)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 9, 5), (4, 80, 64)])
@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_bytes_are_rounded_to_the_nearest(shape, mix):
    """Shares of black and white: what comes out is the nearest level, never one that wraps."""
    batch = [{"pixel_values": torch.full(shape, 255 * (i % 2), dtype=torch.uint8), "labels": i % 2} for i in range(8)]
    mixed = MixupCollator(mix, num_labels=2, mix_repeat=4)(batch)
    white = mixed["pixel_values"].double() / 255
    expected = mixed["labels"][:, 1].double()
    assert (white.mean((1, 2, 3)) - expected).abs().max() * 255 <= LEVEL
    if mix == "cutmix":
        assert set(mixed["pixel_values"].unique().tolist()) == {0, 255}


@pytest.mark.parametrize("transform", ["pad", "erased", "resized"])
@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_trainer_mixes_bytes_in_workers(tmp_path, transform, mix):
    """A MixupCollator over the bytes of a data set of ours: what the network sees is what it sees of floats, to half a level."""
    form, seen = ImageFormat(32, mean=(0.5,) * 3, std=(0.25,) * 3), {}
    how = {"pad": {}, "erased": {"random_erasing": 0.5}, "resized": {"crop": "resized"}}[transform]
    for on_device in (False, True):
        data = ImageDataset(digits()["train"].select(range(24)), "image", "label", form.train_transform(**how), seed=1, on_device=on_device)
        images = seen[on_device] = []
        model = resnet(10)
        model.register_forward_pre_hook(
            lambda module, args, kwargs, images=images: images.append(kwargs["pixel_values"].clone()), with_kwargs=True
        )
        run = MixupTrainer(
            model,
            arguments(tmp_path, mix=["mixup", "cutmix"], max_steps=3, dataloader_num_workers=1),
            MixupCollator(mix, num_labels=10),
            data,
        )
        batch = next(iter(run.get_train_dataloader()))["pixel_values"]
        assert batch.dtype == (torch.uint8 if on_device and transform != "erased" else torch.float32)
        run.train()
    for raw, floats in zip(seen[True], seen[False], strict=True):
        assert (raw - floats).abs().max() * 0.25 * 255 <= (LEVEL if transform != "erased" else 0)


def test_stock_trainer_takes_bytes(tmp_path):
    """By one argument, in training and in evaluation; the same as of images that were normalised before."""
    rows = byte_examples(16, (3, 16, 16))
    form = ImageFormat.of_processor(PROCESSOR).normalisation()
    floats = [{**row, "pixel_values": form.normalised(row["pixel_values"])} for row in rows]
    found = {}
    for name, data, processor in (("bytes", rows, PROCESSOR), ("floats", floats, None)):
        torch.manual_seed(0)
        collator = MixupCollator("cutmix", num_labels=5, processor=processor)
        run = Trainer(
            vit(num_labels=5),
            plain_arguments(tmp_path, max_steps=3),
            train_dataset=data,
            eval_dataset=data,
            compute_loss_func=MixupLoss(),
            callbacks=[MixupCallback(collator)],
        )
        before = run.evaluate()["eval_loss"]
        run.train()
        found[name] = [before, run.evaluate()["eval_loss"], weights(run.model)]
    assert found["bytes"][:2] == found["floats"][:2]
    assert difference(found["bytes"][2], found["floats"][2]) == 0


def test_a_second_trainer_of_a_model_normalises_bytes_its_own_way(tmp_path):
    rows, model = byte_examples(8, (3, 16, 16)), vit(num_labels=5)
    for std in (0.5, 0.1):
        processor = ViTImageProcessor(size={"height": 16, "width": 16}, image_std=[std] * 3)
        callback = MixupCallback(MixupCollator("cutmix", num_labels=5, processor=processor))
        Trainer(
            model, plain_arguments(tmp_path, max_steps=1), train_dataset=rows, compute_loss_func=MixupLoss(), callbacks=[callback]
        ).train()
        seen = []
        hook = model.vit.embeddings.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        images = torch.stack([row["pixel_values"] for row in rows])
        model.eval()(pixel_values=images)
        hook.remove()
        assert_close(seen[0], (images / 255 - 0.5) / std)


def test_bytes_that_nobody_normalises_are_refused(tmp_path):
    rows = byte_examples(16, (3, 16, 16))
    collator = MixupCollator("cutmix", num_labels=5)

    def stock(collator, data):
        return Trainer(
            vit(num_labels=5),
            plain_arguments(tmp_path, max_steps=1),
            train_dataset=data,
            compute_loss_func=MixupLoss(),
            callbacks=[MixupCallback(collator)],
        )

    with refuses(
        "images must be normalised before the network sees them, got uint8; give the MixupCollator the image processor", TypeError
    ):
        stock(collator, rows).train()
    with refuses("images must be floating point, got uint8", TypeError):
        MixupTrainer(vit(num_labels=5), arguments(tmp_path, max_steps=1), collator, rows).train()
    data = ImageDataset(digits()["train"].select(range(16)), "image", "label", ImageFormat(16).train_transform(), on_device=True)
    with refuses("images must be cropped and flipped before they are mixed, got a data set that leaves that to the device"):
        stock(collator, data).train()
    with refuses("processor is for images of bytes, got torch.float32", TypeError):
        MixupCollator("cutmix", num_labels=5, processor=PROCESSOR)(examples())
    with refuses("processor of a MixupCollator is for a stock Trainer"):
        MixupTrainer(vit(num_labels=5), arguments(tmp_path), MixupCollator("cutmix", num_labels=5, processor=PROCESSOR), rows)
    with refuses("images must be floating point, got int16", TypeError):
        MixupCollator("cutmix", num_labels=5)([{**row, "pixel_values": row["pixel_values"].short()} for row in rows])


@pytest.mark.parametrize("size", [8, 80])
@pytest.mark.parametrize("collate", [MixupCollator("mixup", num_labels=5), stack_examples])
def test_bytes_beside_normalised_images_are_refused(collate, size):
    rows = examples(4, (3, size, size))
    rows[1]["pixel_values"] = torch.full((3, size, size), 200, dtype=torch.uint8)
    with refuses("pixel_values of a batch must have one dtype, got float32 and uint8; convert all alike in the data set", TypeError):
        collate(rows)


def test_class_numbers_in_floats_are_no_regression():
    rows = [{**row, "labels": float(row["labels"])} for row in examples()]
    with refuses("labels must be class numbers"):
        MixupCollator("mixup", num_labels=5)(rows)
    assert MixupCollator("mixup")(rows)["labels"].shape == (6, 1)


def test_every_column_has_a_row_for_each_mixture():
    def base(rows):
        images = torch.stack([row["pixel_values"] for row in rows])
        return {
            "pixel_values": images,
            "labels": torch.arange(4),
            "names": list("abcd"),
            "scale": torch.tensor(2.0),
            "place": torch.arange(4),
        }

    batch = MixupCollator("regmixup", num_labels=5, mix_repeat=2, base_collator=base)(examples(4))
    assert batch["names"] == list("abcd") * 4
    assert batch["place"].tolist() == [0, 1, 2, 3] * 4
    assert batch["scale"] == 2


@pytest.mark.parametrize("stock", [True, False])
def test_mixing_stops_in_a_trainer_if_its_collator_is_told_so(tmp_path, stock):
    collator, seen = MixupCollator("mixup", num_labels=4), []

    def watched(outputs, labels, num_items_in_batch=None):
        seen.append(float(labels.max(1).values.min()))
        collator.mix_until_now()  # after the first batch
        return MixupLoss()(outputs, labels, num_items_in_batch)

    if stock:
        Trainer(
            vit(),
            plain_arguments(tmp_path, max_steps=3),
            train_dataset=Images(32),
            callbacks=[MixupCallback(collator)],
            compute_loss_func=watched,
        ).train()
    else:
        MixupTrainer(
            vit(),
            arguments(tmp_path, mix="mixup", max_steps=3),
            data_collator=collator,
            train_dataset=Images(32),
            compute_loss_func=watched,
        ).train()
    assert seen[0] < 1
    assert seen[2:] == [1.0]  # one batch is prepared in advance


def test_accuracy_in_training_on_several_labels_is_the_same_with_a_collator(tmp_path):
    images = Images(8)
    data = [{"pixel_values": pixels, "labels": [1.0, 0.0, 1.0, float(row % 2)]} for row, pixels in enumerate(images.pixels)]

    def accuracy(**changes):
        done = MixupTrainer(
            vit(), arguments(tmp_path, mix="vanilla", loss="bce", max_steps=1, logging_steps=1), train_dataset=data, **changes
        )
        done.train()
        return [entry["train_accuracy"] for entry in done.state.log_history if "train_accuracy" in entry]

    method = get_method("vanilla", loss="bce")
    assert accuracy(data_collator=MixupCollator(method, num_labels=4)) == pytest.approx(accuracy())
