"""The images of RecursiveMix."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_mixup.core.checks import check_between, check_known, check_positive
from hf_mixup.core.geometry import random_boxes
from hf_mixup.core.plan import Boxes, MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import partners, uniform


@dataclass(frozen=True)
class RecursivePaste(SamplePolicy):
    """The sample policy of RecursiveMix (Yang et al., NeurIPS 2022, arXiv:2203.06844; github.com/implus/RecursiveMix-pytorch):
    a whole image of the previous step, shrunk into CutMix's box.

    The whole batch has one box. Its area is uniform from 0 to `alpha`, before it is clipped at the border. The label's weight is the area that
    is kept. The signal `history` holds the images that the training step of RecursiveMix remembers.

    Args:
        alpha: the largest share of the image that is pasted, before the box is clipped.
        interpolation: `nearest` or `bilinear` (with corners aligned).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"images", "history"})

    alpha: float = 0.5
    interpolation: str = "nearest"

    def __post_init__(self):
        check_positive(alpha=self.alpha)
        check_between(0, 1, alpha=self.alpha)
        check_known("interpolation", self.interpolation, ["nearest", "bilinear"])

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        partner = partners(shape[0], "batch", rng).partner
        edges = random_boxes(uniform(0, self.alpha, 1, rng), tuple(shape[2:]), rng)
        return recursive_plan(signals["images"], signals["history"], partner, edges, self.interpolation)


def recursive_plan(images: Tensor, history: Tensor, partner: Tensor, edges: Tensor, interpolation: str) -> MixPlan:
    """Pastes `history[partner % len(history)]`, shrunk, into the one box `edges` (1, 4) of all `images`."""
    top, bottom, left, right = edges[0].tolist()
    pasted = torch.zeros_like(images)
    # an empty box mixes nothing
    if bottom > top and right > left:
        corners = True if interpolation == "bilinear" else None
        earlier = history[(partner % len(history)).to(history.device)]
        pasted[:, :, top:bottom, left:right] = F.interpolate(
            earlier, (bottom - top, right - left), mode=interpolation, align_corners=corners
        )
    boxes = Boxes(edges.expand(len(images), 4), tuple(images.shape[2:]))
    return MixPlan.pair(partner, boxes, 1 - boxes.area(), (images, pasted))
