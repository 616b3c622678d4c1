"""Opens tar files: `open_archive` is the one place. A process keeps a few of them open, for the images that it
reads.

A member is read by position, so threads and forked workers can share an open file. Before a member's bytes are
used, its header and the size of the tar file are compared with those of when its row was read.
"""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from typing import BinaryIO

from mmpack.data.remote_objects import FileAt, RemoteObject
from mmpack.data.remote_roots import is_remote
from mmpack.data.tar_headers import BLOCK, Archive, is_header
from mmpack.errors import RowError
from mmpack.media_refs import TarMember
from mmpack.regular_files import open_regular

_SCANNED = 1 << 20  # bytes of an object that are read at a time to find its members
_MOST_OPEN = 64  # tar files that a process keeps open; a usual limit is 1,024 files


class OpenArchive:
    """An open tar file, `tar_headers.Archive`; closed when nothing uses it any more.

    Args:
        file: binary and seekable. If it has a file descriptor, reading does not move its position.
    """

    def __init__(self, file: BinaryIO, path: str) -> None:
        self._file, self.path = file, path
        self._lock = threading.Lock()
        try:
            self._descriptor: int | None = file.fileno()
        except OSError:  # not a file of the operating system
            self._descriptor = None
            self._size = file.seek(0, io.SEEK_END)

    def __del__(self) -> None:
        self._file.close()

    version = ""  # as in `ImageRef`

    @property
    def size(self) -> int:
        """Its bytes; of a local file, now."""
        return self._size if self._descriptor is None else os.fstat(self._descriptor).st_size

    def read_at(self, offset: int, length: int) -> bytes:
        """The bytes from `offset` on, fewer at the end of the file.

        Raises:
            OSError: it cannot be read.
        """
        if self._descriptor is not None:
            data = os.pread(self._descriptor, length, offset)
            while 0 < len(data) < length:  # interrupted, or beyond what one call returns
                more = os.pread(self._descriptor, length - len(data), offset + len(data))
                data, length = data + more, length if more else len(data)
            return data
        with self._lock:
            self._file.seek(offset)
            return self._file.read(length)


def open_archive(path: str, *, follow_link: bool = True) -> Archive:
    """Open a tar file, or one that is an object in object storage.

    Raises:
        NotRegularError: it is not a regular file.
        OSError: it cannot be opened.
    """
    if is_remote(path):
        return RemoteObject(path, first=_SCANNED, most=_SCANNED)
    return OpenArchive(open_regular(path, follow_link=follow_link, buffering=0), path)


def open_member(
    path: str,
    member: TarMember,
    kind: str,
    *,
    follow_link: bool = True,
    buffering: int = -1,
    version: str = "",
) -> BinaryIO:
    """Open an image or a video in a tar file for reading; `kind` is the word for it in errors.

    Args:
        path: of the tar file.
        buffering: as in `open`; of an object, bytes that are read first.
        version: of an object, as in `ImageRef`.

    Raises:
        RowError: the tar file has another size, or another member at this place, than when the row was read.
        NotRegularError, OSError: as `open_archive`.
    """
    name, offset, length, header, archive_bytes = member
    place = f"{kind} {name} (byte {offset:,} of {path})"
    archive: Archive
    if is_remote(path):
        first, end = BLOCK + max(buffering, BLOCK), offset + length
        try:
            archive = RemoteObject(path, version, max(offset - BLOCK, 0), first, end)
        except RowError as error:
            raise RowError(f"{place} cannot be read: {error.error}", error.advice) from None
    else:
        archive = _archives.get(path, follow_link)
    if archive.size != archive_bytes:
        _archives.forget(path)  # it may be written again
        raise RowError(
            f"{place} cannot be read: the tar file has {archive.size:,} bytes, and had {archive_bytes:,} when it "
            "was packed",
            "pack the data again",
        )
    block = archive.read_at(offset - BLOCK, BLOCK) if offset >= BLOCK else b""
    if offset + length > archive_bytes or not is_header(block, header, length):
        _archives.forget(path)
        raise RowError(
            f"{place} cannot be read: the tar file has another member there than when it was packed",
            "pack the data again",
        )
    file = FileAt(archive.read_at, offset, length)
    return file if buffering == 0 else io.BufferedReader(file)  # type: ignore[return-value]


class _Archives:
    """The tar files that were used last, open. A forked process begins with none, and so with its own."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._open: OrderedDict[str, Archive] = OrderedDict()

    def get(self, path: str, follow_link: bool) -> Archive:
        if self._process != os.getpid():
            self.__init__()  # type: ignore[misc]
        with self._lock:
            archive = self._open.get(path)
            if archive is None:
                archive = self._open[path] = open_archive(path, follow_link=follow_link)
            self._open.move_to_end(path)
            if len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)
            return archive

    def forget(self, path: str) -> None:
        with self._lock:
            self._open.pop(path, None)


_archives = _Archives()
