"""Runs the parts of `benchmarks/device.sh` in order of worth, each in a process of its own and within its time.

A part that fails or runs out of time costs the others nothing: its figures so far are in its JSON file, and the next one begins.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pack import IMAGES, PACKAGES, ROOT, pack, unpack

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Part:
    """What is measured.

    Attributes:
        share: of the whole time; what one part leaves over, the later ones get.
        command: of the JSON file to write; what is in it counts, however the command ended.
        rows: of the table, from what is in the file.
    """

    title: str
    share: float
    command: Callable[[Path], list[str]]
    rows: Callable[[dict[str, Any]], list[tuple[str, str]]]


def python(*words: object) -> list[str]:
    return [sys.executable, *map(str, words)]


def parts(args: argparse.Namespace, images: Path | None) -> dict[str, Part]:
    common = ["--device", args.device, *(["--quick"] if args.quick else [])]
    tests = [
        "-m",
        "pytest",
        "-v",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-m",
        "gpu",
        "tests/test_gpu.py",
        *(["-k", "plans or plain"] if args.quick else []),
    ]
    data = [] if images is None else ["--dataset", images]
    steps = HERE / "steps.py"
    return {
        "a": Part("tests on the device", 0.24, lambda path: python(*tests), of_tests),
        "b": Part("mixing", 0.12, lambda path: python("benchmarks/mixing.py", *common, "--json", path), of_mixing),
        "c": Part("training steps", 0.24, lambda path: python(steps, *common, "--json", path), of_steps),
        "d": Part(
            "training steps, learned", 0.12, lambda path: python(steps, *common, "--methods", "automix", "samix", "adautomix", "--json", path), of_steps
        ),
        "e": Part(
            "loader and trainer", 0.1, lambda path: python("benchmarks/pipeline.py", *common, "--workers", 0 if args.quick else 4, *data, "--json", path), of_pipeline
        ),
        "f": Part("training on CIFAR-10", 0.18, lambda path: python(HERE / "cifar.py", *common, *data, "--json", path), of_training),
    }  # fmt: skip


# -- rows of the table ------------------------------------------------------------------------------------------------------


def of_tests(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("passed / failed / skipped", f"{found['passed']} / {len(found['failed'])} / {found['skipped']}")]
    return rows + [("failed", name) for name in found["failed"]]


def of_mixing(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (f"{size}, {name}", f"{row['ms'][1]:.3f} ms, {row['ratio'][1]:.2f} x copy" + (f", {row['bandwidth']:.0%} of its bandwidth" if "bandwidth" in row else ""))
        for size, rows in found["figures"].items()
        for name, row in rows.items()
    ]  # fmt: skip


def of_steps(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for title, methods in found["figures"].items():
        for name, row in methods.items():
            told = (
                row["error"].split(",")[0]
                if "error" in row
                else f"{row['ms'][1]:.1f} ms, {row['ratio'][1]:.2f} x vanilla"
                + (f", {row['peak_mb']:.0f} MB" if row.get("peak_mb") is not None else "")
            )
            rows.append((f"{title}, {name}", told))
    return rows


def of_pipeline(found: dict[str, Any]) -> list[tuple[str, str]]:
    figures = found["figures"]
    rows = [(name, f"{row['images_per_second']:.0f} images/s") for kind in ("loading", "steps") for name, row in figures[kind].items()]
    return [*rows, ("MixupTrainer's share of the bare step", f"{figures['share_of_the_bare_step']:.1%}")]


def of_training(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (
            f"{row['method']}, {row['epochs']} of {row['of_epochs']} epochs",
            f"top-1 {100 * row['top1']:.2f} %, published {row['published'] or '-'}",
        )
        for row in found["figures"]
    ]


def read_tests(log: str) -> dict[str, Any]:
    """What pytest said of each test so far."""
    said = dict(re.findall(r"::(\S+) (PASSED|FAILED|ERROR|SKIPPED)", log))
    ends = list(said.values())
    failed = [name for name, end in said.items() if end in ("FAILED", "ERROR")]
    return {"passed": ends.count("PASSED"), "failed": failed, "skipped": ends.count("SKIPPED")}


# -- running ----------------------------------------------------------------------------------------------------------------


def run_part(part: Part, path: Path, seconds: float, environment: dict[str, str], log: Any) -> dict[str, Any]:
    """How a part ended, and in how many seconds. Its process, and all that it began, are gone afterwards."""
    start = time.monotonic()
    process = subprocess.Popen(part.command(path), cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        ended = "done" if process.wait(seconds) == 0 else f"failed with {process.returncode}"
    except subprocess.TimeoutExpired:
        ended = f"stopped after {seconds:.0f} s"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if part.rows is of_tests:
        path.write_text(json.dumps(read_tests(Path(log.name).read_text()), indent=1) + "\n")
    return {"ended": ended, "seconds": round(time.monotonic() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small and few, to see that it runs")
    parser.add_argument("--out", default="runs/device", help="folder of the JSON files")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--only", nargs="+", choices=list("abcdef"), help="some of the parts")
    parser.add_argument(
        "--pack", metavar="FOLDER", help="fill benchmarks/carried, with CIFAR-10 from this folder of parquet files, and measure nothing"
    )
    args = parser.parse_args()
    if args.pack:
        pack(Path(args.pack))
        return 0
    out = Path(args.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    paths = [str(ROOT), str(HERE), *([str(PACKAGES)] if PACKAGES.is_dir() else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_MIXUP_DEVICE": args.device,
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    summary: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        images = None
        if IMAGES.is_file() and not args.quick:
            images = Path(temporary, "cifar10")
            images.mkdir()
            unpack(IMAGES, images)
        chosen = {name: part for name, part in parts(args, images).items() if name in (args.only or "abcdef")}
        left = sum(part.share for part in chosen.values())
        for name, part in chosen.items():
            path, seconds = out / f"{name}.json", (deadline - time.monotonic()) * part.share / left
            left -= part.share
            path.unlink(missing_ok=True)
            log_path = Path(temporary, f"{name}.log")
            with open(log_path, "w") as log:
                summary[name] = {"title": part.title, **run_part(part, path, max(seconds, 1.0), environment, log)}
            print(f"{name} {part.title}: {summary[name]['ended']}, {summary[name]['seconds']} s", flush=True)
            if summary[name]["ended"] != "done":
                print(log_path.read_text()[-3000:], flush=True)
            (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"\n{table(out, chosen, summary)}")
    return int(any(entry["ended"] != "done" for entry in summary.values()))


def table(out: Path, chosen: dict[str, Part], summary: dict[str, Any]) -> str:
    """Markdown of all parts, those that did not end well included."""
    lines = ["| part | what | measured |", "| --- | --- | --- |"]
    for name, part in chosen.items():
        path = out / f"{name}.json"
        lines.append(f"| {name} | {part.title} | {summary[name]['ended']}, {summary[name]['seconds']} s |")
        found = json.loads(path.read_text()) if path.is_file() else None
        if found is not None:
            if "device" in found:
                lines.append(f"| {name} | device | {found['device']}, torch {found['torch']} |")
            lines += [f"| {name} | {what} | {value} |" for what, value in part.rows(found)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
