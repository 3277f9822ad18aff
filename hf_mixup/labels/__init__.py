"""Label policies, one file per idea."""

from hf_mixup.labels.align import AlignedLabels
from hf_mixup.labels.area import AreaLabels
from hf_mixup.labels.attention import AttentionLabels
from hf_mixup.labels.progressive import ProgressiveLabels
from hf_mixup.labels.saliency import SaliencyLabels
from hf_mixup.labels.token import TokenLabels

LABEL_POLICIES = (AreaLabels, SaliencyLabels, AttentionLabels, TokenLabels, AlignedLabels, ProgressiveLabels)
