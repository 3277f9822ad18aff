"""The folder of a run as an object: names of its files, facts of the run, and clearing it for another run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_mixup.core.secrets import redacted

RUN_NAME = "mixup_run.json"
LOG_NAME = "train_log.jsonl"
RESULTS_NAME = "all_results.json"
EVALUATION_NAME = "evaluation.json"
CARD_NAME = "README.md"
GALLERY_NAME = "gallery.png"
CURVE_NAME = "training_curve.png"
# all files that a run writes; other files in its folder belong to the user
WRITTEN = (
    RUN_NAME, LOG_NAME, RESULTS_NAME, CARD_NAME, GALLERY_NAME, CURVE_NAME, EVALUATION_NAME, "evaluation.md", "reliability.png",
    "corruptions.png", "occlusion.png", "config.json", "model*.safetensors", "model.safetensors.index.json", "preprocessor_config.json",
    "mixup_config.json", "train_results.json", "eval_results.json", "predict_results.json", "predict_results.txt", "trainer_state.json",
    "training_args.bin", "mixup", "masks", "checkpoint-*",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run: its files and facts.

    `mixup_run.json` holds the facts: seed, data (with the split), methods, command, licence, recipe and its hash, files.
    """

    path: Path

    def __init__(self, path: str | os.PathLike):
        object.__setattr__(self, "path", Path(path))

    def read(self) -> dict[str, Any]:
        """The facts; an empty dictionary if there are none."""
        try:
            found = json.loads((self.path / RUN_NAME).read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def record(self, **facts: Any) -> None:
        """Adds facts, and replaces those with the same names. The file is complete at any moment, and contains no token."""
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.path / f"_{RUN_NAME}.tmp"
        temporary.write_text(redacted(json.dumps({**self.read(), **facts}, indent=2)) + "\n")
        os.replace(temporary, self.path / RUN_NAME)

    def files(self) -> list[str]:
        """The run's files in this folder, sorted; names of folders end with a slash."""
        found = {path for pattern in WRITTEN for path in self.path.glob(pattern)}
        return sorted(f"{path.name}/" if path.is_dir() else path.name for path in found)

    @property
    def used(self) -> bool:
        """Whether the folder contains anything."""
        return self.path.is_dir() and any(self.path.iterdir())

    def check(self, argument: str = "output_dir") -> None:
        """Raises ValueError where a file is in the way of the folder that `argument` names."""
        for path in (self.path, *self.path.parents):
            if path.exists() and not path.is_dir():
                raise ValueError(f"{argument} must be a folder, got {self.path}, where {path} is a file; choose another name.")

    def clear(self) -> None:
        """Removes all files of a run. Files of the user stay."""
        for name in self.files():
            path = self.path / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    @contextmanager
    def gone_if_refused(self) -> Iterator[None]:
        """Context manager: if the block raises before anything was written, the folders that it made are removed."""
        made = [path for path in (self.path.absolute(), *self.path.absolute().parents) if not path.exists()]
        try:
            yield
        except BaseException:
            for path in made:
                with suppress(OSError):  # not empty, or does not exist
                    path.rmdir()
            raise


def facts_of(repo_or_folder: str | os.PathLike, **hub: Any) -> dict[str, Any]:
    """The facts of a run, from its folder or its repository on the Hub; an empty dictionary if there are none.

    For a checkpoint inside a run's folder it returns the facts of that run.
    """
    folder = Path(repo_or_folder).absolute()
    if folder.is_dir():
        around = RunFolder(folder.parent).read() if folder.name.startswith("checkpoint-") else {}
        return {**around, **RunFolder(folder).read()}
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        path = hf_hub_download(str(repo_or_folder), RUN_NAME, **{key: hub[key] for key in ("revision", "token", "cache_dir") if key in hub})
    except (OSError, ValueError, HfHubHTTPError):
        return {}
    return RunFolder(Path(path).parent).read()


def list_files(folder: str | os.PathLike, *beside: str) -> None:
    """Records the names of all files of a checkpoint in its `mixup_run.json`, except that file and those in `beside`."""
    folder = Path(folder)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    RunFolder(folder).record(files=[name for name in names if name not in (RUN_NAME, *beside)])


def hash_of(arguments: Mapping[str, Any]) -> str:
    """A hash of the arguments that does not depend on their order."""
    return hashlib.sha256(json.dumps(arguments, sort_keys=True, default=str).encode()).hexdigest()
