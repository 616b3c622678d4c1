"""Data files -> batches of encoded samples for a store, in several processes.

The main process reads rows in order and hands them out in chunks. The main process or a worker (`_Workers`)
checks a chunk, reads its image headers, encodes it, and returns the bytes of an Arrow batch. The result does not
depend on the process, and chunks are returned in order, so samples and errors are the same for any number of
processes.
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
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, Protocol

from mmpack.data.chunks import chunks
from mmpack.data.encoder import Encoder
from mmpack.data.file_formats import Row, rows_or_error
from mmpack.data.readers import RowGroup, RowReader
from mmpack.data.remote_files import identity, in_parallel
from mmpack.data.remote_roots import DataPath, RemotePath, is_remote
from mmpack.data.row_keys import UnreadByFile, log_unread
from mmpack.data.row_outcomes import outcomes
from mmpack.errors import BadRow, RowError, Skip, counting, refuse
from mmpack.regular_files import regular_stat
from mmpack.store.arrow_schema import Batch, as_batch, read_batch, sample_of
from mmpack.store.data_files import changed_objects
from mmpack.store.encoded_store import EncodedStore
from mmpack.types import EncodedSample

_ALONE_S = 3.0  # seconds before workers are started; they take about as long to start


@dataclass(frozen=True)
class Indexed:
    """The result of a chunk of rows."""

    num_rows: int
    batch: Batch | None  # the samples; None: no samples
    bad_rows: list[BadRow] = field(default_factory=list)  # sorted by row
    source: str = ""  # their file
    unread: dict[str, int] = field(
        default_factory=dict
    )  # fields that are not read -> rows with them


def index_rows(
    groups: Sequence[RowGroup],
    encoder: Encoder,
    *,
    jobs: int | None = None,
    part: tuple[int, int] = (1, 1),
    ray: str | None = None,
) -> Iterator[Indexed]:
    """Read and encode all rows, a chunk at a time and in order.

    Args:
        groups: the data files, from `encoder.groups`.
        encoder: how to read and encode rows, and what to do with bad ones.
        jobs: number of worker processes. Default: one per core, started only if the rows take more than a few
            seconds. 1: no workers.
        part: (i, n): encode every n-th chunk, starting with the i-th, from 1. All rows are read.
        ray: address of a Ray cluster that does the work instead of processes; "local": a Ray on this machine.

    Yields:
        One `Indexed` per chunk: its samples as an Arrow batch.

    Raises:
        ValueError: a row is bad and the encoder's `on_error` is "raise", too many were skipped, a file cannot be
            read, or a worker died (of Ray: again and again).
    """
    on_error = counting(encoder.on_error)
    if jobs is not None and jobs < 1:
        raise ValueError(f"--jobs (jobs) must be positive, got {jobs}")
    # Bad rows are returned with their chunk and handled here, so workers need no `on_error`.
    work = _Work([group._replace(rows=()) for group in groups], replace(encoder, on_error="raise"))
    number, of = part
    chunks = (
        chunk
        for place, chunk in enumerate(_chunks(groups))
        if place % of == number - 1 or isinstance(chunk, ValueError)
    )
    with closing(_in_order(work, chunks, jobs, ray)) as done:
        for indexed in done:
            if isinstance(on_error, Skip):
                on_error.saw("indexing", indexed.num_rows)
            for bad in indexed.bad_rows:
                refuse(bad, on_error)
            yield indexed


def encoded_rows(
    groups: Sequence[RowGroup], encoder: Encoder, jobs: int | None, tell: Callable[[int], None]
) -> list[EncodedSample]:
    """All samples of `index_rows`, in memory; `tell` is given the number of rows of each chunk."""
    samples: list[EncodedSample] = []
    unread = UnreadByFile()
    for indexed in index_rows(groups, encoder, jobs=jobs):
        tell(indexed.num_rows)
        unread.add(indexed.source, indexed.unread)
        if indexed.batch is not None:
            batch, contents = read_batch(indexed.batch.rows), indexed.batch.contents
            for row in range(batch.num_rows):
                sample = sample_of(batch.columns, row, encoder.vision, contents)
                assert sample is not None  # its checksum is right
                samples.append(sample)
    for source, fields in unread.items():
        log_unread(source, fields)
    return samples


_Chunk = tuple[int, list[Row]] | ValueError  # rows of a group, or the error that ended its file


def _chunks(groups: Iterable[RowGroup]) -> Iterator[_Chunk]:
    for number, group in enumerate(groups):
        for chunk in chunks(rows_or_error(group.rows)):
            rows = [row for row in chunk if isinstance(row, Row)]
            if rows:
                yield number, rows
            if isinstance(chunk[-1], ValueError):
                yield chunk[-1]  # an item, so that the rows before it are handled first
                return


class _Work:
    """Checks and encodes a chunk; sent to each worker once."""

    def __init__(self, groups: list[RowGroup], encoder: Encoder) -> None:
        self._groups, self._encoder = groups, encoder
        self._readers = [RowReader(encoder, group) for group in groups]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Work, (self._groups, self._encoder)

    def context(self) -> multiprocessing.context.BaseContext:
        """How to start workers: never as a fork of this process, because its threads (torch, Arrow, tokenizers)
        would be missing, but from a fork server that has done the imports once."""
        if "forkserver" not in multiprocessing.get_all_start_methods():
            return multiprocessing.get_context("spawn")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, type(self._encoder.tokenizer).__module__])
        resource_tracker.ensure_running()  # first: starting it unblocks the signal
        # The main process handles Ctrl-C; the fork server and workers, which inherit this, would print tracebacks.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # One that does nothing waits for the imports, so that Ctrl-C during them leaves no worker half started.
        first = context.Process()
        first.start()
        first.join()
        return context

    def __call__(self, chunk: _Chunk) -> Indexed:
        if isinstance(chunk, ValueError):
            raise chunk
        number, rows = chunk
        reader = self._readers[number]
        bad_rows: list[BadRow] = []
        samples = []
        for row, found in outcomes(reader, rows):
            if isinstance(found, RowError):
                bad = BadRow(row.source, row.number, found.error, found.advice, row.content)
                bad_rows.append(bad)
            else:
                samples += found
        encoded = [one for _, one in self._encoder.encode_chunk(samples, bad_rows)]
        bad_rows.sort(key=lambda bad: bad.row)
        unread = dict(reader.unread)
        reader.unread.clear()
        batch = as_batch(encoded) if encoded else None
        return Indexed(len(rows), batch, bad_rows, self._groups[number].name, unread)


class _Workers(Protocol):
    """Where chunks are worked on, outside of this process: `_Processes`, `RayTasks`."""

    def most(self) -> int:
        """Chunks to hand out at once."""

    def submit(self, chunk: _Chunk) -> Any:
        """Hand out a chunk; returns what `result` takes."""

    def result(self, task: Any) -> Indexed:
        """Wait for a chunk's result."""

    def close(self) -> None:
        """End, without what is not finished."""


def _in_order(
    work: _Work, chunks: Iterator[_Chunk], jobs: int | None, ray: str | None
) -> Generator[Indexed, None, None]:
    """Do the work for each chunk: in this process for the first seconds, then in workers."""
    alone_until = -math.inf if jobs or ray is not None else time.monotonic() + _ALONE_S
    jobs = jobs or _num_cores()
    if jobs == 1 and ray is None:
        alone_until = math.inf
    while time.monotonic() < alone_until:
        chunk = next(chunks, None)
        if chunk is None:
            return
        yield work(chunk)

    workers: _Workers
    if ray is None:
        workers = _Processes(work, jobs)
    else:
        from mmpack.store.ray_chunks import RayTasks

        workers = RayTasks(work, ray, jobs)
    pending: deque[Any] = deque()
    try:
        for chunk in chunks:
            pending.append(workers.submit(chunk))
            if len(pending) > workers.most():
                yield workers.result(pending.popleft())
        while pending:
            yield workers.result(pending.popleft())
    finally:
        workers.close()


class _Processes:
    """Worker processes of this machine."""

    def __init__(self, work: _Work, jobs: int) -> None:
        self._jobs = jobs
        self._folder = tempfile.TemporaryDirectory()
        path = os.path.join(self._folder.name, "work")
        with open(path, "wb") as file:  # workers read a file in parallel, a pipe serially
            pickle.dump(work, file)
        self._pool = ProcessPoolExecutor(jobs, work.context(), _begin, (path,))

    def most(self) -> int:
        return self._jobs + 2  # one per worker, and a few ready

    def submit(self, chunk: _Chunk) -> Future[Indexed]:
        with _death_told():
            return self._pool.submit(_worked, chunk)

    def result(self, task: Future[Indexed]) -> Indexed:
        with _death_told():
            return task.result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._folder.cleanup()


@contextmanager
def _death_told() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise ValueError(
            "a worker process died: memory ran out (fewer jobs need less), or jobs= is used in a script "
            "without if __name__ == '__main__':"
        ) from None


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_work: _Work  # set in worker processes


def _begin(path: str) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process per core already
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(path, "rb") as file:
        _work = pickle.load(file)  # written by the main process


def _end_with_parent() -> None:
    """End this worker when the main process dies; a killed process cannot end its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _worked(chunk: _Chunk) -> Indexed:
    return _work(chunk)


def made_from(groups: Iterable[RowGroup], encoder: Encoder) -> dict[str, str]:
    """Everything that a store's samples depend on, for JSON; stores with equal values are equal.

    Data files are identified by size and modification time, as in make; the tokenizer by its content. Images are
    not included; `why_outdated` checks them.
    """
    parts = {"mmpack's version": version("mmpack")}
    groups = list(groups)
    objects = {group.file.url for group in groups if isinstance(group.file, RemotePath)}
    known = dict(zip(objects, map(str, in_parallel(identity, objects))))
    for group in groups:
        if group.file is not None:
            file = name = str(group.file.resolve())
            while name in parts:  # read more than once, perhaps by another entry
                name += " again"
            parts[name] = f"{known.get(file) or _stat(group.file)}, {group.fields}"
            parts[f"media folders of {name}"] = repr(group.folders.names)
    return parts | encoder.settings()


def _stat(file: DataPath) -> str:
    assert isinstance(file, Path)
    found = file.stat()
    return f"{found.st_size} bytes, {found.st_mtime_ns} ns"


def different(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of entries that differ."""
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def why_outdated(
    store: EncodedStore, parts: Mapping[str, str], look_at_images: bool = True
) -> list[str]:
    """Why a store is out of date: the names of parts that differ, or the first image or folder of frames that
    changed since `about.begun`. Empty if the store can be reused."""
    names = different(store.about.made_from, parts)
    if names or not look_at_images:
        return names
    if changed := changed_objects(sorted(set(store.objects())), needed=True):
        return changed[:1]
    images = sorted(path for path in set(store.image_paths()) if not is_remote(path))
    folders = sorted(
        set(store.frame_folders())
    )  # a frame that is added or removed changes its folder
    for path, stat in [
        *((one, regular_stat) for one in images),
        *((one, os.stat) for one in folders),
    ]:
        try:
            found = stat(path)
        except (OSError, ValueError):  # not a regular file, or an invalid name
            return [path]
        if max(found.st_mtime_ns, found.st_ctime_ns) > store.about.begun:
            return [path]
    return []
