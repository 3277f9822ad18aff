"""What a training step is."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from hf_mixup.core.losses import Loss
from hf_mixup.core.plan import MixPlan
from hf_mixup.core.planes import frames_of, plane_shape, planes
from hf_mixup.core.policy import LabelPolicy, SamplePolicy, Signals
from hf_mixup.core.rng import MixKey
from hf_mixup.networks.passes import watching
from hf_mixup.networks.signals import SIGNALS
from hf_mixup.networks.signals.signal import EarlySignal, LateSignal
from hf_mixup.networks.teachers import Teacher


class Parts(NamedTuple):
    """The parts of a method that a step gets."""

    name: str
    sample: SamplePolicy
    label: LabelPolicy
    loss: Loss

    def plan(self, images: Tensor, rng: torch.Generator, signals: Signals) -> MixPlan:
        """The plan for `images` (B, C, H, W), or another input that has planes, on their device."""
        return self.sample.plan(plane_shape(images.shape), rng, signals).to(images.device)


class StepOutput(NamedTuple):
    """The result of a training step.

    Attributes:
        loss: scalar, float32: the mean of `losses`, plus the step's additional losses.
        losses: (B,) float32, one for each mixture. A step with r rows of each image (`KeepClean`) has r * B here and below.
        logits: (B, num_labels) of the mixed images.
        targets: (B, num_labels) float32, the mixed targets.
        lam: (B,) float32, the own image's share of the label.
        plan: the plan of the first B rows, if there is one plan for them.
        memory: tensors that the state will remember, by name; see `MethodState.remember`.
    """

    loss: Tensor
    losses: Tensor
    logits: Tensor
    targets: Tensor
    lam: Tensor
    plan: MixPlan | None = None
    memory: dict[str, Tensor] | None = None


class MethodState(nn.Module):
    """What a method keeps beside the network: teachers, mixers, heads, buffers. It is saved, moved and trained with the model.

    It also collects the signals that the method's policies need, from the network or from their frozen teachers. A signal that both
    policies need is computed once, unless the label policy has other settings for it, such as its own teacher.
    """

    def __init__(self):
        super().__init__()
        self.teachers = nn.ModuleDict()
        self.early: dict[tuple[str, str], EarlySignal] = {}
        self.late: dict[str, LateSignal] = {}
        # while a step runs: columns of the batch that the policies read, and the network's other inputs, by name
        self.columns: Mapping[str, Tensor] = {}
        self.others: Mapping[str, Tensor] = {}
        # receives the images of every mixed pass while it is a list
        self.passed: list[Tensor] | None = None

    @classmethod
    def for_parts(cls, parts: Parts, network: nn.Module, *args: Any) -> Self:
        """The state for a method. Raises ValueError if the network, or a teacher, cannot give the signals that the policies need."""
        state = cls(*args)
        for part, policy in (("sample", parts.sample), ("label", parts.label)):
            source = network
            if policy.teacher is not None:
                state.teachers[part] = Teacher(policy.teacher)
                source = state.teachers[part].network
            for name, kind in SIGNALS.items():
                if name not in policy.needs or name in state.late:
                    continue
                if ("sample", name) in state.early and not _differs(policy, parts.sample):
                    continue
                signal = kind(source, policy)
                if policy.teacher is not None and signal.of_classes:
                    state.teachers[part].match(network)
                if isinstance(signal, EarlySignal):
                    state.early[part, name] = signal
                else:
                    state.late[name] = signal
        return state

    def before(self, images: Tensor, targets: Tensor) -> Signals:
        """The signals of the clean images."""
        signals = Signals(images.device, images=planes(images), targets=targets, **self.columns)
        signals.others, signals.frames = self.others, frames_of(images.shape)
        for (part, name), signal in self.early.items():
            seen, wanted = images, targets
            if part in self.teachers:
                seen, wanted = self.teachers[part].view(images), self.teachers[part].targets(targets)
            into = signals if part == "sample" else signals.for_label
            into[name] = signal.take(seen, wanted, signals)
        return signals

    @contextmanager
    def watching(self, signals: Signals, images: Tensor) -> Iterator[None]:
        """Context manager for the pass of the mixed images. At its end the signals of that pass are added to `signals`."""
        if self.passed is not None:
            self.passed.append(images)
        taps = {name: signal.taps(tuple(planes(images).shape[2:])) for name, signal in self.late.items()}
        with watching([tap for some in taps.values() for tap in some]) as seen:
            yield
        values = iter(seen)
        for name, signal in self.late.items():
            signals[name] = signal.value([next(values) for _ in taps[name]])

    def remember(self, **rows: Tensor) -> None:
        """Keeps tensors for later steps. Called once a step, after all its repeats."""

    @property
    def changed(self) -> list[nn.Module]:
        """Modules of the network in training whose output changes in a pass."""
        return []

    @property
    def watched(self) -> list[nn.Module]:
        """Modules of the network in training that are watched or changed in a pass."""
        signals = [signal for (part, _), signal in self.early.items() if part not in self.teachers]
        return [*self.changed, *(module for signal in (*signals, *self.late.values()) for module in signal.modules)]


def _differs(label: LabelPolicy, sample: SamplePolicy) -> bool:
    """Whether the label policy has its own settings for its signals, different from those of the sample policy."""
    ways = {"teacher", "teacher_size", "scores", "clean_lam"} & {field.name for field in dataclasses.fields(label)}
    return any(getattr(label, way) != getattr(sample, way) for way in ways)


class Step(ABC):
    """From a clean batch to a loss. Subclasses are frozen dataclasses; what they learn or remember is in their state.
    They raise ValueError at construction, for fields out of their range.

    Attributes:
        takes_tokens: whether it mixes inside a network for texts, whose input are token ids.
        views: number of views of each image that a step gets: 1 with labels, 2 in pre-training, where images are (B, 2, C, H, W).
        takes_others: whether `run` passes the network's other inputs, `others` of the signals, on to it, mixed by `mix_others`.
    """

    views: ClassVar[int] = 1
    takes_others: ClassVar[bool] = False
    takes_tokens: ClassVar[bool] = False

    @property
    def rows(self) -> tuple[bool, ...] | None:
        """The rows of each image in a batch, if the batch can be made from images only: True for a mixture, False for the clean image.
        None for a step that needs the model."""
        return None

    def build(self, parts: Parts, network: nn.Module) -> MethodState:
        """The state of the method. Raises ValueError if the network does not fit."""
        return MethodState.for_parts(parts, network)

    @abstractmethod
    def run(self, parts: Parts, state: MethodState, network: nn.Module, images: Tensor, targets: Tensor, key: MixKey) -> StepOutput:
        """One step.

        Args:
            parts: the policies and the loss of the method.
            state: the result of `build` for this network.
            network: the image classifier in training.
            images: (B, C, H, W), or another main input of the network in its own shape, such as spectrograms or videos.
            targets: (B, num_labels) float32, one-hot or soft.
            key: the place of the batch in the run; all random draws depend on it.
        """

    def deployed(self, state: MethodState, network: nn.Module) -> nn.Module:
        """The network that is evaluated and saved: a Hugging Face image classifier."""
        return network

    def after_optimizer_step(  # noqa: B027, most steps have nothing to do
        self, state: MethodState, network: nn.Module, step: int, total_steps: int
    ) -> None:
        """Updates what follows the weights, such as an EMA teacher. `step` optimizer steps were done before this one."""
