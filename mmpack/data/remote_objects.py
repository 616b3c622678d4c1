"""Objects of object storage as what reads files takes: bytes by position, and files that can be sought."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, BinaryIO

from mmpack.data.remote_files import MOST_AT_ONCE, Identity, first_range, read_range

HEADER = 1 << 16  # bytes that are read first of an image, and then at a time
READ_AHEAD = 1 << 22  # bytes of a data file or a video at a time


def open_object(url: str, version: str = "", block: int = READ_AHEAD) -> BinaryIO:
    """Open an object for reading; it can be sought.

    Args:
        version: what was recorded of it, `str(Identity)`; empty: nothing.
        block: bytes that are read at a time, and now.

    Returns:
        A buffered file, for `identity_of`.

    Raises:
        FileNotFoundError, RemoteError, ValueError: as `identity`. While reading, too.
        RowError: the object is not the recorded one.
    """
    remote = RemoteObject(url, version, 0, block)
    file = io.BufferedReader(FileAt(remote.some_at, 0, remote.size), block)
    file.remote = remote  # type: ignore[attr-defined]
    return file


def identity_of(file: BinaryIO) -> Identity:
    """What identifies the object that `open_object` opened."""
    known: Identity = file.remote.identity  # type: ignore[attr-defined]
    return known


class RemoteObject:
    """An object, read by position, by one thread. The first range is kept, and the last; each is twice as long as
    the one before, so that what needs more than a header soon has all.

    Args:
        version: as in `open_object`.
        start: where the first range begins. first: its length.
        until: no more is read ahead than up to here; None: its end.
        most: the longest range that is read ahead.

    Raises:
        FileNotFoundError, RemoteError, ValueError: as `identity`. While reading, too.
        RowError: the object is not the recorded one.
    """

    def __init__(
        self,
        url: str,
        version: str = "",
        start: int = 0,
        first: int = READ_AHEAD,
        until: int | None = None,
        most: int = READ_AHEAD,
    ) -> None:
        self.path, self._ahead, self._most = url, first, max(first, most)
        end = start + first if until is None else max(min(start + first, until), start)
        self.identity, data = first_range(url, start, end, version)
        self._until = self.identity.size if until is None else min(until, self.identity.size)
        self._begin, self._last = (start, data), (start, b"")

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.identity.size

    @property
    def version(self) -> str:
        """What identifies it, for `ImageRef.version`."""
        return str(self.identity)

    def read_at(self, offset: int, length: int) -> bytes:
        """The bytes from `offset` on, fewer at the end of the object."""
        parts = []
        while data := self.some_at(offset, length):
            parts.append(data)
            offset, length = offset + len(data), length - len(data)
        return b"".join(parts)

    def some_at(self, offset: int, length: int) -> bytes:
        """At least one of the bytes that `read_at` returns, if there is any."""
        for begin, known in (self._begin, self._last):
            if begin <= offset < begin + len(known):
                return known[offset - begin : offset - begin + length]
        if offset >= self.size or length < 1:
            return b""
        self._ahead = min(2 * self._ahead, self._most)
        ahead = min(offset + self._ahead, self._until)
        end = min(max(offset + min(length, MOST_AT_ONCE), ahead), self.size)
        self._last = offset, read_range(self.path, offset, end, self.identity)
        return self._last[1][:length]


class FileAt(io.RawIOBase):
    """Bytes that are read by position, as a file with a position of its own.

    Args:
        read_at: gives bytes from an offset on, at least one and at most so many.
        start: offset of the file's first byte. length: its bytes.
    """

    def __init__(self, read_at: Callable[[int, int], bytes], start: int, length: int) -> None:
        self._read_at, self._start, self._length, self._at = read_at, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset}")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._some(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self._some(self._length), b""))

    def _some(self, length: int) -> bytes:
        wanted = min(length, self._length - self._at)
        data = self._read_at(self._start + self._at, wanted) if wanted > 0 else b""
        self._at += len(data)
        return data
