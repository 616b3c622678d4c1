"""How much is read of what comes from outside, in one place: rows, decompressed data, nesting.

A file beyond one of these is no data set but a mistake or an attack, and would end in a process that is
killed for its memory, without a word.
"""

from __future__ import annotations

MAX_ROW = 1 << 26  # bytes of a row and of a CSV field; a row of megabytes is no conversation
MAX_DEPTH = 100  # lists and objects within each other; processes hand rows over by recursion
FREE_BYTES = 1 << 26  # decompressed bytes of a file that need no justification ...
MAX_RATIO = 200  # ... beyond them, at most so many for each byte of the file; text takes 3 to 20
FREE_ROWS = 1 << 16  # of Arrow and Parquet, whose rows may take no byte; beyond them the same ratio


def most_bytes(file_bytes: int) -> int:
    """How many decompressed bytes a file of this size may have."""
    return max(FREE_BYTES, MAX_RATIO * file_bytes)


def most_rows(file_bytes: int) -> int:
    """How many rows an Arrow or Parquet file of this size may have."""
    return FREE_ROWS + MAX_RATIO * file_bytes
