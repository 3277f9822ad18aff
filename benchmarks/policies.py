"""Milliseconds to plan and to blend a batch, for every method that needs images only: `python benchmarks/policies.py`."""

import argparse
import statistics
import time

import torch

from hf_mixup import METHODS, blend
from hf_mixup.policy import Signals
from hf_mixup.rng import keyed
from hf_mixup.steps import Standard

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--rounds", type=int, default=15)
parser.add_argument("--mode", default="sample", help="of the policies: sample, pair or batch")
parser.add_argument("--shapes", nargs="+", default=["128x3x32x32", "64x3x224x224"])
parser.add_argument("--device", default="cpu")
args = parser.parse_args()
torch.set_num_threads(args.threads)

methods = [m for m in METHODS.values() if isinstance(m.step, Standard) and not (m.sample.needs | m.label.needs) - {"images"}]
methods = [m.replaced(mode=args.mode) if hasattr(m.sample, "mode") else m for m in methods]


def now() -> float:
    if args.device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() * 1000


for text in args.shapes:
    images = torch.randn(*map(int, text.split("x")), device=args.device)
    signals = Signals(args.device, images=images)
    times = {method.name: ([], []) for method in methods}
    # methods take turns, so that what else the machine does falls on all alike; the first round warms up
    for turn in range(args.rounds + 1):
        for method in methods:
            start = now()
            plan = method.sample.plan(images.shape, keyed(turn), signals)
            planned = now()
            blend(plan, images)
            done = now()
            if turn:
                times[method.name][0].append(planned - start)
                times[method.name][1].append(done - planned)
    whole = {name: statistics.median(map(sum, zip(*pair, strict=True))) for name, pair in times.items()}
    print(f"\n{text}, {args.device}, {args.threads} threads, medians of {args.rounds} interleaved rounds, ms")
    print(f"{'method':14}{'plan':>9}{'blend':>9}{'both':>9}{'x cutmix':>10}")
    for name, (plan_ms, blend_ms) in times.items():
        medians = statistics.median(plan_ms), statistics.median(blend_ms), whole[name]
        print(f"{name:14}" + "".join(f"{ms:9.2f}" for ms in medians) + f"{whole[name] / whole['cutmix']:10.1f}")
