"""SuperMix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_mixup.core.checks import check_between, check_count, check_known
from hf_mixup.core.plan import Dense, blend, mix_targets, onehot
from hf_mixup.core.planes import planes
from hf_mixup.core.rng import MixKey
from hf_mixup.networks.passes import logits_of
from hf_mixup.networks.signals.signal import evaluating
from hf_mixup.networks.teachers import Teacher
from hf_mixup.steps.standard import check_whole_images, relabelled
from hf_mixup.steps.step import MethodState, Parts, Step, StepOutput


class SuperState(MethodState):
    """The frozen teacher, if one is given."""

    def __init__(self, repo_or_folder: str | None):
        super().__init__()
        self.teacher = None if repo_or_folder is None else Teacher(repo_or_folder)


@dataclass(frozen=True)
class SuperMix(Step):
    """SuperMix (Dabouei et al., CVPR 2021, arXiv:2003.05034; github.com/alldbi/SuperMix): searches for masks with which a teacher sees exactly
    the classes of the images in the mixture, in the drawn shares.

    A few Newton steps on small mask logits make the teacher's prediction match that soft label, and the masks binary. As in the authors'
    distillation, the clean batch is trained on too. A step costs up to `max_iter + 1` forward and `max_iter` backward passes of the teacher.

    Deviations: the search is done for every batch, and all mixtures are kept, also those of one class, for which it cannot succeed (the
    authors search once before training, and keep the mixtures that succeed).

    Args:
        teacher: Hub id or folder of a frozen image classifier; None for the network in training.
        target: `shares` gives the mixture the images' own labels in the drawn shares; `teacher` gives the class that
            the teacher sees in it, as in the authors' distillation.
        mask_size: side of the mask logits; 8 on CIFAR, 16 on ImageNet.
        sigma: width of the Gaussian that smooths their gradient; 1 on CIFAR, 2 on ImageNet.
        lambda_s: weight of the term for binary masks.
        max_iter: largest number of Newton steps.
        tol: the search ends when at most this share of the batch is unfinished.
        clean_lam: weight of the loss on the clean images.
    """

    teacher: str | None = None
    target: str = "shares"
    mask_size: int = 8
    sigma: int = 1
    lambda_s: float = 25.0
    max_iter: int = 50
    tol: float = 0.7
    clean_lam: float = 1.0

    def __post_init__(self):
        check_known("target", self.target, ["shares", "teacher"])
        check_count(1, mask_size=self.mask_size, max_iter=self.max_iter)
        check_count(0, sigma=self.sigma)
        check_between(0, 1, tol=self.tol)
        check_between(0, float("inf"), lambda_s=self.lambda_s, clean_lam=self.clean_lam)
        if self.target == "teacher" and self.teacher is None:
            raise ValueError("the target 'teacher' needs a teacher, got None; set teacher, or set target='shares'.")

    def build(self, parts: Parts, network: nn.Module) -> MethodState:
        check_whole_images(parts, "dirichletsets", pairs=False)
        state = SuperState.for_parts(parts, network, self.teacher)
        classes = network.config.num_labels
        if self.target == "teacher" and state.teacher.network.config.num_labels != classes:
            raise ValueError(
                f"a teacher that gives labels must have the {classes} classes of the network, got {self.teacher} with "
                f"{state.teacher.network.config.num_labels}; fine-tune it first, or set target='shares'."
            )
        if state.teacher is not None:
            state.teacher.check_classifies()
        if self.target == "teacher":
            state.teacher.match(network)
        return state

    def run(self, parts: Parts, state: SuperState, network: nn.Module, images: Tensor, targets: Tensor, key: MixKey) -> StepOutput:
        signals = state.before(images, targets)
        plan = parts.plan(images, key.own_rng(), signals)
        teacher = network if state.teacher is None else state.teacher
        with evaluating(teacher):
            found = search(
                lambda mixed: logits_of(teacher, mixed.view_as(images)),
                planes(images), plan.index, plan.mask.value, self.mask_size, self.lambda_s, self.sigma, self.max_iter, self.tol,
            )  # fmt: skip
        plan = replace(plan, mask=Dense(found.mask))
        mixed_images = blend(plan, images)
        with state.watching(signals, mixed_images):
            logits = logits_of(network, mixed_images)
        plan = relabelled(parts, plan, logits, targets, signals)
        mixed = (
            mix_targets(plan, targets)
            if self.target == "shares"
            else onehot(state.teacher.answers(found.logits).argmax(1), targets.shape[1])
        )
        losses = parts.loss(logits, mixed, plan)
        loss = losses.mean()
        if self.clean_lam > 0:
            loss = loss + self.clean_lam * parts.loss(logits_of(network, images), targets).mean()
        return StepOutput(loss if signals.loss is None else loss + signals.loss, losses, logits, mixed, plan.weight[:, 0], plan)


@dataclass(frozen=True, eq=False)
class Found:
    """The result of the search.

    Attributes:
        mask: (B, K, H, W), made from `mask_logits` (B, K, w, w).
        logits: (B, classes), the teacher's logits for the mixture.
        soft: (B, classes), the soft label that the teacher should predict.
        success: (B,) bool, whether it predicts those classes.
        steps: number of steps made.
    """

    mask: Tensor
    mask_logits: Tensor
    logits: Tensor
    soft: Tensor
    success: Tensor
    steps: int


@torch.enable_grad()
def search(
    teacher: Callable[[Tensor], Tensor],
    images: Tensor,
    index: Tensor,
    share: Tensor,
    mask_size: int,
    lambda_s: float,
    sigma: int,
    max_iter: int,
    tol: float,
) -> Found:
    """Searches masks for the sets `index` (B, K) with the shares `share` (B, K). To end early, it waits for the device once a step.

    `teacher` gives logits; gradients are computed for the masks only.
    """
    images, size = images.detach(), tuple(images.shape[2:])
    batch, count = index.shape
    allowed = math.floor(tol * batch + 1e-9)
    with torch.no_grad():
        seen = teacher(images).float()
    soft = (share[:, :, None] * onehot(seen.argmax(1), seen.shape[1])[index]).sum(1)
    count = min(count, soft.shape[1])
    wanted = soft.topk(count).indices.sort(1).values
    members = images[index]
    mask_logits = torch.zeros(*index.shape, mask_size, mask_size, device=images.device, requires_grad=True)
    active = torch.ones(batch, dtype=torch.bool, device=images.device)

    def look(mask_logits: Tensor) -> tuple[Tensor, Tensor]:
        mask = masks(mask_logits, size)
        return mask, teacher((mask[:, :, None].to(images.dtype) * members).sum(1)).float()

    mask, logits = look(mask_logits)
    for step in range(1, max_iter + 1):  # noqa: B007, it counts the steps made
        divergence = (torch.xlogy(soft, soft) - soft * F.log_softmax(logits, 1)).sum(1)
        error = active * (divergence + lambda_s * (mask * (mask - 1)).abs().mean((1, 2, 3)))
        gradient = torch.autograd.grad(error.sum(), mask_logits)[0]
        direction = smoothed(gradient, sigma)
        # the step at whose end a linear error would be zero
        length = (error.detach().abs() / ((gradient * direction).sum((1, 2, 3)) + 1e-10)).clamp(1e-4, 2000) * active
        mask_logits = (mask_logits - length[:, None, None, None] * direction).detach().requires_grad_()
        mask, logits = look(mask_logits)
        active = (logits.topk(count).indices.sort(1).values != wanted).any(1)
        if int(active.sum()) <= allowed:
            break
    return Found(mask.detach(), mask_logits.detach(), logits.detach(), soft, ~active, step)


def masks(mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, K, H, W), summing to 1 over K, of logits (B, K, w, w)."""
    mask = F.interpolate(mask_logits, size, mode="bilinear", align_corners=False).sigmoid()
    return mask / mask.sum(1, keepdim=True)


def smoothed(maps: Tensor, sigma: int) -> Tensor:
    """Maps (B, K, w, w), blurred by a Gaussian that is 5 sigma wide, with zero padding."""
    if sigma == 0:
        return maps
    width = 5 * sigma
    at = torch.arange(width, device=maps.device) - (width - 1) / 2
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = kernel / kernel.sum()
    before, after = width // 2 - (width % 2 == 0), width // 2
    padded = F.pad(maps.flatten(0, 1)[:, None], (before, after, before, after))
    with torch.autocast(maps.device.type, enabled=False):
        rows = F.conv2d(padded, kernel.view(1, 1, 1, -1))
        return F.conv2d(rows, kernel.view(1, 1, -1, 1)).view_as(maps)
