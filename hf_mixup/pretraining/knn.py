"""Measures features without training, by the classes of their nearest neighbours."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def knn_classes(
    bank: Tensor, labels: Tensor, queries: Tensor, num_classes: int, neighbours: int = 200, temperature: float = 0.1, rows: int = 1024
) -> Tensor:
    """(Q,) int64: the class of each query by its nearest neighbours; each votes with `exp(cosine / temperature)`.

    As in Wu et al., CVPR 2018, arXiv:1805.01978, section 3.4.

    Args:
        bank: features (N, d), with class numbers `labels` (N,).
        queries: features (Q, d).
        neighbours: number of neighbours that vote; all, if the bank is smaller.
        temperature: 0.1 in MoCo's and Un-Mix's monitor, 0.07 in others.
        rows: number of queries that are compared at once.

    Raises:
        ValueError: for features that are not finite: a single one would vote for every query.
    """
    for name, rows_of in (("bank", bank), ("queries", queries)):
        broken = int((~torch.isfinite(rows_of)).any(1).sum())
        if broken:
            raise ValueError(
                f"the features of {name} must be finite, got {broken} of {len(rows_of)} images with NaN or infinity; check the weights and the images."
            )
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    found = []
    for some in queries.split(rows):
        cosines, nearest = (some @ bank.T).topk(min(neighbours, len(bank)))
        votes = torch.zeros(len(some), num_classes, device=bank.device)
        # minus the largest, which keeps the order and cannot overflow
        votes.scatter_add_(1, labels[nearest], ((cosines - cosines[:, :1]) / temperature).exp())
        found.append(votes.argmax(1))
    return torch.cat(found)
