"""Fixtures and options of all tests."""

import gc
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="folder of .npz files with inputs, drawn randomness and outputs of reference implementations",
    )
    parser.addoption("--fuzz-seed", type=int, help="of the slow test of test_fuzz.py, to see a failure of it again")


def pytest_collection_finish():
    """What was imported stays, a million objects. Every Trainer collects garbage, and every worker of a loader is forked: neither need look at them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
