"""The data files and objects of a store: whether they are what they were when it was made."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mmpack.data import tar_shards
from mmpack.data.remote_files import identity, in_parallel
from mmpack.data.remote_roots import DataPath, RemotePath, is_remote, is_root
from mmpack.data.tar_headers import TornArchiveError
from mmpack.regular_files import NotRegularError, open_regular, regular_stat

if TYPE_CHECKING:
    from mmpack.store.encoded_store import EncodedStore  # which needs Arrow

# Of a file: bytes, modification time in ns, SHA-256; of an object: bytes, 0, its identity.
Stamp = tuple[int, int, str]


def stamp(file: DataPath) -> Stamp:
    """What identifies a data file's content.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    if isinstance(file, RemotePath):
        found = identity(file.url)
        return found.size, 0, str(found)
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, rows_sha256(file)


def stamps(files: Iterable[DataPath]) -> dict[str, Stamp]:
    """`stamp` of each file, by path or URL; of several objects at once."""
    files = list(files)
    remote = [file for file in files if isinstance(file, RemotePath)]
    found: dict[DataPath, Stamp] = dict(zip(remote, in_parallel(stamp, remote)))
    return {str(file): found[file] if file in found else stamp(file) for file in files}


def changed_files(store: EncodedStore) -> list[str]:
    """Data files that have changed since the store was made: another size, or another modification time and other
    content; of objects, another size or ETag. Files that are missing or unreadable are not listed, because a
    store no longer needs them."""
    changed = []
    for path, known in store.about.files.items():
        if is_remote(path):
            continue
        num_bytes, time_ns, sha256 = known
        try:
            found = regular_stat(path)
            if found.st_size != num_bytes or (
                found.st_mtime_ns != time_ns and rows_sha256(path) != sha256
            ):
                changed.append(path)
        except (NotRegularError, TornArchiveError):
            changed.append(path)
        except (OSError, ValueError):  # ValueError: an invalid file name
            continue
    objects = {path: known for path, (_, _, known) in store.about.files.items() if is_remote(path)}
    changed += [url for url in objects if not is_root(url)]  # not what mmpack records
    looked_at = [(url, known) for url, known in objects.items() if is_root(url)]
    return changed + changed_objects(looked_at, needed=False)


def changed_objects(known: Iterable[tuple[str, str]], *, needed: bool) -> list[str]:
    """The URLs of objects that are not the recorded ones.

    Args:
        known: URL and recorded identity of each.
        needed: list those that do not exist, too, and fail for those that cannot be reached.

    Raises:
        OSError: one that is needed cannot be reached.
    """

    def changed(one: tuple[str, str]) -> str:
        url, recorded = one
        try:
            return url if str(identity(url)) != recorded else ""
        except FileNotFoundError:
            return url if needed else ""
        except (OSError, ValueError):  # ValueError: a package is missing
            if needed:
                raise
            return ""

    return list(filter(None, in_parallel(changed, known)))


def rows_sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a data file, or of the rows in a tar file, whose images are not read.

    Raises:
        ValueError: it is not a regular file, or a damaged tar file.
        OSError: it cannot be read.
    """
    is_tar = os.fspath(path).endswith(tar_shards.SUFFIX)
    return tar_shards.rows_sha256(path) if is_tar else file_sha256(path)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a regular file's content, up to its size when it is opened.

    Raises:
        ValueError: it is not a regular file.
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        left = os.fstat(file.fileno()).st_size
        while block := file.read(min(left, 1 << 20)):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()
