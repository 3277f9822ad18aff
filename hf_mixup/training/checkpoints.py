"""Which checkpoints of a run are complete, and writing one so that an incomplete one is never used."""

from __future__ import annotations

import json
import logging
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hf_mixup.report.run_folder import RUN_NAME, RunFolder

logger = logging.getLogger(__name__)

# the Trainer writes it last, so if it is complete, all other files are written
LAST_NAME = "trainer_state.json"


def what_is_wrong(checkpoint: str | Path) -> str | None:
    """None for a complete checkpoint, else the file that is missing or corrupted."""
    checkpoint = Path(checkpoint)
    for name in (LAST_NAME, "config.json"):
        try:
            json.loads((checkpoint / name).read_text())
        except (OSError, ValueError):
            return f"{name} is missing, incomplete or corrupted"
    if (checkpoint / RUN_NAME).is_file() and not RunFolder(checkpoint).read():
        return f"{RUN_NAME} is incomplete or corrupted"
    # the files that its run listed; a stock Trainer lists none, and the checks below cover its checkpoints
    for name in RunFolder(checkpoint).read().get("files", ()):
        if not (checkpoint / name).exists():
            return f"{name} is missing"
    if not any(checkpoint.glob("*.safetensors")):
        return "model.safetensors is missing"
    for path in [*checkpoint.glob("*.safetensors"), *checkpoint.glob("mixup/*.safetensors")]:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError):
            return f"{path.relative_to(checkpoint)} is incomplete or corrupted"
    # without these the Trainer would silently continue with a fresh optimizer, or other random numbers
    for kind in ("optimizer*", "scheduler*", *_random_states(checkpoint)):
        if not any(checkpoint.glob(kind)):
            return f"{kind.replace('*', '.pt')} is missing"
    for path in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]:
        if not zipfile.is_zipfile(path):
            return f"{path.name} is incomplete or corrupted"
    return None


def _random_states(checkpoint: Path) -> list[str]:
    """Names of the files of random streams, one for each process of the run."""
    processes = RunFolder(checkpoint).read().get("processes", 0)
    return ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete `checkpoint-N` of a run, or None. Others are skipped, and named in the log."""
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


@contextmanager
def whole_or_absent(checkpoint: Path, size: int) -> Iterator[None]:
    """Context manager in which a checkpoint of about `size` bytes is written. If the disk is full, no part of it stays.

    Then it raises OSError, which says how much space is missing. Older checkpoints are not changed.
    """
    # after resuming from an older checkpoint, an existing one is overwritten; it is incomplete until that is done
    for name in (LAST_NAME, RUN_NAME):
        (checkpoint / name).unlink(missing_ok=True)
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save has no specific error for a file that it cannot write
        writing = not isinstance(error, RuntimeError) or "iostream" in str(error) or "StreamWriter" in str(error)
        if not writing or what_is_wrong(checkpoint) is None:
            raise
        shutil.rmtree(checkpoint, ignore_errors=True)
        free = shutil.disk_usage(checkpoint.parent).free
        raise OSError(
            f"{checkpoint} needs about {size} bytes that can be written, got {free} bytes free and {str(error).splitlines()[0]!r}; "
            "make room, then resume from the previous checkpoint with resume_from_checkpoint=True."
        ) from error
