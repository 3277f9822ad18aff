"""Sounds, videos and label maps with mixing against without, on the small data sets of their scripts.

    python benchmarks/tasks.py --json tasks.json

Three seeds of each, from scratch. The table says what came out, better or not: means over seeds, and the CPU seconds of a run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from pathlib import Path
from types import ModuleType

from hf_mixup.core.places import SCRIPTS

TASKS = {
    "audio": ("eval_top1", ["vanilla", "mixup"]),
    "video": ("eval_top1", ["vanilla", "mixup"]),
    "segmentation": ("eval_mean_iou", ["vanilla", "cutmix"]),
}


def script(task: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(task, SCRIPTS / f"run_mixup_{task}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--json", type=Path, help="where to put the numbers")
    args = parser.parse_args()
    rows = []
    for task in args.tasks:
        measure, mixes = TASKS[task]
        run = script(task).main
        for mix in mixes:
            found, seconds = [], []
            for seed in range(args.seeds):
                with tempfile.TemporaryDirectory() as folder:
                    start = time.process_time()
                    words = [
                        "--output_dir",
                        f"{folder}/run",
                        "--seed",
                        seed,
                        "--mix",
                        *mix.split(),
                        "--num_train_epochs",
                        args.epochs,
                        "--use_cpu",
                    ]
                    words += ["--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "True"]
                    found.append(run(list(map(str, words)), "benchmark")[measure])
                    seconds.append(time.process_time() - start)
            rows.append({"task": task, "mix": mix, "measure": measure.removeprefix("eval_"), "values": found, "cpu_seconds": seconds})
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print("| task | mixing | measure | mean of seeds | single seeds | CPU seconds of a run |\n| --- | --- | --- | ---: | --- | ---: |")
    for row in rows:
        shown = " ".join(f"{100 * value:.1f}" for value in row["values"])
        mean, cost = 100 * statistics.mean(row["values"]), statistics.median(row["cpu_seconds"])
        print(f"| {row['task']} | {row['mix']} | {row['measure']} | {mean:.2f} | {shown} | {cost:.0f} |")


if __name__ == "__main__":
    main()
