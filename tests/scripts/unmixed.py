"""One of two processes of trainings that leave some batches unmixed; leaves what it saw in rankN.json. `unmixed.py FOLDER METHOD...`."""

import json
import os
import sys
from pathlib import Path

from hf_mixup import MixupTrainer
from small import Images, arguments, network_for, vit

folder = Path(sys.argv[1])
seen = {}
for method in sys.argv[2:]:
    for how in ({"mix_rate": 0.5}, {"mix_off_epoch": 1.0}):
        settings = {"mix": [method], "max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 4, **how}
        network = vit() if method == "automix" else network_for(method)
        checkpointed = network.supports_gradient_checkpointing and len(sys.argv) == 3
        # 33 images: the last batch of an epoch is one image on either process
        run = MixupTrainer(network, arguments(folder / "out", gradient_checkpointing=checkpointed, **settings), train_dataset=Images(33))
        run.train()
        checksum = sum(p.double().abs().sum().item() for p in run.mixup_model.parameters())
        seen[f"{method} {next(iter(how))}"] = {"steps": run.state.global_step, "checksum": checksum}
(folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))
sys.stdout.flush()
os._exit(0)  # torch 2.13 on the CPU sometimes aborts while shutting down gloo
