"""Splits long documents into pieces, at text tokens and never inside an image.

    tokens   a b c [image] d e f        a piece holds 4 tokens, the image run takes 3
    pieces   a b c | [image] d | d e f  d is context in the last piece, supervised in the piece before

Each piece is a separate segment, with its own positions and attention. If a cut is between two text tokens, the
first of them is repeated at the start of the next piece without a label, because nothing predicts a segment's
first token. So every text token of a document except its first is supervised in exactly one piece, and every image
is in exactly one piece.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmpack.data.chunks import item_at
from mmpack.errors import RowError, pack_limits
from mmpack.packing.sized_samples import are_sized
from mmpack.packing.truncate import token_sizes
from mmpack.store.mapped_arrays import ArrayType, load_arrays, save_arrays
from mmpack.store.records import damaged
from mmpack.types import IGNORE, EncodedSample, Int64
from mmpack.vision_spec import VisionSpec

_PIECES: dict[str, ArrayType] = {
    "sample_of": ("int64", ("pieces",)),
    "bounds": ("int64", ("pieces", 2)),
    "sizes": ("int64", ("pieces", 4)),
}


def split_bounds(
    sample: EncodedSample, capacity: int, patch_capacity: int | None = None
) -> list[tuple[int, int]]:
    """Where to cut a sample: (start, end) of each piece in `input_ids`, where a marker is one token.

    Each piece is as long as the capacities allow.

    Raises:
        RowError: an image does not fit into a pack with a text token, or the sample has videos, or text that is
            not supervised, as conversations have.
    """
    if capacity < 2:
        raise ValueError(f"--capacity (capacity) must be at least 2 to split, got {capacity}")
    vision, ids = sample.vision, sample.input_ids
    if (ids == vision.video_token_id).any():
        raise RowError(
            "a sample with videos cannot be split",
            "pass --on-overflow drop or truncate (on_overflow)",
        )
    is_marker, width, patches = token_sizes(sample)
    ends, patch_ends = (np.concatenate([[0], sizes.cumsum()]) for sizes in (width, patches))
    edges = (vision.vision_start_token_id, vision.vision_end_token_id)
    is_text = ~(is_marker | np.isin(ids, edges))
    if (sample.labels[1:][is_text[1:]] == IGNORE).any():  # all of a document's text is supervised
        raise RowError(
            "a conversation cannot be split", "pass --on-overflow drop or truncate (on_overflow)"
        )
    in_text = np.concatenate([[False], is_text[:-1] & is_text[1:], [True]])
    before_image = np.append(ids == vision.vision_start_token_id, False)
    cuts = np.flatnonzero(in_text | before_image)

    bounds = []
    start = end = 0
    while end < len(ids):
        last = np.searchsorted(ends, ends[start] + capacity, side="right") - 1
        if patch_capacity is not None:
            room = patch_ends[start] + patch_capacity
            last = min(last, np.searchsorted(patch_ends, room, side="right") - 1)
        previous, end = end, int(cuts[max(np.searchsorted(cuts, last, side="right") - 1, 0)])
        if end <= previous:
            largest = sample.grid_thw[is_marker[:previous].sum()]
            raise RowError(
                f"an image of {int(vision.num_features(largest[None])[0]):,} tokens does not fit into a "
                "piece with a text token",
                "raise --capacity (capacity) or lower --max-pixels (max_pixels)",
            )
        bounds.append((start, end))
        start = end - 1 if in_text[end] else end
    return bounds


def piece_of(sample: EncodedSample, start: int, end: int) -> EncodedSample:
    """A piece of a sample, `start` and `end` as in `split_bounds`."""
    is_marker = sample.input_ids == sample.vision.image_token_id
    images = slice(int(is_marker[:start].sum()), int(is_marker[:end].sum()))
    labels = sample.labels[start:end].copy()
    if start:
        labels[0] = IGNORE
    return replace(
        sample,
        input_ids=sample.input_ids[start:end],
        labels=labels,
        weights=None if sample.weights is None else sample.weights[start:end],
        of_document=sample.of_document or sample.num_supervised,
        grid_thw=sample.grid_thw[images],
        media=sample.media[images],
        temporal_step=None if sample.temporal_step is None else sample.temporal_step[images],
    )


class SplitSamples(Sequence[EncodedSample]):
    """Samples, with the long ones split into pieces; pieces are cut on access.

    Attributes:
        samples: the original samples, a list or an `EncodedStore`.
        sample_of: (N,) int64 the sample of piece n. bounds: (N, 2) int64 its start and end, zeros for a whole
            sample.
        num_tokens, num_patches, num_supervised: (N,) int64.
    """

    def __init__(
        self, samples: Sequence[EncodedSample], sample_of: Int64, bounds: Int64, sizes: Int64
    ) -> None:
        self.samples = samples
        self.sample_of, self.bounds, self._sizes = sample_of, bounds, sizes
        self.num_tokens, self.num_patches, self.num_supervised, self._num_images = sizes.T

    @property
    def num_split(self) -> int:
        """The number of samples in several pieces."""
        return int((np.bincount(self.sample_of) > 1).sum())

    @property
    def sources(self) -> np.ndarray:
        """(N,) the data file of each piece."""
        if are_sized(self.samples):
            sources: np.ndarray = self.samples.sources[self.sample_of]
            return sources
        return np.array([self.samples[n].source for n in self.sample_of])

    def grids(self) -> tuple[np.ndarray, Int64]:
        """(grid_thw of all images (I, 3), offsets of the pieces in it (N + 1,))."""
        if are_sized(self.samples):
            grids = self.samples.grids()[0]
        else:
            none = np.empty((0, 3), dtype=np.int32)
            grids = np.concatenate([none, *(sample.grid_thw for sample in self.samples)])
        return grids, np.cumsum([0, *self._num_images])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the pieces into a store's folder, as `pieces.json` and `pieces.*.npy`."""
        arrays = {"sample_of": self.sample_of, "bounds": self.bounds, "sizes": self._sizes}
        save_arrays(folder, "pieces", _PIECES, arrays)

    @classmethod
    def load(cls, samples: Any, folder: str | os.PathLike[str]) -> SplitSamples:
        """Read pieces that `save` wrote for the same samples.

        Raises:
            ValueError: they are damaged, or belong to other samples.
        """
        arrays, _ = load_arrays(folder, "pieces", _PIECES)
        if flaw := _flaw(samples, **arrays):
            raise damaged(Path(folder) / "pieces.json", flaw)
        return cls(samples, **arrays)

    def __repr__(self) -> str:
        return f"SplitSamples({len(self):,} pieces of {self.samples!r:.100})"

    def __len__(self) -> int:
        return len(self.sample_of)

    def __getitem__(self, number: Any) -> Any:
        return item_at(number, len(self), self._piece, "piece")

    def _piece(self, number: int) -> EncodedSample:
        sample = self.samples[int(self.sample_of[number])]
        start, end = self.bounds[number].tolist()
        if end > len(sample.input_ids):
            raise ValueError(
                f"row {sample.row} of {sample.source} has {len(sample.input_ids):,} ids, but a piece of it ends "
                f"after {end:,}; pack again with --overwrite"
            )
        return piece_of(sample, start, end) if end else sample


def _flaw(samples: Any, sample_of: Int64, bounds: Int64, sizes: Int64) -> str:
    """Why pieces do not belong to these samples; empty if they do."""
    if not len(sample_of) or (sample_of[0], sample_of[-1]) != (0, len(samples) - 1):
        return f"the pieces do not cover samples 0 to {len(samples) - 1:,}"
    steps = np.diff(sample_of)
    if not ((0 <= steps) & (steps <= 1)).all():
        return "the pieces are not in the order of the samples"
    start, end = bounds.T
    is_whole = end == 0
    is_alone = np.bincount(sample_of)[sample_of] == 1
    if start[is_whole].any() or not is_alone[is_whole].all():
        return "a sample is both whole and in pieces"
    is_first = np.diff(sample_of, prepend=-1) == 1
    last_end = np.where(is_first, 0, np.roll(end, 1))
    follows = (start == last_end) | ((start == last_end - 1) & ~is_first)
    if not (is_whole | (follows & (start < end) & (end <= samples.num_tokens[sample_of]))).all():
        return "the pieces of a sample overlap or have gaps"
    whole = sample_of[is_whole]
    known = (samples.num_tokens, samples.num_patches, samples.num_supervised)
    if (sizes < 0).any() or any(
        (sizes[is_whole, n] != one[whole]).any() for n, one in enumerate(known)
    ):
        return "the sizes of pieces do not match the samples"
    return ""


def unsplit(samples: Any) -> Any:
    """The samples that pieces of documents are of, such as an `EncodedStore`; samples that are not split as they
    are."""
    return samples.samples if isinstance(samples, SplitSamples) else samples


def split_samples(
    samples: Sequence[EncodedSample], capacity: int, patch_capacity: int | None = None
) -> SplitSamples:
    """Split the samples that are longer than a pack; of a store, only those samples are read.

    Raises:
        ValueError: an image does not fit into a pack; the message gives file and row.
    """
    capacity, patch_capacity = pack_limits(capacity, patch_capacity)
    whole = _sizes_of(samples)
    too_long = whole[:, 0] > capacity
    if patch_capacity is not None:
        too_long |= whole[:, 1] > patch_capacity
    sample_of, bounds, sizes = [], [], []
    for number in range(len(samples)):
        if not too_long[number]:
            sample_of.append(number)
            bounds.append((0, 0))  # whole
            sizes.append(whole[number])
            continue
        sample = samples[number]
        try:
            cuts = split_bounds(sample, capacity, patch_capacity)
        except RowError as error:
            raise ValueError(f"row {sample.row} of {sample.source}: {error}") from None
        for start, end in cuts:
            sample_of.append(number)
            bounds.append((start, end))
            sizes.append(_sizes_of([piece_of(sample, start, end)])[0])
    return SplitSamples(samples, np.array(sample_of), np.array(bounds), np.array(sizes))


def image_capacity(share: float, capacity: int, vision: VisionSpec) -> int:
    """The patch capacity at which images take at most `share` of a pack's tokens.

    Raises:
        ValueError: the share is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"--max-image-share (share) must be above 0 and at most 1, got {share}")
    return int(share * capacity) * vision.merge_size**2


def _sizes_of(samples: Sequence[EncodedSample]) -> Int64:
    """(N, 4) tokens, patches, supervised tokens and images."""
    if are_sized(samples):
        offsets = samples.grids()[1]
        known = (samples.num_tokens, samples.num_patches, samples.num_supervised, np.diff(offsets))
        return np.stack(known, axis=1).astype(np.int64)
    sizes = [
        (sample.num_tokens, sample.num_patches, sample.num_supervised, len(sample.grid_thw))
        for sample in samples
    ]
    return np.array(sizes, dtype=np.int64).reshape(-1, 4)
