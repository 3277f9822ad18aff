"""FMix."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_mixup.core.checks import check_between, check_mode, check_positive, check_switch
from hf_mixup.core.geometry import dense_pair
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import beta, normal, partners


@dataclass(frozen=True)
class FMix(SamplePolicy):
    """FMix (Harris et al., arXiv:2002.12047; github.com/ecs-vlc/FMix): the own image stays at the brightest pixels of a random smooth image.

    Noise whose spectrum falls as `1 / frequency ** decay_power` is thresholded. A share `lam ~ Beta(alpha, alpha)` of the pixels stays own.
    The label's weight is the drawn lam, as in the authors' code; it differs from the mask's area by less than one pixel. Masks depend on the
    kind of device, because their noise is drawn there.

    Args:
        alpha: both parameters of the Beta, above 0. The paper uses 1.0; the published CIFAR tables of OpenMixup use 0.2.
        decay_power: larger values give smoother shapes.
        max_soft: half the width of the soft edge between the images, as a share of the pixels, 0 to 0.5; 0 is a hard edge.
        as_published: the spectrum of the authors' code, which OpenMixup has too. It reads two frequency rows of the noise as the real and the
            imaginary part. So masks have no horizontal frequency above one wave per image. This is the default, because FMix is known by
            these masks and all published results use them. False gives the isotropic spectrum of the paper's text.
        reformulate: the paper's variant with the own label only, `lam ~ Beta(alpha + 1, alpha)`.
        mode: `sample` draws a mask for every image, `pair` for every two that are swapped, `batch` once (the authors' code).
    """

    alpha: float = 1.0
    decay_power: float = 3.0
    max_soft: float = 0.0
    as_published: bool = True
    reformulate: bool = False
    mode: str = "sample"

    def __post_init__(self):
        check_positive(alpha=self.alpha, decay_power=self.decay_power)
        check_between(0, 0.5, max_soft=self.max_soft)
        check_switch(as_published=self.as_published, reformulate=self.reformulate)
        check_mode(self.mode)

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        size = tuple(shape[2:])
        pairing = partners(shape[0], self.mode, rng)
        lam = beta(self.alpha + self.reformulate, pairing.draws, rng, self.alpha)
        up = torch.rand(pairing.draws, generator=rng, dtype=torch.float32) > 0.5
        noise_size = (2, size[1] // 2 + 1 + size[1] % 2, 2) if self.as_published else (2, size[0], size[1] // 2 + 1)
        noise = normal((pairing.draws, *noise_size), rng, signals.device)
        field = published_field if self.as_published else paper_field
        own = brightest(field(noise, size, self.decay_power), lam, up, self.max_soft)
        lam = torch.ones_like(lam) if self.reformulate else lam
        return MixPlan.pair(pairing.partner, dense_pair(own, pairing.row), pairing.spread(lam))


def published_field(noise: Tensor, size: tuple[int, int], decay_power: float) -> Tensor:
    """(n, H, W): the smooth images of the authors' code, up to scale, from normal noise (n, 2, columns, 2).

    The authors' code swaps axes: it reads (vertical frequency, horizontal frequency 0 or 1) where its noise has (column, real or imaginary),
    and uses the decay of frequency rows 0 and 1 for the two parts. So each row is the sum of three waves, and no 2-D transform is needed.
    """
    height, width = size
    columns = noise.shape[2]
    down = torch.fft.fftfreq(height, dtype=torch.float64)[:2, None]
    along = torch.fft.fftfreq(width, dtype=torch.float64)[:columns]
    noise = _precise(noise) * _decay(down, along, size, decay_power)[:, :, None].to(noise.device, non_blocking=True)
    waves = torch.view_as_real(torch.fft.ifft(torch.complex(*noise.unbind(1)), n=height, dim=1))  # (n, H, 2, 2)
    angle = torch.arange(width, dtype=waves.dtype, device=waves.device) * (2 * math.pi / width)
    # the transform of a real image stores only half, so the second frequency counts twice
    field = torch.addcmul(waves[:, :, :1, 0], waves[:, :, 1:, 0], 2 * angle.cos())
    return field.addcmul_(waves[:, :, 1:, 1], -2 * angle.sin())


def paper_field(noise: Tensor, size: tuple[int, int], decay_power: float) -> Tensor:
    """(n, H, W): smooth images of isotropic spectrum, up to scale, from normal noise (n, 2, H, W // 2 + 1)."""
    height, width = size
    down = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    along = torch.fft.rfftfreq(width, dtype=torch.float64)
    noise = _precise(noise) * _decay(down, along, size, decay_power).to(noise.device, non_blocking=True)
    return torch.fft.irfft2(torch.complex(*noise.unbind(1)), s=size)


def brightest(field: Tensor, lam: Tensor, up: Tensor, max_soft: float) -> Tensor:
    """The own share (n, H, W) of each pixel: 1 for the brightest share `lam` (n,) of the pixels of `field`. Bool if edges are hard.

    Their number is rounded up where `up` (n,) is true, else down.
    """
    values = field.flatten(1)
    pixels = values.shape[1]
    count = torch.where(up, (lam * pixels).ceil(), (lam * pixels).floor()).long()
    # a soft edge must fit on both sides
    soft = (pixels * torch.stack([torch.full_like(lam, max_soft), lam, 1 - lam]).amin(0)).floor().long()
    if values.device.type == "cpu" and not soft.any():
        # selecting is linear in the number of pixels; sorting is not, and takes 6 times as long at 224 x 224
        limit = [row.kthvalue(max(pixels - k, 0) + 1).values if k else row.max() + 1 for row, k in zip(values, count.tolist(), strict=True)]
        return (values >= torch.stack(limit)[:, None]).view_as(field)
    order = values.argsort(1, descending=True)
    count, soft = count.to(values.device, non_blocking=True)[:, None], soft.to(values.device, non_blocking=True)[:, None]
    rank = torch.arange(pixels, device=values.device)
    # 1 at the rank `count - soft`, 0 at `count + soft - 1`
    edge = (count + soft - (soft > 0).long() - rank) / (2 * soft - 1).clamp(min=1)
    return torch.empty_like(edge).scatter_(1, order, edge.clamp(0, 1)).view_as(field)


def _decay(down: Tensor, along: Tensor, size: tuple[int, int], decay_power: float) -> Tensor:
    return (down**2 + along**2).sqrt().clamp(min=1 / max(size)) ** -decay_power


def _precise(noise: Tensor) -> Tensor:
    # two pixels may be equally bright in float32, so the number kept may be off by one; elsewhere ranks break ties
    return noise.double() if noise.device.type == "cpu" else noise
