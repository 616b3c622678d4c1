"""Data files as the source of a stream: which worker reads which file, and where it is in it.

If there are at least as many files as workers of all ranks, a worker reads its own files only; else each reads all
files, and rows are dealt by number, as those of other sources.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mmpack.data.file_bytes import num_bytes
from mmpack.data.file_formats import Row, read_rows
from mmpack.data.readers import RowGroup
from mmpack.data.remote_files import in_parallel
from mmpack.data.remote_roots import DataPath, RemotePath
from mmpack.data.tar_headers import TornArchiveError
from mmpack.errors import RowError


class FileRow(NamedTuple):
    """A row of a stream's data files."""

    file: int  # its number in `DataFiles.groups`
    row: Row


class DataFiles:
    """The data files of a stream.

    Attributes:
        groups: one per file, without rows.
        checksum: of names and sizes, equal for ranks that read the same files.
    """

    def __init__(self, groups: Sequence[RowGroup]) -> None:
        self.groups = [group._replace(rows=()) for group in groups]
        paths = [_path(group) for group in groups]
        are_remote = any(isinstance(path, RemotePath) for path in paths)
        sizes = in_parallel(num_bytes, paths) if are_remote else map(num_bytes, paths)
        known = list(zip([group.name for group in groups], sizes))
        self.checksum = zlib.crc32(repr(known).encode())

    def __len__(self) -> int:
        return len(self.groups)

    def rows(self, part: tuple[int, int], begin: Sequence[int] | None) -> FilePass:
        """The rows of every n-th file, from file i of `part` (i, n) on, from a state of `FilePass` on."""
        return FilePass(self.groups, range(part[0], len(self.groups), part[1]), begin or (0, 0))


class FilePass(Iterator[FileRow]):
    """A pass over data files."""

    def __init__(self, groups: Sequence[RowGroup], files: range, begin: Sequence[int]) -> None:
        self._groups, self._files = groups, files
        self._place = begin
        self._rows = self._read(*begin)

    def state(self) -> list[int]:
        """(number of a file in this pass, rows read of it), for JSON."""
        return list(self._place)

    def __next__(self) -> FileRow:
        return next(self._rows)

    def _read(self, first: int, skipped: int) -> Iterator[FileRow]:
        for place, file in enumerate(self._files[first:], first):
            for count, row in enumerate(_rows_of(_path(self._groups[file])), 1):
                if place > first or count > skipped:
                    self._place = (place, count)
                    yield FileRow(file, row)


def _rows_of(path: DataPath) -> Iterator[Row]:
    """The rows of a file. The damage of a tar file is its last row, a bad one: other files can be read, and the
    damage is the same whenever the file is read, which holds for no other error of a file."""
    number = 0
    try:
        for row in read_rows(path):
            yield row
            number = row.number + 1
    except TornArchiveError as error:
        yield Row(path.name, number, None, RowError(str(error)))


def _path(group: RowGroup) -> DataPath:
    assert group.file is not None
    return group.file


def is_paths(source: Any) -> bool:
    """Whether a stream's source is the path of data files, or several."""
    if isinstance(source, (list, tuple)):
        return bool(source) and all(isinstance(one, (str, os.PathLike)) for one in source)
    return isinstance(source, (str, os.PathLike))
