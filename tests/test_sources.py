"""Data sets of many forms: which images are read, and which class each has."""

import csv
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from datasets import Array3D, ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as Pillow

from hf_mixup.arguments import DataArguments
from hf_mixup.core.losses import BCE, CrossEntropy
from hf_mixup.data.dataset import ImageDataset
from hf_mixup.data.labels import matched, of_network
from hf_mixup.data.processor import ImageFormat
from hf_mixup.data.sources import KnownClasses, check_loss, digits, load_images
from hf_mixup.report.run_folder import RunFolder, facts_of
from refusals import refuses

SHADES = {"cat": 40, "dog": 120, "owl": 200}  # of the images of a class


def picture(shade=0):
    return Pillow.new("L", (6, 5), shade)


def folder(path, classes=("cat", "dog"), count=3, extension="png"):
    """Images of a class have its shade, so that files with wrong labels are seen."""
    for name in classes:
        (path / name).mkdir(parents=True, exist_ok=True)
        for row in range(count):
            picture(SHADES.get(name, 0)).save(path / name / f"{row}.{extension}")
    return path


def load(training=True, **arguments):
    return load_images(
        DataArguments(**{name: str(value) if "dir" in name or name == "dataset_name" else value for name, value in arguments.items()}),
        training=training,
    )


def seen(data, column="label", names=None):
    """(shade, class) of all rows, sorted: what the network is taught."""
    # arrays stay arrays, which the data set reads as they are
    rows = [(row["image"] if hasattr(row["image"], "convert") else np.asarray(row["image"], dtype=np.uint8), row[column]) for row in data]
    rows = [(image.convert("L").getpixel((0, 0)) if hasattr(image, "convert") else image[0, 0].tolist(), label) for image, label in rows]
    assert all(shade[0] == shade[1] == shade[2] for shade, _ in rows if isinstance(shade, list))
    rows = [(shade[0] if isinstance(shade, list) else shade, label) for shade, label in rows]
    return sorted((shade, names[label] if names else label) for shade, label in rows)


def right(images, count=3, classes=("cat", "dog"), split="train"):
    data = getattr(images, split)
    assert seen(data, images.label_column, images.label_names) == sorted((SHADES[name], name) for name in classes for _ in range(count))


def table(labels, feature, names=("cat", "dog", "owl"), images=None):
    """Rows whose shade says their class, `labels` their label."""
    images = [picture(SHADES[name]) for name in names] if images is None else images
    return Dataset.from_dict({"image": images, "label": labels}, features=Features({"image": Image(), "label": feature}))


def saved(path, **splits):
    DatasetDict(splits).save_to_disk(path, num_shards=dict.fromkeys(splits, 1))  # without it, older releases divide by the number of rows
    return path


# -- folders --------------------------------------------------------------------------------------------------------------


def test_folders_at_different_depths(tmp_path):
    folder(tmp_path / "train"), folder(tmp_path / "deep/er/val", count=2)
    images = load(train_dir=tmp_path / "train", validation_dir=tmp_path / "deep/er/val")
    right(images), right(images, 2, split="evaluation")
    assert (images.name, images.evaluation_split, images.label_names) == (tmp_path.name, "validation", ["cat", "dog"])


@pytest.mark.parametrize("name", ["exp[1]", "a*b", "what?", "{x}", "photos [v2]/train", "**"])
def test_paths_are_no_patterns(tmp_path, name):
    for other in ("exp1", "aXb", "whatX", "photos v"):
        folder(tmp_path / other, ("ant", "bee"), 9)
    images = load(train_dir=folder(tmp_path / name, count=9), validation_dir=tmp_path / name)
    right(images, 9)


def test_links_are_followed_and_never_for_ever(tmp_path):
    folder(tmp_path / "a", ("cat",)), folder(tmp_path / "elsewhere", ("dog",))
    (tmp_path / "a/dog").symlink_to(tmp_path / "elsewhere/dog")
    (tmp_path / "a/cat/again").symlink_to(tmp_path / "a")
    (tmp_path / "a/cat/self").symlink_to(tmp_path / "a/cat")
    right(load(train_dir=tmp_path / "a", validation_dir=tmp_path / "a"))
    (tmp_path / "a/cat/again").unlink()
    (tmp_path / "b").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "b" / name).symlink_to(tmp_path / "a" / name)
    (tmp_path / "c").symlink_to(tmp_path / "b")
    right(load(train_dir=tmp_path / "c", validation_dir=tmp_path / "b"))


def test_classes_are_the_first_folders(tmp_path):
    folder(tmp_path / "a/cat", ("summer", "winter")), folder(tmp_path / "a", ("dog", "__owl__"))
    assert load(train_dir=tmp_path / "a", validation_dir=tmp_path / "a").label_names == ["__owl__", "cat", "dog"]
    assert len(load(train_dir=tmp_path / "a", validation_dir=tmp_path / "a").train) == 12


def test_folders_without_an_image_are_named(tmp_path, caplog):
    folder(tmp_path / "a"), folder(tmp_path / "a", (".git", "owl", "empty"))
    for file in (tmp_path / "a/owl").iterdir():
        file.rename(file.with_suffix(".heic"))
    for file in (tmp_path / "a/empty").iterdir():
        file.unlink()
    (tmp_path / "a/cat/.DS_Store").write_text(""), (tmp_path / "a/cat/._0.png").write_text(""), (tmp_path / "a/Thumbs.db").write_text("")
    right(load(train_dir=tmp_path / "a", validation_dir=tmp_path / "a"))
    for text in ("'owl' holds no image that can be read (3 .heic)", "'empty' is empty", "'.git' is hidden"):
        assert text in caplog.text


def test_files_that_pillow_reads_are_images(tmp_path):
    from PIL import features

    extensions = ["PNG", "jpg", "JPEG", "bmp", "tiff", "gif", *(name for name in ("webp", "avif") if features.check(name))]
    for extension in extensions:
        folder(tmp_path / "a", extension=extension, count=1)
    assert len(load(train_dir=tmp_path / "a", validation_dir=tmp_path / "a").train) == 2 * len(extensions)


def test_refused_folders(tmp_path):
    good = folder(tmp_path / "good")
    folder(tmp_path / "stray")
    picture().save(tmp_path / "stray/cover.jpg")
    with refuses("got '.*stray/cover.jpg' beside the folders 'cat', 'dog'; move it"):
        load(train_dir=tmp_path / "stray")
    with refuses("train_dir must hold one folder a class, got 3 images and no folder of images in '.*good/cat'"):
        load(train_dir=good / "cat")
    (tmp_path / "nothing").mkdir()
    with refuses("validation_dir must hold images, one folder a class, got nothing of '.*nothing'; check the path"):
        load(train_dir=good, validation_dir=tmp_path / "nothing")
    with refuses("train_dir must be a folder with one folder a class, got no such folder, '.*lost'"):
        load(train_dir=tmp_path / "lost")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/train.zip").write_bytes(b"PK")
    with refuses("got 1 .zip file of '.*packed'; unpack the archive"):
        load(train_dir=tmp_path / "packed")
    with refuses("got an archive, '.*train.zip'; unpack it"):
        load(train_dir=tmp_path / "packed/train.zip")
    with refuses("at least two classes, got one, 'cat'"):
        load(train_dir=folder(tmp_path / "one", ("cat",)))
    folder(tmp_path / "splits/train"), folder(tmp_path / "splits/val")
    with refuses("got the folders 'train', 'val' in '.*splits', which have names of splits"):
        load(train_dir=tmp_path / "splits")
    folder(tmp_path / "splits/demo")  # 'train', 'val' and this one are not three classes
    for argument in ("train_dir", "dataset_name"):
        with refuses(f"{argument} must hold one folder a class, got the folders 'train', 'val' in '.*splits', which have names of splits"):
            load(**{argument: tmp_path / "splits"})


def test_names_that_are_no_text(tmp_path):
    folder(tmp_path)
    (tmp_path / "cat/0.png").rename(os.fsdecode(os.fsencode(tmp_path / "cat") + b"/\xff.png"))
    with refuses("names of files and folders must be UTF-8, got b'.*xff.png' in .*; rename it"):
        load(train_dir=tmp_path)


def test_a_class_that_only_validation_has(tmp_path):
    folder(tmp_path / "train"), folder(tmp_path / "val", ("Cat", "dog"))
    with refuses("every class of 'validation' must be one of 'train', got 'Cat', where 'train' has 'cat', 'dog'"):
        load(train_dir=tmp_path / "train", validation_dir=tmp_path / "val")
    images = load(train_dir=tmp_path / "train", validation_dir=tmp_path / "val", allow_unseen_classes=True)
    assert images.label_names == ["cat", "dog", "Cat"]
    right(images)
    folder(tmp_path / "fewer", ("dog",))
    images = load(train_dir=tmp_path / "train", validation_dir=tmp_path / "fewer")
    right(images, classes=("dog",), split="evaluation")


def test_folders_of_whole_numbers_are_in_their_order(tmp_path):
    names = [str(number) for number in range(12)]
    folder(tmp_path, names, 1)
    assert load(train_dir=tmp_path, validation_dir=tmp_path).label_names == names


def test_names_for_people(tmp_path, monkeypatch):
    folder(tmp_path / "pets/train"), folder(tmp_path / "pets/val")
    assert load(train_dir=tmp_path / "pets/train", validation_dir=tmp_path / "pets/val").name == "pets"
    assert load(False, validation_dir=tmp_path / "pets/val").name == "pets"
    monkeypatch.chdir(tmp_path / "pets/train")
    for name in (".", "./", "../train"):
        images = load(train_dir=name)
        assert (images.name, images.repository) == ("pets", None)
    assert load(dataset_name="..").name == "pets"


def test_a_folder_of_splits_by_its_name(tmp_path):
    """As `--dataset_name`, with the splits that people make, and at any depth."""
    folder(tmp_path / "a[1]/train"), folder(tmp_path / "a[1]/dev", count=1)
    (tmp_path / "a[1]/train/dog").rename(tmp_path / "dog")
    (tmp_path / "a[1]/train/dog").mkdir()
    (tmp_path / "dog").rename(tmp_path / "a[1]/train/dog/deeper")
    images = load(dataset_name=tmp_path / "a[1]")
    assert images.evaluation_split == "dev"
    right(images), right(images, 1, split="evaluation")


def test_a_metadata_file_names_the_classes(tmp_path):
    folder(tmp_path / "train", ("x",), 4)
    rows = [("file_name", "label"), *((f"x/{row}.png", "ab"[row % 2]) for row in range(4))]
    (tmp_path / "train/metadata.csv").write_text("".join(f"{name},{label}\n" for name, label in rows))
    images = load(dataset_name=tmp_path)
    assert images.label_names == ["a", "b"]
    assert len(images.train) + len(images.evaluation) == 4


# -- splits ---------------------------------------------------------------------------------------------------------------


def test_splits_and_slices(tmp_path, caplog):
    data = digits()
    path = saved(
        tmp_path / "x", train=data["train"].select(range(200)), dev=data["test"].select(range(30)), extra=data["test"].select(range(50))
    )
    assert (load(dataset_name=path).evaluation_split, len(load(dataset_name=path).evaluation)) == ("dev", 30)
    images = load(dataset_name=path, train_split="train[:25%]+extra", eval_split="train[90%:]")
    assert (len(images.train), len(images.evaluation), images.evaluation_split) == (100, 20, "train[90%:]")
    assert images.evaluation["label"][:] == data["train"]["label"][180:200]
    assert "also trained on" not in caplog.text
    load(dataset_name=path, eval_split="train[90%:]")
    assert "also trained on" in caplog.text
    images = load(dataset_name=path, train_split="train[:10%]", eval_split="train")
    assert (len(images.train), len(images.evaluation)) == (20, 200)
    with refuses("eval_split must be a split or a slice such as train\\[:10%\\], got 'tset' .*; choose from train, dev, extra"):
        load(dataset_name=path, eval_split="tset")
    with refuses("train_split must hold images, got none"):
        load(dataset_name=path, train_split="train[:0]")


def test_the_evaluation_of_a_run_sees_what_it_held_out(tmp_path):
    path = saved(tmp_path / "x", train=digits()["train"].select(range(200)))
    run = load_images(DataArguments(dataset_name=str(path), train_val_split=0.3), seed=1)
    (tmp_path / "run/checkpoint-1").mkdir(parents=True)
    RunFolder(tmp_path / "run/checkpoint-1").record(processes=1)
    RunFolder(tmp_path / "run").record(held_out=run.held_out)
    for place in ("run", "run/checkpoint-1"):
        again = load_images(DataArguments(dataset_name=str(path)), seed=42, training=False, held_out=facts_of(tmp_path / place)["held_out"])
        assert [row["bytes"] for row in again.evaluation.cast_column("image", Image(decode=False))["image"]] == [
            row["bytes"] for row in run.evaluation.cast_column("image", Image(decode=False))["image"]
        ]
    with refuses("train_val_split must be that of the run, 0.3, got 0.2"):
        load_images(DataArguments(dataset_name=str(path), train_val_split=0.2), held_out=run.held_out)


def test_classes_of_one_image_can_be_held_out_of(tmp_path):
    path = saved(tmp_path / "x", train=table([0, 0, 0, 1], ClassLabel(names=["a", "b"]), ("cat", "cat", "cat", "dog")))
    images = load(dataset_name=path)
    assert (len(images.train), len(images.evaluation)) == (3, 1)


def test_splits_without_rows(tmp_path):
    data = table([0, 1, 1], ClassLabel(names=["a", "b"]))
    for name, splits in (
        ("validation", {"train": data, "validation": data.select([])}),
        ("train", {"train": data.select([]), "test": data}),
    ):
        with refuses(f"every split must hold images, got none in {name!r}; choose others"):
            load(dataset_name=saved(tmp_path / name, **splits))
    assert len(load(dataset_name=tmp_path / "validation", eval_split="train[:1]").evaluation) == 1
    assert len(load(False, dataset_name=tmp_path / "train").evaluation) == 3


def test_one_source_only(tmp_path):
    for arguments in ({"train_dir": "x"}, {"validation_dir": "x"}):
        with refuses("only one of dataset_name and train_dir or validation_dir can be set, got 'digits' and .*; leave one out"):
            DataArguments(dataset_name="digits", **arguments)
    with refuses("dataset_revision is for data sets of the Hub, got 'main'"):
        load(dataset_name=saved(tmp_path / "x", train=digits()["test"]), dataset_revision="main")
    for name in ("digits", tmp_path / "x", folder(tmp_path / "y")):
        with refuses("dataset_config_name is for data sets with configurations, got 'small' for"):
            load(dataset_name=name, dataset_config_name="small")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({name: value}, name) for name in ("max_train_samples", "max_eval_samples", "image_size", "train_image_size") for value in (0, -5)]
    + [
        ({"image_mean": [123.7, 116.3, 103.5]}, "image_mean must be a number from 0 to 1, got 123.7"),
        ({"image_std": [0.0, 1.0, 1.0]}, "image_std must be a number from 0.001 to 1"),
        ({"image_mean": [0.5], "image_std": [0.5, 0.5]}, "one value for each channel, got 1 and 2"),
        ({"crop_ratio": 0.0}, "crop_ratio"),
        ({"crop_scale": [1.0, 0.1]}, "crop_scale"),
        ({"random_erasing": 2.0}, "random_erasing"),
    ]
    + [({"train_val_split": value}, "train_val_split must be a share between 0 and 1") for value in (0.0, 1.0, 1.5, -0.2)],
)
def test_ranges(arguments, message):
    with refuses(message):
        DataArguments(**arguments)


# -- columns --------------------------------------------------------------------------------------------------------------


def columns_of_images(tmp_path):
    """The same three pictures in every type of column."""
    paths = []
    for name, shade in SHADES.items():
        picture(shade).save(tmp_path / f"{name}.png")
        paths.append(str(tmp_path / f"{name}.png"))
    content = [Path(path).read_bytes() for path in paths]
    pixels = [np.asarray(picture(shade).convert("RGB")) for shade in SHADES.values()]
    dictionary = {"bytes": Value("binary"), "path": Value("string")}
    return {
        "paths": (paths, Value("string")),
        "bytes": (content, Value("binary")),
        "dictionaries": ([{"bytes": one, "path": None} for one in content], dictionary),
        "undecoded": (paths, Image(decode=False)),
        "arrays": (pixels, Array3D((5, 6, 3), "uint8")),
        "lists": ([one.tolist() for one in pixels], List(List(List(Value("uint8"))))),
    }


@pytest.mark.parametrize("kind", ["paths", "bytes", "dictionaries", "undecoded", "arrays", "lists"])
def test_columns_of_images(tmp_path, kind):
    values, feature = columns_of_images(tmp_path)[kind]
    data = Dataset.from_dict({"image": values, "label": list(SHADES)}, features=Features({"image": feature, "label": Value("string")}))
    path = saved(tmp_path / "x", train=data, validation=data)
    right(load(dataset_name=path), 1, SHADES), right(load(dataset_name=path, image_column_name="image"), 1, SHADES, split="evaluation")


def test_columns_that_are_no_images(tmp_path):
    for feature, values in ((Value("int64"), [1, 2, 3]), (List(Image()), [[picture()]] * 3)):
        data = Dataset.from_dict({"image": values, "label": list(SHADES)}, features=Features({"image": feature, "label": Value("string")}))
        with refuses("the image column must hold images, paths, bytes or arrays of pixels, got .* in 'image' of 'train'"):
            load(dataset_name=saved(tmp_path / str(len(str(feature))), train=data), image_column_name="image")
    other = table([0, 1, 2], ClassLabel(names=list(SHADES)))
    with refuses("every split must have the image column 'picture', got \\['label', 'image'\\] in 'validation'"):
        load(
            dataset_name=saved(
                tmp_path / "y", train=other.rename_column("image", "picture"), validation=other.select_columns(["label", "image"])
            )
        )


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
@pytest.mark.parametrize("relative", [False, True])
def test_a_single_file(tmp_path, kind, relative):
    where = folder(tmp_path / "data [1]", SHADES)
    files = sorted(where.glob("*/*.png"))
    rows = [{"image": str(file.relative_to(where)) if relative else str(file), "label": file.parent.name} for file in files]
    path = where / f"list.{kind}"
    if kind in ("csv", "tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["image", "label"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader(), writer.writerows(rows)
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if kind == "jsonl" else json.dumps(rows))
    images = load_images(DataArguments(dataset_name=str(path), eval_split="train"), cache_dir=str(tmp_path / "cache"))
    right(images, 3, SHADES)
    (where / "list.docx").write_text("")
    with refuses("dataset_name must be a file of .csv, .*, got '.*list.docx'; convert it"):
        load(dataset_name=where / "list.docx")


def test_webdataset(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for row, (name, shade) in enumerate(SHADES.items()):
            content = io.BytesIO()
            picture(shade).save(content, "png")
            for extension, data in (("png", content.getvalue()), ("cls", str(row).encode())):
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    for name in (tmp_path, tmp_path / "train.tar"):
        images = load_images(DataArguments(dataset_name=str(name), eval_split="train"), cache_dir=str(tmp_path / "cache"))
        assert (images.image_column, images.label_column, images.label_names) == ("png", "cls", ["0", "1", "2"])
        assert sorted((row["png"].convert("L").getpixel((0, 0)), row["cls"]) for row in images.train) == [(40, 0), (120, 1), (200, 2)]


def test_errors_of_datasets_are_one_sentence(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/train.parquet").write_bytes(b"no parquet")
    with refuses("dataset_name must be 'digits', a folder, or a data set of the Hub that can be reached, or a file of one, got '.*broken'"):
        load(dataset_name=tmp_path / "broken")
    with refuses("dataset_name must be 'digits'"):
        load(dataset_name="somebody/nothing")


# -- labels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "feature", "names"),
    [
        (["dog", "cat", "owl"], Value("string"), ["cat", "dog", "owl"]),
        (["10", "9", "2"], Value("string"), ["2", "9", "10"]),
        ([1, 2, 3], Value("int64"), ["1", "2", "3"]),
        ([0, 100000, 200000], Value("int64"), ["0", "100000", "200000"]),
        ([0, 1, 2], Value("uint8"), ["0", "1", "2"]),
        ([True, False, True], Value("bool"), ["False", "True"]),
    ],
)
def test_labels_are_classes_with_names(tmp_path, labels, feature, names):
    images = load(dataset_name=saved(tmp_path / "x", train=table(labels, feature), test=table(labels, feature)))
    assert images.label_names == names
    for data in (images.train, images.evaluation):
        assert [names[label] for label in data["label"]] == list(map(str, labels))


def test_splits_are_matched_by_name(tmp_path):
    train = table([0, 1, 2], ClassLabel(names=["cat", "dog", "owl"]))
    for position, other in enumerate([
        table([2, 0, 1], ClassLabel(names=["dog", "owl", "cat"])),
        table(["cat", "dog", "owl"], Value("string")),
        table([0, 1, 2], Value("int32")),
        table([3, 1, 2], ClassLabel(names=["unused", "dog", "owl", "cat"])),
    ]):  # fmt: skip
        images = load(dataset_name=saved(tmp_path / str(position), train=train, validation=other))
        right(images, 1, SHADES), right(images, 1, SHADES, split="evaluation")


@pytest.mark.parametrize(
    "feature",
    [ClassLabel(names=list(SHADES)), Value("int64"), Value("string"), Value("float32")],
    ids=lambda f: str(getattr(f, "dtype", f)),
)
def test_rows_without_a_label_are_left_out(tmp_path, caplog, feature):
    labels = {"string": ["cat", None, "owl", "dog"], "float32": [0, None, 2, 1]}.get(feature.dtype, [0, -1, 2, 1])
    labels = [0, None, 2, 1] if isinstance(feature, ClassLabel) else labels
    data = table(labels, feature, ("cat", "dog", "owl", "dog"))
    images = load(dataset_name=saved(tmp_path / "x", train=data, validation=data))
    named = "string" if feature.dtype == "string" else None
    for split in (images.train, images.evaluation):
        assert seen(split) == [(40, 0), (120, 1), (200, 2)]
    assert named is None or images.label_names == ["cat", "dog", "owl"]
    assert caplog.text.count("1 of 4 rows have no label and are left out") == 2
    nothing = table([None] * 4 if feature.dtype in ("string", "float32") else [-1] * 4, feature, ("cat", "dog", "owl", "dog"))
    with refuses("images must have labels, got none in the 4 rows of 'test'"):
        load(dataset_name=saved(tmp_path / "y", train=data, test=nothing))


def test_wrong_labels_are_refused_before_training(tmp_path):
    names = ClassLabel(names=["cat", "dog"])
    good = table([0, 1, 1], names)
    for place, (data, message) in enumerate([
        (table([0, 5, 1], Value("int64")), "every class of 'test' must be one of 'train', got '5'"),
        (table([0, -100, 1], Value("int64")), "labels must be class numbers, 0 or more, got -100 at row 1 of 'test' in column 'label'"),
        (table(["cat", "cow", "dog"], Value("string")), "every class of 'test' must be one of 'train', got 'cow'"),
        (table([0.5, 1.5, 2.5], Value("float32")), "labels of all splits must be of one kind"),
    ]):  # fmt: skip
        with refuses(message):
            load(dataset_name=saved(tmp_path / str(place), train=good, test=data))


def test_lists_are_several_classes(tmp_path):
    expected = [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
    for place, (labels, feature, names) in enumerate([
        ([[0, 2], [1], []], List(Value("int64")), ["0", "1", "2"]),
        ([[0, 2], [1], []], List(ClassLabel(names=["a", "b", "c"])), ["a", "b", "c"]),
        ([["a", "c"], ["b"], []], List(Value("string")), ["a", "b", "c"]),
        (expected, List(Value("int8")), ["0", "1", "2"]),
        ([list(map(float, row)) for row in expected], List(Value("float64")), ["0", "1", "2"]),
    ]):  # fmt: skip
        images = load(dataset_name=saved(tmp_path / str(place), train=table(labels, feature), test=table(labels, feature)))
        assert (images.problem_type, images.label_names) == ("multi_label_classification", names)
        assert images.train["label"][:] == images.evaluation["label"][:] == expected
        check_loss(images, [BCE()])
        with refuses("labels must fit the loss CrossEntropy, got lists of classes in column 'label'; pass --loss bce"):
            check_loss(images, [CrossEntropy()])


def test_lists_are_read_alike_in_all_splits(tmp_path):
    """Classes 0 and 1 of one split look like a share for each of two classes."""
    classes, shares = [[0, 3], [1, 2], [0]], [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    kind = List(Value("int64"))
    images = load(dataset_name=saved(tmp_path / "a", train=table(classes, kind), test=table([[0, 1], [1, 0], [0, 1]], kind)))
    assert images.label_names == ["0", "1", "2", "3"]
    assert images.evaluation["label"][:] == [[1, 1, 0, 0]] * 3
    for place, (other, message) in enumerate([
        ([[1, 0], [0, 1], [0, 1]], "lists of shares must have one length in all splits, got 3 in 'train' and 2 in 'test' of column 'label'"),
        ([[0], [1], [2]], "of one kind in all splits, got a share for each class in 'train' and class numbers in 'test' of column 'label'"),
    ]):  # fmt: skip
        with refuses(message):
            load(dataset_name=saved(tmp_path / str(place), train=table(shares, kind), test=table(other, kind)))


def test_whole_floats_are_read_alike_in_all_splits(tmp_path):
    """`datasets` reads all splits of a table with the type of the first, whose hole makes it floats."""
    holes, whole = (table(labels, Value("float64"), (*SHADES, "dog")) for labels in ([0, None, 2, 1], [0, 1, 2, 1]))
    for place, splits in enumerate([{"train": holes, "test": whole}, {"train": whole, "test": holes}]):
        images = load(dataset_name=saved(tmp_path / str(place), **splits))
        assert images.label_names == ["0", "1", "2"]
        for split in splits.values():
            assert {(shade, label) for shade, label in seen(images.train) + seen(images.evaluation)} == {(40, 0), (120, 1), (200, 2)}, split


@pytest.mark.parametrize("extension", ["parquet", "arrow"])
def test_files_that_list_their_classes_otherwise_are_refused(tmp_path, extension):
    """`datasets` would take the numbers of all files for those of the first."""
    first, second = (table([0, 1, 2], ClassLabel(names=names)) for names in (["cat", "dog", "owl"], ["owl", "cat", "dog"]))

    def write(data, name):
        if extension == "parquet":
            data.to_parquet(tmp_path / name)
        else:
            data.save_to_disk(tmp_path / "made")
            os.replace(next((tmp_path / "made").glob("*.arrow")), tmp_path / name)
            shutil.rmtree(tmp_path / "made")

    write(first, f"train.{extension}"), write(first, f"validation.{extension}")
    right(load(dataset_name=tmp_path), 1, SHADES, split="evaluation")
    for name, told in (
        ("validation", "'cat', .* in train.{0} and 'owl', .* in"),
        ("train-00001", "'owl', .* in train-00001.{0} and 'cat', .* in"),
    ):
        write(second, f"{name}.{extension}")
        with refuses(f"files of one data set must list their classes alike, got {told.format(extension)} .*, column 'label'"):
            load(dataset_name=tmp_path)
        os.remove(tmp_path / f"{name}.{extension}")
    with refuses("splits that are joined must have the same columns and classes, got ClassLabel"):
        load(dataset_name=saved(tmp_path / "x", train=first, validation=second, test=first), train_split="train+validation")


@pytest.mark.parametrize("beside", ["README.md", "classes.txt", "notes.xml", "labels.csv", "meta.json"])
def test_a_file_beside_class_folders_changes_nothing(tmp_path, beside):
    """`datasets` would read the folder, leave out links, and order numbers by their letters."""
    folder(tmp_path / "data", ("10", "9", "1"), 2), folder(tmp_path / "elsewhere", ("11",), 2)
    os.symlink(tmp_path / "elsewhere" / "11", tmp_path / "data" / "11")
    (tmp_path / "data" / beside).write_text("{}" if beside.endswith("json") else "a,b\n")
    images = load(dataset_name=tmp_path / "data", train_val_split=0.5)
    assert images.label_names == ["1", "9", "10", "11"]
    assert len(images.train) + len(images.evaluation) == 8


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_format_that_was_saved_is_left_out(tmp_path, kind):
    """It would give the numbers of a palette's colours as pixels, and hide columns."""
    pictures = [Pillow.new("RGB", (6, 5), (shade, shade, shade)).quantize(8) for shade in SHADES.values()]
    data = table([0, 1, 2], ClassLabel(names=list(SHADES)), images=pictures)
    path = saved(tmp_path, train=data.with_format(kind), test=data.with_format(kind, columns=["image"]))
    images = load(dataset_name=path)
    right(images, 1, SHADES), right(images, 1, SHADES, split="evaluation")
    transform = ImageFormat(8).eval_transform(normalise=False)
    for given in (images.evaluation, data.with_format(kind)):
        rows = ImageDataset(given, "image", "label", transform)
        assert [round(float(row["pixel_values"].mean() * 255)) for row in rows] == list(SHADES.values())
    changed = data.with_transform(lambda rows: {**rows, "image": [Pillow.new("L", (6, 5), 77) for _ in rows["image"]]})
    assert round(float(ImageDataset(changed, "image", "label", transform)[0]["pixel_values"].mean() * 255)) == 77


@pytest.mark.parametrize("mode", ["RGB", "L", None])
def test_a_declared_mode_clips_nothing(tmp_path, mode):
    deep = [Pillow.fromarray(np.full((6, 5), 256 * shade, np.uint16)) for shade in SHADES.values()]
    features = Features({"image": Image(mode=mode), "label": ClassLabel(names=list(SHADES))})
    coloured = Pillow.new("RGB", (6, 5), (200, 0, 0))
    data = Dataset.from_dict({"image": [*deep, coloured], "label": [0, 1, 2, 0]}, features=features)
    images = load(dataset_name=saved(tmp_path, train=data, test=data))
    rows = ImageDataset(images.train, "image", "label", ImageFormat(8).eval_transform(normalise=False))
    assert [round(float(rows[row]["pixel_values"].mean() * 255)) for row in range(3)] == list(SHADES.values())
    channels = rows[3]["pixel_values"].mean((1, 2)) * 255
    assert channels.round().tolist() == ([60, 60, 60] if mode == "L" else [200, 0, 0])


def test_columns_that_can_be_mistaken_are_asked_for(tmp_path):
    kinds = {"image": Image(), "sex": ClassLabel(names=["f", "m"]), "label": Value("int64"), "mask": Image()}
    rows = {"image": [picture(shade) for shade in SHADES.values()], "sex": [0, 1, 0], "label": [0, 1, 2], "mask": [picture()] * 3}
    data = Dataset.from_dict(rows, features=Features(kinds))
    path = saved(tmp_path / "a", train=data, test=data)
    with refuses("the label column must be known, got 'sex' of type label and 'label' of that name in 'train'; pass --label_column_name"):
        load(dataset_name=path)
    assert load(dataset_name=path, label_column_name="label").label_names == ["0", "1", "2"]
    paths = [str(tmp_path / f"{name}.png") for name in SHADES]
    for place, shade in zip(paths, SHADES.values(), strict=True):
        picture(shade).save(place)
    data = data.remove_columns(["image", "sex"]).add_column("image", paths)
    path = saved(tmp_path / "b", train=data, test=data)
    with refuses("the image column must be known, got 'mask' of type image and 'image' of that name"):
        load(dataset_name=path)
    assert seen(load(dataset_name=path, image_column_name="image").train) == [(40, 0), (120, 1), (200, 2)]


def test_floats_are_a_regression(tmp_path):
    data = table([0.5, None, -1.0], Value("float64"))
    images = load(dataset_name=saved(tmp_path / "x", train=data, test=data))
    assert (images.problem_type, images.label_names, images.train["label"][:]) == ("regression", ["label"], [0.5, -1.0])
    with refuses("labels must fit the loss CrossEntropy, got float numbers"):
        check_loss(images, [CrossEntropy()])
    whole = load_images(DataArguments(dataset_name=str(saved(tmp_path / "y", train=table([3, 4, -1], Value("int64"))))), regression=True)
    assert sorted(whole.train["label"][:] + whole.evaluation["label"][:]) == [-1, 3, 4]


# -- the classes of a checkpoint ------------------------------------------------------------------------------------------

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]


@pytest.mark.parametrize(
    ("known", "wanted", "numbered", "found"),
    [
        (["red", "green"], ["green", "red"], False, [1, 0]),
        (["red", "green", "blue"], ["blue", "red"], False, [2, 0]),
        (DIGITS, ["0", "1", "2", "10", "11"], False, [0, 1, 2, 10, 11]),
        (DIGITS, ["000", "001"], False, [0, 1]),
        (DIGITS, ["1", "12"], False, None),
        (["1", "2", "3"], ["2", "3"], False, [1, 2]),
        (["1", "2", "3"], ["2", "3"], True, [1, 2]),  # a network of bare numbers
        (["1", "2", "0"], ["0", "2"], True, [0, 2]),
        (["red", "green"], ["0", "1"], True, [0, 1]),
        (["red", "green"], ["1", "2"], True, None),
        (["LABEL_0", "LABEL_1"], ["cat", "dog"], False, [0, 1]),
        (["LABEL_0", "LABEL_1"], ["1"], False, [1]),
        (["LABEL_0", "LABEL_1"], ["cat"], False, None),
        (["cat", "dog"], ["ant", "bee"], False, None),
        (["cat", "dog"], ["cat", "bee"], False, None),
        (["crane", "crane", "owl"], ["crane", "owl"], False, None),
        (["goldfish, Carassius auratus", "tench, Tinca tinca", "a"], ["n01440764", "n01443537"], False, [1, 0]),
        (["n01443537", "n01440764"], ["n01440764"], False, [1]),
        (["goldfish", "tench"], ["n01440764", "n01443537"], False, None),
        (["Mo\u0308bel", "owl"], ["owl", "M\u00f6bel"], False, [1, 0]),
    ],
)
def test_classes_of_a_network(known, wanted, numbered, found):
    assert matched(known, wanted, numbered=numbered) == found
    if found is None:
        with refuses("the network must know the classes of the data set, got"):
            of_network(known, wanted, numbered=numbered)


def test_classes_of_imagenet(caplog):
    """Folders are synsets, and the names of the thousand classes are not all different."""
    from timm.data import ImageNetInfo

    synsets = ImageNetInfo("imagenet-1k").label_names()
    names = ImageNetInfo("imagenet-1k").label_descriptions()
    assert len(set(names)) < 1000
    for known in (names, [f"LABEL_{number}" for number in range(1000)], synsets):
        assert matched(known, synsets) == list(range(1000))
        assert matched(known, synsets[517:500:-3]) == list(range(517, 500, -3))
    assert matched(names, [str(number) for number in range(1000)]) == list(range(1000))
    renamed = ["crane bird" if number == 134 else name for number, name in enumerate(names)]
    caplog.clear()
    assert matched(names, renamed) == list(range(1000))
    assert "1 of 1000 classes are spelled differently in the network; these are matched: 'crane bird' for 'crane'" in caplog.text
    assert matched(names[::-1], renamed) is None
    assert matched(list("abcdefghij"), [*"abcdefghi", "J"]) == list(range(10))
    assert matched(list("abcdefghij"), [*"bacdefghij"[:9], "J"]) is None


def test_labels_are_those_of_the_checkpoint(tmp_path, caplog):
    path = folder(tmp_path / "x", SHADES)
    arguments = DataArguments(train_dir=str(path), validation_dir=str(path))
    images = load_images(arguments, known=KnownClasses(["owl", "dog", "cat"]))
    assert images.label_names == ["owl", "dog", "cat"]
    right(images, 3, SHADES), right(images, 3, SHADES, split="evaluation")
    # nothing is trained: fewer classes are evaluated among all of the network's
    images = load_images(arguments, known=KnownClasses(["ape", "owl", "dog", "cat"], trains=False))
    assert images.label_names == ["ape", "owl", "dog", "cat"]
    right(images, 3, SHADES)
    one = DataArguments(train_dir=str(folder(tmp_path / "one", ("dog",))), validation_dir=str(tmp_path / "one"))
    assert set(load_images(one, known=KnownClasses(["ape", "dog"], trains=False)).evaluation["label"]) == {1}
    assert not caplog.text
    assert load_images(arguments, known=KnownClasses(["ape", "owl", "dog", "cat"])).label_names == list(SHADES)
    assert load_images(arguments, known=KnownClasses(["LABEL_0", "LABEL_1", "LABEL_2"])).label_names == list(SHADES)
    assert "no names" in caplog.text
    assert load_images(arguments, known=KnownClasses(["a", "b", "c"])).label_names == list(SHADES)
    assert "knows other classes ('a', 'b', 'c') than those of the data set ('cat', 'dog', 'owl')" in caplog.text
    with refuses("the network must know the classes of the data set"):
        load_images(arguments, known=KnownClasses(["a", "b", "c"], trains=False))
