"""RICAP: crops of four images, patched together."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_mixup.core.checks import check_known, check_positive
from hf_mixup.core.plan import Dense, MixPlan, Move
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import beta, integers


@dataclass(frozen=True)
class RICAP(SamplePolicy):
    """RICAP (Takahashi et al., ACML 2018, arXiv:1811.09030; github.com/jackryo/ricap): an image of four patches. Each patch is a random crop of
    an image of the batch. Labels follow the area.

    The patches meet at row `round(H beta_1)` and column `round(W beta_2)`, with `beta ~ Beta(alpha, alpha)`. The own image is at the top left;
    the shares are symmetric, so this loses nothing. Partners come from permutations, as in the authors' code, so an image may be mixed with
    itself.

    Args:
        alpha: both parameters of the Beta, above 0. The paper calls it beta and uses 0.3.
        mode: `sample` draws the corner and the crops for every image, `batch` once (the authors' code).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"images"})

    alpha: float = 0.3
    mode: str = "sample"

    def __post_init__(self):
        check_positive(alpha=self.alpha)
        check_known("mode", self.mode, ["sample", "batch"])

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        batch, size = shape[0], torch.tensor(shape[2:])
        index = torch.stack([torch.arange(batch), *(torch.randperm(batch, generator=rng) for _ in range(3))], 1)
        draws = batch if self.mode == "sample" else 1
        corner = (beta(self.alpha, 2 * draws, rng).view(draws, 2) * size).round().long()  # (draws, 2): row and column
        # start and size of the patches top left, top right, bottom left, bottom right
        lower = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
        start = lower * corner[:, None]
        length = torch.where(lower.bool(), size - corner[:, None], corner[:, None])
        crop = integers(torch.zeros_like(length), size - length + 1, rng)
        start, length, crop = (part.expand(batch, -1, -1) for part in (start, length, crop))
        weight = (length.prod(2).double() / size.prod()).float()
        patched, mask = patch(signals["images"], index, corner.expand(batch, -1), crop - start)
        from_start = [torch.arange(side) for side in shape[2:]]
        moves = tuple(
            Move(*((at + by[:, 0, axis, None]).clamp(0, len(at) - 1) for axis, at in enumerate(from_start)))
            for by in (crop - start).split(1, 1)
        )
        return MixPlan(index, Dense(mask), weight, (patched,) * 4, moves)


def patch(images: Tensor, index: Tensor, corner: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The patched images (B, C, H, W), and the mask of their sources (B, 4, H, W) float32.

    Args:
        index: (B, 4), of the images at the top left, top right, bottom left and bottom right.
        corner: (B, 2), the row and the column where the lower and the right patches begin.
        shift: (B, 4, 2), to be added to positions of the result to get those of each source.
    """
    index, corner, shift = (part.to(images.device, non_blocking=True) for part in (index, corner, shift))
    rows, cols = (torch.arange(side, device=images.device) for side in images.shape[2:])
    patch = 2 * (rows >= corner[:, :1])[:, :, None] + (cols >= corner[:, 1:])[:, None].long()  # (B, H, W)
    mask = torch.stack([patch == k for k in range(4)], 1).float()
    every = torch.arange(len(index), device=images.device)[:, None, None]
    move = shift[every, patch]
    source = index[every, patch], rows[:, None] + move[..., 0], cols + move[..., 1]
    return images.movedim(1, 3)[source].movedim(3, 1).contiguous(), mask
