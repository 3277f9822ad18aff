"""Collating and mixing on the CPU, ours beside torch.stack, timm and torchvision, interleaved in one run.

    python benchmarks/collation.py [--threads 1] [--rounds 15] [--json FILE]

Prints the median of each in ms, its ratio to torch.stack with the 10th and 90th percentile of the ratios round by round, and the
peers as they are used: stack, then mix. kornia is timed where it is installed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from timm.data import Mixup as TimmMixup
from torchvision.transforms import v2

from hf_mixup import MixupCollator

SIZES = [(64, 3, 224, 224), (128, 3, 32, 32)]


def contenders(shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    batch, num_labels = shape[0], 100
    images = [torch.randn(shape[1:]) for _ in range(batch)]
    labels = torch.arange(batch) % num_labels
    examples = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]

    def stacked(mix: Callable) -> Callable[[], object]:
        return lambda: mix(torch.stack(images), labels)

    def timm(mode: str, **alphas: float) -> Callable[[], object]:
        return stacked(TimmMixup(mode=mode, num_classes=num_labels, label_smoothing=0.0, **alphas))

    found = {
        "torch.stack": lambda: torch.stack(images),
        "timm mixup, batch": timm("batch", mixup_alpha=1.0, cutmix_alpha=0.0),
        "timm cutmix, batch": timm("batch", mixup_alpha=0.0, cutmix_alpha=1.0),
        "timm cutmix, elem": timm("elem", mixup_alpha=0.0, cutmix_alpha=1.0),
        "torchvision MixUp": stacked(v2.MixUp(alpha=1.0, num_classes=num_labels)),
        "torchvision CutMix": stacked(v2.CutMix(alpha=1.0, num_classes=num_labels)),
    }
    for name in ("mixup", "cutmix"):
        for check in (True, False):
            collate = MixupCollator(name, num_labels=num_labels, check_finite=check)
            found[f"ours {name}, per image{'' if check else ', check_finite=False'}"] = lambda collate=collate: collate(examples)
    try:
        import kornia.augmentation as K
    except ImportError:
        return found
    for name, mix in (("RandomMixUpV2", K.RandomMixUpV2(p=1.0)), ("RandomCutMixV2", K.RandomCutMixV2(p=1.0, use_correct_lambda=True))):
        found[f"kornia {name}"] = stacked(mix)
    return found


def measure(shape: tuple[int, ...], rounds: int) -> dict[str, dict[str, float]]:
    found = contenders(shape)
    times: dict[str, list[float]] = {name: [] for name in found}
    for round_ in range(rounds + 2):
        for name, run in found.items():
            start = time.perf_counter()
            run()
            if round_ >= 2:  # the first ones warm up
                times[name].append(1000 * (time.perf_counter() - start))
    base = times["torch.stack"]
    result = {}
    for name, values in times.items():
        ratios = sorted(value / other for value, other in zip(values, base, strict=True))
        result[name] = {
            "ms": statistics.median(values),
            "ratio": statistics.median(ratios),
            "ratio_p10": ratios[len(ratios) // 10],
            "ratio_p90": ratios[-1 - len(ratios) // 10],
        }
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="also write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = {}
    for shape in SIZES:
        name = "x".join(map(str, shape))
        report[name] = measure(shape, args.rounds)
        print(f"\n{name}, {args.threads} thread(s), median of {args.rounds} interleaved rounds")
        for contender, row in report[name].items():
            print(
                f"  {contender:38s} {row['ms']:8.2f} ms   {row['ratio']:5.2f} x torch.stack ({row['ratio_p10']:.2f} to {row['ratio_p90']:.2f})"
            )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"threads": args.threads, "torch": torch.__version__, "figures": report}, file, indent=2)


if __name__ == "__main__":
    main()
