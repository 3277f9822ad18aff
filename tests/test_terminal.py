"""What people see on a terminal of 80 columns, and what is in a log file. Recorded from a pseudo-terminal."""

import errno
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest

from run_script import ROOT

RUN = ("--max_train_samples", "120", "--max_eval_samples", "40", "--per_device_train_batch_size", "20", "--use_cpu")
ROW = re.compile(r" +\d+(\.\d+)?  +[\d.]+  +[\d.-]+  +[\d.-]+  +\d+  +\d+:\d\d")


def recorded(*words, start=("-m", "hf_mixup"), interrupt_at=None, timeout=300):
    """The exit status, and the lines that are left on the screen, of `hf-mixup`, or of a script, on a terminal of 80 x 40."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "xterm", "COLUMNS": "80", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *start, *map(str, words)]
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, cwd=ROOT, env=environment, start_new_session=True)
    os.close(child)
    text, begun = "", time.monotonic()
    while True:
        try:
            part = os.read(parent, 4096)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            break  # all that held the terminal have ended
        text += part.decode(errors="replace")
        if interrupt_at is not None and interrupt_at(text):
            os.kill(process.pid, signal.SIGINT)
            interrupt_at = None
        if not part:
            break
        assert time.monotonic() - begun < timeout
    os.close(parent)
    return process.wait(timeout), on_screen(text)


def on_screen(text):
    """The lines that stay: what a carriage return or a cursor up overwrote is gone."""
    screen, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+|\x1b", text):
        if piece == "\n":
            row, column = row + 1, 0
            screen += [""] * (row + 1 - len(screen))
        elif piece == "\r":
            column = 0
        elif piece.startswith("\x1b["):
            if piece.endswith("A"):
                row = max(0, row - int(piece[2:-1] or 1))
            elif piece.endswith("K"):
                screen[row] = screen[row][:column]
        else:
            screen[row] = screen[row].ljust(column)[:column] + piece + screen[row][column + len(piece) :]
            column += len(piece)
    return [line.rstrip() for line in screen if line.strip()]


@pytest.mark.slow
def test_a_run_a_refusal_and_an_interruption(tmp_path):
    folder, epochs = tmp_path / "run", 20  # seconds, so that the interruption comes before the end on a busy machine as well
    common = ("train", *RUN, "--num_train_epochs", epochs, "--output_dir", folder)
    status, lines = recorded(*common, interrupt_at=lambda text: len(ROW.findall(text)) >= 2)
    assert status == 1, lines
    assert lines[-1] == "hf-mixup: error: interrupted; resume with --resume_from_checkpoint True"
    assert not any("Traceback" in line for line in lines)

    status, lines = recorded(*common)
    assert status == 2
    assert lines[-1].startswith("hf-mixup: error: output_dir must be new or empty, got") or "--overwrite_output_dir" in "".join(lines[-3:])
    assert len(lines) <= 4

    status, lines = recorded(*common, "--resume_from_checkpoint", "True")
    assert status == 0, lines
    rows = [line for line in lines if ROW.fullmatch(line)]
    assert [int(row.split()[0]) for row in rows][-1] == epochs
    assert 1 <= len(rows) < epochs
    assert lines[-1].startswith("everything is in")
    assert not [line for line in lines if "{'" in line or "it/s" in line or "%|" in line]
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80


@pytest.mark.slow
def test_a_log_file_holds_rows_and_no_bars(tmp_path):
    words = [sys.executable, "-m", "hf_mixup", "train", *RUN, "--num_train_epochs", "2", "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    lines = (done.stdout + done.stderr).splitlines()
    assert [int(line.split()[0]) for line in lines if ROW.fullmatch(line)] == [1, 2]
    assert len(lines) == 10, lines
    assert not re.search(r"\x1b|\r|it/s|Warning|\{'", done.stdout + done.stderr)


@pytest.mark.slow
def test_the_script_of_texts_leaves_rows_and_no_bars(tmp_path):
    """The vocabulary is learned with a bar of its own, which stayed on the screen behind the head of the table."""
    few = ("--max_steps", 3, "--max_train_samples", 64, "--max_eval_samples", 32, "--use_cpu", "--output_dir", tmp_path / "run")
    status, lines = recorded(*few, start=("training_scripts/run_mixup_text.py",))
    assert status == 0, lines
    head = next(place for place, line in enumerate(lines) if line.startswith("   epoch"))
    assert lines[head].endswith("time left")
    assert all(ROW.fullmatch(line) for line in lines[head + 1 : -2])
