"""Our formulas on the inputs and random draws of the reference implementations: one test for each file of `--golden-dir`.

The checks are in `golden_*.py`. The beginning of the file's name chooses the check; a file without a check fails.
"""

import numpy as np
import torch

import golden_evidence
import golden_handcrafted
import golden_label
import golden_learnable
import golden_newer
import golden_optimised

CHECKS = {
    **golden_evidence.CHECKS,
    **golden_handcrafted.CHECKS,
    **golden_label.CHECKS,
    **golden_learnable.CHECKS,
    **golden_newer.CHECKS,
    **golden_optimised.CHECKS,
}


def pytest_generate_tests(metafunc):
    folder = metafunc.config.getoption("--golden-dir")
    files = sorted(folder.glob("*.npz"))
    assert files, f"{folder} holds no .npz file"
    metafunc.parametrize("file", files, ids=lambda file: file.stem)


def test_golden(file):
    names = [name for name in CHECKS if file.stem.startswith(name)]
    assert names, f"no check knows {file.name}"
    with np.load(file, allow_pickle=False) as arrays:
        case = {key: torch.from_numpy(arrays[key]) if arrays[key].dtype.kind in "biuf" else arrays[key] for key in arrays.files}
    CHECKS[max(names, key=len)](case)
