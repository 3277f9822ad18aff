"""Input-gradient saliency, as PuzzleMix and related methods define it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_mixup.core.planes import planes
from hf_mixup.core.policy import NOTHING, Policy, Signals
from hf_mixup.networks.passes import logits_of
from hf_mixup.networks.signals.signal import EarlySignal, evaluating, with_input_gradient


def input_gradient(network: nn.Module, images: Tensor, targets: Tensor, others: Mapping[str, Tensor] = NOTHING) -> Tensor:
    """`dL / dx`, (B, C, H, W) float32 of `planes`, with L the sum of the images' cross-entropies.

    It runs in evaluation mode, so images do not influence each other and batch statistics stay. Parameters' `.grad`, and accumulated
    gradients, are not changed. The official codes use the mean over the batch. The sum only keeps small numbers away from zero, because
    users of the gradient divide by its sum over the image.
    """
    with torch.enable_grad(), evaluating(network):
        return _gradient(network, images, targets, others, keep=False)[0]


def clean_gradient(network: nn.Module, images: Tensor, targets: Tensor, others: Mapping[str, Tensor] = NOTHING) -> tuple[Tensor, Tensor]:
    """`input_gradient` from a pass in training mode, and the mean cross-entropy of that pass, still in the graph.

    The loss on the clean images is then trained too, and batch statistics are updated twice a step, as in the official code with
    `clean_lam > 0`.
    """
    with torch.enable_grad(), with_input_gradient(network):
        gradient, losses = _gradient(network, images, targets, others, keep=True)
    return gradient, losses.mean()


def saliency_of(gradient: Tensor) -> Tensor:
    """`sqrt(mean_c g^2)`, (B, H, W) (arXiv:2009.06962)."""
    return gradient.pow(2).mean(1).sqrt()


def input_saliency(network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """The saliency (B, H, W) float32 of `input_gradient`."""
    return saliency_of(input_gradient(network, images, targets))


def _gradient(network: nn.Module, images: Tensor, targets: Tensor, others: Mapping[str, Tensor], keep: bool) -> tuple[Tensor, Tensor]:
    images = images.detach().requires_grad_()
    logits = logits_of(network, images, others)
    losses = -(targets * F.log_softmax(logits.float(), 1)).sum(1)
    # in float32, because with half-precision logits the gradient of a confident network would be 0
    apart = logits.detach().float().requires_grad_()
    at_logits = torch.autograd.grad(-(targets * F.log_softmax(apart, 1)).sum(), apart)[0]
    # scaled so that each image's gradient starts at the same power of two; for a confident network it would underflow in float16
    scale = torch.exp2((2**8 / at_logits.abs().amax(1).clamp_min(1e-30)).log2().floor())
    scaled = (at_logits * scale[:, None]).to(logits.dtype)
    gradient = planes(torch.autograd.grad(logits, images, scaled, retain_graph=keep)[0].float())
    return gradient / scale[:, None, None, None], losses


class InputGradient(EarlySignal):
    """(B, C, H, W). With the policy's `clean_lam` above 0, it also gives the loss on the clean images."""

    of_classes = True

    def __init__(self, network: nn.Module, policy: Policy):
        self.network, self.policy = network, policy

    def take(self, images: Tensor, targets: Tensor, signals: Signals) -> Tensor:
        if self.policy.clean_lam == 0:
            return input_gradient(self.network, images, targets, signals.others)
        gradient, loss = clean_gradient(self.network, images, targets, signals.others)
        signals.loss = self.policy.clean_lam * loss
        return gradient


class Saliency(EarlySignal):
    """(B, H, W): how strongly the loss reacts to every pixel."""

    of_classes = True

    def __init__(self, network: nn.Module, policy: Policy):
        self.gradient = InputGradient(network, policy)

    def take(self, images: Tensor, targets: Tensor, signals: Signals) -> Tensor:
        gradient = signals["input_grad"] if "input_grad" in signals else self.gradient.take(images, targets, signals)
        return saliency_of(gradient)
