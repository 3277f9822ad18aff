"""Model cards: whole, from the run's own files, whatever people named things."""

import json
import re
import shutil

import pytest
from huggingface_hub import ModelCard

from hf_mixup import METHODS, MixupModel
from hf_mixup.cards import bibtex, fenced, plain, write_model_card
from hf_mixup.hub import without_secrets
from small import Images, resnet, trainer

HOSTILE = ["a|b", "`rm -rf`", "<script>alert(1)</script>", "---\nlicense: mit", "{{ title }}", "[x](http://evil)", "# big", "näh: {a: b}"]


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
        "parameters | 0.0",
        "transformers 5",
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
        assert card.data.license == "apache-2.0"
        assert card.data.model_name == name
        values = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert values == {"accuracy": 0.5, "top_5_accuracy": 0.75}
        prose = card.text.replace(f"````bash\nrun ``` {name}\n````", "")
        assert "<script" not in prose
        assert not re.search(r"(?<!\\)\]\(http://evil", prose)
        assert prose.count("\n# ") == 1
        tables = [line for line in prose.splitlines() if line.startswith("|") and "classes" in line]
        assert all(line.replace("\\|", "").count("|") == 3 for line in tables)


def test_plain_and_fenced():
    assert plain("a_b c|d <i> *x*\n# y") == r"a_b c\|d &lt;i&gt; \*x\* \# y"
    assert fenced("a ``` b", "bash") == "````bash\na ``` b\n````"


def test_tokens_are_left_out_of_the_command():
    assert without_secrets(["--token", "hf_1", "--mix", "cutmix", "--hub_token=hf_2", "--use_cpu"]) == ["--mix", "cutmix", "--use_cpu"]
