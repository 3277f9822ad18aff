"""The cost of the policies that solve an optimisation, from images and saliency to mixed images: `python benchmarks/optimised.py`.

PuzzleMix mixes a batch of 128 images of 32 x 32 pixels, Co-Mixup 40 parts of 20 images. The authors' code is not run here, because the licence of its
graph-cut library does not allow every use. Its times were recorded earlier: one process on two CPU cores, without the saliency pass, like ours.
"""

import torch
from timing import interleaved, parse, show, write

from hf_mixup import blend
from hf_mixup.core.geometry import pooled_evidence
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import keyed, log_gamma_variate
from hf_mixup.policies import CoMixup, PuzzleMix
from hf_mixup.policies.comixup import compatibility, objective, peaks, solve_parts, unary

RECORDED_MS = {"PuzzleMix, 2": 22, "PuzzleMix, 4": 50, "PuzzleMix, 8": 109, "PuzzleMix, 16": 3855, "Co-Mixup": 2488}
# on 40 parts of 20 of other images; means
RECORDED_PARTS = {"energy": 136.3, "with threshold": -11.0, "images an output": 2.4, "unused images, %": 0.0}
IMAGES_OF_PART = 20

args = parse(__doc__, rounds=15, batch={"type": int, "default": 128}, size={"type": int, "default": 32}, parts={"type": int, "default": 40})
if args.quick:
    args.batch, args.parts = 8, 2


def saliency_maps(number: int, seed: int) -> torch.Tensor:
    """(number, size, size): two bumps in each, plus noise."""
    rng, side = keyed(seed), args.size
    row, col = torch.arange(side)[:, None], torch.arange(side)
    total = torch.full((number, side, side), 0.02)
    for _ in range(2):
        centre = torch.rand(number, 2, generator=rng)[:, :, None, None] * side
        width = side * (0.1 + 0.1 * torch.rand(number, 1, 1, generator=rng))
        total += torch.exp(-((row - centre[:, 0]) ** 2 + (col - centre[:, 1]) ** 2) / (2 * width**2))
    return total * (0.5 + torch.rand(number, side, side, generator=rng))


def contender(policy: SamplePolicy, number: int, seed: int):
    images = torch.randn(number, 3, args.size, args.size, device=args.device).clamp(-2, 2)
    signals = Signals(args.device, images=images, saliency=saliency_maps(number, seed).to(args.device))
    keys = iter(range(10**9))
    return lambda: blend(policy.plan(images.shape, keyed(1, next(keys)), signals), images)


number = args.parts * IMAGES_OF_PART
contenders = {f"PuzzleMix, {count}": contender(PuzzleMix(block_nums=(count,), std=(0.25,)), args.batch, 0) for count in (2, 4, 8, 16)}
contenders["Co-Mixup"] = contender(CoMixup(), number, 1)
rows = interleaved(contenders, args.rounds, args.device)
for name, row in rows.items():
    row["authors_recorded_ms"] = float(RECORDED_MS[name])
show(
    f"PuzzleMix of {args.batch} images by blocks a side, Co-Mixup of {args.parts} parts of {IMAGES_OF_PART}; {args.size} pixels, "
    f"{args.device}, {args.threads} thread(s)",
    rows,
)

maps = saliency_maps(number, 1)
members = torch.arange(number).view(args.parts, IMAGES_OF_PART)
there, rng = members >= 0, keyed(3)
share = log_gamma_variate(2.0, tuple(members.shape), rng).softmax(1).float()
cost = unary(pooled_evidence(maps, (4, 4))[members], share, 0.05)
start = torch.randint(IMAGES_OF_PART, (*members.shape, 16), generator=rng)
shares = solve_parts(cost, compatibility(peaks(maps, 1)[members], there, 0.001), start, there, (4, 4))
used = shares.sum(2)
measured = {
    "energy": objective(shares, cost, (4, 4), 0.32, 1.0).mean(),
    "with threshold": objective(shares, cost, (4, 4), 0.32, 1.0, 0.83).mean(),
    "images an output": (used > 0).sum(2).float().mean(),
    "unused images, %": 100 * (used.sum(1) == 0).float().mean(),
}
print()
for name, recorded in RECORDED_PARTS.items():
    print(
        f"  Co-Mixup, {name:18s}{float(measured[name]):8.1f}   authors {recorded} (recorded, other images; sd of a part's energy about 17)"
    )
write(args, {"masks": rows, "Co-Mixup": {name: float(value) for name, value in measured.items()}})
