"""The command `hf-mixup`."""

from __future__ import annotations

import importlib.util
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from hf_mixup import __version__
from hf_mixup.cli.refusals import run
from hf_mixup.core.places import SCRIPTS

# commands by their scripts; (script, description)
SCRIPT_OF = {
    "train": ("run_mixup", "train an image classifier with mixing"),
    "pretrain": ("run_pretraining", "pre-train a network without labels, with mixing"),
    "evaluate": ("run_evaluation", "measure calibration and robustness of a checkpoint"),
    "benchmark": ("run_benchmark", "train methods x networks x seeds, and make tables"),
    "visualize": ("visualize_mixup", "draw mixtures of images"),
    "convert": ("convert_openmixup", "convert a checkpoint of OpenMixup"),
}
HELP = ("-h", "--help", "--help-all", "--help_all")
OTHERS = {"methods": "list the mixing methods", "env": "show versions, for bug reports"}
LAUNCHED = ("train", "pretrain", "evaluate")  # commands that can use several processes
PACKAGES = (
    "torch", "torchvision", "transformers", "accelerate", "huggingface-hub", "datasets", "timm", "safetensors", "evaluate", "scikit-learn",
    "matplotlib", "numpy", "pillow",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in (*HELP, "help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"hf_mixup {__version__}")
        return 0
    if argv is None and any(word in HELP for word in rest):
        # this process shows a text and ends, and transformers would import peft, which takes longer than all else
        sys.modules.setdefault("peft", None)  # type: ignore[arg-type]
    return run(lambda words, prog: command(name, words), rest, "hf-mixup")


def usage() -> str:
    commands = {name: text for name, (_, text) in SCRIPT_OF.items()} | OTHERS
    lines = [f"  {name:<10} {text}" for name, text in commands.items()]
    return "\n".join(
        [
            "usage: hf-mixup COMMAND [...]",
            "",
            "Mixup methods for training image classifiers with Hugging Face.",
            "",
            "commands:",
            *lines,
            "",
            "hf-mixup COMMAND --help shows the arguments of a command. Arguments of",
            "accelerate launch pass through: hf-mixup train --num_processes 2.",
        ]
    )


def command(name: str, argv: list[str]) -> None:
    """Runs a command. Raises ValueError for an unknown one."""
    if name in OTHERS:
        if argv:
            raise ValueError(f"hf-mixup {name} takes no arguments, got {argv[0]!r}; leave it out.")
        print({"methods": methods, "env": environment}[name]())
    elif name in LAUNCHED:
        from hf_mixup.cli.launch import launch_or_run

        launch_or_run(name, script, argv)
    elif name in SCRIPT_OF:
        script(name).main(argv, f"hf-mixup {name}")
    else:
        from difflib import get_close_matches

        known = [*SCRIPT_OF, *OTHERS]
        close = get_close_matches(name, known, n=1)
        advice = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(known)}."
        raise ValueError(f"the command must be a known one, got {name!r}; {advice}")


def script(name: str) -> ModuleType:
    """The module of a command's script, which is in training_scripts in a checkout."""
    file = SCRIPT_OF[name][0]
    module = f"hf_mixup.scripts.{file}"
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, SCRIPTS / f"{file}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    return sys.modules[module]


def methods() -> str:
    """The table of methods: parts, needs and paper of each."""
    from hf_mixup.report.card import methods_rows

    rows = [("method", "parts", "needs", "paper"), *methods_rows()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def environment() -> str:
    """Versions and devices, one line each."""
    lines = {"hf_mixup": __version__, "Python": platform.python_version(), "platform": platform.platform(terse=True)}
    for name in PACKAGES:
        try:
            lines[name] = version(name)
        except PackageNotFoundError:
            lines[name] = "not installed"
    try:
        import torch

        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        count = torch.accelerator.device_count() if device is not None else 0
        lines["devices"] = f"{count} x {device.type}" if device is not None else "CPU only"
    except ImportError:
        lines["devices"] = "unknown without torch"
    return "\n".join(f"{name:<16} {value}" for name, value in lines.items())
