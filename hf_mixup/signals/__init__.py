"""What methods see of images and networks beyond the pixels: one table, so that no step knows any by name."""

from hf_mixup.signals.attention import Attention, PatchAttention, TokenScores
from hf_mixup.signals.features import Activation, Features
from hf_mixup.signals.saliency import InputGradient, Saliency
from hf_mixup.signals.signal import Signal

# `images` is there without asking
SIGNALS: dict[str, type[Signal]] = {
    "input_grad": InputGradient,  # before saliency, which is made of it
    "saliency": Saliency,
    "features": Features,
    "activation": Activation,
    "attention": Attention,
    "token_scores": TokenScores,
    "patch_attention": PatchAttention,
}
