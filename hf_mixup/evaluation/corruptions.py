"""The common corruptions of ImageNet-C and CIFAR-10-C (arXiv:1903.12261), for pixels in [0, 1], and their mean error.

Draws are keyed by the row of the image, so they do not depend on the batch size or the number of processes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hf_mixup.core.checks import check_known
from hf_mixup.core.rng import Draws


def smoothing(size: int, sigma: float, truncate: float = 4.0, device: torch.device | str = "cpu") -> Tensor:
    """The matrix (size, size) that smooths a line of `size` samples by a Gaussian, mirrored at its ends, for any sigma."""
    radius = int(truncate * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, device=device)
    weight = torch.exp(-0.5 * (offsets / max(sigma, 1e-6)) ** 2)
    # d c b a | a b c d | d c b a
    place = (torch.arange(size, device=device)[:, None] + offsets) % (2 * size)
    place = torch.minimum(place, 2 * size - 1 - place)
    return torch.zeros(size, size, device=device).scatter_add_(1, place, (weight / weight.sum()).expand(size, -1))


def blurred(images: Tensor, sigma: float, truncate: float = 4.0) -> Tensor:
    """Images (..., H, W) smoothed by a Gaussian."""
    rows, cols = (smoothing(size, sigma, truncate, images.device) for size in images.shape[-2:])
    return rows @ images @ cols.T


def sampled(images: Tensor, rows: Tensor, cols: Tensor, mode: str = "bilinear", padding: str = "border") -> Tensor:
    """Images (B, C, H, W) read at pixel coordinates (B, h, w)."""
    height, width = images.shape[2:]
    grid = torch.stack([2 * cols / max(width - 1, 1) - 1, 2 * rows / max(height - 1, 1) - 1], 3)
    return F.grid_sample(images, grid, mode=mode, padding_mode=padding, align_corners=True)


def _coordinates(images: Tensor) -> tuple[Tensor, Tensor]:
    """The pixel coordinates of images (B, C, H, W): rows and columns, (B, H, W) each."""
    height, width = images.shape[2:]
    rows, cols = torch.meshgrid(
        torch.arange(height, device=images.device).float(), torch.arange(width, device=images.device).float(), indexing="ij"
    )
    return rows.expand(len(images), -1, -1), cols.expand(len(images), -1, -1)


def zoomed(images: Tensor, factor: float) -> Tensor:
    """The images enlarged around their centre."""
    middle = [(side - 1) / 2 for side in images.shape[2:]]
    rows, cols = ((line - centre) / factor + centre for line, centre in zip(_coordinates(images), middle, strict=True))
    return sampled(images, rows, cols)


def motion(images: Tensor, radius: int, sigma: float, angle: Tensor) -> Tensor:
    """Blurs in one direction along a line: `2 * radius + 1` steps of whole pixels, weighted by half a Gaussian. `angle`: (B,) in degrees."""
    steps = torch.arange(2 * radius + 1, device=images.device)
    weight = torch.exp(-0.5 * (steps / sigma) ** 2)
    weight = (weight / weight.sum()).tolist()
    angle = torch.deg2rad(angle)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    height, width = images.shape[2:]
    out = torch.zeros_like(images)
    for step, share in enumerate(weight):
        if share < 1e-4:
            break
        down, right = (step * angle.sin()).round().long(), (step * angle.cos()).round().long()
        rows = (torch.arange(height, device=images.device) + down[:, None]).clamp(0, height - 1)
        cols = (torch.arange(width, device=images.device) + right[:, None]).clamp(0, width - 1)
        out += share * images.permute(0, 2, 3, 1)[batch, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
    return out


def plasma(size: tuple[int, int], decay: float, draws: Draws) -> Tensor:
    """Clouds (B, 1, H, W) from 0 to 1, by the diamond-square algorithm on a torus whose side is the next power of two."""
    side = 2 ** math.ceil(math.log2(max(*size, 2)))
    cloud = torch.zeros(len(draws.rngs), side, side, device=draws.device)
    step, wobble = side, 100.0

    def around(total: Tensor) -> Tensor:
        return total / 4 + wobble * draws.uniform(-wobble, wobble, *total.shape[1:])

    while step >= 2:
        half = step // 2
        corners = cloud[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 1)
        cloud[:, half::step, half::step] = around(pairs + pairs.roll(-1, 2))
        centres = cloud[:, half::step, half::step]
        cloud[:, ::step, half::step] = around(centres + centres.roll(1, 1) + corners + corners.roll(-1, 2))
        cloud[:, half::step, ::step] = around(centres + centres.roll(1, 2) + corners + corners.roll(-1, 1))
        step, wobble = half, wobble / decay
    cloud = cloud - cloud.amin((1, 2), keepdim=True)
    cloud = cloud / cloud.amax((1, 2), keepdim=True)
    return cloud[:, None, : size[0], : size[1]]


def gaussian_noise(images: Tensor, draws: Draws, scale: float) -> Tensor:
    return images + scale * draws.normal(*images.shape[1:])


def shot_noise(images: Tensor, draws: Draws, photons: float) -> Tensor:
    rates = iter((images * photons).cpu())
    return draws.each(lambda rng: torch.poisson(next(rates), generator=rng)) / photons


def impulse_noise(images: Tensor, draws: Draws, amount: float) -> Tensor:
    hit, salt = draws.uniform(0, 1, 2, *images.shape[1:]).unbind(1)
    return torch.where(hit <= amount, (salt <= 0.5).to(images.dtype), images)


def speckle_noise(images: Tensor, draws: Draws, scale: float) -> Tensor:
    return images + images * scale * draws.normal(*images.shape[1:])


def gaussian_blur(images: Tensor, draws: Draws, sigma: float) -> Tensor:
    return blurred(images, sigma)


def glass_blur(images: Tensor, draws: Draws, sigma: float, reach: int, times: int) -> Tensor:
    """Swaps pixels with near ones. The official loop does so pixel after pixel; here all pixels of a round move at once."""
    images = blurred(images, sigma)
    height, width = images.shape[2:]
    rows, cols = _coordinates(images)
    for _ in range(times):
        # from -reach to reach - 1, as with numpy's randint
        down, right = draws.each(lambda rng: torch.randint(-reach, reach, (2, height, width), generator=rng)).unbind(1)
        images = sampled(images, (rows + down).clamp(0, height - 1), (cols + right).clamp(0, width - 1), mode="nearest")
    return blurred(images, sigma)


def defocus_blur(images: Tensor, draws: Draws, radius: float, soft: float) -> Tensor:
    """Blurs by a disk whose edge is smoothed by a small Gaussian."""
    reach = 8 if radius <= 8 else int(radius)
    line = torch.arange(-reach, reach + 1, device=images.device)
    disk = (line[:, None] ** 2 + line**2 <= radius**2).float()
    disk = blurred(disk / disk.sum(), soft, truncate=(1 if radius <= 8 else 2) / soft)
    channels = images.shape[1]
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    return F.conv2d(padded, disk.expand(channels, 1, -1, -1), groups=channels)


def motion_blur(images: Tensor, draws: Draws, radius: int, sigma: float) -> Tensor:
    return motion(images, radius, sigma, draws.uniform(-45, 45))


def zoom_blur(images: Tensor, draws: Draws, count: int, step: float) -> Tensor:
    total = 2 * images  # the image, and its zoom by 1
    for place in range(1, count):
        total = total + zoomed(images, 1 + place * step)
    return total / (count + 1)


def fog(images: Tensor, draws: Draws, amount: float, decay: float) -> Tensor:
    brightest = images.amax((1, 2, 3), keepdim=True)
    return (images + amount * plasma(tuple(images.shape[2:]), decay, draws)) * brightest / (brightest + amount)


def frost(images: Tensor, draws: Draws, keep: float, amount: float) -> Tensor:
    """Adds drawn crystals: ridges of clouds in a bluish white. (The official code adds photographs of frost.)"""
    size = tuple(images.shape[2:])
    ridges = [1 - (2 * plasma(size, decay, draws) - 1).abs() for decay in (1.6, 1.9, 2.2)]
    crystals = (0.35 * ridges[0] + 0.65 * torch.maximum(ridges[1], ridges[2]) ** 3).clamp(0, 1)
    colour = torch.tensor([0.84, 0.92, 1.0], device=images.device).view(1, 3, 1, 1) if images.shape[1] == 3 else 0.92
    return keep * images + amount * crystals * colour


def snow(
    images: Tensor, draws: Draws, mean: float, scale: float, zoom: float, least: float, radius: int, sigma: float, keep: float
) -> Tensor:
    flakes = zoomed(mean + scale * draws.normal(1, *images.shape[2:]), zoom)
    flakes = torch.where(flakes < least, 0, flakes).clamp(0, 1)
    flakes = motion(flakes, radius, sigma, draws.uniform(-135, -45))
    faded = keep * images + (1 - keep) * torch.maximum(images, 1.5 * grey(images) + 0.5)
    return faded + flakes + flakes.rot90(2, (2, 3))


def spatter(images: Tensor, draws: Draws, mean: float, scale: float, sigma: float, least: float, strength: float, mud: int) -> Tensor:
    """Adds drops of water, or mud. Water is shaded by the slope of the drops. (The official code uses their edges, by OpenCV.)"""
    liquid = blurred(mean + scale * draws.normal(1, *images.shape[2:]), sigma)
    wet = liquid >= least
    if mud:
        cover = blurred(wet.float(), strength)
        cover = torch.where(cover < 0.8, 0, cover)
        return images * (1 - cover) + cover * _colour(images, (63, 42, 20))
    depth = blurred(wet.float(), 1.0)
    slope = depth - depth.roll((1, 1), (2, 3))
    drops = torch.where(wet, liquid * (0.5 + slope).clamp(0, 1), 0)
    drops = drops / drops.amax((2, 3), keepdim=True).clamp_min(1e-6)
    return images + strength * drops * _colour(images, (175, 238, 238))


def contrast(images: Tensor, draws: Draws, keep: float) -> Tensor:
    mean = images.mean((2, 3), keepdim=True)
    return (images - mean) * keep + mean


def brightness(images: Tensor, draws: Draws, amount: float) -> Tensor:
    """Adds to the value in HSV; hue and saturation stay."""
    value = images.amax(1, keepdim=True)
    brighter = (value + amount).clamp(max=1)
    return torch.where(value > 0, images * brighter / value.clamp_min(1e-6), brighter)


def saturate(images: Tensor, draws: Draws, factor: float, more: float) -> Tensor:
    """Scales the saturation in HSV and adds to it; hue and value stay. A grey pixel has hue 0, which is red, so adding makes it red."""
    value = images.amax(1, keepdim=True)
    span = value - images.amin(1, keepdim=True)
    wanted = (factor * span / value.clamp_min(1e-6) + more).clamp(0, 1)
    share = (value - images) / span.clamp_min(1e-6)  # 0 for the strongest channel, 1 for the weakest
    red = (torch.arange(images.shape[1], device=images.device) > 0).to(images.dtype).view(1, -1, 1, 1)
    return value * (1 - wanted * torch.where(span > 0, share, red))


def jpeg(images: Tensor, draws: Draws, quality: int) -> Tensor:
    """The channels of an image that is not RGB are compressed one by one, as grey."""
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    rgb = images.shape[1] == 3
    read = []
    for image in (pixels.permute(0, 2, 3, 1) if rgb else pixels.flatten(0, 1)).numpy():
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "JPEG", quality=quality)
        read.append(np.array(Image.open(stream)))
    made = torch.from_numpy(np.stack(read))
    return (made.permute(0, 3, 1, 2) if rgb else made.view(images.shape)).to(images) / 255


def pixelate(images: Tensor, draws: Draws, keep: float) -> Tensor:
    for sides in ([max(int(side * keep), 1) for side in images.shape[2:]], images.shape[2:]):
        rows, cols = (boxed(old, new, images.device) for old, new in zip(images.shape[2:], sides, strict=True))
        images = rows @ images @ cols.T
    return images


def boxed(old: int, new: int, device: torch.device | str = "cpu") -> Tensor:
    """The matrix (new, old) that resizes a line like Pillow's box filter: the mean of the samples whose centre is in the box."""
    middle = (torch.arange(new, dtype=torch.float64)[:, None] + 0.5) * old / new
    distance = (torch.arange(old, dtype=torch.float64) + 0.5 - middle) / max(old / new, 1)
    inside = ((distance > -0.5) & (distance <= 0.5)).float()
    return (inside / inside.sum(1, keepdim=True)).to(device)


def elastic_transform(images: Tensor, draws: Draws, alpha: float, sigma: float, shift: float) -> Tensor:
    """Moves three points by up to `shift`, and every pixel by a smooth field. All three numbers are shares of the image's side.

    One interpolation does both. (The official code does one after the other.)
    """
    height, width = images.shape[2:]
    side = min(height, width)
    third = side // 3
    centre = torch.tensor([height // 2, width // 2], dtype=torch.float32, device=images.device)
    points = centre + third * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]], device=images.device)
    moved = points + draws.uniform(-shift * side, shift * side, 3, 2)
    ones = torch.ones(len(images), 3, 1, device=images.device)
    back = torch.linalg.solve(torch.cat([moved, ones], 2), points.expand(len(images), -1, -1))  # (B, 3, 2): the source of each pixel
    field = draws.uniform(-1, 1, 2, height, width)
    field = alpha * side * (blurred(field, sigma * side, truncate=3) if sigma else field)
    rows, cols = (line + part for line, part in zip(_coordinates(images), field.unbind(1), strict=True))
    places = torch.stack([rows, cols, torch.ones_like(rows)], 3).flatten(1, 2) @ back  # (B, H * W, 2)
    rows, cols = places.unflatten(1, (height, width)).unbind(3)
    return sampled(images, rows, cols, padding="reflection")


def grey(images: Tensor) -> Tensor:
    """(B, 1, H, W): the perceived brightness."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    return (images * torch.tensor([0.299, 0.587, 0.114], device=images.device).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _colour(images: Tensor, rgb: tuple[int, int, int]) -> Tensor:
    colour = torch.tensor(rgb, device=images.device).view(1, 3, 1, 1) / 255
    return colour if images.shape[1] == 3 else colour.mean()


# The constants of ImageNet-C and of CIFAR-10-C, by severity (arXiv:1903.12261, github.com/hendrycks/robustness). Sizes in pixels
# are for images of 224 and of 32 pixels; those of the elastic transform are shares of the side.
_LARGE: dict[str, Sequence] = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "shot_noise": (60, 25, 12, 5, 3),
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "zoom_blur": ((12, 0.01), (16, 0.01), (11, 0.02), (13, 0.02), (11, 0.03)),
    "snow": (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "elastic_transform": ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
    "jpeg_compression": (25, 18, 15, 10, 7),
    "speckle_noise": (0.15, 0.2, 0.35, 0.45, 0.6),
    "gaussian_blur": (1, 2, 3, 4, 6),
    "spatter": (
        (0.65, 0.3, 4, 0.69, 0.6, 0),
        (0.65, 0.3, 3, 0.68, 0.6, 0),
        (0.65, 0.3, 2, 0.68, 0.5, 0),
        (0.65, 0.3, 1, 0.65, 1.5, 1),
        (0.67, 0.4, 1, 0.65, 1.5, 1),
    ),
    "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
}
_SMALL: dict[str, Sequence] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.1),
    "shot_noise": (500, 250, 100, 75, 50),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": ((7, 0.01), (12, 0.01), (16, 0.01), (21, 0.01), (26, 0.01)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "elastic_transform": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    "jpeg_compression": (80, 65, 58, 50, 40),
    "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),
    "spatter": (
        (0.62, 0.1, 0.7, 0.7, 0.5, 0),
        (0.65, 0.1, 0.8, 0.7, 0.5, 0),
        (0.65, 0.3, 1, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1),
        (0.65, 0.1, 0.5, 0.68, 0.6, 1),
    ),
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
}
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, snow, frost, fog, brightness,
        contrast, elastic_transform, pixelate, speckle_noise, gaussian_blur, spatter, saturate,
    )
} | {"jpeg_compression": jpeg}  # fmt: skip

# the 15 of ImageNet-C, and the 4 for choosing hyper-parameters
COMMON_CORRUPTIONS = tuple(_LARGE)[:15]
EXTRA_CORRUPTIONS = tuple(_LARGE)[15:]
SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(images: Tensor, name: str, severity: int, rows: Sequence[int], seed: int = 0) -> Tensor:
    """Applies one of the common corruptions to images (B, C, H, W) in [0, 1], on their device.

    Images of up to 64 pixels get the constants of CIFAR-10-C, larger ones those of ImageNet-C. Lengths in pixels are not scaled to other image
    sizes.

    Args:
        severity: 1 to 5.
        rows: (B,) the images' rows in the data set, which key their random draws. The draws are the same at all severities.
    """
    check_known("corruption", name, _FUNCTIONS)
    check_known("severity", str(severity), map(str, SEVERITIES))
    table = _SMALL if max(images.shape[2:]) <= 64 else _LARGE
    constants = table[name][severity - 1]
    constants = constants if isinstance(constants, tuple) else (constants,)
    number = list(_FUNCTIONS).index(name)
    draws = Draws([(seed, number, int(row)) for row in rows], images.device)
    return _FUNCTIONS[name](images, draws, *constants).clamp(0, 1)


def corruption(name: str, severity: int, seed: int = 0) -> Callable[[Tensor, Sequence[int]], Tensor]:
    """`corrupt` as a function of images and rows."""
    return partial(corrupt, name=name, severity=severity, seed=seed)


# AlexNet's error on each corruption of ImageNet-C, the mean of five severities (table of arXiv:1903.12261)
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880, "glass_blur": 0.826268,
    "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572, "fog": 0.819324, "brightness": 0.564592,
    "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip


def mean_corruption_error(errors: Mapping[str, Sequence[float]], *, alexnet: bool = False) -> float:
    """The mean error over the 15 common corruptions, 0 to 1, each averaged over its five severities.

    Args:
        errors: the five errors of each corruption, by its name. Other corruptions are ignored.
        alexnet: divide by AlexNet's errors, as for ImageNet-C. It has no meaning for other data sets.

    Raises:
        ValueError: if a corruption or a severity is missing.
    """
    for name in COMMON_CORRUPTIONS:
        if len(errors.get(name, ())) != len(SEVERITIES):
            raise ValueError(
                f"the mean corruption error needs five severities of all 15 corruptions, got {len(errors.get(name, ()))} of {name!r}; "
                "measure the others as well."
            )
    means = {name: sum(errors[name]) / len(SEVERITIES) for name in COMMON_CORRUPTIONS}
    return sum(mean / (ALEXNET_ERRORS[name] if alexnet else 1) for name, mean in means.items()) / len(COMMON_CORRUPTIONS)
