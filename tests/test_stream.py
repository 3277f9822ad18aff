"""Streaming: the same pixels and classes as of a local data set, every row once."""

import io
import json
import shutil
import tarfile

import datasets
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, Features, Image, List, Value
from torch.utils.data import DataLoader

from hf_mixup.arguments import DataArguments
from hf_mixup.data.dataset import ImageDataset
from hf_mixup.data.processor import ImageFormat
from hf_mixup.data.sources import KnownClasses, load_images
from hf_mixup.data.stream import ImageStream, load_stream
from images import picture, script, train
from refusals import refuses


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    """`datasets` waits for five seconds after a pass over several files."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


NAMES = ["cat", "dog", "owl"]
FORM = ImageFormat(16)
CLASSES = Features({"image": Image(), "label": ClassLabel(names=NAMES)})


def rows(count, features=CLASSES, labels=None, first=0):
    """Row n has a picture of its own, and class n % 3."""
    labels = [row % 3 for row in range(first, first + count)] if labels is None else labels
    images = [picture(20, 20 + row % 5, (40 * (row % 6), 60, 9 * (row % 25)), row) for row in range(first, first + count)]
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def parquet(folder, train=4, test=10, files=3, **kind):
    """`files` files of `train` rows each, and one of the split `test`."""
    folder.mkdir(parents=True)
    for part in range(files):
        rows(train, first=part * train, **kind).to_parquet(folder / f"train-{part:05d}-of-{files:05d}.parquet")
    rows(test, first=100, **kind).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


def webdataset(path, count=9, labels=None):
    with tarfile.open(path, "w") as tar:
        for row in range(count):
            data = io.BytesIO()
            picture(20, 20, seed=row).save(data, "png")
            for end, content in (("png", data.getvalue()), ("cls", str(row % 3 if labels is None else labels[row]).encode())):
                info = tarfile.TarInfo(f"{row:04d}.{end}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def load(path, known=None, **arguments):
    return load_stream(DataArguments(dataset_name=str(path), streaming=True, **arguments), known=known)


def training(images, shuffle=True, seed=3):
    return ImageStream(images.train, FORM.train_transform(True, crop="resized"), seed, shuffle=shuffle, batch_size=4)


def plain(split):
    return ImageStream(split, FORM.eval_transform())


def pixels(stream, **loading):
    loaded = [batch["pixel_values"] for batch in DataLoader(stream, **{"batch_size": 4, **loading})]
    return torch.cat(loaded)


def in_any_order(images):
    return sorted(image.double().sum().item() for image in images)


def rows_of(stream, workers):
    """The pictures of a pass, as numbers that tell them apart, and their classes."""
    found = [(round(e["pixel_values"].double().sum().item(), 6), e["labels"]) for e in DataLoader(stream, None, num_workers=workers)]
    assert len(set(found)) == len(found)
    return sorted(found)


def both(path, known=None, **arguments):
    """The evaluation images that lie here, and of the stream."""
    here = load_images(DataArguments(dataset_name=str(path), **arguments), known=known)
    return ImageDataset(here.evaluation, here.image_column, here.label_column, FORM.eval_transform()), load(path, known, **arguments)


# -- the same as what lies here -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["folder of parquet", "file of parquet", "tar", "folder of tar", "csv of paths"])
def test_evaluation_shows_the_same_pixels_and_classes(tmp_path, source):
    arguments, known = {"train_split": "train[2:]", "eval_split": "train[:2]"}, KnownClasses(NAMES)
    if source == "folder of parquet":
        path, arguments = parquet(tmp_path / "data"), {}
    elif source == "file of parquet":
        path = parquet(tmp_path / "data") / "train-00000-of-00003.parquet"
    elif source == "tar":
        path = webdataset(tmp_path / "data.tar")
    elif source == "folder of tar":
        (tmp_path / "data").mkdir()
        path = webdataset(tmp_path / "data/train-00000.tar").parent
    else:
        for row in range(6):
            picture(20, 20, seed=row).save(tmp_path / f"{row}.png")
        path = tmp_path / "table.csv"
        path.write_text("image,label\n" + "".join(f"{row}.png,{NAMES[row % 3]}\n" for row in range(6)))
    here, images = both(path, known, **arguments)
    found = list(plain(images.evaluation))
    assert len(found) == len(here) >= 2
    names = here.data.features[here.label_column].names
    for one, other in zip(found, [here[row] for row in range(len(here))], strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        assert images.label_names[one["labels"]] == names[other["labels"]]


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "limits", [{}, {"max_train_samples": 7, "max_eval_samples": 5}, {"train_split": "train[3:8]", "eval_split": "test[1:]"}]
)
def test_every_row_once(tmp_path, workers, limits):
    here = load_images(DataArguments(dataset_name=str(parquet(tmp_path / "data"))))
    images = load(tmp_path / "data", **limits)
    wanted = {"train": range(12), "evaluation": range(10)}
    if "max_train_samples" in limits:
        wanted = {"train": range(7), "evaluation": range(5)}
    elif limits:
        wanted = {"train": range(3, 8), "evaluation": range(1, 10)}
    for role, numbers in wanted.items():
        map_style = ImageDataset(getattr(here, role).select(numbers), "image", "label", FORM.eval_transform())
        for shuffle in (False, True):
            stream = ImageStream(getattr(images, role), FORM.eval_transform(), shuffle=shuffle)
            assert rows_of(stream, workers) == rows_of(map_style, 0)


def test_augmentation_follows_from_seed_epoch_and_place(tmp_path):
    images = load(parquet(tmp_path / "data"))
    stream = training(images)
    first = pixels(stream)
    assert torch.equal(pixels(stream, batch_size=3), first)
    torch.manual_seed(5)
    for workers in (1, 2, 3):
        assert torch.equal(pixels(stream, num_workers=workers), first)
    stream.set_epoch(1)
    second = pixels(stream)
    assert in_any_order(second) != in_any_order(first)
    stream.set_epoch(0)
    assert torch.equal(pixels(stream), first)
    assert in_any_order(pixels(training(images, seed=4))) != in_any_order(first)
    # in the order of the files only the augmentation changes
    stream = training(images, shuffle=False)
    first = pixels(stream)
    stream.set_epoch(1)
    assert all(not torch.equal(one, other) for one, other in zip(pixels(stream), first, strict=True))


def test_the_order_changes_every_epoch(tmp_path):
    stream = ImageStream(load(parquet(tmp_path / "data")).train, FORM.eval_transform(), shuffle=True)
    orders = []
    for epoch in range(3):
        stream.set_epoch(epoch)
        orders.append([example["pixel_values"].sum().item() for example in stream])
    assert len(set(map(tuple, orders))) == 3
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])


def test_workers_that_stay_know_the_epoch(tmp_path):
    stream = training(load(parquet(tmp_path / "data")))
    loader = DataLoader(stream, 4, num_workers=2, persistent_workers=True)
    passes = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        passes.append(torch.cat([batch["pixel_values"] for batch in loader]))
    assert torch.equal(passes[0], passes[2])
    assert in_any_order(passes[0]) != in_any_order(passes[1])


# -- labels ---------------------------------------------------------------------------------------------------------------


def test_classes_are_those_of_the_checkpoint_by_name(tmp_path):
    theirs = ["owl", "ant", "cat", "dog"]
    known = KnownClasses(theirs, trains=False)
    here, images = both(parquet(tmp_path / "data"), known)
    assert images.label_names == theirs
    found = [example["labels"] for example in plain(images.evaluation)]
    assert found == [here[row]["labels"] for row in range(10)] == [theirs.index(NAMES[row % 3]) for row in range(100, 110)]
    named = Features({"image": Image(), "label": Value("string")})
    path = tmp_path / "names.parquet"
    rows(6, named, ["dog", "cat", "", "owl", None, "cat"]).to_parquet(path)
    images = load(path, KnownClasses(theirs), train_split="train", eval_split="train")
    assert [e["labels"] for e in plain(images.train)] == [3, 2, 0, 2]
    # class numbers of the data set are class numbers of the network
    images = load(webdataset(tmp_path / "numbers.tar"), KnownClasses(theirs), train_split="train[1:]", eval_split="train[:4]")
    assert [e["labels"] for e in plain(images.evaluation)] == [0, 1, 2, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_without_a_label_are_left_out(tmp_path, workers):
    path = tmp_path / "some.parquet"
    rows(6, labels=[0, -1, 2, None, 1, 1]).to_parquet(path)
    images = load(path, train_split="train", eval_split="train")
    assert sorted(e["labels"] for e in DataLoader(plain(images.train), None, num_workers=workers)) == [0, 1, 1, 2]


def test_every_label_is_checked(tmp_path):
    whole = Features({"image": Image(), "label": Value("int64")})
    path = tmp_path / "wrong.parquet"
    rows(5, whole, [0, 1, 2, 7, 1]).to_parquet(path)
    images = load(path, KnownClasses(NAMES), train_split="train", eval_split="train[:2]")
    with refuses("among the classes of the checkpoint, 'cat', 'dog', 'owl', got 7 at place 3 of the stream of 'train' in column 'label'"):
        list(plain(images.train))
    rows(3, Features({"image": Image(), "label": Value("string")}), ["cat", "bat", "dog"]).to_parquet(path)
    images = load(path, KnownClasses(NAMES), train_split="train", eval_split="train[:1]")
    with refuses("got 'bat' at place 1 of the stream of 'train'"):
        list(plain(images.train))


def test_an_image_that_cannot_be_read(tmp_path):
    path = tmp_path / "broken.parquet"
    good = io.BytesIO()
    picture(20, 20).save(good, "png")
    images = [{"bytes": good.getvalue(), "path": "good.png"}, {"bytes": b"no image", "path": "bad.png"}]
    Dataset.from_dict({"image": images, "label": [0, 1]}, features=CLASSES).to_parquet(path)
    images = load(path, train_split="train", eval_split="train[:1]")
    with refuses(r"got an error at place 1 of the stream of 'train', bad.png \(.*\); repair or drop"):
        list(plain(images.train))


# -- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"dataset_name": None, "train_dir": "images"}, "train_dir 'images'"),
        ({"dataset_name": "digits"}, "dataset_name 'digits'"),
        ({"cache_images": True}, "cache_images"),
        ({"check_images": True}, "check_images"),
        ({"train_val_split": 0.3}, "train_val_split 0.3"),
    ],
)
def test_refuses_what_needs_the_whole_data_set(arguments, match):
    with refuses(f"streaming reads images in order .*, got {match}"):
        DataArguments(**{"dataset_name": "some/data", "streaming": True, **arguments})


def test_refuses_folders_of_images_and_of_save_to_disk(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "images/train" / name).mkdir(parents=True)
        picture(8, 8).save(tmp_path / "images/train" / name / "1.png")
    rows(3).save_to_disk(tmp_path / "saved")
    for name in ("images", "saved"):
        with refuses("a folder of images or of save_to_disk"):
            load(tmp_path / name)


def test_refuses_what_it_cannot_know(tmp_path):
    path = parquet(tmp_path / "data")
    one = path / "train-00000-of-00003.parquet"
    with refuses("a split to evaluate on, got .'train'.; choose one with --eval_split"):
        load(one)
    with refuses("train_split of a stream must be .*, got 'train.:50%.'"):
        load(path, train_split="train[:50%]")
    with refuses("eval_split must be"):
        load(path, eval_split="holdout")
    with refuses("got none in 'train.50:.'"):
        load(one, train_split="train[50:]", eval_split="train[:2]")
    with refuses("must be known before it is read, got .* and no checkpoint"):
        load(webdataset(tmp_path / "data.tar"), train_split="train", eval_split="train")
    for number, (feature, labels) in enumerate([(List(ClassLabel(names=NAMES)), [[0], [1], [2]]), (Value("float32"), [0.5, 1.5, 2.0])]):
        file = tmp_path / f"{number}.parquet"
        rows(3, Features({"image": Image(), "label": feature}), labels).to_parquet(file)
        with refuses("one class for each image"):
            load(file, train_split="train", eval_split="train")
    file = tmp_path / "arrays.parquet"
    arrays = Features({"image": Array3D((4, 4, 3), "uint8"), "label": ClassLabel(names=NAMES)})
    Dataset.from_dict({"image": [[[[1] * 3] * 4] * 4] * 3, "label": [0, 1, 2]}, features=arrays).to_parquet(file)
    with refuses("images, paths or bytes"):
        load(file, train_split="train", eval_split="train")
    rows(3, labels=[-1, None, -1]).to_parquet(tmp_path / "none.parquet")
    with refuses("images with labels, got none in 'train'"):
        load(tmp_path / "none.parquet", train_split="train", eval_split="train")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "max_steps"),
        (["--max_steps", "2"], "image_size"),
        (["--max_steps", "2", "--image_size", "16", "--repeated_augmentation", "2"], "repeated_augmentation 2"),
    ],
)
def test_the_script_refuses(tmp_path, words, match):
    with refuses(f"streaming .*{match}"):
        train(tmp_path / "out", "--dataset_name", "some/data", "--streaming", "--mix", "cutmix", *words)


# -- the script -----------------------------------------------------------------------------------------------------------

SMALL = ("--streaming", "--mix", "cutmix", "--architecture", "cifar_resnet20", "--image_size", "16", "--per_device_train_batch_size", "4")


def test_a_run_leaves_the_usual_files(tmp_path):
    out = tmp_path / "out"
    words = ["--dataset_name", parquet(tmp_path / "data", train=3), "--mix", "cutmix", "--image_size", "16", "--max_steps", "4"]
    words += [
        "--dataloader_num_workers",
        "2",
        "--per_device_train_batch_size",
        "4",
        "--per_device_eval_batch_size",
        "4",
        "--recipe",
        "from_scratch",
    ]
    # the second pass begins in the fourth step
    measured = train(
        out,
        *words,
        "--streaming",
        *["--architecture", "cifar_resnet20", "--save_strategy", "no", "--do_train", "--do_eval", "--do_predict"],
    )
    assert {path.name for path in out.iterdir()} >= {
        "all_results.json", "config.json", "gallery.png", "mixup_config.json", "model.safetensors", "preprocessor_config.json", "README.md",
        "train_log.jsonl",
    }  # fmt: skip
    assert json.loads((out / "config.json").read_text())["id2label"] == dict(zip("012", NAMES, strict=True))
    # measured as what lies here is, and in its order
    for streaming in ([], ["--streaming"]):
        again = tmp_path / f"again{len(streaming)}"
        found = train(again, *words, *streaming, "--model_name_or_path", out, "--do_eval", "--do_predict", "--max_steps", "-1")
        assert found["eval_loss"] == pytest.approx(measured["eval_loss"], abs=1e-5)
        assert found["eval_top1"] == measured["eval_top1"]
        assert (again / "predict_results.txt").read_text() == (out / "predict_results.txt").read_text()
    with refuses("streaming"):
        script("run_evaluation").main([str(out), "--dataset_name", str(tmp_path / "data"), "--streaming"])


@pytest.mark.parametrize("rows_of_a_file", [8, 1])
def test_a_resumed_run_is_the_run(tmp_path, rows_of_a_file):
    """In the first pass over the stream, and in a later one."""
    data = parquet(tmp_path / "data", train=rows_of_a_file)
    often = [
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
        "--logging_strategy",
        "steps",
        "--logging_steps",
        "1",
        "--eval_strategy",
        "no",
    ]
    words = (
        "--dataset_name",
        data,
        *SMALL,
        *often,
        "--max_steps",
        "5",
        "--save_only_model",
        "false",
        "--save_total_limit",
        "9",
        "--do_train",
    )
    train(tmp_path / "whole", *words)
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "half/checkpoint-2")
    train(tmp_path / "half", *words, "--resume_from_checkpoint", "true")
    history = [json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("whole", "half")]
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in history]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5


def test_beyond_the_first_pass(tmp_path):
    """Masks are drawn at the end of a pass, and a run goes on from there."""
    data, out = parquet(tmp_path / "data", train=4, files=2), tmp_path / "out"
    words = ["--dataset_name", data, *SMALL, "--mix", "automix", "--save_strategy", "steps", "--save_steps", "3", "--eval_strategy", "no"]
    train(out, *words, "--max_steps", "3", "--do_train")
    assert {path.name for path in (out / "masks").iterdir()} == {"automix-000002.png", "automix-000003.png"}
    train(out, *words, "--max_steps", "5", "--do_train", "--resume_from_checkpoint", "true")
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 5
