"""`MixupModel`: a classifier that does a whole mixed training step in one forward pass."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from hf_mixup.core.checks import check_count, check_decay, check_images, check_tokens
from hf_mixup.core.hub import download_all, told_plainly
from hf_mixup.core.losses import CrossEntropy, Loss, MultiHead
from hf_mixup.core.rng import MixKey
from hf_mixup.method import CONFIG_NAME, Method, check_views, check_without_frames, check_without_maps, read_config
from hf_mixup.methods import METHODS, MethodChoice
from hf_mixup.mixers.mixer import Mixer
from hf_mixup.networks.average import Average, rising_decay
from hf_mixup.networks.backbones import describe_for_timm, load_classifier
from hf_mixup.networks.distillation import Distillation, Distiller
from hf_mixup.networks.families import bare, is_decoder, is_timm, keep_frozen, main_input_of, reads_tokens, take_classifier, takes_pictures
from hf_mixup.networks.passes import check_changeable, check_uncompiled, compile_around, logits_of, uncompile
from hf_mixup.networks.signals.signal import gathered
from hf_mixup.networks.teachers import Normalisation, Teacher, normalisation_of
from hf_mixup.networks.wrapping import ModuleClassifier, as_classifier, load_network, restore_network, save_network
from hf_mixup.steps.step import MethodState, StepOutput

STATE_FOLDER = "mixup"
STATE_NAME = "state.safetensors"


@dataclasses.dataclass
class MixupOutput(ImageClassifierOutput):
    """The output of a training step: `loss`, `logits`, and

    Attributes:
        targets: (B, num_labels) float32, mixed.
        lam: (B,) float32, the own image's share of the label.
        losses: (B,) float32, one for each mixture; `loss` is their mean, plus the method's additional losses.
        methods: names of the methods that mixed, one for each repeat; `("vanilla",)` if nothing was mixed.
    """

    targets: Tensor | None = None
    lam: Tensor | None = None
    losses: Tensor | None = None
    methods: tuple[str, ...] | None = None


class MixupModel(PreTrainedModel):
    """A Hugging Face classifier of images, videos, sounds or texts that is trained by mixing methods.

    In training, `forward(pixel_values, labels, mix_key)` mixes, and returns the loss; MixupTrainer gives the key. The main input can also have
    the network's own name, such as `input_values=` for sounds, with masks such as `attention_mask` beside it. In evaluation it is the plain
    network with the plain loss. It is saved as the plain classifier, which `AutoModelForImageClassification` loads from the top of the folder.
    What the methods learned or remember is saved under `mixup/`.

    Args:
        backbone: an image classifier of transformers, a timm model in transformers' wrapper, or one of ours.
        mix: one or several methods, or a `MethodChoice`.
        mix_prob, alpha, mix_args, mode, loss, mix_rate: as in `MethodChoice.build`.
        mix_repeat: number of independent mixtures of each batch; their losses are averaged.
        ema_decay: also keep an exponential moving average (EMA) of the weights, with this decay for each step. MixupTrainer updates it; it is
            evaluated and saved. Methods that deploy a teacher already have an average, and take no `ema_decay`.
        teacher: Hub id or folder of a frozen classifier that sees the same mixtures, and whose predictions are learned too. Only its name is
            saved.
        distillation_temperature, distillation_weight, hard_distillation: settings of that loss, see `Distillation`.

    Attributes:
        main_input_name: name of the network's input that is mixed.
        flat: whether it must be images (B, C, H, W), and not videos or volumes; None for your own module, which may take anything.
        normalisation: normalisation of the training images, which teachers need; MixupTrainer sets it.

    Raises:
        ValueError: for methods that do not fit the backbone.
    """

    views: ClassVar[int] = 1  # number of views of each image that the methods get
    base_model_prefix = "backbone"
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    # the backbone's config names its attention implementation, which the backbone has already checked
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self,
        backbone: PreTrainedModel,
        mix: str | Method | MethodChoice | Sequence[str | Method] = "cutmix",
        mix_prob: Sequence[Any] | None = None,
        alpha: float | Sequence[float] | None = None,
        mix_args: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        mode: str | None = None,
        loss: Any = None,
        mix_rate: Any = 1.0,
        mix_repeat: int = 1,
        ema_decay: float | None = None,
        teacher: str | os.PathLike | None = None,
        distillation_temperature: float = 1.0,
        distillation_weight: float = 0.5,
        hard_distillation: bool = False,
    ):
        backbone = as_classifier(backbone)
        uncompile(backbone)  # of an earlier model of this network, as the next line
        take_classifier(backbone)
        super().__init__(backbone.config)
        check_count(1, mix_repeat=mix_repeat)
        if not isinstance(mix, MethodChoice):
            mix = MethodChoice.build(mix, mix_prob, alpha, mix_args, mode=mode, loss=loss, mix_rate=mix_rate)
        for method in mix.methods:
            if method.step.views != self.views:
                kinds = {1: "mix labelled images", 2: "pre-train on two views of every image"}
                raise ValueError(
                    f"methods of {type(self).__name__} must {kinds[self.views]}, got {method.name!r}, which must "
                    f"{kinds[method.step.views]}; use {'PreTrainingModel' if self.views == 1 else 'MixupModel'}."
                )
        if len({method.loss.problem_type for method in mix.methods}) > 1:
            losses = ", ".join(f"{method.name!r} with {type(method.loss).__name__}" for method in mix.methods)
            raise ValueError(f"methods of one network must have losses of one kind, got {losses}; give all of them one with loss.")
        self.choice = mix
        # by MixupTrainer, where methods ask for the images of each class: before and after it told them
        self.uncounted = self.counted = mix
        self.mix_repeat = mix_repeat
        self.backbone = backbone
        self.main_input_name = main_input_of(backbone)
        self.flat = None if isinstance(backbone, ModuleClassifier) else takes_pictures(backbone)
        self.num_labels = backbone.config.num_labels
        if mix.num_labels not in (None, self.num_labels):
            raise ValueError(f"mix and the network must agree on num_labels, got {mix.num_labels} and {self.num_labels}; make them equal.")
        self._no_split_modules = backbone._no_split_modules
        self.supports_gradient_checkpointing = backbone.supports_gradient_checkpointing
        for method in mix.methods:
            check_views(method)
            check_without_maps(method)
            if self.flat or (self.flat is False and not self.main_input_name.startswith("pixel_values")):
                check_without_frames(method)
        self.tokens = reads_tokens(backbone)
        if self.tokens:
            check_text(backbone, mix.methods)
        self.states = nn.ModuleDict({method.name: method.step.build(method.parts, backbone) for method in mix.methods})
        self.ema_decay, self.ema = ema_decay, None
        if ema_decay is not None:
            check_decay(ema_decay=ema_decay)
            if self.deployed is not self.backbone:
                raise ValueError(
                    f"ema_decay must be left out for {mix}, whose teacher already is an average of the weights, got {ema_decay}; set the "
                    "teacher's momentum in mix_args instead."
                )
            self.ema = Average(backbone)
        distillation = Distillation.of(teacher, distillation_temperature, distillation_weight, hard_distillation)
        self.distiller = None if distillation is None else self._distiller(distillation)
        check_uncompiled(backbone, self._watched, str(mix))
        self.check_checkpointing(False)
        json.dumps(self.to_dict())  # fails now, and not after training
        self.normalisation = None

    def _distiller(self, distillation: Distillation) -> Distiller:
        for method in self.choice.methods:
            state = self.states[method.name]
            if state.changed:
                raise ValueError(
                    f"a teacher must see the network's mixtures, got {method.name!r}, which mixes inside the network; use a method "
                    "that mixes images."
                )
            if distillation.weight == 1 and any(p.requires_grad for p in state.parameters()):
                raise ValueError(
                    f"{method.name!r} learns to mix from the loss on labels, got distillation_weight=1, which removes that loss; lower the weight."
                )
        if self.choice.methods[0].loss.problem_type == "regression" or isinstance(self.choice.methods[0].loss, MultiHead):
            raise ValueError(
                f"a teacher must give probabilities of classes, got the loss {type(self.choice.methods[0].loss).__name__}; leave the teacher out."
            )
        return Distiller(distillation, self.backbone)

    @property
    def deployed(self) -> nn.Module:
        """The network that is evaluated and saved: the backbone, its average, or the teacher, if the method deploys it."""
        for method in self.choice.methods:
            network = method.step.deployed(self.states[method.name], self.backbone)
            if network is not self.backbone:
                return network
        return self.backbone if self.ema is None else self.ema.network

    @property
    def normalisation(self) -> Normalisation | None:
        return self._normalisation

    @normalisation.setter
    def normalisation(self, normalisation: Normalisation | None) -> None:
        self._normalisation = normalisation
        for teacher in self.teachers:
            teacher.given = normalisation

    @property
    def teachers(self) -> list[Teacher]:
        """The frozen teachers of the methods and of a distillation."""
        own = [] if self.distiller is None else [self.distiller.teacher]
        return [*(module for module in self.states.modules() if isinstance(module, Teacher)), *own]

    def after_optimizer_step(self, step: int, total_steps: int, rising: float = 0.0) -> None:
        """Updates averages and teachers. `step` optimizer steps were done before this one.

        Args:
            rising: number of steps in which `ema_decay` rises from 0.9 of its value.
        """
        for method in self.choice.methods:
            method.step.after_optimizer_step(self.states[method.name], self.backbone, step, total_steps)
        if self.ema is not None:
            self.ema.follow(self.backbone, rising_decay(self.ema_decay, step, rising), buffers=True)

    def train(self, mode: bool = True) -> MixupModel:
        super().train(mode)
        if mode:
            keep_frozen(self.backbone, self._averages)
        return self

    @property
    def _averages(self) -> list[nn.Module]:
        """The teachers and key networks of the methods, which follow the network in training."""
        return [module.network for module in self.states.modules() if isinstance(module, Average)]

    def compile_backbone(self, **options: Any) -> None:
        """Compiles the backbone in place. Mixing, and watched modules, stay outside the graphs. `options` are those of `torch.compile`."""
        compile_around(self.backbone, self._watched, **options)

    @property
    def _watched(self) -> list[nn.Module]:
        watched = [module for state in self.states.values() for module in state.watched]
        return watched if self.distiller is None else [*watched, self.backbone]

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        mix_key: Sequence[int] | None = None,
        mixed: int = 0,
        **inputs: Tensor,
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values: (B, C, H, W), or the network's main input under any name.
            labels: (B,) class numbers, or (B, num_labels) soft.
            mix_key: a `MixKey`, or its numbers. Needed in training.
            mixed: 0 to mix. Otherwise nothing is mixed in training, and labels are final: the number of rows of each image, which are in as many
                equal parts of the batch, as a MixupCollator makes them.
            **inputs: the main input by its own name, and the network's other inputs, (B, ...) each. The attention mask of a mixture is the union.
                Also columns that the methods read, such as `object_masks` (B, h, w).
        """
        columns = {name: inputs.pop(name) for name in self.choice.columns & inputs.keys()}
        pixel_values, others = self._inputs(pixel_values, inputs)
        if labels is None:
            if self.training and torch.is_grad_enabled():
                raise ValueError(
                    "training needs labels and mix_key, got only images, which would train unmixed; leave compute_loss to MixupTrainer, or "
                    "call eval() to predict."
                )
            return ImageClassifierOutput(logits=self._deployed_logits(pixel_values, others))
        if not self.training:
            logits = self._deployed_logits(pixel_values, others)
            return ImageClassifierOutput(loss=self._plain_loss(logits, labels), logits=logits)
        if self.tokens:
            check_tokens(pixel_values)
        else:
            check_images(pixel_values, name=self.main_input_name, flat=self.flat, finite=False)
        loss = self.choice.methods[0].loss
        loss.check(labels, len(pixel_values), self.num_labels)
        targets = loss.targets(labels, self.num_labels)
        if mixed or len(pixel_values) == 1:
            views = max(mixed, 1)
            loss = next((method.loss for method in self.choice.methods if method.loss.views == views), loss.single())
            loss = loss if mix_key is None else loss.at(*MixKey(*mix_key)[-2:])
            step = self._taught(MethodState(), partial(self._unmixed, pixel_values, targets, loss, others))
            return MixupOutput(loss=step.loss, logits=step.logits, targets=targets, lam=step.lam, losses=step.losses, methods=("vanilla",))
        if mix_key is None:
            raise ValueError(
                "training needs mix_key, the place of the batch in the run, got None; train with MixupTrainer, which passes it."
            )
        key = MixKey(*mix_key)
        with gathered(self):  # saliency has its own backward pass
            keys = [key._replace(repeat=key.repeat + repeat) for repeat in range(self.mix_repeat)]
            methods = [self.method_for(key) for key in keys]
            steps = [self._step(method, pixel_values, targets, key, others, columns) for method, key in zip(methods, keys, strict=True)]
        # after all repeats, which use the same memory; if one method mixed several, the first is remembered
        for name, step in {method.name: step for method, step in zip(methods[::-1], steps[::-1], strict=True)}.items():
            if step.memory is not None:
                self.states[name].remember(**step.memory)
        rows = {name: torch.cat([getattr(step, name) for step in steps]) for name in ("logits", "targets", "lam", "losses")}
        return MixupOutput(loss=torch.stack([step.loss for step in steps]).mean(), **rows, methods=tuple(method.name for method in methods))

    def method_for(self, key: MixKey) -> Method:
        """The method of a batch; the same on all processes."""
        return self.choice.at(key.epoch, key.epochs).draw(key.shared_rng())

    def _unmixed(self, images: Tensor, targets: Tensor, loss: Loss, others: Mapping[str, Tensor]) -> StepOutput:
        logits = logits_of(self.backbone, images, others)
        losses = loss(logits, targets)
        return StepOutput(losses.mean(), losses, logits, targets, targets.new_ones(len(targets)))

    def _taught(self, state: MethodState, run: Callable[[], StepOutput]) -> StepOutput:
        """Runs a step and adds the teacher's loss on the images that passed."""
        if self.distiller is None:
            return run()
        state.passed = []
        try:
            with self.distiller.watching(self.backbone) as passes:
                step = run()
            images = state.passed or [passes.inputs[-1][passes.main]]
        finally:
            state.passed = None
        taught = self.distiller.losses(passes, images)
        loss, losses = (self.distiller.mixed_with(*pair) for pair in ((step.loss, taught.mean()), (step.losses, taught)))
        return step._replace(loss=loss, losses=losses)

    def _inputs(self, main: Tensor | None, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The main input, and the other inputs by name."""
        name = self.main_input_name
        if (main is None) == (name not in inputs):
            raise ValueError(
                f"forward needs {name} once, got {sorted(inputs)}{'' if main is None else ' beside a first argument'}; pass it by name."
            )
        return (inputs[name] if main is None else main), {key: value for key, value in inputs.items() if key != name}

    def _step(
        self,
        method: Method,
        images: Tensor,
        targets: Tensor,
        key: MixKey,
        others: Mapping[str, Tensor],
        columns: Mapping[str, Tensor],
    ) -> StepOutput:
        state = self.states[method.name] if method.name in self.states else MethodState()
        if others and not method.step.takes_others:
            raise ValueError(
                f"{method.name} gives a network only {self.main_input_name}, got {min(others)} too; drop it, or use another method."
            )
        state.columns, state.others = method.taken(columns, len(images), images.device), others
        try:
            return self._taught(state, partial(method.step.run, method.parts, state, self.backbone, images, targets, key))
        finally:
            state.columns, state.others = {}, {}

    def _deployed_logits(self, images: Tensor, others: Mapping[str, Tensor]) -> Tensor:
        network = self.deployed
        if network is not self.backbone:
            # an average is kept in float32, whatever the backbone's dtype
            images = images.to(network.dtype) if images.is_floating_point() else images
        return logits_of(network, images, others)

    def _plain_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss that a plain Trainer reports; a multi-label loss for multi-label labels."""
        loss = self.choice.methods[0].loss
        loss.check(labels, len(logits), self.num_labels)
        plain = loss.plain() if labels.ndim == 2 or self.num_labels == 1 else CrossEntropy()
        return plain(logits, loss.targets(labels, self.num_labels)).mean()

    # -- saving and loading ---------------------------------------------------------------------------------------------

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, state_dict: dict | None = None, **kwargs: Any
    ) -> None:
        """Writes the deployed classifier at the top of the folder, `mixup_config.json` beside it, and the rest under `mixup/`.

        Files of another model under `mixup/` are removed.
        """
        state_dict = self.state_dict() if state_dict is None else state_dict
        prefix = self._name_of(self.deployed) + "."
        classifier = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        classifier = {name: value for name, value in classifier.items() if name not in self.unsaved}
        if is_timm(self):
            # with timm's own names, so that timm.create_model reads the folder too; transformers knows both names
            classifier = {key.removeprefix("timm_model."): value for key, value in classifier.items()}
            describe_for_timm(self.deployed)
        taught, config = self.choice.methods[0].loss.problem_type, self.deployed.config
        if taught != (config.problem_type or "single_label_classification"):  # None means this one
            config.problem_type = taught
        save_network(self.deployed, save_directory, classifier, is_main_process=is_main_process, **kwargs)
        if not is_main_process:
            return
        Path(save_directory, CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        rest = {key: value.detach().cpu().contiguous() for key, value in state_dict.items() if not key.startswith(prefix)}
        mixers = {name: state.mixer for name, state in self.states.items() if isinstance(getattr(state, "mixer", None), Mixer)}
        folder = Path(save_directory, STATE_FOLDER)
        kept = {STATE_NAME, *(mixer.folder_name for mixer in mixers.values())} if rest else set()
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not rest:
            if folder.is_dir():
                folder.rmdir()
            return
        folder.mkdir(exist_ok=True)
        temporary = folder / "state.tmp"
        save_file(rest, temporary, metadata={"format": "pt"})
        os.replace(temporary, folder / STATE_NAME)
        for name, mixer in mixers.items():
            own = f"states.{name}.mixer."
            mixer.save_beside(folder, {key.removeprefix(own): value for key, value in rest.items() if key.startswith(own)})

    @property
    def unsaved(self) -> frozenset[str]:
        """Names of weights of the deployed network that are not saved."""
        return frozenset()

    def to_dict(self) -> dict[str, Any]:
        """The content of `mixup_config.json`: the methods and their settings."""
        distillation = None if self.distiller is None else dataclasses.asdict(self.distiller.how)
        return {**self.choice.to_dict(), "mix_repeat": self.mix_repeat, "ema_decay": self.ema_decay, "distillation": distillation}

    def restore(self, folder: str | os.PathLike) -> None:
        """Loads everything that `save_pretrained` wrote. Raises ValueError for missing, unexpected or misshapen weights."""
        prefix = self._name_of(self.deployed) + "."
        wanted = {key for key in self.state_dict() if not key.startswith(prefix)}
        path = Path(folder, STATE_FOLDER, STATE_NAME)
        with told_plainly(folder):
            found = load_file(path) if path.is_file() else {}
        averaged, saved_averaged = (any(key.startswith("backbone.") for key in keys) for keys in (wanted, found))
        if self.deployed in (self.backbone, self.ema and self.ema.network) and averaged != saved_averaged:
            raise ValueError(
                f"{folder} was saved {'with' if saved_averaged else 'without'} an average of the weights (EMA), got ema_decay={self.ema_decay} "
                f"now; {'pass the ema_decay of that run' if saved_averaged else 'leave out ema_decay'}, or start a new run."
            )
        if wanted and not path.is_file():
            raise ValueError(
                f"{folder} was expected to hold {STATE_FOLDER}/{STATE_NAME} with the state of {self.choice}, got none; it is not a checkpoint of this method."
            )
        if wanted != set(found):
            odd = sorted(wanted ^ set(found))
            raise ValueError(
                f"{path} was expected to hold the state of {self.choice}, got other names ({', '.join(odd[:3])}, ...); it belongs to another method."
            )
        restore_network(self.deployed, folder, self.unsaved)
        try:
            super().load_state_dict({**self.state_dict(), **found})
        except RuntimeError as error:
            detail = str(error).splitlines()[-1].strip()
            raise ValueError(
                f"{path} was expected to fit the state of {self.choice}, got {detail}; it belongs to another network."
            ) from None

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """Always strict. A stock Trainer would continue with a half-loaded model and only a warning."""
        return super().load_state_dict(state_dict, strict=True, assign=assign)

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | os.PathLike,
        *,
        mix: str | Method | MethodChoice | Sequence[str | Method] | None = None,
        revision: str | None = None,
        token: str | None = None,
        **kwargs: Any,
    ) -> MixupModel:
        """Loads a run from its folder or the Hub, ready to train: network, methods and their state.

        After a pre-training it loads the backbone with a new classifier for `num_labels` classes.

        Args:
            mix: the methods. Needed if they are your own and their file is not imported. Default: those of the run; CutMix after a
                pre-training.
            **kwargs: arguments of the classifier's `from_pretrained`.
        """
        folder = Path(repo_or_folder)
        if not folder.is_dir():
            patterns = ["*.json", "*.safetensors", f"{STATE_FOLDER}/*"]
            folder = download_all(str(repo_or_folder), patterns, revision=revision, token=token)
        config = read_config(folder)
        path = folder / "config.json"
        saved = json.loads(path.read_text()) if path.is_file() else {}  # a folder of adapters has none
        if 0 in (saved.get("num_labels"), saved.get("num_classes")):  # the latter is timm's name
            if not (kwargs.get("num_labels") or kwargs.get("id2label")):
                raise ValueError(
                    f"a MixupModel must have classes, got {str(repo_or_folder)!r}, a pre-trained backbone without classifier; pass num_labels, "
                    "or continue the pre-training with PreTrainingModel.from_pretrained."
                )
            return cls(load_classifier(folder, **kwargs), "cutmix" if mix is None else mix)
        network = load_network(folder, **kwargs)
        fields = {key: config[key] for key in ("mix_repeat", "ema_decay") if config.get(key) is not None}
        if config.get("distillation"):
            fields |= Distillation(**config["distillation"]).arguments()
        model = cls(network, MethodChoice.from_dict(config) if mix is None else mix, **fields)
        if model.teachers:
            model.normalisation = normalisation_of(folder)
        model.restore(folder)
        return model

    def _name_of(self, module: nn.Module) -> str:
        return next(name for name, other in self.named_modules() if other is module)

    # -- what transformers and accelerate call ----------------------------------------------------------------

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs: Any) -> None:
        """Sets activation checkpointing of the backbone, also timm's, and of teachers. Raises ValueError for methods that do not work with it."""
        for network in (self.backbone, *self._averages):
            if isinstance(bare(network), PreTrainedModel):
                bare(network)._set_gradient_checkpointing(enable=enable, **kwargs)
        self.check_checkpointing(enable)

    def check_checkpointing(self, enable: bool) -> None:
        """Raises ValueError for a network or a method that does not work with activation checkpointing."""
        if enable and not self.supports_gradient_checkpointing:
            raise ValueError(
                f"activation checkpointing needs a network that has it, got {type(bare(self.backbone)).__name__}; leave out "
                "gradient_checkpointing."
            )
        for name, state in self.states.items():
            if state.changed:
                check_changeable(self.backbone, name, checkpointed=enable, changed=state.changed)

    def num_parameters(self, *args: Any, **kwargs: Any) -> int:
        """Those of the backbone. Trackers show them, and the Trainer's `total_flos` depends on them, so an average (EMA) does not count."""
        return self.backbone.num_parameters(*args, **kwargs)

    def get_input_embeddings(self):
        """Those of the backbone; None if it has none, or if it is sharded."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            from torch.distributed.fsdp import FSDPModule

            # accelerate shards them after the blocks, which would be the second time
            if any(isinstance(module, FSDPModule) for module in self.modules()):
                return None
        try:
            return self.backbone.get_input_embeddings()
        except NotImplementedError:
            return None

    def get_output_embeddings(self):
        return None

    def _init_weights(self, module):
        """All parts are already initialised."""


def check_text(network: nn.Module, methods: Sequence[Method]) -> None:
    """Raises ValueError for methods that mix token ids, and for networks that classify one token, chosen by its id."""
    for method in methods:
        if method.sample != METHODS["vanilla"].sample and not method.step.takes_tokens:
            raise ValueError(
                f"texts are mixed inside the network, got {method.name!r}, which mixes its input; use 'wordmixup', 'tmix' or 'manifoldmix'."
            )
    if is_decoder(network):
        raise ValueError(
            f"mixing texts needs an encoder, whose classifier sees the whole text, got {type(bare(network)).__name__}; use one such as BERT."
        )
