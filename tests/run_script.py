"""Runs scripts as people do, in a new process, or in several.

Importing torch and transformers takes ten seconds of CPU time. So a process without a launcher is forked from one that has imported them and done
nothing else. All the rest is as in a new process: arguments, environment, files, standard streams, exit status.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# what packages read when they are imported
READ_AT_IMPORT = ("HF_", "HUGGING", "TRANSFORMERS_", "OMP_", "MKL_", "PYTHON", "TORCH", "CUDA_", "MPL")
# what scripts import
OF_TORCH = ("matplotlib.pyplot", "pandas", "pyarrow", "sklearn.metrics", "torch._dynamo", "torchvision")
OF_THE_HUB = (
    "datasets", "evaluate", "timm", "transformers.trainer", "hf_mixup.evaluation.evaluate", "hf_mixup.pretraining.trainer",
    "hf_mixup.report.sweep", "hf_mixup.training.trainer",
)  # fmt: skip
_servers: dict[str, subprocess.Popen] = {}


def run_script(script, *words, launcher=(), processes=1, timeout=580, check=True, cwd=ROOT, **changes) -> subprocess.CompletedProcess:
    """Of `training_scripts`, or by its path.

    Args:
        launcher: the words of a command that starts it.
        processes: as many as a launcher would start, without one.
        changes: of the environment.
    """
    command = list(map(str, [*(launcher or [sys.executable]), ROOT / "training_scripts" / script, *words]))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"), **changes}
    environment.pop("PYTEST_CURRENT_TEST", None)
    if launcher:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=cwd, check=False)
    else:
        done = forked(command, timeout, environment, cwd, processes=processes)
    if check and done.returncode:
        raise AssertionError(f"{command} failed:\n{done.stderr[-3000:]}")
    return done


def run_mixup(*words, **settings) -> subprocess.CompletedProcess:
    return run_script("run_mixup.py", *words, **settings)


def forked(command, timeout, environment, cwd, *, processes=1, of_torch_alone=False) -> subprocess.CompletedProcess:
    """What `subprocess.run` gives, of Python and a script, or of Python, `-c` and a program.

    Args:
        processes: with the variables by which torch's launcher tells them of each other.
        of_torch_alone: from a process that has not imported what reads the settings of the Hub, so that an environment needs no server of its own.
    """
    at_import = {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}
    key = "torch" if of_torch_alone else json.dumps(at_import, sort_keys=True)
    if key not in _servers:
        words = [sys.executable, __file__, *["torch"] * of_torch_alone]
        server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        atexit.register(_ended, server)
        _servers[key] = server
    with tempfile.TemporaryDirectory() as folder:
        request = {"words": command[1:], "cwd": str(cwd), "folder": folder, "timeout": timeout, "environment": environment}
        _servers[key].stdin.write(json.dumps({**request, "processes": processes}) + "\n")
        _servers[key].stdin.flush()
        status = json.loads(_servers[key].stdout.readline())
        stdout, stderr = ((Path(folder) / name).read_text() for name in ("stdout", "stderr"))
    if status is None:
        raise subprocess.TimeoutExpired(command, timeout, stdout, stderr)
    return subprocess.CompletedProcess(command, status, stdout, stderr)


def _ended(server) -> None:
    """Waited for, so that its time is counted as ours."""
    server.stdin.close()
    server.wait()


def _serve() -> dict | None:
    """Answers requests, a line each, by the exit status: that of the first process that fails, after which the others are ended. Returns in the
    processes that it forks, with the request."""
    while line := sys.stdin.readline():
        request = json.loads(line)
        count, running, status = request["processes"], set(), 0
        if count > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            request["environment"] |= {**place, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        for rank in range(count):
            process = os.fork()
            if process == 0:
                request["environment"] |= {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
                return request
            running.add(process)
        end = time.monotonic() + request["timeout"]
        while running and not status and time.monotonic() < end:
            done, ended = os.waitpid(-1, os.WNOHANG)
            if done:
                running.remove(done)
                status = os.waitstatus_to_exitcode(ended)
            else:
                time.sleep(0.01)
        if running and not status:
            status = None
        for process in running:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
        print(json.dumps(status), flush=True)
    return None


def _become(request: dict) -> None:
    """This process is that of the script from here on."""
    os.setsid()
    streams = (
        os.open(os.devnull, os.O_RDONLY),
        *(os.open(f"{request['folder']}/{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND) for name in ("stdout", "stderr")),
    )
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["words"]
    sys.path[0] = "" if sys.argv[0] == "-c" else str(Path(sys.argv[0]).parent)
    sys.path[1:1] = filter(None, request["environment"].get("PYTHONPATH", "").split(os.pathsep))


if __name__ == "__main__":
    for module in OF_TORCH if sys.argv[1:] == ["torch"] else (*OF_TORCH, *OF_THE_HUB):
        importlib.import_module(module)
    if sys.argv[1:] == ["torch"] and "huggingface_hub" in sys.modules:
        raise RuntimeError("nothing may have read the settings of the Hub")

    gc.collect()
    gc.freeze()  # or every process would copy them, as soon as it looks for garbage
    asked = _serve()
    if asked:
        _become(asked)
        if sys.argv[0] == "-c":
            code = sys.argv.pop(1)
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
