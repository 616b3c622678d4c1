"""Ranges of objects behind `http://` and `https://`, by the session of fsspec's file system.

fsspec's own reads follow redirects anywhere and read whole bodies, whatever range was asked for. Here a redirect
stays on its host, and no more of a body is read than was asked for.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import urljoin, urlsplit

MOST_SKIPPED = 1 << 24  # bytes that are read and dropped of a server that ignores ranges
_MOST_REDIRECTS = 5
_BLOCK = 1 << 16
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")
_PORTS = {"http": 80, "https": 443}
_IDENTIFY = ("etag", "content-md5", "last-modified")  # headers

Answer = tuple[dict[str, Any], bytes]  # (size and headers that identify the object, its bytes)


async def ranged(fs: Any, url: str, start: int, end: int) -> Answer:
    """Bytes `start` to `end` of an object, fewer if it ends before; of an empty range, only what is known of it.

    Args:
        fs: an `fsspec.implementations.http.HTTPFileSystem`.

    Raises:
        FileNotFoundError, PermissionError: statuses 404 and 410, 401 and 403.
        ConnectionError: a fault that may be over at the next try: 408, 429, 5xx, a broken connection or body.
        OSError: any other fault.
    """
    import aiohttp

    session = await fs.set_session()
    is_head, first, last = start == end, start, end
    try:
        for _ in range(_MOST_REDIRECTS + 1):
            method = "HEAD" if is_head else "GET"
            async with session.request(
                method, fs.encode_url(url), **_options(fs, first, last)
            ) as r:
                if r.status in (301, 302, 303, 307, 308):
                    url = _redirected(url, r.headers.get("Location"))
                elif is_head and (r.status in (400, 403, 405, 501) or _has_no_size(r)):
                    is_head, first, last = False, 0, 1  # the first byte tells what HEAD does not
                else:
                    found, data = await _read(r, first, last)
                    return found, b"" if start == end else data
    except (aiohttp.ClientError, TimeoutError) as error:
        # their texts have the URL that was asked for, with what a redirect added
        raise ConnectionError(_words(error)) from None
    raise OSError(errno.ELOOP, f"more than {_MOST_REDIRECTS} redirects")


def _has_no_size(r: Any) -> bool:
    return r.status == 200 and not r.headers.get("Content-Length", "").isdigit()


def _options(fs: Any, start: int, end: int) -> dict[str, Any]:
    """Arguments of a request: those of the user's fsspec configuration, and ours."""
    given = dict(fs.kwargs)
    headers = {**given.pop("headers", {}), "Accept-Encoding": "identity"}
    if end > start:
        headers["Range"] = f"bytes={start}-{end - 1}"
    return {**given, "headers": headers, "allow_redirects": False}


async def _read(r: Any, start: int, end: int) -> Answer:
    headers: Mapping[str, str] = r.headers
    if r.status == 416:  # of an empty object, each range is outside
        total = headers.get("Content-Range", "").rpartition("/")[2]
        return _known(headers, int(total) if total.isdigit() else None), b""
    if r.status >= 400:
        raise _refused(r.status)
    if headers.get("Content-Encoding", "identity") not in ("", "identity"):
        raise OSError(
            errno.EIO, "the server compresses it, so that it has no ranges and no known size"
        )
    found = _RANGE.match(headers.get("Content-Range", "")) if r.status == 206 else None
    length = headers.get("Content-Length", "")
    if r.status == 206 and found is not None:
        first, size = map(int, found.groups())
    elif r.status == 200 and length.isdigit():
        first, size = 0, int(length)
    else:
        raise OSError(errno.EIO, f"the server does not tell its size (status {r.status})")
    if first > start or (start > first and start - first > MOST_SKIPPED):
        raise OSError(
            errno.EIO,
            "the server ignores ranges, and would send all bytes before the ones that are needed",
        )
    wanted = max(min(end, size) - start, 0)
    data = bytearray()
    left = start - first  # to be dropped
    while len(data) < wanted and (block := await r.content.read(_BLOCK)):
        data += block[left:]
        left = max(left - len(block), 0)
    if not r.content.at_eof():
        r.close()  # a body that goes on is not read
    return _known(headers, size), bytes(data[:wanted])


def _known(headers: Mapping[str, str], size: int | None) -> dict[str, Any]:
    """The size, and of the headers only those that identify an object: a server may send one named `size`."""
    return {"size": size, **{name: headers[name] for name in _IDENTIFY if name in headers}}


def status_words(status: int) -> str:
    """Such as "403 Forbidden"."""
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def _refused(status: int) -> OSError:
    words = status_words(status)
    if status in (404, 410):
        return FileNotFoundError(errno.ENOENT, words)
    if status in (401, 403):
        return PermissionError(errno.EACCES, words)
    if status in (408, 429) or status >= 500:
        return ConnectionError(words)
    return OSError(errno.EIO, words)


def _redirected(url: str, location: str | None) -> str:
    """Where a redirect leads.

    Raises:
        OSError: to another host, or from https to http.
    """
    target, new = "", urlsplit("")
    try:
        target = urljoin(url, location or "")
        old, new = urlsplit(url), urlsplit(target)
        is_same = (old.scheme, old.hostname, _port(old)) == (new.scheme, new.hostname, _port(new))
        is_upgrade = (old.scheme, old.hostname, _port(old)) == ("http", new.hostname, 80) and (
            new.scheme,
            _port(new),
        ) == ("https", 443)
        host = f"{new.hostname!s:.80} (port {_port(new)})"
    except ValueError:
        is_same = is_upgrade = False
        host = "no address"
    if not (is_same or is_upgrade) or "@" in new.netloc:
        raise OSError(
            errno.EXDEV,
            f"the server redirects to another host, {host}, which was not named; name that one as the root, or "
            "the storage itself (s3, gs, hf)",
        )
    return target


def _port(parts: Any) -> int | None:
    port: int | None = parts.port
    return port if port is not None else _PORTS.get(parts.scheme)


def _words(error: BaseException) -> str:
    """What kind of fault it is."""
    if isinstance(error, TimeoutError):
        return "it took too long"
    inner = getattr(error, "os_error", None)
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror
    return {"ClientPayloadError": "the answer was cut off"}.get(
        type(error).__name__, type(error).__name__
    )
