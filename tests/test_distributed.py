"""Several processes: what they share, what they must not, and that they end together (fault rows 26 to 28)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_mixup import METHODS

SCRIPT = Path(__file__).parent / "scripts/two_processes.py"
LAUNCH = [
    Path(sys.executable).parent / "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip


def two_processes(folder, *words) -> tuple[dict, dict]:
    """What both processes saw of a training, by `scripts/two_processes.py`. A hang ends in TimeoutExpired."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([*LAUNCH, SCRIPT, folder, *words], timeout=240, check=False, env=environment, capture_output=True, text=True)
    # judged by the files: torch may abort at exit after all work is done
    paths = [folder / f"rank{rank}.json" for rank in range(2)]
    assert all(path.is_file() for path in paths), done.stderr[-3000:]
    return tuple(json.loads(path.read_text()) for path in paths)


@pytest.fixture(scope="module", params=["device", "collator"])
def seen(request, tmp_path_factory):
    """By mixup and cutmix, on the device and in the collator: 37 images in batches of 4 on either process."""
    return request.param, *two_processes(tmp_path_factory.mktemp("two"), request.param)


def test_row_26_processes_draw_for_themselves(seen):
    _, one, two = seen
    assert one["lams"] != two["lams"]
    unmixed = {(1.0,) * 4}  # pairs of one class
    assert not ({*map(tuple, one["lams"])} & {*map(tuple, two["lams"])}) - unmixed


def test_row_27_processes_choose_alike(seen):
    collation, one, two = seen
    assert one["methods"] == two["methods"]
    assert collation == "collator" or set(one["methods"]) == {"mixup", "cutmix"}
    assert one["checksum"] == pytest.approx(two["checksum"], abs=1e-9)


def test_row_28_uneven_last_batch_does_not_hang(seen):
    _, one, two = seen
    assert one["steps"] == two["steps"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method(tmp_path, name):
    """Both processes end with the same weights, at an uneven end too."""
    one, two = two_processes(tmp_path, "device", name)
    assert one["steps"] == two["steps"] == 5
    assert one["methods"] == two["methods"] == [name] * 5
    assert one["checksum"] == pytest.approx(two["checksum"], abs=1e-9)
    if name not in ("vanilla", "attentivemix"):  # of the four cells of its feature map, attentivemix nearly always takes one
        assert one["lams"] != two["lams"]
