"""Pictures. They are at most 9 inches wide, so that 9-point text is readable in a README. Colours work for colour-blind people."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from hf_mixup.core.checks import needed

# Okabe and Ito's colours, which colour-blind people can distinguish
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")

VISIBLE = 0.005  # shares of labels below it are not drawn

# one meaning in every picture: the own image, and measured networks, are blue; the partner is orange; what is compared with is grey
OWN, PARTNER = COLOURS[:2]
REFERENCE = "#555555"
KEY = "blue: own image, orange: partner"


def _figure(**settings: Any) -> Any:
    return needed("matplotlib.figure", "pictures").Figure(**settings)


# by the axes of an input: inches of width and height, and how many stand beside each other
CELLS = {3: (1.35, 1.55, 6), 4: (4.2, 0.0, 2), 2: (2.7, 1.7, 3), 1: (4.2, 1.0, 2)}
FRAMES = 8  # of a video, at most, are drawn


def gallery(path: str | Path, columns: list[dict], label_names: list[str], across: int | None = None) -> None:
    """Draws mixed images under their sources, with bars of the mixed target, `across` beside each other; writes a PNG.

    Videos (T, 3, H, W) are drawn as a row of frames, spectrograms (T, F) with time to the right and low frequencies at the bottom, waveforms (T,)
    as lines.

    Args:
        columns: one mixture each: `title`; `own`, `mixed` and, where there is one, `partner`, (3, H, W) in [0, 1], or of the shapes above;
            `target` (num_labels,); where wanted, `mask` (H, W), (T, H, W), (T, F) or (T,), the share of the own image, and `activation` (h, w), a
            class activation map of the mixed one; `own_class`, whose bar is blue as the own image is in the mask.
        label_names: of the classes.
        across: None for as many as fit.
    """
    wide, high, most = CELLS[columns[0]["own"].ndim]
    if columns[0]["own"].ndim == 4:
        frames, _, height, width = columns[0]["own"].shape
        high = max(wide * height / (width * min(frames, FRAMES)), 0.4) + 0.35
    rows = [name for name in ("own", "partner", "mask", "mixed", "activation") if any(name in column for column in columns)]
    bars = max(int((column["target"] >= VISIBLE).sum().clamp(1, 3)) for column in columns)
    across = min(across or most, len(columns))
    bands, tall = -(-len(columns) // across), len(rows) + 1
    figure = _figure(figsize=(wide * across + 0.6, bands * (high * len(rows) + 0.5 * bars)), dpi=100, layout="constrained")
    heights = [1.0] * len(rows) + [0.434 * bars / high]
    axes = figure.subplots(bands * tall, across, squeeze=False, gridspec_kw={"height_ratios": heights * bands})
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for place, mixture in enumerate(columns):
        band, column = divmod(place, across)
        cells = axes[band * tall : (band + 1) * tall, column]
        for axis, name in zip(cells, rows, strict=False):
            if name in mixture:
                _show(axis, mixture, name)
            if column == 0:
                axis.set_ylabel(name, fontsize=11)
        cells[0].set_title(mixture["title"], fontsize=11)
        _bars(cells[-1], mixture["target"], label_names, bars, mixture.get("own_class"))
        if column == 0:
            cells[-1].set_ylabel("label", fontsize=11)
    if "partner" in rows:
        figure.supxlabel(KEY if across > 1 else KEY.replace(", ", "\n"), fontsize=9)
    figure.savefig(path)


def masks_by_lam(path: str | Path, columns: Sequence[Mapping[str, Any]], lams: Sequence[float]) -> None:
    """Draws a mixer's masks and mixtures of pairs of images at several lam; writes a PNG.

    Args:
        columns: one pair each, two columns wide: `own`, `partner` (3, H, W) in [0, 1]; `masks` (L, H, W), the own image's share at
            each of the L `lams`; `mixed` (L, 3, H, W).
        lams: rising, 0 to 1.
    """
    figure = _figure(figsize=(2.7 * len(columns) + 0.6, 1.35 * (len(lams) + 1) + 0.25), dpi=100, layout="constrained")
    axes = figure.subplots(len(lams) + 1, 2 * len(columns), squeeze=False)
    for place, pair in enumerate(columns):
        left, right = axes[:, 2 * place], axes[:, 2 * place + 1]
        for axis, name in ((left[0], "own"), (right[0], "partner")):
            _show(axis, pair, name)
            axis.set_title(name, fontsize=11)
        for row in range(len(lams)):
            seen = {"mask": pair["masks"][row], "mixed": pair["mixed"][row]}
            for axis, name in ((left[row + 1], "mask"), (right[row + 1], "mixed")):
                _show(axis, seen, name)
            left[row + 1].set_title(f"own area {float(pair['masks'][row].mean()):.2f}", fontsize=9.5, pad=3)
    for row, lam in enumerate(lams):
        axes[row + 1, 0].set_ylabel(f"lam {lam:.2f}", fontsize=11)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.supxlabel(f"masks: {KEY}", fontsize=9)
    figure.savefig(path)


def mask_colours() -> Any:
    """A colour map from orange (partner) through grey to blue (own image)."""
    return needed("matplotlib.colors", "pictures").LinearSegmentedColormap.from_list("mask", [PARTNER, "#f2f2f2", OWN])


def _show(axis, mixture: dict, name: str) -> None:
    if mixture["mixed" if "mixed" in mixture else "own"].ndim < 3:
        _show_sound(axis, mixture, name)
    elif name == "mask":
        axis.imshow(_strip(mixture[name]), cmap=mask_colours(), vmin=0, vmax=1, interpolation="nearest")
    elif name == "activation":
        height, width = mixture["mixed"].shape[1:]
        axis.imshow(_pixels(mixture["mixed"]).mean(2), cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
        axis.imshow(mixture[name].numpy(), cmap="cividis", alpha=0.6, interpolation="bilinear", extent=(0, width, height, 0))
    elif mixture[name].ndim == 4:
        axis.imshow(_strip(_pixels(mixture[name])), interpolation="nearest")
    else:
        axis.imshow(_pixels(mixture[name]), interpolation="nearest")


def _strip(video: np.ndarray | Tensor) -> np.ndarray:
    """Frames (T, H, W, 3) beside each other, evenly chosen, with gaps that nothing is drawn in; an image as it is, and masks (T, H, W) too."""
    video = np.asarray(video)
    if video.ndim == 2:
        return video
    chosen = video[np.linspace(0, len(video) - 1, min(len(video), FRAMES)).round().astype(int)]
    gap = max(1, round(0.06 * chosen.shape[2]))
    empty = {3: np.nan, 4: 1.0}[chosen.ndim]  # masks: no colour; pixels: white
    padded = np.pad(chosen, [(0, 0), (0, 0), (0, gap), (0, 0)][: chosen.ndim], constant_values=empty)
    return np.concatenate(list(padded), 1)[:, :-gap]


def _show_sound(axis, mixture: dict, name: str) -> None:
    """A spectrogram with the low frequencies at the bottom, or a waveform; all of a mixture on one scale."""
    drawn = [mixture[part] for part in ("own", "partner", "mixed") if part in mixture]
    low, high = min(float(part.min()) for part in drawn), max(float(part.max()) for part in drawn)
    values = mixture[name].detach().cpu().float().numpy()
    if values.ndim == 2:
        colours = {"cmap": mask_colours(), "vmin": 0, "vmax": 1} if name == "mask" else {"cmap": "magma", "vmin": low, "vmax": high}
        axis.imshow(values.T, origin="lower", aspect="auto", interpolation="nearest", **colours)
        axis.spines[:].set_visible(True)
        top = values.shape[1] - 1
        axis.set_yticks([0, top / 2, top], ["low", "frequency", "high"], fontsize=8, rotation=90, va="center")
        axis.tick_params(axis="y", length=0)
        axis.set_xticks([0, values.shape[0] - 1], ["0", f"{values.shape[0]}"], fontsize=8)
        axis.set_xlabel("time (frames)", fontsize=8, labelpad=-8)
        return
    if name == "mask":
        axis.imshow(
            values[None], cmap=mask_colours(), vmin=0, vmax=1, interpolation="nearest", aspect="auto", extent=(0, len(values), 0, 1)
        )
        return
    axis.plot(values, color={"own": OWN, "partner": PARTNER}.get(name, "#444444"), linewidth=0.6)
    axis.set(xlim=(0, len(values)), ylim=(low, high))
    axis.set_xticks([0, len(values)], ["0", f"{len(values)}"], fontsize=8)
    axis.set_xlabel("time (samples)", fontsize=8, labelpad=-8)


def overview(path: str | Path, columns: Sequence[Mapping[str, Any]], label_names: Sequence[str], across: int = 6) -> None:
    """Draws one mixture of the same two images by every method, with a bar of the mixed label below it; writes a PNG, or a JPEG.

    Args:
        columns: as in `gallery`. The first column's two images, and its first two classes, are those of all.
    """
    from matplotlib.patches import Rectangle

    cells = [(label_names[0], columns[0]["own"], None)]
    cells += [(label_names[1], next(column["partner"] for column in columns if "partner" in column), None)]
    for column in columns:
        # except for vanilla, an unchanged image was mixed inside the network
        inside = column["title"] != "vanilla" and bool((column["mixed"] == column["own"]).all())
        cells.append((column["title"] + " (features)" * inside, column["mixed"], column["target"]))
    down = -(-len(cells) // across)
    figure = _figure(figsize=(9, 1.78 * down), dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.0, hspace=0.0)
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for place, (axis, (title, image, target)) in enumerate(zip(axes, cells, strict=False)):
        height, width = image.shape[1:]
        axis.imshow(_pixels(image), interpolation="lanczos")
        axis.set_title(title, fontsize=10, pad=3, fontweight="bold" if place < 2 else "normal", parse_math=False)
        shares = (
            [(0.0, 1.0, COLOURS[place])]
            if target is None
            else [(0.0, float(target[0]), COLOURS[0]), (float(target[0]), float(target[1]), COLOURS[1])]
        )
        whole = max(sum(share for _, share, _ in shares), 1.0)  # labels of several classes may sum to more than 1
        for start, share, colour in shares:
            axis.add_patch(
                Rectangle((start / whole * width, height * 1.03), share / whole * width, height * 0.07, color=colour, linewidth=0)
            )
        axis.set(xlim=(0, width), ylim=(height * 1.11, -0.5))
    # 256 colours take a third of the size
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    image = Image.open(stream).convert("RGB")
    if Path(path).suffix.lower() in (".jpg", ".jpeg"):
        image.save(path, quality=80, optimize=True)
    else:
        image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def _bars(axis, target: Tensor, label_names: list[str], rows: int, own: int | None = None) -> None:
    """The classes of a mixed target, at most three, as horizontal bars with their names and shares: the own one blue, the next orange; neither if it
    is unknown. A single number, as of a regression, is written without a bar."""
    shares, classes = target.topk(min(3, len(target)))
    shown = [(float(share), int(c)) for share, c in zip(shares, classes, strict=True) if share >= VISIBLE or len(target) == 1]
    others = iter(COLOURS[2:] if own is None else COLOURS[1:])
    for place, (share, number) in enumerate(shown):
        name = label_names[number]
        if len(target) > 1:
            axis.barh(-place, share, color=OWN if number == own else next(others), height=0.36)
        axis.text(0, -place - 0.24, f"{name[:12]}  {share:.2f}", fontsize=9, va="top", parse_math=False)
    axis.set(xlim=(0, 1), ylim=(0.25 - rows, 0.35), xticks=[], yticks=[])
    for side in axis.spines.values():
        side.set_visible(False)


def _pixels(image: Tensor) -> np.ndarray:
    return image.detach().cpu().float().clamp(0, 1).movedim(-3, -1).numpy()


def training_curve(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws loss and accuracy by epoch, from the rows of `train_log.jsonl`; writes a PNG.

    Accuracy in training is measured on mixtures, so it may be below that on clean images.
    """
    figure = _figure(figsize=(8, 3), dpi=100, layout="constrained")
    panels = (
        ("loss", (("train_loss", "training, mixed"), ("eval_loss", "evaluation"))),
        ("accuracy", (("train_accuracy", "training, mixed"), ("eval_top1", "evaluation"))),
    )
    for axis, (title, lines) in zip(figure.subplots(1, 2), panels, strict=True):
        for colour, (key, label) in zip((COLOURS[4], COLOURS[0]), lines, strict=True):
            points = [(row["epoch"], row[key]) for row in rows if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, label=label, marker="o", markersize=3)
        axis.set(xlabel="epoch", title=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.lines:
            axis.legend(frameon=False)
    figure.savefig(path)


def benchmark_chart(path: str | Path, table: Mapping[str, Mapping[str, tuple[float, float, int]]], label: str) -> None:
    """Draws `table[row][column]`, mean, deviation and number of runs, as points with error bars, one panel for each column; writes a PNG.

    Rows are sorted by their mean. A line marks the row `vanilla`, if there is one.
    """
    columns = list(dict.fromkeys(column for cells in table.values() for column in cells))
    rows = max(sum(column in cells for cells in table.values()) for column in columns)
    across = min(2, len(columns))
    down = -(-len(columns) // across)
    figure = _figure(figsize=(4.2 * across + 0.6, down * (0.26 * rows + 1.2)), dpi=100, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis in axes[len(columns) :]:
        axis.set_axis_off()
    for axis, column in zip(axes, columns, strict=False):
        found = sorted((cells[column], row) for row, cells in table.items() if column in cells)
        for place, ((mean, deviation, _), row) in enumerate(found):
            colour = REFERENCE if row == "vanilla" else COLOURS[0]
            axis.errorbar(mean, place, xerr=deviation, fmt="o", color=colour, capsize=2, markersize=4)
            if row == "vanilla":
                axis.axvline(mean, color=colour, linewidth=1, linestyle=":")
        axis.set_yticks(range(len(found)), [row for _, row in found])
        axis.set(xlabel=label, title=column, ylim=(-0.6, len(found) - 0.4))
        axis.margins(x=0.1)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.3)
    runs = sorted({number for cells in table.values() for _, _, number in cells.values()})
    count = f"mean ± deviation, n = {runs[0]}" + (f" to {runs[-1]}" if len(runs) > 1 else "") + " runs"
    grey = "; grey: vanilla" if "vanilla" in table else ""
    figure.supxlabel(("single runs, n = 1" if runs == [1] else count) + grey, fontsize=9)
    figure.savefig(path)


def reliability(path: str | Path, diagrams: Mapping[str, Any]) -> None:
    """Draws one reliability diagram for each kind of bins, above a histogram of the confidence; writes a PNG.

    Args:
        diagrams: by title, `count`, `accuracy`, `confidence` of the bins and the `error`, the mean gap.
    """
    figure = _figure(figsize=(4.4 * len(diagrams), 4.6), dpi=100, layout="constrained")
    axes = figure.subplots(2, len(diagrams), squeeze=False, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    for column, (title, bins) in enumerate(diagrams.items()):
        axis, histogram = axes[:, column]
        counts = np.asarray(bins["count"])
        accuracy, confidence = (np.asarray(bins[name])[counts > 0] for name in ("accuracy", "confidence"))
        axis.plot([0, 1], [0, 1], color=REFERENCE, linestyle="--", linewidth=1, label="perfectly calibrated")
        axis.vlines(confidence, confidence, accuracy, color=COLOURS[5], linewidth=3, label="gap")
        axis.plot(confidence, accuracy, "o-", color=COLOURS[0], markersize=5, linewidth=1.2, label="accuracy of the bin")
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.04), title=f"{title}: ECE {bins['error']:.3f}")
        histogram.vlines(confidence, 0, counts[counts > 0] / counts.sum(), color=COLOURS[0], linewidth=4)
        histogram.set(xlabel=f"confidence (n = {counts.sum():,} images)", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
        histogram.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("share of images")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=3)
    figure.savefig(path)


def corruption_bars(path: str | Path, accuracies: Mapping[str, Sequence[float]], clean: float, images: int | None = None) -> None:
    """Draws the top-1 accuracy under every corruption: a bar for the mean over severities, and a dot for each severity; writes a PNG.

    Args:
        accuracies: of each corruption by severity, 0 to 1.
        clean: accuracy on clean images, 0 to 1.
        images: number of images of each severity, if known.
    """
    names = list(accuracies)
    figure = _figure(figsize=(8.8, 0.27 * len(names) + 1.1), dpi=100, layout="constrained")
    axis = figure.subplots()
    for place, name in enumerate(names):
        values = np.asarray(accuracies[name])
        axis.barh(place, values.mean(), color=COLOURS[4], height=0.68)
        shades = np.linspace(0.65, 0, len(values))
        axis.scatter(values, np.full(len(values), place), c=[str(shade) for shade in shades], s=16, zorder=3, linewidths=0, clip_on=False)
        axis.text(1.02, place, f"{values.mean():.3f}", va="center", fontsize=9)
    axis.axvline(clean, color=REFERENCE, linewidth=1.5, linestyle="--")
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axis.set(
        xlim=(0, 1.0),
        ylim=(len(names) - 0.5, -0.5),
        xlabel="top-1 accuracy (bar: mean of severities; dots: severities, darker is stronger)",
    )
    axis.set_title(f"dashed: clean images, {clean:.3f}", fontsize=10, color=REFERENCE, loc="right")
    if images is not None:
        axis.set_title(f"n = {images:,} images", fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def occlusion_curve(path: str | Path, ratios: Sequence[float], accuracies: Sequence[float], chance: float, images: int) -> None:
    """Draws the top-1 accuracy over the share of hidden patches; writes a PNG.

    Args:
        ratios, accuracies: shares of hidden patches, and the accuracy at each, 0 to 1.
        chance: accuracy of a random guess, 0 to 1.
        images: number of images measured.
    """
    figure = _figure(figsize=(6, 3.6), dpi=100, layout="constrained")
    axis = figure.subplots()
    axis.plot([100 * ratio for ratio in ratios], accuracies, "o-", color=COLOURS[0], label=f"network (n = {images:,} images)")
    axis.axhline(chance, color=REFERENCE, linestyle="--", linewidth=1, label=f"chance, {chance:.3g}")
    axis.set(xlabel="patches hidden, %", ylabel="top-1 accuracy", ylim=(0, 1.03))
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
