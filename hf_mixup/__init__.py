"""Mixup methods for training image models with Hugging Face: collator, model, trainer, methods."""

from importlib import import_module

__version__ = "0.1.0"

# loaded when first used: `import hf_mixup` needs neither transformers, timm nor torchvision
_HOME = {
    "METHODS": "methods",
    "Method": "methods",
    "MethodChoice": "methods",
    "get_method": "methods",
    "MixPlan": "core.plan",
    "blend": "core.plan",
    "mix_targets": "core.plan",
    "MixupCollator": "data.collator",
    "MixupLoss": "data.collator",
    "MixupCallback": "data.collator",
    "MixupModel": "model",
    "MixupTrainer": "training.trainer",
    "MixupTrainingArguments": "arguments",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOME[name] not in ("methods", "core.plan"):
        import_module(f"{__name__}.core.checks").check_torchvision()  # before transformers stumbles over it
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
