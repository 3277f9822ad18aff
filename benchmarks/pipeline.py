"""Images a second of the input pipeline, beside timm's, and the share of the network's own speed that a training run reaches.

    python benchmarks/pipeline.py [--dataset FOLDER] [--images 640] [--rounds 5] [--workers 0] [--json FILE]

Interleaved in one run: loaders of CIFAR-10, from a folder of its parquet files, or of random images of its size, each up to batches on
the device that are padded, cropped, mirrored and normalised; then the bare step of a ResNet-18 on one batch that lies on the device, and
MixupTrainer's with CutMix on the cached images. On an accelerator the network is compiled and runs in bf16.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from timm.data import create_loader
from timm.data.transforms import ToNumpy
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from transformers import TrainerCallback
from transformers.data import default_data_collator

from hf_mixup import MixupTrainer, MixupTrainingArguments
from hf_mixup.arguments import DataArguments
from hf_mixup.backbones import from_scratch
from hf_mixup.data import ImageDataset, ImageFormat, load_images

ACCELERATED = torch.accelerator.is_available()
DEVICE = torch.accelerator.current_accelerator() if ACCELERATED else torch.device("cpu")
FORM = ImageFormat(32, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.201))
WARM_UP = 10 if ACCELERATED else 1  # steps


def cifar10(folder: str | None, count: int) -> tuple[Dataset, str, str]:
    """Images as PNG files, and the names of the columns."""
    if folder is not None:
        images = load_images(DataArguments(folder, max_train_samples=count))
        return images.train, images.image_column, images.label_column
    pixels = np.random.default_rng(0).integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(10)})
    return Dataset.from_dict({"image": list(pixels), "label": [row % 10 for row in range(count)]}, features=features), "image", "label"


class ForTimm(torch.utils.data.Dataset):
    """Decodes a row when it is asked for, or before."""

    transform = None  # timm sets it

    def __init__(self, data: Dataset, image: str, label: str, decoded: bool):
        self.data, self.columns = data, (image, label)
        self.decoded = [self._read(row) for row in range(len(data))] if decoded else None

    def _read(self, row: int) -> tuple:
        example = self.data[row]
        return example[self.columns[0]].convert("RGB"), example[self.columns[1]]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> tuple:
        image, label = self._read(row) if self.decoded is None else self.decoded[row]
        return self.transform(image), label


def loaders(data: Dataset, image: str, label: str, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """By name, what brings all images onto the device once."""
    settings = {"num_workers": args.workers, "pin_memory": ACCELERATED, "persistent_workers": args.workers > 0}

    def ours(**how: bool) -> Callable[[], None]:
        dataset = ImageDataset(data, image, label, FORM.train_transform(), **how)
        loader = DataLoader(dataset, args.batch, shuffle=True, drop_last=True, collate_fn=default_data_collator, **settings)

        def epoch():
            for batch in loader:
                batch = {name: values.to(DEVICE, non_blocking=True) for name, values in batch.items()}
                if "augmentation_keys" in batch:
                    dataset.transform.tail(batch["pixel_values"], batch["augmentation_keys"])

        return epoch

    def timm(decoded: bool) -> Callable[[], None]:
        dataset = ForTimm(data, image, label, decoded)
        loader = create_loader(dataset, 32, args.batch, is_training=True, mean=FORM.mean, std=FORM.std, device=DEVICE, **settings)
        # timm has no crop with padding
        dataset.transform = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), ToNumpy()])

        def epoch():
            for _ in loader:
                pass

        return epoch

    return {
        "ours, decoded each time": ours(),
        "timm's loader, decoded each time": timm(False),
        "timm's loader, decoded before": timm(True),
        "ours, cached": ours(cache=True),
        "ours, cached, augmented on the device": ours(cache=True, on_device=True),
    }


def bare_steps(args: argparse.Namespace) -> Callable[[], float]:
    """Gives seconds a step of the network alone."""
    network = from_scratch("cifar_resnet18", 10, 32).to(DEVICE)
    if ACCELERATED:
        network.compile()
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    images, labels = torch.randn(args.step_batch, 3, 32, 32, device=DEVICE), torch.arange(args.step_batch, device=DEVICE) % 10

    def run() -> float:
        for step in range(WARM_UP + args.steps):
            if step == WARM_UP:
                start = now()
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=ACCELERATED):
                loss = nn.functional.cross_entropy(network(pixel_values=images).logits, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return (now() - start) / args.steps

    return run


class Clock(TrainerCallback):
    """Seconds a step of the last run, of those after the warm-up."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARM_UP:
            self.start = now()

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds = (now() - self.start) / (state.global_step - WARM_UP)


def trained_steps(data: Dataset, image: str, label: str, folder: str, args: argparse.Namespace) -> Callable[[], float]:
    """Gives seconds a step of MixupTrainer."""
    clock = Clock()
    settings = MixupTrainingArguments(
        folder, mix=["cutmix"], max_steps=WARM_UP + args.steps, per_device_train_batch_size=args.step_batch, dataloader_num_workers=args.workers,
        dataloader_drop_last=True, dataloader_persistent_workers=args.workers > 0, dataloader_pin_memory=ACCELERATED, optim="sgd",
        optim_args="momentum=0.9", learning_rate=0.01, max_grad_norm=0, save_strategy="no", logging_strategy="no", report_to="none",
        disable_tqdm=True, bf16=ACCELERATED, torch_compile=ACCELERATED,
    )  # fmt: skip
    images = ImageDataset(data, image, label, FORM.train_transform(), cache=True, on_device=ACCELERATED)
    trainer = MixupTrainer(from_scratch("cifar_resnet18", 10, 32), settings, train_dataset=images, callbacks=[clock])

    def run() -> float:
        trainer.train()
        return clock.seconds

    return run


def now() -> float:
    if ACCELERATED:
        torch.accelerator.synchronize()
    return time.perf_counter()


def summary(rates: list[float]) -> dict[str, float]:
    return {"images_per_second": statistics.median(rates), "least": min(rates), "most": max(rates)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", help="folder of CIFAR-10's parquet files; random images if not given")
    parser.add_argument("--images", type=int, default=25_600 if ACCELERATED else 640, help="that a loader brings in a round")
    parser.add_argument("--batch", type=int, default=128, help="of the loaders")
    parser.add_argument("--step_batch", type=int, default=128 if ACCELERATED else 16, help="of the network")
    parser.add_argument("--steps", type=int, default=200 if ACCELERATED else 3, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="also write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source = cifar10(args.dataset, args.images)

    contenders = loaders(*source, args)
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(args.rounds + 1):
        for name, epoch in contenders.items():
            start = now()
            epoch()
            if round_:  # the first one warms up
                rates[name].append(args.images // args.batch * args.batch / (now() - start))
    with tempfile.TemporaryDirectory() as folder:
        steps = {"the bare step": bare_steps(args), "MixupTrainer, cutmix": trained_steps(*source, folder, args)}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for round_ in range(args.rounds + 1):
            for name, run in steps.items():
                value = run()
                if round_:
                    seconds[name].append(value)

    report = {name: summary(values) for name, values in rates.items()}
    report |= {name: summary([args.step_batch / value for value in values]) for name, values in seconds.items()}
    bare, trained = seconds.values()
    shares = sorted(one / other for one, other in zip(bare, trained, strict=True))
    step = report["the bare step"]["images_per_second"]
    device = torch.get_device_module(DEVICE).get_device_name() if DEVICE.type == "cuda" else str(DEVICE)
    print(f"\nimages a second on {device}, {args.threads} thread(s), {args.workers} workers, batches of {args.batch}, "
          f"steps of {args.step_batch}; median of {args.rounds} interleaved rounds (least to most)")  # fmt: skip
    for name, row in report.items():
        rate, least, most = row.values()
        print(f"  {name:40s} {rate:9.0f} ({least:.0f} to {most:.0f}), {rate / step:.2f} x the bare step")
    print(f"MixupTrainer reaches {statistics.median(shares):.1%} of the bare step's throughput ({shares[0]:.1%} to {shares[-1]:.1%})")
    if args.json:
        about = {"device": device, "torch": torch.__version__, "dataset": args.dataset and "CIFAR-10", **vars(args)}
        with open(args.json, "w") as file:
            json.dump({**about, "figures": report, "share_of_the_bare_step": shares}, file, indent=2)


if __name__ == "__main__":
    main()
