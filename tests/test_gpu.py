"""What must hold on an accelerator as on the CPU. Without an accelerator, `HF_MIXUP_DEVICE=cpu` runs the same tests on the CPU."""

import copy
import os

import pytest
import torch
from torch.testing import assert_close

from hf_mixup import METHODS, MixupModel, MixupTrainer, get_method
from hf_mixup.core.plan import onehot
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import MixKey
from hf_mixup.method import needs_of_model
from small import Images, arguments, difference, losses, network_for, weights

DEVICE = os.environ.get("HF_MIXUP_DEVICE") or (torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else None)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE is None, reason="needs an accelerator")]
every_method = pytest.mark.parametrize("name", sorted(METHODS))
FEW = {"supermix": {"max_iter": 2}}  # steps of its search
DRAWS_ON_THE_DEVICE = ("fmix",)  # noise of the images' size
# what makes the host wait until the device is done
WAITS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize", "Memcpy DtoH")


def batch(count=8, size=16, num_labels=4):
    rng = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, size, size, generator=rng), torch.arange(count) % num_labels


def model_of(name):
    return MixupModel(network_for(name), get_method(name, **FEW.get(name, {}))).to(DEVICE).train()


@pytest.mark.parametrize("name", [name for name in sorted(METHODS) if not needs_of_model(METHODS[name])])
def test_plans_are_those_of_the_cpu(name):
    images, labels = batch()
    for step in range(5):
        plans = [
            METHODS[name].sample.plan(
                images.shape, MixKey(1, 0, step).own_rng(), Signals(device, images=images.to(device), targets=onehot(labels, 4).to(device))
            )
            for device in ("cpu", DEVICE)
        ]
        here, there = (plan.to("cpu") for plan in plans)
        assert torch.equal(here.index, there.index)
        assert_close(here.weight, there.weight, atol=1e-5, rtol=0)
        if name not in DRAWS_ON_THE_DEVICE:
            assert_close(here.dense_mask((16, 16)), there.dense_mask((16, 16)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_method
def test_steps(name, dtype):
    """Losses and gradients are numbers, in every dtype of autocast."""
    model, (images, labels) = model_of(name), (part.to(DEVICE) for part in batch())
    for step in range(3):
        model.zero_grad()
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            out = model(pixel_values=images, labels=labels, mix_key=MixKey(0, 0, step, 0, 0, 10))
        out.loss.backward()
        assert torch.isfinite(out.loss)
        assert torch.isfinite(out.losses).all()
        assert torch.isfinite(out.targets).all()
        assert out.targets.device.type == DEVICE
        found = [p.grad for p in model.parameters() if p.grad is not None]
        assert found
        assert all(torch.isfinite(gradient).all() for gradient in found)


@pytest.mark.parametrize("name", ["vanilla", "mixup", "cutmix", "resizemix", "gridmix", "tokenmix"])
def test_losses_are_those_of_the_cpu(name):
    images, labels = batch()
    model = model_of(name)
    outs = []
    for device in ("cpu", DEVICE):
        own = copy.deepcopy(model).to(device)
        outs.append(own(pixel_values=images.to(device), labels=labels.to(device), mix_key=MixKey(0, 0, 1, 0, 0, 10)))
    here, there = outs
    assert_close(there.targets.cpu(), here.targets)
    assert_close(there.losses.cpu(), here.losses, atol=1e-3, rtol=1e-3)


@every_method
def test_no_host_wait_in_a_step(name):
    """By the profiler: forward and backward only hand work to the device."""
    if DEVICE != "cuda":
        pytest.skip("needs CUDA")
    from torch.profiler import ProfilerActivity, profile

    model, (images, labels) = model_of(name), (part.to(DEVICE) for part in batch())

    def step(number):
        model(pixel_values=images, labels=labels, mix_key=MixKey(0, 0, number, 0, 0, 10)).loss.backward()

    for number in range(3):
        step(number)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step(3)
    found = {event.key: event.count for event in seen.key_averages() if any(wait in event.key for wait in WAITS)}
    found = {key: count - ("DeviceSynchronize" in key) for key, count in found.items()}  # one of the profiler itself
    assert not {key: count for key, count in found.items() if count > 0}


@pytest.mark.parametrize("name", ["cutmix", "puzzlemix", "transmix", "automix"])
@pytest.mark.parametrize("how", ["plain", "bf16", "compiled"])
def test_trainer(tmp_path, name, how):
    """A run on the device moves the weights, and keeps its loss a number."""
    if how == "bf16" and DEVICE == "cpu":
        pytest.skip("emulated on CPUs")
    network = network_for(name)
    before = weights(network)
    more = {"plain": {}, "bf16": {"bf16": True}, "compiled": {"torch_compile": True}}[how]
    args = arguments(tmp_path, mix=[name], max_steps=3, logging_steps=1, use_cpu=DEVICE == "cpu", **more)
    done = MixupTrainer(network, args, train_dataset=Images(24))
    done.train()
    assert args.device.type == DEVICE
    assert all(0 < loss < 20 for loss in losses(done))
    assert difference(before, {key: value.cpu() for key, value in weights(done.mixup_model.backbone).items()}) > 0
