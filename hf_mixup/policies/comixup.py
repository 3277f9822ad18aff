"""Co-Mixup."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_mixup.core.checks import check_between, check_count, check_counts, check_known, check_positive
from hf_mixup.core.geometry import block_grid, enlarged, pooled_evidence
from hf_mixup.core.plan import Dense, MixPlan
from hf_mixup.core.policy import SamplePolicy, Signals
from hf_mixup.core.rng import log_gamma_variate

# the cost of a label that must not be chosen
_NEVER = 1e4


@dataclass(frozen=True)
class CoMixup(SamplePolicy):
    """Co-Mixup (Kim et al., ICLR 2021, arXiv:2102.03065; github.com/snu-mllab/Co-Mixup): makes as many outputs as inputs, jointly.

    Each block of each output shows one image of its part of the batch, or two at half each. The choice shows much saliency, makes
    neighbours agree, and avoids using an image again and again. An output has 2 to 3 images. The label's weights are the shares of the
    masks. Unlike in other methods, the own image may be missing in its output.

    Deviations from the authors' code:
    1. The problem of one output, given the others, is solved by `best_labels` instead of alpha-beta swap. The final objectives equal the
       authors' within the noise of the method.
    2. A batch is cut into random parts whose sizes differ by at most one, instead of leaving a small rest.
    3. Rounds are not ended early.
    4. The prior has the parameter that it is given (the authors' ImageNet code always uses 1).

    Args:
        alpha: parameter of the Dirichlet from which the share of every image is drawn.
        m_part: largest number of images in a part; 16 on ImageNet.
        block_nums: how many blocks a side may have, drawn for every batch, as in `PuzzleMix.block_nums`.
        beta: weight of agreement between neighbours; sensible values are 0.16 to 0.48.
        gamma: weight against using an image in several outputs.
        thres: how often other outputs may use an image without a cost, in outputs; sensible values are 0.81 to 0.86.
        thres_type: `hard` counts all uses once the threshold is passed, `soft` counts only those beyond it.
        eta: weight of the prior.
        omega: how strongly one output prefers images whose salient places are far apart.
        set_resolve: whether outputs with the same images are separated before the last round.
        niter: rounds over all outputs; 3 on ImageNet.
        peak_stride: step in pixels of the search for the most salient place; 8 on ImageNet.
        clean_lam: weight of the loss on the clean images; the saliency then comes from that loss too. See `Policy`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"saliency"})

    alpha: float = 2.0
    m_part: int = 20
    block_nums: tuple[int, ...] = (4,)
    beta: float = 0.32
    gamma: float = 1.0
    thres: float = 0.83
    thres_type: str = "hard"
    eta: float = 0.05
    omega: float = 0.001
    set_resolve: bool = True
    niter: int = 4
    peak_stride: int = 1
    clean_lam: float = 1.0

    def __post_init__(self):
        check_positive(alpha=self.alpha)
        check_counts(2, block_nums=self.block_nums)
        check_count(2, m_part=self.m_part)
        check_count(1, niter=self.niter, peak_stride=self.peak_stride)
        check_between(0, float("inf"), beta=self.beta, gamma=self.gamma, eta=self.eta, thres=self.thres, clean_lam=self.clean_lam)
        check_between(0, 1, omega=self.omega)
        check_known("thres_type", self.thres_type, ["hard", "soft"])

    def plan(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        batch, size = shape[0], tuple(shape[2:])
        grid = block_grid(size, self.block_nums, rng)
        members = partition(batch, self.m_part, rng)
        there = members >= 0
        log_share = log_gamma_variate(self.alpha, tuple(members.shape), rng).masked_fill(~there, -torch.inf)
        # uniform over the images of a part, which come before the empty places
        start = torch.rand((*members.shape, grid[0] * grid[1]), generator=rng, dtype=torch.float64) * there.sum(1)[:, None, None]
        saliency = signals["saliency"]
        # these are thousands of small steps that depend on each other, slow on a GPU because of launch times, so they run on the CPU.
        # It needs one small copy in each direction, and plans are the same on every device
        evidence = pooled_evidence(saliency, grid).cpu()
        place = peaks(saliency, self.peak_stride).cpu()
        shares = solve_parts(
            unary(evidence[members], log_share.softmax(1).float(), self.eta),
            compatibility(place[members], there, self.omega),
            start.long(),
            there,
            grid,
            beta=self.beta,
            gamma=self.gamma,
            thres=self.thres,
            thres_type=self.thres_type,
            set_resolve=self.set_resolve,
            niter=self.niter,
        )
        return shares_plan(shares, members, grid, size, saliency.device)


def partition(batch: int, m_part: int, rng: torch.Generator) -> Tensor:
    """Cuts the batch at random into parts of up to `m_part` images: (P, m) int64. Parts that are one smaller end with -1."""
    parts = -(-batch // m_part)
    members = torch.full((parts * -(-batch // parts),), -1)
    members[:batch] = torch.randperm(batch, generator=rng)
    return members.view(-1, parts).T.contiguous()


def peaks(saliency: Tensor, stride: int) -> Tensor:
    """(B, 2) int64: row and column of the most salient square of 8 pixels of every image, in steps of `stride`."""
    side = min(8, *saliency.shape[1:])
    smooth = F.avg_pool2d(saliency.float()[:, None], side, stride)[:, 0]
    place = smooth.flatten(1).argmax(1)
    return torch.stack([place // smooth.shape[2], place % smooth.shape[2]], 1)


def unary(evidence: Tensor, share: Tensor, eta: float) -> Tensor:
    """(P, m, h * w): the cost of showing an image in a block, from its evidence (P, m, h, w) and its prior share (P, m)."""
    evidence = evidence.flatten(2)
    return -evidence - eta / evidence.shape[2] * torch.log(share + 1e-8)[..., None]


def compatibility(place: Tensor, there: Tensor, omega: float) -> Tensor:
    """(P, m, m), from the peaks (P, m, 2): how strongly one image in an output discourages another in the other outputs."""
    apart = (place[:, :, None] - place[:, None]).abs().sum(3) * (there[:, :, None] & there[:, None])
    # all peaks are in one place: avoids a division by 0, and adds nothing
    apart = apart * (there.sum(1) / apart.sum((1, 2)).clamp(min=1))[:, None, None]
    return (1 - omega) * torch.eye(there.shape[1]) + omega * apart


@torch.no_grad()
def solve_parts(
    cost: Tensor,
    compat: Tensor,
    start: Tensor,
    there: Tensor,
    grid: tuple[int, int],
    *,
    beta: float = 0.32,
    gamma: float = 1.0,
    thres: float = 0.83,
    thres_type: str = "hard",
    set_resolve: bool = True,
    niter: int = 4,
) -> Tensor:
    """The share of every image in every block of every output: (P, m outputs, h * w, m images), each 0, 1/2 or 1.

    Outputs are solved one after the other, with the others fixed; all parts of the batch at once.

    Args:
        cost: (P, m, h * w), of showing an image in a block.
        compat: (P, m, m).
        start: (P, m, h * w) int64, the images shown at first.
        there: (P, m) bool, False for the empty place of a smaller part; for images and outputs.
        grid: (h, w).
    """
    parts, count, cells = cost.shape
    beta, gamma, free = beta / cells, gamma / cells, thres * cells
    cost = cost.permute(2, 0, 1).masked_fill(~there, _NEVER)  # (cells, P, images)
    shares = F.one_hot(start, count).float() * there[:, :, None, None]
    used = shares.sum(2)  # (P, outputs, images), in blocks
    extra = torch.zeros_like(used)
    every, single, no_blends = torch.arange(parts), torch.eye(count).expand(parts, -1, -1), torch.zeros(parts, 0, count)
    with torch.autocast("cpu", enabled=False):
        total = used.sum(1)
        for iteration in range(niter):
            if set_resolve and iteration == niter - 1 > 0:
                extra = gamma * told_apart(used > 0)
            for j in range(count):
                others = total - used[:, j]
                crowd = _product(compat, others)
                # the authors' hard threshold drops images from this sum, their soft threshold is subtracted from it
                hard = thres_type == "hard"
                crowd = _product(compat, others * (crowd > free)) if hard else (crowd - free).clamp(min=0)
                costs = cost + (2 * gamma * crowd + extra[:, j])
                # in the first round outputs are random, so what they have in common means nothing
                blends = no_blends
                if iteration:
                    pairs, allowed = common_pairs(used[:, j])
                    blends = F.one_hot(pairs, count).float().mean(2)
                    mixed = costs.gather(2, pairs.flatten(1).expand(cells, -1, -1)).unflatten(2, (-1, 2)).mean(3) - 5e-4
                    costs = torch.cat([costs, mixed.masked_fill(~allowed, _NEVER)], 2)
                labels = best_labels(costs, blends, beta, grid)  # (cells, P)
                table = torch.cat([single, blends], 1)
                shown = table.flatten(0, 1).index_select(0, (labels + every * table.shape[1]).T.flatten())
                shares[:, j] = shown.view(parts, cells, count) * there[:, j, None, None]
                used[:, j] = shares[:, j].sum(1)
                total = others + used[:, j]
    return shares


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    # not matmul: for these sizes it starts all threads, which on a busy machine takes a thousand times as long as the product
    return (matrix * vector[:, None]).sum(2)


def common_pairs(used: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs of the three images that each output (P, m) uses most: (P, 3, 2) int64, and whether both are used, (P, 3).

    An output of two images has one such pair, an output of one image has none.
    """
    count = used.shape[1]
    # use is counted in half blocks, so these ranks differ; among equal ones the first counts
    top = (2 * count * used - torch.arange(count)).topk(min(3, count)).indices
    pairs = torch.tensor(list(combinations(range(top.shape[1]), 2)), dtype=torch.int64).view(-1, 2)
    return top[:, pairs], pairs[:, 1] < (used > 0).sum(1, keepdim=True)


def told_apart(support: Tensor) -> Tensor:
    """Separates outputs that have the same two or more images: the earlier output loses the first image, the later one the second.

    `support`: (P, outputs, images) bool. Returns 1 in that shape for an image that an output must not use.
    """
    same = (support[:, :, None] == support[:, None]).all(3) & (support.sum(2) >= 2)[:, :, None]
    rank = support.cumsum(2) * support
    earlier, later = same.triu(1).any(2), same.tril(-1).any(2)
    return ((rank == 1) & earlier[..., None] | (rank == 2) & later[..., None]).float()


def best_labels(costs: Tensor, blends: Tensor, beta: float, grid: tuple[int, int]) -> Tensor:
    """Labels (h * w, P) of low energy, for one output of every part: iterated conditional modes over the checkerboard.

    Neighbours that differ cost `beta`, or a quarter of it if one is a blend of the other. It does four sweeps from each of four starts: the
    cheapest label of every block, and one of the three cheapest labels everywhere. The best result is used.

    Args:
        costs: (h * w, P, L), of each label: first the images, then the blends.
        blends: (P, L - m, m), the shares of the images in each blend.
    """
    _, parts, number = costs.shape
    (black, beside_black), (white, beside_white), back = _checkerboard(*grid)
    count = blends.shape[2]
    agreement = torch.eye(number).repeat(parts, 1, 1)
    agreement[:, count:, :count] = 1.5 * blends
    agreement[:, :count, count:] = 1.5 * blends.transpose(1, 2)
    agreement = beta * agreement.flatten(0, 1)
    offset = (torch.arange(parts) * number)[:, None]

    everywhere = costs.sum(0).topk(min(3, number), largest=False).indices
    labels = torch.cat([costs.argmin(2)[..., None], everywhere.expand(len(costs), -1, -1)], 2)
    shape = (-1, parts, labels.shape[2], number)
    costs_black, costs_white = (costs.index_select(0, side)[:, :, None].expand(shape).flatten(1) for side in (black, white))

    def given(own: Tensor, beside: Tensor, neighbours: Tensor) -> Tensor:
        """(cells of one colour, P, tries, L): the cost of every label, given the labels of the other colour."""
        # selections and sums, not a product with the adjacency: see `_product`
        support = torch.empty(len(neighbours) + 1, own.shape[1])
        support[-1] = 0
        torch.index_select(agreement, 0, (neighbours + offset).flatten(), out=support[:-1].view(-1, number))
        for row in beside:
            own = own - support.index_select(0, row)
        return own.view(shape)

    on_black, on_white = labels.index_select(0, black), labels.index_select(0, white)
    for _ in range(4):
        on_black = given(costs_black, beside_black, on_white).argmin(3)
        on_white = given(costs_white, beside_white, on_black).argmin(3)
    energy = given(costs_black, beside_black, on_white).gather(3, on_black[..., None]).sum((0, 3))
    energy = energy + costs_white.view(shape).gather(3, on_white[..., None]).sum((0, 3))
    best = energy.argmin(1)[None, :, None].expand(len(costs), -1, -1)
    return torch.cat([on_black, on_white]).gather(2, best)[..., 0].index_select(0, back)


@lru_cache(maxsize=8)
def _checkerboard(height: int, width: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """For each colour: the cells, and (up to 4, cells) the positions of their neighbours among the cells of the other colour; one past
    the end means no neighbour. Also the position of each cell in the list of all black and then all white cells."""
    cell = torch.arange(height * width)
    row, col = cell // width, cell % width
    colours = [((row + col) % 2 == colour).nonzero().flatten() for colour in (0, 1)]
    sides = []
    for own, other in (colours, colours[::-1]):
        touching = (row[own, None] - row[other]).abs() + (col[own, None] - col[other]).abs() == 1
        place = torch.where(touching, torch.arange(len(other)), len(other))
        sides.append((own, place.sort(1).values[:, :4].T.contiguous()))
    return *sides, torch.cat(colours).argsort()


def shares_plan(
    shares: Tensor, members: Tensor, grid: tuple[int, int], size: tuple[int, int], device: torch.device | str = "cpu"
) -> MixPlan:
    """The plan of the shares (P, outputs, h * w, images); `members` (P, m) are the images of each part.

    It has as many columns as the output that uses most images, so no image is lost.
    """
    parts, count, cells, _ = shares.shape
    used = shares.sum(2)
    own = torch.eye(count, dtype=torch.bool)
    most = int(((used > 0) & ~own).sum(2).max())
    # a mixed batch has a partner column even if no output uses a partner
    most = min(max(most, 1), count - 1)
    ranked = used.masked_fill(members[:, None] < 0, -1).masked_fill(own, torch.inf)
    top = ranked.topk(most + 1, dim=2).indices  # (P, outputs, K), the own image first
    index = members[torch.arange(parts)[:, None, None], top]
    # the empty place of a smaller part; its share is 0
    index = torch.where(index < 0, members[:, :, None], index)
    mask = shares.transpose(2, 3).gather(2, top[..., None].expand(-1, -1, -1, cells))
    order = members.flatten().argsort()[int((members < 0).sum()) :]
    index, mask = index.flatten(0, 1)[order], mask.flatten(0, 1)[order]
    pixels = enlarged(mask.unflatten(2, grid).to(device), size)
    return MixPlan(index, Dense(pixels), mask.mean(2))


def objective(shares: Tensor, cost: Tensor, grid: tuple[int, int], beta: float, gamma: float, thres: float | None = None) -> Tensor:
    """(P,): the authors' objective for shares (P, outputs, h * w, images); with a threshold, the value that they report."""
    cells = cost.shape[2]
    maps = shares.unflatten(2, grid)
    edges = sum((maps.diff(dim=dim) ** 2).sum((1, 2, 3, 4)) for dim in (2, 3))
    used = shares.sum(2)
    others = used.sum(1, keepdim=True) - used
    counted = others if thres is None else others * (others > thres * cells)
    shown = torch.einsum("pock,pkc->p", shares, cost)
    return shown + beta / cells / 2 * edges + gamma / cells * (counted * used).sum((1, 2))
