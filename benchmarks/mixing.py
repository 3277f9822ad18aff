"""Mixing batches where they are, on the CPU or an accelerator: `python benchmarks/mixing.py [--device cuda]`.

Ours beside timm, torchvision and kornia, and beside a copy of the batch. `bandwidth` is the share of the copy's bandwidth that blending
alone reaches: of the bytes that it cannot avoid, which are three batches for Mixup (two read, one written) and two for CutMix, as for a copy.
"""

import torch
from peers import peers
from timing import interleaved, parse, peak_memory, show, write

from hf_mixup import METHODS, blend
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import keyed
from hf_mixup.method import needs_of_model

args = parse(__doc__, rounds=15)
num_labels = 100
BYTES = {"mixup": 3, "cutmix": 2}  # in batches


def contenders(shape: tuple[int, ...]) -> dict:
    images, labels = torch.randn(shape, device=args.device), torch.arange(shape[0], device=args.device) % num_labels
    found = {"copy": images.clone}
    for name in BYTES:
        signals = Signals(args.device)
        plan = METHODS[name].sample.plan(images.shape, keyed(0), signals).to(args.device)
        found[f"ours {name}, blending alone"] = lambda plan=plan: blend(plan, images)
    generator = keyed(0)
    for name, method in METHODS.items():
        if not needs_of_model(method) and name not in ("vanilla", "decouplemix"):
            found[f"ours {name}, per image"] = lambda method=method: method(images, labels, num_labels, generator)
    ones = torch.ones_like(images)  # timm mixes in place: other images would end as numbers too small to be fast
    for name, mix in peers(num_labels).items():
        given = ones if "timm" in name else images
        found[name] = lambda mix=mix, given=given: mix(given, labels)
    return found


shapes = [(64, 3, 224, 224), (128, 3, 32, 32)] if args.device == "cpu" else [(256, 3, 224, 224), (1024, 3, 32, 32)]
figures = {}
for shape in [(8, 3, 64, 64)] if args.quick else shapes:
    size = "x".join(map(str, shape))
    found = contenders(shape)
    rows = interleaved(found, args.rounds, args.device)
    for name, run in found.items():
        rows[name]["peak_mb"] = peak_memory(run, args.device)
    for name, batches in BYTES.items():
        row = rows[f"ours {name}, blending alone"]
        row["bandwidth"] = batches / 2 / row["ratio"][1]
    show(f"mixing of {size} on {args.device}, {args.threads} thread(s)", rows)
    figures[size] = rows
write(args, figures)
