"""`mmpack train --options FILE`: options in a YAML file -> words of the command line, in front of those passed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mmpack.cli.options import TrainOptions, flag

_SAME = {"steps": "max_steps"}  # one option, two names


def expanded(words: Sequence[str]) -> list[str]:
    """The words of `mmpack train` with those of its option file. An option that is also passed replaces the
    file's.

    Raises:
        ValueError: the file cannot be read, or has a key that is no option or has no value.
    """
    place = next((n for n, word in enumerate(words) if word.partition("=")[0] == "--options"), None)
    if place is None or words[0] != "train":
        return list(words)
    _, equals, path = words[place].partition("=")
    if not equals:
        if place + 1 == len(words):
            return list(words)  # the parser says that a value is missing
        path = words[place + 1]
    passed = {_name(word.partition("=")[0][2:]) for word in words if word.startswith("--")}
    read: list[str] = []
    for key, value in _read(path).items():
        if _name(key) not in passed:
            read += _words(path, key, value)
    return [words[0], *read, *words[1:]]


def _name(key: str) -> str:
    name = key.replace("-", "_")
    return _SAME.get(name, name)


def _read(path: str) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
        """Refuses a key that is given twice, where YAML's libraries forget the first."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{path}: {twice[0]} is given twice; give it once")
            mapping: dict[Any, Any] = super().construct_mapping(node, deep)
            return mapping

    try:
        found = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} has no options; write one per line, as learning_rate: 1e-5")
    return {str(key): value for key, value in found.items()}


def _words(path: str, key: str, value: Any) -> Iterator[str]:
    """The words of one option."""
    from mmpack.hf.training_options import argument_names

    name = key.replace("-", "_")
    ours = {one.name for one in fields(TrainOptions) if one.metadata} - {"options"}
    theirs = set(argument_names())
    if name not in ours | theirs:
        close = get_close_matches(name, ours | theirs, 1)
        guess = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"{path}: {key} is not an option of mmpack train or TrainingArguments{guess}"
        )
    if value is None:
        raise ValueError(f"{path}: {key} has no value; give it one, or leave it out")
    if name not in ours:
        if isinstance(value, list):
            yield from (f"--{name}", *map(str, value))
        else:
            yield f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"
    elif isinstance(value, bool):
        if value:
            yield flag(name)
    elif isinstance(value, dict) and name == "eval_data":
        for inner, one in value.items():
            yield from (
                f"{flag(name)}={inner}={path}" for path in ([one] if isinstance(one, str) else one)
            )
    elif isinstance(value, dict):  # --template-arg, --source-weight
        yield from (f"{flag(name)}={inner}={json.dumps(one)}" for inner, one in value.items())
    else:
        values = value if isinstance(value, list) else [value]
        yield from (f"{flag(name)}={one}" for one in values)
