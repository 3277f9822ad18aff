"""VideoMix."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_mixup.core.checks import check_known, check_mode, check_positive
from hf_mixup.core.geometry import centred_spans, random_boxes
from hf_mixup.core.plan import Boxes, MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import beta, partners

# how many of time, height and width a box is cut along
AXES = {"space": 2, "time": 1, "spacetime": 3}


@dataclass(frozen=True)
class VideoMix(SamplePolicy):
    """VideoMix (Yun et al., 2020, arXiv:2012.03457), for videos (B, T, C, H, W) only: pastes one box of the partner, in time and space.

    Before clipping, the box has the volume `1 - lam` of the video, with `lam ~ Beta(alpha, alpha)`. Each of the n axes along which it is cut has
    the share `(1 - lam) ** (1 / n)`. The centre is anywhere. The label's weight is the share of voxels that is kept after clipping, as the paper's
    abstract says. We could read only that abstract; the sides are those of public CutMix code for 3-D data.

    A side in time is a whole number of frames, odd numbers too: with few frames, an even side would lose much of the box. Half a side in space is
    a whole number of pixels, as in CutMix's code.

    Args:
        alpha: both parameters of the Beta.
        axes: axes along which the box is cut: `spacetime`, `time` (whole frames), or `space` (the same box in all frames, which is CutMix).
        mode: `sample` draws a box for every video, `pair` for every two videos that exchange parts, `batch` once.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"frames"})

    alpha: float = 1.0
    axes: str = "spacetime"
    mode: str = "sample"

    def __post_init__(self):
        check_positive(alpha=self.alpha)
        check_known("axes", self.axes, AXES)
        check_mode(self.mode)

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        depth, *size = shape[1:]
        frames = signals.frames
        if frames is None or frames < 2:
            seen = "others" if frames is None else "videos of one frame"
            raise ValueError(
                f"VideoMix mixes videos (B, T, C, H, W) of two frames and more, got {seen}; use another method, such as cutmix."
            )
        pairing = partners(shape[0], self.mode, rng)
        side = (1 - beta(self.alpha, pairing.draws, rng)) ** (1 / AXES[self.axes])
        through = None
        if self.axes != "space":
            through = pairing.spread(centred_spans(side, frames, rng) * (depth // frames))
        whole = torch.tensor([0, size[0], 0, size[1]]).expand(pairing.draws, 4)
        edges = whole if self.axes == "time" else random_boxes(side**2, tuple(size), rng)
        boxes = Boxes(pairing.spread(edges), tuple(size), through, depth)
        return MixPlan.pair(pairing.partner, boxes, 1 - boxes.area())
