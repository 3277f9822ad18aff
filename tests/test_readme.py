"""Every command and every line of Python in the README works as typed."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

from hf_mixup.report.benchmark import Summary, markdown_table
from hf_mixup.report.card import methods_table
from run_script import ROOT
from small import Images, difference, vit, weights

TEXT = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def commands():
    for block in blocks("bash"):
        yield from block.replace("\\\n", " ").strip().splitlines()


def test_methods_are_those_of_the_table():
    """`python -c "from hf_mixup.report.card import methods_table; print(methods_table())"` makes it."""
    assert TEXT.split("<!-- methods -->")[1].split("<!-- /methods -->")[0].strip() == methods_table()


@pytest.mark.parametrize("recipe", ["digits100", "cifar10_small"])
def test_results_are_those_that_were_measured(recipe):
    """The tables of the README follow from the CSV files beside their charts."""
    values: dict[str, dict[str, list[float]]] = {}
    with open(ROOT / f"docs/{recipe}.csv", newline="") as file:
        for row in csv.DictReader(file):
            values.setdefault(row["method"], {}).setdefault(row["network"], []).append(float(row["top1"]))
    table = {name: {network: Summary(tuple(found)) for network, found in cells.items()} for name, cells in values.items()}
    assert TEXT.split(f"<!-- {recipe} -->")[1].split(f"<!-- /{recipe} -->")[0].strip() == markdown_table(table).strip()


def test_make_demo():
    """The first screen's command; digits reach their accuracy, and the picture of the README is the one it makes."""
    if not (ROOT / ".venv/bin/python").exists():
        pytest.skip("needs the .venv of `make test`")
    subprocess.run(["make", "demo"], cwd=ROOT, check=True, timeout=900, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert json.loads((ROOT / "runs/demo/all_results.json").read_text())["eval_top1"] >= 0.975
    assert (ROOT / "runs/demo/gallery.png").stat().st_size > 10_000


def test_python_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = Images(16, num_labels=10, seed=0)
    settings = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    first, second, load, call = blocks("python")
    names = {
        "Trainer": Trainer,
        "model": vit(num_labels=10),
        "train": data,
        "test": data,
        "args": TrainingArguments("out", max_steps=2, remove_unused_columns=False, **settings),
    }
    exec(first, names)
    second = second.replace("max_steps=100", "max_steps=2, use_cpu=True, report_to='none'")
    exec(second, names)
    names["trainer"].model.choice = type(names["trainer"].model.choice).build("cutmix")
    names["trainer"].save_model("runs/from-scratch")
    exec(load, names)
    assert names["method"].name == "cutmix"
    model = vit(num_labels=10)
    before = weights(model)
    loader = DataLoader(TensorDataset(torch.randn(8, 3, 16, 16), torch.arange(8)), 4)
    names.update(torch=torch, model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), loader=loader)
    exec(call, names)
    assert names["soft_targets"].shape == (4, 10)
    assert difference(before, weights(model)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("command", [line for line in commands() if "run_mixup.py" in line], ids=lambda line: line[-40:])
def test_commands(tmp_path, command):
    """With local stand-ins for what comes from the Hub, and on less data."""
    from hf_mixup.data.processor import ImageFormat
    from hf_mixup.data.sources import digits
    from hf_mixup.networks.backbones import from_scratch

    shutil.copytree(ROOT / "training_scripts", tmp_path / "training_scripts")
    data = digits()
    for split, name in (("train", "train"), ("validation", "test")):
        for row, example in enumerate(data[name].select(range(80))):
            folder = tmp_path / "images" / split / str(example["label"])
            folder.mkdir(parents=True, exist_ok=True)
            example["image"].save(folder / f"{row}.png")
    for name in ("train", "test"):
        (tmp_path / "hub").mkdir(exist_ok=True)
        data[name].select(range(160)).rename_columns({"image": "img"}).to_parquet(tmp_path / f"hub/{name}.parquet")
    from_scratch("resnet10t", 10, 32).save_pretrained(tmp_path / "checkpoint")
    ImageFormat(32).processor().save_pretrained(tmp_path / "checkpoint")
    words = shlex.split(
        command.replace("uoft-cs/cifar10", "hub")
        .replace("timm/resnet10t.c3_in1k", "checkpoint")
        .replace("timm/resnet50.a1_in1k", "checkpoint")
    )
    words[0] = str(BIN / words[0])
    done = subprocess.run(
        [*words, "--per_device_train_batch_size", "16"], cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    output = tmp_path / words[words.index("--output_dir") + 1]
    assert (output / "all_results.json").is_file(), done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("command", [line for line in commands() if "run_benchmark.py" in line], ids=lambda line: line[-40:])
def test_benchmark_commands(tmp_path, command):
    """One run of each, of one epoch, on digits."""
    words = [*shlex.split(command), "--mix", "vanilla", "--seeds", "1", "--epochs", "1", "--backbones", "cifar_resnet20"]
    words += ["--output_dir", str(tmp_path / "out"), "--", "--dataset_name", "digits", "--max_train_samples", "100"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    shutil.copytree(ROOT / "training_scripts", tmp_path / "training_scripts")
    subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, check=True, timeout=500, env=environment)
    assert (tmp_path / ("cifar10.sh" if "--dry_run" in words else "out/results.md")).is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "made"),
    list(
        zip(
            [line for line in commands() if "run_evaluation.py" in line or "visualize" in line],
            ("demo/evaluation.md", "methods.png"),
            strict=True,
        )
    ),
)
def test_evaluation_commands(tmp_path, command, made):
    """On twenty digits."""
    from hf_mixup.data.processor import ImageFormat
    from hf_mixup.networks.backbones import from_scratch

    shutil.copytree(ROOT / "training_scripts", tmp_path / "training_scripts")
    from_scratch("cifar_resnet20", 10, 32).save_pretrained(tmp_path / "runs/demo")
    ImageFormat(32).processor().save_pretrained(tmp_path / "runs/demo")
    words = [*shlex.split(command), *(("--max_eval_samples", "20") if "run_evaluation.py" in command else ())]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    subprocess.run([str(BIN / words[0]), *words[1:]], cwd=tmp_path, check=True, timeout=500, env=environment)
    assert (tmp_path / "runs" / made).stat().st_size > 500


@pytest.mark.slow
def test_speed_commands(tmp_path):
    """Small and few; kornia, which one of them installs, is left out where it is not there."""
    install, here, there = [line for line in commands() if "benchmarks" in line]
    assert install == 'pip install -e ".[benchmarks]"'
    assert there == f"{here} --device cuda"
    words = [*shlex.split(here)[1:], "--quick", "--output", tmp_path, "--chart", tmp_path / "speed.png"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, timeout=900, env=environment)
    figures = json.loads((tmp_path / "cpu.json").read_text())
    assert set(figures) == {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"chart", "knn", "peers", "run", "timing"}
    assert (tmp_path / "speed.png").stat().st_size > 10_000
