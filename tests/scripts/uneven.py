"""One of two processes of trainings by accumulated batches of uneven sizes; leaves what it did in rankN.pt. `uneven.py FOLDER METHOD...`."""

import os
import sys
from pathlib import Path

import torch

from hf_mixup import MixupTrainer
from small import Images, arguments, losses, vit, weights

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
# images of every micro-batch, three to a step, of the two processes
SIZES = ((4, 4, 3, 5, 2, 4), (4, 2, 2, 3, 6, 2))
images = Images(sum(map(sum, SIZES)))
place, batches = sum(map(sum, SIZES[:rank])), []
for size in SIZES[rank]:
    batches.append({"pixel_values": images.pixels[place : place + size], "labels": images.labels[place : place + size]})
    place += size


class Uneven(MixupTrainer):
    def get_train_dataloader(self):
        return batches

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        keys.append(tuple(self._last_key))
        return loss


seen = {}
for method in sys.argv[2:]:
    keys = []
    settings = {
        "mix": [method],
        "max_steps": 2,
        "gradient_accumulation_steps": 3,
        "logging_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
    }
    run = Uneven(vit(), arguments(folder / "out", max_grad_norm=0, lr_scheduler_type="constant", **settings), train_dataset=images)
    run.train()
    seen[method] = {"batches": batches, "keys": keys, "losses": losses(run), "weights": weights(run.mixup_model.backbone)}
# what DistributedDataParallel is told, as by the stock Trainer
ddp = {"ddp_bucket_cap_mb": 3, "ddp_broadcast_buffers": True, "ddp_static_graph": True, "ddp_backend": "gloo"}
run = MixupTrainer(vit(), arguments(folder / "ddp", max_steps=2, **ddp), train_dataset=images)
run.train()
wrapped = run.model_wrapped
seen["ddp"] = [wrapped.bucket_bytes_cap / 2**20, wrapped.broadcast_buffers, wrapped.static_graph, torch.distributed.get_backend()]
torch.save(seen, folder / f"rank{rank}.pt")
sys.stdout.flush()
os._exit(0)  # torch 2.13 on the CPU sometimes aborts while shutting down gloo
