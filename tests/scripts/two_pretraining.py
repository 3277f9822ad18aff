"""One of two processes of a pre-training; leaves what it saw in rankN.json. `two_pretraining.py FOLDER`.

Losses and gradients of half a batch each, averaged, beside those of one process with the whole batch and the same mixtures.
"""

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch

from hf_mixup.core.plan import MixPlan, Share, blend
from hf_mixup.pretraining import contrast, processes, samix, sdmp
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
    with mock.patch.object(contrast, "processes", return_value=(0, 1)), ExitStack() as stack:
        for room in (contrast, samix, sdmp):
            stack.enter_context(mock.patch.object(room, "everyone", lambda rows: rows))
        return function()


def mixture_of(plan, images, halved):
    """Of MixCo only the first two of every four images."""
    if not halved:
        return Mixture(plan, Batch(blend(plan, images)))
    first = torch.arange(len(images)) % 4 < 2
    sources = tuple(images[column] for column in plan.index[first].unbind(1))
    plan = MixPlan(plan.index[first], Share(plan.weight[first]), plan.weight[first], sources)
    return Mixture(plan, Batch(blend(plan, images[first])))


def step_of(base, mix, rows, partner):
    """Loss, gradients of the projector, and what is remembered, of some rows of a batch of 8."""
    more = {"value_norm": "none", "extra": 0.5} if mix == "samix" else {}
    model = model_of(base, mix, network="vit_mini", projector_norm="none", predictor_norm="none", **more)  # no batch norms
    pair, plan = views(8)[rows], MixPlan.pair(partner, None, torch.linspace(0.3, 0.9, 8)[rows])
    step, state, both_views = model.pretext.step, state_of(model), list(pair.unbind(1))
    parts, network = model.pretext.parts, model.backbone
    if mix == "sdmp":
        out = step.pasted(parts, state, network, both_views, [plan, plan], [blend(plan, view) for view in both_views])
    elif mix == "samix":
        between = torch.linspace(0, 1, 8 * 8).view(8, 8)[rows]
        out = step.learned(parts, state, network, both_views, [plan, plan], between)
    else:
        mixtures = {view: mixture_of(plan, pair[:, view], mix == "mixco") for view in step.mixed_views}
        out = step.step(parts, state, network, both_views, mixtures, torch.Generator())
    out.loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])
    return out.loss.detach(), gradient, (out.memory or {}).get("keys", torch.zeros(1))


PAIRS = [(base, mix) for base in ("simclr", "npair", "moco", "mocov3", "byol", "simsiam") for mix in ("imix", "unmix")]
for base, mix in [*PAIRS, ("moco", "mixco"), ("simclr", "mixco"), ("mocov3", "sdmp"), ("moco", "samix")]:
    half = torch.arange(4)
    partner = {"mixco": half.roll(2), "sdmp": half.flip(0)}.get(mix, half.roll(1))
    loss, gradient, keys = step_of(base, mix, half + 4 * rank, partner)
    for value in (loss, gradient):
        torch.distributed.all_reduce(value)
        value /= 2
    whole = torch.cat([partner, partner + 4])
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
