"""The networks of learned mixing: an EMA teacher, a mixer, and a second head for student and teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hf_mixup.core.checks import check_known
from hf_mixup.networks.average import Average
from hf_mixup.networks.families import classifier_of, input_shape, stage_names
from hf_mixup.networks.passes import Tap, input_of, watched
from hf_mixup.networks.signals.features import Stages
from hf_mixup.networks.signals.signal import reading
from hf_mixup.steps.step import MethodState


class LearnedState(MethodState):
    """The teacher, the mixer, and a second head for each of the two networks.

    The networks' own heads are those that are evaluated. `head` and `teacher_head` are for the other kind of input, so that the deployed
    network is a whole classifier. The teacher's parameters follow the student. Its buffers, the running statistics of batch norms, are
    copied once and then updated by its own passes.

    Args:
        network: the student.
        stage: the stage whose features the mixer sees; see `MixerStep`.
        own_is_onehot: whether the networks' own heads are those of clean images.
        make_mixer: function from the number of channels to a mixer.
    """

    def __init__(self, network: nn.Module, stage: int | str | None, own_is_onehot: bool, make_mixer: Callable[[int], nn.Module]):
        super().__init__()
        self.own_is_onehot = own_is_onehot
        self.teacher = Average(network)
        self.head = copy.deepcopy(classifier_of(network))
        self.teacher_head = Average(self.head)
        name, channels = choose_stage(self.teacher.network, stage)
        self.stages = Stages(self.teacher.network, [name])
        self.classifiers = (
            classifier_of(self.teacher.network),
            classifier_of(network),
        )  # a tuple, so that they are not registered as modules here
        self.mixer = make_mixer(channels)

    @property
    def watched(self) -> list[nn.Module]:
        return [*super().watched, self.classifiers[1]]

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's features (B, C, h, w) of clean images, and the logits of its head for mixed images. No gradients."""
        with torch.no_grad():
            logits, (features,) = self._teacher_pass(images, clean=False, taps=self.stages.taps(tuple(images.shape[2:])))
            return features, logits

    def teacher_logits(self, images: Tensor, clean: bool) -> Tensor:
        return self._teacher_pass(images, clean)[0]

    def _teacher_pass(self, images: Tensor, clean: bool, taps: Sequence[Tap] = ()) -> tuple[Tensor, list[Tensor]]:
        head = None if clean == self.own_is_onehot else self.teacher_head.network
        return _pass(self.teacher, self.classifiers[0], images, head, taps)

    def student_logits(self, network: nn.Module, images: Tensor, clean: bool) -> Tensor:
        head = None if clean == self.own_is_onehot else self.head
        return _pass(network, self.classifiers[1], images, head)[0]

    @torch.no_grad()
    def masks(self, images: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """(B, K, H, W), the mixer's masks for images (B, C, H, W), with `index` and `weight` (B, K) as in a MixPlan; for pictures."""
        return self.mixer(self.features(images)[0], index, weight, tuple(images.shape[2:]))

    def follow(self, network: nn.Module, momentum: float) -> None:
        """Moves the teacher towards the student."""
        self.teacher.follow(network, momentum, buffers=False)
        self.teacher_head.follow(self.head, momentum, buffers=False)

    @property
    def mixer_learns(self) -> bool:
        return any(parameter.requires_grad for parameter in self.mixer.parameters())

    def train(self, mode: bool = True) -> LearnedState:
        super().train(mode)
        if not self.mixer_learns:
            self.mixer.eval()  # a frozen mixer keeps its statistics too
        return self


def _pass(
    network: nn.Module, classifier: nn.Module, images: Tensor, head: nn.Module | None, taps: Sequence[Tap] = ()
) -> tuple[Tensor, list[Tensor]]:
    """The logits of the network's `classifier`, or of another `head` on the same features, and what the taps read."""
    if head is None:
        return watched(network, images, taps)
    _, (*seen, feature) = watched(network, images, [*taps, input_of(classifier)])
    return head(feature), seen


def choose_stage(network: nn.Module, stage: int | str | None) -> tuple[str, int]:
    """The name of a stage, and the number of its channels. Raises ValueError for a stage that the network does not have."""
    names = stage_names(network)
    if isinstance(stage, str):
        check_known("stage", stage, names)
        stage = names.index(stage)
    if stage is not None and (not isinstance(stage, int) or isinstance(stage, bool) or not -len(names) <= stage < len(names)):
        raise ValueError(f"stage must be from 0 to {len(names) - 1}, got {stage}; choose one of {', '.join(names)}.")
    shape = input_shape(network)
    weight = next(network.parameters())
    blank = torch.zeros(1, *shape, device=weight.device, dtype=weight.dtype)
    with reading(network):
        _, maps = watched(network, blank, Stages(network, names).taps(shape[1:]))
    if stage is None:
        larger = [i for i, features in enumerate(maps) if features[0, 0].numel() > maps[-1][0, 0].numel()]
        stage = larger[-1] if larger else (len(names) - 1) // 2
    return names[stage], maps[stage].shape[1]
