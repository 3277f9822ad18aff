"""Several processes: what they share, what they must not share, and that all end (fault rows 26 to 28)."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_mixup import METHODS, MixupModel, MixupTrainer
from run_script import run_script
from small import Images, arguments, difference, losses, vit, weights

SCRIPTS = Path(__file__).parent / "scripts"
LAUNCH = [
    Path(sys.executable).parent / "accelerate", "launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
    "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip
FSDP = [
    "--use_fsdp",
    "--fsdp_version",
    "2",
    "--fsdp_auto_wrap_policy",
    "TRANSFORMER_BASED_WRAP",
    "--fsdp_cpu_ram_efficient_loading",
    "false",
]
# of a run whose losses are compared with others'
CURVE = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1}


def launch(*words, timeout=240) -> subprocess.CompletedProcess:
    """Two processes on the CPU. A hang ends in TimeoutExpired."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])),
    }
    return subprocess.run(list(map(str, [*LAUNCH, *words])), timeout=timeout, check=False, env=environment, capture_output=True, text=True)


def both(folder, done, prefix="") -> list[dict]:
    """What the processes left. Judged by the files: torch may abort at exit after all work is done."""
    paths = [folder / f"{prefix}rank{rank}.json" for rank in range(2)]
    assert all(path.is_file() for path in paths), done.stderr[-3000:]
    return [json.loads(path.read_text()) for path in paths]


def of_two(script, folder, *words, timeout=240) -> subprocess.CompletedProcess:
    """What `launch` gives, by the variables of a launcher alone: without the time of importing everything three times."""
    changes = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2]))}
    return run_script(SCRIPTS / script, folder, *words, processes=2, timeout=timeout, check=False, **changes)


def two_processes(folder, *words) -> list[dict]:
    return both(folder, of_two("two_processes.py", folder, *words))


class InTurn(MixupTrainer):
    """One process that does what two would, one after the other: their batches are its micro-batches, and it has their keys.

    As under DDP, both begin with the buffers that the first one ended with.
    """

    ended = ()

    def _next_key(self):
        key = super()._next_key()
        if key.micro_step == 0:
            self._put(self.ended)
            self.begun = self._buffers()
        else:
            self.ended = self._buffers()
            self._put(self.begun)
        self._last_key = key._replace(rank=key.micro_step, micro_step=0)
        return self._last_key

    def _buffers(self) -> list[dict]:
        return [{name: value.clone() for name, value in module.named_buffers(recurse=False)} for module in self.mixup_model.modules()]

    def _put(self, saved: Sequence[dict]) -> None:
        for module, buffers in zip(self.mixup_model.modules(), saved, strict=False):
            module._buffers.update(buffers)


def in_turn(folder, method) -> list[float]:
    run = InTurn(vit(), arguments(folder, mix=[method], gradient_accumulation_steps=2, **CURVE), train_dataset=Images(32))
    run.train()
    return losses(run)


@pytest.fixture(scope="module", params=["device", "collator"])
def seen(request, tmp_path_factory):
    """By mixup and cutmix, on the device and in the collator: 37 images in batches of 4 on either process."""
    return request.param, *two_processes(tmp_path_factory.mktemp("two"), request.param)


def test_row_26_processes_draw_for_themselves(seen):
    _, one, two = seen
    assert one["lams"] != two["lams"]
    unmixed = {(1.0,) * 4}  # pairs of one class
    assert not ({*map(tuple, one["lams"])} & {*map(tuple, two["lams"])}) - unmixed


def test_row_27_processes_choose_alike(seen):
    collation, one, two = seen
    assert one["methods"] == two["methods"]
    assert collation == "collator" or set(one["methods"]) == {"mixup", "cutmix"}
    assert one["checksum"] == pytest.approx(two["checksum"], abs=1e-9)


def test_row_28_uneven_last_batch_does_not_hang(seen):
    _, one, two = seen
    assert one["steps"] == two["steps"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method(tmp_path, name):
    """Both processes end with the same weights, at an uneven end too; their losses are those of one process with their plans."""
    one, two = two_processes(tmp_path, "device", name)
    assert one["steps"] == two["steps"] == 5
    assert one["methods"] == two["methods"] == [name] * 5
    assert one["checksum"] == pytest.approx(two["checksum"], abs=1e-9)
    if name not in ("vanilla", "attentivemix"):  # of the four cells of its feature map, attentivemix nearly always takes one
        assert one["lams"] != two["lams"]
    assert one["losses"] == two["losses"]
    apart = (torch.tensor(one["losses"]) - torch.tensor(in_turn(tmp_path / "turn", name))).abs()
    print(f"{name}: losses differ by at most {apart.max():.1e}, {apart.mean():.1e} in the mean")
    assert apart.max() < 1e-4


def unmixed(folder, *methods) -> None:
    one, two = both(folder, of_two("unmixed.py", folder, *methods, timeout=580))
    assert len(one) == 2 * len(methods)
    for name in one:
        assert one[name]["steps"] == two[name]["steps"] == 10
        assert one[name]["checksum"] == pytest.approx(two[name]["checksum"], abs=1e-9), name


def test_a_mixer_waits_for_no_gradient_of_an_unmixed_batch(tmp_path):
    """With activation checkpointing, `mix_rate` below 1 and `mix_off_epoch`, both processes train through."""
    unmixed(tmp_path, "automix")


@pytest.mark.slow
def test_every_method_with_unmixed_batches(tmp_path):
    unmixed(tmp_path, *sorted(METHODS))


@pytest.mark.slow
def test_an_accumulated_batch_is_the_mean_over_all_its_images_on_all_processes(tmp_path):
    """Weights and logged losses are those of one process that has all images, whatever the sizes of micro-batches on either."""
    methods = ["vanilla", "mixup", "automix"]
    done = of_two("uneven.py", tmp_path, *methods)
    assert all((tmp_path / f"rank{rank}.pt").is_file() for rank in range(2)), done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for method in methods:
        model = MixupModel(vit(), method).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for step in range(2):
            parts = [
                part for rank in ranks for part in zip(rank[method]["batches"], rank[method]["keys"], strict=True) if part[1][2] == step
            ]
            assert len(parts) == 6
            count = sum(len(batch["labels"]) for batch, _ in parts)
            total = 0.0
            for batch, key in parts:
                loss = model(**batch, mix_key=key).loss * len(batch["labels"]) / count
                loss.backward()
                total += loss.item()
            optimizer.step()
            optimizer.zero_grad()
            model.after_optimizer_step(step, 2)
            for rank in ranks:
                assert rank[method]["losses"][step] == pytest.approx(total, rel=1e-4), method
        for rank in ranks:
            assert difference(rank[method]["weights"], weights(model.backbone)) < 1e-5, method
    assert all(rank["ddp"] == [3, True, True, "gloo"] for rank in ranks)


@pytest.mark.slow
def test_fsdp(tmp_path):
    """FSDP2 trains as one process would, and goes on to the bit: by input gradients, attention, a teacher and a mixer, too."""
    methods = ["cutmix", "puzzlemix", "transmix", "automix"]
    done = launch(*FSDP, "--fsdp_state_dict_type", "FULL_STATE_DICT", SCRIPTS / "fsdp.py", tmp_path, *methods, timeout=580)
    for method in methods:
        for seen in both(tmp_path, done, f"{method}-"):
            assert seen["sharded"], "or this is a test of DDP"
            assert seen["difference"] == 0
            apart = (torch.tensor(seen["losses"]) - torch.tensor(in_turn(tmp_path / "turn", method))).abs()
            print(f"{method}: losses differ by at most {apart.max():.1e}, {apart.mean():.1e} in the mean")
            assert apart.max() < 1e-4
        _, report = AutoModelForImageClassification.from_pretrained(tmp_path / method / "checkpoint-4", output_loading_info=True)
        assert not report["missing_keys"]


@pytest.mark.slow
def test_fsdp_that_would_leave_no_model_is_refused(tmp_path):
    done = launch(*FSDP, "--fsdp_state_dict_type", "SHARDED_STATE_DICT", SCRIPTS / "fsdp.py", tmp_path, "cutmix")
    assert "ValueError: FSDP must gather the weights that it saves, got StateDictType.SHARDED_STATE_DICT" in done.stderr
