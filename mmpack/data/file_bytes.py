"""A data file -> its bytes, decompressed; regular files and objects in object storage only, and decompressed
bytes are limited by file size."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from typing import IO, Any

from mmpack.data.limits import most_bytes
from mmpack.data.remote_files import error_words, identity
from mmpack.data.remote_objects import open_object
from mmpack.data.remote_roots import DataPath, RemotePath
from mmpack.regular_files import NotRegularError, regular_stat

_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}


def require_file(path: DataPath) -> None:
    """Refuse a path that is not a readable regular file or object.

    Raises:
        ValueError: it is not a regular file, does not exist, or may not be read.
    """
    if isinstance(path, RemotePath):
        num_bytes(path)
        return
    try:
        regular_stat(path)
    except NotRegularError as error:
        raise ValueError(f"{path} is {error.kind}, not a regular file; write it to one") from None
    except (FileNotFoundError, ValueError):  # ValueError: the path has a NUL
        raise ValueError(f"cannot read {path}: no such file; fix the path") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if not os.access(path, os.R_OK):
        raise ValueError(
            f"{path} may not be read; change its permissions, or name the files to read"
        )


def num_bytes(path: DataPath) -> int:
    """The size of a data file.

    Raises:
        ValueError: it is an object that does not exist or may not be read.
        OSError: it is a file that does not exist.
    """
    if not isinstance(path, RemotePath):
        return path.stat().st_size
    try:
        return identity(path.url).size
    except FileNotFoundError:
        raise ValueError(f"cannot read {path}: no such object; fix the URL") from None
    except OSError as error:
        raise ValueError(f"{path} {'; '.join(error_words(error))}") from None


def open_binary(path: DataPath) -> IO[bytes]:
    """Open a data file as it is.

    Raises:
        OSError: it cannot be read.
    """
    return open_object(path.url) if isinstance(path, RemotePath) else path.open("rb")


def openable(path: DataPath) -> Any:
    """What libraries open: a path, or an object as a file.

    Raises:
        OSError: the object cannot be read.
    """
    return open_object(path.url) if isinstance(path, RemotePath) else str(path)


def need_pyarrow(path: DataPath) -> None:
    """
    Raises:
        ValueError: pyarrow is not installed.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise ValueError(
            f"{path.name} needs pyarrow to be read; pip install 'mmpack[train]'"
        ) from None


def open_bytes(path: DataPath) -> IO[bytes]:
    """Open a file to read its bytes, decompressed.

    Raises:
        ValueError: it is compressed under a name that does not say so, or UTF-16.
    """
    if path.suffix == ".gz":
        return io.BufferedReader(_Decompressed(gzip.open(openable(path)), path))
    if path.suffix == ".zst":
        need_pyarrow(path)
        import pyarrow

        stream = pyarrow.input_stream(openable(path), compression="zstd")
        return io.BufferedReader(_Decompressed(stream, path))
    opened: Any = open_binary(path)
    start = opened.peek(4)
    for magic, name in _MAGIC.items():
        if start.startswith(magic):
            opened.close()
            raise ValueError(f"{path.name} is {name} data; rename it to match its format")
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        opened.close()
        raise ValueError(f"{path.name} is UTF-16; save it as UTF-8")
    found: IO[bytes] = opened
    return found


class _Decompressed(io.RawIOBase):
    """The bytes of a gzip or zstd stream, limited by the file's size."""

    def __init__(self, stream: Any, path: DataPath) -> None:
        self._stream = stream
        self._path = path
        self._size = num_bytes(path)
        self._left = most_bytes(self._size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (EOFError, zlib.error) as error:  # neither is an OSError
            raise OSError(f"{error}; it was cut or damaged, copy or compress it again") from None
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(
                f"{self._path.name} decompresses from {self._size:,} to more than {most_bytes(self._size):,} "
                "bytes, too many for a data set; write it again"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()
