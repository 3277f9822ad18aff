"""All benchmarks, one after the other: `python benchmarks/run.py [--device cuda]`.

Benchmarks that compare with an older commit of ours check it out into a temporary folder, so that both are timed in one run.

All figures go to one file, `benchmarks/results/<device>.json`. The chart of the documentation is drawn from it. Each benchmark also runs alone, with
more options: `python benchmarks/collation.py --help`.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from chart import draw

HERE = Path(__file__).parent
BEFORE = "bed633f"  # our last commit that did not keep images as bytes up to the device
COMPARED = ("collation", "mixing", "pipeline")
PARTS = ["collation", "mixing", "steps", "methods", "epochs", "pipeline", "trainer", "labels", "learned", "optimised", "pretraining"]

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--device", default="cpu")
parser.add_argument("--threads", type=int, default=1, help="number of threads of torch on the CPU")
parser.add_argument("--rounds", type=int, help="rounds of each benchmark, instead of its own number")
parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="run only these; the figures of the others stay in the file")
parser.add_argument("--quick", action="store_true", help="short runs on small data, to see that they work")
parser.add_argument("--output", default=str(HERE / "results"), help="folder for the figures")
parser.add_argument("--chart", default=str(HERE.parent / "docs/speed.png"), help="file of the chart of collation and steps")
args = parser.parse_args()


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[str | None]:
    """A temporary folder with that commit; None without a repository, or without the commit."""
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(HERE.parent), "worktree"]
        made = subprocess.run([*git, "add", "--detach", "--quiet", f"{folder}/hf_mixup", commit], capture_output=True, text=True)
        if made.returncode:
            print(f"without {commit}, which cannot be checked out: {made.stderr.strip()}")
        try:
            yield None if made.returncode else f"{folder}/hf_mixup"
        finally:
            if not made.returncode:
                subprocess.run([*git, "remove", "--force", f"{folder}/hf_mixup"], check=True)


common = ["--device", args.device, "--threads", str(args.threads), *(["--rounds", str(args.rounds)] if args.rounds else [])]
path, figures = None, {}
with checkout(BEFORE) as older:
    for part in args.only:
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder, "figures.json")
            command = [sys.executable, str(HERE / f"{part}.py"), *common, *["--quick"] * args.quick, "--json", str(written)]
            subprocess.run([*command, *(["--before", older] if older and part in COMPARED else [])], check=True)
            found = json.loads(written.read_text()) | ({"before": BEFORE} if older and part in COMPARED else {})
        # after each benchmark, so that a failure loses nothing
        path = Path(args.output, f"{found['device'].lower().replace(' ', '-')}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        figures = {**(json.loads(path.read_text()) if path.is_file() else {}), part: found}
        path.write_text(json.dumps(figures, indent=1) + "\n")
print(f"\n{path}")
if "collation" in figures and "steps" in figures:
    draw(args.chart, figures)
    print(args.chart)
