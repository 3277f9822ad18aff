"""The catalogue of methods, and the choice between several."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_mixup.core.checks import check_known, check_listed, check_num_labels, check_object, check_probabilities, nearest
from hf_mixup.core.jensenshannon import JensenShannon
from hf_mixup.core.losses import BCE, Decoupled, Loss
from hf_mixup.core.policy import NOTHING
from hf_mixup.core.rng import fresh
from hf_mixup.core.schedule import Points, Schedule, as_json, corners, extremes_of, schedule_of, value_at
from hf_mixup.labels import AlignedLabels, AttentionLabels, ProgressiveLabels, RebalancedLabels, SaliencyLabels, TokenLabels
from hf_mixup.method import CONFIG_NAME, Method, check_model_free, fields_of, read_config
from hf_mixup.policies import (
    CMO,
    RICAP,
    AttentiveMix,
    AugMix,
    BalancedMixup,
    ClassMix,
    CMixup,
    CoMixup,
    CutMix,
    DirichletSets,
    FixedMixup,
    FMix,
    GMix,
    GridMix,
    GuidedMixup,
    HMix,
    KMixup,
    LocalMixup,
    MaskMix,
    MergeMix,
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
    SpliceMix,
    TokenCutMix,
    TokenMix,
    Vanilla,
    VideoMix,
)
from hf_mixup.steps import (
    AdversarialMixing,
    AlignMix,
    KeepClean,
    LearnedMixing,
    ManifoldMix,
    MixStyle,
    MoEx,
    NoisyMix,
    PatchUp,
    RecursiveMix,
    SMMixing,
    SUMix,
    SuperMix,
)

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
        # not in the published tables
        Method("regmixup", Mixup(alpha=20.0), step=KeepClean(), paper="2206.14502"),
        Method("augmix", AugMix(), loss=JensenShannon(), step=KeepClean(mixtures=2), paper="1912.02781"),
        Method("ricap", RICAP(), paper="1811.09030"),
        Method("moex", FixedMixup(), step=MoEx(), paper="2002.11102"),
        Method("patchup", Mixup(alpha=2.0), step=PatchUp(), paper="2006.07794"),
        Method("nfm", Mixup(), step=NoisyMix(), paper="2110.02180"),
        Method("mixstyle", Mixup(alpha=0.1), step=MixStyle(), paper="2104.02008"),
        Method("hmix", HMix(), paper="2208.09913"),
        Method("gmix", GMix(), paper="2208.09913"),
        Method("kmixup", KMixup(), paper="2106.02933"),
        Method("localmixup", LocalMixup(), paper="2201.04368"),
        Method("mergemix", MergeMix(), step=KeepClean(clean_alpha=0.8), paper="2510.23479"),
        Method("splicemix", SpliceMix(), loss=BCE(), step=KeepClean(clean_weight=4.0), paper="2311.15200"),
        Method("wordmixup", Mixup(), step=ManifoldMix(layers=(0,)), paper="1905.08941"),
        Method("tmix", Mixup(alpha=0.75), step=ManifoldMix(layers=(7 / 12, 0.75, 1.0)), paper="2004.12239"),
        Method("cmixup", CMixup(), paper="2210.05775"),
        Method("remix", Mixup(), label=RebalancedLabels(), paper="2007.03943"),
        Method("balancedmixup", BalancedMixup(), paper="2109.09850"),
        Method("cmo", CMO(), paper="2112.00412"),
        Method("snapmix", SnapMix(), paper="2012.04846"),
        Method("guidedmixup", GuidedMixup(), paper="2306.16612"),
        Method("adautomix", MultiMixup(alpha=1.0, mode="batch"), step=AdversarialMixing(), paper="2312.11954"),
        Method("tlalign", TokenCutMix(), label=AlignedLabels(), paper="2210.06455"),
        Method("mixpro", MaskMix(), label=ProgressiveLabels(), paper="2304.12043"),
        Method("sumix", CutMix(), step=SUMix(), paper="2407.07805"),
    )
}


# methods for label maps only; a network for whole images cannot use them. They are found by name like the others
OF_MAPS: dict[str, Method] = {"classmix": Method("classmix", ClassMix(), paper="2007.07936")}
# methods of videos alone
OF_VIDEOS: dict[str, Method] = {"videomix": Method("videomix", VideoMix(), paper="2012.03457")}


def get_method(name: str, **fields: Any) -> Method:
    """A method by its name in `METHODS`, `OF_MAPS` or `OF_VIDEOS`, with other hyper-parameters where given: `get_method("cutmix", alpha=0.2)`."""
    known = {**METHODS, **OF_MAPS, **OF_VIDEOS}
    check_known("method", name, known)
    return known[name].replaced(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def taught_by_the_network(choice: MethodChoice) -> list[str]:
    """Names of the methods that could have a teacher, but have none and therefore read the network in training."""
    parts = {method.name: (method.sample, method.label, method.step) for method in choice.methods}
    return [name for name, some in parts.items() if any("teacher" in fields_of(part) and part.teacher is None for part in some)]


@dataclass(unsafe_hash=True)
class MethodChoice:
    """One or several methods. One of them is chosen for every batch.

    A call mixes one batch, in any loop and on any device. With `num_labels` it replaces `timm.data.Mixup` with mixup and cutmix:
    `images, targets = choice(images, labels)`. Label smoothing is set in the loss, `loss={"name": "crossentropy", "smoothing": 0.1}`.

    Attributes:
        methods: at least one, with different names.
        probabilities: one for each, summing to 1; numbers or schedules.
        rate: the share of batches that is mixed at all; a number or a schedule.
        num_labels: number of classes, for calls without it. It is not saved.
        mixup_enabled: set it to False to stop mixing, as timm's switch for the last epochs.
    """

    methods: tuple[Method, ...]
    probabilities: tuple[float | Schedule, ...]
    rate: float | Schedule = 1.0
    num_labels: int | None = field(default=None, compare=False)
    mixup_enabled: bool = field(default=True, compare=False, repr=False)

    @property
    def rates(self) -> tuple[float, float]:
        """The smallest and the largest share of batches that is mixed."""
        return extremes_of(self.rate)

    def at(self, epoch: int, epochs: int) -> MethodChoice:
        """The choice in an epoch, from 0, of a run of `epochs`, without schedules. Raises ValueError if a schedule needs the epochs and they are unknown."""
        losses = [method.loss.at(epoch, epochs) for method in self.methods]
        steady = all(loss is method.loss for loss, method in zip(losses, self.methods, strict=True))
        if steady and not any(isinstance(value, Schedule) for value in (self.rate, *self.probabilities)):
            return self
        methods = tuple(replace(method, loss=loss) for method, loss in zip(self.methods, losses, strict=True))
        probabilities = tuple(value_at(value, epoch, epochs) for value in self.probabilities)
        return replace(self, methods=methods, probabilities=probabilities, rate=value_at(self.rate, epoch, epochs))

    @property
    def counting(self) -> list[str]:
        """Names of the methods that need the number of training images of each class, if it is not set."""
        return [method.name for method in self.methods if any(getattr(method, kind).class_counts is None for kind in method.counting)]

    def with_class_counts(self, counts: tuple[int, ...]) -> MethodChoice:
        """The same choice with the number of training images of each class, for methods that need it, if it is not set."""
        return replace(self, methods=tuple(method.with_class_counts(counts) for method in self.methods))

    @property
    def rows(self) -> int:
        """Number of rows of each image in a batch of a collator."""
        return max(len(method.step.rows or (True,)) for method in self.methods)

    @classmethod
    def build(
        cls,
        mix: str | Method | Sequence[str | Method],
        mix_prob: Sequence[Any] | None = None,
        alpha: float | Sequence[float] | None = None,
        mix_args: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        mode: str | None = None,
        loss: str | Mapping[str, Any] | Loss | None = None,
        mix_rate: Any = 1.0,
        num_labels: int | None = None,
    ) -> MethodChoice:
        """Builds a choice from a user's settings. Raises ValueError for unknown names and fields, and for lists of different lengths.

        Args:
            mix: one or several methods, as names or objects.
            mix_prob: one probability for each, a number or a schedule; equal probabilities if None.
            alpha: one value for each, or one for all methods that have an alpha.
            mix_args: other hyper-parameters by method, `{"cutmix": {"alpha": 0.2}}`.
            mode: `mode` of every method that has one.
            loss: loss of every method, as a name or `{"name": ..., <fields>}`.
            mix_rate: the share of batches that is mixed, 0 to 1, or a schedule of it: points `[[epoch, share], ...]`, or
                `{"name": "withouthesitation"}`, as `hf_mixup.core.schedule` describes them.
            num_labels: number of classes, for calls without it.
        """
        if num_labels is not None:
            check_num_labels(num_labels)
        if not isinstance(mix, (str, Method)):
            check_listed("mix", mix, "of methods, whose shares mix_prob names")
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
        mix_args = {} if mix_args is None else mix_args
        check_object("mix_args", mix_args, '{"cutmix": {"alpha": 0.2}}')
        for name in mix_args:
            check_object(f"mix_args of {name!r}", mix_args[name], '{"alpha": 0.2}')
            if name not in names:
                raise ValueError(f"mix_args must be for the methods in use, got {name!r}; {nearest(name, names)}")
        built = []
        for method, own_alpha in zip(methods, alphas, strict=True):
            fields: dict[str, Any] = {}
            if mode is not None and "mode" in fields_of(method.sample):
                fields["mode"] = mode
            # an alpha for a method that has none is no mistake, if it is for all methods or others need theirs
            if own_alpha is not None and ("alpha" in fields_of(method.sample) or not (for_all or method.name == "vanilla")):
                fields["alpha"] = own_alpha
            if loss is not None:
                method = method.replaced(loss=loss)
            own = {k: tuple(v) if isinstance(v, list) else v for k, v in mix_args.get(method.name, {}).items()}
            built.append(method.replaced(**{**fields, **own}))  # at once, because a part may check alpha and another field together
        if mix_prob is not None:
            check_listed("mix_prob", mix_prob, "with a probability for each method")
        probabilities = [1 / len(built)] * len(built) if mix_prob is None else list(mix_prob)
        if any(isinstance(value, (str, list, tuple, dict, Schedule)) for value in probabilities):
            probabilities = [schedule_of("mix_prob", value) for value in probabilities]
            for value in probabilities:
                if isinstance(value, Schedule) and not isinstance(value, Points):
                    raise ValueError(f"mix_prob takes numbers and schedules of points, got {as_json(value)}; give points, or set mix_rate.")
        for epoch in corners(probabilities):
            check_probabilities([value_at(value, epoch, 0) for value in probabilities], len(built))
        return cls(tuple(built), tuple(map(_number, probabilities)), schedule_of("mix_rate", mix_rate), num_labels)

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        num_labels: int | None = None,
        generator: torch.Generator | None = None,
        columns: Mapping[str, Tensor] = NOTHING,
    ) -> tuple[Tensor, Tensor]:
        """Mixes one batch by one of the methods. Arguments, results and errors are those of a call of a `Method`. If the choice has schedules, call
        `choice.at(epoch, epochs)(images, labels)`."""
        for method in self.methods:
            check_model_free(method, "a plain call")
        generator = fresh() if generator is None else generator
        return self.at(-1, 0).draw(generator)(images, labels, self.num_labels if num_labels is None else num_labels, generator, columns)

    @property
    def columns(self) -> frozenset[str]:
        """Names of the columns of the data set that the methods read, beside images and labels."""
        return frozenset().union(*(method.columns for method in self.methods))

    def draw(self, rng: torch.Generator) -> Method:
        """Draws the method of a batch. The choice must be without schedules, see `at`."""
        if not self.mixup_enabled:
            return METHODS["vanilla"].replaced(loss=self.methods[0].loss.single())
        if self.rate < 1 and float(torch.rand((), generator=rng)) >= self.rate:
            return METHODS["vanilla"].replaced(loss=self.methods[0].loss.single())
        if len(self.methods) == 1:
            return self.methods[0]
        weights = torch.tensor(self.probabilities, dtype=torch.float64)
        return self.methods[int(torch.multinomial(weights, 1, generator=rng))]

    def to_dict(self) -> dict[str, Any]:
        """The choice as JSON-ready data for `from_dict`."""
        return {
            "methods": [method.to_dict() for method in self.methods],
            "mix_prob": list(map(as_json, self.probabilities)),
            "mix_rate": as_json(self.rate),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MethodChoice:
        """Inverse of `to_dict`. Raises ValueError for unknown names or fields."""
        methods = [Method.from_dict(method) for method in data["methods"]]
        return cls.build(methods, data["mix_prob"], mix_rate=data.get("mix_rate", 1.0))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `mixup_config.json` into an existing folder."""
        Path(folder, CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, repo_or_folder: str | Path, *, revision: str | None = None, token: str | None = None) -> MethodChoice:
        """The choice of a run, from the `mixup_config.json` of its folder or Hub repository. Raises ValueError if there is none."""
        return cls.from_dict(read_config(repo_or_folder, revision=revision, token=token))

    def __str__(self) -> str:
        return " + ".join(map(str, self.methods))


def _number(value: float | Schedule) -> float | Schedule:
    return value if isinstance(value, Schedule) else float(value)
