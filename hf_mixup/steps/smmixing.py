"""The step of SMMix: it also classifies the two parts of the mixture, and compares the whole with the clean images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_mixup.core.checks import check_between
from hf_mixup.core.losses import Loss
from hf_mixup.core.plan import MixPlan, blend
from hf_mixup.core.rng import MixKey
from hf_mixup.networks.families import Layout, classifier_of, family_of, module_of, stage_names
from hf_mixup.networks.passes import output_of, watched
from hf_mixup.steps.standard import finish
from hf_mixup.steps.step import MethodState, Parts, Step, StepOutput


class TokenState(MethodState):
    """A second classifier, for means of patches. It is not part of the deployed network."""

    def __init__(self, network: nn.Module):
        super().__init__()
        norm = family_of(network).norm
        self.layout = Layout.of(network)
        self.last = (
            module_of(network, norm or stage_names(network)[-1]),
        )  # in a tuple, so that it is not registered as a module of the state
        classifier = classifier_of(network)
        self.token_head = nn.Linear(classifier.in_features, classifier.out_features).to(classifier.weight)

    @property
    def watched(self) -> list[nn.Module]:
        return [*super().watched, *self.last]


@dataclass(frozen=True)
class SMMixing(Step):
    """The training step of SMMix (arXiv:2212.12977, section 3.3; github.com/ChenMnZ/SMMix), for its sample policy.

    It adds two losses to the loss of the mixture. The fine-grained loss is the mean loss of the two parts: their patches are pooled by the mask
    and classified by a second head. The consistency loss is the divergence from the mixed logits of the clean images. Both have weight 1 in the
    official code. OpenMixup trains on the mixture's loss only.

    Args:
        fine, consistency: weights of these losses; with both 0 only the mixture's loss is used.
    """

    fine: float = 1.0
    consistency: float = 1.0

    def __post_init__(self):
        check_between(0, 1e3, fine=self.fine, consistency=self.consistency)

    def build(self, parts: Parts, network: nn.Module) -> TokenState:
        if "patch_attention" not in parts.sample.needs:
            raise ValueError(f"the step 'smmixing' needs the sample policy 'smmix', got {type(parts.sample).__name__}; set both.")
        return TokenState.for_parts(parts, network, network)

    def run(self, parts: Parts, state: TokenState, network: nn.Module, images: Tensor, targets: Tensor, key: MixKey) -> StepOutput:
        signals = state.before(images, targets)
        plan = parts.plan(images, key.own_rng(), signals)
        mixed = blend(plan, images)
        with state.watching(signals, mixed):
            logits, (output,) = watched(network, mixed, [output_of(state.last[0])])
        tokens = state.layout.maps(output, tuple(images.shape[2:]))
        done = finish(parts, plan, logits, targets, signals)
        pooled = pooled_parts(tokens, plan).to(state.token_head.weight.dtype)
        fine = fine_grained_loss(state.token_head(pooled), plan, targets, parts.loss)
        loss = done.loss + self.fine * fine + self.consistency * consistency_loss(logits, signals["clean_logits"], plan)
        return done._replace(loss=loss)


def pooled_parts(tokens: Tensor, plan: MixPlan) -> Tensor:
    """(B, K, C) float32: the mean of the tokens (B, C, h, w) over each source's part of the mixture."""
    mask = plan.dense_mask(tuple(tokens.shape[2:])).flatten(2)
    with torch.autocast(tokens.device.type, enabled=False):
        return mask @ tokens.float().flatten(2).mT / mask.sum(2, keepdim=True).clamp(min=1)


def fine_grained_loss(logits: Tensor, plan: MixPlan, targets: Tensor, loss: Loss) -> Tensor:
    """The mean loss of the parts; `logits` are (B, K, num_labels), and each part has its source's whole target."""
    sources = targets[plan.index]
    return torch.stack([loss(logits[:, k], sources[:, k]) for k in range(sources.shape[1])]).mean()


def consistency_loss(logits: Tensor, clean: Tensor, plan: MixPlan) -> Tensor:
    """The divergence between the prediction and that of the clean images, whose logits are mixed by area before the softmax."""
    mixed = (plan.weight[:, :, None] * clean.float()[plan.index]).sum(1)
    return F.kl_div(logits.float().log_softmax(1), mixed.softmax(1), reduction="batchmean")
