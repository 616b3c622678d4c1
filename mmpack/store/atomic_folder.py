"""A folder that processes on many machines may all want to make: one makes it, the others have it.

The lock is `flock` (filelock's FileLock) on a small file beside the folder, `.NAME.lock`, which stays. The
kernel, or the NFS server, lets it go when its holder dies, so a lock that is held means somebody alive. A
lock that is a file's existence (SoftFileLock) would outlive a killed holder on another machine; filelock
falls back to it by itself where a file system knows no flock. Where flock reaches one machine only
(Lustre's `localflock`), several may build: each in a folder of its own name, and whoever is second ends
with an error, because nothing is ever renamed over a folder that had not been there before.

What is being made lies in `NAME.partial-HOST-PROCESS` beside, and becomes NAME by a rename.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

_POLL_S = 0.5  # of hundreds of waiting machines each asks the file server this seldom
_OURS = (
    r"samples\.arrow|mmpack\.json|(index|plan|pieces)\.(json|\w+\.npy)"
    r"|bad_rows\.jsonl|overflow\.jsonl"
    r"|(index|plan|pieces)\.npz"  # of earlier formats, for --overwrite
    r"|dataset_info\.json|state\.json|cache-\w+\.arrow"  # the last: of `datasets`, made from the rest
)


class Turn(NamedTuple):
    """How it came to be this process's turn."""

    waited_for: str  # who had the lock before; empty: nobody
    was_killed: bool  # somebody was while building


@contextmanager
def turn(out: Path) -> Iterator[Turn]:
    """Be the only one who makes `out`, and say so where that means waiting. What a killed process left
    is removed; the block must look at `out` again.

    Raises:
        ValueError: the folder that `out` is to lie in cannot be written to.
    """
    out = out.resolve()
    lock = FileLock(out.with_name(f".{out.name}.lock"))
    waited_for = ""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except OSError as error:
        if not isinstance(error, Timeout):
            raise ValueError(f"cannot write {out}: {error.strerror or error}") from None
        waited_for = " and ".join(_left_overs(out).values()) or "another process"
        print(f"waiting for {waited_for} to make {out}", file=sys.stderr, flush=True)
        lock.acquire(poll_interval=_POLL_S)
    try:
        # Their owners are gone: the lock is ours. Listing makes an NFS client look at the folder anew, too.
        left = _left_overs(out)
        for path, owner in left.items():
            if not others(path):
                print(f"removing what {owner} left unfinished: {path.name}", file=sys.stderr)
                shutil.rmtree(path, ignore_errors=True)
        yield Turn(waited_for, bool(left))
    finally:
        lock.release()


@contextmanager
def published(out: Path, replaces: bool) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block ends, and vanishes if by an exception.

    Args:
        out: what it becomes, in one step.
        replaces: there is a store of ours, to be replaced.

    Raises:
        ValueError: something is at `out` that was not there before, or is not ours.
    """
    out = out.resolve()
    partial = out.with_name(f"{out.name}.partial-{socket.gethostname()}-{os.getpid()}")
    if replaces and (foreign := others(out)):
        raise ValueError(
            f"{out} also holds {', '.join(foreign[:4])}, not of mmpack's making; move that away or "
            "choose another --out"
        )
    try:
        partial.mkdir()
        yield partial
        old = partial.with_name(f"{partial.name}-old")
        if replaces:
            out.rename(old)
        try:
            partial.rename(out)
        except OSError:
            if replaces:
                old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def others(folder: Path) -> list[str]:
    """What in a folder is no part of a store, by name: other files, and folders."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if not re.fullmatch(_OURS, path.name) or (path.is_dir() and not path.is_symlink())
    )


def _left_overs(out: Path) -> dict[Path, str]:
    """Folders in which `out` is or was being made, and by whom."""
    pattern = re.compile(re.escape(out.name) + r"\.partial-(.+)-(\d+)(-old)?")
    found = ((path, pattern.fullmatch(path.name)) for path in sorted(out.parent.iterdir()))
    return {path: f"process {name[2]} on {name[1]}" for path, name in found if name}
