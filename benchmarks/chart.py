"""The chart of the README."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hf_mixup.plots import COLOURS

OURS, OTHERS, BASE = COLOURS[0], COLOURS[1], "#999999"


def draw(path: str | Path, figures: Mapping[str, Any]) -> None:
    """Bars of medians with quartiles: collation and mixing beside torch.stack, one panel for every size, and steps beside no mixing."""
    about = figures["collation"]
    panels = [(f"collate + mix {size}", "ms", rows) for size, rows in about["figures"].items()]
    panels += [
        (f"training step, {title.split(',')[0]}", "times the step without mixing", rows)
        for title, rows in figures["steps"]["figures"].items()
    ]
    figure = Figure(figsize=(9, 3.9), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (title, label, rows) in zip(axes, panels, strict=True):
        key = "ms" if label == "ms" else "ratio"
        wanted = ("torch.stack", "ours mixup", "ours cutmix", "timm", "torchvision", "kornia")
        shown = [(name, row[key]) for name, row in rows.items() if name.startswith(wanted)]
        for place, (name, (low, median, high)) in enumerate(shown):
            colour = OURS if name.startswith("ours") else BASE if name == "torch.stack" else OTHERS
            axis.barh(place, median, color=colour, height=0.7)
            axis.errorbar(median, place, xerr=[[median - low], [high - median]], color="black", capsize=2, linewidth=1)
            axis.annotate(f"{median:.3g}", (high, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set(title=title, xlabel=label, ylim=(len(shown) - 0.4, -0.6), xlim=(0, 1.25 * max(high for _, (_, _, high) in shown)))
        axis.set_yticks(range(len(shown)), [name for name, _ in shown] if axis is axes[0] else [], fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{about['device']}, {about['threads']} thread(s), torch {about['torch']}; medians and quartiles", fontsize=9)
    figure.savefig(path)
