"""The extra cost of MixupTrainer without mixing, compared with the stock Trainer: `python benchmarks/trainer.py`.

Both train the same network on the same images in memory, in turns. A round is `--steps` steps of at least 50 ms each. `lower` is the ratio of the
lower quartiles, because other load on the machine changes them least.
"""

import tempfile
import time

import torch
from timing import parse, reported, show, write
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


CLOCKS = {"CPU time": time.process_time, "elapsed time": time.perf_counter}


def read() -> dict[str, float]:
    if args.device != "cpu":
        torch.accelerator.synchronize()
    return {name: clock() for name, clock in CLOCKS.items()}


class Clock(TrainerCallback):
    """Seconds of the steps after the warm-up, by every clock."""

    def on_step_end(self, arguments, state, control, **kwargs):
        if state.global_step == WARM_UP:
            self.start = read()
        elif state.global_step == state.max_steps:
            self.seconds = {name: end - self.start[name] for name, end in read().items()}


data = Images(args.batch * 8, 32)
SETTINGS = {
    "per_device_train_batch_size": args.batch, "max_steps": args.steps + WARM_UP, "save_strategy": "no", "report_to": "none",
    "disable_tqdm": True, "logging_strategy": "no", "dataloader_pin_memory": False, "use_cpu": args.device == "cpu",
    "remove_unused_columns": False,
}  # fmt: skip


def seconds(ours: bool) -> dict[str, float]:
    """Of a step, by every clock."""
    torch.manual_seed(0)
    network, clock = from_scratch("cifar_resnet20", 10, 32), Clock()
    with tempfile.TemporaryDirectory() as folder:
        if ours:
            settings = MixupTrainingArguments(folder, mix=["vanilla"], **SETTINGS)
            trainer = MixupTrainer(network, settings, train_dataset=data, callbacks=[clock])
        else:
            trainer = Trainer(network, TrainingArguments(folder, **SETTINGS), train_dataset=data, callbacks=[clock])
        trainer.train()
    return {name: value / args.steps for name, value in clock.seconds.items()}


taken: dict[str, list[dict[str, float]]] = {"Trainer": [], "MixupTrainer, no mixing": []}
for turn in range(args.rounds + 1):
    for name in list(taken)[:: 1 if turn % 2 else -1]:
        taken[name].append(seconds(name != "Trainer"))
figures = {}
for clock in CLOCKS:
    rows = reported({name: iter([one[clock] for one in runs]).__next__ for name, runs in taken.items()}, args.rounds)
    for row in rows.values():
        row["lower"] = row["ms"][0] / rows["Trainer"]["ms"][0]
    figures[f"a step, {clock}"] = rows
    show(f"a step, {clock}, rounds of {args.steps} on {args.device}, {args.threads} thread(s)", rows)
write(args, figures)
