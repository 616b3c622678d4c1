"""A rank's part of a pack under context parallelism: its tokens, its images, and which features go where.

Everything is an index, settled here on the CPU. `mmpack.reference_context` defines it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpack import _native
from mmpack.packing.context_group import ContextGroup
from mmpack.types import MAX_RUN, EncodedSample, Float32, Int32, Int64, Media, Pack, VideoRef


@dataclass(frozen=True, slots=True, eq=False)
class ContextPart:
    """What a rank gets of a pack, on the CPU.

    Attributes:
        pack: the pack with this rank's tokens (`input_ids`, `labels`, `position_ids`, features and text among
            them), frames (`vision_*`, the grid (1, h, w) of each) and the features that it receives. Segments,
            `tiles`, `supervised_index`, `grid_thw`, `vision_index` are the whole pack's.
        group: the rank's place.
        tokens: (size + 1,) offsets of the ranks' tokens in the pack.
        rows: begin and end of this rank's rows in `supervised_index`.
        patches: (P,) this rank's patches in the whole pack's.
        num_still_frames: how many of its frames are images.
        sent_index: (n,) int32: the own feature in each row that is sent, to rank 0 first.
        sent_row, sent_offsets: (n,), (max(F, 1) + 1,) int32: its inverse, like `feature_token` and
            `feature_offsets`. A rank without frames has one feature, of a blank image, which nobody gets.
        sent, received: (size,) features to and from each rank.
        checksum: of the whole pack, equal on all ranks.
    """

    pack: Pack
    group: ContextGroup
    tokens: Int64
    rows: tuple[int, int]
    patches: Int64
    num_still_frames: int
    sent_index: Int32
    sent_row: Int32
    sent_offsets: Int32
    sent: Int64
    received: Int64
    checksum: int

    @property
    def start(self) -> int:
        """The first own token."""
        return int(self.tokens[self.group.rank])


def part_of(pack: Pack, group: ContextGroup) -> ContextPart:
    """A rank's part of a pack that has at least as many tokens as the group has ranks."""
    rank, size = group.rank, group.size
    tokens = np.arange(size + 1) * pack.num_tokens // size
    start, end = int(tokens[rank]), int(tokens[rank + 1])
    begin, stop = np.searchsorted(pack.supervised_index, (start, end))

    frames = np.diff(pack.vision_cu_seqlens)
    owner = owners(frames, size)
    is_own = owner == rank
    own_frames = frames[is_own]
    patches = np.flatnonzero(np.repeat(is_own, frames))
    grids = np.repeat(pack.vision_grid_thw, pack.vision_grid_thw[:, 0], axis=0)[is_own]
    grids[:, 0] = 1
    num_stills = int(pack.vision_grid_thw[: pack.num_distinct_images, 0].sum())
    cu_seqlens = _offsets(own_frames)

    owner_F = np.repeat(owner, frames // pack.vision.merge_size**2)
    sent_index, to = _sent(pack.feature_index, owner_F, tokens, rank)
    num_own = max(int((owner_F == rank).sum()), 1)
    received, feature_index = _received(pack.feature_index[start:end], owner_F)
    feature_token = np.argsort(feature_index, kind="stable")[(feature_index < 0).sum() :]
    text_order = pack.text_order[(pack.text_order >= start) & (pack.text_order < end)] - start
    input_ids = pack.input_ids[start:end]
    local = replace(
        pack,
        input_ids=input_ids,
        labels=pack.labels[start:end],
        position_ids=np.ascontiguousarray(pack.position_ids[:, start:end]),
        feature_index=feature_index,
        feature_token=feature_token.astype(np.int32),
        feature_offsets=_offsets(
            np.bincount(feature_index[feature_token], minlength=len(received))
        ),
        text_order=text_order,
        text_id_offsets=_runs(input_ids[text_order]),
        vision_grid_thw=grids,
        vision_cu_seqlens=cu_seqlens,
        vision_max_seqlen=int(own_frames.max(initial=0)),
        vision_segment_ids=np.repeat(np.arange(len(own_frames), dtype=np.int32), own_frames),
        vision_tiles=_native.attention_tiles(cu_seqlens, False),
        vision_position_ids=pack.vision_position_ids[patches],
    )
    return ContextPart(
        local,
        group,
        tokens,
        (int(begin), int(stop)),
        patches,
        int(is_own[:num_stills].sum()),
        sent_index,
        np.argsort(sent_index, kind="stable").astype(np.int32),
        _offsets(np.bincount(sent_index, minlength=num_own)),
        np.bincount(to, minlength=size),
        np.bincount(owner_F[received], minlength=size),
        checksum(pack),
    )


def _sent(
    feature_T: Int32, owner_F: Int64, tokens: Int64, rank: int
) -> tuple[Int32, NDArray[np.int64]]:
    """(own feature, receiver) of each row that a rank sends: each of its features once to each rank that shows it,
    by rank, then by feature."""
    own_F = np.cumsum(owner_F == rank, dtype=np.int32) - 1  # a feature's number among this rank's
    is_shown = feature_T >= 0
    of_own = (
        np.flatnonzero(is_shown & (owner_F[feature_T] == rank))
        if len(owner_F)
        else np.empty(0, int)
    )
    to = np.searchsorted(tokens, of_own, side="right") - 1
    pairs = np.unique(to * len(owner_F) + feature_T[of_own])
    to, sent_feature = np.divmod(pairs, max(len(owner_F), 1))
    return own_F[sent_feature], to


def _received(own_T: Int32, owner_F: Int64) -> tuple[Int32, Int32]:
    """(feature of each row that a rank receives, by sender, then by feature; the row of each own token, or -1),
    given the features that own tokens show."""
    needed = np.unique(own_T[own_T >= 0])
    received = needed[np.argsort(owner_F[needed], kind="stable")]
    place_F = np.full(len(owner_F) + 1, -1, dtype=np.int32)  # the last, for text, stays -1
    place_F[received] = np.arange(len(received))
    return received, place_F[own_T]


def owners(num_patches: NDArray[Any], size: int) -> Int64:
    """(frames,) the rank of each frame, given its patches: largest first, each to the rank with the fewest
    patches."""
    owner, load = np.zeros(len(num_patches), dtype=np.int64), np.zeros(size, dtype=np.int64)
    for frame in np.argsort(-num_patches.astype(np.int64), kind="stable"):
        owner[frame] = rank = load.argmin()
        load[rank] += num_patches[frame]
    return owner


def frames_of(grid_thw: Int32) -> Int64:
    """The patches of each frame of grids."""
    frames: Int64 = grid_thw[:, 1:].prod(axis=1, dtype=np.int64).repeat(grid_thw[:, 0])
    return frames


def checksum(pack: Pack) -> int:
    """CRC-32 of a pack's tokens, labels, segments and grids."""
    crc = 0
    for array in (pack.input_ids, pack.labels, pack.cu_seqlens, pack.grid_thw, pack.vision_index):
        crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
    return crc


def rows_checksum(crc: int, samples: Iterable[EncodedSample], weights: Float32 | None) -> int:
    """The checksum of a pack, continued over what its arrays do not show: the rows' numbers, the weights of the
    loss, and which images and videos they have: names of files without folders, which machines may have elsewhere,
    places in a tar file, or bytes. Nothing is opened."""
    rows = [(sample.row, *map(_identity, sample.media)) for sample in samples]
    crc = zlib.crc32(repr(rows).encode("utf-8", "surrogatepass"), crc)
    return crc if weights is None else zlib.crc32(np.ascontiguousarray(weights).data, crc)


def _identity(ref: Media) -> tuple[Any, ...]:
    options: tuple[Any, ...] = (
        () if ref.options is None else tuple(sorted(ref.options.given.items()))
    )
    if isinstance(ref, VideoRef):
        options = (*options, ref.num_frames, ref.fps, *map(_identity, ref.frames))
    if isinstance(ref.data, bytes):
        return zlib.crc32(ref.data), *options
    if ref.data is not None:  # a picture in memory
        return options
    return ref.short_name, None if ref.member is None else ref.member.offset, *options


def _offsets(lengths: NDArray[Any]) -> Int32:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _runs(sorted_ids: Int64) -> Int32:
    """(R + 1,) offsets of runs of one id, at most MAX_RUN long (`mmpack.reference.text_by_id`)."""
    number = np.arange(len(sorted_ids))
    is_first = np.diff(sorted_ids, prepend=-1) != 0
    since = number - np.maximum.accumulate(np.where(is_first, number, 0))
    starts = np.flatnonzero(since % MAX_RUN == 0)
    return np.append(starts, len(sorted_ids)).astype(np.int32)
