"""A small data set of texts: the docstrings of Python's standard library, with their package as class."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

import numpy as np

PACKAGES = ("asyncio", "concurrent", "ctypes", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "urllib", "xml")
LEAST = 5  # words


def docstrings(seed: int = 0, packages: tuple[str, ...] = PACKAGES) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Texts and their classes, which are indices of `packages`: two thirds for training, the rest for evaluation. No text is in both.

    They come from the Python that runs, so other versions of Python give slightly different texts.
    """
    found: dict[str, int] = {}
    for number, package in enumerate(packages):
        for path in sorted(Path(sysconfig.get_path("stdlib"), package).rglob("*.py")):
            if {"test", "tests"}.isdisjoint(path.parts):
                for text in _of_file(path):
                    found.setdefault(text, number)
    rows = list(found.items())
    order = np.random.default_rng(seed).permutation(len(rows))
    cut = len(rows) * 2 // 3
    return [rows[row] for row in order[:cut]], [rows[row] for row in order[cut:]]


def _of_file(path: Path) -> list[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, documented))
    texts = (" ".join((ast.get_docstring(node) or "").split()) for node in nodes)
    return [text for text in texts if len(text.split()) >= LEAST]
