"""What MkDocs is given beside the files in docs/: a page and a picture for each method, the reference, and files of the repository."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

import facts
import pictures

from hf_mixup.method import Method
from hf_mixup.methods import METHODS

ROOT = facts.ROOT
CACHE = ROOT / "build/docs-pictures"

# pages of the reference: what they hold, by module
REFERENCE = {
    "methods": ("Methods", {"hf_mixup.method": ["Method"], "hf_mixup.methods": ["MethodChoice", "get_method"]}),
    "collator": ("Collator, loss, callback", {"hf_mixup.data.collator": ["MixupCollator", "MixupLoss", "MixupCallback"]}),
    "trainer": (
        "Trainer and model",
        {
            "hf_mixup.training.trainer": ["MixupTrainer"],
            "hf_mixup.arguments": ["MixupTrainingArguments", "DataArguments"],
            "hf_mixup.model": ["MixupModel", "MixupOutput"],
        },
    ),
    "plan": ("Plans", {"hf_mixup.core.plan": ["MixPlan", "Share", "Boxes", "Dense", "blend", "mix_targets"]}),
    "parts": (
        "To write a method",
        {
            "hf_mixup.core.policy": ["SamplePolicy", "LabelPolicy", "Signals"],
            "hf_mixup.steps.step": ["Step", "StepOutput", "MethodState"],
            "hf_mixup.core.rng": ["MixKey", "keyed", "partners", "beta"],
        },
    ),
    "losses": ("Losses", {"hf_mixup.core.losses": ["CrossEntropy", "BCE", "Focal", "Decoupled", "MSE"]}),
    "pretraining": (
        "Pre-training",
        {
            "hf_mixup.pretraining.trainer": ["MixupPreTrainer"],
            "hf_mixup.pretraining.model": ["PreTrainingModel"],
            "hf_mixup.pretraining.arguments": ["PreTrainingArguments"],
        },
    ),
}


def on_files(files: Files, config: Any) -> Files:
    drawn = _drawn()
    for name, method in METHODS.items():
        files.append(File.generated(config, f"methods/{name}.md", content=method_page(method, drawn[name])))
        files.append(File.generated(config, f"methods/{name}.png", abs_src_path=str(CACHE / f"{name}.png")))
    for page, (title, modules) in REFERENCE.items():
        lines = [f"# {title}", ""]
        lines += [f"::: {module}.{thing}\n" for module, things in modules.items() for thing in things]
        files.append(File.generated(config, f"reference/{page}.md", content="\n".join(lines)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    if page.file.src_uri == "methods.md":  # names in the catalogue become links
        markdown = re.sub(r"^\| `(\w+)` \|", r"| [\1](methods/\1.md) |", markdown, flags=re.M)
    return markdown


def _drawn() -> dict[str, dict[str, Any]]:
    """What the pages need to know of the pictures, which are drawn again when the code of the package changes."""
    code = hashlib.sha256()
    for path in [*sorted((ROOT / "hf_mixup").rglob("*.py")), Path(pictures.__file__)]:
        code.update(path.read_bytes())
    known = CACHE / "facts.json"
    if known.is_file():
        found = json.loads(known.read_text())
        if found["code"] == code.hexdigest() and all((CACHE / f"{name}.png").is_file() for name in METHODS):
            return found["methods"]
    methods = {}
    for name in METHODS:
        column = pictures.of_method(name, CACHE / f"{name}.png")
        inside = bool(column["target"][0] < 0.95 and (column["mixed"] == column["own"]).all())
        methods[name] = {"share": float(column["target"][0]), "inside": inside, "mask": "mask" in column}
    known.write_text(json.dumps({"code": code.hexdigest(), "methods": methods}))
    return methods


def method_page(method: Method, drawn: dict[str, Any]) -> str:
    """A page in Markdown."""
    name = method.name
    lines = [f"# {name}", "", facts.sentence(method), "", f"![A cat, a cup of coffee, and their mixture by {name}]({name}.png)", ""]
    learns = facts.runs_in(method).startswith("`MixupTrainer`")
    if name != "vanilla":
        lines += [
            "The label of this mixture is "
            + f"{drawn['share']:.2f} cat, and the rest coffee."
            + (" The network that the method looks at is untrained here; a trained one gives other masks and labels." if learns else ""),
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
    lines += ["## Facts", "", "| | |", "| --- | --- |"]
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
    cited = facts.bibtex(name)
    if cited:
        lines += ["## Cite", "", "```bibtex", cited.strip(), "```", ""]
    return "\n".join(lines)


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
    return ["## Settings of published tables", "", "The recipes that have a setting of their own for this method.", "",
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
    header = ["| data set | network | epochs | name there | alpha | top-1, % | against no mixing |", "| --- | --- | --- | --- | --- | --- | --- |"]
    told = "Of others, not measured here. The file `model_cards/published_results.csv` names the source of each row."
    return ["## Published numbers", "", told, "", *header, *rows, ""]


def _safe(text: str) -> str:
    """Docstrings are plain text: what Markdown would take for emphasis or a tag is escaped outside of code."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if piece.startswith("`") else re.sub(r"([*_<>\[\]])", r"\\\1", piece) for piece in pieces)


def _cell(text: str) -> str:
    return _safe(text).replace("|", "\\|")
