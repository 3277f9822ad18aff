"""GuidedMixup."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_mixup.core.checks import check_between, check_count, check_known, check_positive
from hf_mixup.core.geometry import dense_pair
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals


@dataclass(frozen=True)
class GuidedMixup(SamplePolicy):
    """GuidedMixup (Kang and Kim, AAAI 2023, arXiv:2306.16612; github.com/3neutronstar/GuidedMixup): every pixel is shared in
    proportion to its saliency in the two images. Images are paired so that their salient places differ.

    Saliency is blurred and scaled to a sum of 1, `s`. The own share of a pixel is `s_i / (s_i + s_j)`; if neither image is salient there, each
    has half. The label's weight is the mean of these shares. Pairs are found greedily, in one circle: the next image is the one farthest away
    among those left. So only blocks and random pairs need random draws. The authors' CIFAR script and OpenMixup announce greedy pairs but mix
    random ones; `pairing="random"` repeats that.

    Args:
        guided_type: `ap` is the input gradient of the network (adaptive perturbation). `sr` is the spectral residual of the gray
            image, which needs no network. The papers mix 80 % and 50 % of the batches (`mix_rate`).
        pairing: `greedy` or `random`.
        m_part: for speed, pairs are made inside random blocks of this many images; None for all. The authors recommend a fourth to an eighth
            of the batch.
        kernel_size, sigma: of the blur.
        clean_lam: weight of the loss on the clean images; the gradient then comes from that loss too. See `Policy`.
    """

    guided_type: str = "ap"
    pairing: str = "greedy"
    m_part: int | None = None
    kernel_size: int = 7
    sigma: float = 3.0
    clean_lam: float = 0.0

    def __post_init__(self):
        check_known("guided_type", self.guided_type, ["ap", "sr"])
        check_known("pairing", self.pairing, ["greedy", "random"])
        if self.m_part is not None:
            check_count(2, m_part=self.m_part)
        check_count(1, kernel_size=self.kernel_size)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that the blur has a centre pixel, got {self.kernel_size}; give 7, for example.")
        check_positive(sigma=self.sigma)
        check_between(0, float("inf"), clean_lam=self.clean_lam)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"saliency" if self.guided_type == "ap" else "images"})

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        blur = (self.kernel_size, self.sigma)
        seen = signals["saliency"] if self.guided_type == "ap" else spectral_residual(signals["images"], *blur)
        saliency = normalised(seen, *blur)
        order = torch.randperm(shape[0], generator=rng)
        if self.pairing == "random":
            return guided_plan(saliency, order)
        whole = self.m_part is None or self.m_part >= shape[0]
        blocks = [torch.arange(shape[0])] if whole else list(order.split(self.m_part))
        if len(blocks[-1]) == 1 and len(blocks) > 1:  # a single image has no partner
            blocks[-2:] = [torch.cat(blocks[-2:])]
        # sequential, so on the CPU: it copies a few kilobytes, but waits for the device
        far = distances(saliency).cpu()
        partner = torch.empty(shape[0], dtype=torch.int64)
        for block in blocks:
            partner[block] = block[greedy_circle(far[block][:, block])]
        return guided_plan(saliency, partner)


def spectral_residual(images: Tensor, kernel_size: int, sigma: float) -> Tensor:
    """(B, H, W) float32: spectral residual of the gray image (Hou and Zhang, CVPR 2007), blurred once.

    Images higher or wider than 128 pixels are resized to 128 x 128. Three channels are read as red, green and blue; other numbers of
    channels are averaged.
    """
    with torch.autocast(images.device.type, enabled=False):
        images, size = images.float(), tuple(images.shape[2:])
        weight = [0.2989, 0.587, 0.114] if images.shape[1] == 3 else [1 / images.shape[1]] * images.shape[1]
        gray = (images * images.new_tensor(weight)[:, None, None]).sum(1, keepdim=True)
        if max(size) > 128:
            gray = F.interpolate(gray, (128, 128), mode="bilinear", antialias=True, align_corners=False)
        spectrum = torch.fft.fft2(gray)
        magnitude = (spectrum.abs() ** 2 + 1e-10).sqrt()
        log = magnitude.log()
        residual = (log - F.avg_pool2d(F.pad(log, (1, 1, 1, 1), mode="replicate"), 3, 1)).exp()
        saliency = blurred(torch.fft.ifft2(residual * spectrum / magnitude).abs(), kernel_size, sigma)
        if max(size) > 128:
            saliency = F.interpolate(saliency, size, mode="bilinear", antialias=True, align_corners=False)
        return saliency[:, 0]


def blurred(maps: Tensor, kernel_size: int, sigma: float) -> Tensor:
    """Maps (B, 1, H, W), blurred by a Gaussian, reflected at the border."""
    at = torch.arange(kernel_size, device=maps.device) - kernel_size // 2
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = kernel / kernel.sum()
    half = kernel_size // 2
    with torch.autocast(maps.device.type, enabled=False):
        # a line that is too short to reflect is repeated
        padded = F.pad(maps.float(), (half, half, half, half), mode="reflect" if min(maps.shape[2:]) > half else "replicate")
        return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))


def normalised(saliency: Tensor, kernel_size: int, sigma: float) -> Tensor:
    """Saliency (B, H, W) float32, blurred, with a sum of 1; uniform for an image without saliency."""
    saliency = blurred(saliency[:, None], kernel_size, sigma)[:, 0]
    total = saliency.sum((1, 2), keepdim=True)
    return torch.where(total > 0, saliency / total, 1 / saliency[0].numel())


def distances(saliency: Tensor) -> Tensor:
    """(B, B): the Euclidean distance between the maps, times their number of pixels, which keeps float32 precise."""
    flat = saliency.flatten(1) * saliency[0].numel()
    return torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")


def greedy_circle(distance: Tensor) -> Tensor:
    """The next image of each, (n,). The circle starts with the two farthest images; the next is always the farthest of those left."""
    count = len(distance)
    following = torch.zeros(count, dtype=torch.int64)
    if count == 1:
        return following
    distance = distance.clone()
    distance.fill_diagonal_(-torch.inf)
    first, image = divmod(int(distance.argmax()), count)
    following[first] = image
    distance[:, first] = -torch.inf
    for _ in range(count - 2):
        farthest = int(distance[image].argmax())
        following[image] = farthest
        distance[:, image] = -torch.inf
        image = farthest
    following[image] = first
    return following


def guided_plan(saliency: Tensor, partner: Tensor) -> MixPlan:
    """The plan that shares every pixel by `saliency` (B, H, W)."""
    partner = partner.to(saliency.device)
    both = saliency + saliency[partner]
    own = torch.where(both > 0, saliency / both, 0.5)
    return MixPlan.pair(partner, dense_pair(own, torch.arange(len(partner))), own.double().mean((1, 2)))
