"""What can be wrong with a row, and what happens to it: raised, skipped with a warning, or collected."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal


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
    """An image of a pack cannot be decoded to its planned grid. `segment` is the place of its sample
    in the pack, -1 where the error comes from another process."""

    segment = -1


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


OnError = Literal["raise", "skip"] | list[BadRow]


def names(keys: Iterable[Any]) -> str:
    """Keys of somebody's row in an error: sorted, never many, never long."""
    shown = [f"{str(key):.40}" for key in sorted(keys, key=str)]
    return f"{shown[:12]}" + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


def refuse(bad: BadRow, on_error: OnError) -> None:
    """Deal with a bad row as `on_error` says: "raise" a `ValueError`; "skip" it with a warning; or
    append it to a list."""
    if isinstance(on_error, list):
        on_error.append(bad)
    elif on_error == "skip":
        warnings.warn(f"left out {bad}", stacklevel=3)
    elif on_error == "raise":
        raise ValueError(str(bad))
    else:
        raise ValueError(f"on_error must be 'raise', 'skip' or a list, got {on_error!r}")
