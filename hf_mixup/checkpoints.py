"""Which checkpoint of a run is whole."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)


def what_is_wrong(checkpoint: str | Path) -> str | None:
    """None for a whole checkpoint, else which file is missing or torn."""
    checkpoint = Path(checkpoint)
    # the Trainer writes trainer_state.json last, so where it is whole, all before it was written
    for name in ("trainer_state.json", "config.json"):
        try:
            json.loads((checkpoint / name).read_text())
        except (OSError, ValueError):
            return f"{name} is missing or torn"
    weights = [*checkpoint.glob("*.safetensors"), *checkpoint.glob("mixup/*.safetensors")]
    if not weights:
        return "model.safetensors is missing"
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError):
            return f"{path.relative_to(checkpoint)} is torn"
    return None


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole `checkpoint-N` of a run, or None. Torn ones are passed over, and named in the log."""
    numbered = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            numbered[int(match[1])] = path
    for number in sorted(numbered, reverse=True):
        wrong = what_is_wrong(numbered[number])
        if wrong is None:
            return str(numbered[number])
        logger.warning("passing over %s: %s", numbered[number], wrong)
    return None
