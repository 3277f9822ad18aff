"""Keeps tokens out of every text that people may publish: commands, cards, logs, messages."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

HIDDEN = "***"
# tokens of the Hub: 34 letters and digits after hf_
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
_known: set[str] = set()


def keep_secret(*values: str | None) -> None:
    """From now on `redacted` hides these values. Values with fewer than 4 characters are ignored."""
    _known.update(value for value in values if isinstance(value, str) and len(value) >= 4)


def redacted(text: str) -> str:
    """The text without tokens: those given to `keep_secret`, those in the environment, and anything that looks like a token of the Hub."""
    environment = (os.environ.get(name, "") for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    for value in sorted({*_known, *(value for value in environment if len(value) >= 4)}, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return _TOKEN.sub(HIDDEN, text)


def without_secrets(argv: Iterable[str]) -> list[str]:
    """A command line that is safe to publish: options named `...token` are left out, and tokens inside other words are hidden."""
    kept, secret = [], False
    for word in argv:
        name, has_value, _ = word.partition("=")
        is_token = name.startswith("--") and name.endswith("token")
        if not is_token and not (secret and not word.startswith("--")):
            kept.append(redacted(word))
        secret = is_token and not has_value
    return kept
