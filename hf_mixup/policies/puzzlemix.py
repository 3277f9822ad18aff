"""PuzzleMix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_mixup.core.checks import check_between, check_channels, check_count, check_counts, check_mode, check_per_channel, check_positive
from hf_mixup.core.geometry import block_grid, enlarged, largest_divisor, pooled_evidence
from hf_mixup.core.plan import Dense, MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import beta, normal, partners, uniform
from hf_mixup.core.solvers import solve_grid

# cells that a block may move to, nearest first; for the paper's grids, up to 16 x 16, these are all cells
_REACH = 256


@dataclass(frozen=True)
class PuzzleMix(SamplePolicy):
    """Puzzle Mix (Kim et al., ICML 2020, arXiv:2009.06962; github.com/snu-mllab/PuzzleMix): keeps the salient blocks of both images.

    Each block shows the own image, the partner, or a blend of both. The choice hides little saliency, makes neighbours agree, and keeps about
    the share `alpha ~ Beta` of the image. Then salient blocks that would be hidden move to visible places of their own image. The label's
    weight is the share of the mask.

    Deviations from the authors' code, none of which changes what is minimised:
    1. The mask is solved by `solvers.solve_grid` instead of alpha-beta swap on integer costs, which overflow for sharp saliency.
    2. The prior is computed in log space, so that it stays convex if `alpha` is nearly 0 or 1.
    3. `neigh_size` and `t_size` are reduced to a divisor of the block if they do not divide it, instead of an error.
    4. A block that finds no place leaves its own image behind, not black.
    5. Where OpenMixup differs (alpha drawn inside, normalisation guessed from the image size), this follows the authors.

    Args:
        alpha: both parameters of the Beta, above 0.
        block_nums: how many blocks a side may have. One number is drawn for every batch among those that divide both sides; if none does,
            see `geometry.block_grid`. OpenMixup's tables use (2, 4, 8), except on CIFAR.
        n_labels: shares that a block can have: 3 for own, half, partner.
        beta: weight of agreement between neighbours.
        gamma: how much of that agreement is about the colours on both sides of their edge.
        eta: weight of the prior.
        neigh_size: pixels averaged before colours are compared. The authors use 2 on ImageNet.
        transport: whether blocks move.
        t_eps: cost of moving.
        t_size: side in pixels of the pieces that move, -1 for the mask's blocks. 4 on CIFAR, by the authors and OpenMixup.
        std: the images' normalisation, one value or one for each channel; colours are compared on the scale from 0 to 1. The
            default is close to that of ImageNet and CIFAR.
        mean: of the images' normalisation; used by the adversarial variant only.
        adv_p: probability that the own images of a batch, and that the partners, get an adversarial perturbation; authors: 0.1
            on CIFAR-100, 0.15 on Tiny-ImageNet. Unlike theirs, the gradient is that of the clean images, not of randomly
            perturbed ones. Needs the signal `input_grad` when above 0.
        adv_eps: size of the perturbation, as a number of 255.
        clean_lam: weight of the loss on the clean images; the saliency then comes from that loss too. The authors' value is 0
            on CIFAR and 1 on Tiny-ImageNet, the latter for a BCE over classes; see `Policy`.
        mode: which images share a draw of alpha; `batch` is the authors' code.
    """

    alpha: float = 1.0
    block_nums: tuple[int, ...] = (2, 4, 8, 16)
    n_labels: int = 3
    beta: float = 1.2
    gamma: float = 0.5
    eta: float = 0.2
    neigh_size: int = 4
    transport: bool = True
    t_eps: float = 0.8
    t_size: int = -1
    std: tuple[float, ...] = (0.23,)
    mean: tuple[float, ...] = (0.45,)
    adv_p: float = 0.0
    adv_eps: float = 10.0
    clean_lam: float = 0.0
    mode: str = "sample"

    def __post_init__(self):
        check_positive(alpha=self.alpha, t_eps=self.t_eps)
        check_counts(2, block_nums=self.block_nums)
        check_count(2, n_labels=self.n_labels)
        check_count(1, neigh_size=self.neigh_size)
        # above 1 a pair of blocks that does not fit could lower the energy, and the problem would no longer be convex
        check_between(0, 1, gamma=self.gamma, adv_p=self.adv_p)
        check_between(0, float("inf"), beta=self.beta, eta=self.eta, clean_lam=self.clean_lam)
        check_between(0, 255, adv_eps=self.adv_eps)
        if self.t_size != -1:
            check_count(1, t_size=self.t_size)
        check_per_channel(0, std=self.std)
        check_per_channel(float("-inf"), mean=self.mean)
        check_mode(self.mode)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"images", "saliency"} | ({"input_grad"} if self.adv_p > 0 else set()))

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        size = tuple(shape[2:])
        pairing = partners(shape[0], self.mode, rng)
        alpha = pairing.spread(beta(self.alpha, pairing.draws, rng))
        grid = block_grid(size, self.block_nums, rng)
        images, saliency = signals["images"], signals["saliency"]
        check_channels(images, std=self.std, mean=self.mean)
        partner = pairing.partner.to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            own_hidden, partner_hidden, down, right = terms(
                images, saliency, partner, grid, self.beta, self.gamma, self.neigh_size, self.std
            )
            costs = label_costs(own_hidden, partner_hidden, alpha, self.n_labels, self.eta)
            labels = solve_grid(costs, down, right)
            own, other = self._attacked(images, signals, rng) if self.adv_p > 0 else (None, None)
            mask = 1 - labels.double() / (self.n_labels - 1)
            t_eps = self.t_eps if self.transport else None
            return mask_plan(images, partner, mask, saliency, t_eps, self.t_size, own, other)

    def _attacked(self, images: Tensor, signals: Signals, rng: torch.Generator) -> list[Tensor | None]:
        hits = (torch.rand(2, generator=rng) < self.adv_p).tolist()
        # the normal distribution function maps standard normal noise to uniform noise
        start = 2 * torch.special.ndtr(normal(tuple(images.shape), rng, images.device)) - 1
        noise = float(uniform(0, 1, 1, rng)) * attack(images, signals["input_grad"], start, self.adv_eps, self.mean, self.std)
        adversarial = perturbed(images, noise, self.mean, self.std)
        return [adversarial if hit else None for hit in hits]


def terms(
    images: Tensor,
    saliency: Tensor,
    partner: Tensor,
    grid: tuple[int, int],
    beta: float,
    gamma: float,
    neigh_size: int,
    std: tuple[float, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The energy of the mask, without its prior.

    The cost of an edge between a block that shows image i and a neighbour that shows image j is split into a part of each block and a part
    for disagreement. This works for every quadratic function of two choices.

    Args:
        images: (B, C, H, W), normalised.
        saliency: (B, H, W), at least 0, on any scale.
        partner: (B,).
        grid: (h, w) blocks.

    Returns:
        (B, h, w) the cost of hiding the own image in each block, the same for the partner, (B, h - 1, w) weights of
        disagreement with the block below, (B, h, w - 1) with the block to the right.
    """
    size = tuple(images.shape[2:])
    pool = tuple(largest_divisor(side // count, neigh_size) for side, count in zip(size, grid, strict=True))
    # differences of colours, so the mean of the normalisation does not matter
    colours = F.avg_pool2d(images.float(), pool) * _per_channel(std, images)
    own_hidden = pooled_evidence(saliency, grid)
    partner_hidden = own_hidden[partner]
    own_hidden = own_hidden.clone()
    pairs = []
    for dim in (1, 2):
        # (B, n - 1, m): on both sides of the edge between each block and the next along `dim`, of n blocks along it and m across
        along, across = grid if dim == 1 else grid[::-1]
        weight = beta / (16 * across)  # so a border across the whole image costs the same for any number of blocks
        near, far = _borders(colours if dim == 1 else colours.transpose(2, 3), along)
        same = _gap(near, far, across)
        changed, back, other = _gap(near, far[partner], across), _gap(near[partner], far, across), same[partner]
        pairs.append((weight + gamma * weight / 2 * (changed + back - same - other)).clamp(min=0))
        for hidden, before, after in ((partner_hidden, same + changed, same + back), (own_hidden, other + back, other + changed)):
            lines = hidden if dim == 1 else hidden.transpose(1, 2)
            lines[:, :-1] += gamma * weight / 2 * before
            lines[:, 1:] += gamma * weight / 2 * after
    return own_hidden, partner_hidden, pairs[0], pairs[1].transpose(1, 2)


def _borders(colours: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(B, C, n - 1, w) each: the last row of every block except the last block, and the first row of the next block."""
    rows = colours.unflatten(2, (count, -1))
    return rows[:, :, :-1, -1], rows[:, :, 1:, 0]


def _gap(near: Tensor, far: Tensor, count: int) -> Tensor:
    """(B, n - 1, count): mean absolute difference over the channels and along each edge, of `count` blocks across."""
    return (near - far).abs().mean(1).unflatten(2, (count, -1)).mean(3)


def label_costs(own_hidden: Tensor, partner_hidden: Tensor, alpha: Tensor, n_labels: int, eta: float) -> Tensor:
    """(B, h, w, L): the cost of each label. Label l shows l / (L - 1) of the partner. The prior is binomial; `alpha` (B,) is the own share."""
    top = n_labels - 1
    partner_share = torch.arange(n_labels, dtype=torch.float64) / top
    alpha = alpha.double().clamp(1e-6, 1 - 1e-6)[:, None]
    orders = torch.lgamma(torch.tensor(top + 1.0)) - torch.lgamma(top * partner_share + 1) - torch.lgamma(top - top * partner_share + 1)
    log_prior = orders + top * ((1 - partner_share) * alpha.log() + partner_share * torch.log1p(-alpha))
    prior = (-eta / own_hidden[0].numel() * log_prior).float().to(own_hidden.device)
    partner_share = partner_share.float().to(own_hidden.device)
    evidence = (1 - partner_share) * partner_hidden[..., None] + partner_share * own_hidden[..., None]
    return evidence + prior[:, None, None]


def mask_plan(
    images: Tensor,
    partner: Tensor,
    mask: Tensor,
    saliency: Tensor,
    t_eps: float | None,
    t_size: int = -1,
    own: Tensor | None = None,
    other: Tensor | None = None,
) -> MixPlan:
    """The plan of a mask, after moving the blocks that it would hide.

    Args:
        images: (B, C, H, W).
        partner: (B,).
        mask: (B, h, w), the share of the own image.
        saliency: (B, H, W).
        t_eps: cost of moving; None to move nothing.
        t_size: side in pixels of the pieces that move, -1 for the mask's blocks.
        own: (B, C, H, W), perturbed images that are kept instead of `images`.
        other: (B, C, H, W), the same for the partners; `partner` points into them.
    """
    size = tuple(images.shape[2:])
    pixels = enlarged(mask.float(), size)
    plan = MixPlan.pair(partner, Dense(torch.stack([pixels, 1 - pixels], 1)), mask.double().mean((1, 2)))
    untouched = own is None and other is None
    kept, seen = images if own is None else own, (images if other is None else other)[partner]
    if t_eps is None:
        return plan if untouched else replace(plan, sources=(kept, seen))
    blocks = tuple(side // cells for side, cells in zip(size, mask.shape[1:], strict=True))
    pieces = blocks if t_size == -1 else tuple(largest_divisor(block, t_size) for block in blocks)
    grid = tuple(side // piece for side, piece in zip(size, pieces, strict=True))
    finer = enlarged(mask, grid)
    evidence = pooled_evidence(saliency, grid)
    # both images at once: a pixel that hides one shows the other
    source = transport(torch.cat([finer > 0, finer < 1]), torch.cat([evidence, evidence[partner]]), t_eps)
    # only on the CPU can this be read without waiting
    if untouched and source.device.type == "cpu" and bool((source == torch.arange(source.shape[1])).all()):
        return plan
    moved = [gather_pieces(*pair, grid) for pair in zip((kept, seen), source.chunk(2), strict=True)]
    return replace(plan, sources=tuple(moved))


@torch.no_grad()
def transport(visible: Tensor, saliency: Tensor, t_eps: float, compact: bool | None = None) -> Tensor:
    """Which cell of its image is shown at each cell: (N, h * w) int64.

    In every round, each cell without a place asks for the nearest visible place that has not rejected it, if the distance costs less than its
    saliency. A place goes to the cell with the smallest cost, the first one if equal. The number of rounds is that of the authors' auction over
    the full cost matrix. The result at visible cells is the same too; at other cells the image stays.

    Args:
        visible: (N, h, w) bool.
        saliency: (N, h, w), summing to 1.
        t_eps: cost of moving across the image, by squared distance.
        compact: look only at the few cells that matter. This reads values, so the host would wait for an accelerator; the default is to do it
            on the CPU only. The result is the same.
    """
    number, *grid = visible.shape
    cells, device = grid[0] * grid[1], visible.device
    compact = device.type == "cpu" if compact is None else compact
    order, distance = _nearest_cells(*grid, device)
    visible, saliency = visible.flatten(), saliency.flatten()
    everyone = torch.arange(number * cells, device=device)
    if compact:
        reach = int((t_eps * distance < saliency.max()).sum(1).max())
        order, distance = order[:, :reach], distance[:, :reach]
        if reach <= 1:
            return everyone.view(number, cells) % cells
    ranks = torch.arange(order.shape[1], dtype=torch.int16, device=device)

    # visible cells first ask for their own place, and get it
    holder, price = everyone.clone(), torch.where(visible, -saliency, 0.0)
    rank = torch.zeros_like(everyone)
    finished = saliency <= t_eps * distance[:, 1].min()
    waiting = ~(visible | finished)
    for _ in range(max(grid)):
        rows = waiting.nonzero().flatten() if compact else everyone
        if len(rows) == 0:
            break
        cell = rows % cells
        there = (rows - cell)[:, None] + order[cell]
        choice = torch.where(visible[there] & (ranks > rank[rows, None]), ranks, len(ranks)).amin(1).long()
        some = choice.clamp(max=len(ranks) - 1)
        cost = t_eps * distance[cell, some] - saliency[rows]
        asks = waiting[rows] & (choice < len(ranks)) & (cost < 0)
        place = torch.where(asks, there.gather(1, some[:, None])[:, 0], rows)
        cost = torch.where(asks, cost, torch.inf)
        rank[rows] = torch.where(asks, choice, rank[rows])
        finished[rows] |= waiting[rows] & ~asks
        lowest = price.scatter_reduce(0, place, cost, "amin")
        first = torch.where(lowest == price, holder, len(everyone))
        holder = first.scatter_reduce(0, place, torch.where(cost == lowest[place], rows, len(everyone)), "amin")
        price = lowest
        # places that are not visible are taken by no cell
        placed = torch.zeros(len(everyone) + 1, dtype=torch.bool, device=device)
        placed[torch.where(visible, holder, len(everyone))] = True
        waiting = ~(placed[:-1] | finished)
    return holder.view(number, cells) % cells


@lru_cache(maxsize=16)
def _nearest_cells(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For every cell, all cells by distance, in reading order if equal, and their squared distances; an image side has length 1."""
    row, col = torch.arange(height * width) // width, torch.arange(height * width) % width
    gaps = [(line[:, None] - line).double() / max(length - 1, 1) for line, length in ((row, height), (col, width))]
    distance, order = (gaps[0] ** 2 + gaps[1] ** 2).sort(dim=1, stable=True)
    return order[:, :_REACH].contiguous().to(device), distance[:, :_REACH].float().contiguous().to(device)


def gather_pieces(images: Tensor, source: Tensor, grid: tuple[int, int]) -> Tensor:
    """Images (B, C, H, W) with the piece `source` (B, h * w) at each cell of the grid."""
    size = tuple(images.shape[2:])
    piece = tuple(side // cells for side, cells in zip(size, grid, strict=True))
    row, col = (torch.arange(side, device=images.device) for side in size)
    corner = source.unflatten(1, grid)
    corner = corner // grid[1] * (piece[0] * size[1]) + corner % grid[1] * piece[1]
    inside = (row % piece[0])[:, None] * size[1] + col % piece[1]
    pixel = (enlarged(corner, size) + inside).flatten(1)
    return images.flatten(2).gather(2, pixel[:, None].expand(-1, images.shape[1], -1)).unflatten(2, size)


def attack(images: Tensor, gradient: Tensor, start: Tensor, eps: float, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(B, C, H, W): one signed step from `start`, in [-1, 1], within eps / 255, on the scale from 0 to 1."""
    colours = _colours(images, mean, std)
    start = (colours + start * eps / 255).clamp(0, 1) - colours
    return (start + (eps + 2) / 255 * gradient.sign()).clamp(-eps / 255, eps / 255)


def perturbed(images: Tensor, noise: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalised images plus noise on the scale from 0 to 1, clipped to that range."""
    colours = (_colours(images, mean, std) + noise).clamp(0, 1)
    return ((colours - _per_channel(mean, images)) / _per_channel(std, images)).to(images.dtype)


def _colours(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return images.float() * _per_channel(std, images) + _per_channel(mean, images)


def _per_channel(values: tuple[float, ...], images: Tensor) -> Tensor:
    return torch.tensor(values, device=images.device)[:, None, None]
