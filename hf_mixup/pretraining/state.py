"""What a pre-training method keeps beside the backbone: projector, predictor, key network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_mixup.core.checks import check_counts, check_known
from hf_mixup.core.plan import MixPlan
from hf_mixup.networks.average import Average
from hf_mixup.networks.families import classifier_of, leave_classifier
from hf_mixup.networks.passes import changing, input_of, watched
from hf_mixup.steps.manifoldmix import mixed_output
from hf_mixup.steps.step import MethodState

NORMS = ("none", "hidden", "all", "all_plain")


def check_mlp(name: str, widths: tuple[int, ...], norm: str) -> None:
    check_counts(1, **{name: widths})
    check_known(f"{name}_norm", norm, NORMS)


def mlp(inputs: int, widths: Sequence[int], norm: str) -> nn.Sequential:
    """Linear layers of these widths, with ReLU between them.

    Args:
        norm: batch norms after `none` of the layers, the `hidden` ones, or `all`; in `all_plain` the last one has no weights. A layer
            without a norm after it has a bias.
    """
    layers: list[nn.Module] = []
    for place, width in enumerate(widths):
        last = place == len(widths) - 1
        normed = norm.startswith("all") or (norm == "hidden" and not last)
        layers.append(nn.Linear(inputs, width, bias=not normed))
        if normed:
            layers.append(nn.BatchNorm1d(width, affine=not (last and norm == "all_plain")))
        if not last:
            layers.append(nn.ReLU())
        inputs = width
    return nn.Sequential(*layers)


def unit(rows: Tensor) -> Tensor:
    """Rows (B, d) float32 scaled to length 1, also under autocast."""
    with torch.autocast(rows.device.type, enabled=False):
        return F.normalize(rows.float(), dim=1)


@dataclass(frozen=True, eq=False)
class Batch:
    """Images (B, C, H, W) for the backbone. If a layer of it mixes them: that layer, and the plan."""

    images: Tensor
    layer: nn.Module | None = None
    plan: MixPlan | None = None


class ContrastState(MethodState):
    """Projector and predictor, on the input of the backbone's classifier. The classifier is not trained.

    Their batch norms are over all processes where the backbone's are `SyncBatchNorm`.

    Args:
        projector, predictor: widths and norms of `mlp`; None for no predictor.
        layers: modules of the backbone whose outputs may be mixed; None means the images.
    """

    def __init__(
        self,
        network: nn.Module,
        projector: tuple[tuple[int, ...], str],
        predictor: tuple[tuple[int, ...], str] | None,
        layers: Sequence[nn.Module | None],
    ):
        super().__init__()
        classifier = leave_classifier(network)
        self.classifiers = (classifier,)  # a tuple, so that it is not registered as a module here
        self.layers = tuple(layers)
        self.projector = mlp(classifier.in_features, *projector)
        self.predictor = None if predictor is None else mlp(projector[0][-1], *predictor)
        if any(isinstance(module, nn.SyncBatchNorm) for module in network.modules()):
            nn.SyncBatchNorm.convert_sync_batchnorm(self)  # in place: the heads' statistics are those of all processes too

    @property
    def changed(self) -> list[nn.Module]:
        return [layer for layer in self.layers if layer is not None]

    @property
    def watched(self) -> list[nn.Module]:
        return [*super().watched, *self.classifiers]

    def projected(self, network: nn.Module, batches: Sequence[Batch], one_pass: bool) -> list[Tensor]:
        """(B, d) of each batch, not normalised. `one_pass`: all batches go through the network at once, with common batch statistics."""
        made: list[Tensor] = []
        for group in [batches] if one_pass else [[batch] for batch in batches]:
            with _mixing(group):
                features = feature_of(network, self.classifiers[0], torch.cat([batch.images for batch in group]))
            made += through(self.projector, features).split([len(batch.images) for batch in group])
        return made

    def predicted(self, rows: Tensor) -> Tensor:
        return rows if self.predictor is None else self.predictor(rows)


class NoClassifier(nn.Module):
    """Zeros (B, outputs). It replaces a classifier if only its input is needed.

    Args:
        outputs: number of outputs of the classifier, which some networks read.
    """

    def __init__(self, outputs: int):
        super().__init__()
        self.outputs = outputs

    def forward(self, rows: Tensor) -> Tensor:
        return rows.new_zeros(*rows.shape[:-1], self.outputs)


class KeyState(ContrastState):
    """A state with a key network: EMAs of backbone and projector, without gradients, in training mode.

    Parameters follow the network. Buffers, the running statistics of batch norms, are copied once and then updated by its own passes.
    """

    def __init__(self, network: nn.Module, *args):
        super().__init__(network, *args)
        self.key, self.key_projector = Average(network), Average(self.projector)
        # the key network has no classifier, so that its state does not depend on the backbone's classes
        name = next(name for name, module in self.key.network.named_modules() if module is classifier_of(self.key.network))
        self.key.network.set_submodule(name, NoClassifier(self.classifiers[0].out_features))
        self.classifiers = (*self.classifiers, self.key.network.get_submodule(name))

    @property
    def watched(self) -> list[nn.Module]:
        return [*super().changed, self.classifiers[0]]

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        """(B, d), of length 1."""
        return unit(through(self.key_projector.network, feature_of(self.key, self.classifiers[1], images)))

    def follow(self, network: nn.Module, momentum: float) -> None:
        """Updates the key network by the backbone and its projector."""
        self.key.follow(network, momentum, buffers=False)
        self.key_projector.follow(self.projector, momentum, buffers=False)


def feature_of(network: nn.Module, classifier: nn.Module, images: Tensor) -> Tensor:
    """The input of the classifier, (B, D)."""
    return watched(network, images, [input_of(classifier)])[1][0]


def through(head: nn.Module, rows: Tensor) -> Tensor:
    """Applies the head in the dtype of its weights, unless autocast chooses another."""
    return head(rows.to(next(head.parameters()).dtype))


@contextmanager
def _mixing(group: Sequence[Batch]) -> Iterator[None]:
    """Context manager in which rows of a pass are mixed in their layer."""
    layer = next((batch.layer for batch in group if batch.layer is not None), None)
    partner, lam, start = [], [], 0
    for batch in group:
        own = torch.arange(len(batch.images), device=batch.images.device)
        mixed = batch.layer is not None
        partner.append(start + (batch.plan.index[:, 1] if mixed else own))
        lam.append(batch.plan.mask.value[:, 0] if mixed else torch.ones(len(own), device=own.device))
        start += len(own)
    change = nullcontext() if layer is None else changing(layer, lambda output: mixed_output(output, torch.cat(partner), torch.cat(lam)))
    with change:
        yield
