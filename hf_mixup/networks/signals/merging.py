"""Attention in a pass that merges similar tokens (ToMe, arXiv:2210.09461)."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hf_mixup.core.policy import Policy, Signals
from hf_mixup.networks.families import Layout, blocks_of_one_grid, first_tensor, with_first
from hf_mixup.networks.passes import changing, watched
from hf_mixup.networks.signals.attention import Reader, attention_tap
from hf_mixup.networks.signals.signal import EarlySignal, reading


class MergedAttention(EarlySignal):
    """(B, h, w) float32: how much each patch of a clean image attends to the class token in one block, the mean over heads. In this pass,
    patches with similar keys are merged after every earlier block. Patches that were merged have one value.

    The policy's fields set how many are merged (`merged`, a share of all) and which block is read (`depth`, a share of the blocks).
    """

    def __init__(self, network: nn.Module, policy: Policy):
        self.row, blocks = blocks_of_one_grid(network)
        self.network, self.layout = network, Layout.of(network)
        self.merged, self.count = policy.merged, len(blocks)
        self.modules = blocks[: max(round(policy.depth * len(blocks)), 1)]
        self.readers = [Reader(self.row, block) for block in self.modules]

    def take(self, images: Tensor, targets: Tensor, signals: Signals) -> Tensor:
        height, width = (side // patch for side, patch in zip(images.shape[2:], self.layout.patch, strict=True))
        prefix, away = self.row.prefix, merge_counts(int(self.merged * height * width), self.count)
        place = torch.arange(height * width, device=images.device).expand(len(images), -1)  # for each patch, the index of its token
        keys: list[Tensor] = []
        sizes = None

        def merge(output: Any, count: int) -> Any:
            nonlocal place, sizes
            hidden = first_tensor(output)
            with torch.autocast(hidden.device.type, enabled=False):
                # tokens that are not patches stay; the two matched halves alternate over all tokens, as in ToMe
                into, left = matched_tokens(keys[-1][:, prefix:], count, prefix % 2)
                patches, sizes = merged_tokens(hidden[:, prefix:].float(), sizes, into, left)
            place = into.gather(1, place)
            return with_first(output, torch.cat([hidden[:, :prefix], patches.to(hidden.dtype)], 1))

        *before, last = self.modules
        # it is read first and changed afterwards
        taps = [
            attention_tap(block, lambda *args, reader=reader: keys.append(reader.keys(*args)))
            for block, reader in zip(before, self.readers, strict=False)
        ]
        with reading(self.network), ExitStack() as changes:
            for block, count in zip(before, away, strict=False):
                if count:
                    changes.enter_context(changing(block, lambda output, count=count: merge(output, count)))
            _, seen = watched(self.network, images, [*taps, attention_tap(last, self.readers[-1].full)])
        return seen[-1][:, prefix:, 0].gather(1, place).view(-1, height, width)


def merge_counts(total: int, blocks: int) -> list[int]:
    """How many tokens each block merges, `total` in all. The number falls linearly, from 3 parts in the first block to 1 in the last."""
    steps = torch.linspace(1.5, 0.5, blocks, dtype=torch.float64).cumsum(0)
    ends = (steps / steps[-1] * total).round().long()
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


def matched_tokens(keys: Tensor, count: int, odd: int) -> tuple[Tensor, int]:
    """Merges `count` tokens by their keys (B, N, d). Returns the new index of each token, (B, N) int64, and how many tokens are left.

    Every second token, from `odd` on, is matched with the token among the others whose key has the largest cosine with its own. The `count`
    best matches are merged, or fewer if there are fewer. Tokens that stay come first, in order, then the others.
    """
    keys = keys / keys.norm(dim=2, keepdim=True).clamp(min=1e-12)
    every = torch.arange(keys.shape[1], device=keys.device)
    moving, staying = every[odd::2], every[1 - odd :: 2]
    count = min(count, len(moving) if len(staying) else 0)
    likeness, target = (keys[:, moving] @ keys[:, staying].mT).max(2)
    order = likeness.argsort(dim=1, descending=True, stable=True)
    kept = order[:, count:].sort(1).values
    into = torch.empty(keys.shape[:2], dtype=torch.int64, device=keys.device)
    into[:, staying] = torch.arange(len(staying), device=keys.device) + len(moving) - count
    gone = into[:, staying].gather(1, target)
    own = torch.arange(len(moving) - count, device=keys.device).expand(len(keys), -1)
    into[:, moving] = gone.scatter(1, kept, own)
    return into, len(every) - count


def merged_tokens(tokens: Tensor, sizes: Tensor | None, into: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """Merges tokens (B, N, C) with `sizes`: the means (B, left, C), and the number of patches in each (B, left, 1)."""
    sizes = tokens.new_ones(*tokens.shape[:2], 1) if sizes is None else sizes
    index = into[:, :, None]
    together = tokens.new_zeros(len(tokens), left, 1).scatter_add_(1, index, sizes)
    summed = tokens.new_zeros(len(tokens), left, tokens.shape[2]).scatter_add_(1, index.expand_as(tokens), tokens * sizes)
    return summed / together, together
