"""Trainings in processes that a test may kill. They are forked from a process that has imported everything, so each takes a second."""

import logging
import multiprocessing
import os
import random
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from hf_mixup import MixupTrainer
from hf_mixup.training.checkpoints import last_complete_checkpoint, what_is_wrong
from small import Images, difference, network_for, trainer, vit, weights

context = multiprocessing.get_context("forkserver")
STEPS = 8
# in the order in which they are written
FILES = (
    "config.json",
    "model.safetensors",
    "mixup_config.json",
    "mixup/state",
    "mixup_run.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state",
    "trainer_state.json",
)


def by(folder: Path, method: str) -> MixupTrainer:
    """A training by a method, which saves at every step."""
    network = vit(dropout=0.1) if method == "cutmix" else network_for(method)  # dropout draws from the global stream
    return trainer(
        folder, network, Images(38), mix=[method], max_steps=STEPS, save_strategy="steps", save_steps=1, per_device_train_batch_size=4,
        eval_strategy="no",
    )  # fmt: skip


def train(folder: Path, make: Callable[[Path], MixupTrainer], rank: int, processes: int, port: int) -> None:
    """Trains, or goes on; leaves the final weights. Runs in a process of its own."""
    torch.set_num_threads(1)
    output = os.open(folder / f"output{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    logging.basicConfig(level=logging.WARNING)
    if processes > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    run = make(folder)
    (folder / f"begun{rank}").touch()
    run.train(resume_from_checkpoint=last_complete_checkpoint(folder) is not None)
    if rank == 0:
        torch.save(weights(run.mixup_model), folder / "weights.tmp")
        os.replace(folder / "weights.tmp", folder / "weights.pt")
    run.accelerator.end_training()
    os._exit(0)  # not through atexit: gloo sometimes aborts there


class Training:
    """All processes of a training, started. `make` gives the trainer of a folder, which saves at each of its STEPS."""

    def __init__(self, folder: Path, make: Callable[[Path], MixupTrainer], processes: int):
        folder.mkdir(exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folder = folder
        self.children = [context.Process(target=train, args=(folder, make, rank, processes, port)) for rank in range(processes)]
        for child in self.children:
            child.start()

    def wait(self, timeout: float = 300) -> dict[str, torch.Tensor]:
        """The final weights."""
        for child in self.children:
            child.join(timeout)
            assert child.exitcode == 0, (child.exitcode, (self.folder / "output0.txt").read_text()[-3000:])
        return torch.load(self.folder / "weights.pt", weights_only=True)

    def kill(self, rng: random.Random) -> None:
        """All of them, one shortly after the other."""
        for child in rng.sample(self.children, len(self.children)):
            child.kill()
            time.sleep(rng.uniform(0, 0.05))
        for child in self.children:
            child.join(60)

    def until(self, reached) -> None:
        """Waits until something is there, or all is over."""
        while not reached() and any(child.is_alive() for child in self.children):
            time.sleep(0.0005)


def kill_somewhere(training: Training, rng: random.Random, seconds: float, files: Sequence[str]) -> str | None:
    """Kills it at a random time of its run, which takes about `seconds`, or as soon as one of the `files` of some checkpoint is there.

    Returns what is wrong with the newest checkpoint, None for nothing.
    """
    folder = training.folder
    if files:
        step, name = rng.randint(1, STEPS), rng.choice(files)
        training.until(lambda: any((folder / f"checkpoint-{step}").glob(f"{name}*")))
    else:
        training.until((folder / "begun0").exists)
        time.sleep(rng.uniform(0, seconds))
    training.kill(rng)
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    wrong = what_is_wrong(checkpoints[-1]) if checkpoints else None
    return wrong and f"{checkpoints[-1]}: {wrong}"


def ends_alike(folder: Path, make: Callable[[Path], MixupTrainer], processes: int, points: int) -> None:
    """SIGKILL at random places, every other one inside a checkpoint that is being written; the resumed run ends as one that was not killed."""
    begun = time.monotonic()
    whole = Training(folder / "whole", make, processes).wait()
    seconds = time.monotonic() - begun
    files = [name for name in FILES if any((folder / "whole/checkpoint-1").glob(f"{name}*"))]
    seed = random.SystemRandom().randrange(2**32)
    rng, torn = random.Random(seed), 0
    print(f"seed {seed}, a whole run takes {seconds:.1f} s")
    for point in range(points):
        cut = Training(folder / f"cut{point}", make, processes)
        wrong = kill_somewhere(cut, rng, seconds, files if point % 2 == 0 else ())
        resumed = Training(cut.folder, make, processes)
        assert difference(whole, resumed.wait()) == 0, f"point {point}: {wrong}"
        if wrong:
            torn += 1
            assert f"passing over {wrong}" in (cut.folder / "output0.txt").read_text()
    print(f"{points} points, {torn} of them left a torn checkpoint, which was passed over by name")
    assert torn >= points // 5


def start_server() -> None:
    """The process that all are forked from. It is told where the tests are by the environment alone."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context.set_forkserver_preload(["killed", "pretrained"])
    multiprocessing.forkserver.ensure_running()
    nothing = context.Process(target=int)
    nothing.start()
    nothing.join()  # it has imported everything by now
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
