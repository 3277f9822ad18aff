"""SnapMix."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_mixup.core.checks import check_mode, check_positive
from hf_mixup.core.geometry import random_boxes
from hf_mixup.core.plan import Boxes, MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import beta, partners


@dataclass(frozen=True)
class SnapMix(SamplePolicy):
    """SnapMix (Huang et al., AAAI 2021, arXiv:2012.04846; github.com/Shaoli-Huang/SnapMix): a box of the partner is resized and pasted into
    another box. The label's weights are the shares of each image's class activation map that are visible.

    Both boxes have the area `1 - lam`, with `lam ~ Beta(alpha, alpha)`, and are clipped at the border. The own label has the weight
    `1 - S_i(target box)`, the partner's label `S_j(source box)`, so weights need not sum to 1. If either box is empty, nothing is pasted. If an
    image has no map (it is constant, or has one place), the area is used instead. OpenMixup's version does not run.

    Deviations: the maps are computed in evaluation mode (the authors' pass in training mode updates the batch statistics once more).

    Args:
        alpha: both parameters of the Betas.
        mode: which images share boxes; `batch` is the authors' code.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"images", "activation", "targets"})

    alpha: float = 5.0
    mode: str = "sample"

    def __post_init__(self):
        check_positive(alpha=self.alpha)
        check_mode(self.mode)

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        size = tuple(shape[2:])
        pairing = partners(shape[0], self.mode, rng)
        into, taken = (pairing.spread(random_boxes(1 - beta(self.alpha, pairing.draws, rng), size, rng)) for _ in range(2))
        maps = semantic_maps(signals["activation"], size)
        # if both images have one class, each gets the sum of both weights, so twice the total, as in the authors' code
        return snap_plan(signals["images"], pairing.partner, into, taken, maps, signals["targets"])


def semantic_maps(activation: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H, W) float32: class activation maps (B, h, w), enlarged, with a minimum of 0 and a sum of 1; NaN where they are constant."""
    maps = F.interpolate(activation.float()[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / maps.sum((1, 2), keepdim=True)


def snap_plan(images: Tensor, partner: Tensor, into: Tensor, taken: Tensor, maps: Tensor, targets: Tensor | None) -> MixPlan:
    """Pastes the box `taken` (B, 4) of each partner into the box `into` (B, 4).

    Args:
        maps: (B, H, W), see `semantic_maps`.
        targets: (B, num_labels), to double the weights of pairs with one class.
    """
    size = tuple(images.shape[2:])
    empty = (Boxes(into, size).area() == 0) | (Boxes(taken, size).area() == 0)
    into = torch.where(empty[:, None], torch.zeros_like(into), into)
    taken = torch.where(empty[:, None], torch.zeros_like(taken), taken)
    sources = images, _pasted(images, partner, into, taken)
    boxes, partner = Boxes(into, size), partner.to(images.device)
    hidden, shown = _mass(maps, boxes), _mass(maps[partner], Boxes(taken, size))
    own = 1 - hidden
    if targets is not None:
        same = (targets * targets[partner]).sum(1) * ~empty.to(images.device)
        own, shown = own + same * shown, shown + same * own
    index = torch.stack([torch.arange(len(images), device=images.device), partner], 1)
    return MixPlan(index, boxes, torch.stack([own, shown], 1), sources)


def _mass(maps: Tensor, boxes: Boxes) -> Tensor:
    """(B,): the share of each map that lies in its box; the share of the area for images without a map."""
    inside = Boxes(boxes.edges.to(maps.device), boxes.size).inside(boxes.size)
    area = boxes.area().to(maps.device).float()
    mass = torch.where(inside, maps, 0).sum((1, 2))
    # the sum over an empty box is 0 for every map
    return torch.where(maps[:, 0, 0].isnan(), area, mass)


def _pasted(images: Tensor, partner: Tensor, into: Tensor, taken: Tensor) -> Tensor:
    """(B, C, H, W): in the box `into`, the partner's box `taken`, resized bilinearly with corners aligned."""
    moved = images[partner.to(images.device)]
    for dim, length in ((2, images.shape[2]), (3, images.shape[3])):
        start, end, first, last = (edges[:, 2 * (dim - 2) + side, None] for edges in (into, taken) for side in (0, 1))
        stretch = (last - first - 1).double() / (end - start - 1).clamp(min=1)
        at = first + (torch.arange(length) - start) * stretch.clamp(min=0)
        at = at.clamp(min=first.double(), max=(last - 1).clamp(min=first).double())
        low = at.floor().long()
        high = (low + 1).clamp(max=length - 1)
        share, low, high = (
            (value[:, None, :, None] if dim == 2 else value[:, None, None]).to(images.device) for value in (at - low, low, high)
        )
        expanded = [*moved.shape]
        moved = torch.lerp(moved.gather(dim, low.expand(expanded)), moved.gather(dim, high.expand(expanded)), share.to(moved.dtype))
    return moved
