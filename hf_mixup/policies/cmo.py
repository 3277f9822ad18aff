"""CMO: boxes of rare classes on images of common classes."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_mixup.core.checks import check_class_counts, check_known, check_positive
from hf_mixup.core.geometry import box_plan, random_boxes
from hf_mixup.core.imbalance import rarity
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import beta, categorical


@dataclass(frozen=True)
class CMO(SamplePolicy):
    """CMO, context-rich minority oversampling (Park et al., CVPR 2022, arXiv:2112.00412, algorithm 1; github.com/naver-ai/cmo): CutMix
    whose box comes from an image that is drawn by inverse class frequency. The other image comes from the plain batch.

    The authors mix half of the batches (`mix_rate`), and none in the first four and the last three epochs.

    Deviations: the image of the box is drawn from the batch, with weight `1 / count` of its class, so a class that is missing in the batch is
    never drawn (the authors draw from the whole training set).

    Args:
        alpha: both parameters of the Beta of the area outside the box.
        class_counts: training images of each class. If None, MixupTrainer and MixupCallback read it from the data set,
            and others count the batch.
        mode: `sample` draws a box for every image, `batch` once (the authors' code).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"targets"})

    alpha: float = 1.0
    class_counts: tuple[int, ...] | None = None
    mode: str = "sample"

    def __post_init__(self):
        check_positive(alpha=self.alpha)
        check_class_counts(self.class_counts)
        check_known("mode of cmo", self.mode, ["sample", "batch"])

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        partner, size = categorical(rarity(self.class_counts, signals["targets"]), rng), tuple(shape[2:])
        edges = random_boxes(1 - beta(self.alpha, 1 if self.mode == "batch" else shape[0], rng), size, rng)
        return box_plan(partner, edges.expand(shape[0], -1), size)
