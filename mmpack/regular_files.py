"""Opens regular files only: reading a named pipe can block forever, and reading a device may never end."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotRegularError(ValueError):
    """A path that is not a regular file.

    Attributes:
        path: the path.
        kind: its kind: "a folder", "a named pipe", ...
    """

    def __init__(self, path: str | os.PathLike[str], kind: str) -> None:
        super().__init__(f"{path} is {kind}, not a regular file")
        self.path = path
        self.kind = kind


def regular_stat(path: str | os.PathLike[str]) -> os.stat_result:
    """`os.stat` of a regular file, links followed.

    Raises:
        NotRegularError: it is not a regular file.
        OSError: it does not exist.
    """
    return _checked(os.stat(path), path)


def open_regular(
    path: str | os.PathLike[str], *, follow_link: bool = True, buffering: int = -1
) -> BinaryIO:
    """Open a regular file for reading.

    Args:
        follow_link: open the target of a link; else links are refused.
        buffering: as in `open`.

    Raises:
        NotRegularError: it is not a regular file.
        OSError: it cannot be opened.
    """
    # Check first, because opening some devices has side effects. O_NONBLOCK does not wait for a pipe's writer.
    # Check the open file again, because the path may have changed in between.
    regular_stat(path)
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    if not follow_link:
        flags |= os.O_NOFOLLOW
    opened = os.open(path, flags)
    try:
        _checked(os.fstat(opened), path)
        return os.fdopen(opened, "rb", buffering)
    except BaseException:
        os.close(opened)
        raise


def _checked(found: os.stat_result, path: str | os.PathLike[str]) -> os.stat_result:
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        raise NotRegularError(path, _KINDS.get(kind, "something else"))
    return found
