"""Which checkpoint of a run is whole, and how one is written so that nothing else is taken for it."""

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

# the Trainer writes it last, so where it is whole, all before it was written
LAST_NAME = "trainer_state.json"


def what_is_wrong(checkpoint: str | Path) -> str | None:
    """None for a whole checkpoint, else which file is missing or torn."""
    checkpoint = Path(checkpoint)
    for name in (LAST_NAME, "config.json"):
        try:
            json.loads((checkpoint / name).read_text())
        except (OSError, ValueError):
            return f"{name} is missing or torn"
    if (checkpoint / RUN_NAME).is_file() and not RunFolder(checkpoint).read():
        return f"{RUN_NAME} is torn"
    # what its run listed; a stock Trainer lists nothing, and the checks below hold for its checkpoints too
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
            return f"{path.relative_to(checkpoint)} is torn"
    # without these the Trainer would go on with a fresh optimizer, or other random numbers, and say nothing
    for kind in ("optimizer*", "scheduler*", *_random_states(checkpoint)):
        if not any(checkpoint.glob(kind)):
            return f"{kind.replace('*', '.pt')} is missing"
    for path in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]:
        if not zipfile.is_zipfile(path):
            return f"{path.name} is torn"
    return None


def _random_states(checkpoint: Path) -> list[str]:
    """Files of random streams, one for each of the run's processes."""
    processes = RunFolder(checkpoint).read().get("processes", 0)
    return ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]


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


@contextmanager
def whole_or_absent(checkpoint: Path, size: int) -> Iterator[None]:
    """Inside, a checkpoint of about `size` bytes is written; where the disk does not take it, nothing of it is left.

    Raises OSError then, which says what is lacking. Older checkpoints are as they were.
    """
    # one that is written over, after an older one was gone on with, is not whole until it is done
    for name in (LAST_NAME, RUN_NAME):
        (checkpoint / name).unlink(missing_ok=True)
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save has no error of its own for a file that it cannot write
        writing = not isinstance(error, RuntimeError) or "iostream" in str(error) or "StreamWriter" in str(error)
        if not writing or what_is_wrong(checkpoint) is None:
            raise
        shutil.rmtree(checkpoint, ignore_errors=True)
        free = shutil.disk_usage(checkpoint.parent).free
        raise OSError(
            f"{checkpoint} needs about {size} bytes that can be written, got {free} bytes free and {str(error).splitlines()[0]!r}; "
            "make room, then go on from the checkpoint before it with resume_from_checkpoint=True."
        ) from error
