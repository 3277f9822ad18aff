"""ResizeMix."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from hf_mixup.core.checks import check_known, check_mode, check_positive, check_range, check_switch
from hf_mixup.core.geometry import centred_boxes
from hf_mixup.core.plan import ONE_PASS_FROM, Boxes, MixPlan, Move
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import beta, partners, uniform


@dataclass(frozen=True)
class ResizeMix(SamplePolicy):
    """ResizeMix (Qin et al., arXiv:2012.11101; github.com/JayQine/ResizeMix): paste the whole partner, shrunk.

    The partner is resized to `tau` of its sides, with `tau` uniform in `scope`, and pasted anywhere. The label's weight is the area that is
    kept. With `mode="batch"` all images share tau, but each has its own place, as in the official code.

    Args:
        alpha: with `use_alpha`, both parameters of the Beta from which tau is drawn, above 0. 1.0 is the uniform distribution; other
            values need `use_alpha`.
        use_alpha: draw tau from the Beta; a draw outside `scope` is replaced by a uniform one from `scope` (OpenMixup's benchmarks).
        scope: smallest and largest tau.
        as_published: repeats a bug of OpenMixup. It clips a box that would cross the border, squeezes the partner into the rest, and with
            `mode="batch"` uses one place for all images. Its tables were trained with that. The official code, and ours, moves such a box
            inside.
        interpolation: `nearest` or `bilinear`.
        mode: `sample` draws tau for every image, `pair` for every two that are swapped, `batch` once (the official code).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"images"})

    alpha: float = 1.0
    use_alpha: bool = False
    scope: tuple[float, float] = (0.1, 0.8)
    as_published: bool = False
    interpolation: str = "nearest"
    mode: str = "sample"

    def __post_init__(self):
        check_positive(alpha=self.alpha)
        check_range(0.001, 1, scope=self.scope)
        check_switch(use_alpha=self.use_alpha, as_published=self.as_published)
        check_known("interpolation", self.interpolation, ["nearest", "bilinear"])
        check_mode(self.mode)
        if self.alpha != 1 and not self.use_alpha:
            raise ValueError(
                f"alpha of resizemix must go with use_alpha, got {self.alpha}; "
                'leave alpha out, or pass --mix_args \'{"resizemix": {"use_alpha": true}}\'.'
            )

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        size = tuple(shape[2:])
        pairing = partners(shape[0], self.mode, rng)
        low, high = self.scope
        tau = uniform(low, high, pairing.draws, rng)
        if self.use_alpha:
            drawn = beta(self.alpha, pairing.draws, rng)
            tau = torch.where((drawn >= low) & (drawn <= high), drawn, tau)
        tau = pairing.spread(tau)
        if self.as_published:
            row, col = (pairing.spread(torch.randint(length, (pairing.draws,), generator=rng)) for length in size)
            edges, step = cut_boxes(tau, row, col, size)
        else:
            row, col = (torch.randint(length, (shape[0],), generator=rng) for length in size)
            edges, step = moved_boxes(tau, row, col, size)
        return paste_resized(signals["images"], pairing.partner, edges, step, self.interpolation)


def moved_boxes(tau: Tensor, row: Tensor, col: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The official boxes (n, 4), and the step in pixels of the partner, (n, 2) float32."""
    edges = []
    for length, centre in zip(size, (row, col), strict=True):
        side = (tau * length).floor().long().clamp(min=1)
        end = ((centre - side // 2).clamp(min=0) + side).clamp(max=length)
        edges += [end - side, end]
    return torch.stack(edges, 1), (1 / tau).float()[:, None].expand(-1, 2)


def cut_boxes(tau: Tensor, row: Tensor, col: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The same for OpenMixup's boxes, which are CutMix's."""
    edges = centred_boxes(tau, row, col, size)
    return edges, torch.tensor(size, dtype=torch.float32) / (edges[:, 1::2] - edges[:, ::2]).clamp(min=1)


def paste_resized(images: Tensor, partner: Tensor, edges: Tensor, step: Tensor, interpolation: str) -> MixPlan:
    """The plan that pastes each partner into its box. It reads every `step`-th pixel, from the box's upper left on."""
    size = tuple(images.shape[2:])
    # float32, as in torch's resizing, so that the pixels are the same
    offsets = [(torch.arange(length) - start[:, None]).float() for length, start in zip(size, edges[:, ::2].unbind(1), strict=True)]
    steps = step[:, :, None].unbind(1)
    rows, cols = ((offset * one).floor().long().clamp(0, length - 1) for offset, one, length in zip(offsets, steps, size, strict=True))
    if interpolation == "nearest":
        small = _nearest(images, partner, rows, cols, edges)
    else:
        small = images
        for dim, (offset, one, length) in enumerate(zip(offsets, steps, size, strict=True), start=2):
            take = _partner_rows if dim == 2 else _cols
            source = (one * (offset + 0.5) - 0.5).clamp(0, length - 1)
            low = source.floor().long()
            share = (source - low).to(images.device, images.dtype)[:, None]
            share = share[..., None] if dim == 2 else share[:, :, None]
            small = torch.lerp(take(small, partner, low), take(small, partner, (low + 1).clamp(max=length - 1)), share)
    boxes = Boxes(edges, size)
    return replace(MixPlan.pair(partner, boxes, 1 - boxes.area(), (images, small)), moves=(None, Move(rows, cols)))


def _nearest(images: Tensor, partner: Tensor, rows: Tensor, cols: Tensor, edges: Tensor) -> Tensor:
    """(B, C, H, W): each pixel of a box is read from the partner at `rows` (B, H) and `cols` (B, W). Pixels outside the box are not used."""
    if images.device.type != "cpu" or images[0].numel() < ONE_PASS_FROM or images.requires_grad:
        return _cols(_partner_rows(images, partner, rows), partner, cols)
    small = torch.empty_like(images)
    for place, j, row, col, (top, bottom, left, right) in zip(small, partner.tolist(), rows, cols, edges.tolist(), strict=True):
        place[:, top:bottom, left:right] = images[j].index_select(1, row[top:bottom]).index_select(2, col[left:right])
    return small


def _partner_rows(images: Tensor, partner: Tensor, rows: Tensor) -> Tensor:
    """(B, C, H, W): the `rows` (B, H) of every partner, in one copy."""
    channels = torch.arange(images.shape[1], device=images.device)[:, None]
    partner, rows = partner.to(images.device, non_blocking=True), rows.to(images.device, non_blocking=True)
    return images[partner[:, None, None], channels, rows[:, None]]


def _cols(images: Tensor, partner: Tensor, cols: Tensor) -> Tensor:
    """The columns (B, W) of every image, which already holds the partner."""
    return images.gather(3, cols.to(images.device, non_blocking=True)[:, None, None].expand_as(images))
