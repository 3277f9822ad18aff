"""The catalogue of pre-training: ways of mixing, and their bases."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from hf_mixup.core.checks import check_known, nearest
from hf_mixup.core.losses import CrossEntropy, Loss
from hf_mixup.core.policy import AreaLabels, SamplePolicy
from hf_mixup.method import Method, fields_of, needs_of_model
from hf_mixup.methods import METHODS
from hf_mixup.policies import Mixup, Vanilla
from hf_mixup.pretraining.barlow import BarlowTwins
from hf_mixup.pretraining.byol import BYOL
from hf_mixup.pretraining.losses import Agreement, LogOfMean, Separate
from hf_mixup.pretraining.moco import MoCo
from hf_mixup.pretraining.mocov3 import MoCoV3
from hf_mixup.pretraining.policies import Halves, ICutMix, IMixup, Strangers, UnMix
from hf_mixup.pretraining.samix import SAMix
from hf_mixup.pretraining.sdmp import SDMP, Paste
from hf_mixup.pretraining.simclr import SimCLR
from hf_mixup.pretraining.simsiam import SimSiam
from hf_mixup.steps.step import Step

BASES: dict[str, Step] = {
    "simclr": SimCLR(),
    "npair": SimCLR(within_view=False, mixed_within_view=False, both_ways=False),
    "moco": MoCo(),
    "mocov3": MoCoV3(),
    "byol": BYOL(),
    "simsiam": SimSiam(),
    "barlowtwins": BarlowTwins(),
}


class Row(NamedTuple):
    """A way of mixing.

    Attributes:
        sample: the policy.
        paper: arXiv number.
        loss: the loss for bases with negatives: it decides who competes with whom.
        fields: fields of the base.
        also: more fields, by base.
        bases: the bases that it works with; None for all except Barlow Twins.
        steps: its own step, for some bases.
    """

    sample: SamplePolicy
    paper: str = ""
    loss: Loss = CrossEntropy()
    fields: Mapping[str, Any] = MappingProxyType({})
    also: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    bases: tuple[str, ...] | None = None
    steps: Mapping[str, Step] = MappingProxyType({})


_CONTRASTIVE = ("simclr", "npair", "moco", "mocov3", "byol", "simsiam")
_MIXCO = {"halved": True, "one_pass": True}
# "vanilla" is only the base; every other name of METHODS means i-Mix with that method's sample policy
PRETEXTS: dict[str, Row] = {
    "vanilla": Row(Vanilla(), fields={"mixed": 0.0}, also={"barlowtwins": {"mix_scale": 0.0}}, bases=(*_CONTRASTIVE, "barlowtwins")),
    "imix": Row(IMixup(), "2010.08887", fields={"clean": 0.0}),
    "icutmix": Row(ICutMix(), "2010.08887", fields={"clean": 0.0}),
    "unmix": Row(UnMix(), "2003.05438", Separate()),
    "mixco": Row(
        Halves(), "2010.06300", fields=_MIXCO, bases=("simclr", "moco"),
        also={"moco": {"mix_temperature": 0.05}, "simclr": {"temperature": 0.5, "mixed_within_view": False}},
    ),
    "mocomix": Row(Strangers(), "", Separate(), {"positives": "same"}, bases=("moco",)),
    # every image has its own lam: with one lam, each step moves the area of all masks in one direction, and the value neck's norm removes lam
    "samix": Row(Mixup(alpha=2.0), "2111.15454", Separate(), bases=("moco",), steps={"moco": SAMix(value_neck=True, mask_loss=1.0)}),
    "sdmp": Row(Paste(), "2206.07692", LogOfMean(), bases=("mocov3",), steps={"mocov3": SDMP()}),
    "mixedbarlow": Row(Mixup(mode="batch"), "2312.02151", bases=("barlowtwins",)),
}  # fmt: skip


def pretext(mix: str = "imix", base: str = "moco", **fields: Any) -> Method:
    """Pre-training as a method: `pretext("unmix", "moco", queue_size=4096, temperature=0.1)`.

    Args:
        mix: a name of `PRETEXTS`, or a method of `METHODS` that needs images only; i-Mix then uses its sample policy.
        base: a name of `BASES`.
        **fields: other hyper-parameters, see `Method.replaced`.

    Raises:
        ValueError: for unknown names, and for a way of mixing that does not work with the base.
    """
    check_known("base", base, BASES)
    row = PRETEXTS.get(mix)
    if row is None:
        if mix not in METHODS:
            raise ValueError(f"mix must be a known name, got {mix!r}; {nearest(mix, [*PRETEXTS, *METHODS])}")
        method = METHODS[mix]
        wanted = needs_of_model(method) or ([] if method.loss == CrossEntropy() else ["a loss of its own"])
        wanted = wanted or ([] if method.label == AreaLabels() else ["labels of its own"])
        wanted = wanted or ([] if len(method.step.rows) == 1 else ["clean images beside the mixtures"])
        if wanted:
            raise ValueError(
                f"mixing without labels takes methods that need images only, got {mix!r}, which needs {' and '.join(wanted)}; choose another."
            )
        row = Row(method.sample, method.paper, fields=PRETEXTS["imix"].fields)
        if base == "barlowtwins":
            row = row._replace(fields={}, bases=("barlowtwins",))
    allowed = _CONTRASTIVE if row.bases is None else row.bases
    if base not in allowed:
        raise ValueError(f"{mix!r} must have a base of {', '.join(allowed)}, got {base!r}; choose one of those.")
    step = row.steps.get(base, BASES[base])
    loss = row.loss if type(row.loss) in getattr(step, "losses", (CrossEntropy,)) else _agreement(base)
    shared = {name: value for name, value in row.fields.items() if name in fields_of(step)}
    method = Method(mix, row.sample, loss=loss, step=step, paper=row.paper)
    return method.replaced(**{**shared, **row.also.get(base, {}), **fields})


def _agreement(base: str) -> Loss:
    return Agreement(1.0, 0.0) if base == "simsiam" else Agreement()
