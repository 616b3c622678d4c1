"""The only file that opens videos (PyAV, the extra `[video]`): counts, samples and decodes frames.

The header gives size, frame rate and number of frames; if it lacks the number, packets are counted without
decoding. `mmpack.data.images` resizes frames and cuts them into patches of two (t) frames.

A video in a row is not trusted: only containers that hold their own frames are opened (a playlist or an image
pattern would name other files), and no protocol is allowed. FFmpeg's libraries start no program.
"""

from __future__ import annotations

import io
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpack.data import images
from mmpack.data.media_paths import MediaFolders, open_media
from mmpack.data.remote_objects import identity_of
from mmpack.data.remote_roots import is_remote
from mmpack.errors import RowError
from mmpack.types import ImageRef, Int64, Media, VideoRef
from mmpack.video_spec import is_rate
from mmpack.vision_spec import SampledFrames, VisionSpec, check_aspect_ratio

# FFmpeg's demuxer names, without those for playlists, image sequences and raw streams.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif"
_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}


def probe(
    video: VideoRef, *, decode: bool = False, folders: MediaFolders | None = None
) -> VideoRef:
    """The video with `num_frames`, `fps` and `size` from its header, or from the headers of all its frames if it
    is a list of them; objects in object storage with their version.

    Args:
        decode: decode every frame; only this finds damage.
        folders: those that a row's video is in; of objects they must contain them.

    Raises:
        RowError: the video cannot be read, has no frames or no rate, frames differ in size or exceed Pillow's
            pixel limit, or PyAV is missing; with `decode`, also fewer frames than the header says.
    """
    if video.frames:
        return _probe_list(video, decode, folders)
    if video.data is None and is_remote(video.path) and not video.version:
        with open_media(video.path, "video", folders) as file:
            video = replace(video, version=str(identity_of(file)))
    with _open(video, folders if video.version else None) as (container, stream):
        height, width, fps = stream.height, stream.width, float(stream.average_rate or 0)
        if height * width > images.most_pixels():  # before a frame is decoded
            raise RowError(
                f"video {video.name} is too large: {width} x {height} pixels", "shrink it"
            )
        num_frames = promised = stream.frames
        if not num_frames or decode:
            packets = _packets(video, container, stream)
            num_frames = sum(len(_decode(video, p)) if decode else p.size > 0 for p in packets)
        if num_frames < promised:
            raise RowError(
                f"video {video.name} has fewer frames than its header says: {num_frames:,} of {promised:,} "
                "could be decoded",
                "re-encode it",
            )
    if not num_frames:
        raise RowError(f"video {video.name} has no frames", "replace it")
    if not is_rate(fps):
        raise RowError(f"video {video.name} has no frame rate in its header", "remux it")
    _check_shape(video, height, width)
    return _with(video, num_frames, fps, (height, width))


def num_grids(ref: Media, vision: VisionSpec) -> int:
    """The number of markers (and grids) of an image or a probed video: one, or one per temporal patch of a video
    with timestamps."""
    if isinstance(ref, ImageRef) or not vision.video_spec.has_timestamps:
        return 1
    index = sampled(ref, vision).index
    return -(-len(index) // vision.temporal_patch_size)


def sampled(video: VideoRef, vision: VisionSpec) -> SampledFrames:
    """The frames sampled of a probed video.

    Raises:
        RowError: the video has too few frames, its options cannot be met, or a list has too many.
    """
    try:
        return vision.frame_times(video.num_frames, video.fps, bool(video.frames), video.options)
    except RowError as error:
        raise RowError(f"video {video.name}: {error.error}", error.advice) from None


def load_patches(
    video: VideoRef,
    grid_thw: NDArray[np.integer[Any]],
    vision: VisionSpec,
    out: images.Patches | None = None,
    folders: MediaFolders | None = None,
) -> images.Patches:
    """Decode a probed video's sampled frames and resize them to its planned grid.

    Args:
        grid_thw: (G, 3), the grids of its markers.
        out: (t * h * w, C * frames * p * p) uint8, contiguous: the output; allocated by default.
        folders: folders that must contain its files, links resolved; None: any folder.

    Returns:
        One row per patch in Qwen's merge order, temporal patch by temporal patch; an odd last frame is repeated to
        fill its patch.

    Raises:
        ValueError: the video cannot be decoded, is outside `folders`, or has changed since planning.
    """
    patches, (height, width) = int(grid_thw[:, 0].sum()), map(int, grid_thw[0, 1:])
    multiple = vision.temporal_patch_size
    if out is None:
        values = multiple * vision.patch_values
        out = np.empty((patches * height * width, values), dtype=np.uint8)
    index = sampled(video, vision).index
    planned = (patches, height, width)
    number = -1
    for number, picture in enumerate(_pictures(video, index, folders)):
        size = (picture.height, picture.width)
        if vision.video_grid(len(index), *size, video.options) != planned:
            raise ValueError(
                f"video {video.name} is now {picture.width} x {picture.height} pixels with {len(index)} "
                f"sampled frames, but was planned as a grid of {' x '.join(map(str, planned))} patches; "
                "pack the data again"
            )
        patch, frame = divmod(number, multiple)
        rows = out[patch * height * width : (patch + 1) * height * width]
        is_last = number == len(index) - 1
        for place in range(frame, multiple if is_last else frame + 1):
            images.write_frame(picture, (height, width), vision, rows, place)
    if number + 1 != len(index):
        raise ValueError(
            f"video {video.name} has fewer frames than its header says: {number + 1} of {len(index)} "
            "sampled ones could be decoded; re-encode it, and find such files with mmpack check --decode"
        )
    return out


def thumbnail(
    video: VideoRef, vision: VisionSpec, side: int, folders: MediaFolders | None = None
) -> bytes:
    """The `images.thumbnail` of a probed video's first sampled frame; frames after it are not decoded.

    Raises:
        ValueError: it cannot be decoded, or is outside `folders`.
    """
    index = sampled(video, vision).index
    with closing(_pictures(video, index[:1], folders)) as pictures:
        for picture in pictures:
            return images.thumbnail(picture, side)
    raise RowError(f"video {video.name} has no frames", "replace it")


def _pictures(
    video: VideoRef, index: Int64, folders: MediaFolders | None
) -> Generator[Any, None, None]:
    """The frames at `index`, as PIL images, in order."""
    if video.frames:
        for frame in video.frames:
            with images.decoded(frame, folders) as picture:
                yield picture
        return
    remaining = iter(index.tolist())
    wanted = next(remaining, None)
    at = 0
    with _open(video, folders) as (container, stream):
        for packet in _packets(video, container, stream):
            for frame in _decode(video, packet):
                while at == wanted:  # a frame may be taken twice
                    yield frame.to_image()
                    wanted = next(remaining, None)
                if wanted is None:
                    return
                at += 1


@contextmanager
def _open(video: VideoRef, folders: MediaFolders | None = None) -> Iterator[tuple[Any, Any]]:
    """(container, its video stream)"""
    try:
        import av  # here: the extra [video]
    except ImportError:
        raise RowError(
            f"video {video.name} needs PyAV to be read", "pip install 'mmpack[video]'"
        ) from None
    in_memory = None if video.data is None else io.BytesIO(video.data)
    with in_memory or open_media(
        video.path, "video", folders, member=video.member, version=video.version
    ) as file:
        try:
            container = av.open(file, options=_OPTIONS)
        except Exception as error:  # FFmpeg's errors are not all OSError or ValueError
            raise RowError(
                f"video {video.name} is not a video FFmpeg can read: {_reason(error)}", "replace it"
            ) from None
        with container:
            if not container.streams.video:
                raise RowError(f"video {video.name} has no video stream", "replace it")
            stream = container.streams.video[0]
            if getattr(stream, "codec_context", None) is None:
                raise RowError(
                    f"video {video.name} has a codec that FFmpeg does not know",
                    "re-encode it",
                )
            stream.thread_count = 1  # DataLoader workers are the threads
            yield container, stream


def _decode(video: VideoRef, packet: Any) -> list[Any]:
    try:
        frames: list[Any] = packet.decode()
        return frames
    except Exception as error:
        raise RowError(
            f"video {video.name} cannot be decoded: {_reason(error)}", "replace it"
        ) from None


def _packets(video: VideoRef, container: Any, stream: Any) -> Iterator[Any]:
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except Exception as error:  # FFmpeg's errors are not all OSError or ValueError
            raise RowError(
                f"video {video.name} cannot be read: {_reason(error)}", "replace it"
            ) from None
        if packet is None:
            return
        yield packet


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)[:100]


def _probe_list(video: VideoRef, decode: bool, folders: MediaFolders | None) -> VideoRef:
    sizes: dict[tuple[int, int], str] = {}
    frames = []
    for frame in video.frames:
        found = images.probed(frame, decode=decode, folders=folders)
        assert found.size is not None
        sizes.setdefault(found.size, frame.name)
        frames.append(replace(frame, version=found.version))
    video = replace(video, frames=tuple(frames))
    if len(sizes) > 1:
        (height, width), (other_height, other_width) = list(sizes)[:2]
        raise RowError(
            f"the frames of a video differ in size: {video.name} is {width} x {height} pixels, "
            f"{list(sizes.values())[1]} is {other_width} x {other_height}",
            "resize them to one size",
        )
    return _with(video, len(video.frames), video.fps, next(iter(sizes)))


def _with(video: VideoRef, num_frames: int, fps: float | None, size: tuple[int, int]) -> VideoRef:
    return replace(video, num_frames=num_frames, fps=fps, size=size)


def _check_shape(video: VideoRef, height: int, width: int) -> None:
    try:
        check_aspect_ratio(height, width)
    except RowError as error:
        raise RowError(f"video {video.name}: {error.error}", error.advice) from None
