"""The command line: its parser, built from the options' dataclasses."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mmpack.cli.examples import (
    CHECK_EXAMPLES,
    CODES,
    DEMO_EXAMPLES,
    ENV_EXAMPLES,
    INSPECT_EXAMPLES,
    MERGE_EXAMPLES,
    PACK_EXAMPLES,
    TRAIN_EXAMPLES,
    TUNE_EXAMPLES,
)
from mmpack.cli.option_file import expanded
from mmpack.cli.options import (
    CheckOptions,
    DemoOptions,
    EnvOptions,
    InspectOptions,
    MergeOptions,
    Options,
    PackOptions,
    TrainOptions,
    TuneOptions,
    flag,
)

_METAVARS = {int: "N", float: "N", str: "PATH"}
COMMANDS: dict[str, tuple[type[Options], str]] = {  # options, examples
    "check": (CheckOptions, CHECK_EXAMPLES),
    "pack": (PackOptions, PACK_EXAMPLES),
    "merge": (MergeOptions, MERGE_EXAMPLES),
    "inspect": (InspectOptions, INSPECT_EXAMPLES),
    "train": (TrainOptions, TRAIN_EXAMPLES),
    "tune": (TuneOptions, TUNE_EXAMPLES),
    "demo": (DemoOptions, DEMO_EXAMPLES),
    "env": (EnvOptions, ENV_EXAMPLES),
}


def parse(words: Sequence[str] | None = None) -> tuple[str, Options]:
    """Parse words into (command, options). Dashes and underscores in option names are equivalent.

    Raises:
        ValueError: options contradict each other, or the option file of `mmpack train` cannot be used.
        SystemExit: an option is unknown or malformed, or help was requested.
    """
    parser = command_line()
    known = {flag(one.name) for kind, _ in COMMANDS.values() for one in fields(kind)}
    dashed = []
    words = sys.argv[1:] if words is None else words
    for word in expanded(words):
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        dashed.append(name + equals + value if name in known else word)
    _refuse_unknown(parser, dashed)
    namespace, rest = parser.parse_known_args(dashed)
    given: dict[str, Any] = vars(namespace)
    given |= {name: tuple(one) for name, one in given.items() if isinstance(one, list)}
    command: str = given.pop("command")
    given["given"] = frozenset(given)
    kind = COMMANDS[command][0]
    if kind is TrainOptions:
        given |= {"training": tuple(rest), "words": tuple(words)}
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return command, kind(**given)


def _refuse_unknown(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Name the first option that the command does not have, before argparse says what else is missing because of
    it. `mmpack train` has those of TrainingArguments, too, and names them itself."""
    command = words[0] if words else ""
    if command not in COMMANDS or command == "train":
        return
    known = [flag(one.name) for one in fields(COMMANDS[command][0]) if one.metadata]
    for word in words[1:]:
        name = word.partition("=")[0]
        if word == "--":
            return
        if name.startswith("--") and name not in (*known, "--help"):
            close = get_close_matches(name, known, 1)
            guess = f"; did you mean {close[0]}?" if close else f"; see mmpack {command} --help"
            parser.exit(
                2, f"mmpack {command}: error: {name} is not an option of mmpack {command}{guess}\n"
            )


def command_line() -> argparse.ArgumentParser:
    """The parser of `mmpack`, built from `COMMANDS`; it stores the chosen command in `command`."""
    package = sys.modules["mmpack"]
    parser = argparse.ArgumentParser(
        prog="mmpack",
        description=package.__doc__,
        epilog=f"{CODES}\n\nmmpack COMMAND --help shows examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mmpack {package.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, (kind, examples) in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=kind.__doc__,
            description=kind.__doc__,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,  # defaults come from the dataclass
        )
        _add_options(added, kind)
    return parser


def _add_options(parser: argparse.ArgumentParser, kind: type[Options]) -> None:
    """Add a command's own options, then a group for each base class with options, named by its docstring."""
    hints = get_type_hints(kind)
    left = {one.name: one for one in fields(kind) if one.metadata}
    groups: dict[str, Any] = {str(kind.__doc__): parser}
    either: dict[str, Any] = {}
    for part in kind.__mro__:
        title = str(part.__doc__).partition("\n")[0]
        for name in [name for name in inspect.get_annotations(part) if name in left]:
            one = left.pop(name)
            argument = {**_taken(hints[name]), **one.metadata}
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            place = groups[title]
            if which := argument.pop("either", ""):
                if which not in either:
                    either[which] = place.add_mutually_exclusive_group()
                place = either[which]
            if argument.get("nargs") == "+":  # several values per use
                argument["action"] = "extend"
            if argument.pop("positional", False):
                argument.pop("action", None)
                place.add_argument(name, **argument)
            else:
                argument.setdefault("action", _Once)
                place.add_argument(flag(name), required=one.default is MISSING, **argument)


class _Once(argparse.Action):
    """Store a value, as argparse does, but refuse a second one instead of forgetting the first."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        if hasattr(namespace, self.dest):  # the parser sets no defaults
            first = getattr(namespace, self.dest)
            parser.error(f"{option_string} is given twice, {first} and {values}; pass it once")
        setattr(namespace, self.dest, values)


def _taken(kind: Any) -> dict[str, Any]:
    """Arguments of `add_argument` for a field's type: a bool is a flag, a tuple a repeatable option."""
    if kind is bool:
        return {"action": "store_true"}
    inner = [one for one in get_args(kind) if one is not NoneType]
    if get_origin(kind) is Literal:
        return {"choices": inner}
    if get_origin(kind) is tuple:
        return {**_taken(inner[0]), "action": "append"}
    return _taken(inner[0]) if inner else {"type": kind, "metavar": _METAVARS[kind]}
