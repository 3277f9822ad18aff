"""The step of AdAutoMix: the mixer learns to make the student's task hard, by turns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_mixup.core.checks import check_between, check_count, check_known
from hf_mixup.core.plan import Dense, MixPlan, blend, mix_targets
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import MixKey
from hf_mixup.mixers.masks import check_mixer
from hf_mixup.steps.learned import EVAL_NETS, Drawn, LearnedState, ema_momentum, load_mixer, pick, within_margin
from hf_mixup.steps.standard import finish
from hf_mixup.steps.step import Step, StepOutput

if TYPE_CHECKING:
    from hf_mixup.methods import Method


@dataclass(frozen=True)
class AdversarialMixing(Step):
    """AdAutoMix (Qin et al., ICLR 2024, arXiv:2312.11954; github.com/JinXins/Adversarial-AutoMixup): masks that challenge.

    As AutoMix (see `LearnedMixing`), but of any number of images, without a loss on the masks' area, and every `adv_interval`-th
    step the mixer gets `-beta L + (1 - beta) c` in the place of the teacher's loss L on its mixtures: c is how similar the
    teacher's logits of a mixture are to those of its images. So the mixer makes mixtures hard and unlike their sources. The
    sample policy draws images and shares; `MultiMixup(alpha=1, mode="batch")` is the published one. Of three images or more,
    mixer and student share one draw of shares, and the student is also trained on the plain linear mixture.

    Deviations from the authors' code: which steps are adversarial follows from the number of optimizer steps, where a counter in the
    network would be lost on resuming; the clean images' logits for c are those of the pass that gives the features, where every
    image of the mixture costs a pass of its own (the same numbers, but the teacher's batch norms see clean images once a step).
    OpenMixup's port turns the comparison of `lam_margin` round for three images and so trains on the plain mixture nearly always;
    we follow the authors.

    Args:
        stage: see `LearnedMixing`.
        reduction, lam_concat, attention_norm, upsampling: of the mixer, see `AdaptiveMask`.
        mixer: folder or Hub id of a trained `AdaptiveMask`, used frozen; see `LearnedMixing`.
        beta: weight of the loss against the similarity, the papers' beta: CIFAR 0.3, Tiny-ImageNet 0.4, ImageNet 0.1.
        adv_interval: one step of so many is adversarial, the first one included; 1 makes all so.
        keep_similar: turns the sign of c round, so that mixtures stay like their images: what the paper says of that term.
        mixup_ratio: share of the linear mixture in the student's loss on clean images, for three images or more.
        lam_margin: the linear mixture stands in for the student's masks where the own image's share is this near 0 or 1.
        switch_off, momentum, end_momentum, momentum_scope, momentum_warmup, eval_net: see `LearnedMixing`.
    """

    stage: int | str | None = None
    reduction: int = 2
    lam_concat: bool = True
    attention_norm: str = "none"
    upsampling: str | tuple[str, ...] = "bilinear"
    mixer: str | None = None
    beta: float = 0.3
    adv_interval: int = 2
    keep_similar: bool = False
    mixup_ratio: float = 0.5
    lam_margin: float = 0.03
    switch_off: float = 1.0
    momentum: float = 0.999
    end_momentum: float = 0.999999
    momentum_scope: float = 0.1
    momentum_warmup: bool = True
    eval_net: str = "teacher_onehot"

    def __post_init__(self):
        check_mixer(reduction=self.reduction, attention_norm=self.attention_norm, upsampling=self.upsampling)
        check_count(1, adv_interval=self.adv_interval)
        check_known("eval_net", self.eval_net, EVAL_NETS)
        unit = ("beta", "mixup_ratio", "lam_margin", "switch_off", "momentum", "end_momentum", "momentum_scope")
        check_between(0, 1, **{name: getattr(self, name) for name in unit})

    def build(self, method: Method, backbone: nn.Module) -> LearnedState:
        return LearnedState.for_method(method, backbone, backbone, self.stage, self.eval_net.endswith("onehot"), self._make_mixer)

    def _make_mixer(self, channels: int) -> nn.Module:
        from hf_mixup.mixers import AdaptiveMask

        if self.mixer is not None:
            return load_mixer(AdaptiveMask, self.mixer, channels)
        return AdaptiveMask(channels, self.reduction, self.lam_concat, self.attention_norm, self.upsampling)

    def run(self, method: Method, state: LearnedState, backbone: nn.Module, images: Tensor, targets: Tensor, key: MixKey) -> StepOutput:
        signals = state.before(images, targets)
        drawn = self.draw(method, images.shape, signals, state.mixer, key)
        return self.step(method, state, backbone, images, targets, signals, drawn, adversarial=key.step % self.adv_interval == 0)

    def draw(self, method: Method, shape: torch.Size, signals: Signals, mixer: nn.Module, key: MixKey) -> Drawn:
        rng, shared = key.own_rng(), key.step_rng()
        for_student = method.sample.plan(shape, rng, signals)
        if for_student.index.shape[1] == 2:
            for_mixer = method.sample.plan(shape, rng, signals)
        else:
            own, *others = for_student.index.unbind(1)
            partners = [torch.randperm(shape[0], generator=rng).to(own.device) for _ in others]
            for_mixer = replace(for_student, index=torch.stack([own, *partners], 1))
        keep = float(torch.rand((), generator=shared)) < self.switch_off
        return Drawn((for_student, for_mixer), (pick(mixer.upsamplings, shared), pick(mixer.upsamplings, shared)), keep=keep)

    def step(
        self,
        method: Method,
        state: LearnedState,
        backbone: nn.Module,
        images: Tensor,
        targets: Tensor,
        signals: Signals,
        drawn: Drawn,
        adversarial: bool,
    ) -> StepOutput:
        """The step for what was drawn."""
        size = tuple(images.shape[2:])
        for_student, for_mixer = (plan.to(images.device) for plan in drawn.plans)
        features, clean_logits = state.features(images)
        loss = 0.0
        if state.mixer_learns:
            mask = state.mixer(features, for_mixer.index, for_mixer.weight, size, drawn.upsampling[1])
            plan = replace(for_mixer, mask=Dense(mask), sources=None)
            if drawn.keep:
                logits = state.teacher_logits(blend(plan, images), clean=False)
                loss = method.loss(logits, mix_targets(plan, targets), plan).mean()
                if adversarial:
                    similar = similarity(logits, clean_logits, plan) * (-1 if self.keep_similar else 1)
                    loss = -self.beta * loss + (1 - self.beta) * similar
            else:
                # in the graph: every parameter must get a gradient in every step, for DistributedDataParallel
                loss = 0 * mask.sum()
        with torch.no_grad():
            mask = state.mixer(features, for_student.index, for_student.weight, size, drawn.upsampling[0])
            plan = replace(for_student, mask=Dense(within_margin(mask, for_student, self.lam_margin)), sources=None)
        onehot_loss = method.loss(state.student_logits(backbone, images, clean=True), targets).mean()
        if for_student.index.shape[1] > 2 and self.mixup_ratio > 0:
            logits = state.student_logits(backbone, blend(for_student, images), clean=False)
            linear_loss = method.loss(logits, mix_targets(for_student, targets), for_student).mean()
            onehot_loss = (1 - self.mixup_ratio) * onehot_loss + self.mixup_ratio * linear_loss
        logits = state.student_logits(backbone, blend(plan, images), clean=False)
        output = finish(method, state, plan, logits, targets, signals)
        return output._replace(loss=loss + onehot_loss + output.loss, plan=plan)

    def deployed(self, state: LearnedState, backbone: nn.Module) -> nn.Module:
        return state.teacher if self.eval_net.startswith("teacher") else backbone

    def after_optimizer_step(self, state: LearnedState, backbone: nn.Module, step: int, total_steps: int) -> None:
        schedule = self.momentum, self.end_momentum, self.momentum_scope, self.momentum_warmup
        state.follow(backbone, ema_momentum(step, total_steps, *schedule))


def similarity(logits: Tensor, clean_logits: Tensor, plan: MixPlan) -> Tensor:
    """The mean cosine between logits (B, num_labels) of mixtures and those of their images, weighed by the shares. A scalar."""
    cosines = F.cosine_similarity(logits.float()[:, None], clean_logits.float()[plan.index], dim=2)
    return (plan.weight * cosines).sum(1).mean()
