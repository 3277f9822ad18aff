"""The folder of a run: its files and facts, when it counts as complete, and what cards, sweeps and evaluations read from it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from huggingface_hub import ModelCard

from hf_mixup import MixupModel, MixupTrainer
from hf_mixup.arguments import DataArguments
from hf_mixup.cli import main as command
from hf_mixup.core.places import RECIPES
from hf_mixup.core.secrets import HIDDEN
from hf_mixup.data.processor import ImageFormat
from hf_mixup.data.sources import digits, load_images
from hf_mixup.evaluation.evaluate import EvaluationArguments, Evaluator, evaluate, patch_of, pixel_model
from hf_mixup.networks.backbones import ARCHITECTURES, from_scratch
from hf_mixup.report.benchmark import configure
from hf_mixup.report.card import write_model_card
from hf_mixup.report.run_folder import RUN_NAME, RunFolder, facts_of, list_files
from hf_mixup.report.sweep import Cell, finished, trained_before
from hf_mixup.training.checkpoints import last_complete_checkpoint, what_is_wrong
from hf_mixup.training.hub import push_folder
from refusals import refuses
from small import Images, arguments, resnet, trainer

SECRET = "hf_" + "Zz9" * 12


def test_facts_are_kept_added_and_hold_no_token(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert folder.read() == {}
    folder.record(seed=1, command=f"run --x {SECRET}")
    folder.record(seed=2, methods=["mixup"])
    assert folder.read() == {"seed": 2, "command": f"run --x {HIDDEN}", "methods": ["mixup"]}
    assert facts_of(tmp_path / "run")["seed"] == 2
    assert facts_of(tmp_path) == {}
    (tmp_path / "run" / RUN_NAME).write_text("{torn")
    assert folder.read() == {}


def test_a_folder_is_cleared_of_a_run_and_of_nothing_else(tmp_path):
    run = trainer(tmp_path, resnet(), mix=["automix"], save_strategy="steps", save_steps=4, max_steps=4)
    run.train()
    run.save_model()
    run.create_model_card()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "mine").mkdir()
    assert {"README.md", "checkpoint-4/", "mixup/", "model.safetensors", "mixup_run.json", "train_log.jsonl"} <= set(
        RunFolder(tmp_path).files()
    )
    RunFolder(tmp_path).clear()
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "mine"}


def test_a_refused_run_leaves_no_folder(tmp_path):
    deep = RunFolder(tmp_path / "runs/a/b")

    def refused(work):
        with deep.gone_if_refused():
            work()
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        refused(lambda: deep.path.mkdir(parents=True))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no"):
        refused(lambda: deep.record(seed=1))
    assert deep.read() == {"seed": 1}


def test_a_checkpoint_without_one_of_its_files_is_not_whole(tmp_path):
    trainer(tmp_path, resnet(), mix=["automix"], save_strategy="steps", save_steps=2, max_steps=4).train()
    for name in json.loads((tmp_path / "checkpoint-4" / RUN_NAME).read_text())["files"]:
        path = tmp_path / "checkpoint-4" / name
        content = path.read_bytes()
        path.unlink()
        assert name in what_is_wrong(tmp_path / "checkpoint-4")
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
        path.write_bytes(content)
    assert what_is_wrong(tmp_path / "checkpoint-4") is None
    (tmp_path / "checkpoint-4" / RUN_NAME).write_text("{")
    assert what_is_wrong(tmp_path / "checkpoint-4") == f"{RUN_NAME} is incomplete or corrupted"


def test_names_of_a_list_are_those_of_the_files(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("x.json", "a/y.pt", "a/b/z.bin", "last.json"):
        (tmp_path / name).write_text("1")
    list_files(tmp_path, "last.json")
    assert RunFolder(tmp_path).read()["files"] == ["a/b/z.bin", "a/y.pt", "x.json"]


@pytest.mark.parametrize(("first", "second"), [("automix", "cutmix"), ("automix", "adautomix"), ("recursivemix", "vanilla")])
def test_saved_twice_a_folder_holds_the_second(first, second, tmp_path):
    MixupModel(resnet(), first).save_pretrained(tmp_path)
    model = MixupModel(resnet(), second)
    model.save_pretrained(tmp_path)
    again = MixupModel.from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    MixupModel(resnet(), second).save_pretrained(tmp_path / "alone")
    names = [{path.relative_to(folder).as_posix() for path in folder.rglob("*")} for folder in (tmp_path / "alone", tmp_path)]
    assert names[0] == {name for name in names[1] if not name.startswith("alone")}
    card = write_model_card(tmp_path).read_text()
    assert ("MixBlock" in card) == ("MixBlock" in write_model_card(tmp_path / "alone").read_text())


# -- cards ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ARCHITECTURES, "resnet10t"])
def test_cards_import_what_the_network_needs(name, tmp_path):
    with torch.device("meta"):
        config = from_scratch(name, 4, 32).config
    config.save_pretrained(tmp_path)
    (tmp_path / "mixup_config.json").write_text(json.dumps({"methods": [{"name": "cutmix"}]}))
    ours = type(config).__module__.startswith("hf_mixup")
    assert ("import hf_mixup.networks.backbones" in write_model_card(tmp_path).read_text()) == ours


def test_the_licence_is_the_one_given_or_that_of_the_base(tmp_path):
    MixupModel(resnet(), "cutmix").save_pretrained(tmp_path / "run")
    MixupModel(resnet(), "cutmix").save_pretrained(tmp_path / "base")

    def licence(**given):
        write_model_card(tmp_path / "run", **given)
        card = ModelCard.load(tmp_path / "run/README.md")
        assert ("No licence is named" in card.text) == (card.data.license is None)
        return card.data.license

    assert licence() is None
    assert licence(base_model=str(tmp_path / "base")) is None
    (tmp_path / "base/README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# Base\n")
    assert licence(base_model=str(tmp_path / "base")) == "cc-by-nc-4.0"
    assert licence(base_model=str(tmp_path / "base"), license="mit") == "mit"
    (tmp_path / "base/README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n# Base\n")
    assert licence(base_model=str(tmp_path / "base")) == "other"
    assert ModelCard.load(tmp_path / "run/README.md").data.license_name == "own"


def test_a_card_before_anything_is_saved(tmp_path):
    run = trainer(tmp_path, resnet(), max_steps=1)
    run.create_model_card()
    run.train()
    run.create_model_card()
    assert "trained from scratch" in (tmp_path / "README.md").read_text()


def test_accuracy_has_the_name_of_transformers_scripts_too(tmp_path):
    run = MixupTrainer(
        resnet(),
        arguments(
            tmp_path,
            eval_strategy="epoch",
            save_strategy="epoch",
            max_steps=2,
            metric_for_best_model="accuracy",
            load_best_model_at_end=True,
        ),
        train_dataset=Images(16),
        eval_dataset=Images(8),
    )
    run.train()
    found = run.evaluate()
    assert found["eval_accuracy"] == found["eval_top1"] == run.state.best_metric
    run.create_model_card()
    assert (tmp_path / "README.md").read_text().count("top-1 accuracy") == 1


@pytest.mark.parametrize(("folder", "name"), [("pets/train", "pets"), ("pets/Validation", "pets"), ("pets", "pets")])
def test_a_data_set_is_not_called_train(folder, name, tmp_path):
    for row, example in enumerate(digits()["train"].select(range(12))):
        place = tmp_path / folder / "ab"[row % 2]
        place.mkdir(parents=True, exist_ok=True)
        example["image"].save(place / f"{row}.png")
    assert load_images(DataArguments(train_dir=str(tmp_path / folder))).name == name


# -- evaluations ------------------------------------------------------------------------------------------------------------


def test_an_evaluation_measures_what_the_run_held_out(tmp_path):
    """On a set without a split for evaluation, by the run's seed and share, whatever seed the evaluation has."""
    DatasetDict({"train": digits()["train"].select(range(100))}).save_to_disk(tmp_path / "data")
    name = str(tmp_path / "data")
    held_out = load_images(DataArguments(dataset_name=name, train_val_split=0.2), seed=7)
    facts = {"seed": 7, "data": {"dataset_name": name, "train_val_split": 0.2, "train_dir": None}}
    script = command.script("evaluate")
    for typed in ({}, {"seed": 42}, {"dataset_name": name}):
        values, seed = script.with_the_runs_data(typed, facts)
        values = {key: value for key, value in values.items() if key != "seed"}
        measured = load_images(DataArguments(**values), seed, training=False)
        assert [image.tobytes() for image in measured.evaluation["image"]] == [image.tobytes() for image in held_out.evaluation["image"]]
    assert script.with_the_runs_data({}, {}) == ({"dataset_name": "digits"}, 42)


@pytest.mark.parametrize("size", [1, 2, 8, 28, 29, 32, 64, 96, 100, 224, 260, 299, 300, 384])
def test_patches_divide_every_image_size(size):
    patch = patch_of((size, 2 * size), EvaluationArguments())
    assert size % patch == 0
    assert patch < size or size == 1
    with refuses(r"images must be whole multiples of the patch, got .*; pass --patch with one of 1"):
        patch_of((size, 2 * size), EvaluationArguments(patch=size + 1))


@pytest.fixture
def evaluator():
    images = load_images(DataArguments(dataset_name="digits", max_eval_samples=12), training=False)
    network = from_scratch("cifar_resnet20", 10, 28)
    form = ImageFormat(28)

    def made(**settings):
        args = EvaluationArguments(pgd_steps=2, batch_size=12, **settings)
        return Evaluator(pixel_model(network, form, images), form, args)

    return SimpleNamespace(images=images, made=made)


def test_protocols_are_given_one_by_one_and_gone_on_with(evaluator, monkeypatch):
    settings = {"protocols": ["fgsm", "pgd", "occlusion"], "use_cpu": True}
    steps = list(evaluate(evaluator.made(**settings), evaluator.images))
    assert [list(step["settings"]) for step in steps] == [["clean", "fgsm", "pgd", "occlusion"][:count] for count in (1, 2, 3, 4)]
    assert [step.get("unfinished", []) for step in steps] == [["fgsm", "pgd", "occlusion"], ["pgd", "occlusion"], ["occlusion"], []]
    before = json.loads(json.dumps(steps[1]))

    measured = []
    run = Evaluator.run
    monkeypatch.setattr(
        Evaluator, "run", lambda self, data, columns, changes, text: (measured.append(text), run(self, data, columns, changes, text))[1]
    )
    again = list(evaluate(evaluator.made(**settings), evaluator.images, before=before))
    assert measured == ["pgd", "occlusion"]
    assert again[-1] == json.loads(json.dumps(steps[-1]))
    measured.clear()
    other = list(evaluate(evaluator.made(**settings, eps=2.0), evaluator.images, before=before))
    assert measured == ["fgsm", "pgd", "occlusion"]
    assert other[-1]["attacks"]["fgsm"]["eps"] == 2 / 255


def test_all_protocols_are_checked_before_the_first(evaluator, tmp_path):
    for settings in ({"patch": 5}, {"corrupted_dataset_name": str(tmp_path / "nowhere")}):
        run = evaluator.made(use_cpu=True, **settings)
        run.run = lambda *args: pytest.fail("measured something")
        with pytest.raises(ValueError, match="got"):
            next(evaluate(run, evaluator.images))


# -- sweeps -----------------------------------------------------------------------------------------------------------------


def test_a_cell_whose_words_or_recipe_changed_is_trained_again(tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text("dataset_name: digits\nlearning_rate: 0.1\n")

    def cell():
        return Cell(configure(str(recipe), RECIPES, ["cutmix"], "cifar_resnet20"), None, None, 1)

    (tmp_path / "cells").mkdir()
    path = tmp_path / "cells" / f"{cell().name}.json"
    path.write_text(json.dumps({**cell().facts(["--bf16"]), "top1": [0.5]}))
    assert finished(cell(), tmp_path, ["--bf16"])["top1"] == [0.5]
    assert finished(cell(), tmp_path, ["--bf16", "--learning_rate", "9"]) is None
    assert finished(cell(), tmp_path) is None
    recipe.write_text("dataset_name: digits\nlearning_rate: 0.2\n")
    assert finished(cell(), tmp_path, ["--bf16"]) is None
    assert trained_before(cell(), tmp_path)["top1"] == [0.5]
    assert SECRET not in json.dumps(cell().facts(["--hub_token", SECRET, "--x", SECRET]))
    named = Cell(configure(str(recipe), RECIPES, ["cutmix"]), None, None, 1)
    named.run.arguments["model_name_or_path"] = "timm/resnet18.a1_in1k"
    assert named.column == "resnet18.a1_in1k"


# -- pushes -----------------------------------------------------------------------------------------------------------------


def test_only_what_may_pass_is_pushed_again(tmp_path, monkeypatch):
    import hf_mixup.training.hub as hub

    waits = []
    monkeypatch.setattr(hub.time, "sleep", waits.append)
    with refuses("push needs an existing folder, got .*; check the path"):
        push_folder("a/b", tmp_path / "nowhere", "x")

    def failing(error):
        def upload_folder(self, **kwargs):
            raise error

        return upload_folder

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", failing(KeyError("a mistake of ours")))
    with pytest.raises(KeyError):
        push_folder("a/b", tmp_path, "x")
    assert waits == []
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", failing(ConnectionResetError("gone")))
    with pytest.raises(ConnectionError, match="must reach the Hub, got 'gone'; everything is in"):
        push_folder("a/b", tmp_path, "x")
    assert waits == list(hub.WAITS)
    assert np.isfinite(waits).all()
