"""Labels by area: what the sample policy measured."""

from dataclasses import dataclass

from torch import Tensor

from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import LabelPolicy, Signals


@dataclass(frozen=True)
class AreaLabels(LabelPolicy):
    """The weights of the plan itself: the share of each image that is visible."""

    def weights(self, plan: MixPlan, signals: Signals) -> Tensor:
        return plan.weight
