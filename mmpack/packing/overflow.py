"""Samples that are longer than a pack: one rule for plans, data sets and streams."""

from __future__ import annotations

from typing import Any, Literal

from mmpack.packing.split_documents import piece_of, split_bounds
from mmpack.packing.truncate import truncate_sample
from mmpack.types import EncodedSample

OnOverflow = Literal["error", "drop", "truncate", "split"]


def is_too_long(
    num_tokens: Any, num_patches: Any, capacity: int, patch_capacity: int | None
) -> Any:
    """Whether no pack can hold samples of these sizes: a bool for numbers, (N,) bool for arrays.
    Without a `patch_capacity` patches are not looked at."""
    too_long = num_tokens > capacity
    return too_long if patch_capacity is None else too_long | (num_patches > patch_capacity)


def fit_sample(
    sample: EncodedSample, capacity: int, patch_capacity: int | None, on_overflow: OnOverflow
) -> list[EncodedSample]:
    """What packs can hold of a sample: all of it if it fits; else its beginning ("truncate"), its
    pieces ("split"), or nothing ("drop", or a cut that takes the whole answer).

    Raises:
        RowError: it cannot be split: an image that no piece can hold, or a video.
        ValueError: it does not fit and `on_overflow` is "error".
    """
    if not is_too_long(sample.num_tokens, sample.num_patches, capacity, patch_capacity):
        return [sample]
    if on_overflow == "error":
        raise ValueError(f"{sample.num_tokens:,} tokens do not fit into a pack of {capacity:,}")
    if on_overflow == "split":
        bounds = split_bounds(sample, capacity, patch_capacity)
        return [piece_of(sample, begin, end) for begin, end in bounds]
    if on_overflow == "truncate":
        cut = truncate_sample(sample, capacity, patch_capacity)
        return [cut] if cut.is_supervised else []
    return []
