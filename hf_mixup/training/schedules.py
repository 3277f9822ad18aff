"""Learning rates of the published recipes."""

from __future__ import annotations

import math


def cosine(step: int, total: int, floor: float = 0.0, warmup: int = 0, every: int = 1, start: float | None = None) -> float:
    """The factor of the learning rate after `step` optimizer steps: a half cosine from 1 to `floor` over the whole run.

    As in mmcv, and unlike transformers' cosine, the warm-up is laid over the curve instead of put before it.

    Args:
        total: steps of the run.
        floor: the factor at the end, 0 to 1.
        warmup: steps over which the factor is raised linearly to the curve.
        every: change it every so many steps only; the steps of an epoch for a rate that changes once an epoch.
        start: the share at which the warm-up starts, as in mmcv; by default it starts one step above 0.
    """
    on_curve = step // every * every
    factor = floor + (1 - floor) * (1 + math.cos(math.pi * min(on_curve, total) / max(total, 1))) / 2
    if start is None:
        return factor * min(1.0, (step + 1) / (warmup + 1))
    return factor * (1 if step >= warmup else start + (1 - start) * step / warmup)
