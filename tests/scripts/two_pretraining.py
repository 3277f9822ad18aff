"""One of two processes of a pre-training; leaves what it saw in rankN.json. `two_pretraining.py FOLDER`.

Losses and gradients of half a batch each, averaged, beside those of one process with the whole batch and the same mixtures.
"""

import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch

from hf_mixup.core.plan import MixPlan, blend
from hf_mixup.pretraining import contrast, processes
from hf_mixup.pretraining.contrast import Mixture
from hf_mixup.pretraining.state import Batch
from pretrained import TwoViews, trainer
from small import Images
from test_pretraining import KEY, SMALL, model_of, state_of, views

folder = Path(sys.argv[1])
# without DDP's broadcasts, which would make queues equal whatever was gathered
run = trainer(
    folder / "out", "moco", max_steps=3, save_strategy="no", ddp_broadcast_buffers=False,
    base_args={**SMALL, "queue_size": 40, "both_ways": True},
)  # fmt: skip
rank = run.args.process_index
seen = {}


def alone(function):
    """As if there were one process."""
    with mock.patch.object(contrast, "processes", return_value=(0, 1)), mock.patch.object(contrast, "everyone", lambda rows: rows):
        return function()


def step_of(base, mix, rows, partner):
    """Loss, gradients of the projector, and what is remembered, of some rows of a batch of 8."""
    model = model_of(base, mix, network="vit_mini", projector_norm="none", predictor_norm="none")  # no batch norms
    pair = views(8)[rows]
    step, state = model.pretext.step, state_of(model)
    mixtures = {}
    for view in step.mixed_views:
        plan = MixPlan.pair(partner, None, torch.linspace(0.3, 0.9, 8)[rows])
        mixtures[view] = Mixture(plan, Batch(blend(plan, pair[:, view])))
    out = step.step(model.pretext.parts, state, model.backbone, list(pair.unbind(1)), mixtures, torch.Generator())
    out.loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])
    return out.loss.detach(), gradient, (out.memory or {}).get("keys", torch.zeros(1))


for base in ("simclr", "npair", "moco", "mocov3", "byol", "simsiam"):
    for mix in ("imix", "unmix"):
        half = torch.arange(4)
        loss, gradient, keys = step_of(base, mix, half + 4 * rank, half.roll(1))
        for value in (loss, gradient):
            torch.distributed.all_reduce(value)
            value /= 2
        whole = torch.cat([half.roll(1), half.roll(1) + 4])
        wanted = alone(lambda base=base, mix=mix, whole=whole: step_of(base, mix, torch.arange(8), whole))
        apart = [float((value - other).abs().max()) for value, other in zip((loss, gradient, keys), wanted, strict=True)]
        seen[f"{base} {mix}"] = [apart[0], apart[1] / max(1.0, float(wanted[1].abs().max())), apart[2]]

run.train()
queue, place = state_of(run.mixup_model).queue, int(state_of(run.mixup_model).place)
features, labels = run.features(Images(11, seed=1))
with torch.no_grad():
    plain = run.mixup_model.eval().features(Images(11, seed=1).pixels)
checksum = sum(p.double().abs().sum().item() for p in run.mixup_model.parameters())
seen |= {
    "queue": queue.double().sum().item(), "place": place, "checksum": checksum, "labels": labels.tolist(),
    "features": float((features - plain).abs().max()), "rows": len(TwoViews()), "processes": processes.processes()[1], "key": list(KEY),
}  # fmt: skip
(folder / f"rank{rank}.json").write_text(json.dumps(seen))
run.accelerator.end_training()
sys.stdout.flush()
os._exit(0)  # torch 2.13 on the CPU sometimes aborts while shutting down gloo
