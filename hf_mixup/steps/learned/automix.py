"""The step of AutoMix and SAMix: a mixer learns the masks, through a teacher that follows the student."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from hf_mixup.core.checks import check_between, check_known, check_switch
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import MixKey
from hf_mixup.mixers.masks import MASK_LOSSES, check_mixer, mask_loss
from hf_mixup.steps.learned.mixing import Drawn, MixerStep, load_mixer, pair_plan, pick_two
from hf_mixup.steps.learned.state import LearnedState
from hf_mixup.steps.step import Parts

SCHEDULES = ("constant", "cosine")


# -- the schedule of the mask loss: a function of the step, so it needs no state -----------------------------


def decay(schedule: str, step: int, total_steps: int, *, compounding: bool = False) -> float:
    """The factor of the mask loss: 1 at the start. If the length of the run is unknown it stays 1.

    `compounding` multiplies the cosine factors of all steps so far, because OpenMixup's hook reads back the value that it wrote. The
    weight falls to 1/e after 1.3 % of a run of 500,400 steps, so the mask loss is only a warm-up there.
    """
    if schedule == "constant" or total_steps == 0:
        return 1.0
    if not compounding:
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

    github.com/Westlake-AI/openmixup is the authors' code. A Mix Block turns a teacher's features of two images into masks. The teacher is an
    EMA of the student. It sees images that are mixed for the mixer; its loss, and a loss on the area of the masks, train only the mixer. The
    student sees the clean batch, for a second head, and images mixed by the same mixer without gradients. So a step has one forward and one
    backward pass, and no parameter gets gradients from both sides.

    The method's sample policy draws pairs and lam, separately for student and mixer. Its own masks are used if lam is within `lam_margin` of
    0 or 1. `Mixup(alpha=2, mode="batch")` is the published one, with one lam for the batch. If every image has its own lam, the loss on the
    masks' area is computed for each image too. The label's weight is the drawn lam, never the area of the mask.

    Deviations from OpenMixup:
    1. The teacher starts with the student's buffers (there, with fresh ones).
    2. The teacher's momentum is warmed up. Otherwise a short run would evaluate nearly fresh weights. `momentum_warmup=False` is the
       published form.
    3. The student's masks are computed without gradients (there, they are detached later).
    4. With `no_repeat` no image is paired with itself in either pairing (there, in only one of them).

    Args:
        stage, mixer, lam_margin, switch_off, momentum, end_momentum, momentum_scope, momentum_warmup, eval_net: see `MixerStep`.
        reduction, lam_input, lam_mul_k, value_neck, value_norm, value_dropout, x_qk_concat, x_v_concat, attention_norm, upsampling:
            settings of the mixer, see `MixBlock`. With several `lam_mul_k` or `upsampling`, each mask draws one.
        mask_loss: weight of the loss on the masks' area.
        mask_loss_mode: `L1`, `L1+Variance`, `L2+Variance` or `Sparsity`.
        mask_loss_margin: how far the area may be from lam.
        mask_loss_schedule: `constant` (CIFAR, Tiny-ImageNet), or `cosine` to 0 (all other published runs).
        mask_adjust: probability that the student's masks are scaled to the area of its lam.
        as_published: repeats two bugs of OpenMixup that its tables were trained with. Its `cosine` compounds, so the loss on the masks' area is
            a short warm-up, see `decay`. Its `mask_adjust` takes the mixer's lam, so the area of the masks differs from the labels.
        no_repeat: an image is never mixed with itself (CUB, Aircraft).
        onehot_weight, mix_weight, mixer_weight: weights of the student's loss on clean images, its loss on mixed images, and the teacher's loss.
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
    as_published: bool = False
    no_repeat: bool = False
    onehot_weight: float = 1.0
    mix_weight: float = 1.0
    mixer_weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_mixer(**{name: getattr(self, name) for name in CHECKED})
        check_known("mask_loss_mode", self.mask_loss_mode, MASK_LOSSES)
        check_known("mask_loss_schedule", self.mask_loss_schedule, SCHEDULES)
        check_switch(as_published=self.as_published)
        check_between(0, 1, mask_loss_margin=self.mask_loss_margin, mask_adjust=self.mask_adjust)
        weights = ("mask_loss", "onehot_weight", "mix_weight", "mixer_weight")
        check_between(0, 1e6, **{name: getattr(self, name) for name in weights})

    def make_mixer(self, channels: int) -> nn.Module:
        from hf_mixup.mixers import MixBlock

        if self.mixer is not None:
            return load_mixer(MixBlock, self.mixer, channels)
        return MixBlock(channels, **{name: getattr(self, name) for name in MIXBLOCK})

    def plans(self, parts: Parts, shape: torch.Size, rng: torch.Generator, signals: Signals) -> tuple[MixPlan, MixPlan]:
        return tuple(pair_plan(parts, shape, rng, signals, self.no_repeat) for _ in range(2))

    def settings(self, mixer: nn.Module, rng: torch.Generator) -> tuple[tuple, tuple]:
        k, ups = pick_two(mixer.lam_mul_ks, rng), pick_two(mixer.upsamplings, rng)
        return tuple(zip(ups, k, strict=True))

    def further(self, rng: torch.Generator, key: MixKey) -> dict[str, Any]:
        adjusts = float(torch.rand((), generator=rng)) < self.mask_adjust
        weight = self.mask_loss * decay(self.mask_loss_schedule, key.step, key.total_steps, compounding=self.as_published)
        return {"adjust_to": int(self.as_published) if adjusts else None, "mask_weight": weight}

    def mixer_loss(self, mask: Tensor, plan: MixPlan, drawn: Drawn, taught: tuple[Tensor, Tensor] | None, clean: Tensor) -> Tensor:
        area = mask_loss(mask, plan.weight[:, 0], self.mask_loss_mode, self.mask_loss_margin, per_sample=not drawn.one_lam)
        loss = drawn.mask_weight * area  # in the graph even at weight 0
        return loss if taught is None else loss + self.mixer_weight * taught[0]

    def clean_loss(self, parts: Parts, state: LearnedState, network: nn.Module, images: Tensor, targets: Tensor, plan: MixPlan) -> Tensor:
        return self.onehot_weight * parts.loss(state.student_logits(network, images, clean=True), targets).mean()

    @property
    def mixture_weight(self) -> float:
        return self.mix_weight


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
