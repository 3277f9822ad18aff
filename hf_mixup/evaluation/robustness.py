"""Attacks and occlusion of pixels in [0, 1], which `PixelModel` normalises."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_mixup.core.checks import check_between, check_count, check_divisible
from hf_mixup.core.rng import Draws


class PixelModel(nn.Module):
    """A frozen image classifier from pixels (B, C, H, W) in [0, 1] to float32 logits (B, num_labels).

    Args:
        network: takes `pixel_values` and returns `logits`.
        mean, std: of the normalisation.
        classes: the network's output for each class of the data, if their order differs.
        order: the pixels' channel in each channel of the network's input, such as (2, 1, 0) for BGR.
    """

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        classes: Sequence[int] | None = None,
        order: Sequence[int] | None = None,
    ):
        super().__init__()
        self.network = network.requires_grad_(False)
        self.classes = None if classes is None else list(classes)
        self.order = None if order is None else list(order)
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value).view(1, -1, 1, 1))
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        pixels = pixels if self.order is None else pixels[:, self.order]
        logits = self.network(pixel_values=(pixels - self.mean) / self.std).logits.float()
        return logits if self.classes is None else logits[:, self.classes]


# -- attacks --------------------------------------------------------------------------------------------------------------


def fgsm(model: nn.Module, images: Tensor, labels: Tensor, eps: float = 8 / 255) -> Tensor:
    """The fast gradient sign method (Goodfellow et al., arXiv:1412.6572): one step of size `eps` that increases the cross-entropy.

    Args:
        model: a model from pixels to logits, in evaluation mode.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) class numbers.
        eps: largest change of a pixel, on the scale from 0 to 1.
    """
    check_between(0, 1, eps=eps)
    return (images + eps * _gradient(model, images, labels).sign()).clamp(0, 1)


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float = 8 / 255,
    step_size: float = 2 / 255,
    steps: int = 10,
    draws: Draws | None = None,
) -> Tensor:
    """Projected gradient descent (Madry et al., arXiv:1706.06083) in the ball of radius `eps` around the images.

    The centre stays the same, and all is measured in pixels. (OpenMixup's code uses the ball around the last step's result, which drifts, and
    scales the step by the normalisation.)

    Args:
        draws: random draws for the start in the ball; None starts from the images.
    """
    check_between(0, 1, eps=eps, step_size=step_size)
    check_count(1, steps=steps)
    low, high = (images - eps).clamp(0, 1), (images + eps).clamp(0, 1)
    attacked = images
    if draws is not None:
        attacked = (images + draws.uniform(-eps, eps, *images.shape[1:])).clamp(low, high)
    for _ in range(steps):
        attacked = (attacked + step_size * _gradient(model, attacked, labels).sign()).clamp(low, high)
    return attacked


def _gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of the summed cross-entropy, so images do not influence each other."""
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        loss = F.cross_entropy(model(images), labels, reduction="sum")
        return torch.autograd.grad(loss, images)[0]


# -- occlusion ------------------------------------------------------------------------------------------------------------


def occlude(images: Tensor, ratio: float, patch: int, fill: Tensor | float, draws: Draws) -> Tensor:
    """Replaces random patches (Naseer et al., arXiv:2105.10497).

    For one draw, patches that are hidden at a lower ratio are hidden at higher ones too. Every image has its own mask, so batches do not matter.
    (OpenMixup draws one mask for a batch.)

    Args:
        images: (B, C, H, W) in [0, 1].
        ratio: share of the patches, 0 to 1, rounded to whole patches.
        patch: side of a patch in pixels.
        fill: value of hidden pixels; the published protocol uses the mean of the normalisation, (1, C, 1, 1).
    """
    check_between(0, 1, ratio=ratio)
    height, width = images.shape[2:]
    check_divisible((height, width), (patch, patch))
    rows, cols = height // patch, width // patch
    order = draws.each(lambda rng: torch.randperm(rows * cols, generator=rng))
    hidden = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, : round(ratio * rows * cols)], True)
    hidden = hidden.view(-1, 1, rows, cols).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return torch.where(hidden, fill, images)
