"""Samples that are longer than a pack, handled in the same way for plans, data sets and streams."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from mmpack.errors import counted
from mmpack.packing.split_documents import piece_of, split_bounds
from mmpack.packing.truncate import truncate_sample
from mmpack.types import EncodedSample

OnOverflow = Literal["error", "drop", "truncate", "split"]
CONVERSATION = (
    "a conversation cannot be split; --on-overflow split (on_overflow) is for documents, "
    "--stage pretrain (stage)"
)
_log = logging.getLogger(__name__)
_NAMED = 3  # rows in a log line
TOO_LONG_ADVICE = (
    "raise --capacity (capacity), lower --max-pixels (max_pixels), or pass --on-overflow drop or truncate "
    "(on_overflow)"
)


def is_too_long(
    num_tokens: Any, num_patches: Any, capacity: int, patch_capacity: int | None
) -> Any:
    """Whether samples of these sizes exceed a pack: a bool for numbers, (N,) bool for arrays. Patches are ignored
    if `patch_capacity` is None."""
    too_long = num_tokens > capacity
    return too_long if patch_capacity is None else too_long | (num_patches > patch_capacity)


def fit_sample(
    sample: EncodedSample, capacity: int, patch_capacity: int | None, on_overflow: OnOverflow
) -> list[EncodedSample]:
    """The parts of a sample that can be packed: the sample if it fits; else its beginning ("truncate"), its pieces
    ("split"), or nothing ("drop", or if the cut leaves no answer).

    Raises:
        RowError: the sample cannot be split: it has a video, or an image that no piece can hold.
        ValueError: the sample does not fit and `on_overflow` is "error".
    """
    if not is_too_long(sample.num_tokens, sample.num_patches, capacity, patch_capacity):
        return [sample]
    if on_overflow == "error":
        raise ValueError(
            f"{sample.num_tokens:,} tokens do not fit into a pack of {capacity:,}; {TOO_LONG_ADVICE}"
        )
    if on_overflow == "split":
        bounds = split_bounds(sample, capacity, patch_capacity)
        return [piece_of(sample, begin, end) for begin, end in bounds]
    if on_overflow == "truncate":
        cut = truncate_sample(sample, capacity, patch_capacity)
        return [cut] if cut.is_supervised else []
    return []


def tell_overflow(
    fate: str, numbers: Sequence[int], name: Callable[[int], str], num_samples: int, room: str
) -> None:
    """Log what a plan took from samples that are too long, unless there are none: how many, and the first.

    Args:
        fate: "left out", or "cut".
        numbers: of the samples. name: a sample in words, such as "row 3 of train.json".
        num_samples: samples in all. room: the capacity in words.
    """
    if not numbers:
        return
    first = ", ".join(map(name, numbers[:_NAMED]))
    rest = f" and {len(numbers) - _NAMED:,} more" if len(numbers) > _NAMED else ""
    of = f"{len(numbers):,} of {counted(num_samples, 'sample')}"
    _log.warning(f"{fate}: {of}, too long for a pack of {room}: {first}{rest}")


def check_choice(on_overflow: str) -> None:
    """
    Raises:
        ValueError: there is no such choice.
    """
    if on_overflow not in get_args(OnOverflow):
        raise ValueError(
            f"on_overflow must be 'error', 'drop', 'truncate' or 'split', got {on_overflow!r}"
        )


def check_split(on_overflow: str, stage: str) -> None:
    """
    Raises:
        ValueError: conversations would be split.
    """
    if stage == "sft" and on_overflow == "split":
        raise ValueError(CONVERSATION)
