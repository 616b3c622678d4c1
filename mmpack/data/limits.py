"""Limits on untrusted input: row size, decompressed size, nesting.

A file beyond one of these is a mistake or an attack. Reading it would use up memory, and the operating system
would kill the process without an error message.
"""

from __future__ import annotations

MAX_ROW = 1 << 26  # bytes per row and per CSV field; real rows are far smaller
MAX_PATH = 4096  # characters; longer ones are no path of Linux or macOS
MAX_DEPTH = 100  # nested lists and objects; rows are pickled recursively between processes
MAX_COUNT = (1 << 31) - 1  # of rows, in a dataset_info.json, in a store's manifest and in an epoch
FREE_BYTES = 1 << 26  # decompressed bytes that any file may have ...
MAX_RATIO = 200  # ... or this many per byte of the file, if more; text compresses 3x to 20x
FREE_ROWS = (
    1 << 16
)  # Arrow and Parquet rows can take 0 bytes; above this, `MAX_RATIO` per file byte


def most_bytes(file_bytes: int) -> int:
    """The maximum decompressed bytes of a file of this size."""
    return max(FREE_BYTES, MAX_RATIO * file_bytes)


def most_rows(file_bytes: int) -> int:
    """The maximum rows of an Arrow or Parquet file of this size."""
    return FREE_ROWS + MAX_RATIO * file_bytes
