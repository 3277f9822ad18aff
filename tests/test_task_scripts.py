"""The scripts for sounds, videos and label maps, as people start them, and the guides to them."""

import importlib.util
import io
import json
import wave

import numpy as np
import pytest
import torch
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from huggingface_hub import ModelCard
from PIL import Image as Pictures
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForSemanticSegmentation,
    AutoModelForVideoClassification,
    EvalPrediction,
    TrainingArguments,
)

from hf_mixup import MixupTrainingArguments
from hf_mixup.cli.tasks import TaskArguments, named
from hf_mixup.core.rng import keyed
from hf_mixup.data.made import IGNORED, MELODIES, RATE, digit_maps, digit_pictures, digit_videos, melodies
from hf_mixup.networks.backbones import load_classifier
from images import script
from refusals import refuses
from run_script import ROOT, run_script
from small import difference, weights
from test_inputs import ast, segformer, videomae
from test_readme import run_blocks

SHORT = ("--max_steps", 4, "--max_train_samples", 32, "--max_eval_samples", 16, "--per_device_train_batch_size", 8, "--use_cpu")
AUTO = {
    "audio": AutoModelForAudioClassification,
    "video": AutoModelForVideoClassification,
    "segmentation": AutoModelForSemanticSegmentation,
}


def run(name, *words):
    """The script in this process."""
    spec = importlib.util.spec_from_file_location(f"run_mixup_{name}", ROOT / f"training_scripts/run_mixup_{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(list(map(str, words)), f"run_mixup_{name}.py")


every_script = pytest.mark.parametrize("name", AUTO)


def sounds():
    """WAV files of 16 bits in stereo."""
    waveforms, classes = melodies(20, 3)
    rows = []
    for waveform in waveforms:
        file = io.BytesIO()
        with wave.open(file, "wb") as out:
            out.setparams((2, 2, RATE, 0, "NONE", ""))
            out.writeframes(np.repeat((waveform * 3000).astype("<i2"), 2).tobytes())
        rows.append({"path": None, "bytes": file.getvalue()})
    features = Features({"sound": {"bytes": Value("binary"), "path": Value("string")}, "label": ClassLabel(names=list(MELODIES))})
    return Dataset.from_dict({"sound": rows, "label": classes}, features=features).cast_column("sound", Audio(decode=False))


def videos():
    (pictures, classes), _ = digit_pictures()
    frames, shown = digit_videos(pictures, 20, 3, frames=6)
    rows = [[Pictures.fromarray((frame * 255).astype(np.uint8).transpose(1, 2, 0)) for frame in video] for video in frames]
    features = Features({"frames": List(Image()), "label": ClassLabel(names=list(map(str, range(10))))})
    return Dataset.from_dict({"frames": rows, "label": classes[shown]}, features=features)


def maps():
    (pictures, classes), _ = digit_pictures()
    few = classes < 5  # those that the network of the script knows
    images, labels = digit_maps(pictures[few], classes[few], 20, 3)
    rows = [Pictures.fromarray((image * 255).astype(np.uint8).transpose(1, 2, 0)) for image in images]
    features = Features({"image": Image(), "annotation": Image()})
    return Dataset.from_dict({"image": rows, "annotation": [Pictures.fromarray(one.astype(np.uint8)) for one in labels]}, features=features)


@pytest.mark.slow
def test_a_script_is_started_as_people_do(tmp_path):
    done = run_script("run_mixup_segmentation.py", "--mix", "mixup", "--output_dir", tmp_path / "out", check=False)
    assert done.returncode
    assert done.stderr.strip().splitlines()[-1].endswith("use a method of whole pixels, such as cutmix or fmix.")


@every_script
def test_a_script_trains_resumes_and_goes_on_from_its_checkpoint_on_a_data_set(tmp_path, name):
    out = tmp_path / "out"
    assert len((ROOT / f"training_scripts/run_mixup_{name}.py").read_text().splitlines()) < 150
    run(name, "--output_dir", out, *SHORT, "--save_strategy", "steps", "--save_steps", 2)
    plain = AUTO[name].from_pretrained(out)
    results = json.loads((out / "all_results.json").read_text())
    assert results["eval_loss"] > 0
    assert 0 <= results["eval_mean_iou" if name == "segmentation" else "eval_top1"] <= 1
    if name != "segmentation":
        card = ModelCard.load(out / "README.md")
        assert card.data.pipeline_tag == f"{name}-classification"
        assert f'pipeline("{name}-classification"' in card.content
        assert f"{AUTO[name].__name__}.from_pretrained" in card.content
        assert "AutoModelForImageClassification" not in card.content
    run(name, "--output_dir", out, *SHORT, "--resume_from_checkpoint", out / "checkpoint-2")
    if name != "segmentation":  # a stock Trainer's workers draw other mixtures after a resume
        assert difference(weights(plain), weights(AUTO[name].from_pretrained(out))) == 0
    # its own checkpoint, and a data set with other columns and without a split to evaluate on
    {"audio": sounds, "video": videos, "segmentation": maps}[name]().save_to_disk(tmp_path / "data")
    run(name, "--output_dir", tmp_path / "more", "--dataset_name", tmp_path / "data", "--model_name_or_path", out, *SHORT)
    assert difference(weights(plain), weights(AUTO[name].from_pretrained(tmp_path / "more"))) > 0


@pytest.mark.parametrize(
    ("name", "words", "sentence"),
    [
        ("segmentation", ["--mix", "mixup"], "label maps need one image in every pixel, got 'mixup'"),
        ("segmentation", ["--ema_decay", "0.9"], "--ema_decay has no effect on a network that labels pixels, got 0.9; leave it out"),
        ("audio", ["--mix", "automix"], "the network must have known feature maps"),
        ("video", ["--mix", "cutmx"], "did you mean 'cutmix'"),
        (
            "video",
            ["--dataset_name", ".", "--dataset_config_name", "a"],
            "dataset_config_name is for data sets of the Hub, got 'a' for the folder '.'",
        ),
    ],
)
def test_refusals_come_before_training_and_leave_no_folder(tmp_path, name, words, sentence):
    with refuses(sentence):
        run(name, "--output_dir", tmp_path / "out", *words, *SHORT)
    assert not (tmp_path / "out").exists()


def test_classifiers_of_sounds_and_videos_are_read_with_other_classes(tmp_path):
    for network in (ast(), videomae()):
        network.save_pretrained(tmp_path / "a")
        again = load_classifier(tmp_path / "a", num_labels=7, ignore_mismatched_sizes=True)
        assert type(again) is type(network)
        assert again.config.num_labels == 7


def test_small_data_sets_are_the_same_every_time_and_say_what_they_hold():
    one, two, other = (melodies(12, seed) for seed in (0, 0, 1))
    assert np.array_equal(one[0], two[0])
    assert not np.array_equal(one[0], other[0])
    assert sorted(np.bincount(one[1])) == [2] * 6
    (pictures, classes), (held_out, _) = digit_pictures()
    assert not {picture.tobytes() for picture in pictures} & {picture.tobytes() for picture in held_out}
    videos, shown = digit_videos(pictures, 5, 0)
    assert videos.shape == (5, 4, 3, 10, 10)
    assert all(abs(video[:, 0].max() - pictures[number].max()) < 1e-6 for video, number in zip(videos, shown, strict=True))
    images, labels = digit_maps(pictures, classes, 30, 0)
    assert set(np.unique(labels)) == {*range(11), IGNORED}
    assert images[:, 0][labels == 0].mean() < 0.25 < 0.6 < images[:, 0][(labels > 0) & (labels != IGNORED)].mean()


@pytest.mark.parametrize("guide", ["sound", "video", "segmentation"])
def test_blocks_of_the_guides(tmp_path, monkeypatch, guide):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    make, key, shape = {
        "sound": (ast, "input_values", (24, 16)), "video": (videomae, "pixel_values", (4, 3, 16, 16)), "segmentation": (segformer, "pixel_values", (3, 32, 32)),
    }[guide]  # fmt: skip
    network = make()
    label = torch.zeros(32, 32, dtype=torch.long) if guide == "segmentation" else 1
    rows = [{key: torch.randn(shape, generator=keyed(row)), "labels": label} for row in range(8)]
    before = weights(network)
    args = TrainingArguments(
        "out", max_steps=2, remove_unused_columns=False, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    names = run_blocks(
        f"docs/guides/{guide}.md", model=network, train=rows, test=rows, args=args, images=torch.randn(4, 3, 8, 8), videos=torch.randn(4, 2, 3, 8, 8),
        maps=torch.arange(64).view(8, 8).expand(4, 8, 8) % 4,
    )  # fmt: skip
    assert names["trainer"].state.global_step == 2
    assert difference(before, weights(network)) > 0
    if guide == "sound":
        assert AutoModelForAudioClassification.from_pretrained("runs/sound").config.num_labels == 4


@pytest.mark.parametrize("name", ["audio", "video"])
def test_splits_that_number_classes_differently_are_matched_by_name(tmp_path, name):
    """Labels would fit by number, and mean other classes: an accuracy that looks bad, and is wrong."""
    train = {"audio": sounds, "video": videos}[name]()
    column = next(column for column, feature in train.features.items() if isinstance(feature, ClassLabel))
    reversed_ = ClassLabel(names=train.features[column].names[::-1])
    held_out = train.cast_column(column, Value("int64")).cast_column(column, reversed_)
    made = built(tmp_path, name, DatasetDict(train=train, validation=held_out))
    names = train.features[column].names
    assert list(made.mixup_model.config.id2label.values()) == names
    assert [names[example["labels"]] for example in made.eval_dataset] == [names[::-1][number] for number in held_out[column]]
    held_out = held_out.cast_column(column, Value("int64")).cast_column(column, ClassLabel(names=[f"other {one}" for one in names]))
    DatasetDict(train=train, validation=held_out).save_to_disk(tmp_path / "other")
    with refuses("every class of the evaluation split must be one of the training split, got 'other"):
        run(name, "--output_dir", tmp_path / "out2", "--dataset_name", tmp_path / "other", *SHORT)
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize("kind", ["words", "numbers", "shares"])
def test_labels_of_any_kind_are_classes(tmp_path, kind):
    """A column that is named ended in an error of Python if it was not of type ClassLabel; rows without a label have none to learn."""
    own = {"words": ["no", "yes", None], "numbers": [3, 7, -1], "shares": [0.2, 0.7, 0.4]}[kind]
    data = Dataset.from_dict({"text": [f"text {row}" for row in range(30)], "said": [own[row % 3] for row in range(30)]})
    if kind == "shares":
        with refuses("every row must have one class, got regression in column 'said' of train"):
            built(tmp_path, "text", DatasetDict(train=data, test=data), label_column_name="said")
        return
    made = built(tmp_path, "text", DatasetDict(train=data, test=data), label_column_name="said")
    assert list(made.mixup_model.config.id2label.values()) == list(map(str, own[:2]))
    assert [example["labels"] for example in made.train_dataset] == [0, 1] * 10


def test_label_maps_of_other_classes_are_refused(tmp_path):
    """They would end in an error of indices, or, on a GPU, in one that names nothing."""
    data = maps()
    high = [Pictures.fromarray(np.minimum(np.array(one), 250) + 5) for one in data["annotation"]]
    Dataset.from_dict({"image": data["image"], "annotation": high}, features=data.features).save_to_disk(tmp_path / "data")
    with refuses("label maps must hold the network's classes, 0 to"):
        run("segmentation", "--output_dir", tmp_path / "out", "--dataset_name", tmp_path / "data", *SHORT)


def built(folder, name, data, **task):
    """The trainer of a script on this data set, before it trains."""
    data.save_to_disk(folder / "data")
    args = MixupTrainingArguments(str(folder / "out"), mix=["wordmixup" if name == "text" else "cutmix"], max_steps=1, report_to="none")
    return script(f"run_mixup_{name}").build(TaskArguments(dataset_name=str(folder / "data"), **task), args)[0]


def test_a_part_of_sorted_data_has_every_class_and_evaluation_is_on_the_split_for_it(tmp_path):
    """Many data sets are sorted by class, so that their first rows are all of one. 'dev' is as good a name as 'validation'."""

    def split(name, rows):
        features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
        return Dataset.from_dict(
            {"text": [f"{name} {row}" for row in range(rows)], "label": [2 * row // rows for row in range(rows)]}, features=features
        )

    data = DatasetDict(train=split("train", 60), dev=split("dev", 40))
    made = built(tmp_path, "text", data, max_train_samples=12, max_eval_samples=10)
    assert sorted({example["labels"] for example in made.train_dataset}) == [0, 1]
    assert sorted({example["labels"] for example in made.eval_dataset}) == [0, 1]
    assert (len(made.train_dataset), len(made.eval_dataset), made.eval_dataset.rows["text"][0]) == (12, 10, "dev 0")


@pytest.mark.parametrize("name", ["audio", "video"])
def test_a_checkpoint_with_the_same_classes_keeps_their_order(tmp_path, name):
    """Its classifier is trained further; under other numbers it would begin with wrong answers, and a run of no epoch would save them."""
    data = {"audio": sounds, "video": videos}[name]()
    names = next(feature.names for feature in data.features.values() if isinstance(feature, ClassLabel))
    for part in script(f"run_mixup_{name}").from_scratch(**named(names[::-1])):
        part.save_pretrained(tmp_path / "old")
    made = built(tmp_path, name, DatasetDict(train=data, test=data), model_name_or_path=str(tmp_path / "old"))
    assert list(made.mixup_model.config.id2label.values()) == names[::-1]
    assert [names[::-1][example["labels"]] for example in made.train_dataset] == [names[number] for number in data["label"]]


@pytest.mark.parametrize("name", ["video", "segmentation"])
def test_images_of_16_bits_are_as_bright_as_those_of_8(tmp_path, name):
    column, data = {"video": ("frames", videos()), "segmentation": ("image", maps())}[name]
    found = {}
    for bits in (8, 16):
        grey = [[np.array(one.convert("L")) for one in (row if name == "video" else [row])] for row in data[column]]
        pictures = [[Pictures.fromarray(one if bits == 8 else one.astype(np.uint16) << 8) for one in row] for row in grey]
        rows = {**data[:], column: pictures if name == "video" else [one for (one,) in pictures]}
        made = built(tmp_path / str(bits), name, DatasetDict(train=(part := Dataset.from_dict(rows, features=data.features)), test=part))
        found[bits] = torch.as_tensor(made.train_dataset[0]["pixel_values"])
    assert torch.equal(found[8], found[16])
    assert found[8].std() > 0.1


def test_label_maps_in_colours_are_refused(tmp_path):
    """The processor would take their rows for maps, and the first row, resized, for the labels of the picture."""
    data = maps()
    rows = {**data[:], "annotation": [one.convert("RGB") for one in data["annotation"]]}
    made = built(tmp_path, "segmentation", Dataset.from_dict(rows, features=data.features))
    with refuses("label maps must hold one class for each pixel, got 3 channels"):
        made.train_dataset[0]


def test_the_measures_ignore_the_class_that_the_loss_ignores(tmp_path):
    network, processor = script("run_mixup_segmentation").from_scratch()
    network.config.semantic_loss_ignore_index = 0
    network.save_pretrained(tmp_path / "old")
    processor.save_pretrained(tmp_path / "old")
    made = built(tmp_path, "segmentation", maps(), model_name_or_path=str(tmp_path / "old"))
    labels = np.array([[[0, 0, 1, 2]]])
    assert made.compute_metrics(EvalPrediction(np.array([[[1, 2, 1, 2]]]), labels)) == {"mean_iou": 1, "pixel_accuracy": 1}
