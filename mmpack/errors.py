"""Errors of rows; policies for them (raise, skip with a warning, or collect); and the limit on skipped rows."""

from __future__ import annotations

import json
import math
import numbers
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

MAX_BAD = 0.05  # share of rows that may be left out
_JUDGED_FROM = 1000  # rows; a share of fewer says little
_MOST_REASONS = 1000  # reasons kept; there can be any number of different texts


class RowError(ValueError):
    """A row that cannot be used.

    Attributes:
        error: what is wrong.
        advice: how to fix it; may be empty.
    """

    def __init__(self, error: str, advice: str = "") -> None:
        super().__init__(f"{error}; {advice}" if advice else error)
        self.error = error
        self.advice = advice


class BadImageError(ValueError):
    """An image or a video of a pack cannot be decoded to its planned grid."""


@dataclass(frozen=True, slots=True, eq=False)
class BadRow:
    """A row that was left out, as collected by `on_error=[]`.

    Attributes:
        source: its file. row: its number in the file, from 0.
        error, advice: as in `RowError`.
        content: the row itself; None if the error was found after reading, while encoding.
    """

    source: str
    row: int
    error: str
    advice: str = ""
    content: Any = None

    def __str__(self) -> str:
        return f"row {self.row} of {self.source}: {RowError(self.error, self.advice)}"


class Skip:
    """Skip bad rows up to a share of all rows: `on_error="skip"` with a limit of your choice.

    From 1,000 rows on, a share of bad rows above `max_bad` is a `ValueError` that counts the reasons, so that a
    run whose images are missing does not silently train on text only.

    Args:
        max_bad: the share, 0 to 1; 1 never stops.
        into: a list to which bad rows are appended; by default each causes a warning.

    Attributes:
        num_bad: rows left out. reasons: number of rows per reason, without numbers and file names.
    """

    def __init__(self, max_bad: float = MAX_BAD, into: list[BadRow] | None = None) -> None:
        check_max_bad(max_bad)
        self.max_bad, self.into = max_bad, into
        self.num_bad = 0
        self.reasons: Counter[str] = Counter()
        self._first = ""
        self._seen: Counter[str] = Counter()  # rows per station; each row passes several

    def saw(self, station: str, num_rows: int = 1) -> None:
        """Count rows that reached a station, such as "reading".

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


def a_kind(kind: str) -> str:
    """ "image" or "video" with its article."""
    return f"an {kind}" if kind == "image" else f"a {kind}"


def names(keys: Iterable[Any]) -> str:
    """A row's keys for an error message: sorted, shortened, at most 12."""
    shown = [f"{str(key):.40}" for key in sorted(keys, key=str)]
    return f"{shown[:12]}" + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


def counted(number: int, noun: str) -> str:
    """A number with its noun, "1 image" or "1,024 images"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def counting(on_error: OnError) -> OnError:
    """`on_error` for many rows: "skip" becomes a `Skip`, which counts them."""
    return Skip() if isinstance(on_error, str) and on_error == "skip" else on_error


def check_on_error(on_error: OnError) -> None:
    """
    Raises:
        ValueError: there is no such choice.
    """
    if not isinstance(on_error, (list, Skip)) and on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise', 'skip', a Skip or a list, got {on_error!r}")


def refuse(bad: BadRow, on_error: OnError) -> None:
    """Handle a bad row according to `counting(on_error)`: raise a `ValueError`, append the row to a list, or count
    it (`Skip`)."""
    if isinstance(on_error, list):
        on_error.append(bad)
    elif isinstance(on_error, Skip):
        on_error.leave_out(bad)
    else:
        raise ValueError(str(bad))


def json_line(value: dict[str, Any]) -> str:
    """A row as one line of JSON: bytes and images abridged, lone surrogates escaped, NaN and infinity as
    strings."""
    try:
        try:
            return json.dumps(value, skipkeys=True, default=_abridged, allow_nan=False) + "\n"
        except ValueError:  # NaN or infinity
            return json.dumps(_finite(value), skipkeys=True, default=_abridged) + "\n"
    except RecursionError:
        return json.dumps({**value, "content": "nested too deeply to write"}) + "\n"


def _abridged(value: Any) -> str:
    if isinstance(value, (bytes, bytearray)):
        value = bytes(value[:100])  # so that repr is short
    return f"{value!r:.100}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value if not isinstance(value, float) or math.isfinite(value) else repr(value)


def is_number(value: Any) -> bool:
    """Whether a value is a number of Python's or numpy's; a bool is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def integer(value: Any, name: str) -> int:
    """An integer of Python's or numpy's, or a float that is one, as int; `name` is what errors call it.

    Raises:
        ValueError: it is none, such as a text.
    """
    if is_number(value) and (isinstance(value, numbers.Integral) or float(value).is_integer()):
        return int(value)
    raise ValueError(f"{name} must be an integer, got {value!r:.80}")


def pack_limits(capacity: Any, patch_capacity: Any) -> tuple[int, int | None]:
    """A pack's limits as integers, see `integer`.

    Raises:
        ValueError: one of them is none.
    """
    capacity = integer(capacity, "--capacity (capacity)")
    if patch_capacity is not None:
        patch_capacity = integer(patch_capacity, "--patch-capacity (patch_capacity)")
    return capacity, patch_capacity


def check_max_bad(max_bad: float) -> None:
    """
    Raises:
        ValueError: it is not a share.
    """
    if not (is_number(max_bad) and 0 <= max_bad <= 1):
        raise ValueError(f"--max-bad (max_bad) must be a share from 0 to 1, got {max_bad!r}")


def count_reason(reasons: Counter[str], error: str) -> None:
    """Count an error, without its numbers and file names, so that equal errors share a count."""
    plural = re.sub(r"\b1 (<\w+> marker|image|video)\b", r"1 \1s", error[:1000])
    reason = re.sub(r"\S*[/\\]\S*|\S+\.\w{2,5}\b|\d[\d.,]*", "...", plural)
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
    """Check the share of rows that were left out.

    Args:
        num_bad: rows left out.
        num_rows: all rows so far; below 1,000 nothing is checked.
        num_counted: the rows that the share refers to, at least 1,000: all rows, or those with images.
        max_bad: the share that may be left out.
        reasons: number of rows per reason. example: one bad row.

    Raises:
        ValueError: too many rows were left out.
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
