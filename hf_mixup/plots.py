"""Pictures of mixing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

# Okabe and Ito's colours, which the colour-blind can tell apart
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")

VISIBLE = 0.005  # shares of labels below it are not drawn


def gallery(path: str | Path, columns: list[dict], label_names: list[str]) -> None:
    """Draws mixed images under their sources, with bars of the mixed target; writes a PNG.

    Args:
        columns: one mixture each: `title`; `own`, `mixed` and, where there is one, `partner`, (3, H, W) in [0, 1]; `target` (num_labels,).
        label_names: of the classes.
    """
    from matplotlib.figure import Figure

    rows = [name for name in ("own", "partner", "mixed") if any(name in column for column in columns)]
    bars = max(int((column["target"] >= VISIBLE).sum().clamp(max=3)) for column in columns)
    figure = Figure(figsize=(1.35 * len(columns) + 0.6, 1.55 * len(rows) + 0.5 * bars), dpi=100, layout="constrained")
    heights = [1.0] * len(rows) + [0.28 * bars]
    axes = figure.subplots(len(rows) + 1, len(columns), squeeze=False, gridspec_kw={"height_ratios": heights})
    for column, mixture in enumerate(columns):
        for row, name in enumerate(rows):
            axis = axes[row, column]
            if name in mixture:
                axis.imshow(_pixels(mixture[name]), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            for side in axis.spines.values():
                side.set_visible(False)
            if column == 0:
                axis.set_ylabel(name, fontsize=11)
        axes[0, column].set_title(mixture["title"], fontsize=11)
        _bars(axes[-1, column], mixture["target"], label_names, bars)
    axes[-1, 0].set_ylabel("label", fontsize=11)
    figure.savefig(path)


def _bars(axis, target: Tensor, label_names: list[str], rows: int) -> None:
    """The classes of a mixed target, at most three, as horizontal bars with their names and shares."""
    shares, classes = target.topk(min(3, len(target)))
    shown = [(float(share), label_names[int(c)]) for share, c in zip(shares, classes, strict=True) if share >= VISIBLE]
    for place, (share, name) in enumerate(shown):
        axis.barh(-place, share, color=COLOURS[place], height=0.36)
        axis.text(0, -place - 0.24, f"{name[:12]}  {share:.2f}", fontsize=9, va="top")
    axis.set(xlim=(0, 1), ylim=(0.25 - rows, 0.35), xticks=[], yticks=[])
    for side in axis.spines.values():
        side.set_visible(False)


def _pixels(image: Tensor) -> np.ndarray:
    return image.detach().cpu().float().clamp(0, 1).permute(1, 2, 0).numpy()


def training_curve(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws loss and accuracy of a run's epochs, the rows of `train_log.jsonl`; writes a PNG.

    Accuracy in training is that of mixtures, so it may well lie under that of clean images.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), dpi=100, layout="constrained")
    panels = (
        ("loss", (("train_loss", "training, mixed"), ("eval_loss", "evaluation"))),
        ("accuracy", (("train_accuracy", "training, mixed"), ("eval_top1", "evaluation"))),
    )
    for axis, (title, lines) in zip(figure.subplots(1, 2), panels, strict=True):
        for colour, (key, label) in zip(COLOURS, lines, strict=False):
            points = [(row["epoch"], row[key]) for row in rows if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, label=label, marker="o", markersize=3)
        axis.set(xlabel="epoch", title=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.lines:
            axis.legend(frameon=False)
    figure.savefig(path)
