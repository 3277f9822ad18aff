"""The step of AdAutoMix: in some steps the mixer learns to make the teacher's task hard."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_mixup.core.checks import check_between, check_count
from hf_mixup.core.plan import MixPlan, blend, mix_targets
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import MixKey
from hf_mixup.mixers.masks import check_mixer
from hf_mixup.steps.learned.mixing import Drawn, MixerStep, load_mixer, pick_two
from hf_mixup.steps.learned.state import LearnedState
from hf_mixup.steps.step import Parts


@dataclass(frozen=True)
class AdversarialMixing(MixerStep):
    """AdAutoMix (Qin et al., ICLR 2024, arXiv:2312.11954; github.com/JinXins/Adversarial-AutoMixup): learned masks that make mixtures hard.

    It is AutoMix (see `LearnedMixing`) for any number of images, without the loss on the masks' area. In every `adv_interval`-th step the mixer
    gets `-beta L + (1 - beta) c` instead of the teacher's loss L on its mixtures. Here c is the similarity between the teacher's logits of a
    mixture and those of its images. So the mixer makes mixtures hard and unlike their sources. The sample policy draws images and shares;
    `MultiMixup(alpha=1, mode="batch")` is the published one. With three or more images, mixer and student share one draw of shares, and the
    student is also trained on the plain linear mixture.

    Deviations from the authors' code:
    1. The number of optimizer steps decides which steps are adversarial. (A counter in the network, as there, would be lost on resuming.)
    2. The clean images' logits for c come from the pass that gives the features. (There, every image of the mixture has its own pass. The
       numbers are the same, but here the teacher's batch norms see clean images only once a step.)
    3. `lam_margin` follows the authors. (OpenMixup's port reverses its comparison for three images, so it nearly always trains on the plain
       mixture.)

    Args:
        stage, mixer, lam_margin, switch_off, momentum, end_momentum, momentum_scope, momentum_warmup, eval_net: see `MixerStep`.
        reduction, lam_concat, attention_norm, upsampling: settings of the mixer, see `AdaptiveMask`.
        beta: weight of the loss against the similarity, the paper's beta: CIFAR 0.3, Tiny-ImageNet 0.4, ImageNet 0.1.
        adv_interval: one of this many steps is adversarial, starting with the first; 1 makes all adversarial.
        keep_similar: reverses the sign of c, so that mixtures stay similar to their images, as the paper describes that term.
        mixup_ratio: share of the linear mixture in the student's loss on clean images, for three images or more.
    """

    lam_margin: float = 0.03
    reduction: int = 2
    lam_concat: bool = True
    attention_norm: str = "none"
    upsampling: str | tuple[str, ...] = "bilinear"
    beta: float = 0.3
    adv_interval: int = 2
    keep_similar: bool = False
    mixup_ratio: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        check_mixer(reduction=self.reduction, attention_norm=self.attention_norm, upsampling=self.upsampling)
        check_count(1, adv_interval=self.adv_interval)
        check_between(0, 1, beta=self.beta, mixup_ratio=self.mixup_ratio)

    def make_mixer(self, channels: int) -> nn.Module:
        from hf_mixup.mixers import AdaptiveMask

        if self.mixer is not None:
            return load_mixer(AdaptiveMask, self.mixer, channels)
        return AdaptiveMask(channels, self.reduction, self.lam_concat, self.attention_norm, self.upsampling)

    def plans(self, parts: Parts, shape: torch.Size, rng: torch.Generator, signals: Signals) -> tuple[MixPlan, MixPlan]:
        for_student = parts.sample.plan(shape, rng, signals)
        if for_student.index.shape[1] == 2:
            return for_student, parts.sample.plan(shape, rng, signals)
        own, *others = for_student.index.unbind(1)
        partners = [torch.randperm(shape[0], generator=rng).to(own.device) for _ in others]
        return for_student, replace(for_student, index=torch.stack([own, *partners], 1))

    def settings(self, mixer: nn.Module, rng: torch.Generator) -> tuple[tuple, tuple]:
        return tuple((up,) for up in pick_two(mixer.upsamplings, rng))

    def further(self, rng: torch.Generator, key: MixKey) -> dict[str, Any]:
        return {"adversarial": key.step % self.adv_interval == 0}

    def mixer_loss(self, mask: Tensor, plan: MixPlan, drawn: Drawn, taught: tuple[Tensor, Tensor] | None, clean: Tensor) -> Tensor:
        if taught is None:
            return 0 * mask.sum()
        loss, logits = taught
        if not drawn.adversarial:
            return loss
        similar = similarity(logits, clean, plan) * (-1 if self.keep_similar else 1)
        return -self.beta * loss + (1 - self.beta) * similar

    def clean_loss(self, parts: Parts, state: LearnedState, network: nn.Module, images: Tensor, targets: Tensor, plan: MixPlan) -> Tensor:
        loss = parts.loss(state.student_logits(network, images, clean=True), targets).mean()
        if plan.index.shape[1] == 2 or self.mixup_ratio == 0:
            return loss
        logits = state.student_logits(network, blend(plan, images), clean=False)
        linear_loss = parts.loss(logits, mix_targets(plan, targets), plan).mean()
        return (1 - self.mixup_ratio) * loss + self.mixup_ratio * linear_loss

    @property
    def mixture_weight(self) -> float:
        return 1.0


def similarity(logits: Tensor, clean_logits: Tensor, plan: MixPlan) -> Tensor:
    """A scalar: the mean cosine between the logits (B, num_labels) of mixtures and of their images, weighted by the shares."""
    cosines = F.cosine_similarity(logits.float()[:, None], clean_logits.float()[plan.index], dim=2)
    return (plan.weight * cosines).sum(1).mean()
