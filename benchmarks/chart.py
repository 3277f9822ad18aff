"""The chart of speed in the documentation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hf_mixup.report.plots import COLOURS

OURS, OTHERS, BASE = COLOURS[0], COLOURS[1], "#999999"


def draw(path: str | Path, figures: Mapping[str, Any]) -> None:
    """Draws medians and quartiles: collating and mixing beside torch.stack, one panel for each size; training steps beside no mixing."""
    about = figures["collation"]
    panels = [(size, "collating and mixing, ms", "ms", rows) for size, rows in about["figures"]["batches"].items()]
    panels += [(title, "step / step without mixing", "ratio", rows) for title, rows in figures["steps"]["figures"].items()]
    wanted = ("torch.stack", "ours mixup", "ours cutmix", "timm", "torchvision", "kornia")
    names = [name for name in panels[0][3] if name.startswith(wanted)]
    figure = Figure(figsize=(9, 4.4), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, label, key, rows) in zip(axes, panels, strict=True):
        for place, name in enumerate(names):
            if name not in rows:
                continue
            low, median, high = rows[name][key]
            colour = OURS if name.startswith("ours") else BASE if name == "torch.stack" else OTHERS
            axis.barh(place, median, color=colour, height=0.7)
            axis.errorbar(median, place, xerr=[[median - low], [high - median]], color="black", capsize=2, linewidth=1)
            axis.annotate(f"{median:.3g}", (high, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
        most = max(rows[name][key][2] for name in names if name in rows)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(label, fontsize=9)
        axis.set(ylim=(len(names) - 0.4, -0.6), xlim=(0, 1.25 * most))
        axis.set_yticks(range(len(names)), names, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{about['device']}, {about['threads']} thread(s), torch {about['torch']}; medians and quartiles", fontsize=9)
    figure.savefig(path)
