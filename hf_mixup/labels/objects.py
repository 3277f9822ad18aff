"""Labels by the visible parts of objects (OA-CutMix)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_mixup.core.checks import check_between, check_known
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import LabelPolicy, Signals


@dataclass(frozen=True)
class ObjectLabels(LabelPolicy):
    """OA-CutMix (Nauen et al., 2026, arXiv:2606.04820; github.com/tobna/oa-cutmix): the label's weight of a source is the visible part of its object.

    The objects are masks in the data set, `object_masks` (B, h, w) of any size. Whole numbers are 0 beside the object, and any other number on it:
    1, 255 or a class number of a segmentation. Floating-point numbers are shares, 0 to 1. It works with CutMix, and any sample policy that
    leaves pixels in place.

    Deviations from the authors' code:
    1. If no object of any source is visible, labels keep the weights of the area. The authors' code gives each image a half (`absolute`), so an
       image without a mask would be half its partner's class even if nothing is pasted, or one image has all (`relative`).
    2. Masks of another size than the images are compared on their own grid (there: resized to the images first).
    3. It has no kind between the two, and does not blur masks.

    Args:
        kind: `absolute` compares visible areas. `relative` compares the visible share of each object, so small objects count as much as large ones.
            With `relative`, an own image without an object is wholly visible, as in the authors' code; a partner without one is not visible.
        rho: the share of the area in the weight, 0 to 1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"object_masks"})

    kind: str = "absolute"
    rho: float = 0.0

    def __post_init__(self):
        check_known("kind", self.kind, ["absolute", "relative"])
        check_between(0, 1, rho=self.rho)

    def weights(self, plan: MixPlan, signals: Signals) -> Tensor:
        if plan.sources is not None:
            raise ValueError(
                "labels by object masks need a sample policy that leaves pixels in place, got one that moves them; use cutmix, or the "
                "label policy 'arealabels'."
            )
        objects = signals["object_masks"]
        # otherwise class 20 of a segmentation weighs 20 times as much as class 1
        objects = (objects if objects.is_floating_point() else objects != 0).float()
        seen = (plan.dense_mask(tuple(objects.shape[1:])) * objects[plan.index]).sum((2, 3))
        shows = (seen > 0).any(1, keepdim=True)
        if self.kind == "relative":
            whole = objects.sum((1, 2))[plan.index]
            # an own image without an object is wholly visible
            without = torch.zeros_like(seen)
            without[:, 0] = shows[:, 0]
            seen = torch.where(whole > 0, seen / whole, without)
        total = seen.sum(1, keepdim=True)
        return self.rho * plan.weight + (1 - self.rho) * torch.where(total > 0, seen / total, plan.weight)
