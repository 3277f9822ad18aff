"""What a method is: a sample policy, a label policy, a loss and a step under one name."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_mixup.core.checks import check_images, check_labels, check_object, check_rows, check_switch, nearest
from hf_mixup.core.hub import download
from hf_mixup.core.losses import CrossEntropy, Loss, smooth
from hf_mixup.core.plan import MixPlan, blend, check_moves_maps, mix_targets, move_maps, onehot
from hf_mixup.core.planes import plane_shape, planes
from hf_mixup.core.policy import COLUMNS, NOTHING, OF_THE_BATCH, AreaLabels, LabelPolicy, SamplePolicy, Signals
from hf_mixup.core.rng import fresh, keyed
from hf_mixup.steps.keepclean import KeepClean
from hf_mixup.steps.standard import Standard
from hf_mixup.steps.step import Parts, Step

CONFIG_NAME = "mixup_config.json"

# the parts of a method, and what each is a subclass of
KINDS: dict[str, type] = {"sample": SamplePolicy, "label": LabelPolicy, "loss": Loss, "step": Step}


def parts_of(kind: str) -> dict[str, type]:
    """All imported classes of one kind of part, by lower-case class name, yours included. If two share a name, ours wins; of two of yours,
    the last defined."""
    return {cls.__name__.lower(): cls for cls in sorted(_concrete(KINDS[kind]), key=_is_ours)}


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("hf_mixup.")


def _concrete(cls: type) -> Iterator[type]:
    for inner in cls.__subclasses__():
        if not inspect.isabstract(inner):
            yield inner
        yield from _concrete(inner)


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

    def __post_init__(self):
        if self.loss.regression and self.counting:
            raise ValueError(
                f"{self.name!r} weighs classes by how often they occur, got the loss {type(self.loss).__name__}, which has none; take 'cmixup', or a "
                "loss of classes."
            )

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        num_labels: int | None = None,
        generator: torch.Generator | None = None,
        columns: Mapping[str, Tensor] = NOTHING,
    ) -> tuple[Tensor, Tensor]:
        """Mixes `images` (B, C, H, W), or videos, spectrograms, waveforms in their own shapes, and `labels`: (B,) class numbers, (B, num_labels)
        soft, label maps (B, H, W), the class number of every pixel, or numbers (B,) or (B, k) with the loss `mse`.

        Returns the mixed images and float32 soft targets (B, num_labels), with the label smoothing of the method's loss, or the moved maps; r * B
        of both for a method with r rows of each image (`KeepClean`), whose clean images come last. Without a (CPU) `generator`, one number is drawn
        from torch's global stream. `columns` are what some label policies read beside images and labels, by name: `object_masks` (B, h, w) for
        `ObjectLabels`. Raises ValueError or TypeError for input that cannot be mixed.
        """
        check_model_free(self, "a plain call")
        check_images(images)
        maps = are_maps(labels)
        if maps:
            check_rows(labels, len(images))
            check_maps(self)
        else:
            check_without_maps(self)
            if not self.loss.regression:
                check_labels(labels, len(images), num_labels)
            labels = self._numbers(labels, len(images))
        plans = list(self._planned(images, labels, num_labels, generator, columns))
        mixed = torch.cat([blend(plan, images) for plan in plans]) if len(plans) > 1 else blend(plans[0], images)
        if maps:
            return mixed, torch.cat([move_maps(plan, labels) for plan in plans])
        targets = torch.cat([mix_targets(plan, labels, num_labels) for plan in plans])
        return mixed, smooth(targets, getattr(self.loss, "smoothing", 0.0))

    def plan(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
        num_labels: int | None = None,
        columns: Mapping[str, Tensor] = NOTHING,
    ) -> MixPlan:
        """What a call would do with `images` (B, C, H, W), without doing it: partners, masks and lam; of the first mixture, for a method
        that makes several of each image.

        A call with a generator in the same state mixes by the same plan. Take from it `plan.partners` (B, K - 1), `plan.lam` (B,),
        and `plan.dense_mask((H, W))` (B, K, H, W), the share of each image in each pixel; `blend(plan, images)` and
        `mix_targets(plan, labels, num_labels)`, or `move_maps(plan, maps)`, make the mixture. `labels` are needed by methods that look at them
        (ClassMix, C-Mixup, Remix), and for class numbers `num_labels` where those know the counts of classes; elsewhere they decide nothing.

        Raises ValueError or TypeError as a call does, for methods that need the model too.
        """
        check_model_free(self, "a plain call")
        check_images(images)
        if labels is not None:
            check_rows(labels, len(images))
            labels = labels if are_maps(labels) else self._numbers(labels, len(images))
        elif self.needs_targets:
            raise ValueError(f"the plan of {self.name!r} follows from labels too, got none; pass them.")
        if not are_maps(labels):
            check_without_maps(self)
        return next(self._planned(images, labels, num_labels, generator, columns)).to(images.device)

    def _numbers(self, labels: Tensor, batch: int) -> Tensor:
        """Labels of a regression as (B, k) float32, others as they are."""
        if not self.loss.regression:
            return labels
        outputs = labels.shape[1] if isinstance(labels, Tensor) and labels.ndim == 2 else 1
        self.loss.check(labels, batch, outputs)
        return self.loss.targets(labels, outputs)

    def _planned(
        self,
        images: Tensor,
        labels: Tensor | None,
        num_labels: int | None,
        generator: torch.Generator | None,
        columns: Mapping[str, Tensor],
    ) -> Iterator[MixPlan]:
        """The plans of the rows of every image, in turn."""
        rng = fresh() if generator is None else generator
        columns = self.taken(columns, len(images), images.device)
        for mixture in self.step.rows:
            signals = Signals(images.device, images=planes(images), **columns)
            if are_maps(labels):
                signals["maps"] = labels
            elif self.needs_targets:
                signals["targets"] = onehot(labels, -1 if num_labels is None else num_labels).to(images.device)
            yield self.of_the_batch(plane_shape(images.shape), rng, signals) if mixture else MixPlan.identity(len(images))

    def of_the_batch(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        """The plan of a mixture, with the label policy's weights, by what the batch itself holds. `shape` is (B, C, H, W)."""
        plan = self.sample.plan(shape, rng, signals).to(signals.device)
        return plan.reweighted(self.label.weights(plan, signals))

    @property
    def columns(self) -> frozenset[str]:
        """Names of the columns of the data set that its policies read beside images and labels."""
        return COLUMNS & (self.sample.needs | self.label.needs)

    def taken(self, columns: Mapping[str, Any], batch: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Of the columns of a batch those that the policies read, (B, h, w) each, on the device. Raises ValueError where one is missing."""
        found = {}
        for name in sorted(self.columns):
            maps = columns.get(name)
            maps = maps.squeeze(1) if isinstance(maps, Tensor) and maps.ndim == 4 and maps.shape[1] == 1 else maps
            if not isinstance(maps, Tensor) or maps.ndim != 3 or len(maps) != batch:
                seen = f"shape {tuple(maps.shape)}" if isinstance(maps, Tensor) else f"columns {sorted(columns)}"
                raise ValueError(
                    f"{self.name!r} reads a column {name!r} of shape ({batch}, h, w), one map of numbers for each image, got {seen}; add it to the data "
                    "set, and set remove_unused_columns=False if the Trainer dropped it."
                )
            found[name] = maps.to(device, non_blocking=True)
        return found

    @property
    def needs_targets(self) -> bool:
        """Whether the plan follows from labels."""
        return "targets" in self.sample.needs | self.label.needs

    @property
    def counting(self) -> list[str]:
        """Kinds of its parts that take `class_counts`."""
        return [kind for kind in KINDS if "class_counts" in fields_of(getattr(self, kind))]

    def with_class_counts(self, counts: tuple[int, ...]) -> Method:
        """The same method, told how many training images each class has, where it asks and was not told."""
        asking = [kind for kind in self.counting if getattr(self, kind).class_counts is None]
        return dataclasses.replace(self, **{kind: dataclasses.replace(getattr(self, kind), class_counts=counts) for kind in asking})

    def replaced(self, **fields: Any) -> Method:
        """The same method with other hyper-parameters.

        A name is looked up in the sample policy, the label policy, the loss and the step, in that order; a whole part is
        replaced by `{"name": ..., <fields>}`, and `{<fields>}` changes fields of the part that is there.
        """
        parts = {part: getattr(self, part) for part in KINDS}
        own: dict[str, dict[str, Any]] = {}
        # whole parts first: a flat field may belong to the new part
        for key in sorted(fields, key=lambda key: key not in KINDS):
            value = fields[key]
            if key in KINDS:
                parts[key] = value if isinstance(value, KINDS[key]) else _part(key, value, parts[key])
                continue
            owner = next((part for part in KINDS if key in fields_of(parts[part])), None)
            if owner is None:
                known = sorted(set().union(*map(fields_of, parts.values())) | set(KINDS))
                raise ValueError(f"{self.name!r} must be given its own hyper-parameters, got {key!r}; {nearest(key, known)}")
            own.setdefault(owner, {})[key] = value
        # all fields of a part at once: it may check them together
        parts |= {part: _with(parts[part], values) for part, values in own.items()}
        return dataclasses.replace(self, **parts)

    @property
    def parts(self) -> Parts:
        """What the step is given."""
        return Parts(self.name, self.sample, self.label, self.loss)

    def to_dict(self) -> dict[str, Any]:
        """As data: JSON-ready, and all that `from_dict` needs. Raises ValueError for parts of your own with a name of ours."""
        return {"name": self.name, "paper": self.paper, **{kind: _described(kind, getattr(self, kind)) for kind in KINDS}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Method:
        """Inverse of `to_dict`, for methods and parts of your own too: it knows every class that is imported. Raises ValueError for
        unknown names or fields."""
        parts = dict(data)
        name, paper = parts.pop("name"), parts.pop("paper", "")
        for key in parts:
            if key not in KINDS:
                raise ValueError(f"a method must be made of {', '.join(KINDS)}, got {key!r}; {nearest(key, KINDS)}")
        if "sample" not in parts:
            raise ValueError(f"a method must have a sample policy, got {sorted(parts)}; add 'sample'.")
        defaults = {"sample": None, "label": AreaLabels(), "loss": CrossEntropy(), "step": Standard()}
        return cls(name, paper=paper, **{kind: _part(kind, value, defaults[kind]) for kind, value in parts.items()})

    @classmethod
    def from_pretrained(cls, repo_or_folder: str | Path, *, revision: str | None = None, token: str | None = None) -> Method:
        """The method that a checkpoint was trained with, from a folder or the Hub. Where it was several, take them from
        `MethodChoice.from_pretrained`. Raises ValueError then."""
        described = read_config(repo_or_folder, revision=revision, token=token)["methods"]
        if len(described) > 1:
            names = " + ".join(method["name"] for method in described)
            raise ValueError(
                f"{repo_or_folder!s} was expected to hold one method, got {names}; use MethodChoice.from_pretrained for several."
            )
        return cls.from_dict(described[0])

    def __str__(self) -> str:
        return self.name


def fields_of(part: Any) -> set[str]:
    """Names of the hyper-parameters of a part."""
    return {f.name for f in dataclasses.fields(part)}


def _with(part: Any, values: Mapping[str, Any]) -> Any:
    """A part with other values of its fields, of which it checks all but the switches itself."""
    check_switch(**{f.name: values[f.name] for f in dataclasses.fields(part) if f.name in values and isinstance(f.default, bool)})
    return dataclasses.replace(part, **values)


def _part(kind: str, value: Any, current: Any) -> Any:
    """A part from data: a name, `{"name": ..., fields}`, or only fields of the part that is there."""
    if not isinstance(value, str):
        check_object(kind, value, f'a name, or as {{"name": "{type(current).__name__.lower()}"}}')
    value = {"name": value} if isinstance(value, str) else dict(value)
    name = value.pop("name", type(current).__name__.lower())
    known = parts_of(kind)
    if name not in known:
        raise ValueError(
            f"{kind} must be a known name, got {name!r}; {nearest(name, known)} If it is your own, import the file that defines it first."
        )
    cls = known[name]
    # an own class may have fields without a default, which the data then has to hold
    base = current if type(current) is cls else cls(**{f.name: _read(value.pop(f.name)) for f in _required(cls) if f.name in value})
    for key in value:
        if key not in fields_of(base):
            raise ValueError(f"{kind} {name!r} must be given its own hyper-parameters, got {key!r}; {nearest(key, fields_of(base))}")
    return _with(base, {k: _read(v) for k, v in value.items()})


def _read(value: Any) -> Any:
    """JSON has lists where the policies have tuples."""
    return tuple(value) if isinstance(value, list) else value


def _required(cls: type) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]


def _described(kind: str, part: Any) -> dict[str, Any]:
    name = type(part).__name__.lower()
    known = parts_of(kind)[name]
    if _is_ours(known) and known is not type(part):
        raise ValueError(
            f"a {kind} of your own must have a name of its own, got {type(part).__name__!r}, which hf_mixup has too; rename the class."
        )
    return {"name": name, **dataclasses.asdict(part)}


def read_config(repo_or_folder: str | Path, *, revision: str | None = None, token: str | None = None) -> dict[str, Any]:
    """The `mixup_config.json` of a folder or a Hub repository that a run left. Raises ValueError where there is none."""
    path = Path(repo_or_folder)
    if path.is_dir():
        path = path / CONFIG_NAME
        if not path.is_file():
            raise ValueError(f"{repo_or_folder} was expected to hold {CONFIG_NAME}, got none; give the folder of a run of ours.")
    else:
        path = download(str(repo_or_folder), CONFIG_NAME, revision=revision, token=token)
    return json.loads(path.read_text())


def needs_of_model(method: Method) -> list[str]:
    """What the method needs a model for; empty for one that mixes by images alone."""
    wanted = sorted((method.sample.needs | method.label.needs) - OF_THE_BATCH)
    if wanted or method.step.rows is not None:
        return wanted
    return ["a weight or a pass of its own for clean images" if isinstance(method.step, KeepClean) else "a training step of its own"]


def are_maps(labels: Tensor | None) -> bool:
    """Whether labels are maps, the class number of every pixel (B, H, W)."""
    return isinstance(labels, Tensor) and labels.ndim > 2 and not labels.is_floating_point()


@functools.lru_cache(maxsize=64)
def check_maps(method: Method) -> None:
    """Refuses a method that cannot mix label maps, by a plan of its own."""
    if method.needs_targets:
        raise ValueError(f"{method.name!r} looks at labels of whole images, got label maps (B, H, W); take another method, such as cutmix.")
    images = torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32)
    maps = torch.arange(32).expand(4, 32, 32)
    check_moves_maps(method.sample.plan(images.shape, keyed(0), Signals(images=images, maps=maps)), repr(method.name))


def check_without_maps(method: Method) -> None:
    """Refuses a method that looks at label maps, where there are none."""
    if "maps" in method.sample.needs:
        raise ValueError(f"{method.name} mixes by label maps, (B, H, W), got labels of whole images; take another method, such as cutmix.")


def check_views(method: Method) -> None:
    """Refuses a loss that compares views of every image, where the step makes others."""
    wanted, made = method.loss.views, method.step.rows
    if wanted > 1 and (made is None or len(made) != wanted):
        raise ValueError(
            f"{type(method.loss).__name__} compares {wanted} views of every image in one pass, got {method.name!r} with the step {method.step}; "
            f"set step=KeepClean(mixtures={wanted - 1})."
        )


def check_model_free(method: Method, where: str) -> None:
    """Refuses a method that needs the model, where there is none."""
    wanted = needs_of_model(method)
    if wanted:
        raise ValueError(
            f"{where} takes methods that mix by images alone, got {method.name!r}, which needs {' and '.join(wanted)}, so the model; "
            "use MixupTrainer."
        )
