"""Values in chunks, and indexing by number or slice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from operator import index
from typing import Any, TypeVar

CHUNK = 256  # rows or samples at once: tokenizers and record batches are fastest on a few hundred
T = TypeVar("T")


def chunks(values: Iterable[T], size: int = CHUNK) -> Iterator[list[T]]:
    """The values in lists of `size`, the last one shorter. Each list is read lazily."""
    remaining = iter(values)
    while chunk := list(islice(remaining, size)):
        yield chunk


def item_at(number: Any, length: int, get: Callable[[int], T], noun: str) -> Any:
    """`get(number)` with the numbers, slices and errors of a list of `length` items.

    Returns:
        An item; for a slice, a list of items.

    Raises:
        IndexError: there is no such item. TypeError: it is neither an integer nor a slice.
    """
    if isinstance(number, slice):
        return [get(place) for place in range(length)[number]]
    try:
        place = index(number)
    except TypeError:
        raise TypeError(
            f"the index of a {noun} must be an integer or a slice, got {type(number).__name__}"
        ) from None
    if not -length <= place < length:
        raise IndexError(f"{noun} {place} of {length}")
    return get(place % length)
