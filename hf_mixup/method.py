"""A method: a sample policy, a label policy, a loss and a step under one name."""

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

from hf_mixup.core.checks import check_images, check_labels, check_rows, check_switch, nearest
from hf_mixup.core.hub import download
from hf_mixup.core.losses import CrossEntropy, Loss
from hf_mixup.core.plan import MixPlan, blend, check_moves_maps, mix_targets, move_maps, onehot
from hf_mixup.core.planes import frames_of, plane_shape, planes
from hf_mixup.core.policy import COLUMNS, NOTHING, OF_THE_BATCH, AreaLabels, LabelPolicy, SamplePolicy, Signals
from hf_mixup.core.rng import fresh, keyed
from hf_mixup.steps.keepclean import KeepClean
from hf_mixup.steps.standard import Standard
from hf_mixup.steps.step import Parts, Step

CONFIG_NAME = "mixup_config.json"

# the parts of a method, and their base classes
KINDS: dict[str, type] = {"sample": SamplePolicy, "label": LabelPolicy, "loss": Loss, "step": Step}


def parts_of(kind: str) -> dict[str, type]:
    """All imported classes of one kind of part, by lower-case class name, including yours. If a class of yours has the name of one of ours, ours
    is used; of two of yours, the one defined last."""
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
    """A mixing method: how images are mixed, how labels are weighted, which loss, which training step.

    A call mixes one batch, in any loop and on any device, with methods that need no model. It replaces `timm.data.Mixup` and torchvision's
    `v2.MixUp` and `v2.CutMix`.

    Attributes:
        name: its key in `METHODS`.
        sample, label, loss, step: its parts, see `SamplePolicy`, `LabelPolicy`, `Loss` and `Step`.
        paper: arXiv number.

    Raises:
        ValueError: for a loss without classes if a part needs the number of images of each class, and for a loss of one class for each image if
            the sample policy unites labels.
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
                f"{self.name!r} weighs classes by how often they occur, got the loss {type(self.loss).__name__}, which has no classes; use 'cmixup', or a "
                "loss of classes."
            )
        if self.sample.united and not self.loss.multi_label:
            raise ValueError(
                f"{self.name!r} unites the labels of several images, got the loss {type(self.loss).__name__}, which takes shares that sum to 1; use 'bce'."
            )

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        num_labels: int | None = None,
        generator: torch.Generator | None = None,
        columns: Mapping[str, Tensor] = NOTHING,
    ) -> tuple[Tensor, Tensor]:
        """Mixes one batch.

        Args:
            images: (B, C, H, W), or videos, spectrograms, waveforms in their own shapes.
            labels: class numbers (B,), soft labels (B, num_labels), label maps (B, H, W) with the class number of every pixel, or numbers (B,)
                or (B, k) with the loss `mse`.
            num_labels: number of classes, needed for class numbers.
            generator: on the CPU; without it, one number is drawn from torch's global stream.
            columns: further columns that some label policies read, by name: `object_masks` (B, h, w) for `ObjectLabels`.

        Returns:
            The mixed images, and float32 soft targets (B, num_labels) with the loss's label smoothing, or the moved maps. A method with r rows of
            each image (`KeepClean`) gives r * B rows of both; its clean images come last.

        Raises:
            ValueError, TypeError: for input that cannot be mixed.
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
        return mixed, self.loss.smoothed(targets)

    def plan(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
        num_labels: int | None = None,
        columns: Mapping[str, Tensor] = NOTHING,
    ) -> MixPlan:
        """What a call would do with `images` (B, C, H, W), without doing it: partners, masks and lam. If the method makes several mixtures of each
        image, it is the plan of the first.

        A call with a generator in the same state mixes by the same plan. The plan has `plan.partners` (B, K - 1), `plan.lam` (B,), and
        `plan.dense_mask((H, W))` (B, K, H, W), the share of each image in each pixel. `blend(plan, images)` and
        `mix_targets(plan, labels, num_labels)`, or `move_maps(plan, maps)`, make the mixture.

        `labels` are needed by methods that look at them (ClassMix, C-Mixup, Remix). Class numbers need `num_labels` if the method counts classes.
        For other methods labels change nothing.

        Raises ValueError or TypeError as a call does, also for methods that need the model.
        """
        check_model_free(self, "a plain call")
        check_images(images)
        if labels is not None:
            check_rows(labels, len(images))
            if not are_maps(labels):
                if self.needs_targets and not self.loss.regression:
                    seen = labels.ndim == 1 and len(labels) and not labels.is_floating_point()
                    check_labels(labels, len(images), max(int(labels.max()) + 1, 2) if num_labels is None and seen else num_labels)
                labels = self._numbers(labels, len(images))
        elif self.needs_targets:
            raise ValueError(f"the plan of {self.name!r} depends on labels too, got none; pass them.")
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
        """The plans of each image's rows, one after the other."""
        rng = fresh() if generator is None else generator
        columns = self.taken(columns, len(images), images.device)
        for mixture in self.step.rows:
            signals = Signals(images.device, images=planes(images), **columns)
            signals.frames = frames_of(images.shape)
            if are_maps(labels):
                signals["maps"] = labels
            elif self.needs_targets:
                signals["targets"] = onehot(labels, -1 if num_labels is None else num_labels).to(images.device)
            yield self.of_the_batch(plane_shape(images.shape), rng, signals) if mixture else MixPlan.identity(len(images))

    def of_the_batch(self, shape: torch.Size, rng: torch.Generator, signals: Signals) -> MixPlan:
        """The plan of a mixture with the label policy's weights, from signals of the batch alone. `shape` is (B, C, H, W)."""
        plan = self.sample.plan(shape, rng, signals).to(signals.device)
        return plan.reweighted(self.label.weights(plan, signals))

    @property
    def columns(self) -> frozenset[str]:
        """Names of the columns of the data set that its policies read, beside images and labels."""
        return COLUMNS & (self.sample.needs | self.label.needs)

    def taken(self, columns: Mapping[str, Any], batch: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The columns of a batch that the policies read, (B, h, w) each, on the device. Raises ValueError if one is missing."""
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
        """Whether the plan depends on labels."""
        return "targets" in self.sample.needs | self.label.needs

    @property
    def counting(self) -> list[str]:
        """Kinds of its parts that have `class_counts`."""
        return [kind for kind in KINDS if "class_counts" in fields_of(getattr(self, kind))]

    def with_class_counts(self, counts: tuple[int, ...]) -> Method:
        """The same method with the number of training images of each class, if it needs them and they are not set."""
        asking = [kind for kind in self.counting if getattr(self, kind).class_counts is None]
        return dataclasses.replace(self, **{kind: dataclasses.replace(getattr(self, kind), class_counts=counts) for kind in asking})

    def replaced(self, **fields: Any) -> Method:
        """The same method with other hyper-parameters.

        A name is looked up in the sample policy, the label policy, the loss and the step, in that order. `{"name": ..., <fields>}` replaces a whole
        part, and `{<fields>}` changes fields of the current part. Raises ValueError for unknown names.
        """
        parts = {part: getattr(self, part) for part in KINDS}
        own: dict[str, dict[str, Any]] = {}
        # whole parts first, because a single field may belong to the new part
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
        # sets all fields of a part at once, because it may check them together
        parts |= {part: _with(parts[part], values) for part, values in own.items()}
        return dataclasses.replace(self, **parts)

    @property
    def parts(self) -> Parts:
        """What the step is given."""
        return Parts(self.name, self.sample, self.label, self.loss)

    def to_dict(self) -> dict[str, Any]:
        """The method as JSON-ready data for `from_dict`. Raises ValueError if a part of yours has the name of one of ours."""
        return {"name": self.name, "paper": self.paper, **{kind: _described(kind, getattr(self, kind)) for kind in KINDS}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Method:
        """Inverse of `to_dict`. It finds every imported class, so it works for your own methods and parts. Raises ValueError for
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
        """The method of a checkpoint, from a folder or the Hub. Raises ValueError if the checkpoint has several methods; use
        `MethodChoice.from_pretrained` for those."""
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
    """A part with other values of its fields. Switches are checked here; the part checks the rest."""
    check_switch(**{f.name: values[f.name] for f in dataclasses.fields(part) if f.name in values and isinstance(f.default, bool)})
    return dataclasses.replace(part, **values)


def _part(kind: str, value: Any, current: Any) -> Any:
    """A part from data: a name, `{"name": ..., fields}`, or only fields of the current part."""
    if not isinstance(value, (str, Mapping)):
        raise ValueError(
            f"{kind} must be a name, a dictionary or a {KINDS[kind].__name__}, got {value!r}; give one of these, such as an instance instead of a class."
        )
    value = {"name": value} if isinstance(value, str) else dict(value)
    name = value.pop("name", type(current).__name__.lower())
    known = parts_of(kind)
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"{kind} must be a known name, got {name!r}; {nearest(name, known)} If it is your own, import the file that defines it first."
        )
    cls = known[name]
    # a user's class may have fields without a default; then the data must hold them
    base = current if type(current) is cls else cls(**{f.name: _read(value.pop(f.name)) for f in _required(cls) if f.name in value})
    for key in value:
        if key not in fields_of(base):
            raise ValueError(f"{kind} {name!r} must be given its own hyper-parameters, got {key!r}; {nearest(key, fields_of(base))}")
    return _with(base, {k: _read(v) for k, v in value.items()})


def _read(value: Any) -> Any:
    """Converts JSON's lists to tuples, as the policies have them."""
    return tuple(value) if isinstance(value, list) else value


def _required(cls: type) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]


def _described(kind: str, part: Any) -> dict[str, Any]:
    name = type(part).__name__.lower()
    known = parts_of(kind)[name]
    if _is_ours(known) and known is not type(part):
        raise ValueError(
            f"a {kind} of your own must have a new name, got {type(part).__name__!r}, which hf_mixup has too; rename the class."
        )
    return {"name": name, **dataclasses.asdict(part)}


def read_config(repo_or_folder: str | Path, *, revision: str | None = None, token: str | None = None) -> dict[str, Any]:
    """The `mixup_config.json` of a run, from a folder or the Hub. Raises ValueError if there is none."""
    path = Path(repo_or_folder)
    if path.is_dir():
        path = path / CONFIG_NAME
        if not path.is_file():
            raise ValueError(f"{repo_or_folder} was expected to hold {CONFIG_NAME}, got none; give the folder of a run of hf_mixup.")
    else:
        path = download(str(repo_or_folder), CONFIG_NAME, revision=revision, token=token)
    return json.loads(path.read_text())


def needs_of_model(method: Method) -> list[str]:
    """The reasons why the method needs a model; empty if it needs images only."""
    wanted = sorted((method.sample.needs | method.label.needs) - OF_THE_BATCH)
    if wanted or method.step.rows is not None:
        return wanted
    return [
        "a weight, a pass or a mixture of its own for clean images" if isinstance(method.step, KeepClean) else "a training step of its own"
    ]


def are_maps(labels: Tensor | None) -> bool:
    """Whether labels are maps (B, H, W), with the class number of every pixel."""
    return isinstance(labels, Tensor) and labels.ndim > 2 and not labels.is_floating_point()


@functools.lru_cache(maxsize=64)
def check_maps(method: Method) -> None:
    """Raises ValueError for a method that cannot mix label maps; it tests one of the method's plans."""
    if method.needs_targets:
        raise ValueError(f"{method.name!r} looks at labels of whole images, got label maps (B, H, W); use another method, such as cutmix.")
    images = torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32)
    maps = torch.arange(32).expand(4, 32, 32)
    check_moves_maps(method.sample.plan(images.shape, keyed(0), Signals(images=images, maps=maps)), repr(method.name))


def check_without_maps(method: Method) -> None:
    """Raises ValueError for a method of label maps, if labels are not maps."""
    if "maps" in method.sample.needs:
        raise ValueError(f"{method.name} mixes by label maps, (B, H, W), got labels of whole images; use another method, such as cutmix.")


def check_without_frames(method: Method) -> None:
    """Refuses a method that mixes videos alone, for a network of other inputs."""
    if "frames" in method.sample.needs:
        raise ValueError(f"{method.name} mixes videos, got a network of other inputs; use another method, such as cutmix.")


def check_views(method: Method) -> None:
    """Raises ValueError if the loss compares another number of views than the step makes."""
    wanted, made = method.loss.views, method.step.rows
    if wanted > 1 and (made is None or len(made) != wanted):
        raise ValueError(
            f"{type(method.loss).__name__} compares {wanted} views of every image in one pass, got {method.name!r} with the step {method.step}; "
            f"set step=KeepClean(mixtures={wanted - 1})."
        )


def check_model_free(method: Method, where: str) -> None:
    """Raises ValueError for a method that needs the model. `where` is the name of the place without a model, for the error."""
    wanted = needs_of_model(method)
    if wanted:
        raise ValueError(
            f"{where} takes methods that mix by images only, got {method.name!r}, which needs {' and '.join(wanted)}, so the model; "
            "use MixupTrainer."
        )
