"""Training steps of ResNet-50 and DeiT-S by every method, beside the step without mixing: time and peak memory.

At 224 pixels, in bf16, channels last. The figures are written after every method, so that none is lost where time runs out.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from timing import interleaved, now, parse, peak_memory, show, write

from hf_mixup import METHODS, MixupModel, get_method
from hf_mixup.core.rng import MixKey
from hf_mixup.networks.backbones import from_scratch

args = parse(
    __doc__,
    rounds=5,
    methods={"nargs": "+", "default": [name for name in METHODS if name not in ("automix", "samix", "adautomix")]},
    batch={"type": int, "default": 128},
)
ON_CPU = args.device == "cpu"
LAST = ["supermix", "comixup"]
MOST_SECONDS = 4  # of the rounds of a method
NETWORKS = {"cifar_resnet20": 32, "vit_mini": 32} if ON_CPU else {"ResNet-50": 224, "DeiT-S": 224}
if ON_CPU:
    args.batch = 8
if args.quick:
    args.methods = [name for name in ("vanilla", "mixup", "transmix", "automix") if name in ("vanilla", *args.methods)]


def step_of(name: str, network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor):
    """A function that makes one training step."""
    model = MixupModel(network, get_method(name)).to(args.device).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3, momentum=0.9)
    [method] = model.choice.methods
    count = iter(range(10**9))

    def step() -> None:
        number = next(count)
        with torch.autocast(args.device, torch.bfloat16, enabled=not ON_CPU):
            loss = model(pixel_values=images, labels=labels, mix_key=MixKey(0, 0, number, 0, 0, 1000)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.step.after_optimizer_step(model.states[method.name], model.backbone, number, 1000)

    return step


class Network:
    """A network on the device, with a batch, and its step without mixing."""

    def __init__(self, architecture: str, size: int):
        self.title = f"{architecture}, {args.batch}x3x{size}x{size}"
        self.network = from_scratch(architecture, 100, size).to(args.device, memory_format=torch.channels_last)
        self.images = torch.randn(args.batch, 3, size, size, device=args.device).contiguous(memory_format=torch.channels_last)
        self.labels = torch.arange(args.batch, device=args.device) % 100
        self.plain = self.step_of("vanilla")

    def step_of(self, name: str):
        return step_of(name, self.network, self.images, self.labels)

    def measured(self, name: str) -> dict:
        try:
            step = self.plain if name == "vanilla" else self.step_of(name)
            step()
            start = now(args.device)
            step()
            rounds = max(1, min(args.rounds, int(MOST_SECONDS / (now(args.device) - start))))
            found = interleaved({"vanilla": self.plain, name: step}, rounds, args.device)[name]
            return {**found, "peak_mb": peak_memory(step, args.device)}
        except ValueError as error:  # the network cannot serve the method
            return {"error": str(error)}
        except torch.OutOfMemoryError:
            return {"error": "out of memory"}


networks = [Network(architecture, size) for architecture, size in NETWORKS.items()]
figures: dict[str, dict] = {network.title: {} for network in networks}
for name in sorted(dict.fromkeys(["vanilla", *args.methods]), key=LAST.count):  # those that take long at the end
    for network in networks:
        figures[network.title][name] = network.measured(name)
        write(args, figures)
for title, rows in figures.items():
    show(f"steps of {title} on {args.device}", {name: row for name, row in rows.items() if "error" not in row})
