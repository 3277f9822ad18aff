"""The base of mixers: each can be saved, loaded and pushed to the Hub on its own, as safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelHubMixin, hf_hub_download
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_mixup.core.hub import download_all, told_plainly

WEIGHTS_NAME = "model.safetensors"
RUN_FOLDER = "mixup"  # subfolder of a run with everything except its classifier


class Mixer(nn.Module, ModelHubMixin, library_name="hf_mixup", tags=["mixup", "image-classification"]):
    """`save_pretrained`, `from_pretrained` and `push_to_hub`; the constructor's arguments are saved in `config.json`."""

    def _save_pretrained(self, save_directory: Path) -> None:
        # not the Hub's class for PyTorch, because that loads pickles, and weights that do not fit
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, save_directory / WEIGHTS_NAME, metadata={"format": "pt"})

    @property
    def folder_name(self) -> str:
        return type(self).__name__.lower()

    def save_beside(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Writes the mixer of a run into a subfolder of the run's `folder`. `weights` are gathered by the caller."""
        place = folder / self.folder_name
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_text(json.dumps(self._hub_mixin_config, indent=2) + "\n")
        save_file(weights, place / WEIGHTS_NAME, metadata={"format": "pt"})
        return place

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Loads a mixer that was saved on its own, or that of a run, from a folder or the Hub. Arguments as in `ModelHubMixin`."""
        inside = f"{RUN_FOLDER}/{cls.__name__.lower()}"
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            hub = {name: kwargs[name] for name in ("revision", "cache_dir", "local_files_only", "token") if name in kwargs}
            folder = download_all(str(pretrained_model_name_or_path), [f"{inside}/*", "config.json"], **hub)
        found = folder / inside if (folder / inside).is_dir() else pretrained_model_name_or_path
        with told_plainly(pretrained_model_name_or_path, kwargs.get("revision")):
            return super().from_pretrained(found, **kwargs)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **kwargs: Any) -> Self:
        hub = {name: kwargs.pop(name) for name in ("revision", "cache_dir", "force_download", "local_files_only", "token")}
        path = Path(model_id, WEIGHTS_NAME)
        if not path.is_file():
            path = hf_hub_download(model_id, WEIGHTS_NAME, **hub)
        mixer = cls(**kwargs)
        mixer.load_state_dict(load_file(path), strict=True)
        return mixer.eval()
