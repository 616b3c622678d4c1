"""Damaged files through a door: it ends in a result or a proper error, never in a crash, a hang or much memory.

    found = survives(door, mutate, count)

`mutate(rng)` damages a file and says how; `door()` reads it. Both run in child processes, so a segmentation
fault is one failed case, whose number makes it again: `mutate(random.Random(number))`.
"""

import faulthandler
import mmap
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

_MAX_CRASHES = 3  # then the rest is not tried
_LINES = 12  # of a traceback


def damaged(data, rng):
    """Bytes with a few of them changed, lost, repeated, moved or added; never the same bytes."""
    spoilt = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        place, length = rng.randrange(len(spoilt) or 1), rng.choice((1, 2, 4, 8, 64))
        kind = rng.randrange(8)
        if kind < 2:
            spoilt[place : place + 1] = bytes(
                [(spoilt[place : place + 1] or b"\0")[0] ^ 1 << rng.randrange(8)]
            )
        elif kind == 2:
            spoilt[place : place + length] = rng.randbytes(length)
        elif kind == 3:  # what is an integer somewhere
            number = rng.choice((0, 1, -1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), 2**62))
            size = 8 if abs(number) > 2**31 else rng.choice((4, 8))
            spoilt[place : place + size] = number.to_bytes(size, "little", signed=True)
        elif kind == 4:
            del spoilt[place : place + length]
        elif kind == 5:
            spoilt[place:place] = spoilt[place : place + length]
        elif kind == 6:
            other = rng.randrange(len(spoilt) or 1)
            spoilt[place : place + length] = spoilt[other : other + length]
        elif rng.random() < 0.3:
            del spoilt[place:]
    if spoilt == data:
        return damaged(data, rng)
    return bytes(spoilt)


def survives(door, mutate, count, *, errors=(ValueError,), seconds=60, mebibytes=1024):
    """Try `count` mutations; how many of them ended in "result", and in which error.

    Args:
        door: called without arguments.
        mutate: given a `random.Random`, damages what the door reads and returns a text that says how.
        errors: the exceptions that are a proper end.
        seconds: for one case, before it counts as a hang.
        mebibytes: that cases may take beyond what the process has.

    Raises:
        AssertionError: a case crashed, hung, took more memory or ended in another exception; names the cases
            and what became of the first of each kind.
    """
    at = mmap.mmap(-1, 8)  # shared with the child: the case it is at
    outcomes, failed, first, crashes = Counter(), [], 0, 0
    while first < count and crashes < _MAX_CRASHES:
        child, pipe = _start(door, mutate, range(first, count), errors, mebibytes, at)
        text, why = _listen(child, pipe, at, seconds)
        for line in text.splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "end":
                outcomes[rest] += 1
            elif kind == "bad":
                failed.append(rest.replace("\t", "\n    "))
        first = count
        if why:
            number = int.from_bytes(at[:], "little")
            trace = [line for line in text.splitlines() if not line.startswith(("end ", "bad "))]
            failed.append("\n    ".join([f"case {number} {why}", *trace[: 2 * _LINES]]))
            first, crashes = number + 1, crashes + 1
    assert not failed, f"{len(failed)} of {count} cases failed\n" + "\n".join(failed[:5])
    assert sum(outcomes.values()) == count
    return outcomes


def _start(door, mutate, numbers, errors, mebibytes, at):
    """A child at work, and what it says."""
    sys.stdout.flush()
    sys.stderr.flush()
    readable, writable = os.pipe()
    child = os.fork()
    if child:
        os.close(writable)
        return child, readable
    try:
        os.close(readable)
        faulthandler.enable(writable)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * mmap.PAGESIZE + (mebibytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number in numbers:
            at[:] = number.to_bytes(8, "little")
            how = mutate(random.Random(number))
            os.write(writable, f"{_outcome(door, errors, number, how)}\n".encode())
    except BaseException:
        os.write(writable, f"bad the test itself: {traceback.format_exc()!a}\n".encode())
    finally:
        os._exit(0)


def _outcome(door, errors, number, how):
    try:
        door()
        return "end result"
    except errors as error:
        return f"end {type(error).__name__}"
    except BaseException as error:
        lines = traceback.format_exc().splitlines()[-_LINES:]
        text = "\t".join([f"case {number} ({how}): {type(error).__name__}", *lines])
        return "bad " + text.encode("ascii", "backslashreplace").decode()


def _listen(child, pipe, at, seconds):
    """(all that a child said, why it ended early or "")."""
    said, why, case, since = [], "", -1, time.monotonic()
    os.set_blocking(pipe, False)
    while True:
        try:
            block = os.read(pipe, 1 << 16)
        except BlockingIOError:
            time.sleep(0.005)
            if at[:] != case:
                case, since = at[:], time.monotonic()
            elif time.monotonic() - since > seconds:
                why = f"took more than {seconds} seconds"
                os.kill(child, signal.SIGKILL)
                since = time.monotonic()
            continue
        if not block:
            break
        said.append(block)
    os.close(pipe)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and not why:
        why = f"ended with {signal.Signals(os.WTERMSIG(status)).name}"
    return b"".join(said).decode(errors="replace"), why
