"""Collating and mixing on the CPU, from a list of examples to a batch with soft targets: `python benchmarks/collation.py`.

Ours beside torch.stack alone and beside timm, torchvision and kornia as they are used: stack, then mix. timm's own collator mixes bytes,
a quarter of the memory, which are normalised later. "The saliency itself" is what SaliencyMix looks for, without stacking and mixing.
Last, loaders with two workers, which hand batches over in shared memory, by elapsed time.
"""

import time
from collections.abc import Callable

import torch
from peers import peers
from timing import interleaved, parse, peak_memory, show, write
from timm.data import FastCollateMixup
from torch.utils.data import DataLoader
from transformers.data import default_data_collator

from hf_mixup import METHODS, MixupCollator
from hf_mixup.method import needs_of_model

args = parse(__doc__, rounds=25)
num_labels = 100


def contenders(shape: tuple[int, ...]) -> dict:
    examples = [{"pixel_values": torch.randn(shape[1:]), "labels": row % num_labels} for row in range(shape[0])]

    def stacked():
        return torch.stack([example["pixel_values"] for example in examples])

    def after_stacking(mix):
        return lambda: mix(stacked(), torch.tensor([example["labels"] for example in examples]))

    found = {"torch.stack": stacked}
    for name, method in METHODS.items():
        if not needs_of_model(method) and name not in ("vanilla", "decouplemix"):
            collator = MixupCollator(name, num_labels=num_labels)
            found[f"ours {name}, per image"] = lambda collator=collator: collator(examples)
    for name in ("mixup", "cutmix"):
        collator = MixupCollator(name, num_labels=num_labels, mode="batch")
        found[f"ours {name}, batch"] = lambda collator=collator: collator(examples)
    images = stacked()
    found["the saliency itself"] = lambda: METHODS["saliencymix"].sample._peaks(images)
    found |= {name: after_stacking(mix) for name, mix in peers(num_labels).items()}
    bytes_ = [(torch.randint(256, shape[1:], dtype=torch.uint8).numpy(), example["labels"]) for example in examples]
    for name, alphas in (("mixup", (1.0, 0.0)), ("cutmix", (0.0, 1.0))):
        collate = FastCollateMixup(*alphas, mode="batch", label_smoothing=0.0, num_classes=num_labels)
        found[f"timm's collator {name}, bytes, batch"] = lambda collate=collate: collate(bytes_)
    return found


figures = {}
for shape in [(8, 3, 64, 64)] if args.quick else [(64, 3, 224, 224), (128, 3, 32, 32)]:
    size = "x".join(map(str, shape))
    found = contenders(shape)
    rows = interleaved(found, args.rounds)
    for name, run in found.items():
        rows[name]["peak_mb"] = peak_memory(run)
    show(f"collation of {size}, {args.threads} thread(s)", rows)
    figures[size] = rows


def loader(collate) -> Callable[[], None]:
    """Brings all images once."""
    batches = DataLoader(data, batch_size, num_workers=2, collate_fn=collate, persistent_workers=True)

    def epoch():
        for _ in batches:
            pass

    return epoch


def stacked_and(mix) -> Callable[[list], dict]:
    def collate(rows: list) -> dict:
        batch = default_data_collator(rows)
        return dict(zip(("pixel_values", "labels"), mix(batch["pixel_values"], batch["labels"]), strict=True))

    return collate


count, side, batch_size = (16, 64, 8) if args.quick else (512, 224, 64)
data = [{"pixel_values": torch.randn(3, side, side), "labels": row % num_labels} for row in range(count)]
others = peers(num_labels)
found = {"torch.stack": loader(default_data_collator)}
found |= {f"ours {name}, per image": loader(MixupCollator(name, num_labels=num_labels)) for name in ("mixup", "cutmix")}
found |= {name: loader(stacked_and(others[name])) for name in ("timm mixup, batch", "timm cutmix, batch", "torchvision MixUp")}
rows = interleaved(found, args.rounds, clock=time.perf_counter)
for row in rows.values():
    row["images_per_second"] = 1000 * count / row["ms"][1]
show(f"loading {count}x3x{side}x{side} with 2 workers, batches of {batch_size}", rows)
write(args, {"batches": figures, "2 workers": rows})
