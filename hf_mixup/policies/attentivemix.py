"""AttentiveMix."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_mixup.core.checks import check_count, check_mode, check_places, check_positive
from hf_mixup.core.geometry import dense_pair
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import beta, partners


@dataclass(frozen=True)
class AttentiveMix(SamplePolicy):
    """Attentive CutMix (Walawalkar et al., ICASSP 2020, arXiv:2003.13048; github.com/xden2331/attentive_cutmix) in the form of
    OpenMixup's AttentiveMix+: pastes the most active cells of the own image onto the partner.

    The activity of a cell is the mean over channels of a teacher's last feature map. `lam ~ Beta(alpha, beta)` of the cells are kept, at least
    one. The label's weight of each image is the share of its own mask. With `top_k=6`, a ResNet-50 teacher and `teacher_size=224` it is the
    original method, except that the original reads the last channel only.

    Deviations from OpenMixup:
    1. Each image has its own label weight (OpenMixup uses the first image's weight for the whole batch).
    2. The teacher's batch statistics do not change.

    Args:
        alpha: first parameter of the Beta.
        beta: second parameter. OpenMixup documents 8; its code, and so its published tables, used alpha instead, which is 2.
        top_k: a fixed number of cells, used instead of lam.
        teacher: Hub id or folder of a frozen image classifier; None for the network in training.
        teacher_size: side in pixels to which images are resized for the teacher.
        mode: which images share a draw of lam.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"features"})

    alpha: float = 2.0
    beta: float = 8.0
    top_k: int | None = None
    teacher: str | None = None
    teacher_size: int | None = None
    mode: str = "sample"

    def __post_init__(self):
        check_positive(alpha=self.alpha, beta=self.beta)
        for name in ("top_k", "teacher_size"):
            if getattr(self, name) is not None:
                check_count(1, **{name: getattr(self, name)})
        check_mode(self.mode)

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        features = signals["features"]
        check_places(tuple(features.shape[2:]))
        pairing = partners(shape[0], self.mode, rng)
        lam = pairing.spread(beta(self.alpha, pairing.draws, rng, self.beta))
        cells = features[0, 0].numel()
        count = (lam * cells).long() if self.top_k is None else torch.full_like(lam, self.top_k, dtype=torch.int64)
        return attentive_plan(features, pairing.partner, count.clamp(1, cells), tuple(shape[2:]))


def attentive_plan(features: Tensor, partner: Tensor, count: Tensor, size: tuple[int, int]) -> MixPlan:
    """Keeps the `count` (B,) most active cells of the features (B, C, h, w), enlarged to images of `size` (H, W)."""
    grid = tuple(features.shape[2:])
    activity = features.float().mean(1).flatten(1)
    rank = activity.argsort(dim=1, descending=True, stable=True).argsort(1)
    kept = (rank < count.to(rank.device)[:, None]).unflatten(1, grid)
    mask = dense_pair(kept, torch.arange(len(partner)))
    mask = type(mask)(mask.dense(size))
    # counted in pixels, because cells differ in size if the grid does not divide the image
    return MixPlan.pair(partner, mask, mask.value[:, 0].double().mean((1, 2)))
