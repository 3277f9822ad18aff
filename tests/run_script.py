"""Runs training_scripts as people do, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_script(script, *words, launcher=(), timeout=580, check=True, cwd=ROOT) -> subprocess.CompletedProcess:
    command = [*(launcher or [sys.executable]), ROOT / "training_scripts" / script, *map(str, words)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=timeout, env=environment, cwd=cwd, check=False)
    if check and done.returncode:
        raise AssertionError(f"{command} failed:\n{done.stderr[-3000:]}")
    return done


def run_mixup(*words, **settings) -> subprocess.CompletedProcess:
    return run_script("run_mixup.py", *words, **settings)
