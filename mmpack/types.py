"""The data types: Sample -> EncodedSample -> PackPlan -> Pack.

All are frozen and flat: ragged data is values plus offsets, never a list of lists. Letters in shapes: T tokens,
S segments, I images, U distinct ones, P patches, F features, M placeholders, N samples, L supervised tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmpack.media_refs import ImageRef as ImageRef
from mmpack.media_refs import Media as Media
from mmpack.media_refs import TarMember as TarMember
from mmpack.media_refs import VideoRef as VideoRef
from mmpack.vision_spec import VisionSpec

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

IGNORE = -100  # label of a token without loss
TILE = 128  # attention rows per program, see `Pack.tiles`; the same as in csrc/assembler.h
MAX_RUN = 32  # most tokens in a run of one id, see `Pack.text_id_offsets`; as in csrc/assembler.h

# The arrays of a `Pack`: dtype and extents, as in csrc/bindings.cpp, with the letters of DESIGN.md.
# `most_tiles(rows, segments)`, T - M and T - M + 1 are upper bounds; the actual lengths are known only after
# writing.
PACK_ARRAYS = {
    "input_ids": ("int64", "T"),
    "labels": ("int64", "T"),
    "position_ids": ("int64", "4, T"),
    "cu_seqlens": ("int32", "S + 1"),
    "segment_ids": ("int32", "T"),
    "tiles": ("int32", "most_tiles(T, S), 4"),
    "feature_index": ("int32", "T"),
    "feature_token": ("int32", "M"),
    "feature_offsets": ("int32", "F + 1"),
    "text_order": ("int32", "T - M"),
    "text_id_offsets": ("int32", "T - M + 1"),
    "supervised_index": ("int32", "T - M"),
    "grid_thw": ("int64", "I, 3"),
    "vision_index": ("int32", "I"),
    "vision_grid_thw": ("int64", "U, 3"),
    "vision_cu_seqlens": ("int32", "frames + 1"),
    "vision_segment_ids": ("int32", "P"),
    "vision_tiles": ("int32", "most_tiles(P, frames), 4"),
    "vision_position_ids": ("int64", "P, 2"),
}


Loss = Literal["default", "prompt", "none"]  # of a turn, see `Message`


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: "system", "developer", "user", "assistant" or "tool"; "document" for a document's only message.
        content: text, images and videos in reading order. Positions of images are explicit, so `<image>` in a text
            is literal text. Empty only beside `tool_calls`. A `mmpack.data.thoughts.Thought` comes first.
        tool_calls: an assistant's calls as the row has them: `{"function": {"name": ..., "arguments": {...}}}` or
            `{"name": ..., "arguments": {...}}`; the chat template writes them.
        loss: "default": an answer has a loss, other turns only with `train_on_prompt`. "prompt": none, except with
            `train_on_prompt`, as for an answer inside a prompt. "none": no loss at all (`"loss": false` in a row).
        weight: factor of its tokens' loss, from 1e-6 to 1e6; for an assistant's turn.
    """

    role: str
    content: tuple[str | Media, ...]
    tool_calls: tuple[dict[str, Any], ...] = ()
    loss: Loss = "default"
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation or document, made from a row on disk.

    Attributes:
        messages: its turns, in order; a document has one.
        source: the row's file.
        row: the row's number in the file, from 0.
        tools: descriptions of functions as the row has them; the chat template writes them.
        weight: factor of its tokens' loss, from 1e-6 to 1e6.
    """

    messages: tuple[Message, ...]
    source: str
    row: int
    tools: tuple[dict[str, Any], ...] = ()
    weight: float = 1.0

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


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class EncodedSample:
    """A sample as token ids with ONE marker per image or video; not expanded, no pixel decoded.

    A marker is `image_token_id` or `video_token_id`. In videos with timestamps, each temporal patch has its own
    marker and grid (1, h, w).

    Attributes:
        input_ids: (n,) int32.
        labels: (n,) int32, the token's id if it is supervised, else -100.
        grid_thw: (I, 3) int32, the grid of each marker in patches, in marker order.
        media: references to images and videos, in marker order.
        vision: the spec that the grids were computed with.
        source, row: the sample's origin, for errors.
        temporal_step: (I,) float32 M-RoPE positions from one temporal patch of a grid to the next
            (`VisionSpec.temporal_step`); None: one.
        weights: (n,) float32 factors of the tokens' losses, above 0; None: one.
        of_document: for a piece of a split document: supervised tokens of the whole document; else 0.
    """

    input_ids: Int32
    labels: Int32
    grid_thw: Int32
    media: tuple[Media, ...]
    vision: VisionSpec
    source: str = ""
    row: int = -1
    temporal_step: Float32 | None = None
    weights: Float32 | None = None
    of_document: int = 0

    def __repr__(self) -> str:
        from mmpack.errors import counted  # here: it needs this module

        images = sum(isinstance(one, ImageRef) for one in self.media)
        videos = len(self.media) - images
        return (
            f"EncodedSample(row {self.row} of {self.source!r}: {counted(self.num_tokens, 'token')}, "
            f"{self.num_supervised:,} supervised, {counted(images, 'image')}"
            + (f", {counted(videos, 'video')})" if videos else ")")
        )

    @classmethod
    def filler(cls, num_tokens: int, vision: VisionSpec) -> EncodedSample:
        """A padding segment: arbitrary, unlabeled tokens."""
        ids = np.zeros(num_tokens, dtype=np.int32)  # "!": any text token would do
        no_images = np.empty((0, 3), dtype=np.int32)
        return cls(ids, np.full_like(ids, IGNORE), no_images, (), vision, "filler")

    @property
    def num_tokens(self) -> int:
        """Length in a pack, where each marker is expanded to one placeholder per feature of its grid."""
        features = self.vision.num_features(self.grid_thw)
        return len(self.input_ids) - len(features) + int(features.sum())

    @property
    def num_patches(self) -> int:
        """Patches that enter the vision tower."""
        return int(self.grid_thw.astype(np.int64).prod(axis=-1).sum())

    @property
    def num_supervised(self) -> int:
        """Tokens that have a loss; a segment's first token has none, because nothing predicts it."""
        return int((self.labels[1:] != IGNORE).sum())

    @property
    def id_range(self) -> tuple[int, int]:
        """(smallest, largest) token id, including supervised labels; (0, 0) for an empty sample."""
        ids = np.concatenate([self.input_ids, self.labels[self.labels != IGNORE]])
        return (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)

    @property
    def is_supervised(self) -> bool:
        """Whether any token has a loss."""
        return self.num_supervised > 0


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PackPlan:
    """Which samples share a pack.

    Attributes:
        sample_index: (planned,) int64; samples of pack b are
            `sample_index[bin_offsets[b] : bin_offsets[b + 1]]`.
        bin_offsets: (num_packs + 1,) int64.
        pack_tokens: (num_packs,) int64, tokens in each pack.
        capacity, patch_capacity: the limits of a pack; None: patches are not limited.
        dropped, truncated: numbers of samples that exceeded a capacity, ascending.
        num_tokens: (N,) int64, the length each sample was planned with.
        num_patches: (N,) int64, or None: patches are not limited.
        cost: (N,) int64, proportional to each sample's cost, or None: costs were not balanced.
        seed: decides the order of packs, and of samples of equal size.
        unused: numbers of samples that are held out (`mmpack pack --val-size`) or beyond `num_samples`, ascending.
        unit: (N,) int64, samples of equal number share a pack in every epoch, and `num_patches` and `cost` count
            an image that several of them show only for the first; None: each sample is planned by itself.
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
    unused: Int64 = field(default_factory=lambda: np.frombuffer(b"", dtype=np.int64))
    unit: Int64 | None = None

    def __repr__(self) -> str:
        from mmpack.pack_html import plan_counts  # here: it needs this module

        return f"PackPlan({plan_counts(self)})"

    @property
    def num_packs(self) -> int:
        """Packs per epoch, without the empty ones that a data set may append."""
        return len(self.pack_tokens)

    @property
    def num_dropped(self) -> int:
        """Samples dropped because they exceed a pack."""
        return len(self.dropped)

    @property
    def num_truncated(self) -> int:
        """Samples planned to be truncated."""
        return len(self.truncated)

    @property
    def utilization(self) -> float:
        """Tokens divided by the capacity of all packs; 1.0 for a plan without packs."""
        room = self.num_packs * self.capacity
        return float(self.pack_tokens.sum()) / room if room else 1.0

    def totals(self, values: NDArray[Any]) -> NDArray[Any]:
        """(num_packs,) sums of `values` (N,), one per sample, over each pack's samples."""
        sums = np.concatenate([[0], np.cumsum(values[self.sample_index])])
        return np.diff(sums[self.bin_offsets])

    def samples_of(self, pack: int) -> Int64:
        """(S,) numbers of the samples in one pack."""
        return self.sample_index[self.bin_offsets[pack] : self.bin_offsets[pack + 1]]


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """One assembled row: the flat input of a training step.

    Everything irregular is an index computed here, so a training step does not synchronize with the device. An
    image or a video that several markers show has patches and features once (`mmpack.packing.shared_images`).

    Attributes:
        input_ids, labels: (T,) int64; labels are -100 on prompts, images and the first token of each segment, and
            are not shifted.
        position_ids: (4, T) int64: text position (an arange per segment), then M-RoPE t, h, w.
        cu_seqlens: (S + 1,) int32 segment offsets. max_seqlen: length of the longest segment.
        segment_ids: (T,) int32 segment of each token.
        tiles: (n, 4) int32: begin and end of the text attention rows of one program, and begin and end of their
            segment; most work first (`mmpack.reference.attention_tiles`).
        feature_index: (T,) int32: index of the feature at each token, -1 for text.
        feature_token, feature_offsets: (M,), (F + 1,) int32: its inverse, the tokens of features, and offsets.
        text_order: (T - M,) int32: text tokens, sorted by id, then by position.
        text_id_offsets: (R + 1,) int32: offsets in `text_order` of runs of one id, at most 32 tokens each.
        supervised_index: (L,) int32: rows whose prediction is supervised (the label is at the next row).
        grid_thw: (I, 3) int64 patches of each marker's grid: images in marker order, then videos.
        num_images: number of grids that belong to images.
        vision_index: (I,) int32: the row of `vision_grid_thw` that each grid shows.
        vision_grid_thw: (U, 3) int64 grids of the distinct images, then of the distinct videos, in the order of
            the first markers that show them. Patches and features have the same order.
        vision_cu_seqlens: (frames + 1,) int32 offsets of the frames in the patches.
        vision_max_seqlen: patches in the largest frame.
        vision_segment_ids, vision_tiles: (P,) and (n, 4) int32, like `segment_ids` and `tiles`, for frames.
        vision_position_ids: (P, 2) int64 row and column of each patch, in merge order.
        pixels: (P1, C * p * p) uint8 patches of the images in merge order, or None if not decoded.
        video_pixels: (P2, C * t * p * p) uint8 patches of the videos, or None if not decoded; P1 + P2 = P.
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
    feature_offsets: Int32
    text_order: Int32
    text_id_offsets: Int32
    supervised_index: Int32
    grid_thw: Int64
    num_images: int
    vision_index: Int32
    vision_grid_thw: Int64
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
        """HTML for notebooks: lengths, counts and thumbnails, at most 0.5 MB."""
        from mmpack.pack_html import pack_html

        return pack_html(self)

    @property
    def num_distinct_images(self) -> int:
        """The number of rows of `vision_grid_thw` that belong to images."""
        return int(self.vision_index[: self.num_images].max(initial=-1)) + 1

    @property
    def grid_token(self) -> Int64:
        """(I,) the first placeholder of each grid."""
        vision, features = self.vision, self.vision.num_features(self.grid_thw)
        ids = (vision.image_token_id, vision.video_token_id)
        tokens = np.concatenate([np.flatnonzero(self.input_ids == one) for one in ids])
        first: Int64 = tokens[np.cumsum(features) - features]
        return first

    @property
    def num_segments(self) -> int:
        """S, the number of segments."""
        return len(self.cu_seqlens) - 1

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens."""
        return len(self.input_ids)
