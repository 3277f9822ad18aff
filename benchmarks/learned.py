"""The time and memory of a step with a learned mixer, compared with a plain step: `python benchmarks/learned.py`.

The costs in forward passes F of the network. A backward pass counts 2F if it reaches the weights, and 1F if it only passes through:
    vanilla    3F   student: clean images
    automix    9F   teacher: clean images 1F, mixed images forward and backward 2F; student: clean images 3F, mixed images 3F
    adautomix 12F   the same with three images, and the student's linear mixtures 3F (the authors' code adds 3F of clean passes)
The memory includes the model, its optimizer and a step.
"""

import torch
from timing import interleaved, parse, peak_memory, show, write

from hf_mixup import METHODS, MixupModel
from hf_mixup.core.rng import MixKey
from hf_mixup.networks.backbones import from_scratch

PASSES = {"vanilla": 3, "mixup": 3, "automix": 9, "samix": 9, "adautomix": 12}
args = parse(
    __doc__,
    rounds=3,
    methods={"nargs": "+", "default": ["vanilla", "automix", "samix", "adautomix"]},
    architecture={"default": "cifar_resnet18"},
    batch={"type": int, "default": 100},
    size={"type": int, "default": 32},
    bf16={"action": "store_true"},
)
if args.quick:
    args.architecture, args.batch = "cifar_resnet20", 4

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


memory = {name: peak_memory(lambda name=name: Run(name).step(), args.device) for name in args.methods}
rows = interleaved({name: Run(name).step for name in args.methods}, args.rounds, args.device)
for name, row in rows.items():
    row["peak_mb"] = memory[name]
    row["passes"] = float(PASSES[name])
title = f"{args.architecture}, {args.batch}x3x{args.size}x{args.size}"
show(f"steps of {title} on {args.device}, {args.threads} thread(s)", rows)
write(args, {title: rows})
