"""What keeps training fast: no breaks in compiled graphs, no waiting for the device, a benchmark that runs."""

import contextlib
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from hf_mixup import METHODS, MixupModel
from hf_mixup.core.rng import MixKey
from hf_mixup.method import needs_of_model
from hf_mixup.policies import fmix, puzzlemix
from hf_mixup.steps import noisymix, patchup
from small import resnet, trainer, vit

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("mix", "network"), [("mixup cutmix", resnet), ("transmix", vit), ("puzzlemix", resnet)])
def test_mixing_breaks_no_graph_and_compiles_nothing_again(tmp_path, mix, network):
    """`--torch_compile`: the first step compiles the backbone, those of other plans use what is there."""
    torch._dynamo.reset()
    counters.clear()
    compiled = {}

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            compiled[state.global_step] = counters["stats"]["unique_graphs"]

    settings = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 4}
    trainer(tmp_path, network(), mix=mix.split(), callbacks=[Count()], **settings).train()
    assert not counters["graph_break"]
    assert compiled[1] >= 1
    assert compiled[4] == compiled[1]


# their pairs or masks are found by search on the host
READ_THE_DEVICE = {"comixup", "supermix", "guidedmixup"}


@pytest.mark.parametrize("name", METHODS)
def test_no_step_waits_for_the_device(name, monkeypatch):
    """On the device `meta`, whose tensors have no values: whatever the host would have to wait for raises."""
    # it has neither random numbers nor autocast
    for module in (fmix, puzzlemix, noisymix, patchup):
        monkeypatch.setattr(module, "normal", lambda size, rng, device="cpu": torch.empty(size, device=device))
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    method, images, labels = METHODS[name], torch.empty(8, 3, 16, 16, device="meta"), torch.zeros(8, dtype=torch.long, device="meta")
    if not needs_of_model(method):
        mixed, targets = method(images, labels, num_labels=4)
        assert mixed.device.type == targets.device.type == "meta"
    for network in (vit, resnet):
        try:
            model = MixupModel(network(), method).to("meta").train()
        except ValueError:
            continue  # no method of attention for a ResNet
        with (
            pytest.raises((RuntimeError, NotImplementedError), match="meta tensor") if name in READ_THE_DEVICE else contextlib.nullcontext()
        ):
            model(pixel_values=images, labels=labels, mix_key=MixKey(0, 0, 3, 0, 0, 10)).loss.backward()
