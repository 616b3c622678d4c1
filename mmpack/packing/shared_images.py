"""Which images and videos of a pack are the same, so that it has the patches of each once.

Two are the same if their rows name the same thing: the same file, or the same place in a tar file, with the same
grid and options, or the same bytes, or the same PIL object. Nothing is opened or decoded. Two names of one file
(links) are two images, and so are equal bytes in two files.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np

from mmpack.data.media_paths import MediaFolders
from mmpack.data.videos import num_grids
from mmpack.errors import RowError
from mmpack.store.row_checksum import files_of
from mmpack.types import EncodedSample, ImageRef, Int32, Media

Key = Hashable


def _itself(data: bytes) -> Hashable:
    return data


def media_key(
    ref: Media,
    grids: Sequence[Sequence[int]],
    of_bytes: Callable[[bytes], Hashable] = _itself,
) -> Key:
    """The identity of an image or video, equal for two that have equal patches.

    Args:
        grids: (t, h, w) of its markers.
        of_bytes: what stands for the bytes of one without a file; by default they do, which compares them exactly
            and hashes an object once. A key then keeps them in memory: for many samples, pass a hash. In a store,
            their place in `media.bin` is an identity as well, because each distinct one is written once.

    Returns:
        Valid while `ref` exists, because a PIL image is known by its address.
    """

    given = () if ref.options is None else tuple(ref.options.given.items())
    shape = tuple(map(tuple, grids))
    if isinstance(ref, ImageRef):
        return "image", _source(ref, of_bytes), shape, given
    files = tuple(_source(frame, of_bytes) for frame in ref.frames)
    return "video", files or _source(ref, of_bytes), shape, given, ref.num_frames, ref.fps


def _source(ref: Media, of_bytes: Callable[[bytes], Hashable]) -> Key:
    if ref.data is None and ref.member is not None:
        return "member", ref.path, ref.member.offset
    if ref.data is None:
        return ref.path  # absolute, as the encoder resolved it
    return (
        ("bytes", of_bytes(ref.data)) if isinstance(ref.data, bytes) else ("object", id(ref.data))
    )


def media_keys(
    sample: EncodedSample, of_bytes: Callable[[bytes], Hashable] = _itself
) -> list[tuple[Key, int]] | None:
    """(`media_key`, number of grids) of a sample's images and videos, in marker order; None if its references do
    not match its grids, as for one that has none."""
    grids: list[list[int]] = sample.grid_thw.tolist()
    try:
        counts = [num_grids(ref, sample.vision) for ref in sample.media]
    except RowError:  # a video that was not probed, which fails when it is decoded
        return None
    if sum(counts) != len(grids):
        return None
    keys, begin = [], 0
    for ref, count in zip(sample.media, counts):
        keys.append((media_key(ref, grids[begin : begin + count], of_bytes), count))
        begin += count
    return keys


def check_place(ref: Media, folders: MediaFolders) -> None:
    """Check that the files of an image or video are inside the folders, links resolved.

    Raises:
        RowError: one is not.
    """
    kind = "image" if isinstance(ref, ImageRef) else "video"
    for file in files_of([ref]):
        if file.data is None:
            folders.real_path(file.path, kind)


def first_shown(samples: Iterable[EncodedSample]) -> Int32:
    """(I,) for each marker of a pack, in order, the number of the first marker that shows the same image, or the
    same part of the same video; its own number if there is none before it."""
    numbers: list[int] = []
    first: dict[Key, int] = {}
    for sample in samples:
        if not len(sample.grid_thw):
            continue
        keys = media_keys(sample)
        if keys is None:
            numbers += range(len(numbers), len(numbers) + len(sample.grid_thw))
            continue
        for key, count in keys:
            begin = first.setdefault(key, len(numbers))
            numbers += range(begin, begin + count)
    return np.array(numbers, dtype=np.int32)
