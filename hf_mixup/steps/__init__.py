"""Training steps: the standard one, and those of the few methods that need their own."""

from hf_mixup.steps.alignmix import AlignMix
from hf_mixup.steps.keepclean import KeepClean
from hf_mixup.steps.learned.adautomix import AdversarialMixing
from hf_mixup.steps.learned.automix import LearnedMixing
from hf_mixup.steps.manifoldmix import ManifoldMix
from hf_mixup.steps.mixstyle import MixStyle
from hf_mixup.steps.moex import MoEx
from hf_mixup.steps.noisymix import NoisyMix
from hf_mixup.steps.patchup import PatchUp
from hf_mixup.steps.recursivemix import RecursiveMix
from hf_mixup.steps.smmixing import SMMixing
from hf_mixup.steps.standard import Standard
from hf_mixup.steps.sumix import SUMix
from hf_mixup.steps.supermix import SuperMix

__all__ = [
    "AdversarialMixing",
    "AlignMix",
    "KeepClean",
    "LearnedMixing",
    "ManifoldMix",
    "MixStyle",
    "MoEx",
    "NoisyMix",
    "PatchUp",
    "RecursiveMix",
    "SMMixing",
    "SUMix",
    "Standard",
    "SuperMix",
]
