"""Iterate in chunks: tokenizers and record batches are fastest on a few hundred samples at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

CHUNK = 256  # rows or samples at once
T = TypeVar("T")


def chunks(values: Iterable[T], size: int = CHUNK) -> Iterator[list[T]]:
    """The values in lists of `size`, the last one shorter. Each list is read only when it is asked for."""
    remaining = iter(values)
    while chunk := list(islice(remaining, size)):
        yield chunk
