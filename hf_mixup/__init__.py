"""Mixup methods for training image models with Hugging Face: collator, model, trainer, methods."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # for type checkers and editors; at run time these names are loaded below, on first use
    from hf_mixup.arguments import MixupTrainingArguments
    from hf_mixup.core.plan import MixPlan, blend, mix_targets
    from hf_mixup.data.callback import MixupCallback
    from hf_mixup.data.collator import MixupCollator
    from hf_mixup.data.loss import MixupLoss
    from hf_mixup.methods import METHODS, Method, MethodChoice, get_method
    from hf_mixup.model import MixupModel
    from hf_mixup.pretraining.arguments import PreTrainingArguments
    from hf_mixup.pretraining.model import PreTrainingModel
    from hf_mixup.pretraining.pretexts import pretext
    from hf_mixup.pretraining.trainer import MixupPreTrainer
    from hf_mixup.training.trainer import MixupTrainer

# loaded on first use, so `import hf_mixup` does not need transformers, timm or torchvision
_HOME = {
    "METHODS": "methods",
    "Method": "methods",
    "MethodChoice": "methods",
    "get_method": "methods",
    "MixPlan": "core.plan",
    "blend": "core.plan",
    "mix_targets": "core.plan",
    "MixupCollator": "data.collator",
    "MixupLoss": "data.loss",
    "MixupCallback": "data.callback",
    "MixupModel": "model",
    "MixupTrainer": "training.trainer",
    "MixupTrainingArguments": "arguments",
    "MixupPreTrainer": "pretraining.trainer",
    "PreTrainingArguments": "pretraining.arguments",
    "PreTrainingModel": "pretraining.model",
    "pretext": "pretraining.pretexts",
}
__all__ = [
    "METHODS",
    "Method",
    "MethodChoice",
    "MixPlan",
    "MixupCallback",
    "MixupCollator",
    "MixupLoss",
    "MixupModel",
    "MixupPreTrainer",
    "MixupTrainer",
    "MixupTrainingArguments",
    "PreTrainingArguments",
    "PreTrainingModel",
    "__version__",
    "blend",
    "get_method",
    "mix_targets",
    "pretext",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOME[name] not in ("methods", "core.plan"):
        import_module(f"{__name__}.core.checks").check_torchvision()  # before transformers fails with an unclear error
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
