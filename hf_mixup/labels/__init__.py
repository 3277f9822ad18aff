"""Label policies, one file per idea; labels by area are `core.policy.AreaLabels`."""

from hf_mixup.labels.align import AlignedLabels
from hf_mixup.labels.attention import AttentionLabels
from hf_mixup.labels.objects import ObjectLabels
from hf_mixup.labels.progressive import ProgressiveLabels
from hf_mixup.labels.rebalanced import RebalancedLabels
from hf_mixup.labels.saliency import SaliencyLabels
from hf_mixup.labels.token import TokenLabels

__all__ = ["AlignedLabels", "AttentionLabels", "ObjectLabels", "ProgressiveLabels", "RebalancedLabels", "SaliencyLabels", "TokenLabels"]
