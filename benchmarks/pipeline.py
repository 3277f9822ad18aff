"""Images a second of the input pipeline, compared with timm's, and how much of the network's own speed a training run reaches.

    python benchmarks/pipeline.py [--dataset FOLDER] [--images 640] [--workers 0] [--device cuda] [--before FOLDER]

These take turns in one run:

- loaders of CIFAR-10, from a folder of its parquet files, or of random images of that size, up to batches on the device that are padded, cropped,
  mirrored and normalised;
- loaders of JPEG files of 500 x 375 pixels with two workers, resized crops and RandAugment, up to normalised batches;
- the step of a ResNet-18 alone, on a batch that is already on the device, and the step of MixupTrainer with CutMix on cached images.

On an accelerator the network is compiled and runs in bf16.
"""

import io
import tempfile
import time
from collections.abc import Callable

import numpy as np
import PIL.Image
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import ImageOps
from timing import Before, cpu_of_tree, interleaved, memory_of, now, parse, reported, serve, show, write
from timm.data import create_loader
from timm.data.transforms import ToNumpy
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from transformers.data import default_data_collator

try:
    from hf_mixup.data.dataset import ImageDataset
    from hf_mixup.data.processor import ImageFormat
except ImportError:  # the names in an older commit
    from hf_mixup.data import ImageDataset, ImageFormat

args = parse(
    __doc__,
    rounds=5,
    dataset={"help": "folder of CIFAR-10's parquet files; random images if not given"},
    images={"type": int, "help": "that a loader brings in a round"},
    batch={"type": int, "default": 128, "help": "of the loaders"},
    step_batch={"type": int, "help": "of the network"},
    steps={"type": int, "help": "of a round"},
    workers={"type": int, "default": 0},
)
ACCELERATED = args.device != "cpu"
SIZES = (25_600, 128, 200) if ACCELERATED else (128, 8, 1) if args.quick else (640, 16, 3)
args.images, args.step_batch, args.steps = (
    given or size for given, size in zip((args.images, args.step_batch, args.steps), SIZES, strict=True)
)
FORM = ImageFormat(32, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.201))
WARM_UP = 10 if ACCELERATED else 1  # steps


def moment() -> float:
    """Seconds. With workers it is elapsed time, because CPU time of this process would not include them."""
    return time.perf_counter() if args.workers and not ACCELERATED else now(args.device)


def cifar10(folder: str | None, count: int) -> tuple[Dataset, str, str]:
    """Images as PNG files, and the names of the columns."""
    if folder is not None:
        from hf_mixup.arguments import DataArguments
        from hf_mixup.data.sources import load_images

        images = load_images(DataArguments(folder, max_train_samples=count))
        return images.train, images.image_column, images.label_column
    pixels = np.random.default_rng(0).integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(10)})
    return Dataset.from_dict({"image": list(pixels), "label": [row % 10 for row in range(count)]}, features=features), "image", "label"


class ForTimm(torch.utils.data.Dataset):
    """Decodes a row when it is requested, or in advance."""

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


def loaders(data: Dataset, image: str, label: str) -> dict[str, Callable[[], None]]:
    """Functions by name; each loads all images once, onto the device."""
    settings = {"num_workers": args.workers, "pin_memory": ACCELERATED, "persistent_workers": args.workers > 0}

    def ours(**how: bool) -> Callable[[], None]:
        dataset = ImageDataset(data, image, label, FORM.train_transform(), **how)
        loader = DataLoader(dataset, args.batch, shuffle=True, drop_last=True, collate_fn=default_data_collator, **settings)

        def epoch():
            for batch in loader:
                batch = {name: values.to(args.device, non_blocking=True) for name, values in batch.items()}
                if "augmentation_keys" in batch:
                    dataset.transform.tail(batch["pixel_values"], batch["augmentation_keys"])

        return epoch

    def timm(decoded: bool) -> Callable[[], None]:
        dataset = ForTimm(data, image, label, decoded)
        loader = create_loader(
            dataset, 32, args.batch, is_training=True, mean=FORM.mean, std=FORM.std, device=torch.device(args.device), **settings
        )
        # timm has no crop with padding
        dataset.transform = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), ToNumpy()])

        def epoch():
            for _ in loader:
                pass

        return epoch

    return {
        "timm's loader, decoded each time": timm(False),
        "ours, decoded each time": ours(),
        "timm's loader, decoded before": timm(True),
        "ours, cached": ours(cache=True),
        "ours, cached, augmented on the device": ours(cache=True, on_device=True),
    }


def jpegs(count: int) -> Dataset:
    """Files of 500 x 375 pixels, 60 to 70 kB each: smooth, with some noise."""
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        small = PIL.Image.fromarray(rng.integers(256, size=(12, 16, 3), dtype=np.uint8)).resize((500, 375), PIL.Image.Resampling.BICUBIC)
        noisy = (np.asarray(small) + rng.normal(0, 6, (375, 500, 3))).clip(0, 255).astype(np.uint8)
        PIL.Image.fromarray(noisy).save(file := io.BytesIO(), "jpeg", quality=90)
        files.append({"bytes": file.getvalue(), "path": None})
    return Dataset.from_dict(
        {"image": files, "label": [row % 10 for row in range(count)]}, features=Features({"image": Image(), "label": ClassLabel(10)})
    )


POLICY = "rand-m9-mstd0.5-inc1"
# timm may ask for 0 bits of an image, which new versions of Pillow refuse
timm.data.auto_augment.NAME_TO_OP["PosterizeIncreasing"] = lambda image, bits, **_: ImageOps.posterize(image, max(bits, 1))
LARGE = ImageFormat(224)


class JpegLoader:
    """Loads all images once, normalised, and returns the elapsed time; also measures CPU time and memory of the workers."""

    def __init__(self, batches, finish: Callable[[dict], object] = lambda batch: None):
        self.batches, self.finish = batches, finish

    def __call__(self) -> None:
        for batch in self.batches:
            self.finish(batch)

    def costs(self) -> dict[str, float]:
        loader = getattr(self.batches, "loader", self.batches)  # timm's loader contains torch's
        loader._iterator = None  # new workers, forked from this process as it is now; otherwise they could not be compared
        start, memory = cpu_of_tree(), {}
        for batch in self.batches:
            memory = memory or memory_of([worker.pid for worker in loader._iterator._workers])
            self.finish(batch)
        return {"cpu_ms": 1000 * (cpu_of_tree() - start), **memory}


def ours_of_jpegs(data: Dataset, batch: int) -> dict[str, JpegLoader]:
    transform, settings = LARGE.train_transform(auto_augment=POLICY), {"num_workers": 2, "persistent_workers": True, "shuffle": True}
    made = {
        "ours, floats": JpegLoader(
            DataLoader(ImageDataset(data, "image", "label", transform), batch, collate_fn=default_data_collator, **settings)
        )
    }
    try:
        raw = ImageDataset(data, "image", "label", transform, on_device=True)
    except ValueError:
        return made  # older commits finish such images in the workers
    finish = lambda rows: raw.transform.tail(rows["pixel_values"], rows["augmentation_keys"])  # noqa: E731
    return {**made, "ours, bytes": JpegLoader(DataLoader(raw, batch, collate_fn=default_data_collator, **settings), finish)}


def timm_of_jpegs(data: Dataset, batch: int) -> JpegLoader:
    return JpegLoader(
        create_loader(
            ForTimm(data, "image", "label", False), 224, batch, is_training=True, auto_augment=POLICY, interpolation="bicubic", num_workers=2,
            persistent_workers=True, mean=LARGE.mean, std=LARGE.std, device=torch.device("cpu"),
        )
    )  # fmt: skip


JPEGS = (16, 8) if args.quick else (256, 32)  # images, and of a batch
if args.serve:
    serve(ours_of_jpegs(jpegs(JPEGS[0]), JPEGS[1]), time.perf_counter)
    raise SystemExit
before = Before(args.before, "before", ["--quick"] * args.quick) if args.before else None

from transformers import TrainerCallback  # noqa: E402

from hf_mixup import MixupTrainer, MixupTrainingArguments  # noqa: E402
from hf_mixup.networks.backbones import from_scratch  # noqa: E402


def bare_steps() -> Callable[[], float]:
    """Measures the seconds of a step of the network alone."""
    network = from_scratch("cifar_resnet18", 10, 32).to(args.device)
    if ACCELERATED:
        network.compile()
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    images, labels = torch.randn(args.step_batch, 3, 32, 32, device=args.device), torch.arange(args.step_batch, device=args.device) % 10

    def run() -> float:
        for step in range(WARM_UP + args.steps):
            if step == WARM_UP:
                start = moment()
            with torch.autocast(args.device, torch.bfloat16, enabled=ACCELERATED):
                loss = nn.functional.cross_entropy(network(pixel_values=images).logits, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return (moment() - start) / args.steps

    return run


class Clock(TrainerCallback):
    """Mean seconds of a step in the last run, without the warm-up."""

    def on_step_end(self, arguments, state, control, **kwargs):
        if state.global_step == WARM_UP:
            self.start = moment()

    def on_train_end(self, arguments, state, control, **kwargs):
        self.seconds = (moment() - self.start) / (state.global_step - WARM_UP)


def trained_steps(data: Dataset, image: str, label: str, folder: str) -> Callable[[], float]:
    """Measures the seconds of a step of MixupTrainer."""
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


files = jpegs(JPEGS[0])
readers = {"timm's create_loader": timm_of_jpegs(files, JPEGS[1]), **ours_of_jpegs(files, JPEGS[1])}
photos = interleaved(readers, args.rounds, clock=time.perf_counter, before=before.contenders() if before else None)
for name, reader in readers.items():
    photos[name] |= reader.costs()
for row in photos.values():
    row["images_per_second"] = 1000 * JPEGS[0] / row["ms"][1]
if before:
    before.close()
show(f"loading {JPEGS[0]} JPEG files at 224 pixels with RandAugment, batches of {JPEGS[1]}, 2 workers", photos)

source = cifar10(args.dataset, args.images)
brought = interleaved(loaders(*source), args.rounds, args.device, moment)
with tempfile.TemporaryDirectory() as folder:
    steps = reported({"the bare step": bare_steps(), "MixupTrainer, cutmix": trained_steps(*source, folder)}, args.rounds)
for rows, images in ((brought, args.images // args.batch * args.batch), (steps, args.step_batch)):
    for row in rows.values():
        row["images_per_second"] = 1000 * images / row["ms"][1]
on = f"on {args.device}, {args.threads} thread(s)"
show(f"loading {args.images} images, batches of {args.batch}, {args.workers} workers, {on}", brought)
show(f"steps of {args.step_batch} images by a ResNet-18 {on}", steps)
share = 1 / steps["MixupTrainer, cutmix"]["ratio"][1]
print(f"\nMixupTrainer reaches {share:.1%} of the bare step's throughput")
write(
    args,
    {
        "loading": brought,
        "jpegs": photos,
        "steps": steps,
        "share_of_the_bare_step": share,
        "images": "CIFAR-10" if args.dataset else "random",
    },
)
