"""What a pre-training reads: images with labels, with some, with none, and which of them the kNN monitor takes."""

import json
import logging

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModel

from hf_mixup.arguments import DataArguments
from hf_mixup.cli.pretrain import parse
from hf_mixup.data.sources import load_images
from hf_mixup.pretraining.data import load_pretraining_images
from images import COLOURS, folder, picture, script
from refusals import refuses


def flat(path, count=8):
    path.mkdir(parents=True)
    for row in range(count):
        picture(20, 20, seed=row).save(path / f"{row}.png")
    return path


def table(path, name="train", count=6, **columns):
    """A folder of parquet files, of images and other columns."""
    path.mkdir(exist_ok=True)
    images = [picture(20, 20, seed=row) for row in range(count)]
    data = datasets.Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image())
    data.to_parquet(path / f"{name}.parquet")
    return path


def pixels(data, column="image"):
    return [np.asarray(image).tobytes() for image in data[column]]


def loaded(asked=(), **arguments):
    found = load_pretraining_images(DataArguments(**{name: str(value) for name, value in arguments.items()}), 0, asked=asked)
    return found.images, found.bank


def check_no_monitor(images, bank, count):
    assert len(images.train) == count
    assert set(images.train[images.label_column]) == {-1}
    assert len(bank) == len(images.evaluation) == 0


def test_class_folders_are_as_in_a_training(tmp_path):
    root = folder(tmp_path / "photos")
    images, bank = loaded(train_dir=root)
    wanted = load_images(DataArguments(train_dir=str(root)), 0)
    for found, other in ((images.train, wanted.train), (images.evaluation, wanted.evaluation), (bank, wanted.train)):
        assert pixels(found) == pixels(other)
        assert found["label"][:] == other["label"][:]
    assert images.label_names == wanted.label_names


@pytest.mark.parametrize("argument", ["train_dir", "dataset_name"])
def test_a_folder_without_classes(tmp_path, argument, caplog):
    check_no_monitor(*loaded(**{argument: flat(tmp_path / "photos")}), 8)
    assert "no kNN monitor: no column of classes in 'train'" in caplog.text
    with refuses(r"the kNN monitor, which --eval_strategy asks for, needs .* got no column of classes"):
        loaded(["eval_strategy"], **{argument: tmp_path / "photos"})


def test_images_beside_class_folders(tmp_path):
    root = folder(tmp_path / "photos", count=3)
    picture(20, 20).save(root / "loose.png")
    check_no_monitor(*loaded(train_dir=root), 3 * len(COLOURS) + 1)


def test_one_class_folder_is_no_class(tmp_path, caplog):
    check_no_monitor(*loaded(train_dir=folder(tmp_path / "photos", classes={"red": COLOURS["red"]})), 8)
    assert "got one class, 'red'" in caplog.text or "one class, 'red'" in caplog.text


def test_labels_of_the_evaluation_alone(tmp_path, caplog):
    """They need a bank. Where they are asked for, they are refused, else left alone."""
    flat(tmp_path / "photos/train")
    folder(tmp_path / "photos/validation", count=2)
    check_no_monitor(*loaded(dataset_name=tmp_path / "photos"), 8)
    assert "no column of classes in 'train'" in caplog.text
    with refuses(r"which --validation_dir asks for, needs .* got no column of classes in 'train'.*; leave out --validation_dir"):
        loaded(train_dir=tmp_path / "photos/train", validation_dir=tmp_path / "photos/validation")
    flat(tmp_path / "other/validation")
    with refuses(r"which --validation_dir asks for, needs .* got no column 'label' in 'validation'"):
        loaded(train_dir=folder(tmp_path / "classes", count=2), validation_dir=tmp_path / "other/validation")


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({}, "no column of classes"),
        ({"image_id": [10, 11, 12, 13, 14, 15]}, "no column of classes"),
        ({"caption": list("abcdef")}, "no column of classes"),
        ({"label": [None] * 6}, "no label in 'train'"),
        ({"label": [-1] * 6}, "no label in 'train'"),
        ({"label": [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]}, "not one class for each image"),
        ({"label": [[0, 1], [1], [0], [1], [0], [2]]}, "not one class for each image"),
        ({"label": [7] * 6}, "one class, '7'"),
        ({"label": [{"box": 1}] * 6}, "labels must be classes"),
    ],
)
def test_tables_whose_labels_cannot_serve(tmp_path, columns, why, caplog):
    check_no_monitor(*loaded(dataset_name=table(tmp_path / "data", **columns)), 6)
    assert why in caplog.text
    with refuses("which --eval_strategy asks for"):
        loaded(["eval_strategy"], dataset_name=tmp_path / "data")


def test_a_label_column_by_its_name(tmp_path):
    table(tmp_path / "data", image_id=[0, 1, 2, 0, 1, 2], kind=[0, 1] * 3)
    images, bank = loaded(dataset_name=tmp_path / "data", label_column_name="kind")
    assert sorted(bank["kind"][:] + images.evaluation["kind"][:]) == [0, 0, 0, 1, 1, 1]
    with refuses("which --label_column_name asks for, .*'kin'"):
        loaded(dataset_name=tmp_path / "data", label_column_name="kin")


def test_images_without_a_label_are_trained_on_too(tmp_path):
    """As of STL-10, whose few labels are the bank's."""
    labels = [0, None, 1, -1, 1, 0]
    table(tmp_path / "data", label=labels)
    table(tmp_path / "data", "test", 4, label=[0, 1, None, 1])
    images, bank = loaded(dataset_name=tmp_path / "data")
    assert images.train["label"][:] == [0, -1, 1, -1, 1, 0]
    assert bank["label"][:] == [0, 1, 1, 0]
    assert pixels(bank) == [pixels(images.train)[row] for row in (0, 2, 4, 5)]
    assert images.evaluation["label"][:] == [0, 1, 1]


def test_held_out_images_are_not_trained_on(tmp_path):
    labels = [0, 1] * 8 + [None] * 4
    table(tmp_path / "data", count=20, label=labels)
    images, bank = loaded(dataset_name=tmp_path / "data")
    every = pixels(images.train) + pixels(images.evaluation)
    assert len(set(every)) == len(every) == 20
    assert len(images.evaluation) == 3  # 15 % of 16
    assert (len(images.train), len(bank)) == (17, 13)
    assert -1 not in images.evaluation["label"][:]


def test_the_first_of_some_samples(tmp_path):
    table(tmp_path / "data", count=20, label=[0, 1] * 8 + [None] * 4)
    few = load_pretraining_images(DataArguments(str(tmp_path / "data"), max_train_samples=9, max_eval_samples=2), 0)
    assert (len(few.images.train), len(few.images.evaluation)) == (9, 2)
    assert len(few.bank) == sum(label != -1 for label in few.images.train["label"][:])


def test_evaluation_of_other_classes(tmp_path, caplog):
    table(tmp_path / "data", label=["cat", "dog"] * 3)
    table(tmp_path / "data", "test", 2, label=["owl", "cat"])
    check_no_monitor(*loaded(dataset_name=tmp_path / "data"), 6)
    assert "'owl'" in caplog.text
    with refuses("which --eval_split asks for, .*'owl'"):
        loaded(dataset_name=tmp_path / "data", eval_split="test")


def test_no_images_are_refused(tmp_path):
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"image": []}).cast_column("image", datasets.Image())}).save_to_disk(
        tmp_path / "data"
    )
    with refuses("must hold images, got none"):
        loaded(dataset_name=tmp_path / "data")
    (tmp_path / "empty").mkdir()
    with refuses("must hold images"):
        loaded(train_dir=tmp_path / "empty")


@pytest.mark.parametrize("words", [["--streaming"], ["--report_dir", "reports"]])
def test_arguments_without_effect_are_refused(words):
    with refuses(f"{words[0]} has no effect on pre-training, got"):
        parse(words)


def test_the_script_trains_on_a_folder_without_classes(tmp_path, caplog):
    out = tmp_path / "run"
    words = (
        "--train_dir",
        flat(tmp_path / "photos", 12),
        "--image_size",
        16,
        "--architecture",
        "cifar_resnet20",
        "--per_device_train_batch_size",
        4,
    )
    more = ("--base_args", '{"projector": [16, 8], "queue_size": 16}', "--max_steps", 2, "--use_cpu", "--disable_tqdm", "true")
    with caplog.at_level(logging.INFO):
        script("run_pretraining").main(list(map(str, ["--output_dir", out, *words, *more, "--check_images", "--cache_images"])))
    with refuses("the kNN monitor, which --knn_neighbours asks for"):
        script("run_pretraining").main(list(map(str, ["--output_dir", tmp_path / "other", *words, *more, "--knn_neighbours", 5])))
    assert not (tmp_path / "other").exists()
    assert not [name for name in json.loads((out / "all_results.json").read_text()) if "knn" in name]
    card = (out / "README.md").read_text()
    assert "Not measured." in card
    assert "12 of 16 x 16" in card
    with torch.no_grad():
        assert AutoModel.from_pretrained(out).eval()(torch.randn(2, 3, 16, 16)).pooler_output.flatten(1).shape == (2, 64)
