"""The cost of a mixed step of pre-training, compared with a plain step of the same base: `python benchmarks/pretraining.py`.

The costs in forward passes F of the network, where a backward pass counts 2F: MoCo 4F (query 3F, key 1F). i-Mix the same, because it mixes the query
itself. Un-Mix 7F and MoCoMix 8F: they add a clean term and one or two passes. SAMix 10F, plus its mixer. Updates of the EMA are included.
"""

import torch
from timing import interleaved, parse, show, write

from hf_mixup import PreTrainingModel, pretext
from hf_mixup.core.rng import MixKey
from hf_mixup.networks.backbones import from_scratch

MIXES = {
    "simclr": ("vanilla", "imix", "unmix", "mixco"),
    "moco": ("vanilla", "imix", "cutmix", "unmix", "mixco", "mocomix", "samix"),
    "mocov3": ("vanilla", "imix", "unmix", "sdmp"),
    "byol": ("vanilla", "imix", "unmix"),
    "simsiam": ("vanilla", "imix", "unmix"),
    "barlowtwins": ("vanilla", "mixedbarlow"),
}
args = parse(
    __doc__,
    rounds=5,
    bases={"nargs": "+", "choices": list(MIXES), "default": list(MIXES)},
    architecture={"default": "cifar_resnet20"},
    batch={"type": int, "default": 32},
    size={"type": int, "default": 16},
)
if args.quick:
    args.batch = 4

views = torch.randn(args.batch, 2, 3, args.size, args.size, device=args.device)


class Run:
    """A model in training by one pretext."""

    def __init__(self, base: str, mix: str):
        torch.manual_seed(0)
        # a short queue, and the same projector for all, because SDMP's own is for vision transformers
        small = {"moco": {"queue_size": 1024}, "mocov3": {"projector": (4096, 256)}}.get(base, {})
        self.model = PreTrainingModel(from_scratch(args.architecture, 2, args.size), pretext(mix, base, **small)).to(args.device).train()
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.03, momentum=0.9)
        self.count = 0

    def step(self) -> None:
        self.model(views, mix_key=MixKey(0, 0, self.count, total_steps=1000)).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.after_optimizer_step(self.count, 1000)
        self.count += 1


figures = {}
for base in args.bases:
    title = f"{base}, {args.architecture}, {args.batch}x2x3x{args.size}x{args.size}"
    figures[title] = interleaved({mix: Run(base, mix).step for mix in MIXES[base]}, args.rounds, args.device)
    show(f"steps of {title} on {args.device}, {args.threads} thread(s)", figures[title])
write(args, figures)
