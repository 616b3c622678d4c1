"""The nouns: Sample -> EncodedSample -> PackPlan -> Pack.

All frozen, all flat: ragged data is values plus offsets, never a list of lists. Letters in shapes:
T tokens in a pack, S segments, I images, P patches, F features, N samples, L supervised tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from mmpack.vision_spec import VisionSpec

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

IGNORE = -100  # label of a token without loss
TILE = 128  # rows of attention that one program takes: `Pack.tiles`; csrc/assembler.h has the same
MAX_RUN = 32  # tokens of one id in a run: `Pack.text_id_offsets`; csrc/assembler.h has the same

# The arrays of a `Pack`: dtype and extents, as csrc/bindings.cpp has them. Letters of DESIGN.md; `most_tiles`
# is room for the tiles of so many rows in so many segments. T - F and T - F + 1 are room too, for what is
# known to be shorter only when it is written.
PACK_ARRAYS = {
    "input_ids": ("int64", "T"),
    "labels": ("int64", "T"),
    "position_ids": ("int64", "4, T"),
    "cu_seqlens": ("int32", "S + 1"),
    "segment_ids": ("int32", "T"),
    "tiles": ("int32", "most_tiles(T, S), 4"),
    "feature_index": ("int32", "T"),
    "feature_token": ("int32", "F"),
    "text_order": ("int32", "T - F"),
    "text_id_offsets": ("int32", "T - F + 1"),
    "supervised_index": ("int32", "T - F"),
    "grid_thw": ("int64", "I, 3"),
    "vision_cu_seqlens": ("int32", "frames + 1"),
    "vision_segment_ids": ("int32", "P"),
    "vision_tiles": ("int32", "most_tiles(P, frames), 4"),
    "vision_position_ids": ("int64", "P, 2"),
}


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where an image lies. Opened by `mmpack.data.images` alone.

    Attributes:
        path: its file, or a name to show in errors where `data` holds the image.
        data: the encoded image (JPEG, PNG, ... bytes) or a PIL image, where it is not in a file.
        size: (height, width) in pixels if known.
    """

    path: str
    data: Any = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class VideoRef:
    """Where a video lies: a file, opened by `mmpack.data.videos` alone, or a list of frames.

    Attributes:
        path: its file, or a name to show in errors.
        data: the encoded video as bytes, where it is not in a file.
        frames: its frames, sampled already, where it is a list of images.
        num_frames: frames of the file or the list.
        fps: frames a second of either, as far as known.
        size: (height, width) of its frames in pixels if known.
    """

    path: str
    data: Any = None
    frames: tuple[ImageRef, ...] = ()
    num_frames: int = 0
    fps: float | None = None
    size: tuple[int, int] | None = None


Media = ImageRef | VideoRef


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: "system", "user" or "assistant"; "document" of a document's only message.
        content: text, images and videos in reading order, so a text that quotes `<image>` is text and
            an image is at its place by construction.
    """

    role: str
    content: tuple[str | Media, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation or document; what a row on disk becomes.

    Attributes:
        messages: its turns, in order; of a document the only one.
        source: the file the row comes from.
        row: its number there, from 0.
    """

    messages: tuple[Message, ...]
    source: str
    row: int

    @property
    def media(self) -> tuple[Media, ...]:
        """Every image and video, in reading order."""
        return tuple(
            part
            for message in self.messages
            for part in message.content
            if not isinstance(part, str)
        )

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """Every image, in reading order."""
        return tuple(part for part in self.media if isinstance(part, ImageRef))

    @property
    def videos(self) -> tuple[VideoRef, ...]:
        """Every video, in reading order."""
        return tuple(part for part in self.media if isinstance(part, VideoRef))


@dataclass(frozen=True, slots=True, eq=False)
class EncodedSample:
    """A sample as token ids with ONE marker per image or video; not yet expanded, no pixel decoded.

    A marker is `image_token_id` or `video_token_id`. Where videos have timestamps, each temporal patch
    has a marker and a grid (1, h, w) of its own.

    Attributes:
        input_ids: (n,) int32.
        labels: (n,) int32, the id where the token is supervised, else -100.
        grid_thw: (I, 3) int32, patches of each marker, in their order.
        media: references to images and videos, in their order.
        vision: the spec the grids were made with.
        source, row: where the sample comes from, for errors.
        temporal_step: (I,) float32 M-RoPE positions from one temporal patch of a grid to the next
            (`VisionSpec.temporal_step`); None: one.
    """

    input_ids: Int32
    labels: Int32
    grid_thw: Int32
    media: tuple[Media, ...]
    vision: VisionSpec
    source: str = ""
    row: int = -1
    temporal_step: Float32 | None = None

    @classmethod
    def filler(cls, num_tokens: int, vision: VisionSpec) -> EncodedSample:
        """Tokens of no meaning without labels: what fills a pack up."""
        ids = np.zeros(num_tokens, dtype=np.int32)  # "!": any text token would do
        no_images = np.empty((0, 3), dtype=np.int32)
        return cls(ids, np.full_like(ids, IGNORE), no_images, (), vision, "filler")

    @property
    def num_tokens(self) -> int:
        """Length in a pack: every marker becomes as many placeholders as its grid has features."""
        features = self.vision.num_features(self.grid_thw)
        return len(self.input_ids) - len(features) + int(features.sum())

    @property
    def num_patches(self) -> int:
        """Patches into the vision tower."""
        return int(self.grid_thw.astype(np.int64).prod(axis=-1).sum())

    @property
    def num_supervised(self) -> int:
        """Tokens that reach the loss; the first of a segment has nothing before it."""
        return int((self.labels[1:] != IGNORE).sum())

    @property
    def is_supervised(self) -> bool:
        """Whether any token reaches the loss."""
        return self.num_supervised > 0


class SizedSamples(Protocol):
    """Encoded samples whose sizes are known without opening one: an `EncodedStore`, `SplitSamples`."""

    @property
    def num_tokens(self) -> Int64:
        """(N,) lengths in a pack."""

    @property
    def num_patches(self) -> Int64:
        """(N,) patches into the vision tower."""

    @property
    def num_supervised(self) -> Int64:
        """(N,) tokens that reach the loss."""

    @property
    def sources(self) -> NDArray[Any]:
        """(N,) files the samples come from."""

    def grids(self) -> tuple[Int32, Int64]:
        """Of all markers: grid_thw (I, 3), and offsets (N + 1,) of the samples in them."""


def are_sized(samples: Sequence[EncodedSample]) -> TypeGuard[SizedSamples]:
    """Whether the sizes are known without opening a sample, as they are not of a list."""
    return hasattr(samples, "num_tokens")


@dataclass(frozen=True, slots=True, eq=False)
class PackPlan:
    """Which samples share a pack.

    Attributes:
        sample_index: (planned,) int64; samples of pack b are
            `sample_index[bin_offsets[b] : bin_offsets[b + 1]]`.
        bin_offsets: (num_packs + 1,) int64.
        pack_tokens: (num_packs,) int64, tokens in each pack.
        capacity, patch_capacity: the limits of a pack; None: patches are not limited.
        dropped, truncated: sample numbers that were longer than a capacity, ascending.
        num_tokens: (N,) int64, what each sample was planned with.
        num_patches: (N,) int64, or None: patches are not limited.
        cost: (N,) int64 in shares of the data set's, or None: costs were not balanced.
        seed: decided the order of the packs and between samples of equal size.
    """

    sample_index: Int64
    bin_offsets: Int64
    pack_tokens: Int64
    capacity: int
    patch_capacity: int | None
    dropped: Int64
    truncated: Int64
    num_tokens: Int64
    num_patches: Int64 | None
    cost: Int64 | None
    seed: int

    @property
    def num_packs(self) -> int:
        """Packs of an epoch, without the empty ones that a data set may append."""
        return len(self.pack_tokens)

    @property
    def num_dropped(self) -> int:
        """Samples left out because no pack can hold them."""
        return len(self.dropped)

    @property
    def num_truncated(self) -> int:
        """Samples planned shorter than they are."""
        return len(self.truncated)

    @property
    def utilization(self) -> float:
        """Tokens over the room of all packs; 1.0 for a plan without packs."""
        room = self.num_packs * self.capacity
        return float(self.pack_tokens.sum()) / room if room else 1.0

    def totals(self, values: NDArray[Any]) -> NDArray[Any]:
        """(num_packs,) sums over each pack's samples of `values` (N,), what each sample has."""
        sums = np.concatenate([[0], np.cumsum(values[self.sample_index])])
        return np.diff(sums[self.bin_offsets])

    def samples_of(self, pack: int) -> Int64:
        """(S,) numbers of the samples in one pack."""
        return self.sample_index[self.bin_offsets[pack] : self.bin_offsets[pack + 1]]


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """One assembled row: what a training step sees, flat.

    Every irregularity is settled here as an index, so nothing later asks the data a question.

    Attributes:
        input_ids, labels: (T,) int64; labels are -100 on prompts, images and the first token of
            every segment, and are not shifted.
        position_ids: (4, T) int64: text position (an arange per segment), then M-RoPE t, h, w.
        cu_seqlens: (S + 1,) int32 segment offsets. max_seqlen: the longest segment.
        segment_ids: (T,) int32 segment of every token.
        tiles: (n, 4) int32 rows of text attention one program takes, begin and end, and begin and end
            of their segment; most work first (`mmpack.reference.attention_tiles`).
        feature_index: (T,) int32: -1 for text, else the feature that stands there.
        feature_token: (F,) int32: its inverse, the token of each feature.
        text_order: (T - F,) int32: tokens that are no feature, sorted by id, then by place.
        text_id_offsets: (R + 1,) int32: runs of one id, at most 32 tokens each, in `text_order`.
        supervised_index: (L,) int32: rows whose prediction is supervised (label at the next row).
        grid_thw: (I, 3) int64 patches of each grid: images in marker order, then videos. Patches and
            features are in this order too.
        num_images: grids that are images'.
        vision_cu_seqlens: (frames + 1,) int32 offsets of the frames in the patches.
        vision_max_seqlen: patches of the largest frame.
        vision_segment_ids, vision_tiles: (P,) and (n, 4) int32, the same of the frames.
        vision_position_ids: (P, 2) int64 row and column of every patch, in merge order.
        pixels: (P1, C * p * p) uint8 patches of the images in merge order, or None where not decoded.
        video_pixels: (P2, C * t * p * p) uint8 patches of the videos, the same; P1 + P2 = P.
        vision: the spec of images and videos.
    """

    input_ids: Int64
    labels: Int64
    position_ids: Int64
    cu_seqlens: Int32
    max_seqlen: int
    segment_ids: Int32
    tiles: Int32
    feature_index: Int32
    feature_token: Int32
    text_order: Int32
    text_id_offsets: Int32
    supervised_index: Int32
    grid_thw: Int64
    num_images: int
    vision_cu_seqlens: Int32
    vision_max_seqlen: int
    vision_segment_ids: Int32
    vision_tiles: Int32
    vision_position_ids: Int64
    pixels: NDArray[np.uint8] | None
    video_pixels: NDArray[np.uint8] | None
    vision: VisionSpec

    def __repr__(self) -> str:
        from mmpack.pack_html import counts  # here: it needs a Pack

        return f"Pack({counts(self)})"

    def _repr_html_(self) -> str:
        """What a notebook shows: lengths, counts and small pictures, at most 0.5 MB."""
        from mmpack.pack_html import pack_html

        return pack_html(self)

    @property
    def num_image_patches(self) -> int:
        """P1: patches of the images, which come before those of the videos."""
        return int(self.grid_thw[: self.num_images].prod(axis=1).sum())

    @property
    def num_segments(self) -> int:
        """S."""
        return len(self.cu_seqlens) - 1

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.input_ids)
