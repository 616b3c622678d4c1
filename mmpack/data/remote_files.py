"""Objects of object storage, read by fsspec: what identifies them, ranges, and files that can be sought.

File systems are opened in each process by itself: threads and connections of fsspec do not survive a fork. Faults that
may be over at the next try are tried again. Credentials are fsspec's business (environment, its configuration); no
error repeats what a library says about a request, because that can have a signature.
"""

from __future__ import annotations

import errno
import io
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple, TypeVar

from mmpack.data import remote_http
from mmpack.data.remote_roots import HTTP, SCHEMES, scheme_of
from mmpack.errors import RowError

T = TypeVar("T")
R = TypeVar("R")

HEADER = 1 << 16  # bytes that are read first of an image, and then at a time
READ_AHEAD = 1 << 22  # bytes of a data file or a video at a time
_MOST_AT_ONCE = 1 << 26  # bytes of one request
IN_FLIGHT = 16  # objects that a process reads at once
_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)  # before each further try, half as long to 1.5 times
_TIMEOUT_S = 30.0  # of a request, and a second more for each
_SLOWEST = 1 << 18  # bytes
_chance = random.SystemRandom()  # leaves the states that training is seeded with alone

# Keys of fsspec's `info` that change with an object's content, the best first, and what errors call them.
_TAGS = {
    "etag": "ETag",
    "content-md5": "MD5",
    "md5": "MD5",
    "md5hash": "MD5",
    "xet_hash": "hash",
    "blob_id": "blob",
    "last-modified": "modified",
    "lastmodified": "modified",
    "last_modified": "modified",
    "mtime": "modified",
    "updated": "modified",
    "created": "created",
}


class RemoteError(OSError):
    """An object that cannot be read; `strerror` says why, `filename` is its URL."""


class Identity(NamedTuple):
    """What identifies the content of an object.

    Attributes:
        size: bytes.
        tag: its ETag, hash or modification time, with its name; empty: the storage gives none.
    """

    size: int
    tag: str

    def __str__(self) -> str:
        return f"{self.size} {self.tag}".strip()


def identity(url: str) -> Identity:
    """What identifies an object now, without reading it.

    Raises:
        FileNotFoundError, RemoteError: it does not exist, or cannot be reached.
        ValueError: a package is missing.
    """
    return _first(url, 0)[0]


def exists(url: str) -> bool:
    """Whether there is an object.

    Raises:
        RemoteError, ValueError: as `identity`.
    """
    try:
        identity(url)
    except FileNotFoundError:
        return False
    return True


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
    return io.BufferedReader(_Object(url, version, block), block)


def identity_of(file: BinaryIO) -> Identity:
    """What identifies the object that `open_object` opened."""
    known: Identity = file.raw.identity  # type: ignore[attr-defined]
    return known


def listed(url: str) -> list[str]:
    """The names of the objects directly in a folder, sorted.

    Raises:
        FileNotFoundError, RemoteError, ValueError: as `identity`.
    """

    def names() -> list[str]:
        fs = _file_system(url)
        folder = fs._strip_protocol(url)
        found = [one["name"] for one in fs.ls(folder, detail=True) if one["type"] == "file"]
        return sorted(name.rpartition("/")[2] for name in found)

    return _retried(url, names)


def in_parallel(function: Callable[[T], R], values: Iterable[T]) -> Iterator[R]:
    """`map`, with `IN_FLIGHT` values at a time."""
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        yield from pool.map(function, values)


def error_words(error: OSError) -> tuple[str, str]:
    """(what is wrong with an object, advice), after its name."""
    if isinstance(error, FileNotFoundError):
        return "does not exist", "fix the path or --media-dir (media_dir)"
    return (
        f"cannot be read: {error.strerror}",
        "try again later, or check that this machine may read it",
    )


class _Object(io.RawIOBase):
    """An object as a file of ranges. The first is kept, and the last; each is twice as long as the one before, so that
    what needs more than a header soon has all."""

    def __init__(self, url: str, version: str, block: int) -> None:
        self._url, self._at, self._ahead = url, 0, block
        self.identity, self._begin = _first(url, block, version)
        self._window, self._window_at = b"", 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.identity.size}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset}")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        parts = []
        while data := self._next(_MOST_AT_ONCE):
            parts.append(data)
        return b"".join(parts)

    def _next(self, length: int) -> bytes:
        """The next bytes, at most `length`; fewer do not mean the end."""
        at, size = self._at, self.identity.size
        for begin, known in ((0, self._begin), (self._window_at, self._window)):
            if begin <= at < begin + len(known):
                data = known[at - begin : at - begin + length]
                break
        else:
            if at >= size or not length:
                return b""
            self._ahead = min(2 * self._ahead, max(READ_AHEAD, self._ahead))
            end = min(at + max(length, self._ahead), size)
            self._window, self._window_at = _ranged(self._url, at, end, self.identity), at
            data = self._window[:length]
        self._at += len(data)
        return data


def _first(url: str, length: int, version: str = "") -> tuple[Identity, bytes]:
    """What identifies an object, and its first bytes.

    Raises:
        RowError: it is not the one of `version`.
    """

    def read() -> tuple[Identity, bytes]:
        fs = _file_system(url)
        if scheme_of(url) in HTTP:
            found, data = _sync(fs, remote_http.ranged, length, fs, url, 0, length)
            known = _identity(found)
            _check(url, version, known)
            _check_length(data, min(length, known.size))
            return known, data
        known = _identity(_info(fs, url))
        _check(url, version, known)
        return known, _bytes(fs, url, 0, min(length, known.size))

    return _retried(url, read)


def _ranged(url: str, start: int, end: int, known: Identity) -> bytes:
    """Bytes of an object that was opened before."""

    def read() -> bytes:
        fs = _file_system(url)
        if scheme_of(url) not in HTTP:
            return _bytes(fs, url, start, end)
        found, data = _sync(fs, remote_http.ranged, end - start, fs, url, start, end)
        _check(url, str(known), _identity(found), "while it was read")
        _check_length(data, end - start)
        return data

    return _retried(url, read)


def _check(url: str, version: str, now: Identity, when: str = "since it was packed") -> None:
    if version and str(now) != version:
        size, _, tag = version.partition(" ")
        raise RowError(
            f"{url} changed {when}: it has {_described(now)}, but {_described(Identity(int(size), tag))} when it was "
            "first looked at",
            "pack the data again with --overwrite",
        )


def _described(one: Identity) -> str:
    return f"{one.size:,} bytes and {one.tag or 'no ETag'}"


def _identity(found: dict[str, Any]) -> Identity:
    """From fsspec's `info`, or the headers of an answer."""
    if found.get("type") == "directory":
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    size = found.get("size")
    if size is None:
        raise OSError(errno.EIO, "the storage does not tell its size")
    values = {key.lower(): value for key, value in found.items()}
    key = next((key for key in _TAGS if values.get(key)), None)
    return Identity(int(size), "" if key is None else f"{_TAGS[key]} {str(values[key]):.200}")


def _info(fs: Any, url: str) -> dict[str, Any]:
    path = fs._strip_protocol(url)
    # what was listed before may be old
    fresh = {"refresh": True} if scheme_of(url) in ("s3", "hf") else {}
    if getattr(fs, "async_impl", False):
        found: dict[str, Any] = _sync(fs, fs._info, 0, path, **fresh)
        return found
    return dict(fs.info(path, **fresh))


def _bytes(fs: Any, url: str, start: int, end: int) -> bytes:
    if start == end:
        return b""
    path = fs._strip_protocol(url)
    if getattr(fs, "async_impl", False):
        data = _sync(fs, fs._cat_file, end - start, path, start=start, end=end)
    else:
        data = fs.cat_file(path, start=start, end=end)
    _check_length(data, end - start)
    return bytes(data)


def _check_length(data: bytes, wanted: int) -> None:
    if len(data) != wanted:
        raise ConnectionError(f"the answer was cut off: {len(data):,} of {wanted:,} bytes came")


def _sync(fs: Any, function: Any, num_bytes: int, *args: Any, **options: Any) -> Any:
    """Run an asynchronous function of a file system, with a limit on its time."""
    from fsspec.asyn import sync

    limit = _TIMEOUT_S + num_bytes / _SLOWEST
    return sync(fs.loop, function, *args, timeout=limit, **options)


_opened: dict[tuple[int, str], Any] = {}  # by process and scheme
_opening: dict[
    int, threading.Lock
] = {}  # by process: a lock may be held while another thread forks


def _file_system(url: str) -> Any:
    """This process's file system for a URL."""
    scheme, process = scheme_of(url), os.getpid()
    key = (process, scheme)
    with _opening.setdefault(process, threading.Lock()):
        if key not in _opened:
            try:
                import fsspec

                _opened[key] = fsspec.filesystem(
                    scheme, skip_instance_cache=True, use_listings_cache=False
                )
            except ImportError:
                raise ValueError(
                    f"{scheme}:// needs a package that is not installed; pip install {SCHEMES[scheme]}"
                ) from None
        return _opened[key]


def _retried(url: str, action: Callable[[], T]) -> T:
    """Do it, again after a fault that may be over.

    Raises:
        FileNotFoundError, RemoteError: it fails; neither has a text of a library.
        RowError: as `action`.
        ValueError: a package is missing.
    """
    _file_system(url)
    for wait in (*_WAITS_S, None):
        try:
            return action()
        except RowError:
            raise
        except Exception as error:  # libraries raise what they like
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(errno.ENOENT, "it does not exist", url) from None
            if wait is None or not _may_pass(error):
                tries = f" (tried {len(_WAITS_S) + 1} times)" if wait is None else ""
                number = errno.EACCES if isinstance(error, PermissionError) else errno.EIO
                raise RemoteError(number, f"{_reason(error)}{tries}", url) from None
        time.sleep(wait * _chance.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


_FINAL = (PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError)
_FINAL_NUMBERS = (errno.EXDEV, errno.EIO, errno.ELOOP, errno.EACCES, errno.EPERM)


def _may_pass(error: Exception) -> bool:
    """Whether another try may succeed."""
    status = getattr(getattr(error, "response", None), "status_code", None)  # Hugging Face's
    if isinstance(status, int):
        return status in (408, 429) or status >= 500
    if isinstance(error, (TimeoutError, ConnectionError)) or _is_timeout(error):
        return True
    return isinstance(error, OSError) and not (
        isinstance(error, _FINAL) or error.errno in _FINAL_NUMBERS
    )


def _is_timeout(error: Exception) -> bool:
    return type(error).__name__ in ("FSTimeoutError", "TimeoutError")


def _reason(error: Exception) -> str:
    """A fault in words that have no URL, signature or key."""
    if _is_timeout(error) or isinstance(error, TimeoutError):
        return "it took too long"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = text.partition("\n")[0]
    if re.search(r"://|[?&=]|(?i:key|token|secret|signature|password)", text):
        text = ""
    name = type(error).__name__
    return text[:200] or name
