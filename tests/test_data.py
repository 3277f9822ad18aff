"""Transforms with keyed randomness: what they draw, and that only the key decides it."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pillow
from scipy.stats import chisquare, kstest
from torchvision.transforms.v2 import functional
from transformers import BitImageProcessor

from hf_mixup import MixupCollator
from hf_mixup.core.rng import hashed, hashed_integers
from hf_mixup.data.augment import posterized
from hf_mixup.data.dataset import ImageDataset, RepeatedAugmentation, tail_on_device
from hf_mixup.data.processor import IMAGENET_MEAN, IMAGENET_STD, ImageFormat
from hf_mixup.data.sources import digits
from hf_mixup.data.tail import Augmentation, erased_boxes
from hf_mixup.networks.backbones import from_scratch
from refusals import refuses
from small import difference, trainer, weights

FORM = ImageFormat(16)
FEATURES = Features({"image": Image(), "label": Value("int64")})
TRANSFORMS = {
    "pad": FORM.train_transform(),
    "reflect": FORM.train_transform(crop="reflect"),
    "none": FORM.train_transform(crop="none"),
    "erased": FORM.train_transform(random_erasing=0.5),
    "rand": FORM.train_transform(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5),
    "resized": FORM.train_transform(crop="resized"),
    "evaluation": FORM.eval_transform(),
}
every_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)


@pytest.fixture(scope="module")
def rows():
    return digits()["train"].select(range(21))


def pixels(examples):
    return torch.stack([example["pixel_values"] for example in examples])


def whole(data, batch=7, workers=0):
    loader = torch.utils.data.DataLoader(data, batch, num_workers=workers)
    return torch.cat([examples["pixel_values"] for examples in loader])


@every_transform
def test_only_the_key_decides(rows, transform):
    """The same images one by one, in batches, from workers and from memory; others in another epoch, if anything is drawn."""
    data, cached = (ImageDataset(rows, "image", "label", transform, seed=1, cache=cache) for cache in (False, True))
    for data_ in (data, cached):
        data_.set_epoch(2)
    one_by_one = [data[row] for row in range(len(data))]
    expected = pixels(one_by_one)
    assert expected.dtype == torch.float32
    assert expected.shape == (21, 3, 16, 16)
    assert [example["labels"] for example in one_by_one] == rows["label"]
    assert [cached[row]["labels"] for row in range(len(data))] == rows["label"]
    assert torch.equal(pixels(cached.__getitems__(list(range(21)))), expected)
    assert torch.equal(pixels(data.__getitems__(list(range(21)))[::-1]).flip(0), expected)
    for data_, workers in itertools.product((data, cached), (0, 2)):
        assert torch.equal(whole(data_, workers=workers), expected)
    draws = transform is not TRANSFORMS["evaluation"]
    data.set_epoch(3)
    assert torch.equal(whole(data), expected) is not draws
    assert torch.equal(whole(ImageDataset(rows, "image", "label", transform, seed=2)), expected) is not draws
    data.set_epoch(2)
    assert torch.equal(data[3, 0]["pixel_values"], expected[3])
    assert torch.equal(pixels(data[row, 1] for row in range(21)), expected) is not draws


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_augmentation_is_that_of_torchvision(mode):
    """Pad, crop, mirror and normalise, with the places and sides that the keys say."""
    images = torch.randint(256, (40, 3, 12, 10), dtype=torch.uint8)
    keys = hashed(torch.arange(40), 5)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
    made = Augmentation(tuple(mean), tuple(std), padding=3, reflect=mode == "reflect", flip=True)(images, keys)
    top, left, flip = (hashed_integers(keys, draw, high).tolist() for draw, high in enumerate((7, 7, 2)))
    for row, image in enumerate(functional.pad(images, 3, padding_mode=mode)):
        image = functional.crop(image, top[row], left[row], 12, 10)
        image = functional.horizontal_flip(image) if flip[row] else image
        image = functional.normalize(functional.to_dtype(image, torch.float32, scale=True), mean, std)
        assert torch.equal(made[row], image)
    assert set(flip) == {0, 1}


def test_crops_and_sides_are_uniform():
    """All (2 p + 1)^2 places on both sides alike; those of neighbouring rows, and of one row in two epochs, are independent."""
    count, padding = 60_000, 1
    numbered = torch.arange(25, dtype=torch.uint8).view(1, 1, 5, 5).expand(count, 3, -1, -1)
    plain = Augmentation((0.0,) * 3, (1 / 255,) * 3, padding, flip=True)

    def places(epoch):
        moved = plain(numbered, hashed(torch.arange(count), epoch)).round().long()
        # the middle says where the crop is, its neighbour on which side
        return (moved[:, 0, 2, 2] % 5 - 1) + 3 * (moved[:, 0, 2, 2] // 5 - 1) + 9 * (moved[:, 0, 2, 1] > moved[:, 0, 2, 2]).long()

    first, second = places(0), places(1)
    assert chisquare(torch.bincount(first, minlength=18)).pvalue > 1e-3
    for pairs in (first[:-1] + 18 * first[1:], first + 18 * second):
        counts = torch.bincount(pairs, minlength=324)
        assert len(counts) == 324
        assert chisquare(counts).pvalue > 1e-3


def test_hash_is_splitmix():
    """Numbers of the reference implementation for the seed 0."""
    drawn = [int(hashed(torch.zeros((), dtype=torch.int64), draw)) % 2**64 for draw in range(3)]
    assert drawn == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_cache_refuses_images_of_several_sizes():
    images = [Pillow.new("RGB", (side, 20)) for side in (30, 30, 24)]
    data = Dataset.from_dict({"image": images, "label": [0, 1, 2]}, features=FEATURES)
    ImageDataset(data, "image", "label", TRANSFORMS["pad"], cache=True)
    with refuses("images of one size before their random crop, got 30x20 and 24x20 in rows 0 and 2; leave cache_images out"):
        ImageDataset(data, "image", "label", TRANSFORMS["resized"], cache=True)


WORKERS, ACCUMULATION = {"mix": ["vanilla"], "dataloader_num_workers": 2}, {"gradient_accumulation_steps": 2}


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "pad"),
        ({}, "erased"),
        ({}, "rand"),
        ({}, "resized"),
        (WORKERS, "pad"),
        (WORKERS, "rand"),
        (ACCUMULATION, "pad"),
        (ACCUMULATION, "rand"),
    ],
    ids=str,
)
def test_augmentation_on_the_device_is_the_same(tmp_path, rows, changes, kind):
    """Bytes come out of the loader, and the trained weights are those of images augmented before; from a resumed run too."""

    def run(folder, on_device, cache=True):
        data = ImageDataset(rows, "image", "label", TRANSFORMS[kind], seed=3, cache=cache and kind != "resized", on_device=on_device)
        settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, **changes}
        torch.manual_seed(0)
        return trainer(tmp_path / folder, from_scratch("cifar_resnet20", 10, 16), data, **settings)

    before = run("before", on_device=False)
    before.train()
    after = run("after", on_device=True)
    after.train()
    assert difference(weights(after.model), weights(before.model)) == 0
    assert next(iter(after.get_train_dataloader()))["pixel_values"].dtype == torch.uint8
    resumed = run("resumed", on_device=True, cache=False)
    resumed.train(resume_from_checkpoint=str(tmp_path / "before/checkpoint-4"))
    assert difference(weights(resumed.model), weights(before.model)) == 0


@every_transform
def test_bytes_finished_on_the_device_are_the_same_images(rows, transform):
    """By every transform, one by one, in batches and from workers; evaluation and training."""
    floats, raw = (ImageDataset(rows, "image", "label", transform, seed=4, on_device=on_device) for on_device in (False, True))
    expected = pixels(floats[row] for row in range(len(floats)))
    assert torch.equal(pixels(raw.finished()[row] for row in range(len(raw))), expected)
    for workers in (0, 2):
        for batch, images in zip(torch.utils.data.DataLoader(raw, 7, num_workers=workers), expected.split(7), strict=True):
            assert batch["pixel_values"].dtype == torch.uint8
            assert torch.equal(tail_on_device(raw)(batch["pixel_values"], batch["augmentation_keys"]), images)


def test_pixels_that_are_no_bytes_stay_as_they_are(rows):
    """A processor whose resizing leaves more than whole numbers: the same floats, finished here or there."""
    form = ImageFormat.of_processor(BitImageProcessor(size={"height": 16, "width": 16}, do_center_crop=False))
    form = replace(form, whole=False, own=form.processor())
    raw = ImageDataset(rows, "image", "label", form.eval_transform(), on_device=True)
    assert raw[0]["pixel_values"].dtype == torch.float32
    made = raw.left(raw[0]["pixel_values"][None], raw[0]["augmentation_keys"][None])
    assert torch.equal(made[0], raw.finished()[0]["pixel_values"])


FORMATS = {
    "normalised": ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)),
    "in [-1, 1]": ((0.5,) * 3, (0.5,) * 3),
    "in [0, 1]": ((0.0,) * 3, (1.0,) * 3),
    "in [0, 255]": ((0.0,) * 3, (1 / 255,) * 3),
}


@pytest.mark.parametrize("name", FORMATS)
def test_erased_rectangles_hold_noise_of_the_format(name):
    """Of mean 0 and deviation 1 where the network's values are so; else of the mean and the deviation of pixels. Never clipped."""
    mean, std = FORMATS[name]
    tail = ImageFormat(32, mean=mean, std=std, order=(2, 1, 0)).train_transform(False, crop="none", random_erasing=1.0).tail
    grey = torch.full((400, 3, 32, 32), 128, dtype=torch.uint8)
    made, whole = tail(grey, hashed(torch.arange(400), 1)), tail.still(grey)
    noise = [made[:, channel][made[:, channel] != whole[:, channel]] for channel in range(3)]
    low, spread = ((0.0,) * 3, (1.0,) * 3) if name in ("normalised", "in [-1, 1]") else (IMAGENET_MEAN[::-1], IMAGENET_STD[::-1])
    unit = 255 if name == "in [0, 255]" else 1
    for values, centre, width in zip(noise, low, spread, strict=True):
        assert values.mean().item() == pytest.approx(unit * centre, abs=0.02 * unit * width)
        assert values.std().item() == pytest.approx(unit * width, rel=0.02)
        assert kstest(values[:5000].double().numpy(), "norm", (values.mean().item(), values.std().item())).pvalue > 1e-3


def test_erased_rectangles_are_those_of_random_erasing():
    """Area and aspect ratio of timm's settings, at uniform places, with the probability that was set."""
    keys = hashed(torch.arange(20_000), 3)
    chosen, edges = erased_boxes(keys, 200, 200, 0.3)
    assert chosen.float().mean().item() == pytest.approx(0.3, abs=0.015)
    top, bottom, left, right = edges.unbind(1)
    assert bool(((top >= 0) & (bottom <= 200) & (left >= 0) & (right <= 200)).all())
    area, aspect = ((bottom - top) * (right - left)).double() / 40000, ((bottom - top) / (right - left)).double().log()
    assert area.mean().item() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.01)
    assert aspect.mean().item() == pytest.approx(0, abs=0.05)
    assert aspect.abs().max().item() == pytest.approx(math.log(1 / 0.3), abs=0.1)
    alone = erased_boxes(keys[7:8], 200, 200, 0.3)
    assert torch.equal(alone[1], edges[7:8])


def test_collators_must_pass_the_keys_on(tmp_path, rows):
    data = ImageDataset(rows, "image", "label", TRANSFORMS["pad"], on_device=True)

    def forgetful(examples):
        return {name: torch.stack([torch.as_tensor(example[name]) for example in examples]) for name in ("pixel_values", "labels")}

    model = from_scratch("cifar_resnet20", 10, 16)
    with refuses("a batch must have 'pixel_values' and 'labels' and 'augmentation_keys', got \\['labels', 'pixel_values'\\]"):
        trainer(tmp_path, model, data, data_collator=forgetful).train()
    with refuses("got augmentation_keys of a data set that leaves that to the device; make the data set with on_device=False"):
        MixupCollator("cutmix", num_labels=10)([data[row] for row in range(4)])
    without = MixupCollator("cutmix", num_labels=10, base_collator=forgetful)
    with refuses("a batch must have 'augmentation_keys', which the data set gives, got none; pass them on"):
        trainer(tmp_path, model, data, data_collator=without).train()


def test_unreadable_images_are_named():
    data = Dataset.from_dict({"image": [Pillow.new("L", (20, 20)), None], "label": [0, 1]}, features=FEATURES)
    with refuses("must hold a readable image, got an error at row 1"):
        ImageDataset(data, "image", "label", TRANSFORMS["pad"])[1]


def test_repeated_augmentation(tmp_path):
    """Copies of an image come in a row on the list, go to different processes, and are augmented differently."""
    sampler = RepeatedAugmentation(50, 3, batch_size=4, processes=2, seed=1)
    order = list(sampler)
    assert len(order) == len(sampler) == 48
    assert len(set(order)) == 48
    assert len({row for row, _ in order}) == 16
    batches = [order[i : i + 4] for i in range(0, 48, 4)]
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        flat = [place for pair in zip(first, second, strict=True) for place in pair]
        assert all(one[0] == other[0] or other[1] == 0 for one, other in itertools.pairwise(flat))
        assert {row for row, _ in first} & {row for row, _ in second}
    sampler.set_epoch(1)
    assert list(sampler) != order

    form = ImageFormat(32)
    transform = form.train_transform(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5)
    data = ImageDataset(digits()["train"].select(range(24)), "image", "label", transform, seed=0)
    one, other = data[3, 0]["pixel_values"], data[3, 1]["pixel_values"]
    assert not torch.equal(one, other)
    assert torch.equal(one, data[3]["pixel_values"])
    assert torch.equal(other, data[3, 1]["pixel_values"])
    done = trainer(tmp_path, from_scratch("cifar_resnet20", 10, 32), data, repeated_augmentation=3, max_steps=2)
    done.train()
    with refuses("is for a hf_mixup"):
        trainer(tmp_path, repeated_augmentation=3).get_train_dataloader()


def test_transforms_are_as_set():
    """Sizes, crops and normalisation come out as set; a policy that timm does not know is refused."""
    image = Pillow.new("RGB", (80, 60), (124, 116, 104))
    form = ImageFormat(32, crop_ratio=0.875, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    assert form.train_transform(size=16, crop="resized", scale=(0.5, 1.0))(image).shape == (3, 16, 16)
    assert form.train_transform(crop="reflect", resize=40)(image)[0].unique().numel() == 1
    assert form.train_transform(crop="pad")(image)[0].unique().numel() in (1, 2)
    noise = Pillow.effect_noise((32, 32), 80).convert("RGB")
    assert torch.equal(form.train_transform(False, crop="none")(noise), ImageFormat(32, 1.0, form.mean, form.std).eval_transform()(noise))
    erased = form.train_transform(crop="resized", random_erasing=1.0)(image)
    assert erased[0].unique().numel() > 20
    with refuses("auto_augment must be a policy of timm"):
        form.train_transform(auto_augment="randm9")
    with refuses("train_crop must be"):
        form.train_transform(crop="reflct")


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "v0", "original", "augmix-m10"])
def test_policies_of_timm_go_as_far_as_they_say(policy):
    """Timm leaves no bit of an image at the highest strength, which new versions of Pillow refuse: it is black, as it was before."""
    image = Pillow.effect_noise((40, 40), 80).convert("RGB")
    transform = ImageFormat(32).train_transform(auto_augment=policy, crop="none", horizontal_flip=False)
    for key in range(150):
        transform(image, key)
    assert posterized(image, 0).getextrema() == ((0, 0),) * 3
    kept = np.asarray(posterized(image, 3))
    assert (kept == np.asarray(image) // 32 * 32).all()
    assert posterized(image, 8) is image


def test_every_epoch_augments_anew_on_several_processes(tmp_path):
    """The loader that accelerate makes for two processes tells its sampler of an epoch, and not the data set: the trainer does."""
    from accelerate.data_loader import prepare_data_loader

    data = ImageDataset(digits()["train"].select(range(32)), "image", "label", ImageFormat(32).train_transform(), seed=0)
    order = RepeatedAugmentation(32, 2, batch_size=8, processes=2, seed=0)
    loader = prepare_data_loader(torch.utils.data.DataLoader(data, 8, sampler=order), num_processes=2, process_index=1)
    assert {row for row, _ in itertools.chain(*loader.batch_sampler)} == {row for row, _ in order}
    loader.set_epoch(1)
    assert order.epoch == 1
    assert int(data._epoch) == 0
    trainer(tmp_path, from_scratch("cifar_resnet20", 10, 32), data, max_steps=-1, num_train_epochs=2).train()
    assert int(data._epoch) == 1
