"""Data files -> rows: JSON, JSON lines, CSV, Parquet, Arrow and tar, plain or compressed, one or many.

A row is one record of the file, usually a dict; `mmpack.data.readers` turns it into a `Sample`. An error in one
record is stored in its `Row`, so that other rows stay usable; an error of the whole file is raised.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mmpack.data import tar_shards
from mmpack.data.columnar_files import arrow_contents, parquet_contents, parquet_count
from mmpack.data.data_paths import data_suffix
from mmpack.data.file_bytes import open_bytes, require_file
from mmpack.data.limits import MAX_DEPTH, MAX_ROW
from mmpack.data.remote_files import RemoteError, error_words
from mmpack.data.remote_roots import DataPath, RemotePath
from mmpack.data.tar_shards import TarSample
from mmpack.errors import RowError, counted, names

_LONG = f"longer than {MAX_ROW:,} bytes"


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file, or why it could not be read (`content` is then its raw text, or None)."""

    source: str
    number: int  # from 0, blank lines not counted
    content: Any
    error: RowError | None = None
    tar: TarSample | None = None  # what a tar file has beside the content


class NoRowsError(ValueError):
    """A data file that can be read and holds no record."""


def read_rows(path: DataPath) -> Iterator[Row]:
    """Every record of one data file.

    Raises:
        NoRowsError: it holds no record.
        ValueError: the file cannot be read, or does not match its suffix.
    """
    readers = {
        ".json": _json_array,
        ".jsonl": _json_lines,
        ".csv": _csv,
        ".parquet": _parquet,
        ".arrow": _arrow,
        ".tar": _tar,
    }
    suffix = data_suffix(path)
    assert suffix is not None, path
    row = None
    require_file(path)
    try:
        for row in readers[suffix](path):
            yield row
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path.name} is not UTF-8 (byte {error.start}); save it as UTF-8"
        ) from None
    except RemoteError as error:
        raise ValueError(f"{path} {'; '.join(error_words(error))}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    if row is None:
        raise NoRowsError(f"{path.name} holds no rows; remove it or fix the path")


def count_rows(path: DataPath) -> int | None:
    """The number of rows in a file, for a progress bar (blank lines count too). None: counting is not cheap, or
    the file cannot be read."""
    try:
        if path.suffix == ".jsonl" and not isinstance(path, RemotePath):
            with path.open("rb", buffering=0) as opened:
                return sum(block.count(b"\n") for block in iter(lambda: opened.read(1 << 20), b""))
        if path.suffix == ".parquet":
            return parquet_count(path)
    except (OSError, ValueError):
        pass
    return None


def parse_json(text: str) -> Any:
    """`json.loads` that raises `ValueError` for any bad input, including deep nesting and huge numbers."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check_depth(value, text.count("[") + text.count("{"))
    return value


def _check_depth(value: Any, num_opened: int) -> None:
    """
    Args:
        num_opened: an upper bound on the number of lists and objects in the value.

    Raises:
        ValueError: it is nested too deeply to be sent between processes.
    """
    if num_opened <= MAX_DEPTH:
        return
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        nested = [
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))
        ]
        level = [inner for values in nested for inner in values]
    if level:
        raise ValueError(f"nested too deeply, at most {MAX_DEPTH} levels are read")


_SPACE = re.compile(r"[ \t\n\r]*")


def _json_array(path: DataPath) -> Iterator[Row]:
    """The rows of a JSON array. The whole text is in memory; rows are parsed one at a time."""
    with open_bytes(path) as opened:
        text = opened.read().decode("utf-8-sig")
    start = _SPACE.match(text, 0).end()  # type: ignore[union-attr]
    has = ""
    try:
        if not text.startswith("[", start):
            value = parse_json(text)
            is_object = isinstance(value, dict)
            has = f"an object with {names(value)}" if is_object else type(value).__name__
            text, start = "[]", 0
        for number, (content, begin, end) in enumerate(_array_items(text, start + 1)):
            try:
                if end - begin > MAX_ROW:
                    raise ValueError(_LONG)
                _check_depth(content, text.count("[", begin, end) + text.count("{", begin, end))
            except ValueError as error:
                bad = RowError(f"the row is {error}", "shorten or delete the row")
                yield Row(path.name, number, text[begin : min(end, begin + 1000)], bad)
            else:
                yield Row(path.name, number, content)
    except ValueError as error:
        advice = (
            "; one object a line? rename the file to .jsonl" if "Extra data" in str(error) else ""
        )
        raise ValueError(f"{path.name} is not a JSON array: {error}{advice}") from None
    if has:
        raise ValueError(f"{path.name} must hold a JSON array of rows, got {has}")


def _array_items(text: str, place: int) -> Iterator[tuple[Any, int, int]]:
    """Yield (item, start of its text, end of its text) of a JSON array; `place` is just after its `[`."""

    def skip(place: int) -> int:
        return _SPACE.match(text, place).end()  # type: ignore[union-attr]

    decode = json.JSONDecoder().raw_decode
    place = skip(place)
    if not text.startswith("]", place):
        while True:
            try:
                item, end = decode(text, place)
            except RecursionError:
                raise ValueError(f"nested too deeply at character {place:,}") from None
            yield item, place, end
            place = skip(end)
            if not text.startswith(",", place):
                break
            place = skip(place + 1)
    if not text.startswith("]", place):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
    if skip(place + 1) != len(text):
        raise json.JSONDecodeError("Extra data", text, skip(place + 1))


def _json_lines(path: DataPath) -> Iterator[Row]:
    number = line_number = 0
    with open_bytes(path) as opened:
        while line := opened.readline(MAX_ROW):
            line_number += 1
            if line_number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
                if line.lstrip()[:1] == b"[":
                    raise ValueError(
                        f"{path.name} holds a JSON array, not lines; rename it to .json"
                    )
            if not line.strip():
                continue
            try:
                if len(line) == MAX_ROW and not line.endswith(b"\n"):
                    raise ValueError(_LONG)
                yield Row(path.name, number, parse_json(line.decode("utf-8")))
            except UnicodeDecodeError as error:
                yield _bad_line(
                    path,
                    number,
                    line,
                    f"is not UTF-8 (byte {error.start} of the line)",
                    line_number,
                )
            except ValueError as error:
                yield _bad_line(path, number, line, f"is not JSON: {error}", line_number)
                while len(line) == MAX_ROW and not line.endswith(b"\n"):
                    line = opened.readline(MAX_ROW)
            number += 1


def _bad_line(path: DataPath, number: int, line: bytes, problem: str, line_number: int) -> Row:
    error = RowError(f"line {line_number} {problem}", "fix or delete the line")
    return Row(path.name, number, line[:1000].decode("utf-8", errors="replace"), error)


class _CsvLines:
    """Lines for a CSV reader, limited to `MAX_ROW` bytes per row: an unclosed quote would read the whole file."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self.row_length = 0  # characters read since the caller last reset it

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._text.readline(MAX_ROW)
        self.row_length += len(line)
        if self.row_length >= MAX_ROW:
            raise csv.Error(_LONG)
        if not line:
            raise StopIteration
        return line


def _csv(path: DataPath) -> Iterator[Row]:
    csv.field_size_limit(MAX_ROW)  # process-wide; larger than the default
    with (
        open_bytes(path) as opened,
        io.TextIOWrapper(opened, encoding="utf-8-sig", newline="") as text,
    ):
        lines = _CsvLines(text)
        reader = csv.DictReader(lines)
        number = 0
        while True:
            lines.row_length = 0
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise ValueError(
                    f"{path.name} is not CSV (line {reader.line_num}): {error}"
                ) from None
            bad = None
            if None in row or None in row.values():
                bad = RowError(
                    f"line {reader.line_num} does not have the {counted(len(reader.fieldnames or []), 'field')} "
                    "of the first line",
                    "quote fields that contain commas",
                )
            yield Row(path.name, number, row, bad)
            number += 1


def _parquet(path: DataPath) -> Iterator[Row]:
    for number, (content, error) in enumerate(parquet_contents(path)):
        yield Row(path.name, number, content, error)


def _arrow(path: DataPath) -> Iterator[Row]:
    for number, (content, error) in enumerate(arrow_contents(path)):
        yield Row(path.name, number, content, error)


def _tar(path: DataPath) -> Iterator[Row]:
    for number, (content, error, sample) in enumerate(tar_shards.tar_rows(path, parse_json)):
        yield Row(path.name, number, content, error, sample)


def memory_rows(rows: Any) -> Iterator[Row]:
    """Rows in memory. If iteration fails at a row (a `datasets` image column whose file is missing), later rows
    are read by index, so that they stay usable."""
    number = 0
    try:
        for content in rows:
            yield Row("rows", number, content)
            number += 1
        return
    except (OSError, ValueError):
        if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
            raise
    while number < len(rows):
        try:
            row = Row("rows", number, rows[number])
        except (OSError, ValueError) as error:
            bad = RowError(
                f"the data set cannot load the row: {str(error)[:300]}", "fix or drop the row"
            )
            row = Row("rows", number, None, bad)
        yield row
        number += 1


def rows_or_error(rows: Iterable[Row]) -> Iterator[Row | ValueError]:
    """The rows, followed by the error that ended their file, if there was one."""
    try:
        yield from rows
    except ValueError as error:
        yield error
