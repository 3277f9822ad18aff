"""Distillation: a frozen teacher sees the same images as the network in training, which also learns the teacher's predictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_mixup.core.checks import check_between, check_positive, check_switch
from hf_mixup.networks.families import main_input_of
from hf_mixup.networks.signals.signal import resized
from hf_mixup.networks.teachers import Teacher


@dataclass(frozen=True)
class Distillation:
    """Settings of a distillation.

    With `q` and `p` the teacher's and the student's softmax at the temperature T, the loss of a row is
    `(1 - weight) * loss + weight * T ** 2 * KL(q || p)` (Hinton et al., arXiv:1503.02531). Both see the same mixtures, so this is function
    matching (Beyer et al., CVPR 2022, arXiv:2106.05237), where the weight is 1. A teacher for several labels (`problem_type`) has a sigmoid
    instead of a softmax, and the divergence is the mean over classes.

    Args:
        teacher: Hub id or folder of an image classifier with the classes of the student.
        temperature: T, above 0.
        weight: of the teacher's term, 0 to 1.
        hard: the teacher's most probable class is the label, with cross-entropy instead of the divergence (DeiT, arXiv:2012.12877).
    """

    teacher: str
    temperature: float = 1.0
    weight: float = 0.5
    hard: bool = False

    def __post_init__(self):
        check_positive(distillation_temperature=self.temperature)
        check_between(0, 1, distillation_weight=self.weight)
        check_switch(hard_distillation=self.hard)
        if self.hard and self.temperature != 1:
            raise ValueError(
                f"hard distillation has no temperature, got distillation_temperature={self.temperature}; leave one of the two out."
            )

    def arguments(self) -> dict[str, Any]:
        """The same settings as arguments of MixupModel."""
        return {
            "teacher": self.teacher,
            "distillation_temperature": self.temperature,
            "distillation_weight": self.weight,
            "hard_distillation": self.hard,
        }

    @classmethod
    def of(cls, teacher: Any, temperature: float, weight: float, hard: bool) -> Distillation | None:
        """The distillation; None without a teacher. Raises ValueError if other settings are given without a teacher."""
        if teacher is not None:
            return cls(str(teacher), temperature, weight, hard)
        for name, value in (("distillation_temperature", temperature), ("distillation_weight", weight), ("hard_distillation", hard)):
            if value != getattr(cls, name.removeprefix("distillation_").removesuffix("_distillation")):
                raise ValueError(f"{name} is for a teacher, got {value} without one; name it with distill_from.")
        return None


@dataclass
class Passes:
    """The passes of a network while it was watched: the inputs of each by name, and the logits that should match the teacher's."""

    main: str
    inputs: list[dict[str, Any]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def of(self, images: Tensor) -> int:
        """The index of the last pass of these images."""
        return max(place for place, inputs in enumerate(self.inputs) if inputs[self.main] is images)


class Distiller:
    """A teacher and its loss. It is not a module, so checkpoints, averages and optimizers of the student do not contain it.

    A student can have a second head for the teacher, as `DeiTForImageClassificationWithTeacher` has. Then one head learns the labels and the
    other one the teacher's predictions.

    Raises:
        ValueError: if the teacher has other classes.
    """

    def __init__(self, distillation: Distillation, student: nn.Module):
        self.how, self.teacher = distillation, Teacher(distillation.teacher)
        config = self.teacher.network.config
        self.teacher.match(student)
        self.many = config.problem_type == "multi_label_classification"
        self.size = getattr(config, "image_size", None)

    @contextmanager
    def watching(self, student: nn.Module) -> Iterator[Passes]:
        """Context manager that records the student's passes. Inside it, a student with two heads returns the logits of the head for labels."""
        passes = Passes(main_input_of(student))

        def passing(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            passes.inputs.append(kwargs)
            head = getattr(output, "distillation_logits", None)
            passes.logits.append(output.logits if head is None else head)
            return None if head is None else dataclasses.replace(output, logits=output.cls_logits)

        # the last hook, which still runs before the caller gets the output
        handle = student.register_forward_hook(passing, with_kwargs=True)
        try:
            yield passes
        finally:
            handle.remove()

    def losses(self, passes: Passes, images: Sequence[Tensor]) -> Tensor:
        """(R,) float32: the loss for every row of these images, in their recorded passes."""
        return torch.cat([self._of_one(passes.inputs[place], passes.logits[place], passes.main) for place in map(passes.of, images)])

    def _of_one(self, inputs: dict[str, Any], logits: Tensor, main: str) -> Tensor:
        network = self.teacher.network
        weight = next(network.parameters())
        if weight.device != logits.device:  # the Trainer does not move it
            network.to(logits.device)
        with torch.no_grad():
            seen = inputs[main]
            if seen.is_floating_point():
                seen = seen.to(weight.dtype)
            if isinstance(self.size, int) and seen.ndim == 4:
                seen = resized(seen, self.size)
            told = network(**{**inputs, main: self.teacher.view(seen)}).logits.float()
        return self._compared(logits.float(), self.teacher.answers(told))

    def _compared(self, logits: Tensor, told: Tensor) -> Tensor:
        heat = self.how.temperature
        if self.many:
            if self.how.hard:
                return F.binary_cross_entropy_with_logits(logits, (told > 0).float(), reduction="none").mean(1)
            wanted, there, absent = (told / heat).sigmoid(), *(F.logsigmoid(sign * told / heat) for sign in (1, -1))
            both = wanted * (there - F.logsigmoid(logits / heat)) + (1 - wanted) * (absent - F.logsigmoid(-logits / heat))
            return heat**2 * both.mean(1)
        if self.how.hard:
            return F.cross_entropy(logits, told.argmax(1), reduction="none")
        both = (logits / heat).log_softmax(1), (told / heat).log_softmax(1)
        return heat**2 * F.kl_div(*both, reduction="none", log_target=True).sum(1)

    def mixed_with(self, loss: Tensor, taught: Tensor) -> Tensor:
        """The loss on labels and the teacher's loss in one, (R,)."""
        return torch.lerp(loss.float(), taught, self.how.weight)
