"""How a script ends: an error is the last line on the screen, with exit status 2; a traceback is shown only with --debug."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from hf_mixup.core.secrets import redacted

# errors that are shown in one sentence: refused settings, and reasons that stopped a run
REFUSALS = (ValueError, ImportError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
STOPPED = (OSError, FloatingPointError, KeyboardInterrupt)
# seconds that other processes wait for the first one to show the same error; the launcher stops them meanwhile
WAIT = 15.0


class Debug(argparse.Action):
    """`--debug`: show tracebacks. With a value it is transformers' argument."""

    on = False

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        Debug.on = not values
        if values:
            setattr(namespace, self.dest, " ".join(values))


def run(main: Callable[..., None], argv: list[str], prog: str) -> int:
    """Runs `main(argv, prog)`, prints its error, and returns the exit status: 0, 1 for a run that stopped, 2 for refused settings."""
    Debug.on = False
    try:
        main(argv, prog)
    except BrokenPipeError:  # the reader of the output closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (*REFUSALS, *STOPPED) as error:
        if Debug.on:
            raise
        _tell(error, prog)
        # an error of the operating system has a number; without one, a library could not read what it was told to
        return 2 if isinstance(error, REFUSALS) or (type(error) is OSError and error.errno is None) else 1
    return 0


def _tell(error: BaseException, prog: str) -> None:
    if os.environ.get("RANK", "0") != "0":
        time.sleep(WAIT)
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # otherwise the error is printed behind it
    text = "interrupted; resume with --resume_from_checkpoint True" if isinstance(error, KeyboardInterrupt) else str(error)
    # a command to copy keeps its own line
    text = text if isinstance(error, ConnectionError) else " ".join(text.split())
    sys.stdout.flush()
    print(f"{prog.split()[0]}: error: {redacted(text) or type(error).__name__}", file=sys.stderr, flush=True)


# transformers warns about quick saves, and then sorts checkpoints by their numbers, which is right
NOISE = ("mtime may not be reliable",)


class _Redacting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


class _Screen(logging.Handler):
    """Writes to standard error, above progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if not text.startswith(NOISE):
            tqdm.write(text, file=sys.stderr)


def log_to_screen(level: int = logging.INFO) -> None:
    """Sends messages, also of libraries, to standard error as plain sentences, without tokens. Progress bars appear on a terminal only."""
    from transformers.utils import logging as of_transformers

    handler = _Screen()
    handler.setFormatter(_Redacting("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    of_transformers.disable_default_handler()
    of_transformers.enable_propagation()
    for name in ("httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they log every request to the Hub
    if not sys.stderr.isatty():
        for name in ("datasets", "huggingface_hub.utils"):
            if name in sys.modules:
                sys.modules[name].disable_progress_bars()
