"""Data files -> batches of encoded samples for a store, in several processes.

Rows are read here, in order, and handed out in chunks; a chunk is checked, its images' headers are
read and it is encoded in one place, this process or a worker, and comes back as the bytes of an
Arrow batch. What a chunk becomes does not depend on where, and chunks come back in order, so samples
and errors are the same for any number of processes.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

from mmpack.data.chunks import chunks
from mmpack.data.encoder import Encoder
from mmpack.data.file_formats import Row, rows_or_error
from mmpack.data.readers import RowGroup, RowReader
from mmpack.errors import BadRow, RowError, Skip, counting, refuse
from mmpack.regular_files import regular_stat
from mmpack.store.arrow_schema import as_batch
from mmpack.store.encoded_store import EncodedStore

_ALONE_S = 3.0  # seconds this process works alone, as long as workers take to start


@dataclass(frozen=True)
class Indexed:
    """What became of a chunk of rows."""

    num_rows: int
    batch: bytes | None  # the samples (`mmpack.store.arrow_schema.as_batch`); None: there are none
    bad_rows: list[BadRow] = field(default_factory=list)  # by row


def index_rows(
    groups: Sequence[RowGroup],
    encoder: Encoder,
    *,
    jobs: int | None = None,
    part: tuple[int, int] = (1, 1),
) -> Iterator[Indexed]:
    """Read and encode all rows, a chunk at a time and in order.

    Args:
        groups: what `encoder.groups` made of the data files.
        encoder: how rows are read and encoded, and what becomes of bad ones.
        jobs: processes; by default as many as this one has cores, started where the rows are more
            than a few seconds' work. 1: none but this one.
        part: (i, n): of every n chunks the i-th, from 1; all rows are read, its own are encoded.

    Yields:
        One `Indexed` per chunk: its samples as an Arrow batch.

    Raises:
        ValueError: a bad row and the encoder's `on_error` is "raise", too many skipped, a file that cannot be
            read, or a worker that died.
    """
    on_error = counting(encoder.on_error)
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be positive, got {jobs}")
    # Bad rows of a chunk come back with it, so what becomes of them does not travel.
    work = _Work([group._replace(rows=()) for group in groups], replace(encoder, on_error="raise"))
    number, of = part
    chunks = (
        chunk
        for place, chunk in enumerate(_chunks(groups))
        if place % of == number - 1 or isinstance(chunk, ValueError)
    )
    with closing(_in_order(work, chunks, jobs)) as done:
        for indexed in done:
            if isinstance(on_error, Skip):
                on_error.saw("indexing", indexed.num_rows)
            for bad in indexed.bad_rows:
                refuse(bad, on_error)
            yield indexed


_Chunk = tuple[int, list[Row]] | ValueError  # rows of a group, or the error that ended its file


def _chunks(groups: Iterable[RowGroup]) -> Iterator[_Chunk]:
    for number, group in enumerate(groups):
        for chunk in chunks(rows_or_error(group.rows)):
            rows = [row for row in chunk if isinstance(row, Row)]
            if rows:
                yield number, rows
            if isinstance(chunk[-1], ValueError):
                yield chunk[-1]  # an item like any other, so that the rows before it come first
                return


class _Work:
    """What becomes of a chunk; travels to the workers once."""

    def __init__(self, groups: list[RowGroup], encoder: Encoder) -> None:
        self._groups, self._encoder = groups, encoder
        self._readers = [RowReader(encoder, group) for group in groups]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Work, (self._groups, self._encoder)

    def context(self) -> multiprocessing.context.BaseContext:
        """How workers start: never as a fork of this process, whose threads (torch's, Arrow's,
        tokenizers') would be missing there, but of a fresh one that has done the imports once."""
        if "forkserver" not in multiprocessing.get_all_start_methods():
            return multiprocessing.get_context("spawn")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, type(self._encoder.tokenizer).__module__])
        return context

    def __call__(self, chunk: _Chunk) -> Indexed:
        if isinstance(chunk, ValueError):
            raise chunk
        number, rows = chunk
        bad_rows: list[BadRow] = []
        samples = []
        for row in rows:
            try:
                samples += self._readers[number].samples(row)
            except RowError as error:
                bad = BadRow(row.source, row.number, error.error, error.advice, row.content)
                bad_rows.append(bad)
        encoded = [one for _, one in self._encoder.encode_chunk(samples, bad_rows)]
        bad_rows.sort(key=lambda bad: bad.row)
        return Indexed(len(rows), as_batch(encoded) if encoded else None, bad_rows)


def _in_order(
    work: _Work, chunks: Iterator[_Chunk], jobs: int | None
) -> Generator[Indexed, None, None]:
    """The work done on every chunk: here, or here until workers pay, or by workers."""
    alone_until = -math.inf if jobs else time.monotonic() + _ALONE_S
    jobs = jobs or _num_cores()
    if jobs == 1:
        alone_until = math.inf
    while time.monotonic() < alone_until:
        chunk = next(chunks, None)
        if chunk is None:
            return
        yield work(chunk)

    pending: deque[Future[Indexed]] = deque()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "work")  # a pipe would be filled for one worker after the other
        with open(path, "wb") as file:
            pickle.dump(work, file)
        pool = ProcessPoolExecutor(jobs, work.context(), _begin, (path,))
        try:
            for chunk in chunks:
                pending.append(pool.submit(_worked, chunk))
                if len(pending) > jobs + 2:  # each has one, and the next lie ready
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise ValueError(
                "a worker process died, killed perhaps because memory ran out; fewer jobs need less"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_work: _Work  # of a worker process


def _begin(path: str) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that reads
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores have a process each already
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(path, "rb") as file:
        _work = pickle.load(file)  # which the process that reads has just written


def _end_with_parent() -> None:
    """One that is killed cannot end its workers, who would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _worked(chunk: _Chunk) -> Indexed:
    return _work(chunk)


def made_from(groups: Iterable[RowGroup], encoder: Encoder) -> dict[str, str]:
    """What the samples of a store depend on, as JSON holds it: two stores with the same are equal.

    Data files count by size and time of change, as make does it; the tokenizer by its content.
    Images are not in it; `why_outdated` looks at them.
    """
    parts = {"mmpack's version": version("mmpack")}
    for group in groups:
        if group.file is not None:
            found = group.file.stat()
            name = str(group.file.resolve())
            parts[name] = f"{found.st_size} bytes, {found.st_mtime_ns} ns, {group.fields}"
            parts[f"media folders of {name}"] = repr(group.folders.names)
    return parts | encoder.settings()


def different(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, by name."""
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def why_outdated(
    store: EncodedStore, parts: Mapping[str, str], look_at_images: bool = True
) -> list[str]:
    """Why a store is not what would be made now: the parts that differ, by name, or the first image
    that changed since `about.begun`. Empty: it can be used again."""
    names = different(store.about.made_from, parts)
    for path in () if names or not look_at_images else sorted(set(store.image_paths())):
        try:
            found = regular_stat(path)
        except (OSError, ValueError):  # no regular file, or a name that no file can have
            return [path]
        if max(found.st_mtime_ns, found.st_ctime_ns) > store.about.begun:
            return [path]
    return names
