"""Learning rates of the published recipes."""

from __future__ import annotations

import math


def cosine(step: int, total: int, floor: float = 0.0, warmup: int = 0, every: int = 1, start: float | None = None) -> float:
    """The factor of the learning rate after `step` optimizer steps: a half cosine from 1 to `floor` over the whole run.

    As in mmcv, and unlike transformers' cosine, the warm-up is applied to the start of the curve, and not put before it.

    Args:
        total: optimizer steps of the run.
        floor: the factor at the end, 0 to 1.
        warmup: steps in which the factor rises linearly to the curve.
        every: number of steps between changes; the steps of an epoch, for a rate that changes once an epoch.
        start: the share of the curve at which the warm-up starts, as in mmcv; by default one step above 0.
    """
    on_curve = step // every * every
    factor = floor + (1 - floor) * (1 + math.cos(math.pi * min(on_curve, total) / max(total, 1))) / 2
    if start is None:
        return factor * min(1.0, (step + 1) / (warmup + 1))
    return factor * (1 if step >= warmup else start + (1 - start) * step / warmup)
