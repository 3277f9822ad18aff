"""Several processes: separates the arguments of `accelerate launch` from those of the script, and keeps the launcher quiet."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from hf_mixup.cli.parser import in_one_sentence
from hf_mixup.cli.refusals import Debug
from hf_mixup.core.checks import check_count, nearest
from hf_mixup.core.secrets import without_secrets

# accelerate's options for kinds of distributed training; several processes without one mean --multi_gpu
SPREADS = (
    "--multi_gpu",
    "--cpu",
    "--tpu",
    "--use_deepspeed",
    "--use_fsdp",
    "--use_megatron_lm",
    "--config_file",
    "--use_parallelism_config",
)


def launch_or_run(name: str, script: Callable[[str], ModuleType], argv: list[str]) -> None:
    """Runs the script of a command, which `script` imports: here, or by `accelerate launch` if its arguments, a config file or several GPUs ask for it.

    The command line is checked before any process starts. Exits with the status of the processes.
    """
    # both have their arguments in a module of their own, because their scripts take seconds to import
    arguments = import_module(f"hf_mixup.cli.{name}") if name in ("train", "pretrain") else script(name)
    reader = arguments.parser(f"hf-mixup {name}")
    words, launcher = divided(argv, reader._option_string_actions)
    # raises errors, or shows the help, before the script is imported, which takes seconds
    if hasattr(arguments, "settings"):
        arguments.settings(words, f"hf-mixup {name}")
    else:
        reader.help_if_asked(reader.typed(words))
    if not launcher and not asks_for_processes():
        script(name).main(words, f"hf-mixup {name}")
        return
    sys.exit(launched(launcher, name, words))


def command_of(name: str, argv: list[str], processes: int) -> str:
    """The command line that starts a script again as it was started, without secret tokens."""
    return shlex.join(["hf-mixup", name, *(["--num_processes", str(processes)] if processes > 1 else []), *without_secrets(argv)])


def asks_for_processes() -> bool:
    """Whether this machine has several GPUs, or a config file of accelerate, and no launcher has started this process."""
    from accelerate.commands.config.config_args import default_config_file

    return "LOCAL_RANK" not in os.environ and (torch.cuda.device_count() > 1 or os.path.isfile(default_config_file))


def divided(argv: list[str], own: dict[str, argparse.Action]) -> tuple[list[str], list[str]]:
    """Splits a command line into the script's words and those of accelerate's launcher. A word that both know belongs to the script.

    Raises ValueError for an unknown word that looks like one of the launcher."""
    from accelerate.commands.launch import launch_command_parser

    theirs = launch_command_parser()._option_string_actions
    words, launcher = [], []
    place = 0
    while place < len(argv):
        word = argv[place]
        option = word.partition("=")[0]
        place += 1
        if option.startswith("--") and option not in own and option not in theirs:
            advice = nearest(option, {*own, *theirs})
            if advice.startswith("did") and advice.split("'")[1] not in own:
                raise ValueError(f"every argument must be known, got {option!r}; {advice}")
        if not option.startswith("--") or option in own or option not in theirs:
            words.append(word)
            continue
        launcher.append(word)
        if "=" not in word and theirs[option].nargs != 0 and place < len(argv):
            launcher.append(argv[place])
            place += 1
    return words, launcher


def refuse(parser: argparse.ArgumentParser, name: str) -> Callable[[str], Any]:
    """In the place of the launcher's own refusals, which come after its usage."""

    def error(message: str) -> None:
        raise ValueError(in_one_sentence(message, parser._option_string_actions, f"hf-mixup {name}"))

    return error


def launched(launcher: list[str], name: str, words: list[str]) -> int:
    """Starts the processes, and returns the first exit status that is not 0."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    typed = {word.partition("=")[0].replace("-", "_").replace("__", "--", 1) for word in launcher}
    usual: list[str] = []
    if "--config_file" not in typed and not os.path.isfile(default_config_file):
        # set, because otherwise the launcher reports that it is not
        usual += [] if "--num_processes" in typed else ["--num_processes", str(max(1, torch.cuda.device_count()))]
        for option, value in (("--num_machines", "1"), ("--mixed_precision", "no"), ("--dynamo_backend", "no")):
            usual += [] if option in typed else [option, value]
    parser = launch_command_parser()
    parser.error = refuse(parser, name)
    args = parser.parse_args([*usual, *launcher, "--module", "hf_mixup.cli.launched", name, *words])
    for option in ("num_processes", "num_machines"):
        if getattr(args, option) is not None:
            check_count(1, **{option: getattr(args, option)})
    if args.config_file is not None:
        try:
            load_config_from_file(args.config_file)
        except Exception as error:  # whatever a file of another kind makes of it
            said = " ".join(str(error).split()).rstrip(".")
            raise ValueError(
                f"config_file must be a file of `accelerate config`, got {args.config_file!r} ({said}); check the path."
            ) from None
    if (args.num_processes or 1) > 1 and not typed & set(SPREADS) and "--config_file" not in typed:
        args.multi_gpu = True
    # for the started processes: the value that torch's launcher would set with a warning, and no warnings of its C++ code
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not Debug.on:
        logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    try:
        launch_command(args)
    except subprocess.CalledProcessError as error:
        return error.returncode
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode or 1
    return 0
