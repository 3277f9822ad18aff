"""Label policies, one file per idea."""

from hf_mixup.labels.area import AreaLabels

LABEL_POLICIES = (AreaLabels,)
