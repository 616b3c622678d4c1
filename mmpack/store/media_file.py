"""`media.bin`: the images and videos of a store that have no file of their own (bytes in rows), each distinct one
once.

They are written as they came, one after another, not decoded; rows hold their positions. Two are equal if their
SHA-256 is. A store without them has no `media.bin`. Reading maps the file into memory.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mmpack.regular_files import open_regular
from mmpack.store.records import damaged
from mmpack.types import Int64

NAME = "media.bin"
Position = tuple[int, int]  # (offset, length) in bytes


class MediaFile:
    """A store's `media.bin` opened for reading."""

    def __init__(self, folder: Path, num_bytes: int) -> None:
        """
        Raises:
            ValueError: it is missing, not a regular file, or has another length.
        """
        self._path = folder / NAME
        self._mapped: mmap.mmap | bytes = b""
        if not num_bytes:
            return
        try:
            with open_regular(self._path) as file:
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise damaged(self._path, "it is missing") from None
        except (OSError, ValueError) as error:  # ValueError: an empty file, too
            raise damaged(self._path, error) from None
        if len(self._mapped) != num_bytes:
            raise damaged(
                self._path, f"it has {len(self._mapped):,} bytes, {num_bytes:,} were written"
            )

    def contents(self, positions: Sequence[Position]) -> list[bytes] | None:
        """The bytes at distinct positions; None if one is outside, or if they overlap so much that together they
        are longer than the file."""
        size = len(self._mapped)
        if sum(length for _, length in positions) > size or not all(
            0 <= begin <= begin + length <= size for begin, length in positions
        ):
            return None
        return [self._mapped[begin : begin + length] for begin, length in positions]

    def verify(self, checksum: int) -> None:
        """
        Raises:
            ValueError: the file's CRC-32 is another.
        """
        found = 0
        for start in range(0, len(self._mapped), 1 << 20):
            found = zlib.crc32(self._mapped[start : start + (1 << 20)], found)
        if found != checksum:
            raise damaged(self._path, "its bytes have changed")


class MediaWriter:
    """Writes `media.bin`; a context manager. Holds the hash of each distinct image or video, some 200 bytes.

    Attributes:
        num_bytes, checksum: length and CRC-32 of what was written.
    """

    def __init__(self, folder: Path) -> None:
        self.num_bytes, self.checksum = 0, 0
        self._path = folder / NAME
        self._file: BinaryIO | None = None
        self._offsets: dict[bytes, int] = {}

    def __enter__(self) -> MediaWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, media: Mapping[bytes, bytes]) -> Int64:
        """(n,) offsets of images and videos, given by their SHA-256; those that are not there yet are written."""
        for digest, content in media.items():
            if digest not in self._offsets:
                self._file = self._file or open(self._path, "wb")
                self._file.write(content)
                self._offsets[digest] = self.num_bytes
                self.num_bytes += len(content)
                self.checksum = zlib.crc32(content, self.checksum)
        return np.array([self._offsets[digest] for digest in media], dtype=np.int64)
