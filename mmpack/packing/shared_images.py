"""Which images and videos of a pack are the same, so that it has the patches of each once.

Two are the same if their rows name the same thing: the same file with the same grid and options, or the same bytes, or
the same PIL object. Nothing is opened or decoded. Two names of one file (links) are two images, and so are equal bytes
in two files.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpack.data.videos import num_grids
from mmpack.errors import RowError
from mmpack.types import EncodedSample, ImageRef, Int32, Media

Key = Hashable


def _itself(data: bytes) -> Hashable:
    return data


def media_key(
    ref: Media,
    grid_thw: NDArray[np.integer[Any]],
    of_bytes: Callable[[bytes], Hashable] = _itself,
) -> Key:
    """The identity of an image or video, equal for two that have equal patches.

    Args:
        grid_thw: (G, 3), the grids of its markers.
        of_bytes: what stands for the bytes of one without a file; by default they do, which compares them exactly and
            hashes an object once. A key then keeps them in memory: for many samples, pass a hash. In a store, their
            place in `media.bin` is an identity as well, because each distinct one is written once.

    Returns:
        Valid while `ref` exists, because a PIL image is known by its address.
    """

    def source(path: str, data: Any) -> Key:
        if data is None:
            return path  # absolute, as the encoder resolved it
        return ("bytes", of_bytes(data)) if isinstance(data, bytes) else ("object", id(data))

    given = () if ref.options is None else tuple(ref.options.given.items())
    grids = tuple(grid_thw.ravel().tolist())
    if isinstance(ref, ImageRef):
        return "image", source(ref.path, ref.data), grids, given
    files = tuple(source(frame.path, frame.data) for frame in ref.frames)
    return (
        "video",
        files or source(ref.path, ref.data),
        grids,
        given,
        ref.num_frames,
        ref.fps,
    )


def media_keys(
    sample: EncodedSample, of_bytes: Callable[[bytes], Hashable] = _itself
) -> list[tuple[Key, int]] | None:
    """(`media_key`, number of grids) of a sample's images and videos, in marker order; None if its references do not
    match its grids, as for one that has none."""
    try:
        counts = [num_grids(ref, sample.vision) for ref in sample.media]
    except RowError:  # a video that was not probed, which fails when it is decoded
        return None
    if sum(counts) != len(sample.grid_thw):
        return None
    ends = np.cumsum(counts)
    grids = [sample.grid_thw[end - count : end] for end, count in zip(ends, counts)]
    keys = (media_key(ref, grid, of_bytes) for ref, grid in zip(sample.media, grids))
    return list(zip(keys, counts))


def first_shown(samples: Iterable[EncodedSample]) -> Int32:
    """(I,) for each marker of a pack, in order, the number of the first marker that shows the same image, or the same
    part of the same video; its own number if there is none before it."""
    numbers: list[int] = []
    first: dict[Key, int] = {}
    for sample in samples:
        keys = media_keys(sample)
        if keys is None:
            numbers += range(len(numbers), len(numbers) + len(sample.grid_thw))
            continue
        for key, count in keys:
            begin = first.setdefault(key, len(numbers))
            numbers += range(begin, begin + count)
    return np.array(numbers, dtype=np.int32)
