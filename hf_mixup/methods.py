"""Methods: a sample policy, a label policy, a loss and a step under one name, and the choice between several."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_mixup.core.checks import check_between, check_images, check_known, check_labels, check_probabilities, check_switch, nearest
from hf_mixup.core.hub import download
from hf_mixup.core.losses import LOSSES, CrossEntropy, Decoupled, Loss
from hf_mixup.core.plan import blend, mix_targets
from hf_mixup.core.policy import LabelPolicy, SamplePolicy, Signals
from hf_mixup.core.rng import keyed
from hf_mixup.labels import LABEL_POLICIES, AlignedLabels, AreaLabels, AttentionLabels, ProgressiveLabels, SaliencyLabels, TokenLabels
from hf_mixup.policies import (
    SAMPLE_POLICIES,
    AttentiveMix,
    CoMixup,
    CutMix,
    DirichletSets,
    FMix,
    GridMix,
    GuidedMixup,
    MaskMix,
    Mixup,
    MultiMixup,
    PuzzleMix,
    RecursivePaste,
    ResizeMix,
    SaliencyGrafting,
    SaliencyMix,
    SMMix,
    SmoothMix,
    SnapMix,
    TokenCutMix,
    TokenMix,
    Vanilla,
)
from hf_mixup.steps import STEPS, AdversarialMixing, AlignMix, LearnedMixing, ManifoldMix, RecursiveMix, SMMixing, Standard, SUMix, SuperMix
from hf_mixup.steps.step import Step

CONFIG_NAME = "mixup_config.json"

# the parts of a method and what may stand in for them, by the lower-case class name
PARTS: dict[str, dict[str, type]] = {
    part: {cls.__name__.lower(): cls for cls in classes}
    for part, classes in {"sample": SAMPLE_POLICIES, "label": LABEL_POLICIES, "loss": LOSSES, "step": STEPS}.items()
}


@dataclass(frozen=True)
class Method:
    """A mixing method: how images are planned, how labels are weighed, which loss, which training step.

    Calling it mixes one batch, in any loop and on any device; that is the drop-in for `timm.data.Mixup` and torchvision's
    `v2.MixUp` and `v2.CutMix`, for methods that need no model.

    Attributes:
        name: its key in `METHODS`.
        paper: arXiv number.
    """

    name: str
    sample: SamplePolicy
    label: LabelPolicy = AreaLabels()
    loss: Loss = CrossEntropy()
    step: Step = Standard()
    paper: str = field(default="", compare=False)

    def __call__(
        self, images: Tensor, labels: Tensor, num_labels: int | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mixes `images` (B, C, H, W) and `labels`, (B,) class numbers or (B, num_labels) soft.

        Returns the mixed images and float32 soft targets (B, num_labels). Without a (CPU) `generator`, one number is drawn
        from torch's global stream. Raises ValueError or TypeError for input that cannot be mixed.
        """
        check_model_free(self, "a plain call")
        check_images(images)
        check_labels(labels, len(images), num_labels)
        if generator is None:
            generator = keyed(int(torch.randint(2**62, ())))
        plan = self.sample.plan(images.shape, generator, Signals(images.device, images=images)).to(images.device)
        return blend(plan, images), mix_targets(plan, labels, num_labels)

    def replaced(self, **fields: Any) -> Method:
        """The same method with other hyper-parameters.

        A name is looked up in the sample policy, the label policy, the loss and the step, in that order; a whole part is
        replaced by `{"name": ..., <fields>}`, and `{<fields>}` changes fields of the part that is there.
        """
        parts = {part: getattr(self, part) for part in PARTS}
        own: dict[str, dict[str, Any]] = {}
        # whole parts first: a flat field may belong to the new part
        for key in sorted(fields, key=lambda key: key not in PARTS):
            value = fields[key]
            if key in PARTS:
                parts[key] = value if isinstance(value, tuple(PARTS[key].values())) else _part(key, value, parts[key])
                continue
            owner = next((part for part in PARTS if key in _fields(parts[part])), None)
            if owner is None:
                known = sorted(set().union(*map(_fields, parts.values())) | set(PARTS))
                raise ValueError(f"{self.name!r} must be given its own hyper-parameters, got {key!r}; {nearest(key, known)}")
            own.setdefault(owner, {})[key] = value
        # all fields of a part at once: it may check them together
        parts |= {part: _with(parts[part], values) for part, values in own.items()}
        return dataclasses.replace(self, **parts)

    def to_dict(self) -> dict[str, Any]:
        """As data: JSON-ready, and all that `from_dict` needs."""
        described = {
            part: {"name": type(getattr(self, part)).__name__.lower(), **dataclasses.asdict(getattr(self, part))} for part in PARTS
        }
        return {"name": self.name, **described}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Method:
        """Inverse of `to_dict`. Raises ValueError for unknown names or fields."""
        parts = dict(data)
        return get_method(parts.pop("name"), **parts)

    @classmethod
    def from_pretrained(cls, repo_or_folder: str | Path, *, revision: str | None = None, token: str | None = None) -> Method:
        """The method that a checkpoint was trained with, from a folder or the Hub. Where it was several, take them from
        `MethodChoice.from_pretrained`. Raises ValueError then."""
        choice = MethodChoice.from_pretrained(repo_or_folder, revision=revision, token=token)
        if len(choice.methods) > 1:
            raise ValueError(
                f"{repo_or_folder!s} was expected to hold one method, got {choice}; use MethodChoice.from_pretrained for several."
            )
        return choice.methods[0]

    def __str__(self) -> str:
        return self.name


def _fields(part: Any) -> set[str]:
    return {f.name for f in dataclasses.fields(part)}


def _with(part: Any, values: Mapping[str, Any]) -> Any:
    """A part with other values of its fields, of which it checks all but the switches itself."""
    check_switch(**{f.name: values[f.name] for f in dataclasses.fields(part) if f.name in values and isinstance(f.default, bool)})
    return dataclasses.replace(part, **values)


def _part(kind: str, value: Any, current: Any) -> Any:
    """A part from data: a name, `{"name": ..., fields}`, or only fields of the part that is there."""
    value = {"name": value} if isinstance(value, str) else dict(value)
    name = value.pop("name", type(current).__name__.lower())
    check_known(kind, name, PARTS[kind])
    cls = PARTS[kind][name]
    base = current if type(current) is cls else cls()
    for key in value:
        if key not in _fields(base):
            raise ValueError(f"{kind} {name!r} must be given its own hyper-parameters, got {key!r}; {nearest(key, _fields(base))}")
    # JSON has lists where the policies have tuples
    return _with(base, {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        # sample mixing
        Method("vanilla", Vanilla()),
        Method("mixup", Mixup(), paper="1710.09412"),
        Method("cutmix", CutMix(), paper="1905.04899"),
        Method("manifoldmix", Mixup(alpha=2.0), step=ManifoldMix(), paper="1806.05236"),
        Method("fmix", FMix(), paper="2002.12047"),
        Method("attentivemix", AttentiveMix(), paper="2003.13048"),
        Method("smoothmix", SmoothMix()),
        Method("saliencymix", SaliencyMix(), paper="2006.01791"),
        Method("puzzlemix", PuzzleMix(), paper="2009.06962"),
        Method("comixup", CoMixup(), paper="2102.03065"),
        Method("gridmix", GridMix()),
        Method("supermix", DirichletSets(), step=SuperMix(), paper="2003.05034"),
        Method("resizemix", ResizeMix(), paper="2012.11101"),
        Method("alignmix", Mixup(alpha=2.0), step=AlignMix(), paper="2103.15375"),
        Method("automix", Mixup(alpha=2.0, mode="batch"), step=LearnedMixing(), paper="2103.13027"),
        Method(
            "samix",
            Mixup(alpha=2.0, mode="batch"),
            step=LearnedMixing(
                lam_input="multiply_residual",
                value_neck=True,
                x_qk_concat=True,
                upsampling="bilinear",
                mask_loss_mode="L1+Variance",
            ),
            paper="2111.15454",
        ),
        Method("recursivemix", RecursivePaste(), step=RecursiveMix(), paper="2203.06844"),
        # label mixing
        Method("saliencygrafting", SaliencyGrafting(), SaliencyLabels(), paper="2112.08796"),
        Method("transmix", CutMix(), label=AttentionLabels(), paper="2111.09833"),
        Method("decouplemix", CutMix(), loss=Decoupled(), paper="2203.10761"),
        Method("tokenmix", TokenMix(), label=TokenLabels(), paper="2207.08409"),
        Method("smmix", SMMix(), step=SMMixing(), paper="2212.12977"),
        # beyond the published tables
        Method("snapmix", SnapMix(), paper="2012.04846"),
        Method("guidedmixup", GuidedMixup(), paper="2306.16612"),
        Method("adautomix", MultiMixup(alpha=1.0, mode="batch"), step=AdversarialMixing(), paper="2312.11954"),
        Method("tlalign", TokenCutMix(), label=AlignedLabels(), paper="2210.06455"),
        Method("mixpro", MaskMix(), label=ProgressiveLabels(), paper="2304.12043"),
        Method("sumix", CutMix(), step=SUMix(), paper="2407.07805"),
    )
}


def get_method(name: str, **fields: Any) -> Method:
    """A method by its name in `METHODS`, with other hyper-parameters where given: `get_method("cutmix", alpha=0.2)`."""
    check_known("method", name, METHODS)
    return METHODS[name].replaced(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def needs_of_model(method: Method) -> list[str]:
    """What the method needs a model for; empty for one that mixes by images alone."""
    wanted = sorted((method.sample.needs | method.label.needs) - {"images"})
    return wanted or ([] if isinstance(method.step, Standard) else ["a training step of its own"])


def check_model_free(method: Method, where: str) -> None:
    """Refuses a method that needs the model, where there is none."""
    wanted = needs_of_model(method)
    if wanted:
        raise ValueError(
            f"{where} takes methods that mix by images alone, got {method.name!r}, which needs {' and '.join(wanted)}, so the model; "
            "use MixupTrainer."
        )


def taught_by_the_network(choice: MethodChoice) -> list[str]:
    """Names of the methods that take evidence from a teacher where one is named, and from the network in training where not."""
    parts = {method.name: (method.sample, method.label, method.step) for method in choice.methods}
    return [name for name, some in parts.items() if any("teacher" in _fields(part) and part.teacher is None for part in some)]


@dataclass(frozen=True)
class MethodChoice:
    """One or several methods, of which one is chosen for every batch.

    Attributes:
        methods: at least one, of different names.
        probabilities: one for each, summing to 1.
        rate: the share of batches that is mixed at all.
    """

    methods: tuple[Method, ...]
    probabilities: tuple[float, ...]
    rate: float = 1.0

    @classmethod
    def build(
        cls,
        mix: str | Method | Sequence[str | Method],
        mix_prob: Sequence[float] | None = None,
        alpha: float | Sequence[float] | None = None,
        mix_args: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        mode: str | None = None,
        loss: str | Mapping[str, Any] | Loss | None = None,
        mix_rate: float = 1.0,
    ) -> MethodChoice:
        """From what people type. Raises ValueError for unknown names and fields, and for lists of different lengths.

        Args:
            mix: a method or several, by name or built.
            mix_prob: one probability for each; equal ones if None.
            alpha: one for each, or one for all that have an alpha.
            mix_args: other hyper-parameters by method, `{"cutmix": {"alpha": 0.2}}`.
            mode: sets `mode` of every method that has one.
            loss: sets the loss of every method, by name or `{"name": ..., <fields>}`.
            mix_rate: the share of batches that is mixed, 0 to 1.
        """
        named = [mix] if isinstance(mix, (str, Method)) else list(mix)
        if not named:
            raise ValueError(f"mix needs at least one method, got none; {nearest('', METHODS)}")
        methods = [item if isinstance(item, Method) else get_method(item) for item in named]
        names = [method.name for method in methods]
        if len(set(names)) < len(names):
            raise ValueError(f"mix must name every method once, got {names}; give its share with mix_prob instead.")
        for_all = not isinstance(alpha, (list, tuple))
        alphas = [alpha] * len(methods) if for_all else list(alpha)
        if len(alphas) == 1:
            alphas, for_all = alphas * len(methods), True
        if len(alphas) != len(methods):
            raise ValueError(
                f"alpha needs one value, or one for each of the {len(methods)} methods, got {len(alphas)}; give {len(methods)}."
            )
        mix_args = dict(mix_args or {})
        for name in mix_args:
            if name not in names:
                raise ValueError(f"mix_args must be for the methods in use, got {name!r}; {nearest(name, names)}")
        built = []
        for method, own_alpha in zip(methods, alphas, strict=True):
            fields: dict[str, Any] = {}
            if loss is not None:
                fields["loss"] = loss
            if mode is not None and "mode" in _fields(method.sample):
                fields["mode"] = mode
            # an alpha for all, or in the place of a method that has none, is not a mistake where others need it
            if own_alpha is not None and ("alpha" in _fields(method.sample) or not (for_all or method.name == "vanilla")):
                fields["alpha"] = own_alpha
            method = method.replaced(**fields)
            own = {k: tuple(v) if isinstance(v, list) else v for k, v in mix_args.get(method.name, {}).items()}
            built.append(method.replaced(**own))
        probabilities = [1 / len(built)] * len(built) if mix_prob is None else list(mix_prob)
        check_probabilities(probabilities, len(built))
        check_between(0, 1, mix_rate=mix_rate)
        return cls(tuple(built), tuple(map(float, probabilities)), float(mix_rate))

    def draw(self, rng: torch.Generator) -> Method:
        """The method of a batch."""
        if self.rate < 1 and float(torch.rand((), generator=rng)) >= self.rate:
            return METHODS["vanilla"].replaced(loss=self.methods[0].loss)
        if len(self.methods) == 1:
            return self.methods[0]
        weights = torch.tensor(self.probabilities, dtype=torch.float64)
        return self.methods[int(torch.multinomial(weights, 1, generator=rng))]

    def to_dict(self) -> dict[str, Any]:
        return {
            "methods": [method.to_dict() for method in self.methods],
            "mix_prob": list(self.probabilities),
            "mix_rate": self.rate,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MethodChoice:
        methods = [Method.from_dict(method) for method in data["methods"]]
        return cls.build(methods, data["mix_prob"], mix_rate=data.get("mix_rate", 1.0))

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder, CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, repo_or_folder: str | Path, *, revision: str | None = None, token: str | None = None) -> MethodChoice:
        """From a folder or a Hub repository that a run left, by its `mixup_config.json`."""
        path = Path(repo_or_folder)
        if path.is_dir():
            path = path / CONFIG_NAME
            if not path.is_file():
                raise ValueError(f"{repo_or_folder} was expected to hold {CONFIG_NAME}, got none; give the folder of a run of ours.")
        else:
            path = download(str(repo_or_folder), CONFIG_NAME, revision=revision, token=token)
        return cls.from_dict(json.loads(path.read_text()))

    def __str__(self) -> str:
        return " + ".join(map(str, self.methods))
