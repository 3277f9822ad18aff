"""Whole training steps, with mixing: `python benchmarks/steps.py [--device cuda]`.

A step is a forward pass, a backward pass and SGD on a batch that is already on the device: without mixing, mixed by ours, and by timm, torchvision
and kornia. On the CPU it is a ResNet-20 at 32 pixels, on an accelerator a ResNet-50 at 224 pixels in bf16 with batches of 256.
"""

import torch
from peers import peers
from timing import interleaved, parse, peak_memory, show, write
from torch.nn import functional as F

from hf_mixup import METHODS, MixupModel
from hf_mixup.core.rng import MixKey
from hf_mixup.method import needs_of_model
from hf_mixup.networks.backbones import from_scratch

args = parse(__doc__, rounds=9)
on_cpu = args.device == "cpu"
architecture, num_labels, size, batch = ("cifar_resnet20", 100, 32, 64) if on_cpu else ("resnet50", 1000, 224, 256)
if args.quick:
    size, batch = 32, 8
if on_cpu:
    print("ResNet-50, 224 px, bf16, batches of 256: needs an accelerator, `--device cuda`; left out")

network = from_scratch(architecture, num_labels, size).to(args.device).train()
optimizer = torch.optim.SGD(network.parameters(), 1e-3, momentum=0.9)
images = torch.randn(batch, 3, size, size, device=args.device)
labels = torch.arange(batch, device=args.device) % num_labels
ones = torch.ones_like(images)  # timm mixes in place
keys = iter(range(10**9))


def step(loss) -> None:
    with torch.autocast(args.device, torch.bfloat16, enabled=not on_cpu):
        value = loss()
    value.backward()
    optimizer.step()
    optimizer.zero_grad()


def of_network(mixed: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(network(pixel_values=mixed).logits.float(), targets)


def by(mix, images: torch.Tensor):
    return lambda: step(lambda: of_network(*mix(images, labels)))


contenders = {"no mixing": lambda: step(lambda: of_network(images, labels))}
for name, method in METHODS.items():
    if not needs_of_model(method):
        model = MixupModel(network, method).train()
        contenders[f"ours {name}, per image"] = lambda model=model: step(
            lambda: model(pixel_values=images, labels=labels, mix_key=MixKey(0, 0, next(keys))).loss
        )
contenders |= {name: by(mix, ones if "timm" in name else images) for name, mix in peers(num_labels).items()}

rows = interleaved(contenders, args.rounds, args.device)
for name, run in contenders.items():
    rows[name]["peak_mb"] = peak_memory(run, args.device)
title = f"{architecture}, {batch}x3x{size}x{size}"
show(f"steps of {title} on {args.device}, {args.threads} thread(s)", rows)
write(args, {title: rows})
