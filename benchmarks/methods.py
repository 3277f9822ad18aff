"""The cost of a training step with each method, compared with a step without mixing: `python benchmarks/methods.py [--methods kmixup moex]`.

A step is a forward pass, a backward pass and SGD of a ResNet-20 at 32 pixels. These are not measured here: methods that need a vision transformer
(`labels.py`), methods that train a mask network (`learned.py`), and SuperMix, whose search takes longer on a network that has learned less.
"""

import functools

import torch
from timing import interleaved, parse, peak_memory, show, write

from hf_mixup import METHODS, MixupModel
from hf_mixup.core.rng import MixKey
from hf_mixup.methods import MethodChoice
from hf_mixup.networks.backbones import from_scratch
from hf_mixup.report.examples import default_architecture
from hf_mixup.steps import SuperMix
from hf_mixup.steps.learned.mixing import MixerStep

ARCHITECTURE = "cifar_resnet20"
OURS = [
    name
    for name, method in METHODS.items()
    if not isinstance(method.step, (MixerStep, SuperMix)) and default_architecture(MethodChoice.build(name)) == ARCHITECTURE
]
args = parse(__doc__, rounds=9, methods={"nargs": "+", "default": OURS})
size, batch = 32, 4 if args.quick else 64
network = from_scratch(ARCHITECTURE, 100, size).to(args.device).train()
optimizer = torch.optim.SGD(network.parameters(), 1e-3, momentum=0.9)
images = torch.randn(batch, 3, size, size, device=args.device)
labels = torch.arange(batch, device=args.device) % 100
keys = iter(range(10**9))


def step(model: MixupModel) -> None:
    model(pixel_values=images, labels=labels, mix_key=MixKey(0, 0, next(keys), 0, 0, 10**6)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


# one network for all
models = {name: MixupModel(network, METHODS[name]).to(args.device).train() for name in dict.fromkeys(["vanilla", *args.methods])}
contenders = {name: functools.partial(step, model) for name, model in models.items()}
rows = interleaved(contenders, args.rounds, args.device)
for name, run in contenders.items():
    rows[name]["peak_mb"] = peak_memory(run, args.device)
title = f"{ARCHITECTURE}, {batch}x3x{size}x{size}"
show(f"steps of {title} on {args.device}, {args.threads} thread(s)", rows)
write(args, {title: rows})
