"""Data of a pre-training: images with labels, with some, with none, and which of them the kNN monitor uses."""

import json
import logging
import shutil

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from safetensors.torch import load_file
from transformers import AutoModel

from hf_mixup.arguments import DataArguments
from hf_mixup.cli.pretrain import parse
from hf_mixup.data.processor import ImageFormat
from hf_mixup.data.sources import load_images
from hf_mixup.data.stream import ImageStream
from hf_mixup.pretraining.data import load_pretraining_images
from hf_mixup.pretraining.trainer import ViewCollator
from hf_mixup.pretraining.views import view_transform
from images import COLOURS, folder, picture, script
from pretrained import TwoViews, trainer
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
    with refuses("which --max_eval_samples asks for, needs images of known classes"):
        load_pretraining_images(DataArguments(train_dir=str(tmp_path / "photos/train"), max_eval_samples=3))
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
    none = datasets.Dataset.from_dict({"image": []}).cast_column("image", datasets.Image())
    # without num_shards, older releases divide by the number of rows
    datasets.DatasetDict({"train": none}).save_to_disk(tmp_path / "data", num_shards={"train": 1})
    with refuses("must hold images, got none"):
        loaded(dataset_name=tmp_path / "data")
    (tmp_path / "empty").mkdir()
    with refuses("must hold images"):
        loaded(train_dir=tmp_path / "empty")


def test_a_limit_for_each_class_is_refused():
    with refuses("pre-training does not look at classes, got max_train_samples_per_class 2; pass max_train_samples"):
        load_pretraining_images(DataArguments("digits", max_train_samples_per_class=2))


@pytest.mark.parametrize("words", [["--repeated_augmentation", "2"], ["--report_dir", "reports"]])
def test_arguments_without_effect_are_refused(words):
    with refuses(f"{words[0].removeprefix('--')} has no effect on pre-training, got"):
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


# -- streams ----------------------------------------------------------------------------------------------------------------


def stored(folder, count=11, labelled=False, files=2):
    """Parquet files of images, with a class or a caption beside them."""
    folder.mkdir()
    for part in range(files):
        images = [picture(20, 20 + row % 3, seed=100 * part + row) for row in range(count)]
        other = {"label": [row % 2 for row in range(count)]} if labelled else {"caption": ["a picture"] * count}
        features = Features({"image": Image(), **({"label": ClassLabel(names=["a", "b"])} if labelled else {"caption": Value("string")})})
        Dataset.from_dict({"image": images, **other}, features=features).to_parquet(folder / f"train-{part:05d}-of-{files:05d}.parquet")
    return folder


def streamed(folder, seed=3, batch=4, epoch=0, **arguments):
    found = load_pretraining_images(DataArguments(dataset_name=str(folder), streaming=True, **arguments))
    assert not len(found.bank) + len(found.images.evaluation)
    stream = ImageStream(found.images.train, view_transform(ImageFormat(16), "simclr"), seed, shuffle=True, batch_size=batch)
    stream.set_epoch(epoch)
    return stream


@pytest.mark.parametrize("labelled", [False, True])
def test_views_of_a_stream_follow_from_seed_epoch_and_place(tmp_path, labelled, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    folder = stored(tmp_path / "data", labelled=labelled)

    def of(batch=4, workers=0, **changes):
        loader = torch.utils.data.DataLoader(streamed(folder, **changes), batch, num_workers=workers)
        return torch.cat([one["pixel_values"] for one in loader])

    whole = of()
    assert whole.shape == (22, 2, 3, 16, 16)
    assert not torch.equal(whole[:, 0], whole[:, 1])
    assert torch.equal(of(workers=2), whole)
    assert torch.equal(of(batch=7), whole)
    for changes in ({"seed": 4}, {"epoch": 1}):
        assert not torch.equal(of(**changes), whole)
    assert of(train_split="train[2:9]").shape[0] == 7
    assert of(max_train_samples=5).shape[0] == 5


def test_what_a_stream_cannot_serve_is_refused(tmp_path):
    folder = stored(tmp_path / "data", labelled=True)
    with refuses("the kNN monitor, which --eval_split asks for, compares all images of two splits, got --streaming"):
        streamed(folder, eval_split="train[:2]")
    words = ["--dataset_name", str(folder), "--streaming", "--image_size", "16"]
    with refuses("streaming needs max_steps"):
        parse(words)
    with refuses("streaming needs image_size"):
        parse([*words[:3], "--max_steps", "2"])
    with refuses("warmup_epochs needs a data set with a length"):
        script("run_pretraining").main(
            [
                *words,
                "--max_steps",
                "2",
                "--warmup_epochs",
                "1",
                "--lr_scheduler_type",
                "cosine",
                "--output_dir",
                str(tmp_path / "run"),
                "--use_cpu",
            ]
        )


def test_a_resumed_pretraining_on_a_stream_is_the_run(tmp_path, monkeypatch):
    """22 images are 5 batches of 4: what does not fill a batch is left out, and pixels of the second pass are others."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    folder, sizes = stored(tmp_path / "data"), []
    words = [
        "--dataset_name", folder, "--streaming", "--image_size", 16, "--architecture", "cifar_resnet20", "--per_device_train_batch_size", 4,
        "--base_args", '{"projector": [16, 8], "queue_size": 16, "bn_splits": 2}', "--use_cpu", "--disable_tqdm", "true", "--save_strategy", "steps",
        "--save_steps", 2, "--save_only_model", "false", "--save_total_limit", "9", "--logging_strategy", "steps", "--logging_steps", 1, "--mix", "unmix",
    ]  # fmt: skip
    collate = ViewCollator.__call__
    monkeypatch.setattr(ViewCollator, "__call__", lambda self, examples: sizes.append(len(examples)) or collate(self, examples))

    def run(name, steps, *more):
        script("run_pretraining").main(list(map(str, ["--output_dir", tmp_path / name, *words, "--max_steps", steps, *more])))
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        return [row["loss"] for row in history if "loss" in row], load_file(tmp_path / name / "mixup/state.safetensors")

    whole, weights = run("whole", 5)
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "half/checkpoint-2")
    parts, again = run("half", 5, "--resume_from_checkpoint", "true")
    assert parts == whole
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    assert len(run("long", 7)[0]) == 7
    assert set(sizes) == {4}


def test_a_stream_of_less_than_a_batch_is_refused(tmp_path):
    class Few(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from (TwoViews(7)[row] for row in range(7))

    with refuses("needs a whole batch of 8 images, got 7 in a pass over the stream; make batches smaller"):
        trainer(tmp_path, data=Few(), evaluate=False).train()
