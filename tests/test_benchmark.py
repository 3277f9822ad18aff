"""Sweeps, reports of runs, tables, and the cards of published results."""

import csv
import itertools
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from datasets import load_dataset

from hf_mixup.arguments import DataArguments
from hf_mixup.data.sources import digits, load_images, of_every_class
from hf_mixup.methods import METHODS
from hf_mixup.report.benchmark import (
    Reported,
    Summary,
    about,
    accuracies,
    configure,
    latex_table,
    markdown_table,
    published,
    published_cards,
    published_value,
    resolve,
)
from hf_mixup.report.dataset import measured_rows
from hf_mixup.report.evidence import Ranking, evidence_table, paired, ranking
from hf_mixup.report.sweep import Cell, Images, finished
from hub_server import USER, LoopbackHub
from refusals import refuses
from run_script import ROOT, run_script
from test_hub import process

RECIPES = ROOT / "training_scripts/recipes"
CARDS = ROOT / "model_cards"


def benchmark(*words, check=True):
    return run_script("run_benchmark.py", *words, check=check)


@pytest.fixture
def sweep_of(capsys):
    """The command in this process: what it prints."""
    sys.path.insert(0, str(ROOT / "training_scripts"))
    try:
        from run_benchmark import main
    finally:
        sys.path.pop(0)

    def told(*words):
        main(list(map(str, words)))
        return capsys.readouterr().out

    return told


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
    assert "- Swin-T, SAMix, 600 epochs: memory (GB) 29.3; hours 75" in vits
    rows = [line for line in vits.splitlines() if line.startswith("| ") and not line.startswith(("| backbone", "| ---"))]
    shown = sum(line.split(" | ")[9] != "-" for line in rows) + vits.count("; hours ")
    assert shown == sum(row["measure"] == "hours" for row in published(CARDS / "published_costs.csv"))
    assert made["imagenet1k-pytorch-samix.md"].count("contradicted by") == 9
    # as OpenMixup's documents say of each table
    assert "\nReported is the best of the last 10 epochs.\n" in vits
    assert "\nReported is the best epoch, mean of 3 runs.\n" in made["imagenet1k-deit-mixup_imagenet.md"]
    both = "the median of the last 5 epochs by `imagenet_pytorch_100ep`, and the median of the last 10 epochs by `imagenet_pytorch_300ep`"
    assert f"\nReported is {both}.\n" in made["imagenet1k-pytorch-mixup_imagenet.md"]


def test_measured_results_stand_beside_published_ones(tmp_path):
    (tmp_path / "measured.csv").write_text(
        "dataset,setting,backbone,epochs,method,top1,runs,checkpoint\ncifar10,basic,ResNet-18,200,Vanilla,94.99,3,https://example.org/x\n"
    )
    cards = published_cards(CARDS / "published_results.csv", RECIPES, tmp_path / "measured.csv")
    assert "| 94.87 | [94.99 (3 runs)](https://example.org/x) |" in cards["cifar10-basic-cifar10.md"]


def test_dry_run_and_summarize(tmp_path, sweep_of):
    sweep_of("--recipe", "imagenet_deit_s", "--mix", "cutmix", "mixup+transmix", "--seeds", 2, "--dry_run", tmp_path / "all.sh")
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
    done = sweep_of("--summarize", tmp_path / "mine-1", tmp_path / "mine-2", "--last_epochs", 3)
    assert "| mine | 70.00 ± 14.14 (2) |" in done
    done = sweep_of("--summarize", tmp_path / "mine-1", "--measure", "best")
    assert "| mine | 70.00 (1) |" in done
    with pytest.raises(ValueError, match=r"hold train_log\.jsonl, got none"):
        accuracies(tmp_path)


def test_a_sweep_leaves_out_what_is_impossible_and_names_networks_by_default(tmp_path, sweep_of):
    """Methods of attention train a transformer where no network is named. In one column, it would be compared with another network."""
    dry = ("--mix", "transmix", "cutmix", "--seeds", 1, "--dry_run", tmp_path / "all.sh", "--output_dir", tmp_path / "out")
    done = sweep_of("--recipe", "digits100", *dry)
    lines = (tmp_path / "all.sh").read_text().splitlines()[2:]
    pairs = [("cutmix", "cifar_resnet20"), ("transmix", "vit_mini"), ("cutmix", "vit_mini")]
    assert [(words[words.index("--mix") + 1], words[words.index("--architecture") + 1]) for words in map(str.split, lines)] == pairs
    assert "left out: transmix with cifar_resnet20: the network must have attention that can be read" in done
    with refuses("a sweep needs methods that work with its networks, got transmix with cifar_resnet20 "):
        sweep_of("--recipe", "digits100", "--mix", "transmix", "--backbones", "cifar_resnet20", *dry[3:])

    sweep_of("--recipe", "digits", *dry)
    lines = (tmp_path / "all.sh").read_text().splitlines()[2:]
    assert [words[words.index("--architecture") + 1] for words in map(str.split, lines)] == ["vit_mini", "cifar_resnet20"]
    assert "runs/transmix-vit_mini-1" in lines[0]
    sweep_of("--recipe", "digits", *dry, "--", "--image_size", "224")
    lines = (tmp_path / "all.sh").read_text().splitlines()[2:]
    assert [words[words.index("--architecture") + 1] for words in map(str.split, lines)] == ["deit_tiny_patch16_224", "resnet18"]
    typed = {"num_train_epochs": 201.0}
    run = sys.modules["run_benchmark"].configured("cifar10_basic", ["mixup"], "ResNet-18", 200, None, typed)
    assert (run.epochs, published_value(published(CARDS / "published_results.csv"), run, RECIPES)) == (201, None)
    sweep_of("--recipe", "digits", *dry, "--", "--model_type", "vit")
    assert "--architecture" not in (tmp_path / "all.sh").read_text()


# -- evidence ---------------------------------------------------------------------------------------------------------------


def cell(top1, nll=1.0, **more):
    return {
        "top1": top1,
        "nll": nll,
        "ece": 0.1,
        "corruption_error": 0.5,
        "cpu_seconds_per_step": 0.25,
        "machine": {"device": "cpu"},
        **more,
    }


def test_differences_are_paired_by_the_seed():
    """The deviation is that of the differences, and seeds that only one of both has do not count."""
    found = {
        "vanilla": {1: cell(0.40, 3.0), 2: cell(0.50, 2.0), 3: cell(0.60, 1.0)},
        "cutmix": {1: cell(0.43, 2.0), 2: cell(0.54, 1.0), 4: cell(0.9, 0.1)},
    }
    top1 = paired(found, "cutmix", "top1")
    assert top1.values == pytest.approx((3, 4))
    assert top1.deviation == pytest.approx(0.5**0.5)
    assert paired(found, "cutmix", "nll").values == (-1, -1)
    table = evidence_table(found).splitlines()
    assert table[2] == "| vanilla | 3 | 50.00 |  | 2.000 |  | 10.0 | 50.0 | 0.250 |"
    assert table[3] == "| cutmix | 3 | 62.33 | +3.50 ± 0.71 (2) | 1.033 | -1.000 ± 0.000 (2) | 10.0 | 50.0 | 0.250 |"
    assert paired({"cutmix": found["cutmix"]}, "cutmix", "top1").values == ()
    assert "| cutmix | 3 | 62.33 | - |" in evidence_table({"cutmix": found["cutmix"]})


def test_ranks_are_compared_with_the_published_order():
    rows = published(CARDS / "published_results.csv")
    order = about("cifar10_500", RECIPES)["order"]["cifar_resnet20"]
    value = {name: float(row["top1"]) for row in rows for name in [row["method"]] if all(row[key] == str(order[key]) for key in order)}
    names = {"vanilla": "Vanilla", "mixup": "MixUp", "cutmix": "CutMix", "puzzlemix": "PuzzleMix", "automix": "AutoMix"}
    same = {mix: {1: cell(value[name] / 100)} for mix, name in names.items()}
    assert ranking(same, rows, order) == Ranking(pytest.approx(1), 5)
    turned = {mix: {1: cell(1 - value[name] / 100)} for mix, name in names.items()}
    assert ranking({**turned, "tlalign": {1: cell(0.5)}}, rows, order) == Ranking(pytest.approx(-1), 5)
    assert ranking({"vanilla": same["vanilla"], "mixup": same["mixup"]}, rows, order) is None


REPORT = ("--recipe", "cifar10_500", "--report", "--backbones", "cifar_resnet20", "--mix", "vanilla", "cutmix", "--output_dir")


def cells_in(folder, **changes):
    """Cells of the recipe, as a sweep leaves them."""
    (folder / "cells").mkdir(parents=True)
    for mix, gain in (("vanilla", 0), ("cutmix", 0.05)):
        for seed in (1, 2, 3, 4):
            made = Cell(configure("cifar10_500", RECIPES, [mix], "cifar_resnet20"), None, None, seed)
            result = {
                **made.facts([]),
                "seconds": 60.0,
                **cell([0.4 + gain + seed / 100]),
                "seconds_per_step": 0.5,
                "images": "abc",
                **changes,
            }
            (folder / "cells" / f"{made.name}.json").write_text(json.dumps(result))


def test_tables_follow_from_the_cells_wherever_they_lie(tmp_path, sweep_of):
    """Four seeds, without being asked for; the same bytes from a copy; and the tables in a Markdown file."""
    here, there = tmp_path / "here", tmp_path / "elsewhere/there"
    cells_in(here)
    shutil.copytree(here, there)
    text = tmp_path / "text.md"
    text.write_text("before\n<!-- cifar10_500 -->\nold\n<!-- /cifar10_500 -->\nafter\n")
    sweep_of(*REPORT, here, "--into", text)
    sweep_of(*REPORT, there)
    for name in ("results.md", "results.csv", "results.png"):
        assert (here / name).read_bytes() == (there / name).read_bytes(), name
    table = (here / "results.md").read_text()
    assert "| cutmix | 4 | 47.50 | +5.00 ± 0.00 (4) |" in table
    assert text.read_text() == f"before\n<!-- cifar10_500 -->\n{table}<!-- /cifar10_500 -->\nafter\n"
    other = next((there / "cells").glob("*.json"))
    other.write_text(other.read_text().replace('"abc"', '"other"'))
    with pytest.raises(ValueError, match="cells of a sweep must be trained on the same images, got abc and other"):
        sweep_of(*REPORT, there)
    with pytest.raises(ValueError, match="into must be a file with one <!-- cifar10_500 -->"):
        sweep_of(*REPORT, here, "--into", tmp_path / "none.md")


@pytest.mark.parametrize("recipe", ["cifar10_500", "digits100"])
def test_kept_cells_are_those_of_the_recipe(recipe):
    """So that no run of them is trained again, and none names a place of a machine."""
    kept = sorted((ROOT / "benchmarks/results" / recipe / "cells").glob("*.json"))
    assert kept
    made = {}
    for network, mixes in about(recipe, RECIPES)["sweep"].items():
        for mix, seed in itertools.product(METHODS if mixes == ["all"] else mixes, range(1, 6)):
            cell = Cell(configure(recipe, RECIPES, mix.split("+"), network), None, None, seed)
            made[cell.name] = cell
    for path in kept:
        result = json.loads(path.read_text())
        assert result.items() >= made[path.stem].facts([]).items()
        assert "/" not in path.read_text()
        assert "top1" in result
        if recipe == "cifar10_500":
            assert {"nll", "ece", "corruption_error", "cpu_seconds_per_step", "images"} <= set(result)


def test_a_cell_is_trained_again_when_a_default_of_its_method_changes(tmp_path, monkeypatch):
    """No word and no recipe has a default, but the result depends on it."""
    cutmix, mixup = (Cell(configure("digits100", RECIPES, [mix], "cifar_resnet20"), None, None, 1) for mix in ("cutmix", "mixup"))
    (tmp_path / "cells").mkdir()
    for cell in (cutmix, mixup):
        (tmp_path / "cells" / f"{cell.name}.json").write_text(json.dumps({**cell.facts([]), "top1": [0.5]}))
    assert finished(cutmix, tmp_path)
    assert finished(mixup, tmp_path)
    monkeypatch.setitem(METHODS, "cutmix", METHODS["cutmix"].replaced(alpha=0.5))
    assert finished(cutmix, tmp_path) is None
    assert finished(mixup, tmp_path)


def test_images_are_known_wherever_they_lie(tmp_path):
    splits = digits()
    for split in splits:
        splits[split] = splits[split].select(range(120))
    for name in ("one", "two"):
        splits.save_to_disk(tmp_path / name)
    splits["train"] = splits["train"].select(range(1, 120))
    splits.save_to_disk(tmp_path / "fewer")
    one, two, fewer = (Images.at(str(tmp_path / name)) for name in ("one", "two", "fewer"))
    assert one.fingerprint == two.fingerprint != fewer.fingerprint


def test_images_of_every_class_are_drawn_by_the_seed(tmp_path):
    classes = np.array([0] * 30 + [1] * 5 + [2] * 40)
    rows = of_every_class(classes, 8, seed=1)
    assert np.bincount(classes[rows]).tolist() == [8, 5, 8]
    assert len(set(rows)) == len(rows)
    assert np.any(np.diff(classes[rows]) < 0)  # not class by class
    assert np.array_equal(rows, of_every_class(classes, 8, seed=1))
    assert not np.array_equal(rows, of_every_class(classes, 8, seed=2))
    few = load_images(DataArguments("digits", max_train_samples_per_class=7), seed=1)
    assert np.bincount(few.train["label"]).tolist() == [7] * 10
    assert len(few.evaluation) == 360
    with pytest.raises(ValueError, match="only one of max_train_samples and max_train_samples_per_class can be set, got 5 and 5"):
        DataArguments("digits", max_train_samples=5, max_train_samples_per_class=5)


@pytest.mark.slow
def test_all_results_are_a_data_set_of_the_hub(tmp_path, sweep_of):
    """Pushed by a command; what arrives is what `datasets` reads, published and measured ones apart."""
    with LoopbackHub() as hub:
        words = ("--dataset", tmp_path / "results", "--hub_dataset_id", f"{USER}/mixup-results")
        told = process(hub, tmp_path, sys.executable, str(ROOT / "training_scripts/run_benchmark.py"), *words).stdout
        assert f"{USER}/mixup-results" in told
        pushed = hub.files(f"{USER}/mixup-results")
    here = {path.name: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    assert pushed.items() >= here.items()
    assert {"README.md", "published.parquet", "published_costs.parquet"} <= set(here)
    rows = load_dataset(str(tmp_path / "results"), "published", cache_dir=str(tmp_path / "cache"))["train"]
    assert len(rows) == 752
    first = next(row for row in rows if row["dataset"] == "aircraft" and row["method"] == "AdAutoMix")
    assert (first["top1"], first["recipe"]) == (81.73, "aircraft")
    assert "--model_name_or_path timm/resnet18.tv_in1k" in first["command"]
    with pytest.raises(ValueError, match="hub_dataset_id needs the folder of the data set"):
        sweep_of("--hub_dataset_id", "somebody/else")


def test_cells_of_a_sweep_are_rows(tmp_path):
    cells_in(tmp_path / "cifar10_500")
    rows = measured_rows([tmp_path / "cifar10_500"])
    assert len(rows) == 8
    assert rows[0] | {"top1": 0} == {
        "recipe": "cifar10_500", "method": "cutmix", "network": "cifar_resnet20", "epochs": 160.0, "seed": 1, "top1": 0, "alpha": None,
        "reported": "last epoch",
        "nll": 1.0, "ece": 0.1, "corruption_error": 0.5, "cpu_seconds_per_step": 0.25, "seconds_per_step": 0.5, "device": "cpu", "images": "abc",
    }  # fmt: skip
    assert rows[0]["top1"] == pytest.approx(46)


def test_rows_of_a_sweep_report_accuracies_as_its_recipe_does(tmp_path):
    """CIFAR-10 by the published recipe is the median of the last ten epochs; and an alpha that was typed is told."""
    (tmp_path / "cifar10_basic/cells").mkdir(parents=True)
    cell = {"words": ["--recipe", "cifar10_basic", "--mix", "cutmix", "--alpha", "0.2", "--seed", "1"], "top1": [0.1, *[0.8] * 9, 0.5]}
    (tmp_path / "cifar10_basic/cells/cutmix-1.json").write_text(json.dumps(cell))
    [row] = measured_rows([tmp_path / "cifar10_basic"])
    assert (row["top1"], row["alpha"], row["reported"]) == (80, 0.2, "median of the last 10 epochs")
    cell["words"] = ["--recipe", "cifar10_basic", "--mix", "mixup", "cutmix", "--num-train-epochs=2", "--alpha", "0.2", "1", "--seed=3"]
    (tmp_path / "cifar10_basic/cells/cutmix-1.json").write_text(json.dumps(cell))
    [row] = measured_rows([tmp_path / "cifar10_basic"])
    assert (row["method"], row["epochs"], row["alpha"], row["seed"]) == ("mixup+cutmix", 2, None, 3)


SWEEP = ("--recipe", "digits100", "--mix", "vanilla", "transmix", "--backbones", "cifar_resnet20", "vit_mini", "--epochs", 2, "--seeds", 2)


@pytest.mark.slow
def test_row_43_a_sweep_that_was_killed_ends_as_one_that_was_not(tmp_path):
    """Also in another folder: finished cells are left alone, a half one is trained from the start; impossible pairs are shown as such."""
    whole, killed, moved = tmp_path / "whole", tmp_path / "killed", tmp_path / "other/machine"
    benchmark(*SWEEP, "--output_dir", whole)
    table = (whole / "results.md").read_text()
    assert "| transmix | - | " in table
    assert "transmix with cifar_resnet20: the network must have attention that can be read" in table
    assert (whole / "results.tex").is_file()
    assert (whole / "results.png").stat().st_size > 5000

    command = [sys.executable, str(ROOT / "training_scripts/run_benchmark.py"), *map(str, SWEEP), "--output_dir", str(killed)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while len(list((killed / "cells").glob("*.json"))) < 2:
        time.sleep(0.2)
        assert process.poll() is None
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert len(workers) > 0
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    shutil.copytree(killed / "cells", moved / "cells")
    times = {path.name: path.stat().st_mtime_ns for path in (moved / "cells").glob("*.json")}
    assert 2 <= len(times) < 6
    benchmark(*SWEEP, "--output_dir", moved)
    assert times.items() <= {path.name: path.stat().st_mtime_ns for path in (moved / "cells").glob("*.json")}.items()
    for name in ("results.md", "results.tex", "results.png"):
        assert (moved / name).read_bytes() == (whole / name).read_bytes(), name

    def numbers(folder):
        with open(folder / "results.csv", newline="") as file:
            return [{key: value for key, value in row.items() if "seconds" not in key} for row in csv.DictReader(file)]

    assert numbers(moved) == numbers(whole)
    assert len(numbers(whole)) == 6


@pytest.mark.slow
def test_a_cell_holds_all_that_is_measured(tmp_path):
    """By a recipe of one's own, and images of this machine, which the cell does not name."""
    (tmp_path / "tiny.yaml").write_text(
        "dataset_name: somebody/digits\narchitecture: cifar_resnet20\nimage_size: 16\nmax_train_samples_per_class: 4\nnum_train_epochs: 1\n"
        "per_device_train_batch_size: 10\neval_strategy: 'no'\nsave_strategy: 'no'\n"
        "benchmark: {corrupted_images: 3, sweep: {cifar_resnet20: [vanilla, cutmix]}}\n"
    )
    splits = digits()
    splits["test"] = splits["test"].select(range(20))
    splits.save_to_disk(tmp_path / "images")
    words = ("--recipe", tmp_path / "tiny.yaml", "--seeds", 1, "--output_dir", tmp_path / "sweep")
    benchmark(*words, "--data", tmp_path / "images")
    paths = sorted((tmp_path / "sweep/cells").glob("*.json"))
    assert [path.stem for path in paths] == ["cutmix-cifar_resnet20-1", "vanilla-cifar_resnet20-1"]
    for path in paths:
        assert str(tmp_path) not in path.read_text()
        found = json.loads(path.read_text())
        assert len(found["top1"]) == 1
        assert 0 < found["corruption_error"] <= 1
        assert found["nll"] > 0
        assert 0 < found["cpu_seconds_per_step"] < found["seconds"]
    assert "| cutmix | 1 |" in (tmp_path / "sweep/results.md").read_text()
    again = benchmark(*words, "--data", tmp_path / "images").stdout
    assert "2 cells: 0 to train" in again
