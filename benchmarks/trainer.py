"""What MixupTrainer costs over the stock Trainer with mixing off: `python benchmarks/trainer.py [--rounds 7] [--steps 100]`.

Both train the same network on the same images from memory, in turns; the median of the rounds' ratios is printed.
"""

import argparse
import statistics
import tempfile
import time

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_mixup import MixupTrainer, MixupTrainingArguments
from hf_mixup.backbones import from_scratch


class Images(torch.utils.data.Dataset):
    def __init__(self, count: int, size: int):
        self.pixels, self.labels = torch.randn(count, 3, size, size), torch.randint(10, (count,))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict:
        return {"pixel_values": self.pixels[row], "labels": int(self.labels[row])}


class Clock(TrainerCallback):
    """Seconds of every round of so many steps, the first of which warms up."""

    def __init__(self):
        self.start = self.seconds = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            self.start = time.perf_counter()
        self.seconds = time.perf_counter() - self.start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = Images(args.batch * 8, 32)
    settings = {
        "per_device_train_batch_size": args.batch, "max_steps": args.steps + 5, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "logging_strategy": "no", "dataloader_pin_memory": False, "use_cpu": not torch.accelerator.is_available(),
        "remove_unused_columns": False,
    }  # fmt: skip

    def seconds(ours: bool) -> float:
        torch.manual_seed(0)
        network, clock = from_scratch("cifar_resnet20", 10, 32), Clock()
        with tempfile.TemporaryDirectory() as folder:
            if ours:
                trainer = MixupTrainer(
                    network, MixupTrainingArguments(folder, mix=["vanilla"], **settings), train_dataset=data, callbacks=[clock]
                )
            else:
                trainer = Trainer(network, TrainingArguments(folder, **settings), train_dataset=data, callbacks=[clock])
            trainer.train()
        return clock.seconds

    rounds = [(seconds(False), seconds(True)) for _ in range(args.rounds)]
    stock, ours = (1000 * statistics.median(times) / args.steps for times in zip(*rounds, strict=True))
    ratios = sorted(mine / theirs for theirs, mine in rounds)
    print(f"a step, median of {args.rounds} interleaved rounds of {args.steps}: stock {stock:.1f} ms, MixupTrainer {ours:.1f} ms")
    print(f"ratio {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")


if __name__ == "__main__":
    main()
