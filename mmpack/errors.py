"""What can be wrong with a row, and what happens to it: raised, skipped with a warning, or collected; and how many
may be left out.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

MAX_BAD = 0.05  # the share of rows that may be left out
_JUDGED_FROM = 1000  # rows; of fewer a share says little
_MOST_REASONS = 1000  # kept; a reason is a text, and texts can differ for ever


class RowError(ValueError):
    """A row that cannot be used.

    Attributes:
        error: what is wrong with it.
        advice: what to do about it; may be empty.
    """

    def __init__(self, error: str, advice: str = "") -> None:
        super().__init__(f"{error}; {advice}" if advice else error)
        self.error = error
        self.advice = advice


class BadImageError(ValueError):
    """An image or a video of a pack cannot be decoded to its planned grid."""


@dataclass(frozen=True, slots=True, eq=False)
class BadRow:
    """A row that was left out: what `on_error=[]` collects.

    Attributes:
        source: its file. row: its number there, from 0.
        error, advice: as in `RowError`.
        content: what the row holds; None where it had been read before the error was found.
    """

    source: str
    row: int
    error: str
    advice: str = ""
    content: Any = None

    def __str__(self) -> str:
        return f"row {self.row} of {self.source}: {RowError(self.error, self.advice)}"


class Skip:
    """Leave bad rows out, up to a share of all: what `on_error="skip"` is, with a limit of your own.

    From 1,000 rows on, more than `max_bad` of them bad is a `ValueError` that counts the reasons: data whose
    images are gone must not become a training on text alone.

    Args:
        max_bad: the share, 0 to 1; 1 never stops.
        into: a list that bad rows are appended to; by default each is a warning.

    Attributes:
        num_bad: rows left out. reasons: how many by reason, numbers and names of files left away.
    """

    def __init__(self, max_bad: float = MAX_BAD, into: list[BadRow] | None = None) -> None:
        check_max_bad(max_bad)
        self.max_bad, self.into = max_bad, into
        self.num_bad = 0
        self.reasons: Counter[str] = Counter()
        self._first = ""
        self._seen: Counter[str] = Counter()  # rows by station: one that was read is encoded too

    def saw(self, station: str, num_rows: int = 1) -> None:
        """Count rows that came to a station.

        Raises:
            ValueError: too many of the rows were bad.
        """
        self._seen[station] += num_rows
        if self.num_bad:
            self._judge()

    def leave_out(self, bad: BadRow) -> None:
        """Count a bad row.

        Raises:
            ValueError: too many of the rows were bad.
        """
        self.num_bad += 1
        self._first = self._first or str(bad)
        count_reason(self.reasons, bad.error)
        if self.into is not None:
            self.into.append(bad)
        else:
            warnings.warn(f"left out {bad}", stacklevel=4)
        self._judge()

    def _judge(self) -> None:
        num_rows = max(self._seen.values(), default=0)
        judge(self.num_bad, num_rows, num_rows, self.max_bad, self.reasons, self._first)


OnError = Literal["raise", "skip"] | list[BadRow] | Skip


def names(keys: Iterable[Any]) -> str:
    """Keys of somebody's row in an error: sorted, never many, never long."""
    shown = [f"{str(key):.40}" for key in sorted(keys, key=str)]
    return f"{shown[:12]}" + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


def counting(on_error: OnError) -> OnError:
    """`on_error` for many rows: "skip" as a `Skip`, which counts them."""
    return Skip() if isinstance(on_error, str) and on_error == "skip" else on_error


def refuse(bad: BadRow, on_error: OnError) -> None:
    """Deal with a bad row as `counting(on_error)` says: "raise" a `ValueError`, append it to a list, or count it
    (`Skip`)."""
    if isinstance(on_error, list):
        on_error.append(bad)
    elif isinstance(on_error, Skip):
        on_error.leave_out(bad)
    else:
        raise ValueError(str(bad))


def check_max_bad(max_bad: float) -> None:
    """
    Raises:
        ValueError: it is no share.
    """
    if not 0 <= max_bad <= 1:
        raise ValueError(f"max_bad (--max-bad) is a share from 0 to 1, got {max_bad!r}")


def count_reason(reasons: Counter[str], error: str) -> None:
    """Count an error, numbers and names of files left away so that equal ones meet."""
    reason = re.sub(r"\S*[/\\]\S*|\S+\.\w{2,5}\b|\d[\d.,]*", "...", error[:1000])
    reason = re.sub(r"\.\.\.( \.\.\.)+", "...", reason)[:120]
    if reason not in reasons and len(reasons) >= _MOST_REASONS:
        reason = "other reasons"
    reasons[reason] += 1


def judge(
    num_bad: int,
    num_rows: int,
    num_counted: int,
    max_bad: float,
    reasons: Mapping[str, int],
    example: str,
) -> None:
    """Whether too many rows were left out.

    Args:
        num_bad: rows left out.
        num_rows: all so far; fewer than 1,000 are not judged.
        num_counted: those the share is of, taken as 1,000 at least: all rows, or those with images.
        max_bad: the share that may be left out.
        reasons: how many by reason. example: one of them.

    Raises:
        ValueError: they are too many.
    """
    if num_rows < _JUDGED_FROM or num_bad <= max_bad * max(num_counted, _JUDGED_FROM):
        return
    of = "rows" if num_counted == num_rows else "rows with images or videos"
    most = sorted(reasons.items(), key=lambda item: -item[1])[:5]
    listed = "; ".join(f"{count:,} x {reason}" for reason, count in most)
    raise ValueError(
        f"{num_bad:,} of {num_counted:,} {of} were left out, at most {max_bad:.1%} may be: {listed} (for example "
        f"{example:.500}); fix them, or allow more with --max-bad (max_bad)"
    )
