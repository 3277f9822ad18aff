"""Sample policies, one file per paper."""

from hf_mixup.policies.attentivemix import AttentiveMix
from hf_mixup.policies.augmix import AugMix
from hf_mixup.policies.balancedmixup import BalancedMixup
from hf_mixup.policies.classmix import ClassMix
from hf_mixup.policies.cmixup import CMixup
from hf_mixup.policies.cmo import CMO
from hf_mixup.policies.comixup import CoMixup
from hf_mixup.policies.cutmix import CutMix
from hf_mixup.policies.dirichletsets import DirichletSets
from hf_mixup.policies.fixedmixup import FixedMixup
from hf_mixup.policies.fmix import FMix
from hf_mixup.policies.gmix import GMix
from hf_mixup.policies.gridmix import GridMix
from hf_mixup.policies.guidedmixup import GuidedMixup
from hf_mixup.policies.hmix import HMix
from hf_mixup.policies.kmixup import KMixup
from hf_mixup.policies.localmixup import LocalMixup
from hf_mixup.policies.mergemix import MergeMix
from hf_mixup.policies.mixpro import MaskMix
from hf_mixup.policies.mixup import Mixup
from hf_mixup.policies.multimixup import MultiMixup
from hf_mixup.policies.puzzlemix import PuzzleMix
from hf_mixup.policies.recursivepaste import RecursivePaste
from hf_mixup.policies.resizemix import ResizeMix
from hf_mixup.policies.ricap import RICAP
from hf_mixup.policies.saliencygrafting import SaliencyGrafting
from hf_mixup.policies.saliencymix import SaliencyMix
from hf_mixup.policies.smmix import SMMix
from hf_mixup.policies.smoothmix import SmoothMix
from hf_mixup.policies.snapmix import SnapMix
from hf_mixup.policies.splicemix import SpliceMix
from hf_mixup.policies.tlalign import TokenCutMix
from hf_mixup.policies.tokenmix import TokenMix
from hf_mixup.policies.vanilla import Vanilla
from hf_mixup.policies.videomix import VideoMix

__all__ = [
    "CMO",
    "RICAP",
    "AttentiveMix",
    "AugMix",
    "BalancedMixup",
    "CMixup",
    "ClassMix",
    "CoMixup",
    "CutMix",
    "DirichletSets",
    "FMix",
    "FixedMixup",
    "GMix",
    "GridMix",
    "GuidedMixup",
    "HMix",
    "KMixup",
    "LocalMixup",
    "MaskMix",
    "MergeMix",
    "Mixup",
    "MultiMixup",
    "PuzzleMix",
    "RecursivePaste",
    "ResizeMix",
    "SMMix",
    "SaliencyGrafting",
    "SaliencyMix",
    "SmoothMix",
    "SnapMix",
    "SpliceMix",
    "TokenCutMix",
    "TokenMix",
    "Vanilla",
    "VideoMix",
]
