"""The documentation: pages of methods follow from rows and files, notebooks run, the site builds, and `make new-method` makes a method."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import facts
import new_method
import pages
from hf_mixup import METHODS, Method, __version__, blend
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import SamplePolicy
from run_script import ROOT

TOOLS = ROOT / "docs/tools"

DRAWN = {"share": 0.6, "inside": False, "mask": True}


@pytest.mark.parametrize("name", METHODS)
def test_the_page_of_a_method_says_what_row_docstring_and_files_say(name):
    method = METHODS[name]
    page = pages.method_page(method, DRAWN)
    assert page.startswith(f"# {name}\n\n{facts.sentence(method)}\n")
    assert (method.paper in page) if method.paper else "arXiv:" not in page.split("## Facts")[1].split("##")[0]
    for part in facts.parts(method).values():
        for field in vars(part):
            assert f"| `{field}` | `{getattr(part, field)!r}` | " in page
    rows = [row for row in facts.published() if row["method"] in {r["method"] for r in facts.published_of(name)}]
    for row in rows:
        assert f"| {row['dataset']} | {row['backbone']} | {row['epochs']} | {row['method']} |" in page
        assert f"| {row['top1']} |" in page
    assert ("```bibtex" in page) == (name != "vanilla")
    assert f"| runs in | {facts.runs_in(method)} |" in page


def test_where_methods_run():
    """By hand, of some."""
    assert facts.runs_in(METHODS["cutmix"]) == "any loop, collator, `MixupTrainer`"
    assert facts.runs_in(METHODS["decouplemix"]) == "any loop, collator, `MixupTrainer`"
    assert facts.runs_in(METHODS["puzzlemix"]) == facts.runs_in(METHODS["sumix"]) == "`MixupTrainer`"
    for name in ("transmix", "tokenmix", "smmix", "tlalign", "mixpro"):
        assert facts.runs_in(METHODS[name]) == "`MixupTrainer`, vision transformers only"


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_of_a_method_is_told_of(name):
    for part in facts.parts(METHODS[name]).values():
        assert not [field for field, _, told in facts.arguments(part) if not told], type(part).__name__


def test_deviations_become_a_list():
    found = facts.deviations(METHODS["puzzlemix"].sample)
    assert found[0].startswith("The mask is solved by `solvers.solve_grid` instead of alpha-beta swap")
    assert found[3] == "A block that finds no place leaves its own image behind, not black."
    assert len(found) == 5
    page = pages.method_page(METHODS["puzzlemix"], DRAWN)
    assert "\n1. The mask is solved" in page
    assert "\n5. Where OpenMixup differs" in page


@dataclass(frozen=True)
class Diagonal(SamplePolicy):
    """Diagonal (Nobody et al., 2030; github.com/nobody/diagonal): cut an image along its diagonal.

    What it is for.

    Deviations from the code: the first; the second, which is
    longer (with a part in brackets; of its own). A sentence.

    Args:
        alpha: both parameters of the Beta.
        first, second: two at once,
            over two lines.
    """

    alpha: float = 1.0
    first: int = 2
    second: str = "x"

    def plan(self, shape, rng, signals) -> MixPlan:
        return MixPlan.identity(shape[0])


def test_a_method_that_comes_later_has_a_page():
    method = Method("diagonal", Diagonal(), paper="3001.00001")
    assert facts.sentence(method) == "Cut an image along its diagonal."
    assert facts.deviations(method.sample) == [
        "The first.",
        "The second, which is longer (with a part in brackets; of its own).",
        "A sentence.",
    ]
    assert facts.arguments(method.sample) == [
        ("alpha", "1.0", "both parameters of the Beta."),
        ("first", "2", "two at once, over two lines."),
        ("second", "'x'", "two at once, over two lines."),
    ]
    assert facts.cost_text("diagonal") == "not measured"
    page = pages.method_page(method, DRAWN)
    assert "What it is for." in page
    assert "None in the tables that we have." in page


def test_costs_and_gains_are_those_of_the_files():
    """By hand, from benchmarks/results/cpu.json and model_cards/published_results.csv."""
    assert facts.cost("tokenmix") == (pytest.approx(1.3589, abs=1e-4), "DeiT-S, 224 px, beside CutMix")
    assert facts.cost("adautomix") == (pytest.approx(4.2695, abs=1e-4), "ResNet-18, 32 px")
    assert facts.cost("puzzlemix") is None
    assert facts.gain("mixup+transmix", "imagenet1k", "DeiT-S", 300) == (75.66, 80.68, "0.8,1")
    assert {row["method"] for row in facts.published_of("cutmix")} == {"CutMix"}
    assert {row["method"] for row in facts.published_of("tokenmix")} == {"TokenMix"}
    assert {row["method"] for row in facts.published_of("mixup")} == {"MixUp"}


def test_every_page_is_in_the_menu():
    text = re.sub(r"!!python\S+", "", (ROOT / "mkdocs.yml").read_text())
    config = yaml.safe_load(text)

    def files(entries):
        for entry in entries:
            for value in entry.values() if isinstance(entry, dict) else [entry]:
                if isinstance(value, str):
                    yield value
                else:
                    yield from files(value)

    listed = set(files(config["nav"]))
    there = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".ipynb")}
    assert there == {file for file in listed if not file.startswith("reference/")}
    assert config["strict"]


# what newcomers asked, written down before the pages were; and words of the answer, on the page that has it
QUESTIONS = (
    ("What is mixing, and why would I do it?", "README.md", "blends of two images and of their labels"),
    ("How do I install it, and which versions do I need?", "README.md", "transformers 5.17 or newer"),
    ("How do I train on my own folder of photographs?", "docs/guides/own-photos.md", "one folder for each class"),
    ("Which method, and which alpha?", "README.md", "| you have | use | alpha |"),
    ("What does it cost?", "docs/methods.md", "time of a step, without mixing = 1"),
    ("Did it help on my data?", "README.md", "--mix vanilla mixup cutmix mixup+cutmix --seeds 3"),
    ("What are lam and alpha?", "docs/which-method.md", "`lam` is the share of the own image"),
    ("How do I add it to my timm loop?", "docs/guides/any-loop.md", "replaces `timm.data.Mixup`"),
    ("How do I get masks and lam?", "docs/guides/analyse.md", "method.plan(images, labels)"),
    ("Why is my training accuracy so low?", "docs/faq.md", "It is measured on mixtures"),
    # of public threads about mixup in timm, torchvision and transformers
    ("It made my results worse.", "docs/faq.md", "the training is too short, or the network too small"),
    ("How do I turn it off for the last epochs?", "docs/faq.md", "`--mix_off_epoch 90`"),
    ("Does it work with LoRA?", "docs/guides/lora.md", "Every method works with LoRA"),
    ("My images have several labels.", "docs/faq.md", "`MixupLoss(loss=BCE())`"),
    ("Must the batch size be even?", "docs/faq.md", "Every batch of two or more images is mixed"),
    ("Does my compute_metrics still work?", "docs/guides/own-trainer.md", "`compute_metrics` gets plain images and class numbers"),
    ("Can I see mixtures of my images before I train?", "docs/faq.md", "`hf-mixup visualize --train_dir photos/train"),
    ("Can I load the result without this library?", "docs/guides/serve.md", "without hf_mixup"),
)


@pytest.mark.parametrize(
    ("start", "question", "page", "words"),
    # the site does not hold the README
    [(start, *rest) for start in ("README.md", "docs/index.md") for rest in QUESTIONS if start == "README.md" or rest[1] != "README.md"],
)
def test_an_answer_is_two_clicks_away(start, question, page, words):
    assert words in (ROOT / page).read_text(), question
    reached = {(ROOT / start).resolve()}
    for _ in range(2):
        for path in list(reached):
            links = re.findall(r"\]\(([^)#\s]+\.md)[^)]*\)", path.read_text()) if path.suffix == ".md" and path.is_file() else []
            reached |= {(path.parent / link).resolve() for link in links if not link.startswith("http")}
    assert (ROOT / page).resolve() in reached, question


def test_pictures_are_small_and_used():
    texts = "".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    sources = "".join(path.read_text() for path in [*TOOLS.glob("*.py"), *(ROOT / "docs/notebooks").glob("*.ipynb")])
    for path in [*(ROOT / "docs").glob("*.png"), *(ROOT / "docs").glob("*.jpg"), *(ROOT / "docs/pictures").glob("*")]:
        assert path.stat().st_size < (500_000 if path.suffix == ".webp" else 300_000), path
        assert f"{path.name})" in texts or f"{path.stem}" in sources, path
    with Image.open(ROOT / "docs/pictures/lam.webp") as moving:
        assert moving.n_frames >= 16


def test_pictures_show_what_methods_do():
    """The picture of a method is its mixture of the two photographs, and the mask is that of its plan."""
    import pictures

    own, partner = pictures.photographs(64)
    column = pictures.pair_of("cutmix")
    mixed = column["mask"] * own + (1 - column["mask"]) * partner
    torch.testing.assert_close(column["mixed"], mixed, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(column["mask"].mean(), column["target"][0])
    for name in ("mixup", "cutmix", "resizemix", "fmix", "hmix"):
        for lam in (1.0, 0.6, 0.0):
            plan = pictures._plan(name, lam, 64)
            assert abs(float(plan.lam[0]) - lam) < 0.02
            assert abs(float(plan.dense_mask((64, 64))[0, 0].mean()) - lam) < 0.02
    assert torch.equal(blend(pictures._plan("fmix", 1.0, 64), torch.stack([own, partner]))[0], own)


def test_colours_mean_the_same_in_every_picture():
    """Blue is the own image: in the bars, whether its share is the larger or not, and in the mask."""
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure

    from hf_mixup.report.plots import OWN, PARTNER, _bars, mask_colours

    for target, own, expected in (
        ([0.7, 0.3], 0, [OWN, PARTNER]),
        ([0.3, 0.7], 0, [PARTNER, OWN]),
        ([0.3, 0.7], 1, [OWN, PARTNER]),
        ([0.0, 1.0], 1, [OWN]),
    ):
        axis = Figure().subplots()
        _bars(axis, torch.tensor(target), ["a", "b"], 2, own)
        assert [to_hex(bar.get_facecolor()).upper() for bar in axis.patches] == expected
    assert [to_hex(mask_colours()(share)).upper() for share in (1.0, 0.0)] == [OWN, PARTNER]


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


# -- a new method -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    for name in ("hf_mixup", "tests", "training_scripts", "model_cards"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    for name in ("tools",):
        shutil.copytree(TOOLS, tmp_path / "docs" / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def run(folder, *words, check=True):
    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def test_new_method_makes_one_that_mixes(copy):
    made = new_method.make("zebramix", "ZebraMix", copy)
    assert "hf_mixup/policies/zebramix.py" in made
    new_method.make("aamix", "Aamix", copy)
    code = """
import torch
from hf_mixup import METHODS, get_method
from hf_mixup.report.card import bibtex
for name in ("zebramix", "aamix"):
    x = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    mixed, targets = get_method(name)(x, torch.tensor([0, 1]), 2)
    assert torch.allclose(mixed[0].mean(), targets[0, 1]), (mixed, targets)
    assert bibtex(name)
assert list(METHODS)[-2:] == ["zebramix", "aamix"]
"""
    run(copy, "-c", code)
    for name in ("zebramix", "cutmix", "Zebra-Mix"):
        with pytest.raises(ValueError, match="NAME must be"):
            new_method.make(name, "Title", copy)
    ruff = Path(sys.executable).parent / "ruff"
    if ruff.exists():
        for words in (["check", "hf_mixup"], ["format", "--check", "hf_mixup"]):
            assert subprocess.run([ruff, *words], cwd=copy, check=False).returncode == 0


@pytest.mark.slow
def test_new_method_passes_the_laws(copy):
    run(copy, copy / "docs/tools/new_method.py", "zebramix")
    done = run(copy, "-m", "pytest", "-q", "tests/test_laws.py", "tests/test_every_method.py", "-k", "zebramix", "-p", "no:cacheprovider")
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= 10


# -- notebooks and the site ---------------------------------------------------------------------------------------------------

BOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_notebooks_are_small_and_were_run(path):
    book = json.loads(path.read_text())
    assert path.stat().st_size < 200_000
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in cells]
    assert counts == list(range(1, len(cells) + 1))
    assert any(cell["outputs"] for cell in cells)
    assert all(output["output_type"] != "error" for cell in cells for output in cell["outputs"])
    assert not re.search(r"/home/|/root/|/tmp/|site-packages", path.read_text())


def test_there_are_three_notebooks():
    assert {path.stem for path in BOOKS} == {"mix_and_look", "did_it_help", "automix_masks"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mix_and_look", "did_it_help", "automix_masks"])
def test_notebooks_run(tmp_path, monkeypatch, name):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import notebooks
    from hf_mixup.data.sources import digits

    small = tmp_path / "cifar10"
    small.mkdir()
    for split in ("train", "test"):  # stand-ins for images that have to be downloaded
        data = digits()["train"].select(range(1000)).rename_columns({"image": "img"})
        data.map(lambda row: {"img": row["img"].resize((32, 32))}, features=data.features, load_from_cache_file=False).to_parquet(
            small / f"{split}.parquet"
        )
    for key, value in {"CIFAR10": str(small), "EPOCHS": "0.1", "STEPS": "3", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(key, value)
    (tmp_path / "docs/notebooks").mkdir(parents=True)
    shutil.copytree(ROOT / "docs/pictures", tmp_path / "docs/pictures")
    done = notebooks.run(notebooks.built(name), tmp_path / "docs/notebooks")
    kept = json.loads((ROOT / f"docs/notebooks/{name}.ipynb").read_text())
    assert [cell.source for cell in done.cells] == ["".join(cell["source"]) for cell in kept["cells"]]
    assert all(
        cell.outputs
        for cell in done.cells
        if cell.cell_type == "code" and not cell.source.startswith(("import io", "from hf_mixup import MixupT"))
    )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs of setup.py")
def test_the_site_builds_without_a_warning(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "NO_MKDOCS_2_WARNING": "1"}
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in METHODS:
        assert (tmp_path / f"site/methods/{name}/index.html").is_file()
        assert (tmp_path / f"site/methods/{name}.png").stat().st_size > 5_000
    assert "Stacks examples into a batch" in (tmp_path / "site/reference/collator/index.html").read_text()
