"""What MixupTrainer costs over the stock Trainer with mixing off: `python benchmarks/trainer.py`.

Both train the same network on the same images from memory, in turns, for rounds of so many steps of at least 50 ms.
"""

import tempfile
from functools import partial

import torch
from timing import now, parse, reported, show, write
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_mixup import MixupTrainer, MixupTrainingArguments
from hf_mixup.networks.backbones import from_scratch

args = parse(__doc__, rounds=7, steps={"type": int, "default": 100}, batch={"type": int, "default": 32})
WARM_UP = 5  # steps
if args.quick:
    args.steps, args.batch = 2, 4


class Images(torch.utils.data.Dataset):
    def __init__(self, count: int, size: int):
        self.pixels, self.labels = torch.randn(count, 3, size, size), torch.randint(10, (count,))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict:
        return {"pixel_values": self.pixels[row], "labels": int(self.labels[row])}


class Clock(TrainerCallback):
    """Seconds of the steps after the warm-up."""

    def on_step_end(self, arguments, state, control, **kwargs):
        if state.global_step == WARM_UP:
            self.start = now(args.device)
        elif state.global_step == state.max_steps:
            self.seconds = now(args.device) - self.start


data = Images(args.batch * 8, 32)
SETTINGS = {
    "per_device_train_batch_size": args.batch, "max_steps": args.steps + WARM_UP, "save_strategy": "no", "report_to": "none",
    "disable_tqdm": True, "logging_strategy": "no", "dataloader_pin_memory": False, "use_cpu": args.device == "cpu",
    "remove_unused_columns": False,
}  # fmt: skip


def seconds(ours: bool) -> float:
    """A step."""
    torch.manual_seed(0)
    network, clock = from_scratch("cifar_resnet20", 10, 32), Clock()
    with tempfile.TemporaryDirectory() as folder:
        if ours:
            settings = MixupTrainingArguments(folder, mix=["vanilla"], **SETTINGS)
            trainer = MixupTrainer(network, settings, train_dataset=data, callbacks=[clock])
        else:
            trainer = Trainer(network, TrainingArguments(folder, **SETTINGS), train_dataset=data, callbacks=[clock])
        trainer.train()
    return clock.seconds / args.steps


rows = reported({"Trainer": partial(seconds, False), "MixupTrainer, no mixing": partial(seconds, True)}, args.rounds)
show(f"a step, rounds of {args.steps} on {args.device}, {args.threads} thread(s)", rows)
write(args, {"a step": rows})
