"""Numbers that change over the epochs of a run, as values in JSON."""

from __future__ import annotations

import bisect
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from hf_mixup.core.checks import check_between, check_known, from_json


class Schedule(ABC):
    """A share between 0 and 1 that depends on the epoch only, so a resumed run has the same value."""

    @abstractmethod
    def at(self, epoch: int, epochs: int) -> float:
        """The value in an epoch, counted from 0, of a run of `epochs`."""

    @abstractmethod
    def extremes(self) -> tuple[float, float]:
        """The least and the greatest value."""

    @abstractmethod
    def to_json(self) -> Any:
        """The form that `schedule_of` reads."""


@dataclass(frozen=True)
class Points(Schedule):
    """A line through points (epoch, value): `[[0, 1], [60, 1], [100, 0]]`. It is constant before the first point and after the last. Two points
    with one epoch make a jump; that epoch has the second value."""

    points: tuple[tuple[float, float], ...]

    def __post_init__(self):
        listed = isinstance(self.points, (tuple, list)) and self.points
        pairs = [point for point in self.points if isinstance(point, (tuple, list)) and len(point) == 2] if listed else []
        if not pairs or len(pairs) != len(self.points):
            raise ValueError(
                f"a schedule must be a list of points [epoch, value], got {self.points!r}; give one such as [[0, 1], [60, 0]]."
            )
        for epoch, value in pairs:
            check_between(0, 1e9, epoch=epoch)
            check_between(0, 1, value=value)
        if [epoch for epoch, _ in pairs] != sorted(epoch for epoch, _ in pairs):
            raise ValueError(f"the epochs of a schedule must increase, got {[epoch for epoch, _ in pairs]}; sort the points.")
        object.__setattr__(self, "points", tuple((float(epoch), float(value)) for epoch, value in pairs))

    def at(self, epoch: int, epochs: int) -> float:
        after = bisect.bisect_right([known for known, _ in self.points], epoch)
        if after == 0:
            return self.points[0][1]
        start, value = self.points[after - 1]
        if after == len(self.points):
            return value
        end, goal = self.points[after]
        return value + (goal - value) * (epoch - start) / (end - start)

    def extremes(self) -> tuple[float, float]:
        values = [value for _, value in self.points]
        return min(values), max(values)

    def to_json(self) -> list[list[float]]:
        return [list(point) for point in self.points]


@dataclass(frozen=True)
class WithoutHesitation(Schedule):
    """The share of mixed batches of Mixup Without Hesitation (Yu et al., ICIG 2021, arXiv:2101.04342; github.com/yuhao318/mwh):
    `{"name": "withouthesitation"}`.

    The run has three parts. First every batch is mixed. Then every second epoch is mixed. Then the share falls from 1 to 0 in equal steps,
    `(epochs - epoch) / (epochs - end)`. As in the authors' code, epochs count from 0 and the even ones are mixed; Mixup has alpha 0.5 there.

    Args:
        always: share of the run at which the first part ends, 0 to 1.
        turns: share of the run at which the second part ends, from `always` to 1.
    """

    always: float = 0.6
    turns: float = 0.9

    def __post_init__(self):
        check_between(0, 1, always=self.always)
        check_between(self.always, 1, turns=self.turns)

    def at(self, epoch: int, epochs: int) -> float:
        if not 0 < epochs < sys.maxsize:
            raise ValueError(
                "withouthesitation needs to know the epochs of the run, got a run whose length is given in steps only; set num_train_epochs."
            )
        first, second = round(self.always * epochs), round(self.turns * epochs)
        if epoch < first:
            return 1.0
        if epoch < second:
            return float(epoch % 2 == 0)
        return max(epochs - epoch, 0) / (epochs - second) if epochs > second else 0.0

    def extremes(self) -> tuple[float, float]:
        return 0.0, 1.0

    def to_json(self) -> dict[str, Any]:
        return {"name": "withouthesitation", **asdict(self)}


def schedule_of(name: str, value: Any) -> float | Schedule:
    """Reads a number from 0 to 1, or a schedule: a list of points, a dictionary, or either as JSON text. Raises ValueError for anything else."""
    if isinstance(value, str):
        value = from_json(name, value, "a number or a schedule as JSON, such as [[0, 1], [60, 0]]")
    if isinstance(value, Schedule):
        return value
    if isinstance(value, dict):
        check_known(f"the schedule of {name}", value.get("name"), ["withouthesitation"])
        unknown = sorted(set(value) - {"name", "always", "turns"})
        if unknown:
            raise ValueError(f"withouthesitation takes always and turns, got {unknown[0]!r}; check the spelling.")
        return WithoutHesitation(**{key: part for key, part in value.items() if key != "name"})
    if isinstance(value, (list, tuple)):
        return Points(tuple(value))
    check_between(0, 1, **{name: value})
    return float(value)


def value_at(value: float | Schedule, epoch: int, epochs: int) -> float:
    if not isinstance(value, Schedule):
        return value
    if epoch < 0:
        raise ValueError(
            "a schedule needs the epoch, got none; train with MixupTrainer or MixupCallback, call set_epoch of the collator, or set epoch and "
            "epochs of the MixKey."
        )
    return value.at(epoch, epochs)


def extremes_of(value: float | Schedule) -> tuple[float, float]:
    return value.extremes() if isinstance(value, Schedule) else (value, value)


def as_json(value: float | Schedule) -> Any:
    return value.to_json() if isinstance(value, Schedule) else value


def corners(values: Iterable[float | Schedule]) -> list[int]:
    """The epochs where some line bends. Sums of the values are linear between them, so it is enough to check sums there."""
    epochs = {int(epoch) + near for value in values if isinstance(value, Points) for epoch, _ in value.points for near in (-1, 0, 1)}
    return sorted({0, *(epoch for epoch in epochs if epoch >= 0)})
