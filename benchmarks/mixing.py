"""Mixing batches on their device, the CPU or an accelerator: `python benchmarks/mixing.py [--device cuda]`.

It compares ours with timm, torchvision and kornia, with a copy of the batch, and with `--before` also with an older checkout of ours. `bandwidth` is
the memory bandwidth of blending alone, relative to that of the copy. Only necessary bytes count: three batches for Mixup (two read, one written), two
for CutMix, and two for the copy.
"""

import torch
from timing import Before, interleaved, now, parse, peak_memory, serve, show, write

from hf_mixup import METHODS, MixupCollator, blend

args = parse(__doc__, rounds=15)
num_labels = 100
BYTES = {"mixup": 3, "cutmix": 2}  # in batches
SHAPES = [(64, 3, 224, 224), (128, 3, 32, 32)] if args.device == "cpu" else [(256, 3, 224, 224), (1024, 3, 32, 32)]
SHAPES = [(8, 3, 64, 64)] if args.quick else SHAPES


def name_of(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def batch_of(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(shape, device=args.device), torch.arange(shape[0], device=args.device) % num_labels


def ours(shape: tuple[int, ...]) -> dict:
    images, labels = batch_of(shape)
    generator, found = torch.Generator(), {}
    for name, method in METHODS.items():
        try:
            MixupCollator(name, num_labels=num_labels)
        except ValueError:
            continue  # needs the model
        if name not in ("vanilla", "decouplemix"):
            found[f"ours {name}, per image"] = lambda method=method: method(images, labels, num_labels, generator)
    return found


def contenders(shape: tuple[int, ...]) -> dict:
    from peers import peers

    from hf_mixup.core.policy import Signals
    from hf_mixup.core.rng import keyed

    images, labels = batch_of(shape)
    found = {"copy": images.clone}
    for name in BYTES:
        signals = Signals(args.device)
        plan = METHODS[name].sample.plan(images.shape, keyed(0), signals).to(args.device)
        found[f"ours {name}, blending alone"] = lambda plan=plan: blend(plan, images)
    found |= ours(shape)
    ones = torch.ones_like(images)  # timm mixes in place: other values would become denormal numbers, which are slow
    for name, mix in peers(num_labels).items():
        given = ones if "timm" in name else images
        found[name] = lambda mix=mix, given=given: mix(given, labels)
    return found


if args.serve:
    serve({f"{name_of(shape)} {name}": run for shape in SHAPES for name, run in ours(shape).items()}, lambda: now(args.device))
    raise SystemExit

words = ["--device", args.device, "--threads", str(args.threads), *["--quick"] * args.quick]
before = Before(args.before, "before", words) if args.before else None
figures = {}
for shape in SHAPES:
    size = name_of(shape)
    found = contenders(shape)
    rows = interleaved(found, args.rounds, args.device, before=before.contenders(f"{size} ") if before else None)
    for name, run in found.items():
        rows[name]["peak_mb"] = peak_memory(run, args.device)
    for name, batches in BYTES.items():
        row = rows[f"ours {name}, blending alone"]
        row["bandwidth"] = batches / 2 / row["ratio"][1]
    show(f"mixing of {size} on {args.device}, {args.threads} thread(s)", rows)
    figures[size] = rows
if before:
    before.close()
write(args, figures)
