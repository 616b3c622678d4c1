"""A folder that processes on many machines may build at the same time: one builds it, the others use it.

The lock is `flock` (filelock's FileLock) on a small file beside the folder, `.NAME.lock`, which is not deleted.
The kernel or the NFS server releases it when its holder dies, so a held lock means a live process. A lock by file
existence (SoftFileLock) would outlive a killed holder on another machine; filelock falls back to it on file
systems without flock. Where flock only covers one machine (Lustre's `localflock`), several may build, each in
its own folder; the second to finish ends with an error, because nothing is renamed over a folder that did not
exist when the build began.

The folder is built as `NAME.partial-HOST-PROCESS` beside NAME, then renamed to NAME.
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

_POLL_S = 0.5  # long enough that hundreds of waiting machines do not load the file server
_OURS = (
    r"samples\.arrow|media\.bin|mmpack\.json|(index|plan|val|pieces)\.(json|\w+\.npy)"
    r"|bad_rows\.jsonl|overflow\.jsonl"
    r"|(index|plan|pieces)\.npz"  # earlier formats, for --overwrite
    r"|dataset_info\.json|state\.json|cache-\w+\.arrow"  # the last: caches of `datasets`
)


class Turn(NamedTuple):
    """What happened while waiting for the lock."""

    waited_for: str  # the previous holder; empty: did not wait
    was_killed: bool  # an earlier builder was killed


@contextmanager
def turn(out: Path) -> Iterator[Turn]:
    """Hold the build lock for `out`; prints a notice if another process holds it. Removes the leftovers of killed
    processes. The block must check `out` again.

    Raises:
        ValueError: the parent folder of `out` cannot be written to.
    """
    out = out.resolve()
    lock = FileLock(out.with_name(f".{out.name}.lock"))
    waited_for = ""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except OSError as error:
        if not isinstance(error, Timeout):
            raise ValueError(
                f"cannot write {out}: {error.strerror or error}; choose another --out"
            ) from None
        waited_for = " and ".join(_left_overs(out).values()) or "another process"
        print(f"waiting for {waited_for} to build {out}", file=sys.stderr, flush=True)
        lock.acquire(poll_interval=_POLL_S)
    try:
        # We hold the lock, so their owners are dead. Listing also refreshes an NFS client's view of the folder.
        left = _left_overs(out)
        for path, owner in left.items():
            if not others(path):
                print(f"removing the unfinished build of {owner}: {path.name}", file=sys.stderr)
                shutil.rmtree(path, ignore_errors=True)
        yield Turn(waited_for, bool(left))
    finally:
        lock.release()


@contextmanager
def published(out: Path, replaces: bool) -> Iterator[Path]:
    """Yield a temporary folder to write into. It is renamed to `out` when the block ends, and deleted if the block
    raises.

    Args:
        out: the final folder; it appears in one step.
        replaces: `out` holds a store of mmpack, which is replaced.

    Raises:
        ValueError: `out` holds files that are not ours.
        OSError: another process has made `out` meanwhile, or the disk refuses.
    """
    out = out.resolve()
    partial = out.with_name(f"{out.name}.partial-{socket.gethostname()}-{os.getpid()}")
    if replaces and (foreign := others(out)):
        raise ValueError(
            f"{out} also holds {', '.join(foreign[:4])}, not made by mmpack; move that away or "
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
    """Names of files and folders in a folder that do not belong to a store."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if not re.fullmatch(_OURS, path.name) or (path.is_dir() and not path.is_symlink())
    )


def _left_overs(out: Path) -> dict[Path, str]:
    """Temporary folders of builds of `out`, finished or not, and the process that owns each."""
    pattern = re.compile(re.escape(out.name) + r"\.partial-(.+)-(\d+)(-old)?")
    found = ((path, pattern.fullmatch(path.name)) for path in sorted(out.parent.iterdir()))
    return {path: f"process {name[2]} on {name[1]}" for path, name in found if name}
