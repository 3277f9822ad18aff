"""Training steps of ResNet-50 and DeiT-S by every method, beside the step without mixing: time and peak memory.

At 224 pixels, in bf16, channels last. The figures are written after every method, so that none is lost where time runs out.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from timing import interleaved, parse, peak_memory, show, write

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


figures: dict[str, dict] = {}
for architecture, size in NETWORKS.items():
    title = f"{architecture}, {args.batch}x3x{size}x{size}"
    network = from_scratch(architecture, 100, size).to(args.device, memory_format=torch.channels_last)
    images = torch.randn(args.batch, 3, size, size, device=args.device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(args.batch, device=args.device) % 100
    plain = step_of("vanilla", network, images, labels)
    rows = figures.setdefault(title, {})
    for name in dict.fromkeys(["vanilla", *args.methods]):
        try:
            step = plain if name == "vanilla" else step_of(name, network, images, labels)
            rows[name] = {**interleaved({"vanilla": plain, name: step}, args.rounds, args.device)[name]}
            rows[name]["peak_mb"] = peak_memory(step, args.device)
        except ValueError as error:  # the network cannot serve the method
            rows[name] = {"error": str(error)}
        except torch.OutOfMemoryError:
            rows[name] = {"error": "out of memory"}
        write(args, figures)
    show(f"steps of {title} on {args.device}", {name: row for name, row in rows.items() if "error" not in row})
