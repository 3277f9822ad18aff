"""Every command and every line of Python in the README and in the pages of docs/ works as typed, and their numbers are those of the files."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from statistics import fmean

import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments, ViTImageProcessor

import facts
from hf_mixup import METHODS, MixupCallback
from hf_mixup.cli.pretrain import parse as of_pretraining
from hf_mixup.cli.train import parser as of_training
from hf_mixup.data.processor import ImageFormat
from hf_mixup.data.sources import digits
from hf_mixup.networks.backbones import from_scratch
from hf_mixup.report.benchmark import Summary, markdown_table
from run_script import ROOT, run_script
from small import Images, difference, vit, weights

TEXT = (ROOT / "README.md").read_text()
PAGES = {"README.md": TEXT, **{str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}}
BIN = Path(sys.executable).parent


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def commands(page=None):
    """The lines of the blocks for a shell, of all pages, each once."""
    found = [block for name in PAGES for block in blocks(name, "bash") if page in (None, name)]
    return list(dict.fromkeys(line for block in found for line in block.replace("\\\n", " ").strip().splitlines()))


def between(page, name):
    return PAGES[page].split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0].strip()


def test_the_readme_is_short():
    assert len(TEXT.splitlines()) <= 200
    assert len(blocks("README.md", "python")[0].splitlines()) <= 20


def test_methods_are_those_of_the_table():
    """`make docs-tables` makes it, and the others."""
    assert between("docs/methods.md", "catalogue") == facts.catalogue()
    names = re.findall(r"^\| `(\w+)`", between("docs/methods.md", "catalogue"), re.M)
    assert names == list(METHODS)


@pytest.mark.parametrize("page", ["README.md", "docs/which-method.md"])
def test_the_choice_follows_from_the_files(page):
    table = between(page, "which")
    assert table == facts.which()
    assert len(table.splitlines()) <= 2 + 10
    # by hand, from the rows of the files
    assert "| `mixup` + `cutmix` | 0.8 1 | 1.0 | 75.66 → 79.80 (ImageNet, DeiT-S, 300 epochs) |" in table
    assert "| `automix` | 2 | 3.0 | 94.87 → 96.59 (CIFAR-10, ResNet-18, 200 epochs) |" in table


def test_evidence_is_that_of_the_kept_runs(tmp_path):
    """Table and chart follow from the cells, wherever the repository lies."""
    folder = ROOT / "benchmarks/results/cifar10_500"
    shutil.copytree(folder / "cells", tmp_path / "elsewhere/cells")
    run_script("run_benchmark.py", "--recipe", "cifar10_500", "--output_dir", tmp_path / "elsewhere", "--report")
    for name in ("results.md", "results.csv"):
        assert (tmp_path / "elsewhere" / name).read_text() == (folder / name).read_text()
    assert between("docs/benchmarks.md", "cifar10_500") == (folder / "results.md").read_text().strip()
    assert (ROOT / "docs/pictures/cifar10_500.png").read_bytes() == (folder / "results.png").read_bytes()
    # the README has some columns of the first of its tables
    of_all = [line.split("|") for line in between("docs/benchmarks.md", "cifar10_500").splitlines() if line.startswith("|")]
    some = [line.split("|") for line in between("README.md", "photographs").splitlines()]
    assert some == [row[:2] + row[3:7] + [""] for row in of_all[: len(some)]]
    assert len(some) > 10
    assert [row[1] for row in of_all].index(" method ", 1) == len(some)


@pytest.mark.parametrize("recipe", ["digits100", "cifar10_small"])
def test_results_are_those_that_were_measured(recipe):
    """The tables of the pages follow from the CSV files beside their charts."""
    values: dict[str, dict[str, list[float]]] = {}
    with open(ROOT / f"docs/{recipe}.csv", newline="") as file:
        for row in csv.DictReader(file):
            values.setdefault(row["method"], {}).setdefault(row["network"], []).append(float(row["top1"]))
    table = {name: {network: Summary(tuple(found)) for network, found in cells.items()} for name, cells in values.items()}
    assert between("docs/benchmarks.md", recipe) == markdown_table(table).strip()


def means(recipe, network):
    with open(ROOT / f"docs/{recipe}.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["network"] == network]
    return {name: fmean(float(row["top1"]) for row in rows if row["method"] == name) for name in {row["method"] for row in rows}}


def test_numbers_in_the_prose_are_those_of_the_files():
    digits, small = means("digits100", "cifar_resnet20"), means("cifar10_small", "cifar_resnet20")
    said = " ".join(TEXT.split())
    assert f"{digits['vanilla']:.2f} % without mixing, {digits['resizemix']:.2f} % with ResizeMix" in said
    harm = f"{small['vanilla']:.2f} % without mixing, {small['mixup']:.2f} % with mixup"
    assert harm in said
    assert f"{small['vanilla']:.2f} % without mixing and {small['mixup']:.2f} % with mixup" in " ".join(
        PAGES["docs/which-method.md"].split()
    )
    figures = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    large, small_ = (
        {name: cell["ms"][1] for name, cell in figures["collation"]["figures"]["batches"][size].items()}
        for size in ("64x3x224x224", "128x3x32x32")
    )
    for name in ("mixup", "cutmix"):
        # "At 224 pixels our collator is the fastest for bytes", "At 32 pixels timm is faster on floats", "With a lam for every image timm is slower"
        timm = [value for who, value in large.items() if who.startswith(f"timm's collator {name}, bytes")]
        assert large[f"ours {name}, per image, bytes"] < min(timm)
        assert small_[f"timm {name}, batch"] < small_[f"ours {name}, per image"] < small_[f"timm {name}, per image"]
    assert between("docs/benchmarks.md", "speed") == facts.speed()
    jpegs = figures["pipeline"]["figures"]["jpegs"]
    assert jpegs["ours, bytes"]["ratio"][1] == pytest.approx(1, abs=0.15)  # "so both are about as fast"
    # "more than forty published methods", "hardly longer", "three times as long"
    assert sum(bool(method.paper) for method in METHODS.values()) > 40
    assert max(facts.cost(name)[0] for name in ("mixup", "cutmix")) < 1.015
    assert facts.cost("automix")[0] == pytest.approx(3, abs=0.1)
    assert f"{facts.whole_run('puzzlemix')[0]:.1f}" in ("1.4", "1.5", "1.6")  # "about 1.6 times as long"
    memory = figures["learned"]["figures"]["cifar_resnet18, 100x3x32x32"]
    assert memory["automix"]["peak_mb"] / memory["vanilla"]["peak_mb"] == pytest.approx(2, abs=0.3)  # "with twice the memory"
    with open(ROOT / "docs/pretraining.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    guide = " ".join(PAGES["docs/guides/pretraining.md"].split())
    untrained, raw = ({row[name] for row in rows} for name in ("untrained_knn_top1", "raw_pixels_knn_top1"))
    assert f"All runs but two are above the untrained network ({' and '.join(sorted(untrained))})" in guide
    found = {(row["base"], row["mix"], row["seed"]): float(row["knn_top1"]) for row in rows}
    low = [(row["base"], row["mix"]) for row in rows if float(row["knn_top1"]) <= float(row["untrained_knn_top1"])]
    assert low == [("byol", "imix"), ("barlowtwins", "mixedbarlow")]
    assert [row["base"] for row in rows if float(row["knn_top1"]) > float(row["raw_pixels_knn_top1"])] == ["simclr"] * 2
    assert f"Two runs, both of SimCLR, are above raw pixels ({raw.pop()})" in guide
    gains = [found[base, "imix", seed] - found[base, "vanilla", seed] for base in ("simclr", "mocov3") for seed in ("0", "1")]
    told = re.search(r"is (\S+) and (\S+) points for SimCLR, (\S+) and (\S+) for MoCo v3", guide).groups()
    assert [float(value) for value in told] == pytest.approx(gains, abs=0.051)
    assert all(found["byol", mix, seed] < found["byol", "vanilla", seed] for mix in ("imix", "unmix") for seed in ("0", "1"))
    setup = (ROOT / "setup.py").read_text()
    for name, least in re.findall(r"(transformers|torch|Python) (\d+\.\d+) or newer", TEXT):
        assert (f'python_requires=">={least}"' if name == "Python" else f'"{name}>={least}"') in setup


def test_links_lead_somewhere():
    """Between pages, pictures and files of the repository, with anchors; the site adds the pages of methods and the reference."""
    made = {f"docs/methods/{name}.md" for name in METHODS} | {"docs/faults.md"}

    def anchors(path):
        titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.M)
        return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}

    pages = {**PAGES, **{name: (ROOT / name).read_text() for name in ("CONTRIBUTING.md", "ARCHITECTURE.md")}}
    wrong, seen = [], 0
    for page, text in pages.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            if target.startswith("https://"):
                continue
            seen += 1
            file, _, anchor = target.partition("#")
            path = (ROOT / page).parent / file if file else ROOT / page
            known = str(path.resolve().relative_to(ROOT)) in made
            if not (known or path.exists()) or (anchor and not known and anchor not in anchors(path)):
                wrong.append((page, target))
    assert not wrong
    assert seen > 60


def test_make_demo():
    """The README's command; digits reach their accuracy, and there is a picture."""
    if not (ROOT / ".venv/bin/python").exists():
        pytest.skip("needs the .venv of `make test`")
    subprocess.run(["make", "demo"], cwd=ROOT, check=True, timeout=900, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert json.loads((ROOT / "runs/demo/all_results.json").read_text())["eval_top1"] >= 0.975
    assert (ROOT / "runs/demo/gallery.png").stat().st_size > 10_000


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with what the pages name: data sets and checkpoints of the Hub as small local folders, photographs, runs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "training_scripts", tmp_path / "training_scripts")
    data = digits()
    for split, name in (("train", "train"), ("validation", "test")):
        for row, example in enumerate(data[name].select(range(80))):
            for folder in {f"images/{split}", "photos" if split == "train" else f"images/{split}"}:
                path = tmp_path / folder / str(example["label"]) / f"{row}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                example["image"].save(path)
    for repo, columns, splits in (
        ("uoft-cs/cifar10", {"image": "img"}, {"train": 160, "test": 160}),
        ("AI-Lab-Makerere/beans", {"label": "labels"}, {"train": 20, "validation": 12}),
    ):
        (tmp_path / repo).mkdir(parents=True)
        for split, rows in splits.items():
            # of three classes, as the leaves of beans are
            some = data["train"].filter(lambda label: label < 3, input_columns="label") if "beans" in repo else data["train"]
            some.select(range(rows)).rename_columns(columns).to_parquet(tmp_path / repo / f"{split}.parquet")
    for repo in ("timm/resnet10t.c3_in1k", "timm/resnet50.a1_in1k"):
        from_scratch("resnet10t", 10, 32).save_pretrained(tmp_path / repo)
        ImageFormat(32).processor().save_pretrained(tmp_path / repo)
    vit(num_labels=1000).save_pretrained(tmp_path / "facebook/deit-tiny-patch16-224")
    ViTImageProcessor(size={"height": 16, "width": 16}, do_convert_rgb=True).save_pretrained(tmp_path / "facebook/deit-tiny-patch16-224")
    return tmp_path


def run_blocks(page, **names):
    """Runs the Python of a page in order, with these names, and fewer steps."""
    data = Images(16, num_labels=10, seed=0)
    settings = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    loader = DataLoader(TensorDataset(torch.randn(8, 3, 16, 16), torch.arange(8)), 4)
    names = {
        "Trainer": Trainer,
        "torch": torch,
        "model": vit(num_labels=10),
        "train": data,
        "test": data,
        "args": TrainingArguments("out", max_steps=2, remove_unused_columns=False, **settings),
        "images": torch.randn(4, 3, 16, 16),
        "labels": torch.arange(4),
        "loader": loader,
        "data": loader.dataset,
        **names,
    }
    names.setdefault("optimizer", torch.optim.SGD(names["model"].parameters(), 0.1))
    for block in blocks(page, "python"):
        exec(block.replace("max_steps=100", "max_steps=2, use_cpu=True, report_to='none'"), names)
    return names


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_script_of_the_first_screen(place, page):
    """On twenty digits by a tiny network, which lie where the names of the Hub are looked for first."""
    script = blocks(page, "python")[0]
    names = {}
    exec(script, names)
    assert names["model"].num_labels == 3
    assert names["trainer"].state.global_step == 15  # five epochs of twenty images
    assert 0 <= names["trainer"].state.log_history[-1]["eval_accuracy"] <= 1
    assert any(isinstance(callback, MixupCallback) for callback in names["trainer"].callback_handler.callbacks)


@pytest.mark.parametrize("page", ["README.md", "docs/guides/own-trainer.md"])
def test_the_lines_for_the_script_of_transformers(tmp_path, monkeypatch, page):
    """The diff, applied to the Trainer of run_image_classification.py, mixes in training and evaluates plain images."""
    monkeypatch.chdir(tmp_path)
    [diff] = blocks(page, "diff")
    kept = "\n".join(line[1:] for line in diff.splitlines() if line[0] in "+ ")
    assert sum(line.startswith("+") for line in diff.splitlines()) == 3
    seen = []

    class Watched(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append((model.training, inputs["labels"].ndim))
            return super().compute_loss(model, inputs, *args, **kwargs)

    def collate_fn(examples):
        return {
            "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
            "labels": torch.tensor([int(example["labels"]) for example in examples]),
        }

    names = {
        "Trainer": Watched,
        "model": vit(num_labels=4),
        "training_args": TrainingArguments(
            "out", do_train=True, do_eval=True, max_steps=2, use_cpu=True, report_to="none", remove_unused_columns=False, disable_tqdm=True
        ),
        "dataset": {"train": Images(16), "validation": Images(8)},
        "compute_metrics": None,
        "collate_fn": collate_fn,
        "labels": ["a", "b", "c", "d"],
    }
    exec(
        textwrap.dedent("from hf_mixup import MixupCallback, MixupCollator, MixupLoss\n") + textwrap.dedent(kept.partition("\n")[2]), names
    )
    assert kept.startswith("from hf_mixup import MixupCallback, MixupCollator, MixupLoss\n")
    names["trainer"].train()
    names["trainer"].evaluate()
    assert set(seen) == {(True, 2), (False, 1)}


def test_python_blocks(tmp_path, monkeypatch):
    """The README's, after the whole script."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PAGES, "README.md", TEXT.replace(blocks("README.md", "python")[0], ""))
    names = run_blocks("README.md")
    assert names["trainer"].state.global_step == 2
    assert names["trainer"].model.choice.methods[0].name == "puzzlemix"
    assert names["targets"].shape == (4, 10)


def test_blocks_of_the_guide_to_the_trainer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_blocks("docs/guides/own-trainer.md")
    assert names["trainer"].state.global_step == 2
    # the guides to photographs and serving read these folders
    for folder in ("runs/photos", "runs/from-scratch"):
        names["trainer"].save_model(folder)
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    PIL.Image.new("RGB", (20, 30)).save("photograph.jpg")
    read = run_blocks("docs/guides/own-photos.md")
    assert [method.name for method in read["choice"].methods] == ["puzzlemix"]
    assert difference(weights(read["model"].backbone), weights(names["model"])) == 0
    served = run_blocks("docs/guides/serve.md")
    assert len(served["classify"](PIL.Image.new("RGB", (20, 30)))) == 5


def test_blocks_of_the_guide_to_loops():
    model = vit(num_labels=10)
    before = weights(model)
    names = run_blocks("docs/guides/any-loop.md", model=model)
    assert names["soft_targets"].shape == (4, 10)
    assert difference(before, weights(model)) > 0
    assert names["mixup_fn"].mixup_enabled is False
    assert names["loss"].requires_grad


@pytest.mark.parametrize("page", ["moving-over", "analyse", "lora", "../how-it-works"])
def test_blocks_of_the_other_guides(tmp_path, monkeypatch, page):
    monkeypatch.chdir(tmp_path)
    if page == "lora":
        pytest.importorskip("peft")
    path = os.path.normpath(f"docs/guides/{page}.md")
    names = run_blocks(path)
    if page == "analyse":
        assert torch.equal(names["mixed"][0], names["images"][0]) or not torch.equal(names["mixed"], names["images"])
        assert names["step"].methods == ("puzzlemix",)
    if page == "lora":
        assert Path("runs/lora/adapter_config.json").is_file()


def test_no_block_of_python_is_left_out():
    run = {"README.md", "docs/index.md", "docs/how-it-works.md"}
    run |= {f"docs/guides/{name}.md" for name in ("own-trainer", "own-photos", "serve", "any-loop", "moving-over", "analyse", "lora")}
    run |= {f"docs/guides/{name}.md" for name in ("sound", "video", "segmentation", "text")}  # in test_task_scripts.py, test_text.py
    assert {page for page in PAGES if blocks(page, "python")} == run


def test_arguments_of_commands_are_known(monkeypatch):
    """Every command of every page, without running it; the long ones run in the slow suite."""
    from hf_mixup.cli.main import script

    known = {"train": "run_mixup", "pretrain": "run_pretraining", "benchmark": "run_benchmark", "visualize": "visualize_mixup", "evaluate": "run_evaluation"}  # fmt: skip
    checked = 0
    for line in commands():
        words = shlex.split(line)
        place = next((i for i, word in enumerate(words) if word.endswith(".py") and "benchmarks/" not in word), None)
        if words[0] == "hf-mixup":
            name, rest = words[1], words[2:]
        elif place is not None:
            name = next(name for name, file in known.items() if words[place].endswith(f"{file}.py"))
            rest = words[place + 1 :]
        else:
            assert words[0] in ("pip", "python"), line
            continue
        checked += 1
        if name == "train":
            of_training("test").typed(rest)
        elif name == "pretrain":
            of_pretraining(rest, "test")
        else:
            own = rest[: rest.index("--")] if "--" in rest else rest
            positional = own[:1] if name == "evaluate" else []
            script(name).parser("test").typed(own) if not positional else None
            if "--" in rest:
                of_training("test").typed(rest[rest.index("--") + 1 :])
    assert checked >= 15


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [line for line in commands() if "run_mixup.py" in line or "hf-mixup train" in line], ids=lambda line: line[-40:]
)
def test_commands(place, command):
    """With local stand-ins for what comes from the Hub, and on less data."""
    words = shlex.split(command)
    words[0] = str(BIN / words[0])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    if "runs/backbone" in words:  # what the command before it made
        before = next(line for line in commands() if "hf-mixup pretrain" in line)
        first = [*shlex.split(before), "--per_device_train_batch_size", "16", "--max_steps", "2", "--image_size", "32"]
        subprocess.run([str(BIN / first[0]), *first[1:]], cwd=place, check=True, timeout=500, env=environment)
        words += ["--num_train_epochs", "1", "--output_dir", "runs/probe"]
    done = subprocess.run(
        [*words, "--per_device_train_batch_size", "16"], cwd=place, capture_output=True, text=True, timeout=500, check=False,
        env=environment,
    )  # fmt: skip
    output = place / words[len(words) - 1 - words[::-1].index("--output_dir") + 1]
    assert (output / "all_results.json").is_file(), done.stderr[-2000:]


@pytest.mark.slow
def test_the_comparison_on_data_of_ones_own(place):
    """The command of "Did it help?", with one seed: a row for each, and what goes to the training went there."""
    [command] = [line for line in commands("README.md") if "hf-mixup benchmark" in line]
    words = [*shlex.split(command), "--num_train_epochs", "1", "--per_device_train_batch_size", "16"]
    words[words.index("--seeds") + 1] = "1"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    subprocess.run([str(BIN / words[0]), *words[1:]], cwd=place, check=True, timeout=900, env=environment)
    with open(place / "runs/benchmark-finetune/results.csv", newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["vanilla", "mixup", "cutmix", "mixup+cutmix"]
    assert (place / "runs/benchmark-finetune/results.png").stat().st_size > 5_000


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
@pytest.mark.parametrize("command", [line for line in commands() if "run_evaluation.py" in line or "visualize" in line])
def test_evaluation_commands(tmp_path, command):
    """On twenty digits."""
    from hf_mixup.data.processor import ImageFormat
    from hf_mixup.networks.backbones import from_scratch

    shutil.copytree(ROOT / "training_scripts", tmp_path / "training_scripts")
    from_scratch("cifar_resnet20", 10, 32).save_pretrained(tmp_path / "runs/demo")
    ImageFormat(32).processor().save_pretrained(tmp_path / "runs/demo")
    words = [*shlex.split(command), *(("--max_eval_samples", "20") if "run_evaluation.py" in command else ())]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    subprocess.run([str(BIN / words[0]), *words[1:]], cwd=tmp_path, check=True, timeout=500, env=environment)
    made = "demo/evaluation.md" if "run_evaluation.py" in command else "methods.png"
    assert (tmp_path / "runs" / made).stat().st_size > 500


@pytest.mark.slow
def test_speed_commands(tmp_path):
    """Small and few; kornia, which one of them installs, is left out where it is not there."""
    install, here, there = [line for line in commands("docs/benchmarks.md") if "benchmarks" in line]
    assert install == 'pip install -e ".[benchmarks]"'
    assert there == f"{here} --device cuda"
    words = [*shlex.split(here)[1:], "--quick", "--output", tmp_path, "--chart", tmp_path / "speed.png"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, timeout=900, env=environment)
    figures = json.loads((tmp_path / "cpu.json").read_text())
    assert set(figures) == {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"chart", "knn", "peers", "run", "tasks", "timing"}
    assert (tmp_path / "speed.png").stat().st_size > 10_000
