"""Data files as the source of a stream: which worker reads which file, and where it is in it.

If there are at least as many files as workers of all ranks, a worker reads its own files only; else each reads all
files, and rows are dealt by number, as those of other sources.

A file that holds no rows, or that is damaged from some byte on, gives a bad row. How many rows such damage takes
is not known, so a limit on bad rows applies to bytes, too: those that damaged files lack, of those of a worker's
files.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mmpack.data.file_bytes import num_bytes
from mmpack.data.file_formats import NoRowsError, Row, read_rows
from mmpack.data.readers import RowGroup
from mmpack.data.remote_files import in_parallel
from mmpack.data.remote_roots import DataPath, RemotePath
from mmpack.data.tar_headers import TornArchiveError
from mmpack.data.tar_shards import SUFFIX
from mmpack.errors import RowError, counted

_NOTHING = (0, 0, 0, 0)  # the state in which a pass begins


class FileError(RowError):
    """What is wrong with a data file, as the error of a row in place of those that it lacks.

    Attributes:
        at: of a damaged file: the position from which on nothing can be read. None: the file is whole.
        is_cut: as in `TornArchiveError`.
    """

    def __init__(
        self, error: str, advice: str = "", *, at: int | None = None, is_cut: bool = False
    ) -> None:
        super().__init__(error, advice)
        self.at, self.is_cut = at, is_cut


class FileRow(NamedTuple):
    """A row of a stream's data files."""

    file: int  # its number in `DataFiles.groups`
    row: Row


class DataFiles:
    """The data files of a stream.

    Attributes:
        groups: one per file, without rows.
        num_bytes: of each file.
        checksum: of names and sizes, equal for ranks that read the same files.
    """

    def __init__(self, groups: Sequence[RowGroup]) -> None:
        self.groups = [group._replace(rows=()) for group in groups]
        paths = [_path(group) for group in groups]
        are_remote = any(isinstance(path, RemotePath) for path in paths)
        sizes = in_parallel(num_bytes, paths) if are_remote else map(num_bytes, paths)
        self.num_bytes = list(sizes)
        known = list(zip([group.name for group in groups], self.num_bytes))
        self.checksum = zlib.crc32(repr(known).encode())

    def __len__(self) -> int:
        return len(self.groups)

    def rows(
        self, part: tuple[int, int], begin: Sequence[int] | None, max_bad: float | None
    ) -> FilePass:
        """The rows of every n-th file, from file i of `part` (i, n) on, from a state of `FilePass` on.

        Args:
            max_bad: the share of these files' bytes that may be lost to damage; None: any.
        """
        files = range(part[0], len(self.groups), part[1])
        return FilePass(self, files, begin or _NOTHING, max_bad)


class FilePass(Iterator[FileRow]):
    """A pass over data files."""

    def __init__(
        self, files: DataFiles, own: range, begin: Sequence[int], max_bad: float | None
    ) -> None:
        self._of, self._files, self._max_bad = files, own, max_bad
        first, skipped, self._num_lost, self._num_missing = begin
        self._place = (first, skipped)
        self._rows = self._read(first, skipped)

    def state(self) -> list[int]:
        """(number of a file in this pass, rows read of it, bytes that damaged files before lack, those of them
        beyond the ends of the files), for JSON."""
        return [*self._place, self._num_lost, self._num_missing]

    def __next__(self) -> FileRow:
        return next(self._rows)

    def _read(self, first: int, skipped: int) -> Iterator[FileRow]:
        for place, file in enumerate(self._files[first:], first):
            for count, row in enumerate(_rows_of(_path(self._of.groups[file])), 1):
                if place > first or count > skipped:
                    self._place = (place, count)
                    if isinstance(row.error, FileError) and row.error.at is not None:
                        self._lose(file, row.error.at, row.error)
                    yield FileRow(file, row)

    def _lose(self, file: int, at: int, error: FileError) -> None:
        """Count the bytes that a damaged file lacks. One that was cut off is taken to have been as large as the
        largest tar file.

        Raises:
            ValueError: they are too many.
        """
        sizes = self._of.num_bytes
        size = sizes[file]
        if error.is_cut:
            tars = (n for n, group in zip(sizes, self._of.groups) if group.name.endswith(SUFFIX))
            size = max(tars)
        self._num_lost += size - at
        self._num_missing += size - sizes[file]
        if self._max_bad is None:
            return
        total = self._num_missing + sum(sizes[own] for own in self._files)
        if self._num_lost > self._max_bad * total:
            raise ValueError(
                f"damaged tar files lack about {self._num_lost:,} of the {total:,} bytes of "
                f"{counted(len(self._files), 'data file')} ({self._num_lost / total:.1%}), at most "
                f"{self._max_bad:.1%} may be left out (for example {error!s:.500}); fix them, or allow more with "
                "--max-bad (max_bad)"
            )


def _rows_of(path: DataPath) -> Iterator[Row]:
    """The rows of a file. The damage of a tar file is its last row, a bad one, as is that a file holds no rows:
    other files can be read, and it is the same whenever the file is read, which holds for no other error of a
    file."""
    number = 0
    try:
        for row in read_rows(path):
            yield row
            number = row.number + 1
    except TornArchiveError as error:
        bad = FileError(str(error), at=error.at, is_cut=error.is_cut)
        yield Row(path.name, number, None, bad)
    except NoRowsError as error:
        what, _, advice = str(error).partition("; ")
        yield Row(path.name, number, None, FileError(what, advice))


def _path(group: RowGroup) -> DataPath:
    assert group.file is not None
    return group.file


def is_paths(source: Any) -> bool:
    """Whether a stream's source is the path of data files, or several."""
    if isinstance(source, (list, tuple)):
        return bool(source) and all(isinstance(one, (str, os.PathLike)) for one in source)
    return isinstance(source, (str, os.PathLike))
