"""Output to a terminal: escapes control characters in text from rows and paths, and wraps our own lines.

A terminal obeys control characters: they can move the cursor, hide text, change the title or write to the
clipboard. So everything the command line prints passes through `escaped_streams`. Text that must stay on one line,
such as an error or a table cell, also passes through `one_line`.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

_UNSEEN = (
    "Cc",
    "Cf",
    "Cs",
    "Co",
    "Cn",
    "Zl",
    "Zp",
)  # control, format, surrogates, line separators
_PLAIN = re.compile(r"[\x20-\x7e\n\t]*")
_CURSOR_UP = re.compile(r"\n*(?:\x1b\[A)*")  # between several progress bars


def printable(text: str, keep: str = "\n\t") -> str:
    """Escape control and format characters except `keep`, so that text neither controls a terminal nor hides."""
    if _PLAIN.fullmatch(text) and "\n" in keep:
        return text
    return "".join(
        char if char in keep or unicodedata.category(char) not in _UNSEEN else _escape(char)
        for char in text
    )


def one_line(text: Any) -> str:
    """Like `printable`, on one line."""
    return printable(str(text), keep="")


def _escape(char: str) -> str:
    if char == "\x7f":
        return "\\u007f"  # also valid in JSON, which may contain it
    return char.encode("unicode_escape", "surrogatepass").decode()


class _Escaped:
    """A text stream that escapes what is written to it. For progress bars, on stderr, it passes on carriage
    returns and cursor-up sequences."""

    def __init__(self, stream: Any, has_bars: bool) -> None:
        self.raw = stream
        self._has_bars = has_bars

    def write(self, text: str) -> int:
        start = ""
        if self._has_bars and _CURSOR_UP.fullmatch(text):
            start, text = text, ""
        elif self._has_bars and text.startswith("\r"):
            start, text = "\r", text[1:]
        self.raw.write(start + printable(text))
        return len(start) + len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


@contextmanager
def escaped_streams() -> Iterator[None]:
    """Make `sys.stdout` and `sys.stderr` escape what is written to them, including the traceback of a bug."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Escaped(out, False), _Escaped(err, True)
    try:
        yield
    except Exception:
        if err is sys.__stderr__:
            err = sys.stderr
        raise
    finally:
        sys.stdout, sys.stderr = out, err


def is_colored(stream: TextIO) -> bool:
    """Whether to write colors: as NO_COLOR or FORCE_COLOR says, otherwise only to a terminal."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or stream.isatty()


def width() -> int | None:
    """Columns of the terminal; None: stdout is not a terminal, and lines may have any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def say(text: str) -> None:
    """Print lines, on a terminal wrapped between words to its width."""
    columns = width()
    for line in text.split("\n"):
        if columns is not None and len(line) > columns:
            indent = " " * (len(line) - len(line.lstrip()) + 4)
            line = textwrap.fill(
                line,
                columns,
                subsequent_indent=indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
        print(line)


def unescaped(stream: TextIO) -> TextIO:
    """The underlying stream, for printable text with color codes of our own."""
    raw: TextIO = getattr(stream, "raw", stream)
    return raw
