"""Model cards: complete, made from the files of the run, with any names of data sets and classes."""

import json
import re
import shlex
import shutil
import sys
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor

from hf_mixup import METHODS, MixupModel
from hf_mixup.data.processor import ImageFormat
from hf_mixup.evaluation.corruptions import COMMON_CORRUPTIONS
from hf_mixup.networks.backbones import from_scratch
from hf_mixup.report.card import EVALUATED, bibtex, evaluated, fenced, plain, weights_hash, wrapped, write_evaluation, write_model_card
from hf_mixup.training.hub import without_secrets
from small import Images, resnet, trainer

HOSTILE = [
    "a|b",
    "`rm -rf`",
    "<script>alert(1)</script>",
    "---\nlicense: mit",
    "{{ title }}",
    "[x](http://evil)",
    "# big",
    "näh: {a: b}",
    "$\\frac{$",
]


def test_every_method_with_a_paper_is_cited():
    for name, method in METHODS.items():
        assert (bibtex(name) is not None) == (name != "vanilla"), name
        if method.paper:
            assert f"eprint = {{{method.paper}}}" in bibtex(name)


def test_a_run_of_the_trainer_alone(tmp_path, monkeypatch):
    """`Trainer.create_model_card`, from scratch: nothing asked of the Hub, no base model, and the run's own numbers."""
    import httpx2

    monkeypatch.setattr(httpx2.Client, "send", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    run = trainer(tmp_path, resnet(), evaluation=Images(16, seed=1), eval_strategy="epoch", mix=["resizemix"])
    run.train()
    run.save_model()
    run.create_model_card(dataset="quadrants", dataset_args="test", dataset_tags="somebody/quadrants", tags="own")
    card = ModelCard.load(tmp_path / "README.md")
    last = next(row for row in reversed(run.state.log_history) if "eval_top1" in row)
    result = next(result for result in card.data.eval_results if result.metric_type == "accuracy")
    assert result.metric_value == last["eval_top1"]
    assert (result.dataset_name, result.dataset_type, result.dataset_split) == ("quadrants", "somebody/quadrants", "test")
    assert card.data.base_model is None
    assert {"resizemix", "own", "hf_mixup"} <= set(card.data.tags)
    assert card.data.datasets == ["somebody/quadrants"]
    text = card.text
    for part in (
        "trained from scratch",
        "learning rate",
        "2012.11101",
        '"name": "resizemix"',
        "**parameters:** 0.0",
        "transformers: 5",
        "Calibration and robustness were not measured",
        f"{last['eval_top1']:.4f}",
    ):
        assert part in text, part
    assert "fine-tuned" not in text


def test_says_what_it_was_trained_from(tmp_path):
    first = trainer(tmp_path / "first", resnet(), max_steps=4, save_strategy="steps", save_steps=2)
    first.train()
    again = trainer(tmp_path / "first", resnet(), max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "first/checkpoint-2"))
    again.save_model()
    again.create_model_card()
    assert "trained from scratch" in (tmp_path / "first/README.md").read_text()

    cached = tmp_path / "models--user--run/snapshots/abc"
    for start, said in (
        (tmp_path / "first", "fine-tuned from a local checkpoint"),
        (cached, "fine-tuned from [user/run](https://huggingface.co/user/run)"),
    ):
        if start == cached:
            shutil.copytree(tmp_path / "first", cached)
        second = trainer(tmp_path / "second", MixupModel.from_pretrained(start), max_steps=1)
        second.train()
        second.save_model()
        second.create_model_card()
        assert said in (tmp_path / "second/README.md").read_text()
    assert ModelCard.load(tmp_path / "second/README.md").data.base_model == "user/run"


def test_hostile_names(tmp_path):
    network = resnet(num_labels=len(HOSTILE))
    network.config.id2label = dict(enumerate(HOSTILE))
    MixupModel(network, "cutmix").save_pretrained(tmp_path)
    (tmp_path / "all_results.json").write_text(json.dumps({"eval_top1": 0.5, "eval_top5": 0.75, "eval_runtime": 3.0}))
    for name in HOSTILE:
        write_model_card(tmp_path, model_name=name, dataset=name, split=name, command=f"run ``` {name}", hyperparameters={name: name})
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.license is None
        assert card.data.model_name == name
        values = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert values == {"accuracy": 0.5, "top_5_accuracy": 0.75}
        prose = card.text.replace(f"````bash\nrun ``` {name}\n````", "")
        assert "<script" not in prose
        assert not re.search(r"(?<!\\)\]\(http://evil", prose)
        assert prose.count("\n# ") == 1
        tables = [line for line in prose.splitlines() if line.startswith("| measure")]
        assert [line.replace("\\|", "").count("|") for line in tables] == [3]


CLEAN = {"top1": 0.5, "top5": 0.75, "ece": 0.1, "ece_mass": 0.2, "nll": 1.0, "brier": 0.6}
BINS = {"count": [4, 4], "accuracy": [0.25, 0.75], "confidence": [0.3, 0.8], "error": 0.05}


def results(folder, **changes):
    """As of `run_evaluation.py`."""
    return {
        "model": "run", "weights": weights_hash(folder), "dataset": {"name": "quadrants", "split": "test", "images": 8}, "num_labels": 10,
        "command": "run_evaluation.py run", "clean": CLEAN, "calibration": {"equal width": BINS, "equal mass": BINS},
        "attacks": {"fgsm": {"eps": 8 / 255, "top1": 0.25}, "pgd": {"eps": 8 / 255, "steps": 10, "top1": 0.125}},
        "corruptions": {"top1": {name: [0.4] * 5 for name in COMMON_CORRUPTIONS}, "mean_error": 0.6, "mean_error_all": 0.6, "mce_alexnet": 0.8},
        "occlusion": {"ratios": [tenth / 10 for tenth in range(10)], "top1": [0.5 - tenth / 30 for tenth in range(10)]},
        **changes,
    }  # fmt: skip


def measures(card):
    return {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results}


def test_an_evaluation_stays_in_the_card(tmp_path):
    """Also where the card is written again, by a resumed run or a push; not where its weights are others."""
    MixupModel(resnet(), "cutmix").save_pretrained(tmp_path)
    (tmp_path / "all_results.json").write_text(json.dumps({"eval_top1": 0.5, "eval_loss": 1.0}))
    about = {"dataset": "quadrants", "split": "test"}
    write_model_card(tmp_path, **about)
    write_evaluation(tmp_path, results(tmp_path))
    merged = ModelCard.load(tmp_path / "README.md")
    assert {kind for kind, _, _ in evaluated(results(tmp_path))} == set(EVALUATED)
    assert {kind for _, kind in measures(merged)} == {*EVALUATED, "loss"}
    for part in ("under PGD, eps 8/255, 10 steps | 0.1250 |", "(reliability.png)", "(corruptions.png)", "(occlusion.png)"):
        assert part in merged.text
        assert part in (tmp_path / "evaluation.md").read_text()
    assert "not measured" not in merged.text

    write_model_card(tmp_path, **about)
    again = ModelCard.load(tmp_path / "README.md")
    assert again.text == merged.text
    assert measures(again) == measures(merged)

    # a second one takes its place, and on other images leaves the numbers of the first
    write_evaluation(tmp_path, results(tmp_path, attacks={}, dataset={"name": "others", "split": "test", "images": 8}))
    del (fewer := results(tmp_path))["attacks"]
    write_evaluation(tmp_path, fewer)
    last = ModelCard.load(tmp_path / "README.md")
    assert last.text.count("## Evaluation") == 1
    assert ("quadrants", "pgd_accuracy") not in measures(last)
    assert ("others", "mce_alexnet") in measures(last)

    MixupModel(resnet(num_labels=3), "cutmix").save_pretrained(tmp_path)
    write_model_card(tmp_path, **about)
    assert "not measured" in (tmp_path / "README.md").read_text()


def test_an_evaluation_goes_into_any_card(tmp_path):
    """Of somebody else's checkpoint: at the end; what is there stays."""
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Theirs\n\nText.\n")
    write_evaluation(tmp_path, results(tmp_path))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.strip().startswith("# Theirs\n\nText.")
    assert card.data.license == "mit"
    assert measures(card)["quadrants", "fgsm_accuracy"] == 0.25


@pytest.mark.parametrize("network", ["cifar_resnet20", "vit_mini", "resnet10t"])
def test_its_code_runs(tmp_path, monkeypatch, network):
    """As typed, with the shapes that it says; the figures of the network are those of its weights."""
    model = MixupModel(from_scratch(network, 7, 32), "cutmix")
    model.save_pretrained(tmp_path)
    ImageFormat(32).processor().save_pretrained(tmp_path)
    card = write_model_card(tmp_path, repo=str(tmp_path)).read_text()
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 50)).save("image.png")
    classify, features, train = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict = {}
    exec(classify.replace("classify(", "found = classify("), names)
    assert len(names["found"]) == 5
    exec(features, names)
    shapes = [tuple(state.shape) for state in names["maps"]]
    written = [
        (tuple(map(int, shape.split(", "))), int(count or 1))
        for shape, count in re.findall(r"^ +# \((.+?)\)(?:, (\d+) of them)?$", features, re.M)
    ]
    assert [shape for shape, count in written for _ in range(count)] == shapes
    assert f"# {tuple(names['embedding'].shape)}" in features
    exec(train, names)
    assert f"**parameters:** {sum(p.numel() for p in model.backbone.parameters()) / 1e6:.2f} M" in card


def test_figures_are_those_of_timm_s_cards(tmp_path):
    """resnet50: 25.6 M parameters, 4.1 GMACs, 11.1 M activations; 22.1, 4.6 and 11.9 or 12.0 of deit_small."""
    for name, wanted in (("resnet50", (25.6, 4.1, 11.1)), ("deit_small_patch16_224", (22.1, 4.6, 11.95))):
        folder = tmp_path / name
        from_scratch(name, 1000, 224).config.save_pretrained(folder)
        ImageFormat(224).processor().save_pretrained(folder)
        (folder / "mixup_config.json").write_text(json.dumps({"methods": [{"name": "mixup"}]}))
        text = write_model_card(folder).read_text()
        found = re.search(r"parameters:\*\* ([\d.]+) M.*?([\d.]+) GMACs, ([\d.]+) M activations", text, re.DOTALL)
        assert [float(number) for number in found.groups()] == pytest.approx(wanted, abs=0.06)


def test_size_of_the_images_is_that_of_the_processor(tmp_path):
    """Images that are not square, and a crop that is switched off."""
    (tmp_path / "mixup_config.json").write_text(json.dumps({"methods": [{"name": "mixup"}]}))
    size = {"image_size": (16, 24), "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTConfig(architectures=["ViTForImageClassification"], **size).save_pretrained(tmp_path)
    assert "**image size:** 16 x 24 pixels" in write_model_card(tmp_path).read_text()
    ViTImageProcessor(size={"height": 16, "width": 24}).save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "crop_size": {"height": 8, "width": 8}, "do_center_crop": False}))
    text = write_model_card(tmp_path).read_text()
    assert "**image size:** 16 x 24 pixels" in text
    assert "GMACs" in text


def test_says_where_it_was_watched(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=SimpleNamespace(url="https://wandb.example/run")))
    MixupModel(resnet(), "cutmix").save_pretrained(tmp_path)
    assert "<https://wandb.example/run>" in write_model_card(tmp_path).read_text()


def test_long_commands_are_broken_before_options():
    words = [
        "accelerate",
        "launch",
        "run.py",
        "--mix",
        "a",
        "b",
        "--mix_args",
        '{"a": {"x": 1}}',
        *(f"--option_{i}={i}" for i in range(20)),
    ]
    shown = wrapped(shlex.join(words))
    assert max(map(len, shown.splitlines())) <= 100
    assert shlex.split(shown.replace("\\\n", "")) == words
    assert len(shown.splitlines()) < 10
    for as_it_is in ("python run.py", "echo 'torn " + "a" * 100):
        assert wrapped(as_it_is) == as_it_is


def test_plain_and_fenced():
    assert plain("a_b c|d <i> *x*\n# y") == r"a_b c\|d &lt;i&gt; \*x\* \# y"
    assert fenced("a ``` b", "bash") == "````bash\na ``` b\n````"


def test_tokens_are_left_out_of_the_command():
    assert without_secrets(["--token", "hf_1", "--mix", "cutmix", "--hub_token=hf_2", "--use_cpu"]) == ["--mix", "cutmix", "--use_cpu"]
