"""Work a chunk at a time: tokenizers and record batches are fastest on some hundred samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

CHUNK = 256  # rows or samples at once
T = TypeVar("T")


def chunks(values: Iterable[T], size: int = CHUNK) -> Iterator[list[T]]:
    """The values in lists of `size`, the last one shorter; what follows is not read before."""
    remaining = iter(values)
    while chunk := list(islice(remaining, size)):
        yield chunk
