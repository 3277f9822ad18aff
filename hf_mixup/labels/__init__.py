"""Label policies, one file per idea."""

from hf_mixup.labels.area import AreaLabels
from hf_mixup.labels.attention import AttentionLabels
from hf_mixup.labels.saliency import SaliencyLabels

LABEL_POLICIES = (AreaLabels, SaliencyLabels, AttentionLabels)
