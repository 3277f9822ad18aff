"""The parser of all scripts: dataclasses become arguments, typed values are kept apart from defaults, and the help has groups."""

from __future__ import annotations

import argparse
import ast
import logging
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from typing import Any, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from hf_mixup.cli.refusals import Debug
from hf_mixup.core.checks import meant, nearest
from hf_mixup.core.secrets import keep_secret

# other common names of arguments, which are not close in spelling
OTHER_NAMES = {
    "--epochs": "--num_train_epochs",
    "--lr": "--learning_rate",
    "--batch_size": "--per_device_train_batch_size",
    "--bs": "--per_device_train_batch_size",
    "--model": "--model_name_or_path",
    "--data": "--train_dir",
    "--output": "--output_dir",
    "--method": "--mix",
}
DASHES = re.compile("[-\u2010-\u2015\u2212\ufe58\ufe63\uff0d]+")  # what editors and chats make of --
logger = logging.getLogger(__name__)
KINDS: dict[Any, str] = {int: "a whole number", float: "a number", string_to_bool: "true or false"}
_told: set[str] = set()  # sentences of this process
METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT"}


class Parser(HfArgumentParser):
    """Arguments of dataclasses.

    It takes no abbreviations, and dashes like underscores. Every error is one sentence.

    Args:
        kinds: dataclasses, each field an argument.
        prog: name of the command.
        usage: the text after it in the usage line.
        description: one sentence.
        groups: groups of the help: titles, and names of arguments, in order. Arguments in no group come last, with --help-all.
        short: names of arguments that --help shows; all if None.
        told: help texts by name, which replace those of the fields.
        without: names of fields that are not arguments here.
        choices: further values by name, for arguments whose values transformers lists.
    """

    def __init__(
        self,
        kinds: Sequence[Any],
        prog: str,
        usage: str,
        description: str,
        groups: Mapping[str, Iterable[str]] | None = None,
        short: Iterable[str] | None = None,
        told: Mapping[str, str] | None = None,
        without: Iterable[str] = (),
        choices: Mapping[str, Sequence[str]] | None = None,
    ):
        super().__init__(
            kinds,
            prog=prog,
            usage=f"{prog} {usage}",
            description=description,
            add_help=False,
            allow_abbrev=False,
            conflict_handler="resolve",
        )
        for action in [action for action in self._actions if action.dest in set(without)]:
            self._remove_action(action)
            for option in action.option_strings:
                self._option_string_actions.pop(option, None)
        self.groups = {title: list(names) for title, names in (groups or {}).items()}
        self.short = None if short is None else set(short)
        of_transformers = any(action.dest == "debug" for action in self._actions)
        # replaces transformers' own, whose value stays possible
        self.add_argument("--debug", action=Debug, nargs="*" if of_transformers else 0, help="Show the traceback of an error.")
        self.add_argument("-h", "--help", action="store_true", help="Show the usual arguments.")
        if self.short is not None:
            self.add_argument("--help_all", "--help-all", action="store_true", help="Show all arguments.")
        for action in self._actions:
            action.help = (told or {}).get(action.dest, action.help)
            if action.dest in (choices or {}):
                action.choices = [*(action.choices or ()), *(choices or {})[action.dest]]
            if action.type is string_to_bool and action.nargs is None:  # without a value it is true, also if it has no default
                action.nargs, action.const = "?", True
        self.defaults = {action.dest: action.default for action in reversed(self._actions)}
        for action in self._actions:
            action.default = argparse.SUPPRESS  # so that only typed values are parsed

    # -- reading --------------------------------------------------------------------------------------------------------

    def typed(self, argv: Sequence[str]) -> dict[str, Any]:
        """The typed values by name. From then on tokens are kept secret. Raises ValueError in one sentence."""
        asked = {"-h", "--help", "--help_all", "--help-all"} & set(argv)
        self._required(not asked)
        for word in argv:
            if not word.isascii() and not word.startswith("--") and self._option(word) in self._option_string_actions:
                raise ValueError(self._unknown(word, argv))
        found, unknown = self.parse_known_args(list(argv))
        values = vars(found)
        keep_secret(*(value for name, value in values.items() if name.endswith("token")))
        if unknown:
            raise ValueError(self._unknown(unknown[0], argv))
        for name, value in values.items():
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, float) and not math.isfinite(part):
                    raise ValueError(f"--{name} must be a finite number, got {part}; give another one.")
                if part == "" and self.defaults.get(name) != "":
                    raise ValueError(f"{name} must not be empty, got ''; leave it out, or check the variable that it comes from.")
        self._tell_of_repetitions(argv)
        return values

    def _tell_of_repetitions(self, argv: Sequence[str]) -> None:
        """What is typed several times has its last value, so that a command can be called with changes. That is said, once."""
        options = [
            self._option_string_actions[option] for word in argv if (option := word.partition("=")[0]) in self._option_string_actions
        ]
        names = [action.dest for action in options if action.nargs != 0]
        for name in dict.fromkeys(names):
            told = f"--{name} is given several times; the last one counts"
            if names.count(name) > 1 and told not in _told and os.environ.get("RANK", "0") == "0":
                _told.add(told)
                logger.warning(told)

    @staticmethod
    def _option(word: str) -> str:
        """What a word would be as the name of an argument."""
        return "--" + DASHES.sub("", word.partition("=")[0], count=1).replace("-", "_")

    def _required(self, on: bool) -> None:
        """Switches required arguments on or off, so that help is shown even if they are missing."""
        if not hasattr(self, "_needed"):
            self._needed = [action for action in self._actions if action.required]
        for action in self._needed:
            action.required = on
            if not action.option_strings:
                action.nargs = None if on else "?"

    def _unknown(self, word: str, argv: Sequence[str]) -> str:
        name = word.split("=")[0]  # the value may be a token
        own, known = self._option(word), self._option_string_actions
        if not word.startswith("-"):
            before = [word.partition("=")[0] for word in argv[: argv.index(word)] if word.partition("=")[0] in known]
            advice = "put the name of the argument before it, or quote a value with spaces."
            if own in known:
                advice = f"did you mean {own!r}?"
            elif before and known[before[-1]].nargs not in (0, "*", "+"):
                advice = f"{before[-1]} takes one value, so leave it out, or quote a value with spaces."
            elif before and known[before[-1]].nargs in ("*", "+"):
                advice = f"write {before[-1]} without = and its values with spaces between them."
            return f"every argument must start with --, got {name!r}; {advice}"
        if (other := OTHER_NAMES.get(own.lower())) in known:
            return f"every argument must be known, got {name!r}; did you mean {other!r}?"
        flags = {option for option in known if "-" not in option[2:]}
        advice = nearest(own, flags)
        return f"every argument must be known, got {name!r}; {advice if advice.startswith('did') else f'see {self.prog} --help.'}"

    def error(self, message: str) -> Any:
        """Turns an error of argparse into a one-sentence ValueError."""
        raise ValueError(in_one_sentence(message, self._option_string_actions, self.prog))

    def converted(self, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Converts values of a file as if they had been typed. Raises ValueError for a value that does not fit its argument."""
        keep_secret(*(value for name, value in values.items() if name.endswith("token") and isinstance(value, str)))
        by_name = {action.dest: action for action in reversed(self._actions)}
        hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}

        def whole(name: str, value: Any) -> Any:
            many, data = by_name[name].nargs in ("*", "+"), isinstance(value, (list, dict))
            if value is None and self.defaults.get(name) is None:
                return None
            if data and not many and {dict, list} & {get_origin(part) or part for part in get_args(hints[name])}:
                return value
            if many:
                return [one(name, item) for item in (value if isinstance(value, list) else [value])]
            return one(name, value)

        def one(name: str, value: Any) -> Any:
            action = by_name[name]
            kind, numbers = action.type, (int, float)
            if isinstance(value, bool) and kind is not string_to_bool and action.choices:
                value = "yes" if value else "no"  # as YAML reads no
            text = isinstance(value, str) or (kind not in (*numbers, string_to_bool) and type(value) in numbers)
            right = {
                int: type(value) is int,
                float: type(value) in numbers and math.isfinite(value),
                string_to_bool: isinstance(value, bool),
            }
            if right.get(kind) or (kind is str and isinstance(value, (list, dict)) and action.nargs is not None):
                return value
            try:
                found = kind(str(value)) if text and callable(kind) else None
            except (TypeError, ValueError, argparse.ArgumentTypeError):
                found = None
            if (
                found is not None
                and (not action.choices or found in action.choices)
                and not (isinstance(found, float) and not math.isfinite(found))
            ):
                return found
            if action.choices:
                raise ValueError(f"{where} must set {name} to a known choice, got {value!r}; {nearest(value, map(str, action.choices))}")
            better = meant(value, kind, one=action.nargs is None) if kind in numbers and isinstance(value, str) else []
            advice = f"write {name}: {better[0]}" if len(better) == 1 else "correct the file."
            raise ValueError(f"{where} must set {name} to {KINDS.get(kind, 'a text')}, got {value!r}; {advice}")

        return {name: whole(name, value) for name, value in values.items()}

    def built(self, values: Mapping[str, Any]) -> list[Any]:
        """The dataclasses, with these values instead of their defaults."""
        return [
            kind(**{field.name: values[field.name] for field in fields(kind) if field.init and field.name in values})
            for kind in self.dataclass_types
        ]

    # -- help -----------------------------------------------------------------------------------------------------------

    def help_if_asked(self, typed: Mapping[str, Any], values: Mapping[str, Any] | None = None) -> None:
        """If help was requested, prints it and exits. `values` are the defaults for the rest of the command line."""
        every = "help_all" in typed
        if every or "help" in typed:
            print(self.help_with(values or {}, every), end="")
            sys.exit(0)

    def help_with(self, values: Mapping[str, Any], every: bool = False) -> str:
        shown: dict[str, argparse.Action] = {}
        for action in self._actions:
            shown.setdefault(action.dest, action)
        grouped = {name for names in self.groups.values() for name in names}
        rest = [name for name in shown if name not in grouped and name not in ("help", "help_all", "debug")]
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, (), ())
        formatter.add_text(self.description)
        if values.get("recipe"):
            formatter.add_text(
                f"The defaults below are those of the recipe {values['recipe']}. Other arguments before --help may change them."
            )
        for title, names in {**self.groups, "more": rest, "help": ["help", "help_all", "debug"]}.items():
            listed = [name for name in names if name in shown and (every or self.short is None or title == "help" or name in self.short)]
            if listed:
                formatter.start_section(title)
                formatter.add_arguments([self._told(shown[name], values) for name in listed])
                formatter.end_section()
        return formatter.format_help()

    def _told(self, action: argparse.Action, values: Mapping[str, Any]) -> argparse.Action:
        """A copy of an action for the help: one spelling, a short metavar, the current default."""
        default = None if action.dest in ("help", "help_all", "debug") else values.get(action.dest, self.defaults.get(action.dest))
        text = " ".join((action.help or "").split()).replace("%", "%%").replace("%%%%", "%%")
        told = argparse.Action(
            action.option_strings[:1] if action.dest != "help" else action.option_strings,
            action.dest,
            nargs=0 if action.const is True or action.nargs == 0 or action.dest == "debug" else action.nargs,
            metavar=action.metavar or (action.dest if not action.option_strings else METAVARS.get(action.type, "NAME")),
            help=text
            + ("" if default in (None, False, "", [], argparse.SUPPRESS) else f" (default: {_shown(default)})".replace("%", "%%")),
        )
        return told

    def _get_formatter(self) -> argparse.HelpFormatter:
        return argparse.HelpFormatter(prog=self.prog, max_help_position=28)


def in_one_sentence(message: str, options: Mapping[str, argparse.Action], prog: str) -> str:
    """What argparse says of a mistake, as we say it."""
    match = re.fullmatch(r"argument ([^:]+?): (.*)", message, re.DOTALL)
    if match is None:
        needed = message.partition("required: ")[2]
        return f"{needed or 'the command line'} must be given, got nothing; see {prog} --help."
    name, said = match[1].split("/")[0], match[2]
    action = options.get(name)
    value = re.search(r"(?:value|choice|argument):? (['\"].*?['\"])(?: \(|$)", said)
    got = value[1] if value else "nothing"
    if said.startswith("invalid choice") and action is not None and action.choices:
        return f"{name} must be a known choice, got {got}; {nearest(got.strip(chr(39)), map(str, action.choices))}"
    if "expected" in said and "argument" in said:
        return f"{name} must be followed by a value, got nothing; see {prog} --help."
    if "not allowed with" in said:
        return f"{name} must stand without {said.rpartition(' ')[2]}, got both; leave one out."
    if "Truthy" in said:
        got = repr(said.partition("got ")[2].partition(" but")[0])
    if said.startswith("ignored explicit argument"):
        return f"{name} must stand alone, got {got}; leave the value out."
    kind = KINDS.get(action.type if action is not None else None, "a value of its kind")
    advice = f"see {prog} --help."
    if action is not None and action.type in (int, float):
        better = meant(ast.literal_eval(got) if value else "", action.type, one=action.nargs not in ("*", "+"))
        advice = f"write {name} {' '.join(better)}" if better else advice
    return f"{name} must be {kind}, got {got}; {advice}"


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(_shown, value))
    return str(value.value if isinstance(value, Enum) else value)
