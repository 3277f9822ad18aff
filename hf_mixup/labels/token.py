"""Labels by what of each image's own evidence is still to be seen (TokenMix)."""

from dataclasses import dataclass

from torch import Tensor

from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import LabelPolicy, Signals


@dataclass(frozen=True)
class TokenLabels(LabelPolicy):
    """TokenMix (Liu et al., ECCV 2022, arXiv:2207.08409, section 3.3; github.com/Sense-X/TokenMix).

    A source's weight is the share of the scores of its own clean image that lies where the mixture shows it. Each image's scores
    sum to 1, the weights of a mixture do not: two informative halves make a sum above it. The official recipe trains on them with
    binary cross-entropy (`loss="bce"`).

    Deviations: the official code takes half of the smoothing from either source whatever its weight, which may leave less than
    nothing, where our losses take it from the mixed target; OpenMixup gives each source the scores of the part that is gone.
    """

    needs = frozenset({"token_scores"})

    def weights(self, plan: MixPlan, signals: Signals) -> Tensor:
        scores = signals["token_scores"]
        total = scores.sum((1, 2), keepdim=True)
        # an image of no evidence anywhere is worth the same everywhere
        scores = (scores / total).where(total > 0, 1 / scores[0].numel())
        return (plan.dense_mask(tuple(scores.shape[1:])) * scores[plan.index]).sum((2, 3))
