"""AugMix: every image mixed with chains of transforms of itself."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_mixup.core.checks import check_between, check_count, check_normalisation, check_positive
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import beta, dirichlet, uniform
from hf_mixup.policies.saliencymix import bytes_of


@dataclass(frozen=True)
class AugMix(SamplePolicy):
    """AugMix (Hendrycks et al., ICLR 2020, arXiv:1912.02781; github.com/google-research/augmix): `(1 - m) x + m sum_k w_k chain_k(x)`.

    `w ~ Dirichlet(alpha)` and `m ~ Beta(alpha, alpha)`. A chain has one to three of nine transforms of 8-bit images. The level of each is
    uniform in [0.1, severity]. Labels stay. The transforms are those of the authors' code, for whole batches on any device; equalize and
    autocontrast are torchvision's. Rotations, shears and autocontrast differ from PIL's by rounding, at most one of 255. The paper's method
    also has the step `KeepClean(mixtures=2)` and the loss `JensenShannon`.

    Args:
        severity: upper end of the levels, above 0.1 and at most 10; 3 in the authors' runs on CIFAR, 1 on ImageNet.
        width: number of chains of each image.
        depth: number of transforms of each chain; None draws 1 to 3.
        alpha: parameter of both distributions.
        mean, std: of the images' normalisation, one value for each channel; they give the exact 8-bit values back.
            If None, each image is stretched from its smallest value to its largest, and back.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"images"})

    severity: float = 3.0
    width: int = 3
    depth: int | None = None
    alpha: float = 1.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self):
        check_between(0.1, 10, severity=self.severity)
        check_count(1, width=self.width, **({} if self.depth is None else {"depth": self.depth}))
        check_positive(alpha=self.alpha)
        check_normalisation(self.mean, self.std)

    @torch.no_grad()
    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        images, batch = signals["images"], shape[0]
        shares, share = dirichlet(self.alpha, batch, self.width, rng), beta(self.alpha, batch, rng)
        longest, chains = self.depth or 3, (self.width, batch)
        depth = torch.full(chains, longest) if self.depth else torch.randint(1, 4, chains, generator=rng)
        operation = torch.randint(len(OPERATIONS), (longest, *chains), generator=rng)
        level = uniform(0.1, self.severity, operation.numel(), rng).view_as(operation).float()
        sign = 2 * torch.randint(2, level.shape, generator=rng) - 1
        operation[torch.arange(longest)[:, None, None] >= depth] = -1  # the chain has ended
        bytes = bytes_of(images, self.mean, self.std)
        made = chained(bytes.repeat(self.width, 1, 1, 1), operation.flatten(1), level.flatten(1), sign.flatten(1)).unflatten(0, chains)
        return replace(MixPlan.identity(batch), sources=(augmented(images, bytes, made, shares, share, self),))

    def unit(self, images: Tensor) -> Tensor:
        """One 8-bit step (1 / 255) in normalised images."""
        if self.std is not None:
            return 1 / (255 * torch.tensor(self.std, device=images.device)[:, None, None])
        images = images.float()
        return (images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True)) / 255


def augmented(images: Tensor, bytes: Tensor, chains: Tensor, shares: Tensor, share: Tensor, policy: AugMix) -> Tensor:
    """The mixture (B, C, H, W) of images with their chains (width, B, C, H, W), by `shares` (B, width) and the `share` (B,) of all chains.
    Images and chains are 8-bit values. It adds their differences, so images that no chain changes stay exactly the same."""
    weights = (share[:, None] * shares).T.float().to(images.device, non_blocking=True)
    change = ((chains - bytes) * weights[:, :, None, None, None]).sum(0)
    return (images + change * policy.unit(images)).to(images.dtype)


def chained(images: Tensor, operations: Tensor, levels: Tensor, signs: Tensor) -> Tensor:
    """Applies transforms to images (N, C, H, W) float32 of whole numbers 0..255. `operations` (depth, N), on the CPU, are indices of
    `OPERATIONS`, -1 for none. `levels` (depth, N) are above 0 to 10, `signs` (depth, N) are -1 or 1."""
    for operation, level, sign in zip(operations, levels, signs, strict=True):
        for kind, transform in enumerate(OPERATIONS):
            rows = (operation == kind).nonzero()[:, 0]
            if len(rows):
                changed = transform(*(part.to(images.device, non_blocking=True) for part in (level[rows], sign[rows])))
                rows = rows.to(images.device, non_blocking=True)
                images = images.index_copy(0, rows, changed(images[rows]))
    return images


Transform = Callable[[Tensor], Tensor]


def autocontrast(level: Tensor, sign: Tensor) -> Transform:
    from torchvision.transforms.v2 import functional

    return lambda images: functional.autocontrast(images.byte().flatten(0, 1)[:, None]).view_as(images).float()


def equalize(level: Tensor, sign: Tensor) -> Transform:
    from torchvision.transforms.v2 import functional

    return lambda images: functional.equalize(images.byte()).float()


def posterize(level: Tensor, sign: Tensor) -> Transform:
    step = 2.0 ** (4 + (level * 0.4).floor())[:, None, None, None]
    return lambda images: (images / step).floor() * step


def solarize(level: Tensor, sign: Tensor) -> Transform:
    threshold = 256 - (level * 25.6).floor()[:, None, None, None]
    return lambda images: torch.where(images < threshold, images, 255 - images)


def rotate(level: Tensor, sign: Tensor) -> Transform:
    angle = torch.deg2rad(sign * (level * 3).floor())
    cos, sin = angle.cos(), angle.sin()
    return lambda images: moved(images, cos, -sin, sin, cos, about_centre=True)


def shear_x(level: Tensor, sign: Tensor) -> Transform:
    one, zero = torch.ones_like(level), torch.zeros_like(level)
    return lambda images: moved(images, one, sign * level * 0.03, zero, one)


def shear_y(level: Tensor, sign: Tensor) -> Transform:
    one, zero = torch.ones_like(level), torch.zeros_like(level)
    return lambda images: moved(images, one, zero, sign * level * 0.03, one)


def translate_x(level: Tensor, sign: Tensor) -> Transform:
    one, zero = torch.ones_like(level), torch.zeros_like(level)
    return lambda images: moved(images, one, zero, zero, one, x=sign * (level * images.shape[3] / 30).floor())


def translate_y(level: Tensor, sign: Tensor) -> Transform:
    one, zero = torch.ones_like(level), torch.zeros_like(level)
    return lambda images: moved(images, one, zero, zero, one, y=sign * (level * images.shape[2] / 30).floor())


OPERATIONS = (autocontrast, equalize, posterize, rotate, solarize, shear_x, shear_y, translate_x, translate_y)


def moved(
    images: Tensor,
    a: Tensor,
    b: Tensor,
    d: Tensor,
    e: Tensor,
    *,
    x: Tensor | float = 0.0,
    y: Tensor | float = 0.0,
    about_centre: bool = False,
) -> Tensor:
    """Applies an affine map to each image (N, C, H, W): pixel (u, v) of the result reads `(a u + b v + x, d u + e v + y)`, bilinearly, and is
    black outside, as in PIL. `about_centre`: positions are counted from the centre, not from the corner."""
    height, width = images.shape[2:]
    v, u = (torch.arange(side, device=images.device, dtype=torch.float32) + 0.5 for side in (height, width))
    v, u = (v - height / 2, u - width / 2) if about_centre else (v, u)
    a, b, d, e, x, y = (torch.as_tensor(part, device=images.device).float().view(-1, 1, 1) for part in (a, b, d, e, x, y))
    from_x, from_y = a * u + b * v[:, None] + x, d * u + e * v[:, None] + y
    from_x, from_y = (from_x + width / 2, from_y + height / 2) if about_centre else (from_x, from_y)
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    grid = torch.stack([2 * from_x / width - 1, 2 * from_y / height - 1], 3)
    seen = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return (seen + 1e-3).floor().clamp_(0, 255) * inside[:, None]
