"""SaliencyMix."""

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_mixup.core.checks import check_mode, check_normalisation, check_positive, check_switch
from hf_mixup.core.geometry import box_plan, centred_boxes
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import beta, partners


@dataclass(frozen=True)
class SaliencyMix(SamplePolicy):
    """SaliencyMix (Uddin et al., ICLR 2021, arXiv:2006.01791; github.com/SaliencyMix/SaliencyMix): CutMix with
    the box at the most salient place of the partner.

    The box is centred at the most salient pixel of the partner by OpenCV's fine-grained saliency (Montabone and Soto, 2010). It is computed
    here for a whole batch at once, without OpenCV. `lam ~ Beta(alpha, alpha)`; the label's weight is the area that is kept.

    OpenCV reads 8-bit images. The authors' code and OpenMixup give it normalised floats, and OpenCV reads their raw bytes. So their box follows
    rounding noise. They also use one box for the whole batch, from the first image's partner. Here every image has the box of its own partner,
    from the 8-bit image. `as_published=True` with `mode="batch"` repeats what they ran.

    Of videos (B, T, C, H, W), which the paper does not have, the saliency is the mean over the frames, each an image of its own, and the box is the
    same in all of them.

    Args:
        alpha: both parameters of the Beta. The paper uses 1.0; the published CIFAR tables of OpenMixup use 0.2.
        as_published: saliency of the bytes of floats (up to OpenCV's own rounding of them), the bug above.
        mean, std: what the images, or frames, were normalised with, a value for each channel, so that their 8-bit values come back exactly.
            If None, each image is stretched from its smallest value to its largest, which moves few peaks.
        mode: `sample` draws lam and takes a box for every image. Two swapped images (`pair`), or the whole `batch`
            (the authors' code), share lam and the box of the first of them.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"images"})

    alpha: float = 1.0
    as_published: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    mode: str = "sample"

    def __post_init__(self):
        check_positive(alpha=self.alpha)
        check_switch(as_published=self.as_published)
        check_mode(self.mode)
        check_normalisation(self.mean, self.std)

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        size = tuple(shape[2:])
        pairing = partners(shape[0], self.mode, rng)
        lam = beta(self.alpha, pairing.draws, rng)
        # the image whose partner gives the box: the first of those that share a draw
        first = torch.full((pairing.draws,), shape[0]).scatter_reduce(0, pairing.row, torch.arange(shape[0]), "amin")
        images = signals["images"]
        source = pairing.partner[first].to(images.device, non_blocking=True)
        # if partners are a permutation, it is cheaper to permute peaks than images
        alone = len(source) < len(images)
        row, col = self._peaks(images[source] if alone else images, signals.frames or 1)
        edges = centred_boxes((1 - lam).sqrt(), *((row, col) if alone else (row[source], col[source])), size)
        return box_plan(pairing.partner, pairing.spread(edges), size)

    def _peaks(self, images: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """On the CPU of as many images at a time as stay in its cache."""
        few = max(1, 2**18 // (frames * images[0, 0].numel())) if images.device.type == "cpu" else len(images)
        rows, cols = zip(*(peaks(self._saliency(part, frames)) for part in images.split(few)), strict=True)
        return torch.cat(rows), torch.cat(cols)

    def _saliency(self, images: Tensor, frames: int) -> Tensor:
        if frames > 1:
            return self._saliency(images.unflatten(1, (frames, -1)).flatten(0, 1), 1).unflatten(0, (-1, frames)).float().mean(1)
        if self.as_published:
            return published_saliency(images)
        return fine_grained(blur8(gray8(bytes_of(images, self.mean, self.std))))


def bytes_of(images: Tensor, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Tensor:
    """The images before their normalisation: (B, C, H, W) float32, whole numbers 0..255."""
    images = images.float()
    if mean is None:
        low, high = (bound((1, 2, 3), keepdim=True) for bound in (images.amin, images.amax))  # aminmax takes twenty times as long
        return (images - low).mul_(255 / (high - low).clamp(min=1e-12)).round_()
    if len(mean) != images.shape[1]:
        raise ValueError(f"mean and std need a value for each of the images' {images.shape[1]} channels, got {mean}; give as many.")
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (mean, std))
    return (images * std).add_(mean).mul_(255).round_().clamp_(0, 255)


def gray8(images: Tensor) -> Tensor:
    """(B, H, W): the gray of images (B, 1 or 3, H, W), rounded. The channels get OpenCV's weights for blue, green, red, although they are
    RGB, because the authors' code passes them in that order."""
    return _gray(images).add_(0.5).floor_()


def _gray(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images[:, 0].clone()
    if images.shape[1] != 3:
        raise ValueError(f"images must have 1 or 3 channels for SaliencyMix, got {images.shape[1]}; use another method, such as CutMix.")
    first, second, third = images.unbind(1)
    return first * 0.114 + second * 0.587 + third * 0.299


def blur8(gray: Tensor) -> Tensor:
    """Two blurs by [1 2 1] / 4 in both directions, each rounded to whole numbers."""
    return _blur(_blur(gray).add_(0.5).floor_()).add_(0.5).floor_()


def _blur(gray: Tensor) -> Tensor:
    # a line of one pixel cannot be reflected
    padded = F.pad(gray[:, None], (1, 1, 1, 1), mode="reflect" if min(gray.shape[1:]) > 1 else "replicate")[:, 0]
    rows = (padded[:, :-2] + padded[:, 2:]).add_(padded[:, 1:-1], alpha=2)
    return (rows[:, :, :-2] + rows[:, :, 2:]).add_(rows[:, :, 1:-1], alpha=2).div_(16)


def fine_grained(gray: Tensor, centre: Tensor | None = None) -> Tensor:
    """OpenCV's fine-grained saliency (B, H, W) of blurred gray images (B, H, W). Both hold whole numbers 0..255.

    It compares each pixel with the mean of its surroundings in six windows. `centre` holds the pixels' values, if not `gray`.
    """
    centre = gray if centre is None else centre
    size = gray.shape[1:]
    # cumulative sums of whole numbers below 2**24 are exact in float32
    total = gray if 255 * gray[0].numel() < 2**24 else gray.double()
    total = F.pad(total.cumsum(1).cumsum(2), (1, 0, 1, 0))
    brighter, darker = torch.zeros_like(centre), torch.zeros_like(centre)
    # windows larger than the image are all the same
    for reach, times in Counter(min(reach, max(size)) for reach in (12, 24, 48, 28, 56, 112)).items():
        contrast = _sums(_sums(total, 1, reach), 2, reach).float()
        ends = [torch.arange(length + 1, device=gray.device, dtype=gray.dtype) for length in size]
        area = _sums(ends[0], 0, reach)[:, None] * _sums(ends[1], 0, reach)
        # the pixel's value minus the mean of the others, in whole numbers
        contrast.sub_(centre).div_(1 - area.clamp(min=2)).add_(centre)
        # truncated in two halves, because torch's floor and ceil are ten times as fast as its trunc
        brighter.add_(contrast.clamp(min=0).floor_(), alpha=times)
        darker.sub_(contrast.clamp_(max=0).ceil_(), alpha=times)
    brighter, darker = _stretch(brighter), _stretch(darker)
    highest = torch.maximum(*(part.amax((1, 2), keepdim=True) for part in (brighter, darker)))
    # stored in 8 bits, so a larger sum of both wraps around
    return (255 * (brighter + darker) / highest.clamp(min=1)).floor().int().bitwise_and(255)


def _sums(total: Tensor, dim: int, reach: int) -> Tensor:
    """Sums along `dim`, from `reach - 1` values before each to `reach` after it. `total` holds cumulative sums that begin with 0."""
    length = total.shape[dim] - 1
    reach = min(reach, length)
    end = total.narrow(dim, length, 1).expand(*(reach if axis == dim else -1 for axis in range(total.ndim)))
    sums = torch.cat([total.narrow(dim, reach + 1, length - reach), end], dim)
    sums.narrow(dim, reach, length - reach).sub_(total.narrow(dim, 1, length - reach))
    return sums


def _stretch(values: Tensor) -> Tensor:
    return (255 * values / values.amax((1, 2), keepdim=True).clamp(min=1)).floor()


def published_saliency(images: Tensor) -> Tensor:
    """What OpenCV computes from floats: it reads bytes, so it sees only the first quarter of each row."""
    gray = _blur(_blur(_gray(images.float()))).contiguous()
    return fine_grained(gray, gray.view(torch.uint8)[:, :, : gray.shape[2]].float())


def peaks(saliency: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column (B,) of the largest value, the first one in reading order."""
    place = saliency.flatten(1).argmax(1)
    return place // saliency.shape[2], place % saliency.shape[2]
