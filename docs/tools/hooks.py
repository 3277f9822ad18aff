"""Adds to MkDocs: a page and a picture for each method, the API reference, and files of the repository."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

import pictures
from facts import ROOT
from hf_mixup.methods import METHODS
from pages import method_page

CACHE = ROOT / "build/docs-pictures"

# pages of the reference: their modules and names
REFERENCE = {
    "methods": ("Methods", {"hf_mixup.method": ["Method"], "hf_mixup.methods": ["MethodChoice", "get_method"]}),
    "collator": (
        "Collator, loss, callback",
        {"hf_mixup.data.collator": ["MixupCollator"], "hf_mixup.data.loss": ["MixupLoss"], "hf_mixup.data.callback": ["MixupCallback"]},
    ),
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
        "Write a method",
        {
            "hf_mixup.core.policy": ["SamplePolicy", "LabelPolicy", "Signals"],
            "hf_mixup.steps.step": ["Step", "StepOutput", "MethodState"],
            "hf_mixup.core.rng": ["MixKey", "keyed", "partners", "beta"],
            "hf_mixup.mixers.mixblock": ["MixBlock"],
            "hf_mixup.mixers.adaptive_mask": ["AdaptiveMask"],
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
    if page.parent is None:  # a menu at the left would hold this page alone; without it, code and tables have more room
        page.meta.setdefault("hide", []).append("navigation")
    if page.file.src_uri == "faq.md":  # newcomers search for words of their questions
        page.meta["search"] = {"boost": 2}
    if page.file.src_uri == "methods.md":  # names in the catalogue become links
        markdown = re.sub(r"^\| `(\w+)` \|", r"| [\1](methods/\1.md) |", markdown, flags=re.M)
    return markdown


def _drawn() -> dict[str, dict[str, Any]]:
    """Facts of the methods' pictures for their pages. The pictures are drawn again if the code of the package has changed."""
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
