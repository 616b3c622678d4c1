"""Rows that a stream leaves out: counted by its shards, listed in the process that trains.

A shard reads ahead of the packs that are trained on, and a resumed shard reads some rows again. So a bad row
belongs to the first pack whose state is after the row: that state counts it, and that pack carries it to the
process that trains, which puts it into a list or a file. Each bad row is counted once, however often a run is
stopped.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmpack.errors import BadRow, OnError, Skip, count_reason, json_line, judge
from mmpack.packing.pack_samples import PackSamples
from mmpack.regular_files import open_regular

_CARRIED_REASONS = 20  # in a state; the others are one
_CONTENT = 2000  # characters of a row's content that a pack carries
_log = logging.getLogger(__name__)


class ShardErrors:
    """The bad rows of a shard.

    Args:
        on_error: "raise", a list or a `Skip`.

    Attributes:
        reasons: bad rows before the shard's position, by reason. They are counted by `take`.
    """

    def __init__(self, on_error: OnError) -> None:
        self._on_error = on_error
        self._num_rows = 0  # read
        self._first = 0  # rows before this one were counted earlier
        self._waiting: list[tuple[int, BadRow]] = []
        self.reasons = Counter[str]()
        self._read = Counter[str]()  # reasons of all bad rows that were read
        self._example = ""

    def begin(self, first: int, state: dict[str, Any] | None = None) -> None:
        """Go to row `first` of a pass, in the state that `state` returned there."""
        self._first, self._waiting = first, []
        if state is not None:
            self._num_rows, self._example = state["of"], state["example"]
            self.reasons = Counter(state["reasons"])
            self._read = self.reasons.copy()

    def state(self, num_rows: int) -> dict[str, Any]:
        """The counts, for JSON. `num_rows`: all rows before the position, in all passes."""
        most = self.reasons.most_common(_CARRIED_REASONS)
        if others := self.reasons.total() - sum(count for _, count in most):
            most.append(("other reasons", others))
        return {"of": num_rows, "reasons": dict(most), "example": self._example}

    def saw(self, number: int) -> None:
        """Count a row that was read.

        Raises:
            ValueError: too many rows are bad.
        """
        if number >= self._first:
            self._num_rows += 1
            self._judge()

    def leave_out(self, number: int, bad: BadRow, *, of_file: bool = False) -> None:
        """Handle a bad row, row `number` of the source. `of_file`: it stands for rows of a file, so the log names
        it in any case.

        Raises:
            ValueError: `on_error` is "raise", or too many rows are bad.
        """
        if isinstance(self._on_error, str):
            raise ValueError(str(bad))
        if number < self._first:
            return
        self._waiting.append((number, bad))
        self._example = self._example or f"{bad!s:.500}"
        count_reason(self._read, bad.error)
        count = self._read.total()
        if of_file or count <= 3 or count & (count - 1) == 0:
            so_far = "" if count <= 3 else f"; {count:,} rows left out so far"
            _log.warning("left out %s%s", bad, so_far)
        self._judge()

    def _judge(self) -> None:
        num_bad, num_rows = self._read.total(), self._num_rows
        if num_bad and isinstance(self._on_error, Skip):
            judge(num_bad, num_rows, num_rows, self._on_error.max_bad, self._read, self._example)

    def take(self, position: int) -> list[BadRow]:
        """Count the bad rows before a position, and return those that were not returned before."""
        taken = [one for one in self._waiting if one[0] < position]
        self._waiting = [one for one in self._waiting if one[0] >= position]
        for _, bad in taken:
            count_reason(self.reasons, bad.error)
        return [bad for _, bad in sorted(taken, key=lambda one: one[0])]


def as_line(bad: BadRow, number_of_pass: int) -> dict[str, Any]:
    """A bad row for JSON, as in `bad_rows.jsonl` of a store, with its pass. A long content is abridged."""
    content = json.loads(json_line({"content": bad.content}))["content"]
    text = content if isinstance(content, str) else json.dumps(content)
    return {
        "source": bad.source,
        "row": bad.row,
        "error": bad.error,
        "advice": bad.advice,
        "content": content if len(text) <= _CONTENT else f"{text[:_CONTENT]} ...",
        "pass": number_of_pass,
        "path": bad.path,
    }


def joined_resume(items: Sequence[Any]) -> bytes | None:
    """The `resume` of a batch of items, whose images have been decoded: the last one's, with the rows that all of
    them left out. None: they are not of a stream."""
    streamed = [item for item in items if isinstance(item, PackSamples) and item.resume is not None]
    if not streamed:
        return None
    last = streamed[-1].resume
    if len(streamed) == 1 and streamed[-1].policy.on_bad_image == "raise":
        return last
    places = [json.loads(item.resume) for item in streamed if item.resume is not None]
    rows, counts = [], [0, 0, 0]
    for item, place in zip(streamed, places):
        rows += place.get("left out", [])
        rows += [as_line(bad, number) for number, bad in item.policy.left_out]
        media = sum(bool(sample.media) for sample in item)
        found = (len(item), media, len(item.policy.left_out))
        if item.policy.on_bad_image == "drop":
            counts = [a + b for a, b in zip(counts, found)]
    return json.dumps({**places[-1], "left out": rows, "images": counts}).encode()


class BadRowFile:
    """Lists rows that were left out in a file, one per line of JSON.

    Lines are appended. A row that the file lists already for the same pass and reason, also because a stopped run
    wrote it, is not listed again, and a line that was cut off is removed.

    Args:
        path: the file; its folder is created.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._listed: set[int] | None = None  # hashes of rows that the file lists

    def write(self, lines: Iterable[dict[str, Any]]) -> None:
        """Append rows, as `as_line` returns them.

        Raises:
            OSError: the file cannot be written.
            ValueError: it is not a regular file.
        """
        if self._listed is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._listed = self._read()
        new = []
        for line in lines:
            if (key := _key(line)) not in self._listed:  # as if the run had been stopped in between
                self._listed.add(key)
                new.append(line)
        if new:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(map(json_line, new)))

    def _read(self) -> set[int]:
        listed: set[int] = set()
        whole = 0
        if not self.path.exists():
            return listed
        with open_regular(self.path) as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                try:
                    listed.add(_key(json.loads(line)))
                except (ValueError, RecursionError, AttributeError):
                    continue  # not ours: it stays
        if whole < self.path.stat().st_size:
            os.truncate(self.path, whole)
        return listed


def _key(line: dict[str, Any]) -> int:
    names = ("pass", "path", "source", "row", "error")
    return hash(tuple(str(line.get(name, "")) for name in names))
