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
    """VideoMix (Yun et al., 2020, arXiv:2012.03457), for videos (B, T, C, H, W) alone: paste one box in time and space of the partner.

    The box has volume `1 - lam` of the video, `lam ~ Beta(alpha, alpha)`, the same share `(1 - lam) ** (1 / n)` of each of the n axes that it is
    cut along, and a centre anywhere. It is clipped at the border, and the label's weight is the share of voxels really kept.

    Deviation: a side in time is a whole number of frames, odd ones too, because videos of few frames would lose much of a box otherwise; sides in
    space are halved in whole pixels, as in CutMix's code.

    Args:
        alpha: both parameters of the Beta.
        axes: what is cut: `spacetime` (the paper's ST-VideoMix), `time`, whole frames (T-VideoMix), or `space`, in all frames alike (S-VideoMix), which
            is CutMix.
        mode: `sample` draws a box for every video, `pair` for every two that change places, `batch` once.
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
