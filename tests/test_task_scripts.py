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
    TrainingArguments,
)

from hf_mixup.cli.tasks import TaskArguments, load_splits
from hf_mixup.core.rng import keyed
from hf_mixup.data.made import IGNORED, MELODIES, RATE, digit_maps, digit_pictures, digit_videos, melodies
from hf_mixup.networks.backbones import load_classifier
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


def test_a_part_of_a_sorted_data_set_has_all_of_its_classes(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    split = Dataset.from_dict({"text": [str(row) for row in range(200)], "label": [row // 100 for row in range(200)]}, features=features)
    DatasetDict(train=split, test=split).save_to_disk(tmp_path / "data")
    few = TaskArguments(str(tmp_path / "data"), max_train_samples=20, max_eval_samples=30)
    train, evaluation = load_splits(few, 0)
    assert (len(train), len(evaluation)) == (20, 30)
    assert set(train["label"]) == set(evaluation["label"]) == {0, 1}
    assert load_splits(few, 0)[0]["text"] == train["text"] != load_splits(few, 1)[0]["text"]
    with refuses("dataset_config_name is for data sets of the Hub, got 'small' for the folder"):
        load_splits(TaskArguments(str(tmp_path / "data"), dataset_config_name="small"), 0)


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
def test_splits_that_number_classes_differently_are_refused(tmp_path, name):
    """Labels would fit by number, and mean other classes: an accuracy that looks bad, and is wrong."""
    train = {"audio": sounds, "video": videos}[name]()
    column = next(column for column, feature in train.features.items() if isinstance(feature, ClassLabel))
    reversed_ = ClassLabel(names=train.features[column].names[::-1])
    held_out = train.cast_column(column, Value("int64")).cast_column(column, reversed_)
    DatasetDict(train=train, validation=held_out).save_to_disk(tmp_path / "data")
    with refuses("both splits must have the same classes in the same order"):
        run(name, "--output_dir", tmp_path / "out", "--dataset_name", tmp_path / "data", *SHORT)
    assert not (tmp_path / "out").exists()


def test_label_maps_of_other_classes_are_refused(tmp_path):
    """They would end in an error of indices, or, on a GPU, in one that names nothing."""
    data = maps()
    high = [Pictures.fromarray(np.minimum(np.array(one), 250) + 5) for one in data["annotation"]]
    Dataset.from_dict({"image": data["image"], "annotation": high}, features=data.features).save_to_disk(tmp_path / "data")
    with refuses("label maps must hold the network's classes, 0 to"):
        run("segmentation", "--output_dir", tmp_path / "out", "--dataset_name", tmp_path / "data", *SHORT)
