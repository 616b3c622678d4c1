"""The only file that opens videos (PyAV, the extra `[video]`): frames counted, sampled, decoded.

A header names size, rate and number of frames; where it leaves the number out, packets are counted
without decoding one. Frames are resized and cut into patches by `mmpack.data.images`, two (t) a patch.

A video in a row is not trusted: only containers that hold their own frames are opened (a playlist or
an image pattern would name other files), and no protocol at all.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpack.data import images
from mmpack.errors import RowError
from mmpack.types import ImageRef, Int64, Media, VideoRef
from mmpack.video_spec import is_rate
from mmpack.vision_spec import VisionSpec, check_aspect_ratio

# FFmpeg's names of demuxers; those of playlists, of image sequences and of raw streams are not here.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif"
_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}


def probe(video: VideoRef, *, decode: bool = False) -> VideoRef:
    """The video with `num_frames`, `fps` and `size` as its header says; of a list of frames, all
    their headers are read.

    Args:
        decode: decode every frame, which alone finds damage.

    Raises:
        RowError: no video that can be read, one without frames or rate, frames of different sizes or over
            Pillow's limit of pixels; or PyAV is missing.
    """
    if video.frames:
        return _probe_list(video, decode)
    with _open(video) as (container, stream):
        num_frames = stream.frames
        if not num_frames or decode:
            packets = container.demux(stream)
            counted = (len(_decode(video, p)) if decode else p.size > 0 for p in packets)
            num_frames = _count(video, counted)
        height, width, fps = stream.height, stream.width, float(stream.average_rate or 0)
    if not num_frames:
        raise RowError(f"video {video.path} has no frames", "replace it")
    if not is_rate(fps):
        raise RowError(
            f"video {video.path} does not say how many frames a second it has", "remux it"
        )
    if height * width > images.most_pixels():
        raise RowError(f"video {video.path} is too large: {width} x {height} pixels", "shrink it")
    _check_shape(video, height, width)
    return _with(video, num_frames, fps, (height, width))


def num_grids(ref: Media, vision: VisionSpec) -> int:
    """How many markers, and grids, an image or a probed video has: one; a video with timestamps one a
    temporal patch."""
    if isinstance(ref, ImageRef) or not vision.video_spec.has_timestamps:
        return 1
    index, _ = sampled(ref, vision)
    return -(-len(index) // vision.temporal_patch_size)


def sampled(video: VideoRef, vision: VisionSpec) -> tuple[Int64, float]:
    """(index, fps): which frames of a probed video are taken, ascending, and its frames a second.

    Raises:
        RowError: too few frames, or in a list too many.
    """
    try:
        return vision.frame_times(video.num_frames, video.fps, bool(video.frames))
    except RowError as error:
        raise RowError(f"video {video.path}: {error.error}", error.advice) from None


def load_patches(
    video: VideoRef,
    grid_thw: NDArray[np.integer[Any]],
    vision: VisionSpec,
    out: images.Patches | None = None,
) -> images.Patches:
    """Decode a probed video's sampled frames and resize them to its planned grid.

    Args:
        grid_thw: (G, 3), the grids of its markers.
        out: (t * h * w, C * frames * p * p) uint8, contiguous: where to write; new memory by default.

    Returns:
        One row a patch in Qwen's merge order, temporal patch by temporal patch; an odd last frame fills
        its patch alone.

    Raises:
        ValueError: the video cannot be decoded, or no longer is what it was planned as.
    """
    patches, (height, width) = int(grid_thw[:, 0].sum()), map(int, grid_thw[0, 1:])
    multiple = vision.temporal_patch_size
    if out is None:
        values = multiple * vision.patch_values
        out = np.empty((patches * height * width, values), dtype=np.uint8)
    index, _ = sampled(video, vision)
    planned = (patches, height, width)
    number = -1
    for number, picture in enumerate(_pictures(video, index)):
        if vision.video_grid(len(index), picture.height, picture.width) != planned:
            raise ValueError(
                f"video {video.path} is now {picture.width} x {picture.height} pixels with {len(index)} "
                f"sampled frames, it was planned as a grid of {' x '.join(map(str, planned))} patches; "
                "pack the data again"
            )
        patch, frame = divmod(number, multiple)
        rows = out[patch * height * width : (patch + 1) * height * width]
        is_last = number == len(index) - 1
        for place in range(frame, multiple if is_last else frame + 1):
            images.write_frame(picture, (height, width), vision, rows, place)
    if number + 1 != len(index):
        raise ValueError(
            f"video {video.path} has fewer frames than its header says: {number + 1} of {len(index)} "
            "sampled ones could be decoded; re-encode it, or find such files with --decode"
        )
    return out


def _pictures(video: VideoRef, index: Int64) -> Iterator[Any]:
    """The frames at `index`, as PIL images, in order."""
    if video.frames:
        for frame in video.frames:
            with images.decoded(frame) as picture:
                yield picture
        return
    remaining = iter(index.tolist())
    wanted = next(remaining, None)
    at = 0
    with _open(video) as (container, stream):
        for packet in container.demux(stream):
            for frame in _decode(video, packet):
                while at == wanted:  # a frame may be taken twice
                    yield frame.to_image()
                    wanted = next(remaining, None)
                if wanted is None:
                    return
                at += 1


@contextmanager
def _open(video: VideoRef) -> Iterator[tuple[Any, Any]]:
    """(container, its video stream)"""
    try:
        import av  # here: the extra [video]
    except ImportError:
        raise RowError(
            f"video {video.path} needs PyAV to be read", "install mmpack[video]"
        ) from None
    try:
        file = open(video.path, "rb") if video.data is None else io.BytesIO(video.data)
    except OSError as error:
        raise RowError(
            f"video {video.path} cannot be opened: {error.strerror}", "mend the path"
        ) from None
    with file:
        try:
            container = av.open(file, options=_OPTIONS)
        except (OSError, ValueError) as error:
            raise RowError(
                f"video {video.path} is not a video FFmpeg can read: {_reason(error)}", "replace it"
            ) from None
        with container:
            if not container.streams.video:
                raise RowError(f"video {video.path} has no pictures", "replace it")
            stream = container.streams.video[0]
            stream.thread_count = 1  # DataLoader workers are the threads
            yield container, stream


def _decode(video: VideoRef, packet: Any) -> list[Any]:
    try:
        frames: list[Any] = packet.decode()
        return frames
    except (OSError, ValueError) as error:
        raise RowError(
            f"video {video.path} cannot be decoded: {_reason(error)}", "replace it"
        ) from None


def _count(video: VideoRef, counted: Iterator[int | bool]) -> int:
    try:
        return sum(counted)
    except RowError:
        raise
    except (OSError, ValueError) as error:  # of the demuxer
        raise RowError(
            f"video {video.path} cannot be read: {_reason(error)}", "replace it"
        ) from None


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)[:100]


def _probe_list(video: VideoRef, decode: bool) -> VideoRef:
    sizes: dict[tuple[int, int], str] = {}
    for frame in video.frames:
        sizes.setdefault(images.probe(frame, decode=decode), frame.path)
    if len(sizes) > 1:
        (height, width), (other_height, other_width) = list(sizes)[:2]
        raise RowError(
            f"the frames of a video differ in size: {video.path} is {width} x {height} pixels, "
            f"{list(sizes.values())[1]} is {other_width} x {other_height}",
            "resize them",
        )
    return _with(video, len(video.frames), video.fps, next(iter(sizes)))


def _with(video: VideoRef, num_frames: int, fps: float | None, size: tuple[int, int]) -> VideoRef:
    return VideoRef(video.path, video.data, video.frames, num_frames, fps, size)


def _check_shape(video: VideoRef, height: int, width: int) -> None:
    try:
        check_aspect_ratio(height, width)
    except RowError as error:
        raise RowError(f"video {video.path}: {error.error}", error.advice) from None
