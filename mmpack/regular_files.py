"""Opening regular files only: reading a named pipe waits for ever, reading a device may never end."""

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
    """Something that is no regular file.

    Attributes:
        path: where it is.
        kind: what it is: "a folder", "a named pipe", ...
    """

    def __init__(self, path: str | os.PathLike[str], kind: str) -> None:
        super().__init__(f"{path} is {kind}, not a regular file")
        self.path = path
        self.kind = kind


def regular_stat(path: str | os.PathLike[str]) -> os.stat_result:
    """What `os.stat` says of a regular file, links followed.

    Raises:
        NotRegularError: it is something else.
        OSError: it is not there.
    """
    return _checked(os.stat(path), path)


def open_regular(
    path: str | os.PathLike[str], *, follow_link: bool = True, buffering: int = -1
) -> BinaryIO:
    """A regular file, open for reading.

    Args:
        follow_link: a path that is a link is opened; else refused.
        buffering: as of `open`.

    Raises:
        NotRegularError: it is something else, or became it since it was looked at.
        OSError: it cannot be opened.
    """
    # First a look, as opening some devices does something; then an opening that does not wait for the
    # writer of a pipe; then a look at what was opened.
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
