"""The step of AutoMix and SAMix: a mixer learns the masks, through a teacher that follows the student."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_mixup.core.checks import check_between, check_known
from hf_mixup.core.losses import DecoupledBCE, Loss
from hf_mixup.core.plan import Dense, MixPlan, blend, mix_targets
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import MixKey
from hf_mixup.mixers.masks import MASK_LOSSES, UPSAMPLING, adjust_mask, check_mixer, mask_loss
from hf_mixup.networks.signals.features import StageTaps, classifier_of, stage_names
from hf_mixup.networks.signals.signal import reading
from hf_mixup.steps.standard import finish
from hf_mixup.steps.step import MethodState, Step, StepOutput

if TYPE_CHECKING:
    from hf_mixup.methods import Method

EVAL_NETS = ("teacher_onehot", "teacher_mix", "student_onehot", "student_mix")
SCHEDULES = ("constant", "cosine", "compounding")
MIXER_LOSSES = ("ce", "pbce", "ce_eta")


# -- schedules: functions of the step, so that nothing has to be remembered -------------------------------------------------


def ema_momentum(step: int, total_steps: int, start: float, end: float, scope: float, warmup: bool) -> float:
    """The teacher's momentum after `step` optimizer steps: `start` for the first `scope` of the run, then a cosine to `end`.

    As in OpenMixup the cosine is that of the whole run, so the momentum jumps at `scope` to where the cosine is by then. With
    `warmup` it is `(1 + step) / (10 + step)` until that reaches `start`: for 0.999, the first 9,000 steps.
    """
    if warmup and start < 1 and (1 + step) / (10 + step) < start:
        return (1 + step) / (10 + step)
    if start >= end or total_steps == 0 or step < scope * total_steps:
        return start
    return end - (end - start) * (1 + math.cos(math.pi * step / total_steps)) / 2


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


# -- the networks -----------------------------------------------------------------------------------------------------------


class LearnedState(MethodState):
    """The teacher, the mixer, and a second head for either network.

    The networks' own heads are those that are evaluated; `head` and `teacher_head` serve the other kind of input, so that what is
    deployed is a whole classifier. Parameters of the teacher follow the student; its buffers, the running statistics of batch
    norms, are copied once and then its own.

    Args:
        backbone: the student.
        stage: whose features the mixer sees; see `LearnedMixing`.
        own_is_onehot: whether the networks' own heads are those of clean images.
        make_mixer: from the number of the features' channels.
    """

    def __init__(self, backbone: nn.Module, stage: int | str | None, own_is_onehot: bool, make_mixer: Callable[[int], nn.Module]):
        super().__init__()
        refuse_half_precision(backbone)
        self.own_is_onehot = own_is_onehot
        # before any hook is put on the backbone, which the copy would carry too
        self.teacher = copy.deepcopy(backbone).requires_grad_(False)
        self.head = copy.deepcopy(classifier_of(backbone))
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)
        name, channels = choose_stage(self.teacher, stage)
        self.feature_taps = StageTaps(self.teacher, [name])
        self.teacher_tap, self.student_tap = InputTap(classifier_of(self.teacher)), InputTap(classifier_of(backbone))
        self.mixer = make_mixer(channels)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's features (B, C, h, w) of clean images, and what its head for mixed images says of them. No gradients."""
        with torch.no_grad():
            self.feature_taps.arm()
            logits = self.teacher_logits(images, clean=False)
            return self.feature_taps.take(tuple(images.shape[2:]))[0], logits

    def teacher_logits(self, images: Tensor, clean: bool) -> Tensor:
        return self.teacher_tap.logits(self.teacher, images, None if clean == self.own_is_onehot else self.teacher_head)

    def student_logits(self, backbone: nn.Module, images: Tensor, clean: bool) -> Tensor:
        return self.student_tap.logits(backbone, images, None if clean == self.own_is_onehot else self.head)

    @torch.no_grad()
    def masks(self, images: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """(B, K, H, W), what the mixer makes of images (B, C, H, W) put together by `index` and `weight` (B, K); for looking at."""
        return self.mixer(self.features(images)[0], index, weight, tuple(images.shape[2:]))

    @torch.no_grad()
    def follow(self, backbone: nn.Module, momentum: float) -> None:
        """`teacher = momentum * teacher + (1 - momentum) * student`, parameters only."""
        teacher = [*self.teacher.parameters(), *self.teacher_head.parameters()]
        student = [*backbone.parameters(), *self.head.parameters()]
        torch._foreach_lerp_(teacher, student, 1 - momentum)

    @property
    def mixer_learns(self) -> bool:
        return any(parameter.requires_grad for parameter in self.mixer.parameters())

    def train(self, mode: bool = True) -> LearnedState:
        super().train(mode)
        if not self.mixer_learns:
            self.mixer.eval()  # a frozen mixer keeps its statistics too
        return self

    def disarm(self) -> None:
        super().disarm()
        for tap in (self.feature_taps, self.teacher_tap, self.student_tap):
            tap.disarm()


class InputTap:
    """Sees what a classifier is given, so that another head can be given the same."""

    def __init__(self, classifier: nn.Module):
        self.armed, self.feature = False, None
        classifier.register_forward_pre_hook(self._passing)

    def _passing(self, module: nn.Module, args: tuple) -> None:
        if self.armed:
            self.feature = args[0]

    def disarm(self) -> None:
        self.armed, self.feature = False, None

    def both(self, network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """The logits, and what the classifier was given for them."""
        self.armed = True
        logits, feature = network(pixel_values=images).logits, self.feature
        self.disarm()
        return logits, feature

    def logits(self, network: nn.Module, images: Tensor, head: nn.Module | None) -> Tensor:
        """Of the network's own classifier, or of another `head`."""
        return network(pixel_values=images).logits if head is None else head(self.both(network, images)[1])


def choose_stage(network: nn.Module, stage: int | str | None) -> tuple[str, int]:
    """The name of a stage, and the number of its channels. Raises ValueError for one that the network has not."""
    names = stage_names(network)
    if isinstance(stage, int) and not -len(names) <= stage < len(names):
        raise ValueError(f"stage must be from 0 to {len(names) - 1}, got {stage}; choose one of {', '.join(names)}.")
    if isinstance(stage, str):
        check_known("stage", stage, names)
        stage = names.index(stage)
    shape = _input_shape(network)
    taps = StageTaps(network, names)
    taps.arm()
    with reading(network):
        network(pixel_values=torch.zeros(1, *shape, device=next(network.parameters()).device))
    maps = taps.take(shape[1:])
    taps.remove()
    if stage is None:
        larger = [i for i, features in enumerate(maps) if features[0, 0].numel() > maps[-1][0, 0].numel()]
        stage = larger[-1] if larger else (len(names) - 1) // 2
    return names[stage], maps[stage].shape[1]


def _input_shape(network: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of images that the network takes."""
    config = network.config
    if config.model_type == "timm_wrapper":
        channels, height, width = network.timm_model.pretrained_cfg["input_size"]
        arguments = config.model_args or {}
        side = arguments.get("img_size", (height, width))
        channels = arguments.get("in_chans", channels)
    else:
        # convolutional networks take any size
        side, channels = getattr(config, "image_size", 64), config.num_channels
    return channels, *((side, side) if isinstance(side, int) else side)


def refuse_half_precision(backbone: nn.Module) -> None:
    half = [p.dtype for p in backbone.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    if half:
        raise ValueError(
            f"an EMA teacher needs float32 parameters, got {str(half[0]).removeprefix('torch.')}, which its small steps would not "
            "move; load the model with dtype=torch.float32 and train with bf16=True."
        )


# -- the step ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Drawn:
    """What is drawn for a batch: two plans, as (the student's, the mixer's) like all pairs here, and what the mixer is to do.

    Attributes:
        keep: whether the teacher sees mixed images.
        adjust: whether the student's masks are brought to the area of lam.
    """

    plans: tuple[MixPlan, MixPlan]
    upsampling: tuple[str, str]
    k: tuple[float, float] = (-1.0, -1.0)
    keep: bool = True
    adjust: bool = False

    @property
    def one_lam(self) -> bool:
        """Whether the mixer's plan has one lam for the whole batch. Ask on the CPU."""
        weight = self.plans[1].weight
        return bool((weight == weight[:1]).all())


@dataclass(frozen=True)
class LearnedMixing(Step):
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
        stage: of the network whose features the mixer sees: its name, or its place, from 0, or from the end if negative. None for
            the last one with larger maps than the final ones, and the middle block of a plain vision transformer, as published
            (but Swin: published is -2 of transformers' model, maps as small as the final ones).
        reduction, lam_input, lam_mul_k, value_neck, value_norm, value_dropout, x_qk_concat, x_v_concat, attention_norm, upsampling:
            of the mixer, see `MixBlock`. Several `lam_mul_k` or `upsampling` are chosen from at random for every mask.
        mask_up_override: upsampling of the masks that train the mixer, where it is not to be `upsampling`.
        mixer: folder or Hub id of a trained `MixBlock`, used frozen; its own settings then replace those above, and the teacher's
            pass on mixed images, which would train nothing, is left out.
        mixer_loss: of the teacher on mixed images. `ce` is the method's loss, and that of all published runs: the eta of SAMix's
            configurations multiplies terms that are 0. `pbce` is what it does with a sigmoid, a binary cross-entropy with weight
            `eta` on classes absent from both images; `ce_eta` is our reading of the paper, see `eta_cross_entropy`.
        eta: see there.
        mask_loss: weight of the loss on the masks' area.
        mask_loss_mode: `L1`, `L1+Variance`, `L2+Variance` or `Sparsity`.
        mask_loss_margin: how far the area may be from lam.
        mask_loss_schedule: `constant` (CIFAR, Tiny-ImageNet), `cosine` to 0, or `compounding`, which is what the `cosine` of all
            other published runs did: a short warm-up.
        mask_adjust: probability of bringing the student's masks to the area of lam.
        mask_adjust_to: whose lam that is: the `student`'s, or the `mixer`'s, as in OpenMixup, whose runs with mask_adjust train
            on masks of one area and labels of another.
        lam_margin: see above; 0 for learned masks at every lam.
        no_repeat: an image is never mixed with itself (CUB, Aircraft).
        switch_off: the probability of *keeping* the teacher's pass on mixed images, as the published name has it; 0.8 skips a
            fifth of them. The choice is the same on all processes.
        momentum, end_momentum, momentum_scope, momentum_warmup: of the teacher, see `ema_momentum`. A momentum of 1.0 keeps the
            teacher as it is.
        onehot_weight, mix_weight, mixer_weight: of the student's loss on clean images, its loss on mixed ones, and the teacher's.
        eval_net: the network that is evaluated and shipped, and by which of its heads. The published numbers are the best of the
            four; with a learning rate that ends high (CIFAR) the student is 7 to 8 points behind.
    """

    stage: int | str | None = None
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
    mask_up_override: str | None = None
    mixer: str | None = None
    mixer_loss: str = "ce"
    eta: float = 0.5
    mask_loss: float = 0.1
    mask_loss_mode: str = "L1"
    mask_loss_margin: float = 0.1
    mask_loss_schedule: str = "constant"
    mask_adjust: float = 0.0
    mask_adjust_to: str = "student"
    lam_margin: float = 0.08
    no_repeat: bool = False
    switch_off: float = 1.0
    momentum: float = 0.999
    end_momentum: float = 0.999999
    momentum_scope: float = 0.1
    momentum_warmup: bool = True
    onehot_weight: float = 1.0
    mix_weight: float = 1.0
    mixer_weight: float = 1.0
    eval_net: str = "teacher_onehot"

    def __post_init__(self):
        check_mixer(**{name: getattr(self, name) for name in CHECKED})
        if self.mask_up_override is not None:
            check_known("mask_up_override", self.mask_up_override, UPSAMPLING)
        check_known("mixer_loss", self.mixer_loss, MIXER_LOSSES)
        check_known("mask_loss_mode", self.mask_loss_mode, MASK_LOSSES)
        check_known("mask_loss_schedule", self.mask_loss_schedule, SCHEDULES)
        check_known("mask_adjust_to", self.mask_adjust_to, ["student", "mixer"])
        check_known("eval_net", self.eval_net, EVAL_NETS)
        unit = ("eta", "mask_loss_margin", "mask_adjust", "lam_margin", "switch_off", "momentum", "end_momentum", "momentum_scope")
        check_between(0, 1, **{name: getattr(self, name) for name in unit})
        weights = ("mask_loss", "onehot_weight", "mix_weight", "mixer_weight")
        check_between(0, 1e6, **{name: getattr(self, name) for name in weights})

    def build(self, method: Method, backbone: nn.Module) -> LearnedState:
        return LearnedState.for_method(method, backbone, backbone, self.stage, self.eval_net.endswith("onehot"), self._make_mixer)

    def _make_mixer(self, channels: int) -> nn.Module:
        from hf_mixup.mixers import MixBlock

        if self.mixer is not None:
            return load_mixer(MixBlock, self.mixer, channels)
        return MixBlock(channels, **{name: getattr(self, name) for name in MIXBLOCK})

    def run(self, method: Method, state: LearnedState, backbone: nn.Module, images: Tensor, targets: Tensor, key: MixKey) -> StepOutput:
        signals = state.before(images, targets)
        drawn = self.draw(method, images.shape, signals, state.mixer, key)
        mask_weight = self.mask_loss * decay(self.mask_loss_schedule, key.step, key.total_steps)
        return self.step(method, state, backbone, images, targets, signals, drawn, mask_weight)

    def draw(self, method: Method, shape: torch.Size, signals: Signals, mixer: nn.Module, key: MixKey) -> Drawn:
        rng, shared = key.own_rng(), key.step_rng()
        plans = tuple(pair_plan(method, shape, rng, signals, self.no_repeat) for _ in range(2))
        adjust = float(torch.rand((), generator=rng)) < self.mask_adjust
        keep = float(torch.rand((), generator=shared)) < self.switch_off
        k = pick(mixer.lam_mul_ks, shared), pick(mixer.lam_mul_ks, shared)
        ups = pick(mixer.upsamplings, shared), pick(mixer.upsamplings, shared)
        return Drawn(plans, (ups[0], self.mask_up_override or ups[1]), k, keep, adjust)

    def step(
        self,
        method: Method,
        state: LearnedState,
        backbone: nn.Module,
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
                loss = loss + self.mixer_weight * self._teacher_loss(method.loss, logits, mix_targets(plan, targets), plan).mean()
        with torch.no_grad():
            mask = state.mixer(features, for_student.index, for_student.weight, size, drawn.upsampling[0], drawn.k[0])
            if drawn.adjust:
                held_to = for_student if self.mask_adjust_to == "student" else for_mixer
                mask = adjust_mask(mask, held_to.weight[:, 0])
            plan = replace(for_student, mask=Dense(within_margin(mask, for_student, self.lam_margin)), sources=None)
        loss = loss + self.onehot_weight * method.loss(state.student_logits(backbone, images, clean=True), targets).mean()
        logits = state.student_logits(backbone, blend(plan, images), clean=False)
        output = finish(method, state, plan, logits, targets, signals)
        return output._replace(loss=loss + self.mix_weight * output.loss, plan=plan)

    def _teacher_loss(self, loss: Loss, logits: Tensor, targets: Tensor, plan: MixPlan) -> Tensor:
        match self.mixer_loss:
            case "ce":
                return loss(logits, targets, plan)
            case "pbce":
                return DecoupledBCE(negative_weight=self.eta, reduction="sum")(logits, targets, plan)
            case "ce_eta":
                return eta_cross_entropy(logits, targets, self.eta)

    def deployed(self, state: LearnedState, backbone: nn.Module) -> nn.Module:
        return state.teacher if self.eval_net.startswith("teacher") else backbone

    def after_optimizer_step(self, state: LearnedState, backbone: nn.Module, step: int, total_steps: int) -> None:
        schedule = self.momentum, self.end_momentum, self.momentum_scope, self.momentum_warmup
        state.follow(backbone, ema_momentum(step, total_steps, *schedule))


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


def pair_plan(method: Method, shape: torch.Size, rng: torch.Generator, signals: Signals, no_repeat: bool) -> MixPlan:
    """A plan of the sample policy. `no_repeat`: another one while an image is its own partner, and after ten tries each image
    with one some places on."""
    for _ in range(10):
        plan = method.sample.plan(shape, rng, signals)
        if plan.index.shape[1] != 2:
            raise ValueError(
                f"{method.name!r} mixes two images, got a sample policy that mixes {plan.index.shape[1]}; choose another policy, or 'adautomix'."
            )
        if not no_repeat or shape[0] == 1 or not bool((plan.index[:, 0] == plan.index[:, 1]).any()):
            return plan
    own = plan.index[:, 0]
    return replace(plan, index=torch.stack([own, own.roll(int(torch.randint(1, shape[0], (), generator=rng)))], 1))


def load_mixer(cls: type[nn.Module], repo_or_folder: str, channels: int) -> nn.Module:
    """A trained mixer, frozen. Raises ValueError when the features do not fit."""
    mixer = cls.from_pretrained(repo_or_folder).requires_grad_(False)
    if mixer.channels != channels:
        raise ValueError(
            f"the mixer must fit the network's features of {channels} channels, got {repo_or_folder} for {mixer.channels}; "
            "choose another stage or mixer."
        )
    return mixer


def eta_cross_entropy(logits: Tensor, targets: Tensor, eta: float) -> Tensor:
    """Cross-entropy (B,) whose softmax counts classes absent from both images at weight eta, so that the two compete locally.

    Our reading of SAMix's balance of local and global terms (arXiv:2111.15454), not found in the authors' code.
    """
    logits = logits.float()
    counted = logits + torch.where(targets > 0, 1.0, eta).log()
    return -(targets * (logits - counted.logsumexp(-1, keepdim=True))).sum(-1)


def within_margin(mask: Tensor, plan: MixPlan, margin: float) -> Tensor:
    """The learned mask (B, K, H, W), or the plan's own where the own image's share is within `margin` of 0 or 1."""
    lam = plan.weight[:, 0]
    near = (lam <= margin) | (1 - lam <= margin)
    return torch.where(near[:, None, None, None], plan.dense_mask(tuple(mask.shape[2:])).to(mask), mask)


def pick(options: Sequence, rng: torch.Generator):
    return options[int(torch.randint(len(options), (), generator=rng))]
