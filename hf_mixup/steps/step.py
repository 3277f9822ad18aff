"""What a training step is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from torch import Tensor, nn

from hf_mixup.core.plan import MixPlan
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import MixKey
from hf_mixup.networks.signals import SIGNALS
from hf_mixup.networks.signals.signal import EarlySignal, LateSignal, load_teacher

if TYPE_CHECKING:
    from hf_mixup.methods import Method


class StepOutput(NamedTuple):
    """One training step of a batch.

    Attributes:
        loss: scalar, float32: the mean of `losses`, and what the step adds to it.
        losses: (B,) float32, of every mixture by itself.
        logits: (B, num_labels), of the mixed images.
        targets: (B, num_labels) float32, the mixed targets.
        lam: (B,) float32, the labels' share of the own image.
        plan: what was mixed with what, where one plan says it.
    """

    loss: Tensor
    losses: Tensor
    logits: Tensor
    targets: Tensor
    lam: Tensor
    plan: MixPlan | None = None


class MethodState(nn.Module):
    """What a method keeps beside the backbone: networks, buffers, hooks. Saved, moved and trained with the model.

    It also takes the signals that the method's policies need, from the backbone or from their frozen teachers.
    """

    def __init__(self):
        super().__init__()
        self.teachers = nn.ModuleDict()
        self.early: dict[str, EarlySignal] = {}
        self.late: dict[str, LateSignal] = {}

    @classmethod
    def for_method(cls, method: Method, backbone: nn.Module, *args: Any) -> Self:
        """Raises ValueError when the backbone, or a teacher, cannot give what the policies need."""
        state = cls(*args)
        for part, policy in (("sample", method.sample), ("label", method.label)):
            network = backbone
            if policy.teacher is not None:
                network = state.teachers[part] = load_teacher(policy.teacher)
            for name, kind in SIGNALS.items():
                if name not in policy.needs or name in state.early or name in state.late:
                    continue
                signal = kind(network, policy)
                (state.early if isinstance(signal, EarlySignal) else state.late)[name] = signal
        return state

    def before(self, images: Tensor, targets: Tensor) -> Signals:
        """The signals of the clean images; what is to be seen while the mixed ones pass is made ready."""
        signals = Signals(images.device, images=images, targets=targets)
        for name, signal in self.early.items():
            signals[name] = signal.take(images, targets, signals)
        for signal in self.late.values():
            signal.arm(tuple(images.shape[2:]))
        return signals

    def after(self, signals: Signals) -> Signals:
        """Adds what was seen while the mixed images passed."""
        for name, signal in self.late.items():
            signals[name] = signal.take()
        return signals

    def disarm(self) -> None:
        """Makes hooks inert. Called at the start of every forward of the model, in evaluation too."""
        for signal in (*self.early.values(), *self.late.values()):
            signal.disarm()


class Step(ABC):
    """From a clean batch to a loss. Subclasses are frozen dataclasses; what they learn or remember lives in their state."""

    def build(self, method: Method, backbone: nn.Module) -> MethodState:
        """The state of the method. Raises ValueError when the backbone cannot serve it. Copies of the backbone are made
        before hooks are put on it, or the copies would carry them too."""
        return MethodState.for_method(method, backbone)

    @abstractmethod
    def run(self, method: Method, state: MethodState, backbone: nn.Module, images: Tensor, targets: Tensor, key: MixKey) -> StepOutput:
        """`images` (B, C, H, W), `targets` (B, num_labels) float32, one-hot or soft."""

    def deployed(self, state: MethodState, backbone: nn.Module) -> nn.Module:
        """The network that is evaluated and shipped: a Hugging Face image classifier."""
        return backbone

    def after_optimizer_step(  # noqa: B027, most steps have nothing to do
        self, state: MethodState, backbone: nn.Module, step: int, total_steps: int
    ) -> None:
        """What follows the weights, such as an EMA teacher. `step` optimizer steps were done before this one."""
