"""Mixers: networks that turn the features of a batch into masks."""

from importlib import import_module

_HOME = {"MixBlock": "mixblock", "AdaptiveMask": "adaptive_mask"}
__all__ = list(_HOME)


# loaded on first use, because the Hub's client is slow to import and most methods need no mixer
def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
