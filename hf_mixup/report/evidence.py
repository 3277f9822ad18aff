"""Further results of a sweep: differences to training without mixing, paired by seed, and the ranking of methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from hf_mixup.report.benchmark import TABLE_METHODS, Summary
from hf_mixup.report.plots import benchmark_chart

BASE = "vanilla"
# name in a cell: (title of the column, factor of its numbers, digits shown)
MEASURES: dict[str, tuple[str, float, int]] = {
    "top1": ("top-1 (%)", 100.0, 2),
    "nll": ("log-likelihood loss", 1.0, 3),
    "ece": ("ECE (%)", 100.0, 1),
    "corruption_error": ("corruption error (%)", 100.0, 1),
}
SPENT = {"cpu": ("cpu_seconds_per_step", "CPU seconds of a step"), "accelerator": ("seconds_per_step", "seconds of a step")}
# measures of one network, by method and seed
Measured = Mapping[str, Mapping[int, Mapping[str, Any]]]


@dataclass(frozen=True)
class Ranking:
    """Spearman's rank correlation of the methods' measured and published accuracies, and the number of methods that have both."""

    rho: float
    methods: int


def summary(cells: Mapping[int, Mapping[str, Any]], name: str) -> Summary:
    """The values of a measure, over the seeds that have it."""
    return Summary(tuple(MEASURES[name][1] * cell[name] for cell in cells.values() if name in cell))


def paired(found: Measured, method: str, name: str) -> Summary:
    """The difference of a measure to vanilla with the same seed, over the seeds that both have.

    A seed sets the images and the first weights for all methods. So differences vary less than accuracies do.
    """
    base, own = found.get(BASE, {}), found[method]
    both = [seed for seed in own if seed in base and name in own[seed] and name in base[seed]]
    return Summary(tuple(MEASURES[name][1] * (own[seed][name] - base[seed][name]) for seed in both))


def ranking(found: Measured, rows: Iterable[Mapping[str, str]], table: Mapping[str, Any]) -> Ranking | None:
    """How well the ranking by mean accuracy agrees with that of a published table; None for fewer than three methods.

    Args:
        table: `dataset`, `setting`, `backbone`, `epochs` of the published rows.
    """
    printed = {
        "+".join(TABLE_METHODS[row["method"]]): float(row["top1"])
        for row in rows
        if row["method"] in TABLE_METHODS and all(row[key] == str(value) for key, value in table.items())
    }
    both = [method for method in found if method in printed]
    if len(both) < 3:
        return None
    ours = [summary(found[method], "top1").mean for method in both]
    return Ranking(float(spearmanr(ours, [printed[method] for method in both]).statistic), len(both))


def evidence_table(found: Measured) -> str:
    """A Markdown table with one row for each method, in the given order: accuracies, then paired differences to vanilla."""
    devices = {cell["machine"]["device"] for cells in found.values() for cell in cells.values()}
    spent, spent_title = SPENT["cpu" if devices == {"cpu"} else "accelerator"]
    titles = ["method", "runs", MEASURES["top1"][0], "difference", MEASURES["nll"][0], "difference"]
    lines = [f"| {' | '.join([*titles, *(MEASURES[name][0] for name in ('ece', 'corruption_error')), spent_title])} |"]
    lines.append("|" + " --- |" * (len(titles) + 3))
    for method, cells in found.items():
        row = [method, str(len(cells))]
        for name in ("top1", "nll"):
            row += [_mean(summary(cells, name), name), "" if method == BASE else _difference(paired(found, method, name), name)]
        row += [_mean(summary(cells, name), name) for name in ("ece", "corruption_error")]
        row.append(f"{min(cell[spent] for cell in cells.values()):.3f}")  # the minimum, because other load adds to it
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _mean(values: Summary, name: str) -> str:
    return f"{values.mean:.{MEASURES[name][2]}f}"


def _difference(values: Summary, name: str) -> str:
    if not values.values:
        return "-"
    digits = MEASURES[name][2]
    spread = "" if values.deviation is None else f" ± {values.deviation:.{digits}f}"
    return f"{values.mean:+.{digits}f}{spread} ({len(values.values)})"


def evidence(networks: Mapping[str, Measured], rows: Sequence[Mapping[str, str]], order: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables of all networks, with the rank correlation to the published order in `order`."""
    parts = []
    for network, found in networks.items():
        parts.append(f"{network}:\n\n{evidence_table(found)}" if len(networks) > 1 else evidence_table(found))
        table = order.get(network)
        if table is not None:
            agreement, where = ranking(found, rows, table), ", ".join(f"{value}" for value in table.values())
            if agreement is not None:
                parts.append(
                    f"Spearman's rank correlation of the mean top-1 of {network} to the published order ({where}): "
                    f"{agreement.rho:+.2f}, n = {agreement.methods} methods."
                )
    return "\n\n".join(parts)


def evidence_chart(path: str | Path, networks: Mapping[str, Measured]) -> None:
    """Draws the paired differences of accuracy and negative log-likelihood to vanilla, with their deviations; writes a PNG."""
    panels: dict[str, dict[str, tuple[float, float, int]]] = {}
    for network, found in networks.items():
        for method in found:
            for name, title in (("top1", "top-1, points"), ("nll", "log-likelihood loss")):
                differences = paired(found, method, name)
                if differences.values:
                    panels.setdefault(method, {})[f"{network}: {title}"] = (
                        differences.mean,
                        differences.deviation or 0.0,
                        len(differences.values),
                    )
    if panels:
        benchmark_chart(path, panels, "difference to vanilla of the same seed")
