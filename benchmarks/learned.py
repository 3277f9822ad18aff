"""What a learned step costs against a plain one, in time and memory: `python benchmarks/learned.py`.

In forward passes F of the network, a backward pass counting 2F where it reaches the weights and 1F where it only passes through:
    vanilla    3F   student: clean images
    automix    9F   teacher: clean images 1F, mixed images there and back 2F; student: clean images 3F, mixed images 3F
    adautomix 12F   of three images: the same, and the student's linear mixtures 3F (the authors' code adds 3F of clean passes)
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time

import torch

from hf_mixup import METHODS, MixupModel
from hf_mixup.backbones import from_scratch
from hf_mixup.rng import MixKey

PASSES = {"vanilla": 3, "mixup": 3, "automix": 9, "samix": 9, "adautomix": 12}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--methods", nargs="+", default=["vanilla", "automix", "samix", "adautomix"])
parser.add_argument("--architecture", default="cifar_resnet18")
parser.add_argument("--batch", type=int, default=100)
parser.add_argument("--size", type=int, default=32)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--device", default="cpu")
parser.add_argument("--bf16", action="store_true")
parser.add_argument("--memory-of", help="take one step of this method and print the peak memory; used by the benchmark itself")
args = parser.parse_args()
torch.set_num_threads(args.threads)

images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
labels = torch.randint(100, (args.batch,), device=args.device)


class Run:
    """A model in training by one method."""

    def __init__(self, name: str):
        torch.manual_seed(0)
        self.model = MixupModel(from_scratch(args.architecture, 100, args.size), METHODS[name]).to(args.device).train()
        self.method, self.count = METHODS[name], 0
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(learning, lr=0.1, momentum=0.9, weight_decay=1e-4)

    def step(self) -> None:
        key = MixKey(0, 0, self.count, 0, 0, 1000)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            loss = self.model(pixel_values=images, labels=labels, mix_key=key).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.method.step.after_optimizer_step(self.model.states[self.method.name], self.model.backbone, self.count, 1000)
        self.count += 1


def peak_memory(name: str) -> float:
    """MB beyond what was there before the model. On the CPU in a process of its own, where the high-water mark is its own."""
    if args.device == "cpu":
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    torch.accelerator.memory.reset_peak_memory_stats()
    before = torch.accelerator.memory.memory_allocated()
    Run(name).step()
    return (torch.accelerator.memory.max_memory_allocated() - before) / 2**20


def now() -> float:
    if args.device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


if args.memory_of:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Run(args.memory_of).step()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    sys.exit()

memory = {name: peak_memory(name) for name in args.methods}
runs = {name: Run(name) for name in args.methods}
seconds = {name: [] for name in args.methods}
# methods take turns, so that what else the machine does falls on all alike; the first round warms up
for turn in range(args.rounds + 1):
    for name, run in runs.items():
        start = now()
        run.step()
        if turn:
            seconds[name].append(now() - start)
first = args.methods[0]
print(
    f"{args.architecture}, {args.batch}x3x{args.size}x{args.size}, {args.device}, {args.threads} threads, medians of {args.rounds} interleaved rounds"
)
print(f"{'method':12}{'passes':>8}{'ms':>10}{'x ' + first:>12}{'peak MB':>10}{'x ' + first:>12}")
for name in args.methods:
    median = statistics.median(seconds[name])
    ratio, more = median / statistics.median(seconds[first]), memory[name] / memory[first]
    print(f"{name:12}{PASSES.get(name, 0):>7}F{1000 * median:10.0f}{ratio:12.2f}{memory[name]:10.0f}{more:12.2f}")
