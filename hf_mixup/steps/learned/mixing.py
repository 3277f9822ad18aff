"""The common part of AutoMix, SAMix and AdAutoMix: an EMA teacher, and a mixer that learns from the teacher's loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_mixup.core.checks import check_between, check_known
from hf_mixup.core.plan import Dense, MixPlan, blend, mix_targets
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import MixKey
from hf_mixup.mixers.masks import adjust_mask
from hf_mixup.networks.average import ema_momentum
from hf_mixup.steps.learned.state import LearnedState
from hf_mixup.steps.standard import finish
from hf_mixup.steps.step import Parts, Step, StepOutput

EVAL_NETS = ("teacher_onehot", "teacher_mix", "student_onehot", "student_mix")


@dataclass(frozen=True, eq=False)
class Drawn:
    """The draws of a step: two plans and the mixer's settings. All pairs are (the student's, the mixer's).

    Attributes:
        settings: further arguments of the mixer, for each of the two.
        keep: whether the teacher sees mixed images.
        adjust_to: index in `plans` of the lam to which the area of the student's masks is scaled; None does not scale.
        mask_weight: weight of the loss on the masks' area (AutoMix).
        adversarial: whether the mixer makes the teacher's task hard (AdAutoMix).
    """

    plans: tuple[MixPlan, MixPlan]
    settings: tuple[tuple, tuple]
    keep: bool = True
    adjust_to: int | None = None
    mask_weight: float = 0.0
    adversarial: bool = False

    @property
    def one_lam(self) -> bool:
        """Whether the mixer's plan has one lam for the whole batch. Read it on the CPU."""
        weight = self.plans[1].weight
        return bool((weight == weight[:1]).all())


@dataclass(frozen=True)
class MixerStep(Step):
    """A mixer turns a teacher's features of several images into masks; the teacher is an EMA of the student.

    Args:
        stage: of the network, whose features the mixer sees: its name, or its index, from 0, negative from the end. None takes the last
            stage whose maps are larger than the final ones, and the middle block of a plain vision transformer, as published. (Swin is an
            exception: published is -2 of transformers' model, whose maps are as small as the final ones.)
        mixer: folder or Hub id of a trained mixer, used frozen. Its own settings then replace those of the step. The teacher's pass on mixed
            images is left out, since it would train nothing.
        lam_margin: the plan's own masks replace the student's if the own image's share is this close to 0 or 1. 0 uses learned masks at
            every lam.
        switch_off: probability that the teacher sees mixed images in a step. (The name is OpenMixup's, and suggests the
            opposite.) 0.8 skips a fifth of the steps. The choice is the same on all processes.
        momentum, end_momentum, momentum_scope, momentum_warmup: of the teacher, see `ema_momentum`. A momentum of 1.0 never changes the
            teacher.
        eval_net: which network, with which of its heads, is evaluated and saved. The published numbers are the best of the four. With a
            learning rate that ends high (CIFAR) the student is 7 to 8 points worse.
    """

    stage: int | str | None = None
    mixer: str | None = None
    lam_margin: float = 0.08
    switch_off: float = 1.0
    momentum: float = 0.999
    end_momentum: float = 0.999999
    momentum_scope: float = 0.1
    momentum_warmup: bool = True
    eval_net: str = "teacher_onehot"

    def __post_init__(self):
        check_known("eval_net", self.eval_net, EVAL_NETS)
        unit = ("lam_margin", "switch_off", "momentum", "end_momentum", "momentum_scope")
        check_between(0, 1, **{name: getattr(self, name) for name in unit})

    @abstractmethod
    def make_mixer(self, channels: int) -> nn.Module:
        """A new mixer for features of `channels` channels."""

    @abstractmethod
    def plans(self, parts: Parts, shape: torch.Size, rng: torch.Generator, signals: Signals) -> tuple[MixPlan, MixPlan]:
        """The plans of student and mixer, for images of the shape (B, C, H, W)."""

    @abstractmethod
    def settings(self, mixer: nn.Module, rng: torch.Generator) -> tuple[tuple, tuple]:
        """Further arguments of the mixer, for the student and for itself."""

    @abstractmethod
    def further(self, rng: torch.Generator, key: MixKey) -> dict[str, Any]:
        """The other fields of `Drawn`."""

    @abstractmethod
    def mixer_loss(self, mask: Tensor, plan: MixPlan, drawn: Drawn, taught: tuple[Tensor, Tensor] | None, clean: Tensor) -> Tensor:
        """The mixer's loss. Every parameter of the mixer must get a gradient in every step, for DistributedDataParallel.

        Args:
            mask: (B, K, H, W), the mixer's mask.
            plan: the images of the mask.
            taught: the teacher's loss on the mixtures, a scalar, and its logits (B, num_labels); None in a step without them.
            clean: the teacher's logits (B, num_labels) of clean images.
        """

    @abstractmethod
    def clean_loss(self, parts: Parts, state: LearnedState, network: nn.Module, images: Tensor, targets: Tensor, plan: MixPlan) -> Tensor:
        """The student's loss on images without learned masks. `plan` is the student's."""

    @property
    @abstractmethod
    def mixture_weight(self) -> float:
        """Weight of the student's loss on images mixed by learned masks."""

    def run(self, parts: Parts, state: LearnedState, network: nn.Module, images: Tensor, targets: Tensor, key: MixKey) -> StepOutput:
        signals = state.before(images, targets)
        drawn = self.draw(parts, images.shape, signals, state.mixer, key)
        return self.step(parts, state, network, images, targets, signals, drawn)

    def draw(self, parts: Parts, shape: torch.Size, signals: Signals, mixer: nn.Module, key: MixKey) -> Drawn:
        rng, shared = key.own_rng(), key.step_rng()
        plans = self.plans(parts, shape, rng, signals)
        keep = float(torch.rand((), generator=shared)) < self.switch_off
        return Drawn(plans, self.settings(mixer, shared), keep, **self.further(rng, key))

    def step(
        self, parts: Parts, state: LearnedState, network: nn.Module, images: Tensor, targets: Tensor, signals: Signals, drawn: Drawn
    ) -> StepOutput:
        """Runs the step with these draws."""
        size = tuple(images.shape[2:])
        for_student, for_mixer = plans = [plan.to(images.device) for plan in drawn.plans]
        features, clean = state.features(images)
        loss = 0.0
        if state.mixer_learns:
            mask = state.mixer(features, for_mixer.index, for_mixer.weight, size, *drawn.settings[1])
            taught = None
            if drawn.keep:
                plan = replace(for_mixer, mask=Dense(mask), sources=None)
                logits = state.teacher_logits(blend(plan, images), clean=False)
                taught = parts.loss(logits, mix_targets(plan, targets), plan).mean(), logits
            loss = self.mixer_loss(mask, for_mixer, drawn, taught, clean)
        with torch.no_grad():
            mask = state.mixer(features, for_student.index, for_student.weight, size, *drawn.settings[0])
            if drawn.adjust_to is not None:
                mask = adjust_mask(mask, plans[drawn.adjust_to].weight[:, 0])
            plan = self.student_plan(mask, for_student)
        loss = loss + self.clean_loss(parts, state, network, images, targets, for_student)
        mixed = blend(plan, images)
        with state.watching(signals, mixed):
            logits = state.student_logits(network, mixed, clean=False)
        output = finish(parts, plan, logits, targets, signals)
        return output._replace(loss=loss + self.mixture_weight * output.loss, plan=plan)

    def build(self, parts: Parts, network: nn.Module) -> LearnedState:
        return LearnedState.for_parts(parts, network, network, self.stage, self.eval_net.endswith("onehot"), self.make_mixer)

    def student_plan(self, mask: Tensor, plan: MixPlan) -> MixPlan:
        """The plan with the learned mask (B, K, H, W), or with its own mask if the own image's share is within the margin of 0 or 1."""
        return replace(plan, mask=Dense(within_margin(mask, plan, self.lam_margin)), sources=None)

    def deployed(self, state: LearnedState, network: nn.Module) -> nn.Module:
        return state.teacher.network if self.eval_net.startswith("teacher") else network

    def after_optimizer_step(self, state: LearnedState, network: nn.Module, step: int, total_steps: int) -> None:
        schedule = self.momentum, self.end_momentum, self.momentum_scope, self.momentum_warmup
        state.follow(network, ema_momentum(step, total_steps, *schedule))


def pair_plan(parts: Parts, shape: torch.Size, rng: torch.Generator, signals: Signals, no_repeat: bool) -> MixPlan:
    """A plan of the sample policy. `no_repeat`: draws again while an image is its own partner; after ten draws, each image gets one a few
    places further on."""
    for _ in range(10):
        plan = parts.sample.plan(shape, rng, signals)
        if plan.index.shape[1] != 2:
            raise ValueError(
                f"{parts.name!r} mixes two images, got a sample policy that mixes {plan.index.shape[1]}; set another sample policy, or use 'adautomix'."
            )
        if not no_repeat or shape[0] == 1 or not bool((plan.index[:, 0] == plan.index[:, 1]).any()):
            return plan
    own = plan.index[:, 0]
    return replace(plan, index=torch.stack([own, own.roll(int(torch.randint(1, shape[0], (), generator=rng)))], 1))


def load_mixer(cls: type[nn.Module], repo_or_folder: str, channels: int) -> nn.Module:
    """Loads a trained mixer and freezes it. Raises ValueError if it was made for another number of channels."""
    mixer = cls.from_pretrained(repo_or_folder).requires_grad_(False)
    if mixer.channels != channels:
        raise ValueError(
            f"the mixer must fit the network's features of {channels} channels, got {repo_or_folder} for {mixer.channels}; "
            "choose another stage or mixer."
        )
    return mixer


def within_margin(mask: Tensor, plan: MixPlan, margin: float) -> Tensor:
    """The learned mask (B, K, H, W), or the plan's own mask if the own image's share is within `margin` of 0 or 1."""
    lam = plan.weight[:, 0]
    near = (lam <= margin) | (1 - lam <= margin)
    return torch.where(near[:, None, None, None], plan.dense_mask(tuple(mask.shape[2:])).to(mask), mask)


def pick_two(options: Sequence, rng: torch.Generator) -> tuple:
    """One of the options for the student, and one for the mixer."""
    return tuple(options[int(torch.randint(len(options), (), generator=rng))] for _ in range(2))
