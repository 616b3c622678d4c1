"""The data files of a store: whether they are what they were when it was made."""

from __future__ import annotations

import hashlib
import os

from mmpack.data import tar_shards
from mmpack.data.tar_headers import TornArchiveError
from mmpack.regular_files import NotRegularError, open_regular, regular_stat
from mmpack.store.encoded_store import EncodedStore


def changed_files(store: EncodedStore) -> list[str]:
    """Data files that have changed since the store was made: another size, or another modification time and other
    content. Files that are missing or unreadable are not listed, because a store no longer needs them."""
    changed = []
    for path, (num_bytes, time_ns, sha256) in store.about.files.items():
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
    return changed


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
