"""[EncodedSample] -> Pack: joins the samples of one bin into one flat row.

All assembly goes through this file. `impl="reference"` runs the specification in `mmpack.reference`; by default
the C++ core writes the same arrays, bit for bit (`csrc/assembler.h`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmpack import _native
from mmpack.data import images, videos
from mmpack.data.media_paths import MediaFolders
from mmpack.errors import BadImageError, counted
from mmpack.packing.context_group import ContextGroup
from mmpack.packing.context_part import frames_of, owners
from mmpack.packing.fetched_images import FetchedImages, own_images
from mmpack.packing.pack_samples import PackSamples
from mmpack.packing.shared_images import Key, check_place, first_shown, media_key
from mmpack.types import (
    PACK_ARRAYS,
    TILE,
    EncodedSample,
    Float32,
    ImageRef,
    Int32,
    Media,
    Pack,
)
from mmpack.vision_spec import VisionSpec


class Joined(NamedTuple):
    """Concatenated samples, the C++ core's input."""

    input_ids: Int32  # (n,)
    labels: Int32  # (n,)
    offsets: Int32  # (S + 1,)
    grid_thw: Int32  # (I, 3)
    temporal_step: Float32  # (I,)
    grid_offsets: Int32  # (S + 1,)
    first_shown: Int32  # (I,) the first marker that shows the same
    image_id: int
    video_id: int
    merge_size: int


class Size(NamedTuple):
    """The size of samples in a pack. Features, frames and patches are those of distinct images and videos."""

    tokens: int
    placeholders: int
    features: int
    frames: int
    patches: int
    images: int
    distinct: int
    image_patches: int


def assemble(
    samples: Sequence[EncodedSample],
    *,
    pixels: bool = True,
    impl: Literal["native", "reference"] = "native",
    share_images: bool = True,
    empty: Callable[..., Any] = np.empty,
) -> Pack:
    """Expand, concatenate and index the samples of one pack, and decode their images and videos.

    Args:
        samples: at least one, all encoded with the same `VisionSpec`. The `media_folders` and `on_bad_image` of a
            data set apply to its items; files of other samples may be in any folder and must decode.
        pixels: decode images and videos; otherwise `Pack.pixels` and `Pack.video_pixels` are None.
        impl: "native", or "reference" for the specification; both give the same pack.
        share_images: the pack has the patches of an image or a video once, however many markers show it
            (`mmpack.packing.shared_images`). False: once for each marker, as a model that is not patched needs
            them.
        empty: allocates the arrays that the core and the decoder write; called like `numpy.empty`.

    Returns:
        The pack. Segment s is `samples[s]`; images come first, in the order of the first markers that show them,
        then videos.

    Raises:
        ValueError: there are no samples, their specs differ, or a sample's arrays contradict each other.
        BadImageError: an image or a video cannot be decoded to its planned grid, or is outside the media folders;
            the message gives file and row.
    """
    if impl not in ("native", "reference"):
        raise ValueError(f"impl must be 'native' or 'reference', got {impl!r}")
    if pixels:
        [samples], buffer = load_pixels([samples], share_images, empty)
    joined, size = join(samples, share_images)
    if impl == "native":
        pack = _assemble_native(joined, size, samples[0].vision, empty)
    else:
        from mmpack import reference  # here: planning does not need torch

        pack = reference.assemble(samples, joined.first_shown)
    return replace(pack, pixels=buffer.stills, video_pixels=buffer.clips) if pixels else pack


def join(samples: Sequence[EncodedSample], share_images: bool = True) -> tuple[Joined, Size]:
    """Concatenate samples and compute the size of their pack; `share_images` as in `assemble`.

    Raises:
        ValueError: as in `assemble`.
    """
    if not samples:
        raise ValueError("a pack needs at least one sample")
    vision = samples[0].vision
    if any(sample.vision is not vision and sample.vision != vision for sample in samples):
        raise ValueError(
            "the samples of a pack were encoded with different VisionSpecs; encode all with one Encoder"
        )
    joined = _concatenate(samples, share_images)
    try:
        return joined, Size(*_native.measure(*joined))
    except ValueError as error:
        if len(samples) == 1:
            raise ValueError(f"{_where(samples[0])}: {error}") from None
        for sample in samples:  # find the sample and name it
            join([sample], share_images)
        raise


def _concatenate(samples: Sequence[EncodedSample], share_images: bool) -> Joined:
    vision = samples[0].vision
    num_ids = [len(sample.input_ids) for sample in samples]
    num_grids = [len(sample.grid_thw) for sample in samples]
    for sample, n in zip(samples, num_ids):
        if len(sample.labels) != n:
            raise ValueError(f"{_where(sample)}: {len(sample.labels)} labels but {n} input_ids")
    steps = np.ones(sum(num_grids), dtype=np.float32)
    for sample, begin in zip(samples, accumulate(num_grids, initial=0)):
        if sample.temporal_step is not None:
            steps[begin : begin + len(sample.temporal_step)] = sample.temporal_step
    return Joined(
        np.concatenate([sample.input_ids for sample in samples]),
        np.concatenate([sample.labels for sample in samples]),
        np.array([*accumulate(num_ids, initial=0)], dtype=np.int32),
        np.concatenate([sample.grid_thw for sample in samples]),
        steps,
        np.array([*accumulate(num_grids, initial=0)], dtype=np.int32),
        first_shown(samples) if share_images else np.arange(sum(num_grids), dtype=np.int32),
        vision.image_token_id,
        vision.video_token_id,
        vision.merge_size,
    )


def _assemble_native(
    joined: Joined,
    size: Size,
    vision: VisionSpec,
    empty: Callable[..., Any],
) -> Pack:
    T, M, F, frames, P, num_images, U, _ = size
    S, I = len(joined.offsets) - 1, len(joined.grid_thw)
    shapes = {
        "T": (T,),
        "4, T": (4, T),
        "S + 1": (S + 1,),
        "M": (M,),
        "F + 1": (F + 1,),
        "T - M": (T - M,),
        "T - M + 1": (T - M + 1,),
        "I": (I,),
        "I, 3": (I, 3),
        "U, 3": (U, 3),
        "frames + 1": (frames + 1,),
        "P": (P,),
        "P, 2": (P, 2),
        "most_tiles(T, S), 4": (S + T // TILE, 4),
        "most_tiles(P, frames), 4": (frames + P // TILE, 4),
    }
    out: dict[str, Any] = {
        name: empty(shapes[extents], dtype) for name, (dtype, extents) in PACK_ARRAYS.items()
    }
    supervised, runs, tiles, vision_tiles, max_seqlen, vision_max_seqlen = _native.assemble(
        *joined, out
    )
    out["supervised_index"] = out["supervised_index"][:supervised]
    out["text_id_offsets"] = out["text_id_offsets"][: runs + 1]
    out["tiles"] = out["tiles"][:tiles]
    out["vision_tiles"] = out["vision_tiles"][:vision_tiles]
    return Pack(
        **out,
        num_images=num_images,
        max_seqlen=max_seqlen,
        vision_max_seqlen=vision_max_seqlen,
        pixels=None,
        video_pixels=None,
        vision=vision,
    )


def load_pixels(
    groups: Sequence[Sequence[EncodedSample]],
    share_images: bool = True,
    empty: Callable[..., Any] = np.empty,
    context: ContextGroup | None = None,
) -> tuple[list[Sequence[EncodedSample]], PixelBuffer]:
    """Decode the images and videos of a pack's samples, group by group.

    Args:
        groups: items of data sets, each with its own policy, or other samples, whose files may be in any folder
            and must decode.
        share_images: as in `assemble`.
        empty: allocates the arrays; called like `numpy.empty`.
        context: decode only the images and videos of which this rank's tower gets frames, and keep only those
            frames; all of them if samples whose images do not decode are to be dropped, which every rank must
            know.

    Returns:
        (the samples kept from each group, the pixels of all groups).

    Raises:
        ValueError: as in `assemble`, or too many samples of a data set were dropped.
    """
    samples = [sample for group in groups for sample in group]
    joined, size = join(samples, share_images)
    may_drop = any(
        isinstance(one, PackSamples) and one.policy.on_bad_image == "drop" for one in groups
    )
    own, is_own = None, None  # most images are of other ranks
    if context is not None and not may_drop:
        own, is_own, size = _own_frames(joined, size, context)
    buffer = PixelBuffer(samples[0].vision, size, share_images, empty, own)
    kept: list[Sequence[EncodedSample]] = []
    for group in groups:
        if isinstance(group, PackSamples):
            media = group.policy.media_of(group)
            buffer.fetch(media if is_own is None else own_images(media, is_own))
            kept.append(group.policy.load(group, buffer))
            continue
        for sample in group:
            buffer.load(sample)
            if is_own is not None:
                list(own_images(((ref, None) for ref in sample.media), is_own))  # passes them
        kept.append(group)
    return kept, buffer


def _own_frames(
    joined: Joined, size: Size, context: ContextGroup
) -> tuple[tuple[NDArray[Any], NDArray[Any]], Iterator[bool], Size]:
    """(whether each frame of the distinct images, and of the distinct videos, is of this rank; whether it has one
    of each image, distinct or not; the size with patches of these frames)"""
    ids, markers = joined.input_ids, (joined.image_id, joined.video_id)
    is_video = ids[np.isin(ids, markers)] == joined.video_id
    is_new = joined.first_shown == np.arange(len(is_video))
    stills, clips = (
        frames_of(joined.grid_thw[is_new & (is_video == kind)]) for kind in (False, True)
    )
    is_own = owners(np.concatenate([stills, clips]), context.size) == context.rank
    own = is_own[: len(stills)], is_own[len(stills) :]
    own_stills, own_clips = int(stills @ own[0]), int(clips @ own[1])
    number = np.cumsum(is_new & ~is_video) - 1  # an image has one frame
    of_images = iter(own[0][number[joined.first_shown[~is_video]]].tolist())
    return own, of_images, size._replace(patches=own_stills + own_clips, image_patches=own_stills)


class PixelBuffer:
    """A buffer into which the patches of a pack's images and videos are decoded.

    Args:
        vision: the samples' spec.
        size: the size of the samples, from `join`.
        share_images: as in `assemble`: an image or a video that was decoded for a sample before is not decoded
            again.
        empty: allocates the arrays; called like `numpy.empty`.
        own: whether to keep each frame of the distinct images, and of the distinct videos; None: all.
    """

    def __init__(
        self,
        vision: VisionSpec,
        size: Size,
        share_images: bool = True,
        empty: Callable[..., Any] = np.empty,
        own: tuple[NDArray[Any], NDArray[Any]] | None = None,
    ) -> None:
        self._vision, values = vision, vision.patch_values
        patches = (size.image_patches, size.patches - size.image_patches)
        widths = (values, vision.temporal_patch_size * values)
        self._patches: list[images.Patches] = [  # of images, of videos
            empty((n, width), dtype=np.uint8) for n, width in zip(patches, widths)
        ]
        self._own = own
        self._written, self._frames = [0, 0], [0, 0]  # patches and frames of each kind
        self._shares = share_images
        self._fetched = FetchedImages(())
        # The folders that each was decoded from, and for those that do not decode, also why.
        self._decoded: dict[Key, MediaFolders | None] = {}
        self._failed: dict[Key, tuple[MediaFolders | None, ValueError]] = {}

    def fetch(self, media: Iterable[tuple[Media, MediaFolders | None]]) -> None:
        """Begin to read images that are in object storage, several at once; `load` waits for each."""
        self._fetched = FetchedImages(media)

    def load(self, sample: EncodedSample, folders: MediaFolders | None = None) -> None:
        """Decode the next sample's images and videos. If one fails, none of the sample's patches are kept.

        Args:
            folders: folders that must contain its files, links resolved; None: any folder.

        Raises:
            ValueError: the number of grids does not match the sample's images and videos.
            BadImageError: an image or video cannot be decoded to its planned grid, or is outside `folders`; the
                message gives file and row.
        """
        vision, written, frames = self._vision, [*self._written], [*self._frames]
        counts = [videos.num_grids(ref, vision) for ref in sample.media]
        if sum(counts) != len(sample.grid_thw):
            raise ValueError(
                f"{_where(sample)}: {counted(len(sample.grid_thw), 'grid')} but "
                f"{len(sample.media)} media to decode; set the sample's media, or assemble with pixels=False"
            )
        grids = iter(sample.grid_thw)
        decoded = dict(self._decoded) if self._shares else {}
        for ref, count in zip(sample.media, counts):
            grid_thw = np.array([next(grids) for _ in range(count)])
            key = media_key(ref, grid_thw.tolist())
            try:
                if self._shares and key in decoded:
                    if folders is not None and folders is not decoded[key]:
                        check_place(ref, folders)
                    continue
                kind = 0 if isinstance(ref, ImageRef) else 1
                begin, sizes = written[kind], frames_of(grid_thw)
                frames[kind] += len(sizes)
                is_own = np.ones(len(sizes), dtype=bool)
                if self._own is not None:
                    is_own = self._own[kind][frames[kind] - len(sizes) : frames[kind]]
                written[kind] += int(sizes[is_own].sum())
                out = self._patches[kind][begin : written[kind]]
                if is_own.all():
                    self._decode(ref, key, grid_thw, out, folders)
                elif len(out):
                    whole = np.empty((sizes.sum(), out.shape[1]), dtype=np.uint8)
                    self._decode(ref, key, grid_thw, whole, folders)
                    np.compress(is_own.repeat(sizes), whole, axis=0, out=out)
                decoded[key] = folders
            except ValueError as error:
                raise BadImageError(f"{_where(sample)}: {error}") from None
        self._written, self._frames, self._decoded = written, frames, decoded

    def _decode(
        self,
        ref: Media,
        key: Key,
        grid_thw: Int32,
        out: images.Patches,
        folders: MediaFolders | None,
    ) -> None:
        """Decode an image or a video; what did not decode before is not tried again."""
        before, error = self._failed.get(key, (None, None))
        if error is not None and before is folders:
            raise error
        try:
            if isinstance(ref, ImageRef):
                ref = self._fetched.image(ref, folders)
                images.load_patches(ref, grid_thw[0], self._vision, out, folders)
            else:
                videos.load_patches(ref, grid_thw, self._vision, out, folders)
        except ValueError as error:
            self._failed[key] = (folders, error)
            raise

    @property
    def stills(self) -> images.Patches:
        """(P1, C * p * p) uint8 patches of the images so far, in merge order."""
        return _begin(self._patches[0], self._written[0])

    @property
    def clips(self) -> images.Patches:
        """(P2, C * t * p * p) uint8 patches of the videos so far."""
        return _begin(self._patches[1], self._written[1])


def _begin(array: images.Patches, length: int) -> images.Patches:
    """`array[:length]`, but the array itself if it is full: `worker_buffers.as_tensor` needs `empty`'s array."""
    return array if length == len(array) else array[:length]


def _where(sample: EncodedSample) -> str:
    return f"row {sample.row} of {sample.source}"
