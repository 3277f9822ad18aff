"""Settings that must not change the training. With each, 30 losses are compared with the plain run: the largest difference, and the mean.

Processes are compared in `test_distributed.py`, resumed runs in `test_resume.py`.
"""

import pytest
import torch

from hf_mixup import METHODS
from small import NETWORKS, Images, difference, losses, trainer, weights

every_network = pytest.mark.parametrize("network", sorted(NETWORKS))


def run(folder, network, **changes):
    """A trainer that has made 30 steps."""
    done = trainer(folder, NETWORKS[network](), **{"max_steps": 30, "logging_steps": 1, "data": Images(48), **changes})
    done.train()
    return done


def apart(one, other) -> tuple[float, float]:
    """How far the losses are from each other: at most, and in the mean."""
    distance = (torch.tensor(losses(one)) - torch.tensor(losses(other))).abs()
    of_weights = difference(weights(one.mixup_model), weights(other.mixup_model))
    print(f"losses differ by {distance.max():.1e} at most, {distance.mean():.1e} in the mean; weights by {of_weights:.1e}")
    return float(distance.max()), float(distance.mean())


@every_network
def test_workers(tmp_path, network):
    plain = run(tmp_path, network)
    for more in ({}, {"dataloader_persistent_workers": True}):
        assert apart(plain, run(tmp_path, network, dataloader_num_workers=2, **more)) == (0, 0)


def test_accumulation(tmp_path):
    """16 and 4 times 4 of images that were mixed already, so that both see the same (finding F2: soft labels count as many items).

    For the ViT: batch norms see batches of other sizes.
    """
    plain = Images(48)
    pixels, targets = METHODS["cutmix"](plain.pixels, plain.labels, 4, torch.Generator().manual_seed(0))
    data = [{"pixel_values": image, "labels": target} for image, target in zip(pixels, targets, strict=True)]
    batches = [
        run(tmp_path, "vit", data=data, mix=["vanilla"], per_device_train_batch_size=batch, gradient_accumulation_steps=16 // batch)
        for batch in (16, 4)
    ]
    furthest, mean = apart(*batches)
    assert furthest < 1e-3
    assert mean < 1e-4


@pytest.mark.parametrize(
    "mix",
    [["mixup", "cutmix"], *(pytest.param([name], marks=pytest.mark.slow) for name in ("puzzlemix", "transmix", "automix"))],
    ids="+".join,
)
def test_gradient_checkpointing(tmp_path, mix):
    """For the ViT: transformers' ResNet has none."""
    plain, checkpointed = (run(tmp_path, "vit", mix=mix, gradient_checkpointing=on) for on in (False, True))
    assert checkpointed.model.backbone.vit.layers[0].gradient_checkpointing
    furthest, mean = apart(plain, checkpointed)
    assert furthest < 1e-4
    assert mean < 1e-5


@pytest.mark.slow
@every_network
def test_compile(tmp_path, network):
    compiled = run(tmp_path, network, torch_compile=True, torch_compile_backend="aot_eager")
    assert compiled.model.backbone._compiled_call_impl is not None
    furthest, mean = apart(run(tmp_path, network), compiled)
    assert furthest < 1e-4
    assert mean < 1e-5


@every_network
def test_half_precision(tmp_path, network):
    furthest, mean = apart(run(tmp_path, network), run(tmp_path, network, bf16=True))
    assert furthest < 0.1
    assert mean < 0.02
