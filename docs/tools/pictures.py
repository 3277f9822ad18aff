"""The pictures of the README and the site. `python docs/tools/pictures.py` draws those that are committed; the site draws one for each method.

One meaning for colours everywhere: blue is the own image (`lam`), orange its partner (`1 - lam`). Masks go from orange to blue.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))

import facts
from hf_mixup import METHODS, MixPlan, blend, get_method
from hf_mixup.core.geometry import box_plan, dense_pair
from hf_mixup.core.plan import Boxes, Share
from hf_mixup.core.policy import OF_THE_BATCH
from hf_mixup.core.rng import keyed
from hf_mixup.data.processor import ImageFormat
from hf_mixup.networks.backbones import from_scratch
from hf_mixup.policies.fmix import brightest, published_field
from hf_mixup.policies.gmix import own_share as gmix_share
from hf_mixup.policies.hmix import own_share as hmix_share
from hf_mixup.policies.resizemix import paste_resized
from hf_mixup.report.examples import pairs_of_every_method
from hf_mixup.report.plots import COLOURS, OWN, PARTNER, mask_colours, overview

PICTURES = Path(__file__).parents[1] / "pictures"
GREEN = COLOURS[2]
NAMES = ("cat", "coffee")


def photographs(size: int) -> Tensor:
    """(2, 3, size, size) in [0, 1]: the cat and the cup of coffee. Both photographs are CC0, from scikit-image."""
    pixels = []
    for name in NAMES:
        image = Image.open(PICTURES / f"{name}.jpg").resize((size, size), Image.Resampling.LANCZOS)
        pixels.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1) / 255)
    return torch.stack(pixels)


def _shown(axis: Any, image: Tensor, title: str, target: Sequence[float] | None = None, bold: bool = False) -> None:
    """An image with its name above it, and under it the shares of its label."""
    height, width = image.shape[1:]
    axis.imshow(image.detach().clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="lanczos")
    axis.set_title(title, fontsize=11, fontweight="bold" if bold else "normal", pad=4, parse_math=False)
    axis.set(xticks=[], yticks=[])  # not set_axis_off, which leaves the title out of the layout
    axis.spines[:].set_visible(False)
    if target is not None:
        start = 0.0
        for share, colour in zip(target, (OWN, PARTNER), strict=False):
            axis.add_patch(Rectangle((start * width, height * 1.03), share * width, height * 0.07, color=colour, linewidth=0))
            start += share
        told = "\n".join(f"{name} {share:.2f}" for name, share in zip(NAMES, target, strict=False) if share >= 0.005)
        axis.text(width / 2, height * 1.14, told, fontsize=9.5, ha="center", va="top", linespacing=1.25)
        axis.set(xlim=(0, width), ylim=(height * 1.42, -0.5))


def _saved(figure: Figure, path: Path, colours: int = 256) -> None:
    """As a PNG of few colours, a third of the size, or as a JPEG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    image = Image.open(stream).convert("RGB")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jpg":
        image.save(path, quality=86, optimize=True)
    else:
        image.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)


@cache
def network(architecture: str, size: int) -> PreTrainedModel:
    """A small network that separates cat and coffee, trained on pieces of the two photographs, for methods that look at a network."""
    torch.manual_seed(0)
    made = from_scratch(architecture, 2, size).train()
    optimizer = torch.optim.AdamW(made.parameters(), 1e-3)
    form, pixels, rng = ImageFormat(size), photographs(2 * size), keyed(4)
    mean, std = (torch.tensor(values)[:, None, None] for values in (form.mean, form.std))
    for _ in range(40):
        corners = torch.randint(size, (8, 2), generator=rng).tolist()
        pieces = torch.stack([pixels[row % 2, :, top : top + size, left : left + size] for row, (top, left) in enumerate(corners)])
        loss = torch.nn.functional.cross_entropy(made((pieces - mean) / std).logits, torch.arange(8) % 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return made


def pair_of(name: str) -> dict[str, Any]:
    """The two photographs mixed by a method, as a column of `report.plots`, with the mask if there is one plan."""
    size = 64  # small, or this would take minutes
    architecture = "vit_mini" if "transformers" in facts.runs_in(METHODS[name]) else "cifar_resnet20"
    form = ImageFormat(size)
    pixels = (photographs(size) - torch.tensor(form.mean)[:, None, None]) / torch.tensor(form.std)[:, None, None]
    wanted = METHODS[name].sample.needs | METHODS[name].label.needs
    seen = network(architecture, size) if wanted - OF_THE_BATCH else None
    return pairs_of_every_method(pixels, form, 1, [name], seen, masks=True)[0]


def of_method(name: str, path: Path) -> dict[str, Any]:
    """Draws a method on the two photographs; returns what was drawn."""
    column = pair_of(name)
    cells = [(NAMES[0], column["own"], [1.0]), (NAMES[1], column.get("partner", photographs(column["own"].shape[1])[1]), [0.0, 1.0])]
    figure = Figure(figsize=(9, 2.75), dpi=100, layout="constrained")
    axes = figure.subplots(1, 4)
    for axis, (title, image, target) in zip(axes, cells, strict=False):
        _shown(axis, image, title, target, bold=True)
    if "mask" in column and not (column["target"][0] < 0.95 and torch.equal(column["mixed"], column["own"])):
        height, width = column["mask"].shape
        axes[2].imshow(column["mask"].numpy(), cmap=mask_colours(), vmin=0, vmax=1, interpolation="nearest")
        axes[2].set_title("mask", fontsize=11, pad=4)
        axes[2].text(width / 2, height * 1.14, "blue: cat\norange: coffee", fontsize=9.5, ha="center", va="top", linespacing=1.25)
        axes[2].set(xlim=(0, width), ylim=(height * 1.42, -0.5))
    else:
        axes[2].text(0.5, 0.6, "mixed inside\nthe network" if "mask" in column else "no mask", ha="center", va="center", fontsize=11)
    axes[2].set(xticks=[], yticks=[])
    axes[2].spines[:].set_visible(False)
    _shown(axes[3], column["mixed"], "mixture", column["target"].tolist()[:2], bold=True)
    _saved(figure, path)
    return column


def first() -> None:
    """The README's picture: two photographs, and their mixtures by methods that need only images."""
    pixels = photographs(224)
    labels = torch.arange(2)
    names = ("mixup", "cutmix", "fmix", "resizemix")
    figure = Figure(figsize=(9, 2.3), dpi=130, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, wspace=0.0)
    axes = figure.subplots(1, 2 + len(names))
    for place, axis in enumerate(axes[:2]):
        _shown(axis, pixels[place], NAMES[place], [float(place == 0), float(place == 1)], bold=True)
    for axis, name in zip(axes[2:], names, strict=True):
        # a draw in which both images are visible, and that is typical of the method
        wanted = {"resizemix": 0.72}.get(name, 0.55)
        draws = (get_method(name)(pixels, labels, 2, keyed(step)) for step in range(80))
        mixed, targets = min(draws, key=lambda made, share=wanted: abs(float(made[1][0, 0]) - share))
        _shown(axis, mixed[0], name, targets[0].tolist())
    _saved(figure, PICTURES / "first.jpg")


def beta() -> None:
    """The density of lam for several alpha, and what a lam looks like."""
    figure = Figure(figsize=(9, 3.4), dpi=100, layout="constrained")
    axes = figure.subplots(1, 4, sharey=True)
    lam = torch.linspace(0.002, 0.998, 500)
    for axis, alpha in zip(axes, (0.2, 0.8, 1.0, 2.0), strict=True):
        density = torch.distributions.Beta(alpha, alpha).log_prob(lam).exp()
        axis.fill_between(lam, density, color="#56B4E9", alpha=0.5, linewidth=0)
        axis.plot(lam, density, color=OWN)
        axis.set(title=f"alpha = {alpha:g}", xlabel="lam: share of the own image", ylim=(0, 3), xlim=(0, 1), xticks=[0, 0.5, 1])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("how often (density)")
    _saved(figure, PICTURES / "beta.png", 64)


def faded() -> None:
    """One pair of images at several lam, by mixup and by cutmix."""
    pixels = photographs(128)
    lams = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1)
    figure = Figure(figsize=(9, 3.5), dpi=100, layout="constrained")
    axes = figure.subplots(2, len(lams))
    for row, name in enumerate(("mixup", "cutmix")):
        for axis, lam in zip(axes[row], lams, strict=True):
            _shown(axis, blend(_plan(name, lam, 128), pixels)[0], f"{name}, lam {lam:g}")
    _saved(figure, PICTURES / "lam.png")


def _plan(name: str, lam: float, size: int) -> MixPlan:
    """The plan of two images by a method at a lam, with all other draws fixed."""
    partner, share = torch.tensor([1, 0]), torch.tensor([lam, lam], dtype=torch.float64)
    if name == "mixup":
        return MixPlan.pair(partner, Share(torch.stack([share, 1 - share], 1).float()), share)
    if name in ("cutmix", "hmix", "resizemix"):
        side = round(size * ((1 - lam) * (0.5 if name == "hmix" else 1.0)) ** 0.5)
        top, left = int((size - side) * 0.7), int((size - side) * 0.35)
        edges = torch.tensor([[top, top + side, left, left + side]] * 2)
        if name == "resizemix":
            step = torch.full((2, 2), size / max(side, 1), dtype=torch.float32)
            return paste_resized(photographs(size), partner, edges, step, "bilinear")
        if name == "hmix":
            return MixPlan.pair(partner, dense_pair(hmix_share(Boxes(edges, (size, size)), share), torch.arange(2)), share)
        return box_plan(partner, edges, (size, size))
    if name == "gmix":
        spot = gmix_share(share, torch.tensor([[size * 0.55, size * 0.45]] * 2), (size, size))
        return MixPlan.pair(partner, dense_pair(spot, torch.arange(2)), spot.double().mean((1, 2)))
    field = published_field(torch.randn(1, 2, size // 2 + 1, 2, generator=keyed(6)), (size, size), 3.0)
    own = brightest(field, share[:1], torch.tensor([True]), 0.0)
    return MixPlan.pair(partner, dense_pair(own, torch.zeros(2, dtype=torch.int64)), share)


def animation() -> None:
    """The same pair by six methods while lam goes from 1 to 0 and back, as a moving WebP, which is smaller than a GIF."""
    size, names = 96, ("mixup", "cutmix", "resizemix", "fmix", "hmix", "gmix")
    pixels = photographs(size)
    steps = [i / 10 for i in range(10, -1, -1)]
    frames = []
    for lam in steps + steps[-2:0:-1]:
        figure = Figure(figsize=(4.2, 4.0), dpi=100, layout="constrained")
        for axis, name in zip(figure.subplots(2, 3).flatten(), names, strict=True):
            plan = _plan(name, lam, size)
            _shown(axis, blend(plan, pixels)[0], name, plan.weight[0].tolist())
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
        frames.append(Image.open(stream).convert("RGB"))
    frames[0].save(PICTURES / "lam.webp", save_all=True, append_images=frames[1:], duration=160, loop=0, quality=80, method=6)


def walk() -> None:
    """One batch from the file to the loss, with its shapes."""
    steps = (
        ("image file", "JPEG, 640 x 480", "data/pixels.py"),
        ("augmented image", "(3, 224, 224)", "data/dataset.py"),
        ("batch", "images (B, 3, 224, 224)\nlabels (B,)", "data/collator.py"),
        ("MixPlan", "partners (B, 1)\nmask (B, 2, H, W)\nlam (B,)", "policies/"),
        ("mixed batch", "images (B, 3, 224, 224)\ntargets (B, classes)", "core/plan.py"),
        ("logits", "(B, classes)", "the network"),
        ("loss", "one number", "core/losses.py"),
    )
    figure = Figure(figsize=(9, 4.1), dpi=100)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 4), ylim=(0, 2))
    axis.set_axis_off()
    places = [(0.5 + i, 1.5) for i in range(4)] + [(3.5 - i, 0.5) for i in range(3)]
    for (x, y), (name, shape, where) in zip(places, steps, strict=True):
        ours = name in ("MixPlan", "mixed batch")
        axis.add_patch(
            FancyBboxPatch(
                (x - 0.4, y - 0.3),
                0.8,
                0.6,
                boxstyle="round,pad=0.01",
                facecolor="#e3f0f8" if ours else "#f4f4f4",
                edgecolor=OWN if ours else "#888888",
            )
        )
        axis.text(x, y + 0.2, name, ha="center", va="center", fontsize=11, fontweight="bold")
        axis.text(x, y - 0.02, shape, ha="center", va="center", fontsize=9.5, linespacing=1.35)
        axis.text(x, y - 0.24, where, ha="center", va="center", fontsize=9, color="#666666", family="monospace")
    for start, end in pairwise(places):
        if start[1] == end[1]:
            step = 0.41 if end[0] > start[0] else -0.41
            ends = (start[0] + step, start[1]), (end[0] - step, end[1])
        else:
            ends = (start[0], start[1] - 0.31), (end[0], end[1] + 0.31)
        axis.add_patch(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=14, color="#444444", shrinkA=0, shrinkB=0))
    axis.text(0.5, 0.5, "blue: what hf_mixup adds\nto usual training", ha="center", va="center", fontsize=9.5, color=OWN)
    _saved(figure, PICTURES / "walk.png", 64)


def gains() -> None:
    """Cost and gain of methods in one published table: CIFAR-10, ResNet-18, 200 epochs."""
    where = ("cifar10", "ResNet-18", 200)
    figure = Figure(figsize=(8, 4.6), dpi=100, layout="constrained")
    axis = figure.subplots()
    shown = []
    for name in METHODS:
        known = facts.cost(name) or facts.whole_run(name)
        settings = {(row["dataset"], row["backbone"], int(row["epochs"])) for row in facts.published_of(name)}
        if name != "vanilla" and known is not None and where in settings:
            plain, mixed, _ = facts.gain(name, *where)
            shown.append((mixed - plain, known[0], name, facts.cost(name) is not None))
    below = float("-inf")
    for points, time, name, measured in sorted(shown):
        axis.plot(time, points, "o", color=GREEN, markerfacecolor=GREEN if measured else "white")
        crowded = time < 1.1  # there names are on the left, and overlapping names move up
        below = max(points, below + 0.055) if crowded else below
        place = {"xytext": (-8, -3), "ha": "right"} if crowded else {"xytext": (7, -3)}
        axis.annotate(name, (time, below if crowded else points), textcoords="offset points", fontsize=9, **place)
    axis.set(
        xlabel="time of a training step, without mixing = 1", ylabel="gain in points of top-1 accuracy", xlim=(0.6, 3.5), ylim=(0, None)
    )
    axis.set_title("CIFAR-10, ResNet-18, 200 epochs (published); filled: step measured, hollow: whole run on digits", fontsize=10)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    _saved(figure, PICTURES / "gains.png", 64)


def every() -> None:
    """The two photographs by every method; `hf-mixup visualize --all` does the same for others."""
    overview(PICTURES.parent / "methods.jpg", [pair_of(name) | {"title": name} for name in METHODS if name != "vanilla"], NAMES)


def main(names: Sequence[str]) -> None:
    drawers = {draw.__name__: draw for draw in (first, beta, faded, animation, walk, gains, every)}
    for name in names or drawers:
        drawers[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
