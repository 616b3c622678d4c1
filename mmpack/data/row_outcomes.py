"""Rows -> their samples, or why they cannot be used; many rows at once where images are in object storage.

Reading a row there waits for the headers of its images, so as many rows are read at a time as a process may have
objects in flight. The order of rows and of errors is that of one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from mmpack.data.file_formats import Row
from mmpack.data.remote_files import IN_FLIGHT, in_parallel
from mmpack.errors import RowError
from mmpack.types import Sample

if TYPE_CHECKING:
    from mmpack.data.readers import RowReader  # which uses this

Outcome = tuple[Row, list[Sample] | RowError]


def outcomes(reader: RowReader, rows: Iterable[Row]) -> Iterator[Outcome]:
    """The samples of each row, or the error that refuses it."""

    def outcome(row: Row) -> Outcome:
        try:
            return row, reader.samples(row)
        except RowError as error:
            return row, error

    return in_parallel(outcome, rows) if reader.waits else map(outcome, rows)


def chunk_size(reader: RowReader) -> int:
    """How many rows to read before the first is used, where nothing else says it."""
    return 4 * IN_FLIGHT if reader.waits else 1
