"""What a network attends to, recomputed in passing from what goes into a block, so that fused attention stays in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_mixup.core.policy import Policy, Signals
from hf_mixup.networks.signals.features import Activation, Layout, numbered
from hf_mixup.networks.signals.signal import EarlySignal, LateSignal, reading, resized


@dataclass(frozen=True)
class Blocks:
    """Where a family of networks keeps its attention.

    Attributes:
        path: names of the blocks, with `*` for a number.
        norm, attention: of a block, what is normalised and what attends.
        projections: of the attention, query and key, or one name where both are made by one matrix.
        heads: of the attention, the attribute with their number.
        prefix: tokens before the patches.
        class_token: whether the first of them is what is classified.
        windows: whether only patches of one window see each other.
        reduction: of the attention, the attribute with the number of keys that are merged into one, where there is one.
    """

    path: str
    norm: str
    attention: str
    projections: tuple[str, ...]
    heads: str = "num_attention_heads"
    prefix: int = 0
    class_token: bool = False
    windows: bool = False
    reduction: str | None = None


_VIT = ("layernorm_before", "attention", ("q_proj", "k_proj"))
_PVT = ("layer_norm_1", "attention", ("query", "key"))
# by `config.model_type`; the kinds of timm are told apart below
BLOCKS: dict[str, Blocks] = {
    "vit": Blocks("vit.layers.*", *_VIT, prefix=1, class_token=True),
    "deit": Blocks("deit.layers.*", *_VIT, prefix=2, class_token=True),
    "swin": Blocks("swin.encoder.layers.*.blocks.*", *_VIT, windows=True),
    "pvt": Blocks(
        "pvt.encoder.block.*.*", "layer_norm_1", "attention.self", ("query", "key"), prefix=1, class_token=True,
        reduction="sequences_reduction_ratio",
    ),
    "pvt_v2": Blocks("pvt_v2.encoder.layers.*.blocks.*", *_PVT, reduction="spatial_reduction_ratio"),
}  # fmt: skip


def blocks_of(network: nn.Module) -> tuple[Blocks, list[nn.Module]]:
    """The table's row and the blocks themselves. Raises ValueError for networks whose attention is not known."""
    kind = network.config.model_type
    row = _timm_blocks(network.timm_model) if kind == "timm_wrapper" else BLOCKS.get(kind)
    if row is None:
        name = network.config.architecture if kind == "timm_wrapper" else kind
        raise ValueError(
            f"a network whose attention can be read is needed, which are {', '.join(BLOCKS)} and timm's vit, deit and swin, got "
            f"{name!r}, which can give saliency, and features if it is convolutional; take one of those, or another method."
        )
    return row, [network.get_submodule(name) for name in numbered(network, row.path)]


def _timm_blocks(model: nn.Module) -> Blocks | None:
    from timm.layers import Attention
    from timm.models.swin_transformer import SwinTransformer, WindowAttention
    from timm.models.vision_transformer import VisionTransformer

    if isinstance(model, SwinTransformer) and type(model.layers[-1].blocks[-1].attn) is WindowAttention:
        return Blocks("timm_model.layers.*.blocks.*", "norm1", "attn", ("qkv",), "num_heads", windows=True)
    if isinstance(model, VisionTransformer):
        attention = getattr(model.blocks[-1], "attn", None)
        # subclasses, and queries and keys with a norm of their own, attend in other ways
        if type(attention) is Attention and isinstance(attention.q_norm, nn.Identity):
            return Blocks(
                "timm_model.blocks.*", "norm1", "attn", ("qkv",), "num_heads",
                prefix=model.num_prefix_tokens, class_token=model.cls_token is not None and model.global_pool == "token",
            )  # fmt: skip
    return None


class Reader:
    """Recomputes the attention of one block from the block's arguments, in float32.

    It is that of the softmax, before dropout, as the methods' own codes have it.
    """

    def __init__(self, row: Blocks, block: nn.Module):
        self.row, self.block = row, block
        self.attention = block.get_submodule(row.attention)
        merged = 1 if row.reduction is None else getattr(self.attention, row.reduction)
        if merged != 1 or getattr(self.attention, "linear_attention", False):
            raise ValueError(
                f"attention from every patch to every patch is needed, got a {type(block).__name__} that merges keys; "
                "take a network whose last stage does not."
            )

    def importance(self, hidden: Tensor, *rest: Any) -> Tensor:
        """What the class token attends to, or `received` where no class token is classified. (B, N) or (B, h, w)."""
        return self.class_row(hidden) if self.row.class_token else self.received(hidden, *rest)

    def class_row(self, hidden: Tensor) -> Tensor:
        """(B, N): the mean over heads."""
        hidden = self._normalised(hidden)
        (query, query_bias), (key, _) = self._projections()
        asked = F.linear(hidden[:, 0], query, query_bias).unflatten(1, (self._heads, -1))
        # instead of every token's key, one vector a head that stands in for `asked` before the key matrix: a fraction of the
        # work. The bias of the keys adds the same to every token, which the softmax does not see
        asked = torch.einsum("bhd,hdc->bhc", asked * asked.shape[2] ** -0.5, key.unflatten(0, (self._heads, -1)))
        return (asked @ hidden.mT).softmax(-1).mean(1)

    def received(self, hidden: Tensor, *rest: Any) -> Tensor:
        """How much of the other patches' attention every patch gets, as the mean over heads and patches. (B, N) or (B, h, w)."""
        hidden = self._normalised(hidden)
        if self.row.windows:
            return self._received_in_windows(hidden if hidden.ndim == 4 else hidden.unflatten(1, rest[0]))
        first = self.row.prefix
        return sum(attention[:, first:, first:].mean(1) for attention in self._maps(hidden)) / self._heads

    def full(self, hidden: Tensor, *rest: Any) -> Tensor:
        """(B, N, N): rows are the tokens that attend. The mean over heads."""
        return sum(self._maps(self._normalised(hidden))) / self._heads

    @property
    def _heads(self) -> int:
        return getattr(self.attention, self.row.heads)

    def _normalised(self, hidden: Tensor) -> Tensor:
        norm = self.block.get_submodule(self.row.norm)
        return norm(hidden.to(norm.weight.dtype)).float()

    def _projections(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of the query and of the key."""
        linear = [self.attention.get_submodule(name) for name in self.row.projections]
        weights = [module.weight.float() for module in linear]
        biases = [None if module.bias is None else module.bias.float() for module in linear]
        if len(linear) == 1:  # query, key and value in one
            weights = weights[0].chunk(3)
            biases = [None, None] if biases[0] is None else biases[0].chunk(3)
        return list(zip(weights[:2], biases[:2], strict=True))

    def _maps(self, hidden: Tensor, bias: Tensor | None = None) -> Iterator[Tensor]:
        """(B, N, N) for one head after the other: all at once they could be the largest tensor of the step."""
        query, key = (F.linear(hidden, *part).unflatten(2, (self._heads, -1)).transpose(1, 2) for part in self._projections())
        query = query * query.shape[3] ** -0.5
        for head in range(self._heads):
            scores = query[:, head] @ key[:, head].mT
            yield (scores if bias is None else scores + bias[:, head]).softmax(-1)

    def _received_in_windows(self, hidden: Tensor) -> Tensor:
        """From (B, h, w, C) as the block does: into shifted windows, attention inside, and back. (B, h, w)."""
        timm = self.row.projections == ("qkv",)
        batch, height, width, _ = hidden.shape
        (down, across), shift = _pair(self.block.window_size), _pair(self.block.shift_size)
        away, back = (-shift[0], -shift[1]), shift
        padding = (0, 0, 0, -width % across, 0, -height % down)
        # what is padded before it is shifted is not the same as what is shifted before it is padded
        hidden = F.pad(hidden.roll(away, (1, 2)), padding) if timm else F.pad(hidden, padding).roll(away, (1, 2))
        size = tuple(hidden.shape[1:3])
        bias = (self.attention._get_rel_pos_bias() if timm else self.attention.relative_position_bias()).float()
        if any(shift):
            # what a shift brings together from opposite sides of the image does not see each other
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
    """(B, H, W, C) to (B * windows, down * across, C)."""
    batch, height, width, channels = hidden.shape
    cut = hidden.view(batch, height // down, down, width // across, across, channels).transpose(2, 3)
    return cut.reshape(-1, down * across, channels)


def _regions(length: int, window: int, shift: int, device: torch.device) -> Tensor:
    """(length,): 0 in front, 1 in the last window, 2 for what was shifted in from the other end."""
    place = torch.arange(length, device=device)
    return (place >= length - window).long() + (place >= length - shift).long()


class AttentionTap:
    """Keeps what `read` makes of a block's input, in the passes it is armed for.

    The hook is on the block, not inside: there, transformers' checkpointed layers would run it again in the backward pass, and
    `torch.compile` would lose what it keeps. It computes at once, while parameters sharded by FSDP are there.
    """

    def __init__(self, block: nn.Module, read: Callable[..., Tensor]):
        self.read, self.armed, self.value = read, False, None
        block.register_forward_hook(self._passed)

    def _passed(self, block: nn.Module, args: tuple, output: Any) -> None:
        if self.armed:
            with torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):
                self.value = self.read(*args)

    def arm(self) -> None:
        self.armed, self.value = True, None

    def disarm(self) -> None:
        self.armed, self.value = False, None

    def take(self) -> Tensor:
        value = self.value
        self.disarm()
        if value is None:
            raise ValueError(
                "attention was expected from the forward pass, got none; torch.compile loses it under gradient checkpointing of "
                "this network, so use only one of them, or check that the network uses all of its blocks."
            )
        return value


class AttentionTaps:
    """Attention on the grid of patches, of any forward pass: (B, h, w) float32.

    Args:
        kind: the method of `Reader` that reads the last block.
    """

    def __init__(self, network: nn.Module, kind: str):
        row, blocks = blocks_of(network)
        self.layout, self.size = Layout.of(network), None
        self.tap = AttentionTap(blocks[-1], getattr(Reader(row, blocks[-1]), kind))

    def arm(self, size: tuple[int, int]) -> None:
        """`size` is (H, W) of the images that are to pass."""
        self.size = size
        self.tap.arm()

    def disarm(self) -> None:
        self.tap.disarm()

    def take(self) -> Tensor:
        share = self.tap.take()
        return share if share.ndim == 3 else self.layout.maps(share[:, :, None], self.size)[:, 0]


class Attention(LateSignal):
    """(B, h, w): the last block's attention from the class token, or from all patches, to each patch of the mixed images."""

    def __init__(self, network: nn.Module, policy: Policy):
        self.taps = AttentionTaps(network, "importance")

    def arm(self, size: tuple[int, int]) -> None:
        self.taps.arm(size)

    def take(self) -> Tensor:
        return self.taps.take()

    def disarm(self) -> None:
        self.taps.disarm()


class TokenScores(EarlySignal):
    """(B, h, w), at least 0: what every place of a clean image is worth to its label."""

    def __init__(self, network: nn.Module, policy: Policy):
        self.network, self.policy = network, policy
        self.activation = Activation(network, policy) if policy.scores == "activation" else None
        self.taps = None if policy.scores == "activation" else AttentionTaps(network, "importance")

    def take(self, images: Tensor, targets: Tensor, signals: Signals) -> Tensor:
        if self.activation is not None:
            return self.activation.take(images, targets, signals).relu()
        seen = resized(images, self.policy.teacher_size)
        self.taps.arm(tuple(seen.shape[2:]))
        with reading(self.network):
            self.network(pixel_values=seen)
        return self.taps.take()

    def disarm(self) -> None:
        (self.taps or self.activation).disarm()


class PatchAttention(EarlySignal):
    """(B, h, w): how much of the patches' attention every patch of a clean image gets.

    `logits` (B, num_labels) are those of the pass that it was last taken from.
    """

    def __init__(self, network: nn.Module, policy: Policy):
        self.network, self.taps = network, AttentionTaps(network, "received")
        self.logits: Tensor | None = None

    def take(self, images: Tensor, targets: Tensor, signals: Signals) -> Tensor:
        self.taps.arm(tuple(images.shape[2:]))
        with reading(self.network):
            self.logits = self.network(pixel_values=images).logits
        return self.taps.take()

    def disarm(self) -> None:
        self.taps.disarm()
        self.logits = None


class TokenGrid(EarlySignal):
    """(h, w), of which only the shape says something: the one grid of tokens that a network has from first to last."""

    def __init__(self, network: nn.Module, policy: Policy):
        blocks_of_one_grid(network)
        self.layout = Layout.of(network)

    def take(self, images: Tensor, targets: Tensor, signals: Signals) -> Tensor:
        height, width = (side // patch for side, patch in zip(images.shape[2:], self.layout.patch, strict=True))
        return images.new_zeros(()).expand(height, width)


class AttentionLayers(LateSignal):
    """(B, L, N, N): the attention of all blocks while the mixed images pass, as the mean over heads; rows are those that attend."""

    def __init__(self, network: nn.Module, policy: Policy):
        row, blocks = blocks_of_one_grid(network)
        self.taps = [AttentionTap(block, Reader(row, block).full) for block in blocks]

    def arm(self, size: tuple[int, int]) -> None:
        for tap in self.taps:
            tap.arm()

    def take(self) -> Tensor:
        return torch.stack([tap.take() for tap in self.taps], 1)

    def disarm(self) -> None:
        for tap in self.taps:
            tap.disarm()


def blocks_of_one_grid(network: nn.Module) -> tuple[Blocks, list[nn.Module]]:
    """Raises ValueError where tokens are merged on the way, or no class token gathers them."""
    row, blocks = blocks_of(network)
    if row.windows or row.reduction is not None or not row.class_token:
        raise ValueError(
            f"one grid of tokens from first to last is needed, with a class token, got {type(network).__name__}; take a ViT or DeiT."
        )
    return row, blocks
