"""Parquet and Arrow files -> their rows, validated before any value is read.

pyarrow trusts its input: a wrong offset in a file makes it read memory outside the array. So each batch is
validated (`validate(full=True)`) before use, and a row's size is computed before the row is made. A value that
Python cannot hold (a date in the year 20,000, an unknown time zone) becomes an `Unread`; the row is refused only
if one of its fields that mmpack reads holds one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from mmpack.data.file_bytes import need_pyarrow, num_bytes, openable
from mmpack.data.limits import MAX_ROW, most_bytes, most_rows
from mmpack.data.remote_roots import DataPath, RemotePath
from mmpack.errors import RowError

_ROWS = 256  # converted at once: one row at a time is slow
_ARROW_FILE = b"ARROW1\0\0"  # the file format's magic, before the stream
Content = tuple[Any, RowError | None]  # (row, None), or (None, why it is not read)


@dataclass(frozen=True, slots=True, repr=False)
class Unread:
    """A value that is not read. No field accepts its type, so code that reads the field refuses the row and
    shows `why`."""

    why: str

    def __repr__(self) -> str:
        return f"<{self.why}>"


def parquet_contents(path: DataPath) -> Iterator[Content]:
    """The rows of a Parquet file.

    Raises:
        ValueError: it is not a Parquet file, is damaged, or holds more than its size allows.
    """
    need_pyarrow(path)
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(openable(path)) as opened:
            about = opened.metadata  # row groups only: pyarrow 26 aborts on damaged column metadata
            groups = range(about.num_row_groups)
            claimed = sum(about.row_group(group).total_byte_size for group in groups)
            _check_size(path, claimed)
            yield from _contents(path, opened.iter_batches(batch_size=_ROWS))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path.name} is not a Parquet file: {error}") from None


def parquet_count(path: DataPath) -> int:
    """The number of rows in a Parquet file's footer.

    Raises:
        ValueError: it is not a Parquet file.
    """
    need_pyarrow(path)
    import pyarrow
    import pyarrow.parquet

    try:
        return int(pyarrow.parquet.read_metadata(openable(path)).num_rows)
    except pyarrow.ArrowException as error:  # some are not ValueErrors
        raise ValueError(f"{path.name} is not a Parquet file: {error}") from None


def arrow_contents(path: DataPath) -> Iterator[Content]:
    """The rows of an Arrow file in either layout: the stream that `datasets` writes, or the file format
    (Feather), which is a stream followed by an index.

    Raises:
        ValueError: it is not an Arrow file, is damaged, or holds more than its size allows.
    """
    need_pyarrow(path)
    import pyarrow
    import pyarrow.ipc

    try:
        is_remote = isinstance(path, RemotePath)
        source = openable(path)
        opened = pyarrow.PythonFile(source) if is_remote else pyarrow.memory_map(source)
        with closing(opened) as mapped:
            start = len(_ARROW_FILE) if mapped.read(len(_ARROW_FILE)) == _ARROW_FILE else 0
            if start:
                pyarrow.ipc.open_file(mapped)  # reads the file's end, so a cut file fails here
            mapped.seek(start)
            _check_size(path, _decompressed_bytes(pyarrow.ipc.MessageReader.open_stream(mapped)))
            mapped.seek(start)
            yield from _contents(path, pyarrow.ipc.open_stream(mapped))
    except (pyarrow.ArrowException, struct.error) as error:
        raise ValueError(f"{path.name} is not an Arrow file: {error}") from None


def _check_size(path: DataPath, claimed: int) -> None:
    size = num_bytes(path)
    if claimed > most_bytes(size):
        raise ValueError(
            f"{path.name} claims to hold {claimed:,} bytes in a file of {size:,}, too many for a data set; "
            "write it again"
        )


def _contents(path: DataPath, batches: Any) -> Iterator[Content]:
    from pyarrow import ArrowInvalid

    size = num_bytes(path)
    number, most = 0, most_rows(size)
    for batch in batches:
        last = number + batch.num_rows - 1
        if last >= most:
            raise ValueError(
                f"{path.name} claims to hold {last + 1:,} rows in a file of {size:,} bytes, "
                "too many for a data set; write it again"
            )
        try:
            batch.validate(full=True)
        except ArrowInvalid as error:
            raise ValueError(
                f"{path.name} is damaged in rows {number:,} to {last:,}: {error}; write it again"
            ) from None
        unread = [_why_unread(field.type) for field in batch.schema]
        for start in range(0, batch.num_rows, _ROWS):
            yield from _rows(batch.slice(start, _ROWS), unread)
        number = last + 1


def _rows(batch: Any, unread: list[str]) -> Iterator[Content]:
    """The rows of a batch of at most `_ROWS`; one row at a time if they are large."""
    columns = [column for column, why in zip(batch.columns, unread) if not why]
    size = sum(map(_num_bytes, columns))
    if size > MAX_ROW and batch.num_rows > 1:
        for row in range(batch.num_rows):
            yield from _rows(batch.slice(row, 1), unread)
    elif size > MAX_ROW:
        yield (
            None,
            RowError(
                f"the row takes {size:,} bytes, at most {MAX_ROW:,} are read",
                "shorten the row, or give images as paths",
            ),
        )
    else:
        names = batch.schema.names
        cells = [_cells(column, why) for column, why in zip(batch.columns, unread)]
        for row in range(batch.num_rows):
            yield dict(zip(names, [column[row] for column in cells])), None


def _cells(column: Any, why: str) -> list[Any]:
    """A column's values; each that Python cannot hold becomes an `Unread`."""
    if why:
        return [Unread(why)] * len(column)
    try:
        return list(column.to_pylist())
    except Exception:  # dates, time zones, decimals: find the values that fail, one by one
        return [_cell(value) for value in column]


def _cell(value: Any) -> Any:
    try:
        return value.as_py()
    except Exception as error:
        return Unread(f"a {value.type} that Python cannot hold: {str(error)[:100]}")


def _why_unread(kind: Any) -> str:
    """Why values of an Arrow type are not read; "" if they are. Unions, run-end encoding and list views can
    refer to the same bytes any number of times, and data sets do not use them."""
    from pyarrow import types

    if isinstance(kind, _extension_types()):
        return _why_unread(kind.storage_type)
    if types.is_dictionary(kind):
        inner = [] if not types.is_nested(kind.value_type) else [None]
    elif types.is_struct(kind):
        inner = [kind.field(place).type for place in range(kind.num_fields)]
    elif types.is_map(kind):
        inner = [kind.key_type, kind.item_type]
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = [kind.value_type]
    else:
        inner = [None] if types.is_nested(kind) or types.is_run_end_encoded(kind) else []
    if any(part is None or _why_unread(part) for part in inner):
        return f"a {str(kind)[:60]}, a type that is not read"
    return ""


def _extension_types() -> Any:
    import pyarrow

    return (pyarrow.BaseExtensionType,)


def _num_bytes(array: Any) -> int:
    """Estimated bytes of an array as Python values, before they are made: 8 per value plus the bytes of its
    texts, to which views and dictionaries may refer many times."""
    import pyarrow
    import pyarrow.compute as pc
    from pyarrow import types

    kind, own = array.type, 8 * len(array)
    if isinstance(kind, _extension_types()):
        return _num_bytes(array.storage)
    if types.is_struct(kind):
        return own + sum(_num_bytes(array.field(place)) for place in range(kind.num_fields))
    if types.is_map(kind):
        entries = slice(array.offsets[0].as_py(), array.offsets[-1].as_py())
        return own + _num_bytes(array.keys[entries]) + _num_bytes(array.items[entries])
    if types.is_nested(kind):
        return own + _num_bytes(array.flatten())
    if types.is_dictionary(kind):
        lengths = _text_lengths(array.dictionary)
        texts = None if lengths is None else pc.take(lengths, array.indices)
    else:
        texts = _text_lengths(array)
    if texts is None:
        return own
    total = pc.sum(texts.cast(pyarrow.int64())).as_py()
    return own + (total or 0)


def _text_lengths(array: Any) -> Any:
    """The length in bytes of each text of an array; None if it holds no texts."""
    import numpy as np
    import pyarrow
    import pyarrow.compute as pc
    from pyarrow import types

    kind = array.type
    if types.is_string_view(kind) or types.is_binary_view(kind):
        # each view has 16 bytes, the first 4 of which are the length
        views = np.frombuffer(array.buffers()[1] or b"", np.int32)[::4]
        lengths = pyarrow.array(views[array.offset : array.offset + len(array)])
        return pc.if_else(array.is_valid(), lengths, 0)
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind)
    is_text = is_text or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
    return pc.binary_length(array) if is_text else None


def _decompressed_bytes(messages: Any) -> int:
    """The decompressed bytes that an Arrow stream's compressed buffers claim; pyarrow would allocate all of them.

    The layout is Arrow's `Message.fbs`: each compressed buffer begins with its decompressed size as int64.
    """
    total = 0
    for message in messages:
        if message.type not in ("record batch", "dictionary"):
            continue
        data, body = message.metadata, message.body
        (root,) = struct.unpack_from("<I", data, 0)
        batch = _table(data, _field(data, root, 2))
        if message.type == "dictionary":
            batch = _table(data, _field(data, batch, 1))
        if not _field(data, batch, 3):
            continue  # not compressed: bounded by the file's size
        vector = _table(data, _field(data, batch, 2))
        (count,) = struct.unpack_from("<I", data, vector)
        for place in range(count):
            offset, length = struct.unpack_from("<qq", data, vector + 4 + 16 * place)
            if length:
                total += max(0, *struct.unpack_from("<q", body, offset))
    return total


def _field(data: Any, table: int, number: int) -> int:
    """The position of a field of a flatbuffer table; 0 if the table lacks it."""
    (back,) = struct.unpack_from("<i", data, table)
    size, *_ = struct.unpack_from("<H", data, table - back)
    if 4 + 2 * number >= size:
        return 0
    (offset,) = struct.unpack_from("<H", data, table - back + 4 + 2 * number)
    return table + offset if offset else 0


def _table(data: Any, place: int) -> int:
    """The position that a field's offset points to."""
    (offset,) = struct.unpack_from("<I", data, place)
    return place + int(offset)
