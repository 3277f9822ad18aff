"""`MixupModel`: a classifier that does a whole mixed training step in one forward pass."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from hf_mixup.core.checks import check_count, check_images, check_labels
from hf_mixup.core.hub import download_all, told_plainly
from hf_mixup.core.losses import CrossEntropy
from hf_mixup.core.plan import onehot
from hf_mixup.core.rng import MixKey
from hf_mixup.methods import Method, MethodChoice
from hf_mixup.mixers.mixer import Mixer
from hf_mixup.networks.backbones import describe_for_timm, load_classifier, load_strictly
from hf_mixup.networks.signals.signal import gathered
from hf_mixup.steps.step import MethodState, StepOutput

STATE_FOLDER = "mixup"
STATE_NAME = "state.safetensors"


@dataclasses.dataclass
class MixupOutput(ImageClassifierOutput):
    """The outputs of a training step: `loss`, `logits`, and

    Attributes:
        targets: (B, num_labels) float32, mixed.
        lam: (B,) float32, the labels' share of the own image.
        losses: (B,) float32, of every mixture by itself; `loss` is their mean, and what the method adds to it.
        methods: names of the methods that mixed, one for each repeat; `("vanilla",)` where nothing was mixed.
    """

    targets: Tensor | None = None
    lam: Tensor | None = None
    losses: Tensor | None = None
    methods: tuple[str, ...] | None = None


class MixupModel(PreTrainedModel):
    """Any Hugging Face image classifier, trained by mixing methods.

    In training, `forward(pixel_values, labels, mix_key)` mixes, and returns the loss; MixupTrainer gives the key. In
    evaluation it is the plain network, with the plain loss. Saved, it is the plain classifier at the top of the folder
    (`AutoModelForImageClassification` loads it) with what the methods learned or remember under `mixup/`.

    Args:
        backbone: an image classifier of transformers, a timm model in transformers' wrapper, or one of ours.
        mix: a method, several, or a `MethodChoice`.
        mix_prob, alpha, mix_args, mode, loss, mix_rate: as in `MethodChoice.build`.
        mix_repeat: independent mixtures of each batch, whose losses are averaged.
        ema: keep an average of the weights, which MixupTrainer lets follow, and evaluate and ship that.

    Raises:
        ValueError: for methods that the backbone cannot serve.
    """

    main_input_name = "pixel_values"
    base_model_prefix = "backbone"
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    # the backbone's config carries its attention implementation, which it has checked itself
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self,
        backbone: PreTrainedModel,
        mix: str | Method | MethodChoice | Sequence[str | Method] = "cutmix",
        mix_prob: Sequence[float] | None = None,
        alpha: float | Sequence[float] | None = None,
        mix_args: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        mode: str | None = None,
        loss: Any = None,
        mix_rate: float = 1.0,
        mix_repeat: int = 1,
        ema: bool = False,
    ):
        super().__init__(backbone.config)
        check_count(1, mix_repeat=mix_repeat)
        if not isinstance(mix, MethodChoice):
            mix = MethodChoice.build(mix, mix_prob, alpha, mix_args, mode=mode, loss=loss, mix_rate=mix_rate)
        self.choice = mix
        self.mix_repeat = mix_repeat
        self.backbone = backbone
        self.num_labels = backbone.config.num_labels
        self._no_split_modules = backbone._no_split_modules
        self.supports_gradient_checkpointing = backbone.supports_gradient_checkpointing
        # before hooks are put on the backbone, which the copy would carry too
        self.ema = copy.deepcopy(backbone).requires_grad_(False) if ema else None
        self.states = nn.ModuleDict({method.name: method.step.build(method, backbone) for method in mix.methods})

        if self.ema is not None and self.deployed is not self.ema:
            self.ema = None  # what is deployed is an average already

    @property
    def deployed(self) -> nn.Module:
        """The network that is evaluated and shipped: the backbone, its average, or the teacher of a method that says so."""
        for method in self.choice.methods:
            network = method.step.deployed(self.states[method.name], self.backbone)
            if network is not self.backbone:
                return network
        return self.backbone if self.ema is None else self.ema

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """`ema = decay * ema + (1 - decay) * backbone`, parameters; buffers are copied."""
        torch._foreach_lerp_([*self.ema.parameters()], [*self.backbone.parameters()], 1 - decay)
        for average, buffer in zip(self.ema.buffers(), self.backbone.buffers(), strict=True):
            average.copy_(buffer)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        mix_key: Sequence[int] | None = None,
        mixed: bool = False,
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values: (B, C, H, W).
            labels: (B,) class numbers, or (B, num_labels) soft.
            mix_key: a `MixKey`, or its numbers; needed in training.
            mixed: in training, take the labels as final and mix nothing.
        """
        for state in self.states.values():
            # at the start, never at the end: checkpointed layers run again in the backward pass and need their hooks
            state.disarm()
        if labels is None:
            return ImageClassifierOutput(logits=self.deployed(pixel_values=pixel_values).logits)
        if not self.training:
            logits = self.deployed(pixel_values=pixel_values).logits
            return ImageClassifierOutput(loss=self._plain_loss(logits, labels), logits=logits)
        check_images(pixel_values, finite=False)
        check_labels(labels, len(pixel_values), self.num_labels)
        targets = onehot(labels, self.num_labels)
        if mixed or len(pixel_values) == 1:
            logits = self.backbone(pixel_values=pixel_values).logits
            losses = self.choice.methods[0].loss(logits, targets)
            return MixupOutput(
                loss=losses.mean(), logits=logits, targets=targets, lam=targets.new_ones(len(targets)), losses=losses, methods=("vanilla",)
            )
        if mix_key is None:
            raise ValueError(
                "training needs mix_key, the place of the batch in the run, got None; train with MixupTrainer, which gives it."
            )
        key = MixKey(*mix_key)
        with gathered(self):  # saliency is a backward pass of its own
            keys = [key._replace(repeat=key.repeat + repeat) for repeat in range(self.mix_repeat)]
            methods = [self.method_for(key) for key in keys]
            steps = [self._step(method, pixel_values, targets, key) for method, key in zip(methods, keys, strict=True)]
        rows = {name: torch.cat([getattr(step, name) for step in steps]) for name in ("logits", "targets", "lam", "losses")}
        return MixupOutput(loss=torch.stack([step.loss for step in steps]).mean(), **rows, methods=tuple(method.name for method in methods))

    def method_for(self, key: MixKey) -> Method:
        """The method of a batch: the same on all processes."""
        return self.choice.draw(key.shared_rng())

    def _step(self, method: Method, images: Tensor, targets: Tensor, key: MixKey) -> StepOutput:
        state = self.states[method.name] if method.name in self.states else MethodState()
        return method.step.run(method, state, self.backbone, images, targets, key)

    def _plain_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What a plain Trainer reports; a multi-label loss where the labels are."""
        loss = self.choice.methods[0].loss if labels.ndim == 2 else CrossEntropy()
        return loss(logits, onehot(labels, self.num_labels)).mean()

    # -- saving and loading ---------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike, state_dict: dict | None = None, is_main_process: bool = True, **kwargs):
        """Writes the deployed classifier at the top of the folder, `mixup_config.json` beside it, and the rest under `mixup/`."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        prefix = self._name_of(self.deployed) + "."
        classifier = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        if self.config.model_type == "timm_wrapper":
            # as timm itself names them, so that timm.create_model reads the folder too; transformers knows both
            classifier = {key.removeprefix("timm_model."): value for key, value in classifier.items()}
            describe_for_timm(self.deployed)
        self.deployed.save_pretrained(save_directory, state_dict=classifier, is_main_process=is_main_process, **kwargs)
        if not is_main_process:
            return
        self.choice.save_pretrained(save_directory)
        rest = {key: value.detach().cpu().contiguous() for key, value in state_dict.items() if not key.startswith(prefix)}
        path = Path(save_directory, STATE_FOLDER, STATE_NAME)
        kept = {STATE_NAME} if rest else set()
        if rest:
            path.parent.mkdir(exist_ok=True)
            save_file(rest, path.with_suffix(".tmp"), metadata={"format": "pt"})
            os.replace(path.with_suffix(".tmp"), path)
        for name, state in self.states.items():
            if isinstance(getattr(state, "mixer", None), Mixer):
                own = f"states.{name}.mixer."
                weights = {key.removeprefix(own): value for key, value in rest.items() if key.startswith(own)}
                kept.add(state.mixer.save_beside(path.parent, weights).name)
        # what another method left here would be taken for this one's
        for old in path.parent.glob("*"):
            if old.name not in kept:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        if not kept and path.parent.is_dir():
            path.parent.rmdir()

    def restore(self, folder: str | os.PathLike) -> None:
        """Loads everything that `save_pretrained` wrote. Raises ValueError when anything is missing, left over or of another shape."""
        load_strictly(self.deployed, folder)
        prefix = self._name_of(self.deployed) + "."
        wanted = {key for key in self.state_dict() if not key.startswith(prefix)}
        path = Path(folder, STATE_FOLDER, STATE_NAME)
        if wanted and not path.is_file():
            raise ValueError(
                f"{folder} was expected to hold {STATE_FOLDER}/{STATE_NAME} with the state of {self.choice}, got none; it is not a checkpoint of this method."
            )
        with told_plainly(folder):
            found = load_file(path) if path.is_file() else {}
        if wanted != set(found):
            odd = sorted(wanted ^ set(found))
            raise ValueError(
                f"{path} was expected to hold the state of {self.choice}, got other names ({', '.join(odd[:3])}, ...); it belongs to another method."
            )
        try:
            super().load_state_dict({**self.state_dict(), **found})
        except RuntimeError as error:
            detail = str(error).splitlines()[-1].strip()
            raise ValueError(
                f"{path} was expected to fit the state of {self.choice}, got {detail}; it belongs to another network."
            ) from None

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """Always strict: a stock Trainer would go on from a half-loaded model with a warning."""
        return super().load_state_dict(state_dict, strict=True, assign=assign)

    @classmethod
    def from_pretrained(
        cls, repo_or_folder: str | os.PathLike, *, revision: str | None = None, token: str | None = None, **kwargs
    ) -> MixupModel:
        """A run of ours, from its folder or the Hub, ready to train on: network, methods and their state."""
        folder = Path(repo_or_folder)
        if not folder.is_dir():
            patterns = ["*.json", "*.safetensors", f"{STATE_FOLDER}/*"]
            folder = download_all(str(repo_or_folder), patterns, revision=revision, token=token)
        network, choice = load_classifier(folder, **kwargs), MethodChoice.from_pretrained(folder)
        model = cls(network, choice)
        if model.deployed is model.backbone and _holds_backbone(folder):
            model = cls(network, choice, ema=True)
        model.restore(folder)
        return model

    def _name_of(self, module: nn.Module) -> str:
        return next(name for name, other in self.named_modules() if other is module)

    # -- what transformers and accelerate ask of a model ----------------------------------------------------------------

    def get_input_embeddings(self):
        return None

    def get_output_embeddings(self):
        return None

    def _init_weights(self, module):
        """Every part comes initialised."""


def _holds_backbone(folder: Path) -> bool:
    """Whether the state beside the deployed network has the weights of the backbone, so that the deployed one is their average."""
    path = folder / STATE_FOLDER / STATE_NAME
    if not path.is_file():
        return False
    with safe_open(path, framework="pt") as state:
        return any(key.startswith("backbone.") for key in state.keys())  # noqa: SIM118, no dictionary
