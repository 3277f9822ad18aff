"""The page of a method in Markdown: from its row, its docstrings, and the files of measurements."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import facts
from hf_mixup.core.policy import OF_THE_BATCH
from hf_mixup.method import Method
from hf_mixup.report.card import bibtex


def method_page(method: Method, drawn: dict[str, Any]) -> str:
    """A page in Markdown."""
    name = method.name
    lines = [f"# {name}", "", facts.sentence(method), "", f"![A cat, a cup of coffee, and their mixture by {name}]({name}.png)", ""]
    if name != "vanilla":
        lines += [
            f"The label of this mixture is {drawn['share']:.2f} cat, and the rest coffee.{_network(method)}",
            "",
            "## Use it",
            "",
            *_usage(method),
            "",
            "## Formula",
            "",
            *_formula(method, drawn),
            "",
        ]
    lines += ["## Facts", "", "| fact | |", "| --- | --- |"]
    lines += [f"| runs in | {facts.runs_in(method)} |", f"| time of a training step, without mixing = 1 | {facts.cost_text(name)} |"]
    if method.paper:
        lines.append(f"| paper | [arXiv:{method.paper}](https://arxiv.org/abs/{method.paper}) |")
    lines.append("")
    for kind, part in facts.parts(method).items():
        lines += [f"## `{type(part).__name__}`: {facts.KINDS[kind]}", ""]
        lines += [line for paragraph in facts.prose(part) for line in (_safe(paragraph), "")]
        found = facts.arguments(part)
        if found:
            lines += ["| parameter | default here | |", "| --- | --- | --- |"]
            lines += [f"| `{name_}` | `{default}` | {_cell(told)} |" for name_, default, told in found]
            lines.append("")
        clauses = facts.deviations(part)
        if clauses:
            lines += ["Where this differs from the authors' or OpenMixup's code:", ""]
            lines += [f"{number}. {_safe(clause)}" for number, clause in enumerate(clauses, 1)]
            lines.append("")
    lines += _settings(name) + _results(name)
    cited = bibtex(name)
    if cited:
        lines += ["## Cite", "", "```bibtex", cited.strip(), "```", ""]
    return "\n".join(lines)


def _network(method: Method) -> str:
    """Which network the method looked at for the picture."""
    if (method.sample.needs | method.label.needs) - OF_THE_BATCH:
        return " The network that the method looks at was trained for a few seconds, on pieces of these two photographs."
    if hasattr(method.step, "mixer"):
        return " The mask network is untrained here, so its mask is grey. [A notebook](../notebooks/automix_masks.ipynb) trains one."
    return "" if facts.runs_in(method).startswith("any loop") else " The network is untrained here; a trained one gives other mixtures."


def _usage(method: Method) -> list[str]:
    lines = ["```bash", f"hf-mixup train --mix {method.name} --train_dir photos/train --validation_dir photos/validation", "```", ""]
    if facts.runs_in(method).startswith("any"):
        return [
            *lines,
            "```python",
            "from hf_mixup import get_method",
            "",
            f'images, targets = get_method("{method.name}")(images, labels, num_labels=10)',
            "```",
        ]
    return [
        *lines,
        "```python",
        "from hf_mixup import MixupTrainer, MixupTrainingArguments",
        "",
        f'args = MixupTrainingArguments("runs/{method.name}", mix="{method.name}")',
        "trainer = MixupTrainer(model, args, train_dataset=train, eval_dataset=test)",
        "```",
    ]


def _formula(method: Method, drawn: dict[str, Any]) -> list[str]:
    pixels = "features of the images inside the network" if drawn["inside"] else "images"
    mask = "m_k: the share of each in every pixel, as drawn above" if drawn["mask"] else "m_k: the share of each in every pixel"
    weights = type(method.label).__name__
    labels = "w_k: the share of the label" + ("" if weights == "AreaLabels" else f", by {weights}")
    return [
        "```text",
        "mixture = sum over k of m_k * x_k",
        "target  = sum over k of w_k * y_k",
        "```",
        "",
        f"- `x_k`: the {pixels}; k = 1 is the own image, the others are its partners in the batch.",
        f"- `{mask.replace(':', '`:', 1)}. The shares of a pixel add up to 1.",
        f"- `{labels.replace(':', '`:', 1)}.",
    ]


def _settings(name: str) -> list[str]:
    rows = []
    for recipe, by_method in facts.settings():
        for key, values in by_method.items():
            if key.split("+")[-1] == name:
                rows.append(f"| `{recipe}` | `{key}` | {_cell(_words(values))} |")
    if not rows:
        return []
    return ["## Settings of published tables", "", "These recipes have special settings for this method.", "",
            "| recipe | methods | arguments |", "| --- | --- | --- |", *rows, ""]  # fmt: skip


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in values.items())


def _results(name: str) -> list[str]:
    rows = []
    for row in facts.published_of(name):
        plain = facts.plain_of(row)
        gained = "" if plain is None else f"{float(row['top1']) - plain:+.2f}"
        rows.append(
            f"| {row['dataset']} | {row['backbone']} | {row['epochs']} | {row['method']} | {row['alpha'].replace(',', ', ')} | {row['top1']} | {gained} |"
        )
    if not rows:
        return ["## Published numbers", "", "None in the tables that we have.", ""]
    header = [
        "| data set | network | epochs | name there | alpha | top-1, % | gain over no mixing |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    told = "These numbers were published by others, and not measured here. The file `model_cards/published_results.csv` names the source of each row."
    return ["## Published numbers", "", told, "", *header, *rows, ""]


def _safe(text: str) -> str:
    """Docstrings are plain text: outside of code, characters that mean emphasis or a tag in Markdown are escaped."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if piece.startswith("`") else re.sub(r"([*_<>\[\]])", r"\\\1", piece) for piece in pieces)


def _cell(text: str) -> str:
    return _safe(text).replace("|", "\\|")
