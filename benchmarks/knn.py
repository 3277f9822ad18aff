"""What a few minutes of pre-training on a CPU achieve: `python benchmarks/knn.py --dataset FOLDER`, with CIFAR-10's train.parquet and test.parquet.

It uses 2,500 training images, averaged to 16 pixels, a ResNet of three blocks, and SGD. After the last epoch it classifies 2,000 test images by their
nearest neighbours. Each run adds a row to the CSV; rows that are there are not computed again.
"""

import argparse
import csv
import io
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import torch

from hf_mixup import pretext
from hf_mixup.core.rng import MixKey, hashed, keyed
from hf_mixup.data.processor import ImageFormat
from hf_mixup.networks.backbones import CifarResNetConfig, CifarResNetForImageClassification
from hf_mixup.pretraining.knn import knn_classes
from hf_mixup.pretraining.model import PreTrainingModel
from hf_mixup.pretraining.views import view_transform
from hf_mixup.training.schedules import cosine

MEAN, STD, SIZE, BATCH = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 16, 128
IMIX = ("vanilla", "imix", "unmix")
# for each base: ways of mixing, learning rate, hyper-parameters
ARMS = {
    "simclr": (IMIX, 0.1, {"projector": (128, 64), "projector_norm": "hidden"}),
    "moco": (IMIX, 0.1, {"projector": (128, 64), "projector_norm": "hidden", "queue_size": 1024, "momentum": 0.99, "end_momentum": 0.99}),
    "mocov3": (IMIX, 0.1, {"projector": (128, 64), "projector_norm": "all_plain", "predictor": (128, 64), "momentum": 0.95}),
    "byol": (IMIX, 0.1, {"projector": (128, 64), "predictor": (128, 64), "momentum": 0.95}),
    "simsiam": (IMIX, 0.1, {"projector": (128, 128), "predictor": (64, 128)}),
    "barlowtwins": (("vanilla", "mixedbarlow"), 0.02, {"projector": (128, 128)}),
}
COLUMNS = ["base", "mix", "seed", "epochs", "knn_top1", "untrained_knn_top1", "raw_pixels_knn_top1"]

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--dataset", required=True, help="folder of train.parquet and test.parquet")
parser.add_argument("--csv", default=str(Path(__file__).parents[1] / "docs/pretraining.csv"))
parser.add_argument("--bases", nargs="+", choices=ARMS, default=list(ARMS))
parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--threads", type=int, default=1)
args = parser.parse_args()
torch.set_num_threads(args.threads)


def load(name: str, count: int) -> tuple[list[PIL.Image.Image], torch.Tensor]:
    rows = pq.read_table(Path(args.dataset, f"{name}.parquet"), columns=["img", "label"]).slice(0, count).to_pylist()
    images = [PIL.Image.open(io.BytesIO(row["img"]["bytes"])).resize((SIZE, SIZE), PIL.Image.Resampling.BOX) for row in rows]
    return images, torch.tensor([row["label"] for row in rows])


def plain(images: list[PIL.Image.Image]) -> torch.Tensor:
    pixels = torch.stack([torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) for image in images]).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


(images, labels), (test_images, test_labels) = load("train", 2500), load("test", 2000)
bank, queries = plain(images), plain(test_images)
transform = view_transform(ImageFormat(SIZE, mean=MEAN, std=STD), "cifar")


def knn(known: torch.Tensor, asked: torch.Tensor) -> float:
    found = knn_classes(known, labels, asked, 10, neighbours=20, temperature=0.1)
    return round(100 * (found == test_labels).float().mean().item(), 2)


def score(model: PreTrainingModel) -> float:
    model.eval()
    with torch.no_grad():
        features = [torch.cat([model.features(some) for some in data.split(500)]) for data in (bank, queries)]
    model.train()
    return knn(*features)


def views_of(seed: int) -> list[torch.Tensor]:
    """The views of every epoch, each (2500, 2, 3, 16, 16). All runs of a seed see the same views."""
    opened, rows = [transform.opened(image) for image in images], torch.arange(len(images))
    keys = [hashed(rows, keyed(seed, epoch).initial_seed()) for epoch in range(args.epochs)]
    return [transform.tail(torch.stack(list(transform.drawn(opened, some))), some).half() for some in keys]


def train(base: str, mix: str, seed: int, views: list[torch.Tensor]) -> tuple[float, float]:
    """kNN accuracy before and after training."""
    _, rate, settings = ARMS[base]
    torch.manual_seed(seed)
    network = CifarResNetForImageClassification(CifarResNetConfig(depths=(1, 1, 1), widths=(16, 32, 64), embedding_size=16, num_labels=2))
    model = PreTrainingModel(network, pretext(mix, base, **settings))
    before = score(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate, momentum=0.9, weight_decay=5e-4)
    steps = len(images) // BATCH
    total = steps * args.epochs
    for epoch in range(args.epochs):
        order = torch.randperm(len(images), generator=keyed(seed, epoch))
        for place, rows in enumerate(order[: steps * BATCH].split(BATCH)):
            step = epoch * steps + place
            for group in optimizer.param_groups:
                group["lr"] = rate * cosine(step, total, warmup=total // 20 + 1)
            loss = model(views[epoch][rows].float(), mix_key=MixKey(seed, 0, step, total_steps=total)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.after_optimizer_step(step, total)
    return before, score(model)


path = Path(args.csv)
done = list(csv.DictReader(path.open())) if path.is_file() else []
raw = knn(bank.flatten(1), queries.flatten(1))
for seed in args.seeds:
    views = None
    for base in args.bases:
        for mix in ARMS[base][0]:
            if any((row["base"], row["mix"], row["seed"], row["epochs"]) == (base, mix, str(seed), str(args.epochs)) for row in done):
                continue
            views = views_of(seed) if views is None else views
            before, after = train(base, mix, seed, views)
            row = dict(zip(COLUMNS, [base, mix, seed, args.epochs, *(f"{value:.2f}" for value in (after, before, raw))], strict=True))
            print(row, flush=True)
            with path.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                if not file.tell():
                    writer.writeheader()
                writer.writerow(row)
