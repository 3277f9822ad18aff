"""`benchmarks/device.sh`: the files that it packs, the end of its parts, and a whole run on the CPU."""

import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest

from hf_mixup.arguments import DataArguments
from hf_mixup.data.sources import digits, load_images
from run_script import ROOT

FOLDER = ROOT / "benchmarks/device"


@pytest.fixture(scope="module")
def device():
    """The modules of the folder, which are scripts: `run` and `pack`."""
    sys.path.insert(0, str(FOLDER))
    try:
        made = []
        for name in ("pack", "run"):
            spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            made.append(module)
        yield made
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("pack", "run"):
            sys.modules.pop(name, None)


def test_images_travel_unchanged(device, tmp_path):
    """In less room: their files begin alike."""
    pack, _ = device
    for split, data in digits().items():
        data.select(range(50)).rename_column("image", "img").to_parquet(tmp_path / f"{split}.parquet")
    pack.compress(tmp_path, tmp_path / "packed.xz")
    (tmp_path / "out").mkdir()
    pack.unpack(tmp_path / "packed.xz", tmp_path / "out")
    there = load_images(DataArguments(str(tmp_path / "out")))
    here = digits()
    for data, whole in ((there.train, here["train"]), (there.evaluation, here["test"])):
        assert len(data) == 50
        assert list(data["label"]) == whole.select(range(50))["label"]
        assert all(one.tobytes() == other.tobytes() for one, other in zip(data["img"], whole.select(range(50))["image"], strict=True))
    assert (tmp_path / "packed.xz").stat().st_size < sum(path.stat().st_size for path in tmp_path.glob("*.parquet"))


def test_a_part_that_is_stopped_or_fails_keeps_its_figures(device, tmp_path):
    _, run = device
    code = "import json, sys, time; open(sys.argv[1], 'w').write(json.dumps({'figures': [FIGURE]})); "
    code = code.replace("FIGURE", "dict(method='mixup', epochs=1, of_epochs=2, top1=0.5, published=None)")
    ends = {"slow": "time.sleep(60)", "broken": "sys.exit(3)", "good": ""}
    said = {}
    chosen = {
        name: run.Part(name, 1.0, lambda path, end=end: run.python("-c", code + end, path), run.of_training) for name, end in ends.items()
    }
    start = time.monotonic()
    with open(tmp_path / "log", "w") as log:
        for name, part in chosen.items():
            said[name] = {"title": name, **run.run_part(part, tmp_path / f"{name}.json", 2.0, dict(os.environ), log)}
    assert time.monotonic() - start < 30
    assert {name: entry["ended"] for name, entry in said.items()} == {
        "slow": "stopped after 2 s",
        "broken": "failed with 3",
        "good": "done",
    }
    table = run.table(tmp_path, chosen, said)
    assert table.count("| mixup, 1 of 2 epochs | top-1 50.00 %, published - |") == 3
    tests = run.read_tests(
        "tests/a.py::test_x[1] PASSED [ 1%]\ntests/a.py::test_y FAILED [ 2%]\ntests/a.py::test_z SKIPPED (no) [ 3%]\ntests/a.py::test_q "
    )
    assert tests == {"passed": 1, "failed": ["test_y"], "skipped": 1}


@pytest.mark.slow
def test_all_parts_run_on_the_cpu(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "benchmarks/device.sh"), "--device", "cpu", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {name: entry["ended"] for name, entry in summary.items()} == dict.fromkeys("abcdef", "done")
    assert {path.name for path in tmp_path.iterdir()} == {*(f"{name}.json" for name in "abcdef"), "summary.json"}
    tests = json.loads((tmp_path / "a.json").read_text())
    assert tests["passed"] >= 12
    assert tests["failed"] == []
    table = done.stdout.split("| part | what | measured |")[1]
    for text in (
        "copy",
        "vit_mini, 8x3x32x32, transmix",
        "automix",
        "MixupTrainer's share",
        "mixup, 1 of 1 epochs",
        "passed / failed / skipped",
    ):
        assert text in table, text
