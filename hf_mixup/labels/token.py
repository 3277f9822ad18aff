"""Labels by the visible share of each image's own evidence (TokenMix)."""

from dataclasses import dataclass

from torch import Tensor

from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import LabelPolicy, Signals


@dataclass(frozen=True)
class TokenLabels(LabelPolicy):
    """TokenMix (Liu et al., ECCV 2022, arXiv:2207.08409, section 3.3; github.com/Sense-X/TokenMix).

    A source's weight is the share of the scores of its own clean image at the places where the mixture shows it. The scores of each image sum
    to 1, but the weights of a mixture do not: two informative halves give a sum above 1. The official recipe trains on them with binary
    cross-entropy (`loss="bce"`).

    Deviations: our losses smooth the mixed target (the official code takes half of the smoothing from each source, so a weight may become
    negative); each source has the scores of its visible part (OpenMixup uses those of the hidden part).
    """

    needs = frozenset({"token_scores"})

    def weights(self, plan: MixPlan, signals: Signals) -> Tensor:
        scores = signals["token_scores"]
        total = scores.sum((1, 2), keepdim=True)
        # an image without any evidence counts the same everywhere
        scores = (scores / total).where(total > 0, 1 / scores[0].numel())
        return (plan.dense_mask(tuple(scores.shape[1:])) * scores[plan.index]).sum((2, 3))
