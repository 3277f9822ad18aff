"""Sweeps, how runs are reported, tables, and the cards of published results."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from hf_mixup.report.benchmark import (
    Reported,
    Summary,
    accuracies,
    configure,
    latex_table,
    markdown_table,
    published,
    published_cards,
    published_value,
    resolve,
)
from run_script import ROOT, run_script

RECIPES = ROOT / "training_scripts/recipes"
CARDS = ROOT / "model_cards"


def benchmark(*words, check=True):
    return run_script("run_benchmark.py", *words, check=check)


def test_runs_are_reported_as_the_tables_do():
    history = [0.1, 0.9, 0.5, 0.6, 0.7]
    assert Reported("median", 3).of(history) == 0.6
    assert Reported("median", 10).of(history) == 0.6
    assert Reported("best").of(history) == 0.9
    assert Reported("best", 3).of(history) == 0.7
    assert Reported().of(history) == 0.7
    with pytest.raises(ValueError, match="did you mean 'median'"):
        Reported("medan")


def test_tables():
    table = {
        "vanilla": {"ResNet-18": Summary((90.0, 92.0, 94.0), 94.87), "ViT_mini": Summary((80.0,))},
        "transmix": {"ViT_mini": Summary((85.5,))},
    }
    markdown = markdown_table(table)
    assert "| vanilla | 92.00 ± 2.00 (3) / 94.87 | 80.00 (1) |" in markdown
    assert "| transmix | - | 85.50 (1) |" in markdown
    latex = latex_table(table, "in %")
    assert r"vanilla & 92.00 $\pm$ 2.00 (3) / 94.87 & 80.00 (1) \\" in latex
    assert r"transmix & -- & 85.50 (1) \\" in latex
    assert r"ViT\_mini" in latex
    assert r"\caption{in \%}" in latex


def test_published_values_are_found():
    rows = published(CARDS / "published_results.csv")
    wanted = {("vanilla",): 94.87, ("mixup",): 95.70, ("cutmix",): 96.11, ("puzzlemix",): 96.42, ("automix",): 96.59}
    for mix, value in wanted.items():
        for name in ("ResNet-18", "cifar_resnet18"):
            assert published_value(rows, configure("cifar10_basic", RECIPES, mix, name, 200), RECIPES) == value
    assert published_value(rows, configure("cifar10_basic", RECIPES, ["mixup"], "ResNet-18", 201), RECIPES) is None
    assert published_value(rows, configure("cifar10_small", RECIPES, ["mixup"], None, 200), RECIPES) is None
    # of the two numbers for SAMix, the benchmark document's
    assert published_value(rows, configure("imagenet_pytorch_100ep", RECIPES, ["samix"], "ResNet-18"), RECIPES) == 70.83


def test_commands_give_the_configuration_back():
    row = next(row for row in published(CARDS / "published_results.csv") if row["method"] == "RSB" and row["backbone"] == "ResNet-50")
    run = resolve(row, RECIPES)
    assert run.command() == (
        "accelerate launch --num_processes 4 training_scripts/run_mixup.py --recipe imagenet_rsb_a3 --mix mixup cutmix "
        "--architecture ResNet-50 --num_train_epochs 100"
    )
    sys.path.insert(0, str(ROOT / "training_scripts"))
    try:
        from run_mixup import parse
    finally:
        sys.path.pop(0)
    model, data, _, args = parse([*run.words(), "--use_cpu", "--fp16", "False", "--output_dir", "/nowhere"])
    assert (model.architecture, args.mix, args.alpha, args.optim, data.train_image_size) == (
        "ResNet-50",
        ["mixup", "cutmix"],
        [0.1, 1.0],
        "lamb",
        160,
    )
    assert args.method_choice().methods[0].loss.reduction == "sum"


def test_cards_are_current():
    """`python -m hf_mixup.report.benchmark` makes them."""
    made = published_cards(CARDS / "published_results.csv", RECIPES, CARDS / "measured.csv", CARDS / "published_costs.csv")
    assert {path.name for path in CARDS.glob("*.md")} == set(made)
    for name, text in made.items():
        assert (CARDS / name).read_text() == text, name
    assert sum(text.count("\n| ") - 2 for text in made.values()) == 752
    vits = made["cifar100-vit-mixup_cifar.md"]
    assert "| DeiT-S | SAMix | 2 | 224 | 21.70 | 600 | 82.49 | - | 21.3 | 58 |" in vits
    assert sum(row["measure"] == "hours" for row in published(CARDS / "published_costs.csv")) == sum(
        line.split(" | ")[9] != "-" for line in vits.splitlines() if line.startswith("| ") and not line.startswith(("| backbone", "| ---"))
    )
    assert made["imagenet1k-pytorch-samix.md"].count("contradicted by") == 9


def test_measured_results_stand_beside_published_ones(tmp_path):
    (tmp_path / "measured.csv").write_text(
        "dataset,setting,backbone,epochs,method,top1,runs,checkpoint\ncifar10,basic,ResNet-18,200,Vanilla,94.99,3,https://example.org/x\n"
    )
    cards = published_cards(CARDS / "published_results.csv", RECIPES, tmp_path / "measured.csv")
    assert "| 94.87 | [94.99 (3 runs)](https://example.org/x) |" in cards["cifar10-basic-cifar10.md"]


def test_dry_run_and_summarize(tmp_path):
    benchmark("--recipe", "imagenet_deit_s", "--mix", "cutmix", "mixup+transmix", "--seeds", 2, "--dry_run", tmp_path / "all.sh")
    lines = (tmp_path / "all.sh").read_text().splitlines()
    assert len(lines) == 6
    assert lines[3].startswith(
        "accelerate launch --num_processes 8 training_scripts/run_mixup.py --recipe imagenet_deit_s --mix mixup transmix"
    )
    subprocess.run(["sh", "-n", tmp_path / "all.sh"], check=True)
    for seed, values in (("1", [0.5, 0.7, 0.6]), ("2", [0.8, 0.8, 0.8])):
        folder = tmp_path / f"mine-{seed}"
        folder.mkdir()
        rows = [{"epoch": epoch, "eval_top1": value} for epoch, value in enumerate(values, 1)]
        (folder / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert accuracies(tmp_path / "mine-1") == [0.5, 0.7, 0.6]
    done = benchmark("--summarize", tmp_path / "mine-1", tmp_path / "mine-2", "--last_epochs", 3)
    assert "| mine | 70.00 ± 14.14 (2) |" in done.stdout
    done = benchmark("--summarize", tmp_path / "mine-1", "--measure", "best")
    assert "| mine | 70.00 (1) |" in done.stdout
    with pytest.raises(ValueError, match=r"hold train_log\.jsonl, got none"):
        accuracies(tmp_path)


SWEEP = ("--recipe", "digits100", "--mix", "vanilla", "transmix", "--backbones", "cifar_resnet20", "vit_mini", "--epochs", 2, "--seeds", 2)


@pytest.mark.slow
def test_row_43_a_sweep_that_was_killed_ends_as_one_that_was_not(tmp_path):
    """Its finished cells are left alone, its half cell is trained from the start; impossible pairs are shown as such."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    benchmark(*SWEEP, "--output_dir", whole)
    table = (whole / "results.md").read_text()
    assert "| transmix | - | " in table
    assert "transmix with cifar_resnet20: a network whose attention can be read is needed" in table
    assert (whole / "results.tex").is_file()
    assert (whole / "results.png").stat().st_size > 5000

    command = [sys.executable, str(ROOT / "training_scripts/run_benchmark.py"), *map(str, SWEEP), "--output_dir", str(killed)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while len(list((killed / "cells").glob("*.json"))) < 2:
        time.sleep(0.2)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    times = {path.name: path.stat().st_mtime_ns for path in (killed / "cells").glob("*.json")}
    assert 2 <= len(times) < 6
    benchmark(*SWEEP, "--output_dir", killed)
    assert times.items() <= {path.name: path.stat().st_mtime_ns for path in (killed / "cells").glob("*.json")}.items()

    def numbers(folder):
        with open(folder / "results.csv", newline="") as file:
            return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]

    assert numbers(killed) == numbers(whole)
    assert len(numbers(whole)) == 6
