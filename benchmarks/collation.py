"""Collating and mixing on the CPU, from a list of examples to a batch with soft targets: `python benchmarks/collation.py`.

It compares our collator with torch.stack alone, and with timm, torchvision and kornia as people use them: they stack, then mix. With `--before` it
also compares with an older checkout of ours. Bytes need a quarter of the memory and are normalised later; timm has its own collator for them. "The
saliency itself" is the search of SaliencyMix alone, without stacking and mixing. The last part measures loaders with two workers, which send batches
through shared memory: elapsed time, and CPU time of all processes.
"""

import time
from collections.abc import Callable

import torch
from timing import Before, cpu_of_tree, interleaved, memory_of, parse, peak_memory, serve, show, write
from torch.utils.data import DataLoader
from transformers.data import default_data_collator

from hf_mixup import METHODS, MixupCollator

args = parse(__doc__, rounds=25)
num_labels = 100
SHAPES = [(8, 3, 64, 64)] if args.quick else [(64, 3, 224, 224), (128, 3, 32, 32)]


def name_of(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def examples_of(shape: tuple[int, ...], bytes_: bool = False) -> list[dict]:
    draw = (lambda: torch.randint(256, shape[1:], dtype=torch.uint8)) if bytes_ else (lambda: torch.randn(shape[1:]))
    return [{"pixel_values": draw(), "labels": row % num_labels} for row in range(shape[0])]


def collators() -> dict[str, MixupCollator]:
    """Collators of all methods that need no model. This also works with older commits."""
    found = {}
    for name in METHODS:
        if name in ("vanilla", "decouplemix"):
            continue
        try:
            found[f"{name}, per image"] = MixupCollator(name, num_labels=num_labels)
        except ValueError:
            continue
    for name in ("mixup", "cutmix"):
        found[f"{name}, batch"] = MixupCollator(name, num_labels=num_labels, mode="batch")
    return found


def ours(shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    found = {}
    for kind, examples in (("", examples_of(shape)), (", bytes", examples_of(shape, bytes_=True))):
        for name, collator in collators().items():
            try:
                collator(examples)
            except TypeError:
                continue  # older commits cannot mix bytes
            found[f"ours {name}{kind}"] = lambda collator=collator, examples=examples: collator(examples)
    return found


def peers_of(shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    from peers import peers
    from timm.data import FastCollateMixup

    examples = examples_of(shape)

    def stacked():
        return torch.stack([example["pixel_values"] for example in examples])

    def after_stacking(mix):
        return lambda: mix(stacked(), torch.tensor([example["labels"] for example in examples]))

    images = stacked()
    found = {"the saliency itself": lambda: METHODS["saliencymix"].sample._peaks(images)}
    found |= {name: after_stacking(mix) for name, mix in peers(num_labels).items()}
    bytes_ = [(example["pixel_values"].numpy(), example["labels"]) for example in examples_of(shape, bytes_=True)]
    for name, alphas in (("mixup", (1.0, 0.0)), ("cutmix", (0.0, 1.0))):
        for mode, told in (("batch", "batch"), ("elem", "per image")):
            collate = FastCollateMixup(*alphas, mode=mode, label_smoothing=0.0, num_classes=num_labels)
            found[f"timm's collator {name}, bytes, {told}"] = lambda collate=collate: collate(bytes_)
    return {"torch.stack": stacked, **found}


if args.serve:
    serve({f"{name_of(shape)} {name}": run for shape in SHAPES for name, run in ours(shape).items()})
    raise SystemExit

before = Before(args.before, "before", [*["--quick"] * args.quick, "--threads", str(args.threads)]) if args.before else None
figures = {}
for shape in SHAPES:
    size = name_of(shape)
    found = peers_of(shape)
    found = {"torch.stack": found.pop("torch.stack"), **ours(shape), **found}
    rows = interleaved(found, args.rounds, before=before.contenders(f"{size} ") if before else None)
    for name, run in found.items():
        rows[name]["peak_mb"] = peak_memory(run)
    show(f"collation of {size}, {args.threads} thread(s)", rows)
    figures[size] = rows
if before:
    before.close()


class Loader:
    """Loads all images once and returns the elapsed time; also measures CPU time and memory."""

    def __init__(self, data: list[dict], collate: Callable):
        self.batches = DataLoader(data, batch_size, num_workers=2, collate_fn=collate, persistent_workers=True)

    def __call__(self) -> None:
        for _ in self.batches:
            pass

    def costs(self) -> dict[str, float]:
        self.batches._iterator = None  # new workers, forked from this process as it is now; otherwise they could not be compared
        start, memory = cpu_of_tree(), {}
        for _ in self.batches:
            memory = memory or memory_of([worker.pid for worker in self.batches._iterator._workers])
        return {"cpu_ms": 1000 * (cpu_of_tree() - start), **memory}


def stacked_and(mix) -> Callable[[list], dict]:
    def collate(rows: list) -> dict:
        batch = default_data_collator(rows)
        return dict(zip(("pixel_values", "labels"), mix(batch["pixel_values"], batch["labels"]), strict=True))

    return collate


from peers import peers  # noqa: E402, because it imports what an older commit may not have

count, side, batch_size = (16, 64, 8) if args.quick else (512, 224, 64)
floats, raw = (examples_of((count, 3, side, side), bytes_) for bytes_ in (False, True))
others = peers(num_labels)
made = {"torch.stack": (floats, default_data_collator)}
for name in ("mixup", "cutmix"):
    for kind, data in (("", floats), (", bytes", raw)):
        made[f"ours {name}, per image{kind}"] = data, MixupCollator(name, num_labels=num_labels)
made |= {name: (floats, stacked_and(others[name])) for name in ("timm mixup, batch", "timm cutmix, batch", "torchvision MixUp")}
loaders = {name: Loader(*how) for name, how in made.items()}
rows = interleaved(loaders, max(2, args.rounds // 3), clock=time.perf_counter)
for name, row in rows.items():
    row |= loaders[name].costs()
    row["images_per_second"] = 1000 * count / row["ms"][1]
show(f"loading {count}x3x{side}x{side} with 2 workers, batches of {batch_size}", rows)
write(args, {"batches": figures, "2 workers": rows})
