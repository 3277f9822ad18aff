"""The attention of a network. It is recomputed from a block's input during a pass, so the network can keep its fused attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_mixup.core.policy import Policy, Signals
from hf_mixup.networks.families import Blocks, Layout, blocks_of, blocks_of_one_grid, effective_weight
from hf_mixup.networks.passes import Tap, watched
from hf_mixup.networks.signals.features import Activation
from hf_mixup.networks.signals.signal import EarlySignal, LateSignal, reading, resized


class Reader:
    """Recomputes the attention of one block from the block's arguments, in float32.

    It is the softmax before dropout, as in the methods' own code.
    """

    def __init__(self, row: Blocks, block: nn.Module):
        self.row, self.block = row, block
        self.attention = block.get_submodule(row.attention)
        merged = 1 if row.reduction is None else getattr(self.attention, row.reduction)
        if merged != 1 or getattr(self.attention, "linear_attention", False):
            raise ValueError(
                f"the method needs attention from every patch to every patch, got a {type(block).__name__} that merges keys; "
                "use a network whose last stage does not."
            )

    def importance(self, hidden: Tensor, *rest: Any) -> Tensor:
        """The class token's attention, or `received` if no class token is classified: (B, N) or (B, h, w)."""
        return self.class_row(hidden) if self.row.class_token else self.received(hidden, *rest)

    def class_row(self, hidden: Tensor) -> Tensor:
        """The class token's attention, (B, N), the mean over heads."""
        hidden = self._normalised(hidden)
        (query, query_bias), (key, _) = self._projections()
        asked = F.linear(hidden[:, 0], query, query_bias).unflatten(1, (self._heads, -1))
        # instead of every token's key: one vector for each head, `asked` times the key matrix, which is much less work.
        # The bias of the keys adds the same number for every token, and the softmax ignores it
        asked = torch.einsum("bhd,hdc->bhc", asked * asked.shape[2] ** -0.5, key.unflatten(0, (self._heads, -1)))
        return (asked @ hidden.mT).softmax(-1).mean(1)

    def received(self, hidden: Tensor, *rest: Any) -> Tensor:
        """The attention that each patch gets from the patches, the mean over heads and patches: (B, N) or (B, h, w)."""
        hidden = self._normalised(hidden)
        if self.row.windows:
            return self._received_in_windows(hidden if hidden.ndim == 4 else hidden.unflatten(1, rest[0]))
        first = self.row.prefix
        return sum(attention[:, first:, first:].mean(1) for attention in self._maps(hidden)) / self._heads

    def full(self, hidden: Tensor, *rest: Any) -> Tensor:
        """All attention, (B, N, N), the mean over heads. Rows are the tokens that attend."""
        return sum(self._maps(self._normalised(hidden))) / self._heads

    def keys(self, hidden: Tensor, *rest: Any) -> Tensor:
        """The key of every token, (B, N, d), the mean over heads."""
        weight, bias = self._projections()[1]
        return F.linear(self._normalised(hidden), weight, bias).unflatten(2, (self._heads, -1)).mean(2)

    @property
    def _heads(self) -> int:
        return getattr(self.attention, self.row.heads)

    def _normalised(self, hidden: Tensor) -> Tensor:
        norm = self.block.get_submodule(self.row.norm)
        return norm(hidden.to(norm.weight.dtype)).float()

    def _projections(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of the query and of the key."""
        linear = [self.attention.get_submodule(name) for name in self.row.projections]
        weights = [effective_weight(module).float() for module in linear]
        biases = [None if module.bias is None else module.bias.float() for module in linear]
        if len(linear) == 1:  # query, key and value in one matrix
            weights = weights[0].chunk(3)
            biases = [None, None] if biases[0] is None else biases[0].chunk(3)
        return list(zip(weights[:2], biases[:2], strict=True))

    def _maps(self, hidden: Tensor, bias: Tensor | None = None) -> Iterator[Tensor]:
        """(B, N, N) for one head after the other. All heads together could be the largest tensor of the step."""
        query, key = (F.linear(hidden, *part).unflatten(2, (self._heads, -1)).transpose(1, 2) for part in self._projections())
        query = query * query.shape[3] ** -0.5
        for head in range(self._heads):
            scores = query[:, head] @ key[:, head].mT
            yield (scores if bias is None else scores + bias[:, head]).softmax(-1)

    def _received_in_windows(self, hidden: Tensor) -> Tensor:
        """(B, h, w) from (B, h, w, C), as in the block: shift and cut into windows, attention inside, and back."""
        timm = self.row.projections == ("qkv",)
        batch, height, width, _ = hidden.shape
        (down, across), shift = _pair(self.block.window_size), _pair(self.block.shift_size)
        away, back = (-shift[0], -shift[1]), shift
        padding = (0, 0, 0, -width % across, 0, -height % down)
        # padding before shifting differs from shifting before padding
        hidden = F.pad(hidden.roll(away, (1, 2)), padding) if timm else F.pad(hidden, padding).roll(away, (1, 2))
        size = tuple(hidden.shape[1:3])
        bias = (self.attention._get_rel_pos_bias() if timm else self.attention.relative_position_bias()).float()
        if any(shift):
            # patches from opposite sides of the image, which the shift joins, do not attend to each other
            rows, columns = (_regions(*line, hidden.device) for line in zip(size, (down, across), shift, strict=True))
            region = _windows((3 * rows[:, None] + columns)[None, :, :, None], down, across)
            bias = bias - 100.0 * (region != region.mT)[:, None].repeat(batch, 1, 1, 1)
        share = sum(attention.mean(1) for attention in self._maps(_windows(hidden, down, across), bias)) / self._heads
        share = share.view(batch, size[0] // down, size[1] // across, down, across).transpose(2, 3).reshape(batch, *size)
        if timm:
            return share[:, :height, :width].roll(back, (1, 2))
        return share.roll(back, (1, 2))[:, :height, :width]


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def _windows(hidden: Tensor, down: int, across: int) -> Tensor:
    """Cuts (B, H, W, C) into windows (B * windows, down * across, C)."""
    batch, height, width, channels = hidden.shape
    cut = hidden.view(batch, height // down, down, width // across, across, channels).transpose(2, 3)
    return cut.reshape(-1, down * across, channels)


def _regions(length: int, window: int, shift: int, device: torch.device) -> Tensor:
    """(length,): 0 at the front, 1 in the last window, 2 for places that were shifted in from the other end."""
    place = torch.arange(length, device=device)
    return (place >= length - window).long() + (place >= length - shift).long()


def attention_tap(block: nn.Module, read: Callable[..., Tensor]) -> Tap:
    """A tap that applies `read` to a block's input.

    It reads at the block, not inside, while the parameters that FSDP shards are gathered; in float32 and without gradients.
    """

    def passing(args: tuple, output: Any) -> Tensor:
        with torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):
            return read(*args)

    return Tap(block, passing)


class GridAttention:
    """The last block's attention on the grid of patches, of any forward pass: (B, h, w) float32.

    Args:
        kind: the method of `Reader` that reads the block.
    """

    def __init__(self, network: nn.Module, kind: str):
        row, blocks = blocks_of(network)
        self.layout, self.block = Layout.of(network), blocks[-1]
        self.modules = [self.block]
        self.read = getattr(Reader(row, self.block), kind)

    def tap(self, size: tuple[int, int]) -> Tap:
        """`size` is (H, W) of the images of the pass."""

        def on_grid(*args: Any) -> Tensor:
            share = self.read(*args)
            return share if share.ndim == 3 else self.layout.maps(share[:, :, None], size)[:, 0]

        return attention_tap(self.block, on_grid)


class Attention(LateSignal):
    """(B, h, w): the last block's attention from the class token, or from all patches, to each patch of the mixed images."""

    def __init__(self, network: nn.Module, policy: Policy):
        self.attention = GridAttention(network, "importance")
        self.modules = self.attention.modules

    def taps(self, size: tuple[int, int]) -> list[Tap]:
        return [self.attention.tap(size)]

    def value(self, seen: list[Tensor]) -> Tensor:
        return seen[0]


class TokenScores(EarlySignal):
    """(B, h, w), at least 0: how important each place of a clean image is for its label."""

    def __init__(self, network: nn.Module, policy: Policy):
        self.network, self.policy = network, policy
        self.source = Activation(network, policy) if policy.scores == "activation" else GridAttention(network, "importance")
        self.modules, self.of_classes = self.source.modules, isinstance(self.source, Activation)

    def take(self, images: Tensor, targets: Tensor, signals: Signals) -> Tensor:
        if isinstance(self.source, Activation):
            return self.source.take(images, targets, signals).relu()
        seen = resized(images, self.policy.teacher_size)
        with reading(self.network):
            _, (share,) = watched(self.network, seen, [self.source.tap(tuple(seen.shape[2:]))])
        return share


class PatchAttention(EarlySignal):
    """(B, h, w): the attention that each patch of a clean image gets from the patches.

    It also adds `clean_logits` (B, num_labels) of that pass to the signals.
    """

    def __init__(self, network: nn.Module, policy: Policy):
        self.network, self.attention = network, GridAttention(network, "received")
        self.modules = self.attention.modules

    def take(self, images: Tensor, targets: Tensor, signals: Signals) -> Tensor:
        with reading(self.network):
            signals["clean_logits"], (share,) = watched(self.network, images, [self.attention.tap(tuple(images.shape[2:]))])
        return share


class TokenGrid(EarlySignal):
    """(h, w), of which only the shape matters: the grid of tokens that all blocks of the network have."""

    def __init__(self, network: nn.Module, policy: Policy):
        blocks_of_one_grid(network)
        self.layout = Layout.of(network)

    def take(self, images: Tensor, targets: Tensor, signals: Signals) -> Tensor:
        height, width = (side // patch for side, patch in zip(images.shape[2:], self.layout.patch, strict=True))
        return images.new_zeros(()).expand(height, width)


class AttentionLayers(LateSignal):
    """(B, L, N, N): the attention of all L blocks in the pass of the mixed images, the mean over heads; rows are the tokens that attend."""

    def __init__(self, network: nn.Module, policy: Policy):
        row, self.modules = blocks_of_one_grid(network)
        self.readers = [Reader(row, block) for block in self.modules]

    def taps(self, size: tuple[int, int]) -> list[Tap]:
        return [attention_tap(block, reader.full) for block, reader in zip(self.modules, self.readers, strict=True)]

    def value(self, seen: list[Tensor]) -> Tensor:
        return torch.stack(seen, 1)
