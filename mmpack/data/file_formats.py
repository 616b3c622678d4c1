"""Data files -> rows: JSON, JSON lines, CSV, Parquet and Arrow, plain or compressed, one or many.

A row is whatever one record of the file holds, usually a dict; `mmpack.data.readers` makes a `Sample` of
it. What is wrong with one record becomes the row's error, so that its neighbours stay usable; what
is wrong with the file as a whole is raised.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mmpack.errors import RowError, names

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".arrow")
MAX_LINE = 1 << 26  # bytes of one JSON line or CSV field; a row of megabytes is no conversation

_NOT_DATA = ("dataset_info.json", "state.json")  # beside the data of LLaMA-Factory and `datasets`
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file, or why it could not be read (then `content` is what there was)."""

    source: str
    number: int  # from 0, blank lines not counted
    content: Any
    error: RowError | None = None


def data_files(path: str | os.PathLike[str]) -> list[Path]:
    """The data files at a path: the file itself, or those of one type in a folder.

    Raises:
        ValueError: nothing there, no type we read, a folder with several types, or one with something named
            like a data file that cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        try:
            inside = sorted(p for p in path.iterdir() if p.name not in _NOT_DATA)
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from None
        files = [p for p in inside if _data_suffix(p) is not None and _is_file(p)]
        suffixes = sorted({str(_data_suffix(p)) for p in files})
        if not files:
            raise ValueError(f"{path} has no data files ({', '.join(SUFFIXES)})")
        if len(suffixes) > 1:
            raise ValueError(f"{path} has files of several types {suffixes}; name the ones to read")
        return files
    if not path.exists():
        raise ValueError(f"cannot read {path}: there is no such file")
    if _data_suffix(path) is None:
        raise ValueError(
            f"{path} is none of {', '.join(SUFFIXES)} (also .gz and .zst of the first three)"
        )
    return [path]


def read_rows(path: Path) -> Iterator[Row]:
    """Every record of one data file.

    Raises:
        ValueError: the file cannot be read, is not what its name says, or holds no record.
    """
    readers = {
        ".json": _json_array,
        ".jsonl": _json_lines,
        ".csv": _csv,
        ".parquet": _parquet,
        ".arrow": _arrow,
    }
    suffix = _data_suffix(path)
    assert suffix is not None, path
    row = None
    try:
        for row in readers[suffix](path):
            yield row
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path.name} is not UTF-8 (byte {error.start}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    if row is None:
        raise ValueError(f"{path.name} holds no rows")


def count_rows(path: Path) -> int | None:
    """How many rows a file has, where that is known without reading them (blank lines count too);
    for a progress bar. None: it is not known, or the file cannot be read."""
    try:
        if path.suffix == ".jsonl":
            with path.open("rb", buffering=0) as opened:
                return sum(block.count(b"\n") for block in iter(lambda: opened.read(1 << 20), b""))
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return int(pyarrow.parquet.read_metadata(path).num_rows)
    except (OSError, ValueError):
        pass
    return None


def _is_file(path: Path) -> bool:
    """Whether something in a folder that is named like a data file is one; folders are none.

    Raises:
        ValueError: a link to nothing, a file that may not be read, a pipe or a device: training without its rows
            would be a mistake.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        what = "is a link to nothing" if path.is_symlink() else "cannot be read"
        reason = "" if isinstance(error, FileNotFoundError) else f" ({error.strerror})"
        raise ValueError(
            f"{path} {what}{reason}; fix or remove it, or name the files to read"
        ) from None
    if stat.S_ISDIR(mode):
        return False
    if not stat.S_ISREG(mode) or not os.access(path, os.R_OK):
        what = "may not be read" if stat.S_ISREG(mode) else "is no regular file"
        raise ValueError(f"{path} {what}; fix or remove it, or name the files to read")
    return True


def _data_suffix(path: Path) -> str | None:
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffix = suffixes[-2] if len(suffixes) > 1 else None
        return suffix if suffix in SUFFIXES[:3] else None
    return path.suffix if path.suffix in SUFFIXES else None


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    """The file's bytes, decompressed."""
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zst":
        import pyarrow

        stream = pyarrow.input_stream(str(path), compression="zstd")
        return io.BufferedReader(stream)  # which reads lines
    opened = path.open("rb")
    start = opened.peek(4)
    for magic, name in _MAGIC.items():
        if start.startswith(magic):
            opened.close()
            raise ValueError(f"{path.name} is {name} data; give it the name of what it is")
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        opened.close()
        raise ValueError(f"{path.name} is UTF-16; save it as UTF-8")
    return opened


def parse_json(text: str) -> Any:
    """`json.loads`; whatever is wrong, nesting and endless numbers too, is a `ValueError`."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _json_array(path: Path) -> Iterator[Row]:
    with _open(path) as opened:
        text = opened.read().decode("utf-8-sig")
    try:
        rows = parse_json(text)
    except ValueError as error:
        advice = (
            "; one object a line? rename the file to .jsonl" if "Extra data" in str(error) else ""
        )
        raise ValueError(f"{path.name} is not a JSON array: {error}{advice}") from None
    if not isinstance(rows, list):
        has = f"an object with {names(rows)}" if isinstance(rows, dict) else type(rows).__name__
        raise ValueError(f"{path.name} must hold a JSON array of rows, it holds {has}")
    for number, row in enumerate(rows):
        yield Row(path.name, number, row)


def _json_lines(path: Path) -> Iterator[Row]:
    number = line_number = 0
    with _open(path) as opened:
        while line := opened.readline(MAX_LINE):
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
                if len(line) == MAX_LINE and not line.endswith(b"\n"):
                    raise ValueError(f"longer than {MAX_LINE:,} bytes")
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
                while len(line) == MAX_LINE and not line.endswith(b"\n"):
                    line = opened.readline(MAX_LINE)
            number += 1


def _bad_line(path: Path, number: int, line: bytes, problem: str, line_number: int) -> Row:
    error = RowError(f"line {line_number} {problem}", "mend or delete the line")
    return Row(path.name, number, line[:1000].decode("utf-8", errors="replace"), error)


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE)  # process-wide, and only ever larger than the default
    with _open(path) as opened, io.TextIOWrapper(opened, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text)
        number = 0
        while True:
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
                    f"line {reader.line_num} has not the {len(reader.fieldnames or [])} fields of the "
                    "first line",
                    "quote fields that hold commas",
                )
            yield Row(path.name, number, row, bad)
            number += 1


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        opened = pyarrow.parquet.ParquetFile(path)
        yield from _batches(path, opened.iter_batches(batch_size=256))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path.name} is not a Parquet file: {error}") from None


def _arrow(path: Path) -> Iterator[Row]:
    """Both of Arrow's layouts: the stream `datasets` writes, and the file format (Feather)."""
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(str(path)) as mapped:
            try:
                batches: Iterable[Any] = pyarrow.ipc.open_stream(mapped)
            except pyarrow.ArrowInvalid:
                opened = pyarrow.ipc.open_file(mapped)
                batches = (opened.get_batch(n) for n in range(opened.num_record_batches))
            yield from _batches(path, batches)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path.name} is not an Arrow file: {error}") from None


def _batches(path: Path, batches: Iterable[Any]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, 256):  # one Python row at a time would be slow
            for content in batch.slice(start, 256).to_pylist():
                yield Row(path.name, number, content)
                number += 1


def rows_or_error(rows: Iterable[Row]) -> Iterator[Row | ValueError]:
    """The rows, and after them the error that ended their file, if one did."""
    try:
        yield from rows
    except ValueError as error:
        yield error
