"""Sample policies, one file per paper."""

from hf_mixup.policies.cutmix import CutMix
from hf_mixup.policies.mixup import Mixup
from hf_mixup.policies.vanilla import Vanilla

SAMPLE_POLICIES = (Vanilla, Mixup, CutMix)
