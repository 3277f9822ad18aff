"""`PreTrainingModel`: a backbone that does a whole pre-training step in one forward pass, and is saved without a classifier."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_mixup.core.hub import download_all
from hf_mixup.core.rng import MixKey
from hf_mixup.method import Method, read_config
from hf_mixup.methods import MethodChoice
from hf_mixup.model import STATE_FOLDER, MixupModel, MixupOutput
from hf_mixup.networks.backbones import load_classifier
from hf_mixup.networks.families import bare, classifier_of, classifiers_of, is_timm
from hf_mixup.pretraining.pretexts import pretext
from hf_mixup.pretraining.state import feature_of


class PreTrainingModel(MixupModel):
    """An image network that is pre-trained on two views of every image, with mixing.

    In training, `forward(views, mix_key=...)` gives the loss; MixupPreTrainer gives the key. It is saved as the backbone without its classifier,
    and without classes in its config, at the top of the folder. AutoModel, AutoModelForImageClassification (`num_labels=10` makes a new
    classifier), timm and run_mixup.py load it. Projector, key network and queue are saved under `mixup/`.

    Args:
        backbone: an image classifier of transformers, timm or ours, with any number of classes; its classifier is not trained.
        mix: a pretext such as `pretext("unmix", "moco")`, or its name, or `vanilla` for no mixing.
        base: base of a pretext that is given by name: simclr, moco, mocov3, byol, simsiam or barlowtwins.

    Raises:
        ValueError: for a network without a linear classifier, or with two, as distilled ones have, and for pretexts that do not fit it.
    """

    views: ClassVar[int] = 2

    def __init__(self, backbone: PreTrainedModel, mix: str | Method | MethodChoice = "imix", base: str = "moco"):
        if isinstance(mix, str):
            mix = pretext(mix, base)
        super().__init__(backbone, mix)
        if len(self.choice.methods) != 1:
            raise ValueError(f"pre-training takes one pretext, got {self.choice}; choose one.")
        self.pretext: Method = self.choice.methods[0]
        heads = len(classifiers_of(self.backbone))
        if heads > 1:
            raise ValueError(
                f"pre-training needs a network with one classifier, whose input it trains, got {type(bare(self.backbone)).__name__} with {heads}; use "
                "the network without a head for distillation."
            )
        self._classifier = (classifier_of(self.backbone),)  # a tuple, so that it is not registered twice

    def forward(self, pixel_values: Tensor, mix_key: Sequence[int] | None = None) -> MixupOutput:
        """
        Args:
            pixel_values: (B, 2, C, H, W), two views of every image. In evaluation (B, C, H, W); then `logits` are the features.
            mix_key: a `MixKey`, or its numbers. Needed in training.
        """
        if not self.training:
            return MixupOutput(logits=self.features(pixel_values))
        if pixel_values.ndim != 5 or pixel_values.shape[1] != 2:
            raise ValueError(f"pre-training needs two views of every image, (B, 2, C, H, W), got {tuple(pixel_values.shape)}; stack them.")
        if len(pixel_values) < 2:
            raise ValueError("pre-training needs at least 2 images in a batch, got 1; set dataloader_drop_last=True.")
        if mix_key is None:
            raise ValueError(
                "training needs mix_key, the place of the batch in the run, got None; train with MixupPreTrainer, which passes it."
            )
        state = self.states[self.pretext.name]
        step = self.pretext.step.run(self.pretext.parts, state, self.backbone, pixel_values, None, MixKey(*mix_key))
        if step.memory is not None:
            state.remember(**step.memory)
        return MixupOutput(
            loss=step.loss, logits=step.logits, targets=step.targets, lam=step.lam, losses=step.losses, methods=(self.pretext.name,)
        )

    def features(self, pixel_values: Tensor) -> Tensor:
        """The features (B, D) of images (B, C, H, W): the input of a classifier."""
        return feature_of(self.backbone, self._classifier[0], pixel_values)

    # -- saving and loading ---------------------------------------------------------------------------------------------

    @property
    def unsaved(self) -> frozenset[str]:
        head = next(name for name, module in self.backbone.named_modules() if module is self._classifier[0])
        return frozenset(f"{head}.{name}" for name in self._classifier[0].state_dict())

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, state_dict: dict | None = None, **kwargs: Any
    ) -> None:
        """Writes the backbone without its classifier, `mixup_config.json` beside it, and the rest under `mixup/`."""
        with _without_classes(self.backbone.config):
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        path = Path(save_directory, "config.json")
        if is_main_process and path.is_file() and not is_timm(self.backbone):
            # an empty list of names would give a warning when num_labels is passed
            config = json.loads(path.read_text())
            config = {name: value for name, value in config.items() if name not in ("id2label", "label2id")}
            path.write_text(json.dumps({**config, "num_labels": 0}, indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pretrained(
        cls, repo_or_folder: str | os.PathLike, *, revision: str | None = None, token: str | None = None, **kwargs: Any
    ) -> PreTrainingModel:
        """Loads a run from its folder or the Hub, ready to continue. `kwargs` are those of the classifier's `from_pretrained`."""
        folder = Path(repo_or_folder)
        if not folder.is_dir():
            patterns = ["*.json", "*.safetensors", f"{STATE_FOLDER}/*"]
            folder = download_all(str(repo_or_folder), patterns, revision=revision, token=token)
        choice = MethodChoice.from_dict(read_config(folder))
        with torch.random.fork_rng(devices=[]):
            model = cls(load_classifier(folder, num_labels=2, **kwargs), choice)
        model.restore(folder)
        return model


@contextmanager
def _without_classes(config: Any) -> Iterator[None]:
    """Context manager in which the config has no classes, like a network without a classifier."""
    before = config.id2label, config.label2id
    try:
        config.id2label, config.label2id = {}, {}
        yield
    finally:
        config.id2label, config.label2id = before
