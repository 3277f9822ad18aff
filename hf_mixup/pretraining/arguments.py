"""The settings of a pre-training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from hf_mixup.arguments import MixupTrainingArguments, parse_json, value_of
from hf_mixup.core.checks import check_between, check_count, check_known
from hf_mixup.method import fields_of
from hf_mixup.methods import MethodChoice
from hf_mixup.pretraining.pretexts import BASES, PRETEXTS, pretext
from hf_mixup.pretraining.views import STYLES

# arguments of training with labels that have no meaning here
WITHOUT_EFFECT = (
    "mix_prob", "mode", "loss", "mix_rate", "mix_repeat", "mix_off_epoch", "ema_decay", "ema_warmup_epochs", "repeated_augmentation",
    "label_smoothing_factor", "label_names", "bf16_full_eval", "fp16_full_eval", "distill_from", "distillation_weight", "distillation_temperature", "hard_distillation",
)  # fmt: skip
# options of timm's LARS, but for those that have arguments of their own
SWITCHES = ("nesterov", "trust_clip")
LARS = {
    **dict.fromkeys(("momentum", "dampening", "trust_coeff", "eps"), float),
    **dict.fromkeys(SWITCHES, {"true": True, "false": False}.__getitem__),
}


@dataclass
class PreTrainingArguments(MixupTrainingArguments):
    """`MixupTrainingArguments` for pre-training without labels.

    Raises:
        ValueError: for pretexts and settings that contradict each other.
    """

    mix: list[str] = field(
        default_factory=lambda: ["imix"],
        metadata={"help": f"How to mix: {', '.join(PRETEXTS)}, or a method that needs images only, such as cutmix, which i-Mix then uses."},
    )
    base: str = field(default="moco", metadata={"help": f"The contrastive method: {', '.join(BASES)}."})
    base_args: dict | str | None = field(
        default=None, metadata={"help": 'Hyper-parameters of the base, as JSON: \'{"temperature": 0.1, "queue_size": 4096}\'.'}
    )
    views: str = field(default="mocov2", metadata={"help": f"Augmentation of the two views: {', '.join(STYLES)}."})
    knn_neighbours: int = field(default=200, metadata={"help": "Number of neighbours that vote in the kNN monitor."})
    knn_temperature: float = field(default=0.1, metadata={"help": "Temperature of their votes."})
    predictor_constant_lr: bool = field(
        default=False, metadata={"help": "Keep the predictor's learning rate constant, without the schedule (SimSiam)."}
    )
    knn_asked_by: list[str] = field(default_factory=list, init=False)  # names of typed arguments that have no effect without it
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Leave out images that do not fill a batch; pre-training needs this."}
    )

    def __post_init__(self):
        self.base_args = parse_json("base_args", self.base_args)
        check_known("views", self.views, STYLES)
        check_count(1, knn_neighbours=self.knn_neighbours)
        check_between(1e-3, 1e3, knn_temperature=self.knn_temperature)
        fields = {f.name: f for f in dataclasses.fields(self)}
        for name in WITHOUT_EFFECT:
            default = fields[name].default
            if getattr(self, name) != default:
                raise ValueError(f"{name} has no effect on pre-training, got {getattr(self, name)!r}; leave it out.")
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "knn_top1"  # not the loss, which evaluation does not have
        if self.load_best_model_at_end and self.metric_for_best_model.removeprefix("eval_").split("_knn")[0] == "loss":
            raise ValueError(
                "the best model is that of knn_top1, got metric_for_best_model='loss', which evaluation does not have; leave it out."
            )
        schedule = value_of(self.lr_scheduler_type)
        if self.predictor_constant_lr and schedule in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError(
                f"predictor_constant_lr is for schedules that are functions of the step, got lr_scheduler_type={schedule!r}; choose another."
            )
        # transformers has no LARS, and refuses unknown names
        lars, options = self.optim == "lars", self.optim_args
        if lars:
            self.optim, self.optim_args = "sgd", None
        super().__post_init__()
        if lars:
            self.optim, self.optim_args = "lars", options
            self.lars_options()
        if not self.dataloader_drop_last:
            raise ValueError("pre-training needs batches of one size, got dataloader_drop_last=False; leave it out.")
        if self.predictor_constant_lr and getattr(self.method_choice().methods[0].step, "predictor", None) is None:
            raise ValueError(f"predictor_constant_lr is for bases with a predictor, got {self.base!r}; leave it out.")

    def lars_options(self) -> dict[str, Any]:
        """What `optim_args` says of timm's LARS, such as `momentum=0.9,trust_coeff=0.001`."""
        found: dict[str, Any] = {}
        for pair in filter(None, (self.optim_args or "").replace(" ", "").split(",")):
            name, _, value = pair.partition("=")
            check_known("optim_args of lars", name, LARS)
            try:
                found[name] = LARS[name](value.lower())
            except (KeyError, ValueError):
                kind = "True or False" if name in SWITCHES else "a number"
                raise ValueError(f"optim_args of lars must give {name} {kind}, got {value!r}; write such as momentum=0.9.") from None
        return found

    def method_choice(self, loss: Any = None) -> MethodChoice:
        """The pretext, as a choice of one method."""
        mix = [self.mix] if isinstance(self.mix, str) else list(self.mix)
        if len(mix) != 1:
            raise ValueError(f"pre-training takes one way of mixing, got {mix}; choose one.")
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in (self.base_args or {}).items()}
        named = {"base": self.base != type(self).base, "base_args": bool(fields)}
        if not isinstance(mix[0], str) and any(named.values()):
            given = next(name for name, is_given in named.items() if is_given)
            raise ValueError(
                f"{given} must come with a pretext by name, got the object {mix[0].name!r}; leave out {given}, and set it there."
            )
        method = mix[0] if not isinstance(mix[0], str) else pretext(mix[0], self.base, **fields)
        if self.alpha is not None and "alpha" not in fields_of(method.sample):
            raise ValueError(f"alpha is for policies that have one, got {self.alpha} for {method.name!r}; leave it out.")
        return MethodChoice.build(method, None, self.alpha, self.mix_args)
