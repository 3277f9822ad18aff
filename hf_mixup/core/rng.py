"""Randomness as a function of a key. Nothing here, and no policy, touches a global random stream."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


def keyed(*key: int) -> torch.Generator:
    """A CPU generator for this key. Keys that differ in any number, or in length, give independent streams."""
    # hashed, because torch's CPU generator keeps only the low 32 bits of a seed: `seed << 32 | step` would drop the seed
    digest = hashlib.blake2b(repr(tuple(map(int, key))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


def fresh() -> torch.Generator:
    """A CPU generator that follows from one number of torch's global stream."""
    return keyed(int(torch.randint(2**62, ())))


class Draws:
    """Random numbers for a batch, image by image: those of an image follow from its key, whoever else is in the batch.

    Drawn on the CPU and copied, so they are the same on every device.
    """

    def __init__(self, keys: Sequence[Sequence[int]], device: torch.device | str = "cpu"):
        self.rngs = [keyed(*key) for key in keys]
        self.device = torch.device(device)

    def each(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        """(B, ...) of what `draw` takes from the generator of each image."""
        return torch.stack([draw(rng) for rng in self.rngs]).to(self.device)

    def normal(self, *size: int) -> Tensor:
        return self.each(lambda rng: torch.randn(size, generator=rng))

    def uniform(self, low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * self.each(lambda rng: torch.rand(size, generator=rng))


def normal(size: tuple[int, ...], rng: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Image-sized standard normal noise, drawn where it is used. The values differ between kinds of device."""
    if torch.device(device).type == "cpu":
        return torch.randn(size, generator=rng)
    on_device = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=rng)))
    return torch.randn(size, generator=on_device, device=device)


def uniform(low: float, high: float, count: int, rng: torch.Generator) -> Tensor:
    """(count,) float64 in [low, high)."""
    return low + (high - low) * torch.rand(count, generator=rng, dtype=torch.float64)


def integers(low: Tensor, high: Tensor, rng: torch.Generator) -> Tensor:
    """int64, uniform in [low, high) for every element; `low` itself where that is empty."""
    return low + (torch.rand(low.shape, generator=rng, dtype=torch.float64) * (high - low).clamp(min=1)).long()


def hashed(keys: Tensor, draw: int) -> Tensor:
    """int64, a hash of (key, draw) for every key: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), the same on every device.

    For draws of single images: a generator for each would take longer than what is done with it."""

    def signed(value: int) -> int:
        return (value + 2**63) % 2**64 - 2**63

    def folded(x: Tensor, shift: int) -> Tensor:
        return x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))  # without the mask the sign would come along

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
    """(count,) float64 draws of Beta(alpha, second), the second parameter being alpha where not given."""
    if second is None:
        first, other = log_gamma_variate(alpha, (2, count), rng)
    else:
        first, other = (log_gamma_variate(parameter, (count,), rng) for parameter in (alpha, second))
    return torch.sigmoid(first - other)


def dirichlet(alpha: float, rows: int, parts: int, rng: torch.Generator) -> Tensor:
    """(rows, parts) float64 draws of the symmetric Dirichlet distribution; rows sum to 1."""
    return torch.softmax(log_gamma_variate(alpha, (rows, parts), rng), 1)


def categorical(scores: Tensor, rng: torch.Generator) -> Tensor:
    """(B,) int64: a column for every row of `scores` (B, N), log-probabilities up to a constant of the row.

    By Gumbel's noise, drawn on the CPU: the host need not wait for scores on a device. A row of -inf alone gives column 0.
    """
    noise = torch.empty(scores.shape, dtype=torch.float64).exponential_(generator=rng).log_().neg_()
    return (scores + noise.to(scores.device, scores.dtype, non_blocking=True)).argmax(1)


@dataclass(frozen=True, eq=False)
class Pairing:
    """Who is mixed with whom, and who shares a draw.

    Attributes:
        partner: (B,) int64.
        row: (B,) int64, the draw that each image uses, in [0, draws).
        draws: the number of independent draws (lam, box, ...).
    """

    partner: Tensor
    row: Tensor
    draws: int

    def spread(self, drawn: Tensor) -> Tensor:
        """(B, ...): for every image its own of (draws, ...)."""
        if self.draws == len(self.row):
            return drawn  # they are in order
        return drawn[self.row.to(drawn.device, non_blocking=True)]


MODES = ("sample", "pair", "batch")


def partners(batch: int, mode: str, rng: torch.Generator) -> Pairing:
    """Pairs the images of a batch at random.

    `sample`: a uniform permutation, and a draw for every image. `batch`: the same with one draw for all, as in the papers'
    own code. `pair`: images change places two by two and share a draw (timm's `pair` mode, at random instead of by
    reversal); an odd image out stays with itself.
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
    """Where in a training run a batch stands. Everything drawn for the batch follows from it, so a resumed run repeats it.

    Attributes:
        seed: the run's `mix_seed`.
        rank: the process.
        step: optimizer steps done.
        micro_step: batches done since, under gradient accumulation.
        repeat: which of the draws of one batch this is (`mix_repeat`).
        total_steps: of the whole run; schedules read it, no draw depends on it.
        epoch: whole epochs done; schedules of `mix_rate` and `mix_prob` read it, no draw depends on it. -1 where it is not known.
        epochs: of the whole run; 0 where it is not known.
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
        """For pairs, lam and boxes: another stream on every process."""
        return keyed(self.seed, self.rank, self.step, self.micro_step, self.repeat)

    def layer_rng(self, place: int) -> torch.Generator:
        """For what is drawn for one layer of the network: another stream for each, and on every process."""
        return keyed(self.seed, self.rank, self.step, self.micro_step, self.repeat, 2, place)

    def shared_rng(self) -> torch.Generator:
        """For choices that change which parameters are used: the same on all processes, so that their graphs agree."""
        return keyed(self.seed, self.step, self.micro_step, self.repeat)

    def step_rng(self) -> torch.Generator:
        """Like `shared_rng`, equal on all processes, but an independent stream: for random choices inside the training step."""
        return keyed(self.seed, self.step, self.micro_step, self.repeat, 0, 1)
