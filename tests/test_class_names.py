"""Class names from folder to checkpoint and back, through both scripts. The order of the names does not change the result."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as Pillow
from safetensors.torch import load_file, save_file
from transformers import ImageClassificationPipeline, pipeline

from hf_mixup.arguments import DataArguments
from hf_mixup.data.processor import ImageFormat
from hf_mixup.networks.backbones import load_classifier
from refusals import refuses
from run_script import ROOT
from small import resnet

COLOURS = {"red": (220, 40, 40), "green": (40, 220, 40), "blue": (40, 40, 220), "grey": (128, 128, 128)}
NAMES = ["red", "green", "blue"]  # in no order that sorting gives
FORM = ImageFormat(16)


def picture(colour, row=0):
    noise = np.random.default_rng(row).normal(0, 20, (20, 20, 3)) + np.array(COLOURS[colour])
    return Pillow.fromarray(noise.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network that knows red, green and blue."""
    network = resnet(num_labels=3).train()
    network.config.id2label, network.config.label2id = dict(enumerate(NAMES)), {name: n for n, name in enumerate(NAMES)}
    transform = FORM.eval_transform()
    pixels = torch.stack([transform(picture(colour, row)) for row in range(8) for colour in NAMES])
    labels = torch.arange(3).repeat(8)
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(pixel_values=pixels).logits, labels).backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("checkpoint")
    network.save_pretrained(folder)
    FORM.processor().save_pretrained(folder)
    return folder


def folder(path, classes, count=4):
    """`classes`: names of folders, and the colour in each."""
    for name, colour in classes.items():
        (path / name).mkdir(parents=True)
        for row in range(count):
            picture(colour, 100 + row).save(path / name / f"{row}.png")
    return path


def run(script, *words):
    sys.path.insert(0, str(ROOT / "training_scripts"))
    try:
        __import__(script).main([str(word) for word in words])
    finally:
        sys.path.pop(0)


def mixup(checkpoint, data, out, *words):
    run("run_mixup", "--model_name_or_path", checkpoint, "--train_dir", data, "--validation_dir", data, "--output_dir", out, "--use_cpu",
        "--per_device_train_batch_size", "4", "--disable_tqdm", "True", "--eval_strategy", "no", *words)  # fmt: skip
    return json.loads((out / "all_results.json").read_text())["eval_top1"], json.loads((out / "config.json").read_text())


def evaluation(checkpoint, data, out):
    run("run_evaluation", checkpoint, "--validation_dir", data, "--protocols", "fgsm", "--use_cpu", "--output_dir", out)
    return json.loads((out / "evaluation.json").read_text())["clean"]["top1"]


@pytest.mark.parametrize(
    "classes",
    [
        {"red": "red", "green": "green", "blue": "blue"},
        {"0": "red", "1": "green", "2": "blue"},
        {"green": "green", "red": "red"},  # of three
    ],
    ids=["names", "numbers", "fewer"],
)
def test_a_checkpoint_is_what_it_was(checkpoint, tmp_path, classes):
    """Evaluated by both scripts, it has one accuracy; what is saved has its weights and its names, so evaluation says the same again."""
    data = folder(tmp_path / "data", classes)
    assert evaluation(checkpoint, data, tmp_path / "evaluation") == 1
    top1, config = mixup(checkpoint, data, tmp_path / "out", "--num_train_epochs", "0")
    assert top1 == 1
    assert config["id2label"] == {str(number): name for number, name in enumerate(NAMES)}
    old, new = (load_file(place / "model.safetensors") for place in (checkpoint, tmp_path / "out"))
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_fine_tuning_keeps_what_the_classifier_knows(checkpoint, tmp_path):
    data = folder(tmp_path / "data", {name: name for name in NAMES})
    top1, config = mixup(checkpoint, data, tmp_path / "out", "--max_steps", "2", "--learning_rate", "1e-6")
    assert top1 == 1
    assert list(config["id2label"].values()) == NAMES
    for answer in pipeline("image-classification", tmp_path / "out")([picture(colour) for colour in NAMES]):
        assert sum(one["score"] for one in answer) == pytest.approx(1, abs=1e-5)
    assert [answer[0]["label"] for answer in pipeline("image-classification", tmp_path / "out")([picture(name) for name in NAMES])] == NAMES


def test_other_classes_are_refused_where_nothing_is_trained(checkpoint, tmp_path):
    data = folder(tmp_path / "data", {"ant": "red", "bee": "green", "cow": "blue"})
    with refuses("the network must know the classes of the data set, got 3 classes, 'red', 'green', 'blue', and 3 of the data set, 'ant'"):
        evaluation(checkpoint, data, tmp_path / "evaluation")
    with refuses("the network must know the classes of the data set"):
        mixup(checkpoint, data, tmp_path / "out", "--num_train_epochs", "0")


def test_another_number_of_classes(checkpoint, tmp_path):
    data = folder(tmp_path / "data", {name: name for name in COLOURS})
    message = "must have as many classes, got 3 in .* and 4 in the data set; pass --ignore_mismatched_sizes to start with a new classifier"
    with refuses(message):
        mixup(checkpoint, data, tmp_path / "out", "--max_steps", "1")
    for kind in ("vit", "timm"):
        from hf_mixup.networks.backbones import from_scratch

        from_scratch({"vit": "vit_mini", "timm": "resnet10t"}[kind], 7, 32).save_pretrained(tmp_path / kind)
        with refuses(message.replace("got 3", "got 7")):
            load_classifier(tmp_path / kind, num_labels=4)
        assert load_classifier(tmp_path / kind, num_labels=4, ignore_mismatched_sizes=True).config.num_labels == 4


def test_problem_type_is_that_of_the_loss(checkpoint, tmp_path):
    """A pipeline takes sigmoid or softmax by it; what the checkpoint was before counts no more."""
    network = load_classifier(checkpoint)
    network.config.problem_type = "multi_label_classification"
    network.save_pretrained(tmp_path / "old")
    FORM.processor().save_pretrained(tmp_path / "old")
    data = folder(tmp_path / "data", {name: name for name in NAMES})
    _, config = mixup(tmp_path / "old", data, tmp_path / "out", "--max_steps", "1")
    assert config["problem_type"] == "single_label_classification"
    answerer: ImageClassificationPipeline = pipeline("image-classification", tmp_path / "out")
    assert sum(one["score"] for one in answerer(picture("red"))) == pytest.approx(1, abs=1e-5)
    _, config = mixup(tmp_path / "old", data, tmp_path / "bce", "--max_steps", "1", "--loss", "bce")
    assert config["problem_type"] == "multi_label_classification"


def test_several_classes_an_image_from_the_command_line(tmp_path):
    rows = [{"image": picture(colour, row), "label": [colour, "any"][: row % 2 + 1]} for row in range(6) for colour in NAMES]
    data = Dataset.from_list(rows, features=Features({"image": Image(), "label": List(Value("string"))}))
    DatasetDict({"train": data, "validation": data}).save_to_disk(tmp_path / "data")
    words = ("--dataset_name", tmp_path / "data", "--architecture", "cifar_resnet20", "--image_size", "16", "--use_cpu", "--max_steps", "1",
             "--per_device_train_batch_size", "4", "--eval_strategy", "no", "--output_dir", tmp_path / "out")  # fmt: skip
    with refuses("pass --loss bce"):
        run("run_mixup", *words)
    run("run_mixup", *words, "--loss", "bce", "--overwrite_output_dir", "--do_train", "--do_predict", "--learning_rate", "0.1")
    network = load_classifier(tmp_path / "out").eval()
    transform = ImageFormat.of_checkpoint(tmp_path / "out").eval_transform()
    with torch.no_grad():
        present = network(torch.stack([transform(row["image"]) for row in rows])).logits > 0
    told = [[network.config.id2label[number] for number in row.nonzero().flatten().tolist()] for row in present]
    assert 0 < present.sum() < present.numel()
    assert (tmp_path / "out/predict_results.txt").read_text().splitlines()[1:] == [f"{row}\t{names}" for row, names in enumerate(told)]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (list(config["id2label"].values()), config["problem_type"]) == (["any", "blue", "green", "red"], "multi_label_classification")
    with refuses("evaluation needs one class for each image"):
        run("run_evaluation", tmp_path / "out", "--dataset_name", tmp_path / "data", "--use_cpu")


def test_pictures_are_of_the_checkpoints_classes(checkpoint, tmp_path):
    """Methods that look at the network's loss or class activation ask for its own number of a class."""
    data = folder(tmp_path / "data", {name: name for name in NAMES})
    sys.path.insert(0, str(ROOT / "training_scripts"))
    import visualize_mixup

    sys.path.pop(0)
    arguments = DataArguments(validation_dir=str(data)), visualize_mixup.PictureArguments(checkpoint=str(checkpoint), count=9)
    pixels, labels, names, _ = visualize_mixup.read(*arguments, FORM)
    assert names == NAMES
    assert labels == pixels.mean((2, 3)).argmax(1).tolist()
    assert set(labels) == {0, 1, 2}


def test_a_network_that_gives_nan_is_refused(checkpoint, tmp_path):
    """It has no accuracy, where NaN would be sorted as some class."""
    shutil.copytree(checkpoint, tmp_path / "nan")
    path = tmp_path / "nan" / "model.safetensors"
    weights = load_file(path)
    weights["classifier.1.bias"][0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with refuses("the network must give finite numbers, got NaN for 12 of 12 images"):
        evaluation(tmp_path / "nan", folder(tmp_path / "data", {name: name for name in NAMES}), tmp_path / "out")
