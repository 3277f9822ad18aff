"""The signals that methods read from images and networks, in one table, so no step names a signal."""

from hf_mixup.networks.signals.attention import Attention, AttentionLayers, PatchAttention, TokenGrid, TokenScores
from hf_mixup.networks.signals.features import Activation, Features
from hf_mixup.networks.signals.merging import MergedAttention
from hf_mixup.networks.signals.saliency import InputGradient, Saliency
from hf_mixup.networks.signals.signal import Signal

# `images` and `targets` (B, num_labels) are always there, and `logits` for label policies
SIGNALS: dict[str, type[Signal]] = {
    "input_grad": InputGradient,  # before saliency, which is computed from it
    "saliency": Saliency,
    "features": Features,
    "activation": Activation,
    "attention": Attention,
    "token_scores": TokenScores,
    "patch_attention": PatchAttention,
    "merged_attention": MergedAttention,
    "token_grid": TokenGrid,
    "attention_layers": AttentionLayers,
}
