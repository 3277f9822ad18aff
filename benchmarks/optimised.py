"""What the optimised policies cost, from clean images and saliency to mixed images: `python benchmarks/optimised.py`.

PuzzleMix on a batch of 128 images of 32 x 32, and Co-Mixup on 40 parts of 20. The authors' codes cannot run beside ours (their
graph-cut library may not be used for every purpose), so their figures are recorded ones: one process on two CPU cores, without
the saliency pass, as ours.
"""

import argparse
import os
import statistics
import time

import torch

from hf_mixup import blend
from hf_mixup.geometry import pooled_evidence
from hf_mixup.policies import CoMixup, PuzzleMix
from hf_mixup.policies.comixup import compatibility, objective, peaks, solve_parts, unary
from hf_mixup.policy import SamplePolicy, Signals
from hf_mixup.rng import keyed, log_gamma_variate

RECORDED_PUZZLE_MS = {2: 22, 4: 50, 8: 109, 16: 3855}
RECORDED_PARTS_MS = 2488
# on 40 parts of 20 of other images; means
RECORDED_PARTS = {"energy": 136.3, "with threshold": -11.0, "images an output": 2.4, "unused images, %": 0.0}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--batch", type=int, default=128)
parser.add_argument("--size", type=int, default=32)
parser.add_argument("--parts", type=int, default=40)
parser.add_argument("--rounds", type=int, default=15)
parser.add_argument("--threads", type=int, default=torch.get_num_threads())
parser.add_argument("--device", default="cpu")
args = parser.parse_args()
torch.set_num_threads(args.threads)


def saliency_maps(number: int, seed: int) -> torch.Tensor:
    """(number, size, size): two bumps each, under noise."""
    rng, side = keyed(seed), args.size
    row, col = torch.arange(side)[:, None], torch.arange(side)
    total = torch.full((number, side, side), 0.02)
    for _ in range(2):
        centre = torch.rand(number, 2, generator=rng)[:, :, None, None] * side
        width = side * (0.1 + 0.1 * torch.rand(number, 1, 1, generator=rng))
        total += torch.exp(-((row - centre[:, 0]) ** 2 + (col - centre[:, 1]) ** 2) / (2 * width**2))
    return total * (0.5 + torch.rand(number, side, side, generator=rng))


def milliseconds(policy: SamplePolicy, images: torch.Tensor, signals: Signals) -> tuple[float, float]:
    """Median and least."""
    times = []
    for turn in range(args.rounds + 2):
        start = time.perf_counter()
        blend(policy.plan(images.shape, keyed(1, turn), signals), images)
        if args.device != "cpu":
            torch.accelerator.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:]), min(times[2:])


def load() -> str:
    return f"load {os.getloadavg()[0]:.1f}"


print(f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {load()}")
print(f"\nPuzzleMix, {args.batch} images of {args.size} x {args.size}: terms, mask, two transports, blend; ms")
print("blocks  median   least  authors (recorded, 128 of 32 x 32)")
images = torch.randn(args.batch, 3, args.size, args.size, device=args.device).clamp(-2, 2)
signals = Signals(args.device, images=images, saliency=saliency_maps(args.batch, 0).to(args.device))
for count, recorded in RECORDED_PUZZLE_MS.items():
    median, least = milliseconds(PuzzleMix(block_nums=(count,), std=(0.25,)), images, signals)
    print(f"{count:6d}{median:8.1f}{least:8.1f}{recorded:9d}      {load()}")

images_of_part = 20
number = args.parts * images_of_part
images = torch.randn(number, 3, args.size, args.size, device=args.device)
maps = saliency_maps(number, 1)
signals = Signals(args.device, images=images, saliency=maps.to(args.device))
print(f"\nCo-Mixup, {args.parts} parts of {images_of_part} images: plan and blend; ms")
median, least = milliseconds(CoMixup(), images, signals)
print(f"median {median:.0f}, least {least:.0f}; authors {RECORDED_PARTS_MS} (recorded, 40 parts, without the blend)      {load()}")

members = torch.arange(number).view(args.parts, images_of_part)
there, rng = members >= 0, keyed(3)
share = log_gamma_variate(2.0, tuple(members.shape), rng).softmax(1).float()
cost = unary(pooled_evidence(maps, (4, 4))[members], share, 0.05)
start = torch.randint(images_of_part, (*members.shape, 16), generator=rng)
shares = solve_parts(cost, compatibility(peaks(maps, 1)[members], there, 0.001), start, there, (4, 4))
used = shares.sum(2)
measured = {
    "energy": objective(shares, cost, (4, 4), 0.32, 1.0).mean(),
    "with threshold": objective(shares, cost, (4, 4), 0.32, 1.0, 0.83).mean(),
    "images an output": (used > 0).sum(2).float().mean(),
    "unused images, %": 100 * (used.sum(1) == 0).float().mean(),
}
for name, recorded in RECORDED_PARTS.items():
    print(f"{name:18s}{float(measured[name]):8.1f}   authors {recorded} (recorded, other images; sd of a part's energy about 17)")
