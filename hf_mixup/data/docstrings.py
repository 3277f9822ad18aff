"""A small data set of texts, made from what every Python has: the docstrings of its standard library, and which package they are of."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

import numpy as np

PACKAGES = ("asyncio", "concurrent", "ctypes", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "urllib", "xml")
LEAST = 5  # words


def docstrings(seed: int = 0, packages: tuple[str, ...] = PACKAGES) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Texts and their classes, numbers of `packages`: two thirds to train on, and the rest to evaluate on. No text is in both.

    They are those of the Python that runs, so another version has a few others.
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
