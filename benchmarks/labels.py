"""The cost of methods that rewrite labels, compared with CutMix, in a training step of DeiT-S at 224 pixels: `python benchmarks/labels.py`."""

import functools

import torch
from timing import interleaved, parse, show, write
from transformers import DeiTConfig, DeiTForImageClassification

from hf_mixup import METHODS, MixupModel
from hf_mixup.core.rng import MixKey

args = parse(
    __doc__,
    rounds=9,
    methods={"nargs": "+", "default": ["decouplemix", "transmix", "mixpro", "tlalign", "tokenmix", "smmix", "sumix", "mergemix"]},
    batch={"type": int, "default": 4},
    size={"type": int, "default": 224},
    bf16={"action": "store_true"},
)
if args.quick:
    args.batch, args.size = 2, 32

images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
labels = torch.randint(1000, (args.batch,), device=args.device)
config = DeiTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, image_size=args.size, num_labels=1000)
network = DeiTForImageClassification(config)
keys = iter(range(10**9))


def step(model: MixupModel) -> None:
    with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
        loss = model(pixel_values=images, labels=labels, mix_key=MixKey(0, 0, next(keys))).loss
    loss.backward()
    network.zero_grad()


# one network for all
models = {name: MixupModel(network, METHODS[name]).to(args.device).train() for name in ["cutmix", *args.methods]}
rows = interleaved({name: functools.partial(step, model) for name, model in models.items()}, args.rounds, args.device)
title = f"DeiT-S, {args.batch}x3x{args.size}x{args.size}"
show(f"steps of {title} on {args.device}, {args.threads} thread(s)", rows)
write(args, {title: rows})
