"""Runs training_scripts as people do, in a process of its own.

Importing torch and transformers takes ten seconds of a CPU. So processes without a launcher are forked from one that has imported
them, and has done nothing else; everything later is as in a new process: arguments, files, standard streams, exit status.
"""

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
_servers: dict[str, subprocess.Popen] = {}


def run_script(script, *words, launcher=(), timeout=580, check=True, cwd=ROOT) -> subprocess.CompletedProcess:
    command = list(map(str, [*(launcher or [sys.executable]), ROOT / "training_scripts" / script, *words]))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    environment.pop("PYTEST_CURRENT_TEST", None)
    if launcher:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=cwd, check=False)
    else:
        done = _forked(command, timeout, environment, cwd)
    if check and done.returncode:
        raise AssertionError(f"{command} failed:\n{done.stderr[-3000:]}")
    return done


def run_mixup(*words, **settings) -> subprocess.CompletedProcess:
    return run_script("run_mixup.py", *words, **settings)


def _forked(command, timeout, environment, cwd) -> subprocess.CompletedProcess:
    """What `subprocess.run` gives. An environment has a server of its own, since packages read it when they are imported."""
    key = json.dumps(environment, sort_keys=True)
    if key not in _servers:
        server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        atexit.register(server.kill)
        _servers[key] = server
    with tempfile.TemporaryDirectory() as folder:
        request = {"words": command[1:], "cwd": str(cwd), "folder": folder, "timeout": timeout}
        _servers[key].stdin.write(json.dumps(request) + "\n")
        _servers[key].stdin.flush()
        status = json.loads(_servers[key].stdout.readline())
        stdout, stderr = ((Path(folder) / name).read_text() for name in ("stdout", "stderr"))
    if status is None:
        raise subprocess.TimeoutExpired(command, timeout, stdout, stderr)
    return subprocess.CompletedProcess(command, status, stdout, stderr)


def _serve() -> dict | None:
    """Answers requests, a line each, by the exit status. Returns in the processes that it forks, with the request."""
    while line := sys.stdin.readline():
        request = json.loads(line)
        process = os.fork()
        if process == 0:
            return request
        end = time.monotonic() + request["timeout"]
        done, status = os.waitpid(process, os.WNOHANG)
        while not done and time.monotonic() < end:
            time.sleep(0.01)
            done, status = os.waitpid(process, os.WNOHANG)
        if not done:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status) if done else None), flush=True)
    return None


def _become(request: dict) -> None:
    """This process is that of the script from here on."""
    os.setsid()
    streams = (
        os.open(os.devnull, os.O_RDONLY),
        *(os.open(f"{request['folder']}/{name}", os.O_CREAT | os.O_WRONLY) for name in ("stdout", "stderr")),
    )
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(request["cwd"])
    sys.argv = request["words"]
    sys.path[0] = str(Path(sys.argv[0]).parent)


if __name__ == "__main__":
    import datasets  # noqa: F401
    import evaluate  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import timm  # noqa: F401
    import torch._dynamo  # noqa: F401
    import torchvision  # noqa: F401
    import transformers.trainer  # noqa: F401

    import hf_mixup.evaluation.evaluate
    import hf_mixup.pretraining.trainer
    import hf_mixup.report.sweep
    import hf_mixup.training.trainer  # noqa: F401

    asked = _serve()
    if asked:
        _become(asked)
        runpy.run_path(sys.argv[0], run_name="__main__")
