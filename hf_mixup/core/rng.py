"""Randomness as a function of a key. Nothing here, and no policy, touches a global random stream."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


def keyed(*key: int) -> torch.Generator:
    """A CPU generator for this key. Different keys (other numbers, or another length) give independent streams."""
    # hashed, because torch's CPU generator keeps only the low 32 bits of a seed: `seed << 32 | step` would drop the seed
    digest = hashlib.blake2b(repr(tuple(map(int, key))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


def fresh() -> torch.Generator:
    """A CPU generator that is seeded by one number of torch's global stream."""
    return keyed(int(torch.randint(2**62, ())))


class Draws:
    """Random numbers for a batch, image by image. The numbers of an image depend on its key only, not on the rest of the batch.

    They are drawn on the CPU and copied, so they are the same on every device.
    """

    def __init__(self, keys: Sequence[Sequence[int]], device: torch.device | str = "cpu"):
        self.rngs = [keyed(*key) for key in keys]
        self.device = torch.device(device)

    def each(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        """(B, ...): calls `draw` with the generator of each image, and stacks the results."""
        return torch.stack([draw(rng) for rng in self.rngs]).to(self.device)

    def normal(self, *size: int) -> Tensor:
        return self.each(lambda rng: torch.randn(size, generator=rng))

    def uniform(self, low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * self.each(lambda rng: torch.rand(size, generator=rng))


def normal(size: tuple[int, ...], rng: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Image-sized standard normal noise, drawn on `device`. The values differ between kinds of device."""
    if torch.device(device).type == "cpu":
        return torch.randn(size, generator=rng, dtype=torch.float32)
    on_device = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=rng)))
    return torch.randn(size, generator=on_device, device=device, dtype=torch.float32)


def uniform(low: float, high: float, count: int, rng: torch.Generator) -> Tensor:
    """(count,) float64 in [low, high)."""
    return low + (high - low) * torch.rand(count, generator=rng, dtype=torch.float64)


def integers(low: Tensor, high: Tensor, rng: torch.Generator) -> Tensor:
    """int64, uniform in [low, high) for every element; `low` if that range is empty."""
    return low + (torch.rand(low.shape, generator=rng, dtype=torch.float64) * (high - low).clamp(min=1)).long()


def hashed(keys: Tensor, draw: int) -> Tensor:
    """int64, a hash of (key, draw) for every key: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), the same on every device.

    For draws of single images, because creating one generator for each image takes too long."""

    def signed(value: int) -> int:
        return (value + 2**63) % 2**64 - 2**63

    def folded(x: Tensor, shift: int) -> Tensor:
        return x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))  # the mask removes the copies of the sign bit

    x = keys + signed(0x9E3779B97F4A7C15 * (draw + 1))
    x = folded(x, 30) * signed(0xBF58476D1CE4E5B9)
    x = folded(x, 27) * signed(0x94D049BB133111EB)
    return folded(x, 31)


def hashed_integers(keys: Tensor, draw: int, high: int) -> Tensor:
    """int64, uniform in [0, high) for every key; for high much smaller than 2**32."""
    return (((hashed(keys, draw) >> 32) & (2**32 - 1)) * high) >> 32


def log_gamma_variate(alpha: float, size: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """The logarithm of Gamma(alpha, 1) draws, float64. In log space small alphas neither underflow nor tie."""
    boosted = torch._standard_gamma(torch.full(size, alpha + 1, dtype=torch.float64), generator=rng)
    return boosted.log_() + torch.rand(size, generator=rng, dtype=torch.float64).neg_().log1p_().div_(alpha)


def beta(alpha: float, count: int, rng: torch.Generator, second: float | None = None) -> Tensor:
    """(count,) float64 draws of Beta(alpha, second), where `second` is alpha if not given."""
    if second is None:
        first, other = log_gamma_variate(alpha, (2, count), rng)
    else:
        first, other = (log_gamma_variate(parameter, (count,), rng) for parameter in (alpha, second))
    return torch.sigmoid(first - other)


def dirichlet(alpha: float, rows: int, parts: int, rng: torch.Generator) -> Tensor:
    """(rows, parts) float64 draws of the symmetric Dirichlet distribution; rows sum to 1."""
    return torch.softmax(log_gamma_variate(alpha, (rows, parts), rng), 1)


def categorical(scores: Tensor, rng: torch.Generator) -> Tensor:
    """(B,) int64: draws one column for each row of `scores` (B, N), which are log-probabilities up to a constant.

    It adds Gumbel noise that is drawn on the CPU, so the host does not wait for scores on a device. A row of only -inf gives column 0.
    """
    noise = torch.empty(scores.shape, dtype=torch.float64).exponential_(generator=rng).log_().neg_()
    return (scores + noise.to(scores.device, scores.dtype, non_blocking=True)).argmax(1)


@dataclass(frozen=True, eq=False)
class Pairing:
    """Which images are mixed with each other, and which share a draw.

    Attributes:
        partner: (B,) int64.
        row: (B,) int64, the draw that each image uses, in [0, draws).
        draws: the number of independent draws (lam, box, ...).
    """

    partner: Tensor
    row: Tensor
    draws: int

    def spread(self, drawn: Tensor) -> Tensor:
        """(B, ...): the draw of each image, from (draws, ...)."""
        if self.draws == len(self.row):
            return drawn  # they are in order
        return drawn[self.row.to(drawn.device, non_blocking=True)]


MODES = ("sample", "pair", "batch")


def partners(batch: int, mode: str, rng: torch.Generator) -> Pairing:
    """Pairs the images of a batch at random.

    `sample`: a uniform permutation, and one draw for each image. `batch`: a uniform permutation, and one draw for all, as in the papers'
    own code. `pair`: images are grouped in random pairs; the two swap places and share a draw (timm's `pair` mode reverses the batch
    instead). With an odd number, one image stays with itself.
    """
    order = torch.randperm(batch, generator=rng)
    if mode == "sample":
        return Pairing(order, torch.arange(batch), batch)
    if mode == "batch":
        return Pairing(order, torch.zeros(batch, dtype=torch.int64), 1)
    # order[0] with order[1], order[2] with order[3], ...
    seat = torch.arange(batch)
    other = torch.where((seat ^ 1) < batch, seat ^ 1, seat)
    partner, row = torch.empty_like(order), torch.empty_like(order)
    partner[order], row[order] = order[other], seat // 2
    return Pairing(partner, row, (batch + 1) // 2)


class MixKey(NamedTuple):
    """The place of a batch in a training run. All draws for the batch depend on it only, so a resumed run repeats them.

    Attributes:
        seed: the run's `mix_seed`.
        rank: index of the process.
        step: optimizer steps done.
        micro_step: batches done since the last optimizer step, under gradient accumulation.
        repeat: index of the repeat of one batch (`mix_repeat`).
        total_steps: optimizer steps of the whole run. Schedules read it; no draw depends on it.
        epoch: whole epochs done, or -1 if unknown. Schedules of `mix_rate` and `mix_prob` read it; no draw depends on it.
        epochs: epochs of the whole run, or 0 if unknown.
    """

    seed: int
    rank: int
    step: int
    micro_step: int = 0
    repeat: int = 0
    total_steps: int = 0
    epoch: int = -1
    epochs: int = 0

    def own_rng(self) -> torch.Generator:
        """For pairs, lam and boxes. Every process has another stream."""
        return keyed(self.seed, self.rank, self.step, self.micro_step, self.repeat)

    def layer_rng(self, place: int) -> torch.Generator:
        """For draws of one layer of the network. Every layer and every process has another stream."""
        return keyed(self.seed, self.rank, self.step, self.micro_step, self.repeat, 2, place)

    def shared_rng(self) -> torch.Generator:
        """For choices that change which parameters are used. All processes have the same stream, so that their graphs agree."""
        return keyed(self.seed, self.step, self.micro_step, self.repeat)

    def step_rng(self) -> torch.Generator:
        """For random choices inside the training step: the same on all processes, but independent of `shared_rng`."""
        return keyed(self.seed, self.step, self.micro_step, self.repeat, 0, 1)
