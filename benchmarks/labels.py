"""What methods that rewrite labels cost beside CutMix, in a training step of DeiT-S at 224 pixels: `python benchmarks/labels.py`.

Every method has a step in turn, and the order is another one in every round; printed are medians of the ratios to the CutMix step of
the same round.
"""

import argparse
import random
import statistics
import time

import torch
from transformers import DeiTConfig, DeiTForImageClassification

from hf_mixup import METHODS, MixupModel
from hf_mixup.rng import MixKey

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--methods", nargs="+", default=["decouplemix", "transmix", "mixpro", "tlalign", "tokenmix", "smmix", "sumix"])
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--size", type=int, default=224)
parser.add_argument("--rounds", type=int, default=9)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--device", default="cpu")
parser.add_argument("--bf16", action="store_true")
args = parser.parse_args()
torch.set_num_threads(args.threads)

images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
labels = torch.randint(1000, (args.batch,), device=args.device)
config = DeiTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, image_size=args.size, num_labels=1000)
network = DeiTForImageClassification(config)
# one network for all: each method's hooks sleep while another one trains
models = {name: MixupModel(network, METHODS[name]).to(args.device).train() for name in ["cutmix", *args.methods]}


def now() -> float:
    """On the CPU the time of this process alone, whatever else the machine does."""
    if args.device == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def step(name: str, count: int) -> float:
    start = now()
    with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
        loss = models[name](pixel_values=images, labels=labels, mix_key=MixKey(0, 0, count)).loss
    loss.backward()
    network.zero_grad()
    return now() - start


order = list(models)
rounds: list[dict[str, float]] = []
for count in range(args.rounds + 1):
    random.Random(count).shuffle(order)
    rounds.append({name: step(name, count) for name in order})
rounds = rounds[1:]  # the first one warms up

print(f"{args.batch} images of {args.size} pixels on {args.device}, {args.threads} threads, median of {args.rounds} rounds")
for name in models:
    seconds = statistics.median(one[name] for one in rounds)
    ratio = statistics.median(one[name] / one["cutmix"] for one in rounds)
    print(f"{name:12} {seconds * 1000:8.1f} ms  {100 * (ratio - 1):+6.1f} %")
