"""MoCo v2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_mixup.core.checks import check_count
from hf_mixup.core.losses import CrossEntropy, Loss
from hf_mixup.core.plan import MixPlan
from hf_mixup.pretraining.contrast import hide
from hf_mixup.pretraining.momentum import Momentum
from hf_mixup.pretraining.simclr import check_temperatures
from hf_mixup.pretraining.state import KeyState
from hf_mixup.steps.step import Parts


class QueueState(KeyState):
    """A state with the keys of earlier steps: `queue` (size, d), rows of length 1. The oldest begins at `place`.

    Args:
        size: number of keys in the queue.
    """

    def __init__(self, size: int, network: nn.Module, projector: tuple[tuple[int, ...], str], *args):
        super().__init__(network, projector, *args)
        self.register_buffer("queue", F.normalize(torch.randn(size, projector[0][-1]), dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def remember(self, keys: Tensor) -> None:
        """Replaces the oldest keys by keys (n, d), which are the same on all processes."""
        places = (self.place + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        # in place: similarities were computed with a copy, which the backward pass still needs
        self.queue.index_copy_(0, places, keys.to(self.queue.dtype))
        self.place.add_(len(keys)).remainder_(len(self.queue))


@dataclass(frozen=True)
class Queued(Momentum):
    """Abstract base of MoCo, and of SAMix on MoCo.

    Args:
        temperature: divisor of the similarities.
        mix_temperature: the same for mixtures; `temperature` if None.
        queue_size: number of keys that are kept, at least those of one step of all processes.
        momentum, end_momentum: see `Momentum`; constant by default, as published. It rises from 0.99 to 0.999 in solo-learn's MoCo v2+.
        bn_splits: keys are made in this many passes over the batch in another order, so that the batch norms of the query and of its key
            see other images. Otherwise a backbone with batch norms may find its key by them. It replaces shuffling over GPUs, and works on
            one GPU. Un-Mix's CIFAR setting is 8; 1 is one pass in order.
    """

    temperature: float = 0.2
    mix_temperature: float | None = None
    queue_size: int = 65536
    bn_splits: int = 1
    momentum: float = 0.999
    end_momentum: float | None = None
    projector_norm: str = "none"

    def __post_init__(self):
        super().__post_init__()
        check_temperatures(self.temperature, self.mix_temperature)
        check_count(1, queue_size=self.queue_size, bn_splits=self.bn_splits)

    def temperature_of(self, mixed: bool) -> float:
        return self.mix_temperature if mixed and self.mix_temperature is not None else self.temperature

    def keys_of(self, state: QueueState, images: Tensor, rng: torch.Generator) -> Tensor:
        if self.bn_splits == 1:
            return state.keys(images)
        check_splits(len(images), self.bn_splits)
        order = torch.randperm(len(images), generator=rng).to(images.device)
        keys = torch.cat([state.keys(some) for some in images[order].chunk(self.bn_splits)])
        return torch.empty_like(keys).index_copy_(0, order, keys)

    def key_views(self, terms: list) -> list[int]:
        return sorted({1, *super().key_views(terms)})  # the queue keeps the keys of the second view

    def candidates(self, state: QueueState, keys: Mapping[int, Tensor], own: int, other: int, mixed: bool) -> Tensor:
        return torch.cat([keys[other], state.queue.float()])

    def rivals(self, scores: Tensor, plan: MixPlan, numbers: Tensor, targets: Tensor, loss: Loss, mixed: bool, keys: int) -> Tensor:
        if mixed and plan.index.shape[1] > 1 and isinstance(loss, CrossEntropy):
            return scores
        hidden = targets == 0
        hidden[:, keys:] = False
        return hide(scores, hidden)

    def memory(self, keys: Mapping[int, Tensor]) -> dict[str, Tensor]:
        made = torch.cat([keys[view] for view in ((0, 1) if self.both_ways else (1,))])
        if len(made) > self.queue_size:
            raise ValueError(
                f"queue_size must be at least the keys of one step, got {self.queue_size} and {len(made)} keys; raise it, or lower the batch size."
            )
        return {"keys": made}


def check_splits(batch: int, splits: int) -> None:
    """Every pass over a part of the batch needs statistics of two images, and all of them those of as many."""
    if splits > 1 and (batch % splits or batch == splits):
        raise ValueError(
            f"bn_splits must divide a batch into parts of at least 2 images, got {splits} and {batch} images; change one of them."
        )


@dataclass(frozen=True)
class MoCo(Queued):
    """MoCo v2 (He et al., CVPR 2020, arXiv:1911.05722; Chen et al., arXiv:2003.04297): negatives are keys of earlier batches.

    Clean images compete only with the queue. So do mixtures with `Separate` (Un-Mix, MoCoMix). With `CrossEntropy` (i-Mix, MixCo) the keys of
    the batch, including the partner's, are candidates too.

    Deviation: the length of the queue need not be a multiple of the batch; keys replace the oldest ones.

    Args:
        temperature, mix_temperature, queue_size, bn_splits: see `Queued`.
    """

    def make_state(self, parts: Parts, network: nn.Module, layers: list[nn.Module | None]) -> QueueState:
        return QueueState.for_parts(parts, network, self.queue_size, network, (self.projector, self.projector_norm), None, layers)
