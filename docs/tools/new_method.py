"""Makes the files of a new method: `make new-method NAME=checkermix`, or `python docs/tools/new_method.py checkermix`.

The new method works at once and passes the laws: the left part of an image comes from the own image, the right part from the partner, and the
column between them is random. Then change it into your method. CONTRIBUTING.md lists what else to do.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

POLICY = '''"""{title}."""

from dataclasses import dataclass

import torch

from hf_mixup.core.checks import check_mode, check_positive
from hf_mixup.core.geometry import box_plan
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import beta, partners


@dataclass(frozen=True)
class {title}(SamplePolicy):
    """{title}: the partner fills the image from a column on.

    The own image keeps a share `lam ~ Beta(alpha, alpha)` of the columns. The label's weight is the area that is kept.

    Args:
        alpha: both parameters of the Beta, above 0.
        mode: `sample` draws a column for every image, `pair` for every two that are swapped, `batch` once.
    """

    alpha: float = 1.0
    mode: str = "sample"

    def __post_init__(self):
        check_positive(alpha=self.alpha)
        check_mode(self.mode)

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        height, width = shape[2:]
        pairing = partners(shape[0], self.mode, rng)
        column = (beta(self.alpha, pairing.draws, rng) * width).round().long()
        # (draws, 4): top, bottom, left, right of what the partner fills
        edges = torch.stack([torch.zeros_like(column), torch.full_like(column, height), column, torch.full_like(column, width)], 1)
        return box_plan(pairing.partner, pairing.spread(edges), (height, width))
'''


def changed(path: Path, *changes: tuple[str, str]) -> None:
    """Inserts each text before the match of its pattern, which must exist."""
    text = path.read_text()
    for pattern, added in changes:
        place = re.search(pattern, text, re.M)
        assert place is not None, (path, pattern)
        text = text[: place.start()] + added + text[place.start() :]
    path.write_text(text)


def first_after(lines: list[str], name: str) -> str | None:
    """The first of sorted names that comes after this one."""
    return next((line for line in lines if line.lower() > name.lower()), None)


def make(name: str, title: str, root: Path) -> list[str]:
    """Writes the files, and returns the paths that were made or changed. Raises ValueError for an invalid or used name."""
    if not re.fullmatch(r"[a-z][a-z0-9]*", name):
        raise ValueError(f"NAME must be lower-case letters and digits, got {name!r}; choose one such as checkermix.")
    policy, rooms = root / f"hf_mixup/policies/{name}.py", root / "hf_mixup/policies/__init__.py"
    catalogue, papers = root / "hf_mixup/methods.py", root / "hf_mixup/report/templates/papers.json"
    if policy.exists() or f'Method("{name}"' in catalogue.read_text():
        raise ValueError(f"NAME must be new, got {name!r}, which exists already; choose another.")
    policy.write_text(POLICY.format(title=title))

    imported = re.findall(r"^from hf_mixup\.policies\.(\w+) import", rooms.read_text(), re.M)
    after = first_after(imported, name)
    exported = re.findall(r'^    "(\w+)",$', rooms.read_text(), re.M)
    following = next((other for other in exported if not other.isupper() and other > title), None)  # capitals come first
    changed(
        rooms,
        (rf"^from hf_mixup\.policies\.{after} import" if after else r"^\n__all__", f"from hf_mixup.policies.{name} import {title}\n"),
        (rf'^    "{following}",$' if following else r"^\]", f'    "{title}",\n'),
    )
    several = re.search(r"from hf_mixup\.policies import \(\n(.*?)\)", catalogue.read_text(), re.S)
    assert several is not None
    names = re.findall(r"^    (\w+),$", several.group(1), re.M)
    after = first_after([other for other in names if not other.isupper()], title)
    changed(
        catalogue,
        (rf"^    {after},$" if after else r"^\)\nfrom hf_mixup\.steps", f"    {title},\n"),
        (r"^    \)\n\}", f'        Method("{name}", {title}()),\n'),
    )
    known = json.loads(papers.read_text()) | {name: ["Authors", title, "", 2026]}
    papers.write_text("{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in known.items()) + "\n}\n")
    with open(root / "docs/tools/plain.yaml", "a") as file:
        file.write(f"{name}: Fills an image from a column on with another image.\n")
    return [str(path.relative_to(root)) for path in (policy, rooms, catalogue, papers, root / "docs/tools/plain.yaml")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="lower-case letters and digits, such as checkermix")
    parser.add_argument("--title", help="name of the class. Default: the name with a capital letter")
    args = parser.parse_args()
    root = Path(__file__).parents[2]
    try:
        made = make(args.name, args.title or args.name.capitalize(), root)
    except ValueError as error:
        parser.error(str(error))
    print("made or changed:", *made, sep="\n  ")
    print("next: make docs-tables; pytest tests/test_laws.py -k", args.name)


if __name__ == "__main__":
    main()
