"""One of two processes that shard by FSDP2, on the CPU; leaves what it saw in METHOD-rankN.json. `fsdp.py FOLDER METHOD...`."""

import json
import os
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from hf_mixup import MixupTrainer
from small import Images, losses, trainer, vit
from test_distributed import CURVE

create = MixupTrainer.create_accelerator_and_postprocess


def told_that_the_cpu_is_a_device(self):
    # accelerate shards over devices alone, and takes DDP on the CPU without a word
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    create(self)


MixupTrainer.create_accelerator_and_postprocess = told_that_the_cpu_is_a_device


def train(folder, method, **more):
    run = trainer(folder, vit(), Images(32), mix=[method], save_strategy="steps", save_steps=2, **CURVE)
    run.train(**more)
    return run, [value for _, value in sorted(run.model_wrapped.named_parameters())]


for method in sys.argv[2:]:
    folder = Path(sys.argv[1], method)
    run, whole = train(folder, method)
    _, resumed = train(folder, method, resume_from_checkpoint=str(folder / "checkpoint-2"))
    seen = {
        "sharded": all(isinstance(value, DTensor) for value in whole),
        "losses": losses(run),
        "difference": max((one.full_tensor() - other.full_tensor()).abs().max().item() for one, other in zip(whole, resumed, strict=True)),
    }
    Path(sys.argv[1], f"{method}-rank{os.environ['RANK']}.json").write_text(json.dumps(seen))
sys.stdout.flush()
os._exit(0)
