"""Progress of work on rows, on stderr: a bar in a terminal or a notebook, elsewhere a line per minute.

The bar is tqdm's, as in Trainer and `datasets`. `logging.getLogger("mmpack").setLevel(logging.ERROR)` switches
bars and lines off; the command line's --quiet does it for this file's logger alone.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from mmpack.data.file_formats import Row, count_rows
from mmpack.data.readers import RowGroup
from mmpack.data.remote_roots import RemotePath

T = TypeVar("T")
_log = logging.getLogger(__name__)
_LINE_S = 60.0  # from one line to the next


class Progress:
    """Counts finished items and shows progress; `total` is None if unknown."""

    def __init__(self, what: str, total: int | None, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._count = 0
        self._start = self._last_line = time.monotonic()
        self._is_on = _log.isEnabledFor(logging.WARNING)
        self._bar = _bar(what, total, unit) if self._is_on else None

    def update(self, count: int = 1) -> None:
        """Count finished items."""
        self._count += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._is_on and time.monotonic() >= self._last_line + _LINE_S:
            self._last_line = time.monotonic()
            print(self._line(self._last_line - self._start), file=sys.stderr, flush=True)

    def each(self, values: Iterable[T]) -> Iterator[T]:
        """The values; each is counted when it is taken."""
        for value in values:
            self.update()
            yield value

    def expect(self, count: int) -> None:
        """Increase the total."""
        if self._total is not None:
            self._total += count
            if self._bar is not None:
                self._bar.total = self._total
                self._bar.refresh()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def _line(self, seconds: float) -> str:
        rate = self._count / seconds
        done, left = f"{self._count:,}", ""
        if self._total:
            done += f" of {self._total:,}"
            minutes = max(self._total - self._count, 0) / rate / 60 if rate else 0.0
            left = f" ({self._count / self._total:.0%}), {minutes:,.0f} min left"
        return f"{self._what}: {done} {self._unit}{left}, {rate:,.1f} {self._unit}/s"


def _bar(what: str, total: int | None, unit: str) -> Any:
    """A tqdm bar; None without a terminal or notebook, or without tqdm."""
    if not (sys.stderr.isatty() or "ipykernel" in sys.modules):
        return None
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    shape = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
    return tqdm(total=total, unit=f" {unit}", desc=what, bar_format=shape, dynamic_ncols=True)


@contextmanager
def progress(what: str, total: int | None = None, unit: str = "rows") -> Iterator[Progress]:
    """Show the progress of the block, which calls `update`."""
    shown = Progress(what, total, unit)
    try:
        yield shown
    finally:
        shown.close()


@contextmanager
def row_progress(
    what: str, groups: Sequence[RowGroup], *, parts: int = 1, total: int | None = None
) -> Iterator[tuple[list[RowGroup], Progress]]:
    """`progress` over the rows of data files; the total is known if the number of rows in every file is.

    Args:
        groups: the data files; the block must read its rows from the groups that are yielded.
        parts: the block processes one of this many parts of the rows.
        total: number of rows, if `groups` are rows in memory.
    """
    # Objects would be opened one after another, before the first row.
    counts = [
        None if group.file is None or isinstance(group.file, RemotePath) else count_rows(group.file)
        for group in groups
    ]
    is_array = [group.file is not None and group.file.suffix == ".json" for group in groups]
    if all(array or count is not None for array, count in zip(is_array, counts)):
        total = sum(count or 0 for count in counts) // parts
    with progress(what, total) as shown:

        def expected(rows: Iterable[Row]) -> Iterator[Row]:
            """A JSON array is read completely, so its length is known only then."""
            rows = list(rows)
            shown.expect(len(rows) // parts)
            yield from rows

        yield (
            [
                group._replace(rows=expected(group.rows)) if array else group
                for group, array in zip(groups, is_array)
            ],
            shown,
        )
