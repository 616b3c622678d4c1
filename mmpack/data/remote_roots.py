"""What may be read from object storage: the roots that a user names, and the objects under them that a row names.

A root is a URL that the user wrote on the command line or in Python. Rows are not trusted: a row names an object
by its path under a root, as it names a file by its path in a folder, and `object_in` refuses every path that
could mean something else. Nothing is opened here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urlsplit

from mmpack.data.limits import MAX_PATH
from mmpack.errors import RowError

HTTP = ("http", "https")
# Schemes of roots: how to install what reads them.
SCHEMES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "hf": "huggingface_hub",
    "https": "'mmpack[remote]'",
    "http": "'mmpack[remote]'",
    "memory": "'mmpack[remote]'",
}
_REMOTE = re.compile(rf"({'|'.join(SCHEMES)})://")
_ANY_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::|://)")  # at least two letters: C:\ is not a URL
_PLACE = re.compile(r"[\w.~:\[\]-]*")  # a host and its port, or a bucket
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_SAFE = "!$&'()*+,;=:@~"  # what a segment of a URL may have as it is, RFC 3986 section 3.3
_AS_VERSION = {"s3": "?", "gs": "#?", "hf": "@"}  # each begins a version in a file system's paths
_HUB_KINDS = ("datasets", "models", "spaces", "kernels", "buckets")
_LISTED = ", ".join(f"{scheme}://" for scheme in SCHEMES)


def is_remote(path: str) -> bool:
    """Whether a path is the URL of an object or a root, as `remote_root` and `object_in` write it."""
    return _REMOTE.match(path) is not None


def is_url(name: str | os.PathLike[str]) -> bool:
    """Whether what a user named is a URL, of a root or refused, and not a path on this machine."""
    return _ANY_URL.match(os.fspath(name)) is not None


def shown(name: str) -> str:
    """A path or a URL in an error; of a URL its scheme only, because it may have a password."""
    return f"{scheme_of(name):.40}://..." if is_url(name) else name


def scheme_of(url: str) -> str:
    """ "s3", "https", ..."""
    return url.partition(":")[0]


def remote_root(name: str | os.PathLike[str]) -> str | None:
    """A root that the user named, without a slash at its end; None: it is a path on this machine.

    Raises:
        ValueError: it is a URL that is not read, or has a password, a query, `..` or nothing that it names. The
            message does not repeat what could be secret.
    """
    text = os.fspath(name)
    if not is_url(text):
        return None
    scheme, _, rest = text.partition("://")
    scheme = scheme.lower()
    shown = f"{scheme:.40}://..." if "://" in text else f"{text:.40}"
    if "::" in text:
        raise ValueError(
            f"the root {text.partition(':')[0]:.40}::... chains file systems, which is not read; name the object "
            f"itself ({_LISTED}), or write ./ before a local name"
        )
    if scheme not in SCHEMES:
        raise ValueError(f"the root {shown} is not read; roots are local paths, {_LISTED}")
    place, slash, path = rest.partition("/")
    if "@" in place or (scheme not in HTTP and ":" in place):
        raise ValueError(
            f"the root {shown} has a user name or a password, which a store would record; give credentials to "
            "fsspec (environment or configuration), and remove them from the URL"
        )
    if "?" in rest or "#" in rest:
        raise ValueError(
            f"the root {scheme}://{place}/... has '?' or '#'; a signature in it would be recorded in the store, "
            "so give credentials to fsspec (environment or configuration), and name the object alone"
        )
    try:
        why = next(filter(None, map(_flaw, _decoded(path.lstrip("/")))), "")
    except UnicodeDecodeError:
        why = "is not UTF-8 in its % signs"
    if not _PLACE.fullmatch(place) or place in (".", ".."):
        why = "names no place"
    if why:
        raise ValueError(
            f"the root {scheme}://{place!a:.80} {why}; name the folder or the file itself"
        )
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if scheme in HTTP:
        place = place.lower()
        try:
            has_host = bool(urlsplit(f"{scheme}://{place}").hostname)
            _ = urlsplit(f"{scheme}://{place}").port
        except ValueError:
            has_host = False
        if not has_host:
            raise ValueError(f"the root {scheme}://{place:.80} names no host; fix the URL")
        parts = [quote(unquote(part), safe=_SAFE) for part in parts]
    parts = [part for part in (place, *parts) if part]
    if scheme == "hf" and len(parts) < 2 + (place in _HUB_KINDS):
        raise ValueError(
            f"the root {text:.80} names no repository; write hf://datasets/owner/name/folder"
        )
    if not parts:
        raise ValueError(f"the root {scheme}:// names nothing; add a bucket or a folder")
    return f"{scheme}://{'/'.join(parts)}"


def absolute(name: str | os.PathLike[str]) -> str:
    """A folder or a root that the user named, wherever the process goes.

    Raises:
        ValueError: as `remote_root`.
    """
    return remote_root(name) or os.path.abspath(name)


def is_root(url: str) -> bool:
    """Whether a URL is as `remote_root` returns it."""
    try:
        return remote_root(url) == url
    except ValueError:
        return False


def object_in(root: str, path: str, kind: str = "data") -> str:
    """The URL of the object that a path from a row, or from another file under the root, means.

    The path is a name, not a URL: for `http`, it is percent-encoded here. `\\` counts as `/`, as in local paths.

    Args:
        root: as `remote_root` returns it.
        kind: the word for the object in errors.

    Raises:
        RowError: the path is absolute, a URL, chained (`::`) or not a name, has `..`, also percent-encoded any
            number of times, or chooses a version of the object.
    """
    scheme = scheme_of(root)
    why = "is not a name" if not path or len(path) > MAX_PATH else ""
    try:
        why = why or next(filter(None, map(_flaw, _decoded(path))), "")
    except UnicodeDecodeError:
        why = "is not UTF-8 in its % signs"
    version = next((one for one in _AS_VERSION.get(scheme, "") if one in path), "")
    if not why and version:
        why = f"has {version!r}, which {scheme}:// reads as a version"
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]
    if not why and not parts:
        why = "names nothing"
    if why:
        raise RowError(
            f"{kind} path {path!a:.200} {why}", f"write a relative path of an object under {root}"
        )
    if scheme in HTTP:
        parts = [quote(part, safe=_SAFE) for part in parts]
    return f"{root}/{'/'.join(parts)}"


def is_inside(url: str, root: str) -> bool:
    """Whether a URL is one that `object_in` returns for the root."""
    if not url.startswith(f"{root}/"):
        return False
    rest = url[len(root) + 1 :]
    try:
        return object_in(root, unquote(rest) if scheme_of(root) in HTTP else rest) == url
    except RowError:
        return False


def _decoded(text: str) -> Iterator[str]:
    """The text as written, and with its % signs decoded, until that changes nothing."""
    while True:
        yield text
        plain = unquote(text, errors="strict")
        if plain == text:
            return
        text = plain


def _flaw(path: str) -> str:
    """Why a path is refused as it is; empty: it is not."""
    plain = path.replace("\\", "/")
    if not plain.isprintable() or any("\ud800" <= one <= "\udfff" for one in plain):
        return "is not a name"
    if "::" in plain:
        return "has '::'"
    if plain.startswith("/"):
        return "is absolute"
    if _SCHEME.match(plain):
        return "is a URL or has a drive"
    if any(part.partition(";")[0].strip() == ".." for part in plain.split("/")):
        return "has '..'"
    return ""


@dataclass(frozen=True, slots=True, order=True)
class RemotePath:
    """The URL of a data file or a folder of them, with the parts of `pathlib.Path` that readers use.

    Attributes:
        url: as `remote_root` or `object_in` returns it.
    """

    url: str

    def __fspath__(self) -> str:
        return self.url

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(object_in(self.url, name))

    @property
    def name(self) -> str:
        """The last part of the path."""
        last = self.url.rpartition("/")[2]
        return unquote(last) if scheme_of(self.url) in HTTP else last

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def suffixes(self) -> list[str]:
        return PurePosixPath(self.name).suffixes

    @property
    def parent(self) -> RemotePath:
        """The folder; a root without one is its own."""
        folder, _, _ = self.url.rpartition("/")
        return self if folder.endswith(("/", ":")) else RemotePath(folder)

    def resolve(self) -> RemotePath:
        """Itself: there are no links."""
        return self


DataPath = Path | RemotePath


def data_path(name: str | os.PathLike[str]) -> DataPath:
    """A data file that the user named, on this machine or in object storage.

    Raises:
        ValueError: as `remote_root`.
    """
    url = remote_root(name)
    return Path(name) if url is None else RemotePath(url)


def require_local(name: str | os.PathLike[str], option: str) -> None:
    """Refuse a URL where only a local folder will do.

    Raises:
        ValueError: it is one.
    """
    if is_url(name):
        raise ValueError(
            f"{option} {os.fspath(name).partition(':')[0]:.40}://... is not a local folder; packed data are "
            "written and opened on local disks, so choose one, and copy it yourself"
        )
