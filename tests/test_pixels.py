"""Images of every depth, orientation and number of channels, as files and as arrays; sizes that follow from the data set; bad images, which are named."""

import io
import struct

import numpy as np
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, Features, Value, load_dataset
from datasets import Image as ImageColumn
from PIL import Image

from hf_mixup.arguments import DataArguments
from hf_mixup.data.dataset import ImageDataset, check_readable
from hf_mixup.data.pixels import read_image
from hf_mixup.data.processor import ImageFormat, format_from_scratch
from images import evaluate, folder, picture, script, train
from refusals import refuses

RAMP = np.linspace(0, 65535, 24 * 24).astype(np.uint16).reshape(24, 24)


def through_a_file(image, kind="png", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return Image.open(io.BytesIO(stream.getvalue()))


def grey(values):
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, -1)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_16_bits_are_scaled(kind):
    assert np.array_equal(np.asarray(read_image(through_a_file(Image.fromarray(RAMP), kind))), grey(RAMP >> 8))
    assert np.array_equal(np.asarray(read_image(Image.fromarray(RAMP.astype(">u2")))), grey(RAMP >> 8))
    assert np.array_equal(np.asarray(read_image(RAMP)), grey(RAMP >> 8))
    assert np.array_equal(np.asarray(read_image(Image.fromarray(RAMP), 1)), RAMP >> 8)


def test_32_bits_and_floats_are_scaled_or_refused():
    unit = (RAMP / 65535).astype(np.float32)
    for source in (through_a_file(Image.fromarray(unit), "tiff"), unit, torch.from_numpy(unit)):
        assert np.array_equal(np.asarray(read_image(source)), grey((unit * 255).round()))
    small = (RAMP >> 8).astype(np.int32)
    assert np.array_equal(np.asarray(read_image(through_a_file(Image.fromarray(small), "tiff"))), grey(small))
    with refuses("an image of mode I must hold values from 0 to 255, got 0 to 65535; scale them"):
        read_image(Image.fromarray(RAMP.astype(np.int32)))
    with refuses("an image of mode F must hold values from 0 to 1, got 0 to 65535"):
        read_image(Image.fromarray(RAMP.astype(np.float32)))
    for bad in (-0.1, float("nan"), float("inf")):
        with refuses("an array of float32 must hold values from 0 to 1"):
            read_image(np.where(unit == unit[3, 3], np.float32(bad), unit))


def with_tags(image, **values):
    """The bytes of an uncompressed TIFF whose tags say otherwise, as others write them. `pixels` are written over its own."""
    stream = io.BytesIO()
    image.save(stream, "tiff", tiffinfo={274: 1, 339: 1})  # upright, as most programs say, and unsigned
    file = bytearray(stream.getvalue())
    numbers = {"bits": 258, "photometric": 262, "start": 273, "sample_format": 339}
    places = {name: file.find(struct.pack("<HHI", number, 4 if name == "start" else 3, 1)) + 8 for name, number in numbers.items()}
    for name in values.keys() - {"pixels"}:
        file[places[name] : places[name] + 4] = struct.pack("<I", values[name])
    start = struct.unpack("<I", file[places["start"] : places["start"] + 4])[0]
    pixels = values.get("pixels", b"")
    file[start : start + len(pixels)] = pixels
    return bytes(file)


def packed_12(values):
    bits = "".join(f"{value:012b}" for value in np.asarray(values).ravel())
    return bytes(int(bits[place : place + 8], 2) for place in range(0, len(bits), 8))


DEEP = {
    "12 bits": (with_tags(Image.fromarray(RAMP), bits=12, pixels=packed_12(RAMP >> 4)), RAMP >> 8),
    "white is 0": (with_tags(Image.fromarray(RAMP), photometric=0), 255 - (RAMP >> 8)),
    "floats, white is 0": (with_tags(Image.fromarray((RAMP / 65535).astype(np.float32)), photometric=0), 255 - (RAMP / 257).round()),
    "8 bits, white is 0": (with_tags(Image.fromarray((RAMP >> 8).astype(np.uint8)), photometric=0), 255 - (RAMP >> 8)),
    "PGM": (b"P5 24 24 65535 " + RAMP.astype(">u2").tobytes(), RAMP >> 8),
    "PGM of 12 bits": (b"P5 24 24 4095 " + (RAMP >> 4).astype(">u2").tobytes(), RAMP >> 8),
    "PGM, dark": (b"P5 24 24 65535 " + (RAMP >> 8).astype(">u2").tobytes(), RAMP >> 16),
}
CARD = f"{'SIMPLE  =                    T':80}{'BITPIX  =                   16':80}{'NAXIS   =                    2':80}"
FITS = (
    f"{CARD}{'NAXIS1  =                   24':80}{'NAXIS2  =                   24':80}{'END':80}".ljust(2880).encode()
    + RAMP.astype(">u2").tobytes()
)


def in_a_data_set(file):
    return Dataset.from_dict(
        {"image": [{"bytes": file, "path": None}], "label": [0]}, features=Features({"image": ImageColumn(), "label": Value("int64")})
    )


@pytest.mark.parametrize("kind", DEEP)
def test_a_file_says_how_it_counts(tmp_path, kind):
    """As bytes, by its path, and in a data set, of a set of one's own too."""
    file, expected = DEEP[kind]
    (tmp_path / "file").write_bytes(file)
    for source in (file, tmp_path / "file", Image.open(io.BytesIO(file))):
        assert np.abs(np.asarray(read_image(source, 1)).astype(int) - expected).max() <= (kind == "PGM of 12 bits")
    transform = ImageFormat.of_images(None, "", 24, channels=1).eval_transform(normalise=False)
    seen = ImageDataset(in_a_data_set(file), "image", "label", transform)[0]["pixel_values"][0].mul(255).round().numpy()
    assert np.abs(seen - expected).max() <= (kind == "PGM of 12 bits")


def test_files_that_are_read_as_other_numbers_are_refused():
    signed = with_tags(Image.fromarray((RAMP >> 8).astype(np.uint8)), sample_format=2)
    for file, seen in ((signed, "signed numbers of 8 bits"), (FITS, "FITS of mode I;16")):
        assert Image.open(io.BytesIO(file)).size == (24, 24)
        with refuses(f"an image must hold numbers from 0 up, got {seen}.*; save it as PNG or as unsigned TIFF"):
            read_image(file)
        with refuses(f"got an error at row 0 \\(an image must hold numbers from 0 up, got {seen}"):
            ImageDataset(in_a_data_set(file), "image", "label", ImageFormat(24).eval_transform())[0]
        with refuses("every evaluation image must be readable, got 1 of 1 that are not"):
            check_readable(in_a_data_set(file), "image", "evaluation")


@pytest.mark.parametrize(
    ("make", "exact"),
    [
        (lambda image: image.quantize(32), True),
        (lambda image: image.convert("L"), True),
        (lambda image: image.convert("1"), True),
        (lambda image: image.convert("LA"), True),
        (lambda image: image.convert("CMYK"), True),
        (lambda image: Image.merge("RGBA", (*image.split(), Image.new("L", image.size, 0))), True),
    ],
)
def test_other_modes_are_as_pillow_has_them(make, exact):
    made = make(picture(20, 30, spread=60))
    assert np.array_equal(np.asarray(read_image(made)), np.asarray(made.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(tmp_path, orientation):
    image = picture(30, 20, spread=60)
    exif = Image.Exif()
    exif[0x112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    turned = read_image(tmp_path / "turned.png")
    assert turned.size == ((20, 30) if orientation > 4 else (30, 20))
    data = Dataset.from_dict({"image": [str(tmp_path / "turned.png")]}, features=Features({"image": ImageColumn()}))
    assert np.array_equal(np.asarray(turned), np.asarray(read_image(data[0]["image"])))  # turned once, in a data set too


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_channels_of_arrays_and_files(channels):
    """Whatever the layout, the same bytes; the transforms of training and evaluation keep all channels."""
    array = np.random.default_rng(0).integers(0, 256, (20, 24, channels), dtype=np.uint8)

    def bytes_of(source):
        read = read_image(source, channels)
        read = np.asarray(read) if isinstance(read, Image.Image) else read.permute(1, 2, 0).numpy()
        return read.reshape(20, 24, channels)

    for source in (
        array,
        np.moveaxis(array, -1, 0),
        torch.from_numpy(array).permute(2, 0, 1),
        array.astype(np.uint16) * 256,
        array.tolist(),
    ):
        assert np.array_equal(bytes_of(source), array)
    if channels in (2, 3, 4):
        assert np.array_equal(bytes_of(Image.fromarray(array, {2: "LA", 3: "RGB", 4: "RGBA"}[channels])), array)
    if channels == 4:
        assert np.array_equal(bytes_of(Image.fromarray(array, "CMYK")), array)
        opaque = read_image(picture(24, 20), 4)
        assert bool((opaque[3] == 255).all())
    form = ImageFormat.of_images(None, "", 16, channels=channels)
    for transform in (form.eval_transform(), *(form.train_transform(crop=crop) for crop in ("pad", "none", "resized"))):
        for colour in np.eye(channels, dtype=np.uint8):
            seen = transform(np.broadcast_to(255 * colour, (20, 24, channels)).copy())
            assert torch.equal(seen[:, 8, 8] > 0, torch.from_numpy(colour > 0))
    assert form.unnormalised(form.eval_transform()(array)[None]).shape == (1, 3, 16, 16)


def test_channels_that_do_not_fit_are_refused():
    with refuses("an image must have 6 channels, got 3 \\(mode RGB\\)"):
        read_image(picture(20, 20), 6)
    with refuses("an image must have 3 channels, got an array of shape \\(20, 24, 5\\); pass --channels"):
        read_image(np.zeros((20, 24, 5), np.uint8))
    with refuses("an image must be a PIL image, a path, or an array .*, got NoneType"):
        read_image(None)
    with refuses("auto_augment needs images of 3 channels, got 4"):
        ImageFormat.of_images(None, "", 16, channels=4).train_transform(auto_augment="rand-m9-mstd0.5-inc1")


SHORT = ("--image_size", 16, "--architecture", "cifar_resnet20", "--max_steps", 2, "--per_device_train_batch_size", 8)


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_scripts_train_on_any_channels(tmp_path, channels):
    """Grey and RGBA folders, and a column of arrays: trained, drawn, evaluated; the checkpoint knows its channels."""
    if channels == 6:
        arrays = np.random.default_rng(0).integers(0, 256, (24, 20, 24, 6), dtype=np.uint8)
        features = Features({"image": Array3D((20, 24, 6), "uint8"), "label": ClassLabel(names=["a", "b"])})
        rows = Dataset.from_dict({"image": list(arrays), "label": [0, 1] * 12}, features=features)
        rows.save_to_disk(tmp_path / "data")
        words = ("--dataset_name", tmp_path / "data", "--image_column_name", "image")
        sample = arrays[0]
    else:
        mode = {1: "L", 4: "RGBA"}[channels]
        folder(tmp_path / "data", 8, change=lambda image: image.convert(mode))
        words = ("--train_dir", tmp_path / "data")
        sample = tmp_path / "data/red/000.png"
    train(tmp_path / "out", *words, *SHORT, "--channels", channels, "--mix", "mixup", "cutmix")
    form = ImageFormat.of_checkpoint(tmp_path / "out", channels=channels)
    assert form.eval_transform()(sample).shape == (channels, 16, 16)
    words = tuple({"--train_dir": "--validation_dir"}.get(word, word) for word in words)
    found = evaluate(tmp_path / "out", tmp_path / "evaluated", *words, "--protocols", "fgsm", "occlusion")
    assert 0 <= found["attacks"]["fgsm"]["top1"] <= 1
    with refuses(f"channels must be those of the checkpoint, {channels}, got 5; leave it out"):
        evaluate(tmp_path / "out", tmp_path / "more", *words, "--channels", 5)
    script("visualize_mixup").main(
        ["--checkpoint", str(tmp_path / "out"), *map(str, words), "--count", "2", "--output", str(tmp_path / "picture.png")]
    )
    assert np.asarray(Image.open(tmp_path / "picture.png").convert("RGB")).std() > 5


def test_dark_and_bright_16_bit_images_are_told_apart(tmp_path):
    values = {"dark": 12000, "bright": 50000}
    for name, value in values.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for row in range(16):
            noise = np.random.default_rng(row).normal(value, 1500, (16, 16)).clip(0, 65535).astype(np.uint16)
            Image.fromarray(noise).save(tmp_path / f"data/{name}/{row}.png")
    words = ("--train_dir", tmp_path / "data", "--train_val_split", 0.25, "--image_size", 16, "--architecture", "cifar_resnet20")
    words = (*words, "--mix", "vanilla", "--max_steps", 20, "--per_device_train_batch_size", 12, "--learning_rate", 3e-3)
    assert train(tmp_path / "out", *words)["eval_top1"] == 1


# -- the size, and bad images -------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed_sizes(tmp_path):
    """Images of 30, 60 and 300 pixels in turn."""
    for row in range(30):
        place = tmp_path / "mixed" / ("a" if row % 2 else "b")
        place.mkdir(parents=True, exist_ok=True)
        picture(*((30, 30), (60, 50), (300, 200))[row % 3], seed=row).save(place / f"{row:02d}.png")
    return load_dataset("imagefolder", data_dir=str(tmp_path / "mixed"), split="train")


def test_the_size_is_that_of_the_set(mixed_sizes, caplog):
    """The median's, in any order; said in the log."""
    with caplog.at_level("INFO"):
        sizes = {ImageFormat.of_images(mixed_sizes.shuffle(seed=seed), "image").size for seed in range(8)}
    assert sizes == {64}
    assert "image_size 64: the longer side of the middle one of 30 images is 60 pixels" in caplog.text
    large = [row for row in range(30) if max(mixed_sizes[row]["image"].size) == 300]
    one_small = mixed_sizes.select([next(row for row in range(30) if row not in large), *large])
    assert ImageFormat.of_images(one_small, "image").size == 224


def test_training_without_random_sizes_is_evaluated_whole(mixed_sizes):
    """A central crop of seven eighths belongs to resized crops."""
    ratios = [ImageFormat.of_images(mixed_sizes, "image", 224, train_crop=crop).crop_ratio for crop in (None, "resized", "pad", "none")]
    assert ratios == [0.875, 0.875, 1, 1]


@pytest.mark.parametrize("content", [b"", b"<html>no</html>", None], ids=["empty", "HTML", "torn"])
def test_the_first_bad_image_is_named(tmp_path, caplog, content):
    data = folder(tmp_path / "data", 4)
    bad = data / "blue/000.png"
    bad.write_bytes(bad.read_bytes()[:1500] if content is None else content)
    rows = load_dataset("imagefolder", data_dir=str(data), split="train")
    images = ImageDataset(rows, "image", "label", ImageFormat(16).eval_transform())
    with refuses("every row must hold a readable image, got an error at row 0, .*blue/000.png \\(.*\\); repair or drop that row"):
        images[0]
    if content is not None:
        with refuses("every row must hold a readable image, got an error at row 0, .*blue/000.png"):
            format_from_scratch(DataArguments(), rows, "image")
    (data / "red/003.png").write_bytes(b"no")
    with refuses("every training image must be readable, got 2 of 12 that are not, listed above \\(.*blue/000.png .*red/003.png"):
        check_readable(rows, "image", "training")
    assert [record.message.split(" (")[0].split(", ")[0] for record in caplog.records if ".png" in record.message] == ["row 0", "row 11"]
    with refuses("every training image must be readable, got 2 of 12 that are not"):
        train(tmp_path / "out", "--train_dir", data, "--validation_dir", data, *SHORT, "--check_images")


def test_missing_images_are_named():
    rows = Dataset.from_dict({"image": [None, picture(20, 20)]}, features=Features({"image": ImageColumn()}))
    with refuses("got an error at row 0 \\("):
        format_from_scratch(DataArguments(), rows, "image")
    with refuses("got 1 of 2 that are not, listed above \\(row 0 "):
        check_readable(rows, "image", "evaluation")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": -32}, "image_size must be a whole number of at least 1, got -32"),
        ({"image_size": 0}, "image_size must be a whole number of at least 1, got 0"),
        ({"channels": 0}, "channels must be a whole number of at least 1, got 0"),
        ({"train_resize": -1}, "train_resize must be a whole number of at least 1"),
        ({"image_mean": [0.5, 0.5]}, "image_mean must have a value for each of 3 channels, got \\[0.5, 0.5\\]"),
        ({"image_std": [0.5, 0.5, 0.0]}, "image_std must be a number from 0.001 to 1, got 0.0"),
        ({"channels": 1, "image_std": [0.5, 0.5, 0.5]}, "image_std must have a value for each of 1 channels"),
        ({"crop_ratio": 1.5}, "crop_ratio must be a number from 0.01 to 1, got 1.5"),
        ({"crop_ratio": 0.0}, "crop_ratio must be a number from 0.01 to 1, got 0"),
        ({"crop_scale": [0.5]}, "crop_scale must be two numbers from 0 to 1"),
        ({"random_erasing": 2.0}, "random_erasing must be a number from 0 to 1, got 2"),
    ],
)
def test_image_arguments_out_of_range_are_refused(arguments, message):
    with refuses(message):
        format_from_scratch(DataArguments(**{"image_size": 32, **arguments}))


def test_pictures_of_files(tmp_path):
    """Files of one name in two folders are two pictures; an orientation is applied; what is no image is refused by its name."""
    visualize = script("visualize_mixup")
    for name, colour in (("a", (250, 0, 0)), ("b", (0, 0, 250))):
        (tmp_path / name).mkdir()
        picture(40, 30, colour).save(tmp_path / name / "000.png")
    exif = Image.Exif()
    exif[0x112] = 6
    picture(40, 30).save(tmp_path / "c.png", exif=exif)
    paths = [str(tmp_path / name) for name in ("a/000.png", "b/000.png", "c.png")]
    names, pictures = visualize.named(paths, 3)
    assert names == ["a/000", "b/000", "c"]
    assert [image.size for image in pictures] == [(40, 30), (40, 30), (30, 40)]
    assert np.asarray(pictures[0])[..., 0].mean() > 200 > 100 > np.asarray(pictures[1])[..., 0].mean()
    (tmp_path / "no.png").write_text("no")
    for wrong in ("no.png", "missing.png", "a"):
        with refuses(f"images must be files that can be read, got .*{wrong}"):
            visualize.named([paths[0], str(tmp_path / wrong)], 3)


def test_labels_stay_as_they_were():
    """Arrays come with their dtype, labels as plain numbers."""
    features = Features({"image": Array3D((8, 8, 2), "uint8"), "label": Value("int64")})
    rows = Dataset.from_dict({"image": [np.full((8, 8, 2), 7, np.uint8)] * 3, "label": [0, 1, 2]}, features=features)
    data = ImageDataset(rows, "image", "label", ImageFormat.of_images(None, "", 8, channels=2).eval_transform())
    assert [data[row]["labels"] for row in range(3)] == [0, 1, 2]
    assert data[1]["pixel_values"].unique().tolist() == pytest.approx([(7 / 255 - 0.5) / 0.5])
