"""One of two processes of a training; leaves what it saw in rankN.json. `two_processes.py FOLDER device|collator [METHOD]`."""

import json
import os
import sys
from pathlib import Path

from hf_mixup import MixupCollator, MixupTrainer
from small import Images, arguments, losses, network_for, vit
from test_distributed import CURVE

folder, collation = Path(sys.argv[1]), sys.argv[2]
mix = sys.argv[3:] or ["mixup", "cutmix"]
seen = {"methods": [], "lams": []}


class Watched(MixupTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, True)
        if collation == "device":
            seen["methods"].append(self.mixup_model.method_for(self._last_key).name)
            seen["lams"].append(outputs.lam.tolist())
        else:
            seen["lams"].append(inputs["labels"].max(1).values.tolist())
        return loss


# 37 images over 2 processes in batches of 4: the last batch is uneven
run = Watched(
    network_for(mix[0]),
    arguments(folder / "out", mix=mix, max_steps=-1, num_train_epochs=1, per_device_train_batch_size=4),
    data_collator=MixupCollator(["mixup", "cutmix"], num_labels=4) if collation == "collator" else None,
    train_dataset=Images(37),
)
run.train()
checksum = sum(p.double().abs().sum().item() for p in run.mixup_model.parameters())
seen |= {"steps": run.state.global_step, "checksum": checksum}
if sys.argv[3:]:
    curve = MixupTrainer(vit(), arguments(folder / "curve", mix=mix, **CURVE), train_dataset=Images(32))
    curve.train()
    seen["losses"] = losses(curve)
(folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))
run.accelerator.end_training()
sys.stdout.flush()
os._exit(0)  # torch 2.13 on the CPU sometimes aborts while shutting down gloo
