"""ClassMix."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_mixup.core.checks import check_mode
from hf_mixup.core.geometry import dense_pair
from hf_mixup.core.plan import Dense, MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import partners


@dataclass(frozen=True)
class ClassMix(SamplePolicy):
    """ClassMix (Olsson et al., WACV 2021, arXiv:2007.07936; github.com/WilhelmT/ClassMix), for semantic segmentation: half of the classes of the
    own label map are cut out along their borders and pasted onto the partner.

    Of n classes in the map, n // 2 random ones are kept. So an image with one class is replaced by its partner. Ignored pixels are not a
    class; they come from the partner. The label's weight is the area that is kept. In the authors' code, which trains on images without
    labels, the map is the network's prediction. Here it is the label map, as in their mixing of labelled images.

    Deviation: partners are drawn (the authors' code pastes every image onto the next one of the batch).

    Args:
        ignore_index: the value of pixels without a label, 255 or -100 in most data sets. All negative values are ignored too.
        mode: `sample` and `batch` permute the batch, `pair` swaps images two by two. Classes are drawn for every image.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"maps"})

    ignore_index: int = 255
    mode: str = "sample"

    def __post_init__(self):
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            raise ValueError(
                f"ignore_index must be a whole number, got {self.ignore_index!r}; give the value of the label maps, such as 255."
            )
        check_mode(self.mode)

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        maps, size = signals["maps"].long(), tuple(shape[2:])
        pairing = partners(shape[0], self.mode, rng)
        classes = max(int(maps.max()) + 1, 1)
        labelled = (maps != self.ignore_index) & (maps >= 0)
        seen = torch.where(labelled, maps, classes).flatten(1)
        there = torch.zeros(len(maps), classes + 1, dtype=torch.bool, device=maps.device).scatter_(1, seen, True)[:, :classes]
        # the first half of the classes of the map, in random order
        order = torch.where(there, torch.rand(there.shape, generator=rng).to(maps.device), 2.0).argsort(1).argsort(1)
        kept = there & (order < there.sum(1, keepdim=True) // 2)
        own = torch.cat([kept, kept.new_zeros(len(kept), 1)], 1).gather(1, seen).view(maps.shape)
        own = Dense(own[:, None]).dense(size)[:, 0]
        mask = dense_pair(own, torch.arange(len(maps)))
        return MixPlan.pair(pairing.partner.to(own.device), mask, own.double().mean((1, 2)))
