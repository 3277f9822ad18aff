"""ResNet-18 on CIFAR-10 by the published recipe, shortened to what fits: several methods side by side on one device.

The published accuracy stands beside a run where the epochs agree. The figures are written after every epoch, so that a run that is
stopped keeps those it has.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from timing import parse, write

from hf_mixup.core.places import PUBLISHED, RECIPES, SCRIPTS
from hf_mixup.report.benchmark import accuracies, configure, published, published_value

args = parse(
    __doc__,
    rounds=1,
    dataset={"help": "folder of CIFAR-10's parquet files; the digits if not given"},
    epochs={"type": int, "default": 15},
    methods={"nargs": "+", "default": ["vanilla", "mixup", "cutmix", "automix"]},
)
RECIPE, ARCHITECTURE = "cifar10_basic", "ResNet-18"
ON_CPU = args.device == "cpu"
words = ["--recipe", RECIPE, "--eval_strategy", "epoch", "--save_strategy", "no", "--disable_tqdm", "True"]
words += ["--dataset_name", args.dataset or "digits"]
if args.quick or ON_CPU:
    args.methods, args.epochs = args.methods[:2], 1
    words += [
        "--architecture",
        "cifar_resnet20",
        "--max_train_samples",
        "100",
        "--max_eval_samples",
        "100",
        "--per_device_train_batch_size",
        "50",
    ]
else:
    words += ["--architecture", ARCHITECTURE, "--bf16", "True", "--channels_last", "True"]
words += ["--use_cpu"] if ON_CPU else []


def figures(folder: Path) -> list[dict]:
    rows = []
    for method in args.methods:
        try:
            reached = accuracies(folder / method)
        except ValueError:  # no epoch yet
            continue
        run = configure(RECIPE, RECIPES, [method], ARCHITECTURE, args.epochs)
        agree = args.dataset is not None and len(reached) == args.epochs
        value = published_value(published(PUBLISHED), run, RECIPES) if agree else None
        top1 = run.reported.of(reached)
        rows.append(
            {"method": method, "epochs": len(reached), "of_epochs": args.epochs, "top1": top1, "history": reached, "published": value}
        )
    return rows


with tempfile.TemporaryDirectory() as temporary:
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(args.methods)))}
    runs = {}
    for method in args.methods:
        own = ["--mix", method, "--num_train_epochs", str(args.epochs), "--output_dir", str(Path(temporary, method))]
        command = [sys.executable, str(SCRIPTS / "run_mixup.py"), *words, *own]
        runs[method] = subprocess.Popen(command, env=environment)
    while any(run.poll() is None for run in runs.values()):
        time.sleep(0.5)
        write(args, figures(Path(temporary)))
    write(args, figures(Path(temporary)))
failed = [method for method, run in runs.items() if run.returncode]
print(json.dumps({"failed": failed}))
sys.exit(1 if failed else 0)
