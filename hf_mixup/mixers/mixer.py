"""What all mixers share: they are saved, loaded and put on the Hub by themselves, as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelHubMixin, hf_hub_download
from safetensors.torch import load_file, save_file
from torch import nn

WEIGHTS_NAME = "model.safetensors"


class Mixer(nn.Module, ModelHubMixin, library_name="hf_mixup", tags=["mixup", "image-classification"]):
    """`save_pretrained`, `from_pretrained` and `push_to_hub`; the arguments of the constructor are the `config.json`."""

    def _save_pretrained(self, save_directory: Path) -> None:
        # not the Hub's class for PyTorch: it loads pickles, and weights that do not fit
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, save_directory / WEIGHTS_NAME, metadata={"format": "pt"})

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **kwargs: Any) -> Self:
        hub = {name: kwargs.pop(name) for name in ("revision", "cache_dir", "force_download", "local_files_only", "token")}
        path = Path(model_id, WEIGHTS_NAME)
        if not path.is_file():
            path = hf_hub_download(model_id, WEIGHTS_NAME, **hub)
        mixer = cls(**kwargs)
        mixer.load_state_dict(load_file(path), strict=True)
        return mixer.eval()
