"""run_evaluation.py and visualize_mixup.py, as people run them."""

import json
import resource
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from run_script import run_mixup, run_script

FEW = ("--max_eval_samples", "50", "--batch_size", "16")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A network that knows the digits a little."""
    folder = tmp_path_factory.mktemp("checkpoint") / "run"
    run_mixup("--output_dir", folder, "--max_steps", "60", "--eval_strategy", "no", "--save_strategy", "no")
    return folder


@pytest.fixture
def own(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "run")
    return tmp_path / "run"


def evaluate(*words, **settings):
    return run_script("run_evaluation.py", *words, **settings)


def evaluation(folder):
    return json.loads((folder / "evaluation.json").read_text())


def numbers(value, path=""):
    """Every number of nested results, by its path."""
    if isinstance(value, dict):
        return {key: number for name, part in value.items() for key, number in numbers(part, f"{path}/{name}").items()}
    if isinstance(value, list):
        return {key: number for place, part in enumerate(value) for key, number in numbers(part, f"{path}/{place}").items()}
    return {path: value} if isinstance(value, (int, float)) else {}


@pytest.mark.parametrize("protocols", [("fgsm", "pgd", "occlusion"), pytest.param(("corruptions",), marks=pytest.mark.slow)], ids="+".join)
def test_two_processes_measure_what_one_does(checkpoint, tmp_path, protocols):
    """50 images in batches of 16: the last batches are uneven."""
    for name, processes in (("one", 1), ("two", 2)):
        evaluate(checkpoint, *FEW, "--protocols", *protocols, "--output_dir", tmp_path / name, "--use_cpu", processes=processes)
    one, two = numbers(evaluation(tmp_path / "one")), numbers(evaluation(tmp_path / "two"))
    assert one.keys() == two.keys()
    assert len(one) > 80
    for path, value in one.items():
        assert value == pytest.approx(two[path], abs=1e-5), path
    assert sum(evaluation(tmp_path / "two")["calibration"]["equal width"]["count"]) == 50


def test_results_and_card(own):
    before = json.loads((own / "all_results.json").read_text())
    evaluate(own, "--protocols", "fgsm", "pgd", "occlusion", "--pgd_steps", "3", "--pgd_step", "4")
    found = evaluation(own)
    # what training measured, measured again
    assert found["clean"]["top1"] == pytest.approx(before["eval_top1"], abs=1e-9)
    assert found["clean"]["nll"] == pytest.approx(before["eval_loss"], rel=1e-4)
    assert found["attacks"]["pgd"]["top1"] <= found["attacks"]["fgsm"]["top1"] <= found["clean"]["top1"]
    assert found["occlusion"]["top1"][0] == found["clean"]["top1"] > found["occlusion"]["top1"][9]
    assert all((own / name).stat().st_size > 5000 for name in ("reliability.png", "occlusion.png"))
    from huggingface_hub import ModelCard

    card = ModelCard.load(own / "README.md")
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["expected_calibration_error"] == found["clean"]["ece"]
    assert len(results) == len(card.data.eval_results)
    for text in (card.text, (own / "evaluation.md").read_text()):
        assert f"| top-1 accuracy under FGSM, eps 8/255 | {found['attacks']['fgsm']['top1']:.4f} |" in text
    # a card written again keeps it
    from hf_mixup.report.card import write_model_card

    write_model_card(own, dataset="digits", split="test")
    again = ModelCard.load(own / "README.md")
    assert {result.metric_type: result.metric_value for result in again.data.eval_results} == results
    assert "under FGSM" in again.text
    # a second evaluation takes the place of the first
    evaluate(own, *FEW, "--protocols", "fgsm", "--eps", "2")
    card = ModelCard.load(own / "README.md")
    assert card.text.count("## Evaluation") == 1
    assert "eps 2/255" in card.text
    assert "8/255" not in card.text
    kinds = [result.metric_type for result in card.data.eval_results]
    assert kinds.count("fgsm_accuracy") == 1
    assert "pgd_accuracy" not in kinds


def test_a_ready_corrupted_set(checkpoint, tmp_path):
    """With rows of every severity in one table; the images of `clean` are those of the test split. Neither set has anything to train on."""
    from datasets import DatasetDict, concatenate_datasets

    from hf_mixup.data.sources import digits

    parts, test = [], digits()["test"].select(range(20))
    for name in ("clean", "fog"):
        for severity in range(1, 6):
            part = test.add_column("corruption", [name] * 20).add_column("severity", [severity] * 20)
            parts.append(part.map(lambda row: {"image": Image.new("L", (8, 8))}) if name == "fog" else part)
    DatasetDict({"test": concatenate_datasets(parts)}).save_to_disk(tmp_path / "corrupted")
    DatasetDict({"clean": test}).save_to_disk(tmp_path / "alone")
    evaluate(
        checkpoint, "--dataset_name", tmp_path / "alone", "--corrupted_dataset_name", tmp_path / "corrupted",
        "--protocols", "corruptions", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert evaluation(tmp_path / "out")["dataset"] == {"name": str(tmp_path / "alone"), "split": "clean", "images": 20}
    found = evaluation(tmp_path / "out")["corruptions"]
    assert len(set(found["top1"]["clean"])) == 1
    assert found["top1"]["clean"][0] > 0.5 > max(found["top1"]["fog"])
    assert found["mean_error_all"] == pytest.approx(1 - np.mean([found["top1"][name] for name in ("clean", "fog")]))
    assert "mean_error" not in found  # 13 corruptions are missing


def test_sets_without_images_to_train_on(tmp_path):
    """Classes come from the split there is; by number alone they may be fewer than those of the network."""
    from datasets import DatasetDict, Value

    from hf_mixup.arguments import DataArguments
    from hf_mixup.data.processor import ImageFormat
    from hf_mixup.data.sources import digits, load_images
    from hf_mixup.evaluation.evaluate import pixel_model
    from small import resnet

    test, form = digits()["test"], ImageFormat(32)
    for name, data in (("named", test), ("numbered", test.cast_column("label", Value("int64")).filter(lambda row: row["label"] < 7))):
        DatasetDict({"test": data}).save_to_disk(tmp_path / name)
    for row in range(4):
        (tmp_path / "folder" / "ab"[row % 2]).mkdir(parents=True, exist_ok=True)
        test[row]["image"].save(tmp_path / "folder" / "ab"[row % 2] / f"{row}.png")

    named = load_images(DataArguments(dataset_name=str(tmp_path / "named")), training=False)
    assert (named.train, named.evaluation_split, named.label_names) == (None, "test", [str(digit) for digit in range(10)])
    numbered = load_images(DataArguments(dataset_name=str(tmp_path / "numbered")), training=False)
    assert len(numbered.label_names) == 7
    folder = load_images(DataArguments(validation_dir=str(tmp_path / "folder")), training=False)
    assert (folder.evaluation_split, folder.label_names, len(folder.evaluation)) == ("validation", ["a", "b"], 4)

    ten = resnet(num_labels=10)
    ten.config.id2label = {row: str((row + 1) % 10) for row in range(10)}
    ten.config.label2id = {name: row for row, name in ten.config.id2label.items()}
    assert pixel_model(ten, form, named).classes == [9, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert pixel_model(ten, form, numbered).classes is None
    for network, images in ((resnet(num_labels=6), numbered), (ten, folder)):
        with pytest.raises(ValueError, match="the network must know the classes of the data set"):
            pixel_model(network, form, images)
    with pytest.raises(ValueError, match="must have a split 'train', got"):
        load_images(DataArguments(dataset_name=str(tmp_path / "named")))
    DatasetDict({"one": test, "two": test}).save_to_disk(tmp_path / "several")
    with pytest.raises(ValueError, match="must have a split 'validation' or 'test', got"):
        load_images(DataArguments(dataset_name=str(tmp_path / "several")), training=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--protocols", "fgms"), "did you mean 'fgsm'"),
        (("--epps", "3"), "did you mean '--eps'"),
        (("--patch", "5", "--protocols", "occlusion"), "whole multiples of"),
    ],
)
def test_one_sentence_for_a_mistake(checkpoint, tmp_path, words, message):
    done = evaluate(checkpoint, "--output_dir", tmp_path / "out", *FEW, *words, check=False)
    assert done.returncode != 0
    assert message in done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_every_protocol_in_five_minutes(own):
    def spent():
        of_children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return of_children.ru_utime + of_children.ru_stime

    before = spent()
    evaluate(own, timeout=1800)
    assert spent() - before < 300  # of one core, whoever else keeps it busy
    found = evaluation(own)
    assert len(found["corruptions"]["top1"]) == 19
    assert 0 < found["corruptions"]["mean_error"] < 1
    assert (own / "corruptions.png").stat().st_size > 5000


def test_results_of_other_weights_or_pixels_are_not_gone_on_with(tmp_path):
    """Neither of another revision on the Hub, nor of adapters or files of torch in the same folder, nor with another normalisation."""
    from hf_mixup.arguments import DataArguments
    from hf_mixup.data.processor import ImageFormat
    from hf_mixup.data.sources import load_images
    from hf_mixup.report.card import weights_hash
    from images import script
    from small import resnet

    run, first, second = script("run_evaluation"), resnet(), resnet()
    second.load_state_dict(first.state_dict())
    assert run.hash_of_network(first) == run.hash_of_network(second)
    next(iter(second.parameters())).data.view(-1)[0] += 1
    assert run.hash_of_network(first) != run.hash_of_network(second)
    for name in ("adapter_model.safetensors", "pytorch_model.bin"):
        before = weights_hash(tmp_path)
        (tmp_path / name).write_bytes(b"weights")
        assert weights_hash(tmp_path) not in (before, None)
    images = load_images(DataArguments(dataset_name="digits"), training=False)
    assert run.fingerprint(images, ImageFormat(32)) != run.fingerprint(images, ImageFormat(32, mean=(0.5, 0.5, 0.5)))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"protocols": ["fgsm"], "patch": 4}, "patch is for occlusion, got 4 with protocols fgsm; add occlusion"),
        ({"protocols": [], "eps": 2.0}, "eps is for fgsm and pgd, got 2.0 with protocols none"),
        ({"protocols": ["pgd"], "corrupted_dataset_name": "somebody/cifar10-c"}, "corrupted_dataset_name is for corruptions"),
        ({"severity_column_name": "level"}, "severity_column_name is for a ready set, got 'level'"),
    ],
)
def test_settings_of_what_is_not_measured_are_refused(settings, sentence):
    from hf_mixup.evaluation.evaluate import EvaluationArguments

    with pytest.raises(ValueError, match=sentence):
        EvaluationArguments(**settings)


def test_numbers_by_class_are_told_with_their_classes():
    """A checkpoint keeps its order of classes, which may not be that of the folders."""
    from hf_mixup.methods import MethodChoice
    from images import script

    choice = MethodChoice.build(
        ["mixup", "remix"], mix_args={"remix": {"class_counts": (5, 9)}}, loss={"name": "crossentropy", "weight": (1, 2.5)}
    )
    assert script("run_mixup").numbers_by_class(choice, ["dog", "cat"]) == [
        "weight: 1 for 'dog', 2.5 for 'cat'",
        "class_counts: 5 for 'dog', 9 for 'cat'",
    ]


# -- pictures -------------------------------------------------------------------------------------------------------------


def test_pictures_of_files_and_of_a_checkpoint(checkpoint, tmp_path):
    """Columns for what was asked, and a row more for masks' activation maps."""
    from hf_mixup.data.sources import digits

    files = [tmp_path / f"{row}.png" for row in range(3)]
    for row, file in enumerate(files):
        digits()["test"][row]["image"].resize((40, 40)).save(file)
    run_script("visualize_mixup.py", "--images", *files, "--mix", "cutmix", "fmix", "--image_size", "32", "--count", "4", "--output", tmp_path / "files.png")  # fmt: skip
    run_script("visualize_mixup.py", "--checkpoint", checkpoint, "--dataset_name", "digits", "--activations", "--count", "4", "--output", tmp_path / "maps.png")  # fmt: skip
    plain, maps = (Image.open(tmp_path / name) for name in ("files.png", "maps.png"))
    assert plain.width == maps.width
    assert maps.height - plain.height > 100
    assert np.array(maps.convert("RGB")).std() > 20


def test_mixtures_say_what_the_network_saw():
    """Masks, lam and partners of a column give its mixed image and its label again."""
    from hf_mixup import MixupModel
    from hf_mixup.core.rng import MixKey
    from hf_mixup.data.processor import ImageFormat
    from hf_mixup.report.examples import mixtures
    from small import resnet

    form, rng = ImageFormat(16), torch.Generator().manual_seed(0)
    pixels = torch.rand(4, 3, 16, 16, generator=rng) - 0.5
    made = mixtures(
        MixupModel(resnet(), ["cutmix", "mixup", "fmix"]), pixels, torch.arange(4), form, MixKey(0, 0, 1), masks=True, activations=True
    )
    for columns in made.values():
        for own, column in enumerate(columns):
            again = column["mask"] * column["own"] + (1 - column["mask"]) * column["partner"]
            torch.testing.assert_close(again, column["mixed"], atol=1e-5, rtol=0)
            # FMix labels with the share it drew, up to a pixel
            assert float(column["title"].split()[-1]) == pytest.approx(float(column["mask"].mean()), abs=0.011)
            assert float(column["target"][own]) >= float(column["mask"].mean()) - 0.01
            assert column["activation"].ndim == 2


def test_one_picture_of_every_method(tmp_path):
    from hf_mixup.data.processor import ImageFormat
    from hf_mixup.report.examples import pairs_of_every_method
    from hf_mixup.report.plots import overview

    pixels = torch.stack([torch.full((3, 32, 32), -1.0), torch.full((3, 32, 32), 1.0)])
    names = ["cutmix", "recursivemix", "supermix", "transmix"]
    columns = pairs_of_every_method(pixels, ImageFormat(32), 0, names)
    assert [column["title"] for column in columns] == names
    for column in columns:
        assert 0.3 < float(column["target"][1]) < 0.7
        assert column["own"].mean() < column["mixed"].mean() < column["partner"].mean()
    overview(tmp_path / "all.png", columns, ["dark", "light"])
    assert Image.open(tmp_path / "all.png").width == 900


def test_a_mistake_in_a_picture_is_one_sentence(tmp_path):
    done = run_script("visualize_mixup.py", "--activations", "--output", tmp_path / "out.png", check=False)
    assert done.returncode != 0
    assert "got no checkpoint; pass --checkpoint" in done.stderr.strip().splitlines()[-1]
    from datasets import DatasetDict

    from hf_mixup.data.sources import digits
    from images import script

    DatasetDict(test=digits()["test"].select([0])).save_to_disk(tmp_path / "one")
    for words, sentence in (
        (("--label_column_name", "said"), "--label_column_name is for a data set, got 'said' without one"),
        (("--inputs", "videos", "--image_size", "64"), "--inputs videos draws data that is made here, got --image_size too"),
        (("--dataset_name", tmp_path / "one"), "mixing needs at least 2 images, got 1 in 'test'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            script("visualize_mixup").main([*map(str, words), "--output", str(tmp_path / "out.png")])
