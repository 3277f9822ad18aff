"""What is mixed with what (`MixPlan`), and the only functions that move pixels or labels by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_mixup.core.planes import plane_shape, planes

Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Share:
    """One share for the whole image (Mixup). `value`: (B, K), >= 0, sums to 1 over K."""

    value: Tensor

    def dense(self, size: Size) -> Tensor:
        return self.value[:, :, None, None].expand(-1, -1, *size)

    def seen(self) -> Tensor:
        """(B, K) bool: which images are visible anywhere."""
        return self.value > 0


@dataclass(frozen=True, eq=False)
class Boxes:
    """The partner inside one box, the own image outside (CutMix).

    `edges`: (B, 4) int64, `[top, bottom, left, right]` in pixels, bottom and right exclusive. `size`: (H, W) of the image.
    A box in time (VideoMix) goes through some of the `depth` planes C of (B, C, H, W) alone: `through` (B, 2) int64, the first one and the one after
    the last. None: through all. On a grid (h, w) such a box has the share of planes that it goes through.
    """

    edges: Tensor
    size: Size
    through: Tensor | None = None
    depth: int = 1

    def crossed(self, size: Size) -> tuple[Tensor, Tensor]:
        """(B, h) and (B, w) bool: the rows and the columns that cross the box. On a grid of another size, each cell samples the pixel at
        its top left, as nearest resizing does."""
        rows, cols = (_nearest(new, old, self.edges.device) for new, old in zip(size, self.size, strict=True))
        top, bottom, left, right = self.edges[:, :, None].unbind(1)
        return (rows >= top) & (rows < bottom), (cols >= left) & (cols < right)

    def inside(self, size: Size) -> Tensor:
        """(B, h, w) bool: True inside the box, on a grid of any size."""
        rows, cols = self.crossed(size)
        return rows[:, :, None] & cols[:, None, :]

    def planes(self, depth: int) -> Tensor:
        """(B, depth, 1, 1) bool: which planes a box in time goes through."""
        at = _nearest(depth, self.depth, self.edges.device)
        return ((at >= self.through[:, :1]) & (at < self.through[:, 1:]))[:, :, None, None]

    def share(self, dtype: torch.dtype) -> Tensor:
        """(B, H, W): 1 inside the box and 0 outside, on the image's own grid. Faster than `inside`."""
        height, width = self.size
        pixels = torch.arange(max(self.size), device=self.edges.device)
        spans = ((pixels >= self.edges[:, ::2, None]) & (pixels < self.edges[:, 1::2, None])).to(dtype)  # (B, 2 axes, pixels)
        return spans[:, 0, :height, None] * spans[:, 1, None, :width]

    def voxels(self, dtype: torch.dtype) -> Tensor:
        """(B, C, H, W), or (B, 1, H, W) where all planes are alike, as 1 and 0."""
        share = self.share(dtype)[:, None]
        return share if self.through is None else share * self.planes(self.depth).to(dtype)

    def dense(self, size: Size) -> Tensor:
        inside = self.inside(size).float()
        if self.through is not None:
            inside = inside * self._part_of_planes().float()[:, None, None]
        return torch.stack([1 - inside, inside], 1)

    def _part_of_planes(self) -> Tensor:
        return (self.through[:, 1] - self.through[:, 0]).double() / self.depth

    def seen(self) -> Tensor:
        """(B, K) bool: which images are visible anywhere."""
        area = self.area()
        return torch.stack([area < 1, area > 0], 1)

    def area(self) -> Tensor:
        """(B,) float64: the share of the image that the box covers; of a video, of its voxels."""
        top, bottom, left, right = self.edges.unbind(1)
        area = ((bottom - top) * (right - left)).double() / (self.size[0] * self.size[1])
        return area if self.through is None else area * self._part_of_planes()


@dataclass(frozen=True, eq=False)
class Dense:
    """A share for every pixel (FMix, GridMix, PuzzleMix). `value`: (B, K, H, W), >= 0, sums to 1 over K.

    H and W may be those of a coarser grid; then each pixel takes the nearest cell.
    """

    value: Tensor

    def dense(self, size: Size) -> Tensor:
        # not F.interpolate: it computes the nearest index in float32, which is off by one for some sizes
        rows, cols = (_nearest(new, old, self.value.device) for new, old in zip(size, self.value.shape[2:], strict=True))
        return self.value if size == tuple(self.value.shape[2:]) else self.value[:, :, rows][:, :, :, cols]

    def seen(self) -> Tensor:
        """(B, K) bool: which images are visible anywhere."""
        return self.value.amax((2, 3)) > 0


Mask = Share | Boxes | Dense


@dataclass(frozen=True, eq=False)
class Move:
    """Where the pixels of a moved image come from: pixel (r, c) is copied from `(rows[b, r], cols[b, c])`.

    `rows` (B, H), `cols` (B, W): int64.
    """

    rows: Tensor
    cols: Tensor

    def maps(self, maps: Tensor) -> Tensor:
        """Moves maps (B, C, h, w) of the images in the same way, on a grid of any size."""
        height, width = maps.shape[2:]
        rows, cols = (
            (at[:, _nearest(new, at.shape[1], at.device)] * new // at.shape[1]).to(maps.device)
            for at, new in ((self.rows, height), (self.cols, width))
        )
        batch = torch.arange(len(maps), device=maps.device)[:, None, None]
        return maps.transpose(0, 1)[:, batch, rows[:, :, None], cols[:, None]].transpose(0, 1)


@dataclass(frozen=True, eq=False)
class MixPlan:
    """What will be mixed with what, decided before any pixel moves.

    `mixed[i] = sum_k mask[i, k] * images[index[i, k]]` and `target[i] = sum_k weight[i, k] * targets[index[i, k]]`, at most 1 for each class if
    labels are united.
    Column 0 is always the own image: `index[:, 0] == arange(B)`, and `mask[:, 0]`, `weight[:, 0]` are the share kept of it.

    Attributes:
        index: (B, K) int64.
        mask: >= 0, sums to 1 over K.
        weight: (B, K) float32, sums to 1 over K unless the paper says otherwise (SnapMix, TokenMix), or labels are united.
        sources: K batches (B, C, H, W), if pixels moved before mixing (ResizeMix, PuzzleMix, RecursiveMix). They replace `images[index]`.
        moves: for each source, how its pixels moved, so that label maps can be moved too. A source that stayed has None. The whole field is
            None if the moves are not known.
        united: the target is the union of labels, for a multi-label loss (SpliceMix).
    """

    index: Tensor
    mask: Mask
    weight: Tensor
    sources: tuple[Tensor, ...] | None = None
    moves: tuple[Move | None, ...] | None = None
    united: bool = False

    @classmethod
    def pair(cls, partner: Tensor, mask: Mask | None, lam: Tensor, sources: tuple[Tensor, Tensor] | None = None) -> MixPlan:
        """The plan of two images. `partner` is (B,); `lam` (B,) is the label's share of the own image, and without a mask also its pixels' share."""
        lam = lam.double()
        own = torch.arange(len(partner), device=partner.device)
        weight = torch.stack([lam, 1 - lam], 1).float()
        return cls(torch.stack([own, partner], 1), Share(weight) if mask is None else mask, weight, sources)

    @classmethod
    def identity(cls, batch: int) -> MixPlan:
        """The plan that mixes nothing (K = 1)."""
        alone = torch.ones(batch, 1, dtype=torch.float32)
        return cls(torch.arange(batch)[:, None], Share(alone), alone)

    @property
    def lam(self) -> Tensor:
        """(B,) float32: the share of the own class in each label, `weight[:, 0]`."""
        return self.weight[:, 0]

    @property
    def partners(self) -> Tensor:
        """(B, K - 1) int64: the rows of the batch that each image is mixed with, `index[:, 1:]`."""
        return self.index[:, 1:]

    def to(self, device: torch.device | str) -> MixPlan:
        """The same plan on a device; itself where it is there."""
        parts = (self.index, self.weight, *(self.sources or ()), self.mask.edges if isinstance(self.mask, Boxes) else self.mask.value)
        if {part.device for part in parts} == {torch.device(device)}:
            return self
        match self.mask:
            case Boxes(edges, _, through):
                through = None if through is None else through.to(device, non_blocking=True)
                mask = replace(self.mask, edges=edges.to(device, non_blocking=True), through=through)
            case Share(value) | Dense(value):
                mask = type(self.mask)(value.to(device, non_blocking=True))
        sources = None if self.sources is None else tuple(source.to(device) for source in self.sources)
        index, weight = (part.to(device, non_blocking=True) for part in (self.index, self.weight))
        return replace(self, index=index, mask=mask, weight=weight, sources=sources)

    def reweighted(self, weight: Tensor) -> MixPlan:
        """The same plan with other label weights, (B, K)."""
        return self if weight is self.weight else replace(self, weight=weight)

    def dense_mask(self, size: Size) -> Tensor:
        """(B, K, h, w): the mask on a grid of any size, such as the tokens of a ViT."""
        return self.mask.dense(size)


def blend(plan: MixPlan, images: Tensor) -> Tensor:
    """Mixes `images` by the plan, in their shape and dtype.

    It is differentiable and runs on any device. The plan's shares are rounded once, to the dtype of `images`. The input is never changed;
    it is returned itself if nothing is mixed.

    Args:
        images: (B, C, H, W), features of that shape, or any input (B, ...) that `planes` can view as planes.
    """
    mixed = _blend(plan.to(images.device), planes(images))
    return mixed if mixed.shape == images.shape else mixed.reshape(images.shape)


def _blend(plan: MixPlan, images: Tensor) -> Tensor:
    if plan.index.shape[1] == 1:
        return images if plan.sources is None else plan.sources[0]
    if plan.index.shape[1] == 2:
        if images.device.type == "cpu" and images[0].numel() >= ONE_PASS_FROM and not _has_gradient(plan, images):
            return blend_examples(plan, images, torch.empty_like(images))
        own, partner = (images, images[plan.index[:, 1]]) if plan.sources is None else plan.sources
        return _mix_two(plan.mask, own, partner)
    mask = plan.dense_mask(tuple(images.shape[2:])) if isinstance(plan.mask, Dense) else plan.mask.value[:, :, None, None]
    mask = mask.to(images.dtype)
    mixed = 0  # a sum over K, because autocast would run einsum in bfloat16
    for k in range(plan.index.shape[1]):
        source = images[plan.index[:, k]] if plan.sources is None else plan.sources[k]
        mixed = mixed + mask[:, k, None] * source
    return mixed


def _has_gradient(plan: MixPlan, images: Tensor) -> bool:
    parts = (images, *(plan.sources or ()), *vars(plan.mask).values())
    return torch.is_grad_enabled() and any(isinstance(part, Tensor) and part.requires_grad for part in parts)


def _mix_two(mask: Mask, own: Tensor, partner: Tensor, out: Tensor | None = None) -> Tensor:
    """The masked mixture of two batches (B, C, H, W); `out` may be one of them."""
    size = tuple(own.shape[2:])
    if isinstance(mask, Boxes) and (own.device.type != "cpu" or size != mask.size):
        inside = mask.inside(size)[:, None]
        return torch.where(inside if mask.through is None else inside & mask.planes(own.shape[1]), partner, own)
    if isinstance(mask, Boxes):
        # on the CPU lerp is five times as fast as where, and the same for finite numbers
        return torch.lerp(own, partner, mask.voxels(own.dtype), out=out)
    share = mask.value[:, :1, None, None] if isinstance(mask, Share) else mask.dense(size)[:, :1]
    # at weights 0 and 1 lerp returns one image exactly; a sum of products may not
    return torch.lerp(partner, own, share.to(own.dtype), out=out)


# below this many values, the Python overhead of an image exceeds the memory traffic of a second pass
ONE_PASS_FROM = 3 * 64 * 64


def blend_examples(
    plan: MixPlan, examples: Sequence[Tensor] | Tensor, out: Tensor, written: Callable[[Tensor], object] = lambda part: None
) -> Tensor:
    """Same result as `blend(plan, torch.stack(examples))`, bit for bit, on the CPU.

    Each large image is read once, so this costs little more than stacking.

    Args:
        examples: images (C, H, W) or other inputs, as a list or as one batch.
        out: contiguous, (B, C, H, W) or of the other input's shape; the result is written here.
        written: called with each finished part of `out` while it is still in the processor's cache.

    Pixels as uint8, 0 to 255: whole pixels are copied (boxes, binary masks), and shares are rounded, by at most half a level.
    """
    if out.ndim != 4:
        whole = planes(examples) if isinstance(examples, Tensor) else [planes(example[None])[0] for example in examples]
        blend_examples(plan, whole, out.view(plane_shape(out.shape)), written)
        return out
    if out.dtype == torch.uint8:
        return _blend_bytes(plan, examples, out)
    small = out[0].numel() < ONE_PASS_FROM
    if plan.index.shape[1] != 2:
        mixed = blend(plan, examples if isinstance(examples, Tensor) else torch.stack(examples, out=out))
        written(out if mixed is out else out.copy_(mixed))
        return out
    own, partner = _both(plan, examples, out, small)
    if small:
        written(_mix_two(plan.mask, own, partner, out=out))
        return out
    if isinstance(plan.mask, Boxes):
        return _pasted(plan.mask, own, partner, out, written)
    own_share = plan.mask.value if isinstance(plan.mask, Share) else plan.dense_mask(tuple(out.shape[2:]))
    for mixed, one, other, share in zip(out, own, partner, own_share[:, 0].to(out.dtype), strict=True):
        written(torch.lerp(other, one, share, out=mixed))
    return out


def _both(
    plan: MixPlan, examples: Sequence[Tensor] | Tensor, out: Tensor, small: bool
) -> tuple[Sequence[Tensor] | Tensor, Sequence[Tensor] | Tensor]:
    """The images and their partners, for a plan of two. Small partners are copied into `out`; large ones are not copied."""
    if plan.sources is not None:
        own, partner = plan.sources
        return own, partner
    if not small:
        return examples, [examples[j] for j in plan.index[:, 1].tolist()]
    own = examples if isinstance(examples, Tensor) else torch.stack(examples)
    return own, torch.index_select(own, 0, plan.index[:, 1], out=out)


def _pasted(
    mask: Boxes,
    own: Sequence[Tensor] | Tensor,
    partner: Sequence[Tensor] | Tensor,
    out: Tensor,
    written: Callable[[Tensor], object] = lambda part: None,
) -> Tensor:
    """Image by image, each read once."""
    spans = [(0, out.shape[1])] * len(out) if mask.through is None else mask.through.tolist()
    for mixed, one, other, (top, bottom, left, right), span in zip(out, own, partner, mask.edges.tolist(), spans, strict=True):
        box = (slice(*span), slice(top, bottom), slice(left, right))
        mixed.copy_(one)
        mixed[box] = other[box]
        written(mixed)
    return out


def _blend_bytes(plan: MixPlan, examples: Sequence[Tensor] | Tensor, out: Tensor) -> Tensor:
    size, small = tuple(out.shape[2:]), out[0].numel() < ONE_PASS_FROM
    if plan.index.shape[1] == 1:
        images = examples if plan.sources is None else plan.sources[0]
        return out.copy_(images) if isinstance(images, Tensor) else torch.stack(images, out=out)
    if plan.index.shape[1] > 2:
        images = examples if isinstance(examples, Tensor) else torch.stack(examples)
        sources = None if plan.sources is None else tuple(source.float() for source in plan.sources)
        return out.copy_(blend(replace(plan, sources=sources), images.float()).round_())
    own, partner = _both(plan, examples, out, small)
    if isinstance(plan.mask, Boxes) and small and size == plan.mask.size:
        # the bits of one or the other: where is five times as slow
        inside = plan.mask.voxels(torch.uint8).neg_()
        return torch.bitwise_xor(own, (own ^ partner).bitwise_and_(inside), out=out)
    if isinstance(plan.mask, Boxes):
        return _pasted(plan.mask, own, partner, out)
    share = (plan.mask.value[:, 0] if isinstance(plan.mask, Share) else plan.dense_mask(size)[:, 0]).float()  # (B,) or (B, H, W)
    if small:
        return out.copy_(torch.lerp(partner.float(), own.float(), share.view(len(out), 1, *(share.shape[1:] or (1, 1)))).round_())
    # image by image with NumPy: it converts bytes to floats in small pieces in the cache and takes three quarters of torch's time
    first, second = np.empty((2, *out.shape[1:]), np.float32)
    for mixed, one, other, part in zip(out, own, partner, share.numpy(), strict=True):
        np.multiply(one.numpy(), part, out=first, dtype=np.float32)
        np.multiply(other.numpy(), 1 - part, out=second, dtype=np.float32)
        np.rint(np.add(first, second, out=first), out=mixed.numpy(), casting="unsafe", dtype=np.float32)
    return out


def mix_targets(plan: MixPlan, targets: Tensor, num_labels: int | None = None) -> Tensor:
    """Mixes labels by the plan's weights. Returns float32 (B, num_labels). No other code mixes labels.

    `targets` are class numbers (B,), with `num_labels`, or one-hot or soft (B, num_labels).
    """
    weight, index = plan.weight.to(targets.device), plan.index.to(targets.device)
    if targets.ndim == 1:
        mixed = weight.new_zeros(len(index), num_labels).scatter_add_(1, targets.long().take(index), weight)
    elif index.shape[1] == 1:
        mixed = weight * targets.float()
    else:
        mixed = (weight[:, :, None] * targets.float()[index]).sum(1)
    return mixed.clamp(max=1) if plan.united else mixed


def move_maps(plan: MixPlan, maps: Tensor) -> Tensor:
    """Moves label maps by the plan: (B, H, W) or (B, D, H, W), the class number of every pixel. Returns the same shape.

    Every pixel gets the label of the image that is visible there. Values are copied, so ignored values stay too. The maps may have another
    grid than the images.

    Raises:
        ValueError: if the plan mixes two images in one pixel, which then has no class (checked on the CPU only), or if it moved images in
            an unknown way.
    """
    check_moves_maps(plan)
    plan = plan.to(maps.device)
    seen = planes(maps)
    parts = [seen[rows] for rows in plan.index.unbind(1)]
    if plan.moves is not None:
        parts = [part if move is None else move.maps(part) for part, move in zip(parts, plan.moves, strict=True)]
    mask = plan.dense_mask(tuple(seen.shape[2:]))
    moved = parts[0]
    for k in range(1, len(parts)):
        moved = torch.where(mask[:, k, None] > 0.5, parts[k], moved)
    return moved.reshape(maps.shape)


def check_moves_maps(plan: MixPlan, name: str = "the method") -> None:
    """Raises ValueError for a plan that cannot move label maps. `name` is the method's name."""
    if plan.sources is not None and plan.moves is None:
        raise ValueError(
            f"label maps need a method that tells where each pixel comes from, got {name}, which moves or changes pixels first; use cutmix or resizemix."
        )
    if isinstance(plan.mask, Boxes) and plan.mask.through is not None:
        raise ValueError(f"label maps need one mask for all frames, got {name}, which cuts videos in time; use cutmix.")
    values = None if isinstance(plan.mask, Boxes) else plan.mask.value
    if values is not None and values.device.type == "cpu" and bool(((values > 0) & (values < 1)).any()):
        raise ValueError(
            f"label maps need one image in every pixel, got {name}, which mixes two images in one pixel; use a method of whole pixels, such as cutmix or fmix."
        )


# names of the label column in data sets of transformers
LABEL_KEYS = ("labels", "label", "label_ids")


def is_mask(name: str) -> bool:
    """Whether an input of this name masks another one, such as `attention_mask`, `padding_mask` and `pixel_mask`."""
    return name.endswith("_mask")


def mix_others(plan: MixPlan, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's other inputs after mixing, by name, (B, ...) each. A mask, such as `attention_mask`, becomes the union over the images that
    are visible. All others keep the own row."""
    index = plan.index

    def united(rows: Tensor) -> Tensor:
        parts, seen = rows[index.to(rows.device)], plan.mask.seen()
        shown = seen.to(rows.device).view(*seen.shape, *[1] * (rows.ndim - 1))
        return (parts * shown.to(rows.dtype)).amax(1)

    return {
        name: united(rows) if is_mask(name) and isinstance(rows, Tensor) and index.shape[1] > 1 else rows for name, rows in others.items()
    }


def onehot(labels: Tensor, num_labels: int) -> Tensor:
    """Turns class numbers (B,), or targets (B, num_labels), into float32 (B, num_labels)."""
    return labels.float() if labels.ndim == 2 else F.one_hot(labels.long(), num_labels).float()


def _nearest(new: int, old: int, device: torch.device) -> Tensor:
    """(new,) int64: the indices that nearest resizing reads, from a line of `old` samples to one of `new`."""
    return torch.arange(new, device=device) * old // new
