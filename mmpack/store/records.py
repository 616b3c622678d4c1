"""The small JSON files of a store, called records, validated when read.

A store may come from anywhere and is not trusted: a record must be a regular file of limited size, with a
checksum, and fit a schema. A schema is written in Python:

    int             an integer of 64 bits; range(1, 9): one of those; float: any finite number; str, bool, None
    (int, None)     one of these
    [int]           a list of any length; [int, str]: of two, in this order
    {str: int}      an object with any names
    {"a": int, "b?": str}             these names, the second may be missing; no others

or derived from a dataclass (`schema_of`); `from_record` turns a valid record into that dataclass.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from mmpack.regular_files import open_regular, regular_stat

MAX_RECORD_BYTES = 64 << 20  # the chunks of 10 million rows take 3 MiB
_CHECKSUM = "checksum of this file"
_INT64 = range(-(1 << 63), 1 << 63)
_NAMES = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    None: "null",
}


def damaged(path: str | os.PathLike[str], why: Any) -> ValueError:
    """The error for a file of a store that differs from what was written."""
    return ValueError(f"{path} is damaged: {why}; pack again with --overwrite")


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record with its checksum."""
    plain = json.loads(json.dumps(record))
    text = json.dumps({**plain, _CHECKSUM: _checksum_of(plain)}, indent=2) + "\n"
    path.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """The content of a small JSON file, not checked against a schema.

    Raises:
        ValueError: it is not a regular file, too large or not JSON.
        OSError: it cannot be read.
    """
    size = regular_stat(path).st_size
    if size > MAX_RECORD_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, at most {MAX_RECORD_BYTES:,} are read")
    with open_regular(path) as file:
        try:
            return json.loads(file.read(size))
        except RecursionError:
            raise ValueError("it is nested too deeply") from None


def read_record(path: Path, schema: Mapping[Any, Any]) -> dict[str, Any]:
    """Read a record that `write_record` wrote.

    Raises:
        ValueError: it is missing, damaged or does not fit the schema; names the file and, in the last case, the
            field.
    """
    try:
        record = read_json(path)
    except FileNotFoundError:
        raise damaged(path, "it is missing") from None
    except (OSError, ValueError) as error:
        raise damaged(path, error) from None
    return check_record(path, record, schema)


def check_record(path: Path, record: Any, schema: Mapping[Any, Any]) -> dict[str, Any]:
    """Like `read_record`, for a value from `read_json`."""
    if not isinstance(record, dict) or _CHECKSUM not in record:
        raise damaged(path, "it is not a record with a checksum")
    checksum = record.pop(_CHECKSUM)
    try:
        if checksum != _checksum_of(record):
            raise ValueError("its content has changed")
        check(record, schema, "")
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from None
    return record


def schema_of(kind: Any) -> Any:
    """The JSON schema of a dataclass or a field's type: int, float, str, bool, None; `Annotated[int, range(9)]`;
    X | None; `tuple[X, ...]`, `tuple[X, Y]`, `list[X]`; `dict[str, X]`; another dataclass."""
    if is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        return {field.name: schema_of(hints[field.name]) for field in fields(kind)}
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return inner[1]
    if origin in (Union, UnionType):
        return (None, *(schema_of(one) for one in inner if one is not NoneType))
    if origin is dict:
        return {str: schema_of(inner[1])}
    return [schema_of(one) for one in inner if one is not ...] if inner else kind


def from_record(kind: Any, value: Any) -> Any:
    """Convert a value that fits `schema_of(kind)` to that type.

    Raises:
        ValueError: the dataclass refuses its fields.
    """
    if is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        made = {name: from_record(hints[name], one) for name, one in value.items()}
        return kind(**made)  # type: ignore[operator]
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        (other,) = (one for one in inner if one is not NoneType)
        return None if value is None else from_record(other, value)
    if origin is dict:
        return {name: from_record(inner[1], one) for name, one in value.items()}
    if origin is list or ... in inner:
        return origin(from_record(inner[0], one) for one in value)
    if origin is tuple:
        return tuple(from_record(one, part) for one, part in zip(inner, value))
    return value


def _checksum_of(record: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def check(value: Any, schema: Any, place: str) -> None:
    """Check a value against a schema; `place` is its name in errors.

    Raises:
        ValueError: it does not fit; the message gives the place, the value and what is expected.
    """
    if isinstance(schema, tuple):
        for one in schema[:-1]:
            try:
                return check(value, one, place)
            except ValueError:
                continue
        return check(value, schema[-1], place)
    if isinstance(schema, Mapping):
        return _check_object(value, schema, place)
    if isinstance(schema, list):
        if not isinstance(value, list):
            raise _misfit(value, "a list", place)
        if len(schema) > 1 and len(value) != len(schema):
            raise _misfit(value, f"a list of {len(schema)}", place)
        for number, one in enumerate(value):
            check(one, schema[number if len(schema) > 1 else 0], f"{place}[{number}]")
        return None
    if isinstance(schema, range) or schema is int:
        values = schema if isinstance(schema, range) else _INT64
        if type(value) is not int or value not in values:
            raise _misfit(value, f"an integer from {values[0]} to {values[-1]}", place)
    elif schema is float:
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            raise _misfit(value, "a number", place)
    elif (value is not None) if schema is None else (type(value) is not schema):
        raise _misfit(value, _NAMES[schema], place)
    return None


def _check_object(value: Any, schema: Mapping[Any, Any], place: str) -> None:
    if not isinstance(value, dict):
        raise _misfit(value, "an object", place)
    known = {name.rstrip("?"): name for name in schema if isinstance(name, str)}
    for name in known:
        if name not in value and not known[name].endswith("?"):
            raise ValueError(f"{_joined(place, name)} is missing")
    for name, one in value.items():
        if name in known:
            check(one, schema[known[name]], _joined(place, name))
        elif str in schema:
            check(one, schema[str], _joined(place, name))
        else:
            raise ValueError(f"{_joined(place, name)} is not known")


def _joined(place: str, name: str) -> str:
    return f"{place}.{name!a:.60}" if place else f"{name!a:.60}"


def _misfit(value: Any, expected: str, place: str) -> ValueError:
    return ValueError(f"{place or 'it'} is {value!a:.40}, not {expected}")
