"""The step of AutoMix and SAMix: a mixer learns the masks, through a teacher that follows the student."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from hf_mixup.core.checks import check_between, check_known
from hf_mixup.core.plan import Dense, blend, mix_targets
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import MixKey
from hf_mixup.mixers.masks import MASK_LOSSES, adjust_mask, check_mixer, mask_loss
from hf_mixup.steps.learned.mixing import Drawn, MixerStep, load_mixer, pair_plan, pick
from hf_mixup.steps.learned.state import LearnedState
from hf_mixup.steps.standard import finish
from hf_mixup.steps.step import Parts, StepOutput

SCHEDULES = ("constant", "cosine", "compounding")


# -- the schedule of the mask loss: a function of the step, so that nothing has to be remembered -----------------------------


def decay(schedule: str, step: int, total_steps: int) -> float:
    """What is left of the weight of the mask loss: 1 at the start. Without a known length of the run it stays there.

    `compounding` multiplies the cosine factors of all steps so far: OpenMixup's hook reads back the value that it wrote.
    It falls to 1/e after 1.3 % of a run of 500,400 steps, so the mask loss is a warm-up there.
    """
    if schedule == "constant" or total_steps == 0:
        return 1.0
    if schedule == "cosine":
        return (1 + math.cos(math.pi * step / total_steps)) / 2
    return float(_compounded(total_steps)[min(step, total_steps)])


@lru_cache(maxsize=2)
def _compounded(total_steps: int) -> Tensor:
    steps = torch.arange(total_steps + 1, dtype=torch.float64)
    return ((1 + (math.pi * steps / total_steps).cos()) / 2).cumprod(0)


# -- the step --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LearnedMixing(MixerStep):
    """AutoMix (Liu et al., ECCV 2022, arXiv:2103.13027) and SAMix (Li et al., arXiv:2111.15454): learned masks.

    github.com/Westlake-AI/openmixup is the authors' code. A Mix Block turns a teacher's features of two images into masks. The
    teacher, an exponential moving average of the student, sees images mixed for the mixer, and its loss, with one on the area of
    the masks, trains the mixer alone. The student sees the clean batch, for a head of its own, and images mixed by the same mixer
    without gradients. So all is one forward and one backward pass; no parameter gets gradients from both sides.

    The method's sample policy draws pairs and lam, anew for student and mixer; its own masks are used where lam is within
    `lam_margin` of 0 or 1. `Mixup(alpha=2, mode="batch")` is the published one: one lam a batch. With a lam for every image the
    masks' areas are also held to it image by image. Labels are weighed by the lam drawn, never by the area that came out.

    Deviations from OpenMixup: the teacher starts with the student's buffers (there: fresh ones); its momentum is warmed up, or a
    short run would evaluate little more than fresh weights (`momentum_warmup=False` for the published one); the student's masks
    are computed without gradients (there: detached after); both pairings avoid fixed points under `no_repeat`, not one of them.

    Args:
        stage, mixer, lam_margin, switch_off, momentum, end_momentum, momentum_scope, momentum_warmup, eval_net: see `MixerStep`.
        reduction, lam_input, lam_mul_k, value_neck, value_norm, value_dropout, x_qk_concat, x_v_concat, attention_norm, upsampling:
            of the mixer, see `MixBlock`. Several `lam_mul_k` or `upsampling` are chosen from at random for every mask.
        mask_loss: weight of the loss on the masks' area.
        mask_loss_mode: `L1`, `L1+Variance`, `L2+Variance` or `Sparsity`.
        mask_loss_margin: how far the area may be from lam.
        mask_loss_schedule: `constant` (CIFAR, Tiny-ImageNet), `cosine` to 0, or `compounding`, which is what the `cosine` of all
            other published runs did: a short warm-up.
        mask_adjust: probability of bringing the student's masks to the area of lam.
        mask_adjust_to: whose lam that is: the `student`'s, or the `mixer`'s, as in OpenMixup, whose runs with mask_adjust train
            on masks of one area and labels of another.
        no_repeat: an image is never mixed with itself (CUB, Aircraft).
        onehot_weight, mix_weight, mixer_weight: of the student's loss on clean images, its loss on mixed ones, and the teacher's.
    """

    reduction: int = 2
    lam_input: str = "concat"
    lam_mul_k: float | tuple[float, ...] = -1.0
    value_neck: bool = False
    value_norm: str = "bn"
    value_dropout: float = 0.0
    x_qk_concat: bool = False
    x_v_concat: bool = False
    attention_norm: str = "none"
    upsampling: str | tuple[str, ...] = "nearest"
    mask_loss: float = 0.1
    mask_loss_mode: str = "L1"
    mask_loss_margin: float = 0.1
    mask_loss_schedule: str = "constant"
    mask_adjust: float = 0.0
    mask_adjust_to: str = "student"
    no_repeat: bool = False
    onehot_weight: float = 1.0
    mix_weight: float = 1.0
    mixer_weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_mixer(**{name: getattr(self, name) for name in CHECKED})
        check_known("mask_loss_mode", self.mask_loss_mode, MASK_LOSSES)
        check_known("mask_loss_schedule", self.mask_loss_schedule, SCHEDULES)
        check_known("mask_adjust_to", self.mask_adjust_to, ["student", "mixer"])
        check_between(0, 1, mask_loss_margin=self.mask_loss_margin, mask_adjust=self.mask_adjust)
        weights = ("mask_loss", "onehot_weight", "mix_weight", "mixer_weight")
        check_between(0, 1e6, **{name: getattr(self, name) for name in weights})

    def make_mixer(self, channels: int) -> nn.Module:
        from hf_mixup.mixers import MixBlock

        if self.mixer is not None:
            return load_mixer(MixBlock, self.mixer, channels)
        return MixBlock(channels, **{name: getattr(self, name) for name in MIXBLOCK})

    def run(self, parts: Parts, state: LearnedState, network: nn.Module, images: Tensor, targets: Tensor, key: MixKey) -> StepOutput:
        signals = state.before(images, targets)
        drawn = self.draw(parts, images.shape, signals, state.mixer, key)
        mask_weight = self.mask_loss * decay(self.mask_loss_schedule, key.step, key.total_steps)
        return self.step(parts, state, network, images, targets, signals, drawn, mask_weight)

    def draw(self, parts: Parts, shape: torch.Size, signals: Signals, mixer: nn.Module, key: MixKey) -> Drawn:
        rng, shared = key.own_rng(), key.step_rng()
        plans = tuple(pair_plan(parts, shape, rng, signals, self.no_repeat) for _ in range(2))
        adjust = float(torch.rand((), generator=rng)) < self.mask_adjust
        keep = float(torch.rand((), generator=shared)) < self.switch_off
        k = pick(mixer.lam_mul_ks, shared), pick(mixer.lam_mul_ks, shared)
        ups = pick(mixer.upsamplings, shared), pick(mixer.upsamplings, shared)
        return Drawn(plans, ups, k, keep, adjust)

    def step(
        self,
        parts: Parts,
        state: LearnedState,
        network: nn.Module,
        images: Tensor,
        targets: Tensor,
        signals: Signals,
        drawn: Drawn,
        mask_weight: float,
    ) -> StepOutput:
        """The step for what was drawn."""
        one_lam, size = drawn.one_lam, tuple(images.shape[2:])
        for_student, for_mixer = (plan.to(images.device) for plan in drawn.plans)
        features, _ = state.features(images)
        loss = 0.0
        if state.mixer_learns:
            lam = for_mixer.weight[:, 0]
            mask = state.mixer(features, for_mixer.index, for_mixer.weight, size, drawn.upsampling[1], drawn.k[1])
            # in the graph even at weight 0: every parameter must get a gradient in every step, for DistributedDataParallel
            loss = mask_weight * mask_loss(mask, lam, self.mask_loss_mode, self.mask_loss_margin, per_sample=not one_lam)
            if drawn.keep:
                plan = replace(for_mixer, mask=Dense(mask), sources=None)
                logits = state.teacher_logits(blend(plan, images), clean=False)
                loss = loss + self.mixer_weight * parts.loss(logits, mix_targets(plan, targets), plan).mean()
        with torch.no_grad():
            mask = state.mixer(features, for_student.index, for_student.weight, size, drawn.upsampling[0], drawn.k[0])
            if drawn.adjust:
                held_to = for_student if self.mask_adjust_to == "student" else for_mixer
                mask = adjust_mask(mask, held_to.weight[:, 0])
            plan = self.student_plan(mask, for_student)
        loss = loss + self.onehot_weight * parts.loss(state.student_logits(network, images, clean=True), targets).mean()
        mixed = blend(plan, images)
        with state.watching(signals, mixed):
            logits = state.student_logits(network, mixed, clean=False)
        output = finish(parts, plan, logits, targets, signals)
        return output._replace(loss=loss + self.mix_weight * output.loss, plan=plan)


MIXBLOCK = (
    "reduction",
    "lam_input",
    "lam_mul_k",
    "value_neck",
    "value_norm",
    "value_dropout",
    "x_qk_concat",
    "x_v_concat",
    "attention_norm",
    "upsampling",
)
CHECKED = tuple(name for name in MIXBLOCK if name not in ("value_neck", "x_v_concat"))
