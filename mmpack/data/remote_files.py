"""Objects of object storage, read by fsspec: what identifies them, and ranges of them.

File systems are opened in each process by itself: threads and connections of fsspec do not survive a fork. Faults
that may be over at the next try are tried again. Credentials are fsspec's business (environment, its
configuration); no error repeats what a library says about a request, because that can have a signature.
"""

from __future__ import annotations

import errno
import os
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from mmpack.data import remote_http, remote_hub
from mmpack.data.remote_faults import may_pass, number, reason
from mmpack.data.remote_roots import HTTP, SCHEMES, scheme_of
from mmpack.errors import RowError

T = TypeVar("T")
R = TypeVar("R")

MOST_AT_ONCE = 1 << 26  # bytes of one request
IN_FLIGHT = 16  # objects that a process reads at once
_AHEAD = 4 * IN_FLIGHT  # values whose results may wait for a slower one before them
_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)  # before each further try, half as long to 1.5 times
_TIMEOUT_S = 30.0  # of a request, and a second more for each
_SLOWEST = 1 << 18  # bytes
_VERSION = re.compile(r"([0-9]{1,18})(?: |$)")
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
    return first_range(url, 0, 0)[0]


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


def size_of(url: str, version: str) -> int:
    """The bytes of an object, from `str(Identity)`.

    Raises:
        RowError: it is not one; a store can be damaged.
    """
    match = _VERSION.match(version)
    if match is None:
        raise RowError(
            f"{url} was recorded with the version {version!a:.80}, which does not begin with a size",
            "pack the data again with --overwrite",
        )
    return int(match[1])


def listed(url: str) -> list[str]:
    """The names of the objects directly in a folder, sorted.

    Raises:
        FileNotFoundError, RemoteError, ValueError: as `identity`.
    """

    def names() -> list[str]:
        fs = _file_system(url)
        folder = fs._strip_protocol(url)
        fresh = {"refresh": True} if scheme_of(url) == "hf" else {}
        inside = fs.ls(folder, detail=True, **fresh)
        found = [one["name"] for one in inside if one["type"] == "file"]
        return sorted(name.rpartition("/")[2] for name in found)

    return _retried(url, names)


def in_parallel(function: Callable[[T], R], values: Iterable[T]) -> Iterator[R]:
    """`map`, with `IN_FLIGHT` values at a time. Values are taken when there is room for their results; an error of
    `values` comes after the results of those before it, as from `map`."""
    results = deque[Future[R]]()
    error = None
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        try:
            taken = iter(values)
            while True:
                try:
                    value = next(taken)
                except StopIteration:
                    break
                except Exception as found:
                    error = found
                    break
                results.append(pool.submit(function, value))
                if len(results) >= _AHEAD:
                    yield results.popleft().result()
            while results:
                yield results.popleft().result()
            if error is not None:
                raise error
        finally:
            for result in results:
                result.cancel()


def error_words(error: OSError) -> tuple[str, str]:
    """(what is wrong with an object, advice), after its name."""
    if isinstance(error, FileNotFoundError):
        return "does not exist", "fix the path or --media-dir (media_dir)"
    advice = {
        errno.EISDIR: "name an object in it",
        errno.EACCES: "check that this machine may read it",
    }.get(error.errno or 0, "try again later, or check that this machine may read it")
    return f"cannot be read: {error.strerror}", advice


def first_range(url: str, start: int, end: int, version: str = "") -> tuple[Identity, bytes]:
    """What identifies an object, and a range of its bytes.

    Raises:
        RowError: it is not the one of `version`.
    """

    recorded = Identity(size_of(url, version) if version else 0, version.partition(" ")[2])

    def read() -> tuple[Identity, bytes]:
        fs = _file_system(url)
        if scheme_of(url) in HTTP:
            found, data = _sync(fs, remote_http.ranged, end - start, fs, url, start, end)
            known = _identity(found)
            _check(url, version, known)
            _check_length(data, max(min(end, known.size) - start, 0))
            return known, data
        if start < min(end, recorded.size):  # one look is enough, after the bytes
            known, when = recorded, "since it was packed"
        else:
            known, when = _identity(_info(fs, url)), "while it was read"
            _check(url, version, known)
        return known, _same(fs, url, start, min(end, known.size), known, when)

    return _retried(url, read)


def read_range(url: str, start: int, end: int, known: Identity) -> bytes:
    """Bytes of an object that was opened before.

    Raises:
        FileNotFoundError, RemoteError, ValueError: as `identity`.
        RowError: it is not the same any more.
    """

    def read() -> bytes:
        fs = _file_system(url)
        if scheme_of(url) not in HTTP:
            return _same(fs, url, start, end, known, "while it was read")
        found, read_now = _sync(fs, remote_http.ranged, end - start, fs, url, start, end)
        data: bytes = read_now
        _check(url, str(known), _identity(found), "while it was read")
        _check_length(data, end - start)
        return data

    return _retried(url, read)


def _same(fs: Any, url: str, start: int, end: int, known: Identity, when: str) -> bytes:
    """Bytes of an object that is still the known one after they were read. An answer over HTTP tells what it is
    of; other file systems give bytes alone, so they are asked again."""
    if start >= end:
        return b""
    try:
        data = _bytes(fs, url, start, end)
    except FileNotFoundError:
        raise
    except Exception:  # a smaller object may not have the range
        _check(url, str(known), _identity(_info(fs, url)), when)
        raise
    if not (scheme_of(url) == "hf" and remote_hub.is_fixed(url)):
        _check(url, str(known), _identity(_info(fs, url)), when)
    return data


def _check(url: str, version: str, now: Identity, when: str = "since it was packed") -> None:
    if version and str(now) != version:
        before = Identity(size_of(url, version), version.partition(" ")[2])
        raise RowError(
            f"{url} changed {when}: it has {_described(now)}, but {_described(before)} when it was first looked "
            "at",
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
    if scheme_of(url) == "hf":
        return remote_hub.info(fs, path)
    fresh = {"refresh": True} if scheme_of(url) == "s3" else {}  # what was listed may be old
    if getattr(fs, "async_impl", False):
        found: dict[str, Any] = _sync(fs, fs._info, 0, path, **fresh)
        return found
    return dict(fs.info(path, **fresh))


def _bytes(fs: Any, url: str, start: int, end: int) -> bytes:
    path = fs._strip_protocol(url)
    if scheme_of(url) == "hf":
        data = remote_hub.read(fs, path, start, end)
    elif getattr(fs, "async_impl", False):
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
                import fsspec.asyn as asyn

                if asyn.iothread[0] is not None and not asyn.iothread[0].is_alive():
                    asyn.reset_lock()  # a fork has no threads; older fsspec does not notice
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
            if wait is None or not may_pass(error):
                tries = f" (tried {len(_WAITS_S) + 1} times)" if wait is None else ""
                raise RemoteError(number(error), f"{reason(error)}{tries}", url) from None
        time.sleep(wait * _chance.uniform(0.5, 1.5))
    raise AssertionError("unreachable")
