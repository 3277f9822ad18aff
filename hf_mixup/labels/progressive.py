"""Labels by attention, weighted by how well the network predicts (MixPro)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from hf_mixup.core.checks import check_between, check_switch
from hf_mixup.core.plan import MixPlan, mix_targets
from hf_mixup.core.policy import LabelPolicy, Signals
from hf_mixup.labels.attention import attention_shares


@dataclass(frozen=True)
class ProgressiveLabels(LabelPolicy):
    """Progressive attention labels, of MixPro (Zhao et al., ICLR 2023, arXiv:2304.12043; github.com/fistyee/MixPro).

    The weight is `c` times the share of the attention, as in `AttentionLabels`, plus `1 - c` times the area. `c` is the cosine between the
    prediction and the target by area. So the attention counts more as the network learns.

    Deviations:
    1. No gradient goes through the cosine, as in OpenMixup. Otherwise the network would learn to choose its own labels.
    2. The attention is that of the mixed image (OpenMixup reads that of the unmixed own image).

    Args:
        smoothing: smoothing of the target in the cosine; 0.1 in the official code.
        as_published: repeats a bug of the official code: that gradient is kept.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention", "logits", "targets"})

    smoothing: float = 0.1
    as_published: bool = False

    def __post_init__(self):
        check_between(0, 1, smoothing=self.smoothing)
        check_switch(as_published=self.as_published)

    def weights(self, plan: MixPlan, signals: Signals) -> Tensor:
        target = mix_targets(plan, signals["targets"])
        target = (1 - self.smoothing) * target + self.smoothing / target.shape[1]
        logits = signals["logits"].float()
        trust = F.cosine_similarity(target, (logits if self.as_published else logits.detach()).softmax(1))[:, None]
        return trust * attention_shares(plan, signals["attention"]) + (1 - trust) * plan.weight
