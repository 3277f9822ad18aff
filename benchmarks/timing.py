"""Common code of the benchmarks: contenders that take turns, also of an older commit; ratios with their spread; memory; results as JSON."""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Rows = dict[str, dict[str, Any]]


def parse(doc: str, rounds: int, **more: dict[str, Any]) -> argparse.Namespace:
    """The arguments of a benchmark: common ones, and `more` by name."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="number of threads of torch on the CPU")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--quick", action="store_true", help="a short run on small data, to see that it works")
    parser.add_argument("--json", help="also write the figures there")
    parser.add_argument("--before", help="folder of an older checkout, to compare with it")
    parser.add_argument("--serve", action="store_true", help="time contenders for another process, see the class Before")
    for name, settings in more.items():
        parser.add_argument(f"--{name}", **settings)
    args = parser.parse_args()
    args.rounds = 2 if args.quick else args.rounds
    torch.set_num_threads(args.threads)
    # as in a process that trains: after something larger was freed, the allocator does not take new pages for every small batch
    torch.empty(2**22)  # less than 32 MiB, because larger blocks always get new pages
    return args


def now(device: str = "cpu") -> float:
    """The time in seconds. On one CPU thread it is the CPU time of this process, which other load does not change."""
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


class Timed:
    """The seconds of a call: by the given clock, and elapsed."""

    def __init__(self, run: Callable[[], object], clock: Callable[[], float]):
        self.run, self.clock = run, clock

    def __call__(self, calls: int) -> tuple[float, float]:
        start, began = self.clock(), time.perf_counter()
        for _ in range(calls):
            self.run()
        return (self.clock() - start) / calls, (time.perf_counter() - began) / calls


class Before:
    """The contenders of an older checkout of hf_mixup. The same script runs in its own process, and times a contender on request.

    Args:
        folder: of the checkout.
        label: added to their names.
        words: arguments of the script.
    """

    def __init__(self, folder: str, label: str, words: list[str]):
        environment = {**os.environ, "PYTHONPATH": folder}
        command = [sys.executable, sys.argv[0], "--serve", *words]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.names, self.label = json.loads(self.process.stdout.readline()), label

    def contenders(self, group: str = "") -> dict[str, Callable[[int], tuple[float, float]]]:
        """The contenders whose names begin with `group`, without that beginning."""
        return {
            f"{name.removeprefix(group)}, {self.label}": functools.partial(self._timed, name)
            for name in self.names
            if name.startswith(group)
        }

    def _timed(self, name: str, calls: int) -> tuple[float, float]:
        print(json.dumps([name, calls]), file=self.process.stdin, flush=True)
        return tuple(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        # sent, not only closed: forked workers of this process hold the pipe too
        print("null", file=self.process.stdin, flush=True)
        self.process.wait()


def serve(contenders: Mapping[str, Callable[[], object]], clock: Callable[[], float] = time.process_time) -> None:
    """The other side of `Before`; returns when the benchmark is over."""
    print(json.dumps(list(contenders)), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked is None:
            return
        name, calls = asked
        print(json.dumps(Timed(contenders[name], clock)(calls)), flush=True)


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    device: str = "cpu",
    clock: Callable[[], float] | None = None,
    before: Mapping[str, Callable[[int], tuple[float, float]]] | None = None,
) -> Rows:
    """Times the contenders in turns, so that what else the machine does falls on all alike.

    Rows of `ms`, elapsed `wall_ms`, and `ratio`, to the first contender in the same turn: medians with their quartiles. A turn repeats
    what is shorter than 5 ms, after a call that warms its caches up. `clock` stands for `now` where the work is not this process's
    alone. `before` are contenders of an older commit, see `Before`.
    """
    clock = clock or functools.partial(now, device)
    timed = {**{name: Timed(run, clock) for name, run in contenders.items()}, **(before or {})}
    calls = {}
    for name, run in timed.items():
        run(1)
        calls[name] = math.ceil(5e-3 / max(run(1)[0], 1e-6))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, run in timed.items():
            if calls[name] > 1:
                run(1)
            seconds[name].append(run(calls[name]))
    rows = _compared({name: [counted for counted, _ in pairs] for name, pairs in seconds.items()})
    for name, pairs in seconds.items():
        rows[name]["wall_ms"] = spread([1000 * wall for _, wall in pairs])
    return rows


def reported(contenders: Mapping[str, Callable[[], float]], rounds: int) -> Rows:
    """The same of contenders that return the seconds they took; the first turn warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            value = run()
            if turn:
                seconds[name].append(value)
    return _compared(seconds)


def _compared(seconds: Mapping[str, list[float]]) -> Rows:
    first = seconds[next(iter(seconds))]
    return {
        name: {"ms": spread([1000 * value for value in values]), "ratio": spread([a / b for a, b in zip(values, first, strict=True)])}
        for name, values in seconds.items()
    }


def spread(values: list[float]) -> list[float]:
    """First quartile, median, third quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def peak_memory(run: Callable[[], object], device: str = "cpu") -> float | None:
    """MB that a call needs at most, beyond what was there before; None where the system does not tell."""
    run()
    if device != "cpu":
        torch.accelerator.synchronize()
        torch.accelerator.memory.reset_peak_memory_stats()
        before = torch.accelerator.memory.memory_allocated()
        run()
        return (torch.accelerator.memory.max_memory_allocated() - before) / 2**20
    if not sys.platform.startswith("linux"):
        return None
    ctypes.CDLL(None).malloc_trim(0)  # otherwise memory that is free but not returned would hide what a call needs
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def tree(root: int | None = None) -> list[int]:
    """This process and those that it has started, and theirs; on Linux."""
    found, waiting = [], [root or os.getpid()]
    while waiting:
        process = waiting.pop()
        found.append(process)
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            waiting += map(int, children.read_text().split())
    return found


def cpu_of_tree() -> float:
    """Seconds of processor time of this process and all that it has started, those that have ended too."""
    total = 0
    for process in tree():
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        total += sum(map(int, fields[11:15]))  # own and of ended children, user and system
    return total / os.sysconf("SC_CLK_TCK")


def memory_of(processes: list[int]) -> dict[str, float]:
    """MB of processes, on average: resident in all, of it not shared with any other, and in shared memory files."""
    rows = []
    for process in processes:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
        rollup = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in text.splitlines()[1:]}
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines() if ":" in line)
        shared = int(status["RssShmem"].split()[0]) / 1024
        rows.append((rollup["Rss"], rollup["Private_Clean"] + rollup["Private_Dirty"], shared))
    return {
        name: statistics.mean(values) for name, values in zip(("resident_mb", "own_mb", "shared_mb"), zip(*rows, strict=True), strict=True)
    }


def _resident(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def show(title: str, rows: Rows) -> None:
    first = next(iter(rows))
    print(f"\n{title}\n  {'':44s}{'ms':>9s}   x {first} (quartiles)")
    for name, row in rows.items():
        ratio = "{1:6.2f} ({0:.2f} to {2:.2f})".format(*row["ratio"]) if "ratio" in row else ""
        others = "".join(f"   {key} {value:.2f}" for key, value in row.items() if isinstance(value, float))
        print(f"  {name:44s}{row['ms'][1]:9.2f}   {ratio:24s}{others}", flush=True)


def device_name(device: str) -> str:
    return "cpu" if device == "cpu" else torch.get_device_module(device).get_device_name()


def write(args: argparse.Namespace, figures: Mapping[str, Any]) -> None:
    """The figures and what they were taken on, where `--json` says."""
    if args.json:
        machine = {
            "device": device_name(args.device),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": args.threads,
            "torch": torch.__version__,
            "clock": "CPU time of the process" if args.device == "cpu" and args.threads == 1 else "elapsed time",
        }
        Path(args.json).write_text(json.dumps({**machine, "rounds": args.rounds, "figures": figures}, indent=2) + "\n")
