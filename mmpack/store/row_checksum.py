"""How a row of a store records a sample's images and videos, and the row's checksum.

Samples in memory have the same checksum as in a store, so a run can resume on either. Does not import Arrow.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpack.media_options import MediaOptions
from mmpack.types import EncodedSample, ImageRef, Media, TarMember, VideoRef


def files_of(media: Iterable[Media]) -> list[ImageRef]:
    """The files of media references: images, video files and frames."""
    files: list[ImageRef] = []
    for ref in media:
        if isinstance(ref, ImageRef):
            files.append(ref)
        else:
            files += ref.frames or (
                ImageRef(ref.path, ref.data, member=ref.member, version=ref.version),
            )
    return files


def versions_of(files: Sequence[ImageRef]) -> list[str] | None:
    """The version of each file, "" if it has none; None: none of them is in object storage."""
    versions = [file.version for file in files]
    return versions if any(versions) else None


def videos_of(media: Iterable[Media]) -> list[dict[str, Any]]:
    """The videos among the files. `place`: index of the file or of the first frame; `listed`: number of frames
    given as images, 0 for a video file; `num_frames`, `fps` and `folder` as in `VideoRef`."""
    videos, place = [], 0
    for ref in media:
        if isinstance(ref, VideoRef):
            listed, fps = len(ref.frames), None if ref.fps is None else float(ref.fps)
            video = {"place": place, "listed": listed, "num_frames": int(ref.num_frames)}
            videos.append({**video, "fps": fps, "folder": ref.folder})
            place += max(listed, 1)
        else:
            place += 1
    return videos


def options_of(media: Sequence[Media]) -> list[tuple[int, dict[str, int | float]]]:
    """(number, options) of the images and videos that have any."""
    return [(n, ref.options.given) for n, ref in enumerate(media) if ref.options is not None]


def members_of(files: Sequence[ImageRef]) -> list[tuple[Any, ...] | None] | None:
    """Where each file is in its tar file, as the values of a `TarMember`; None: none is in one."""
    members = [None if file.member is None else tuple(file.member) for file in files]
    return members if any(members) else None


def files_from(
    paths: list[str],
    data: list[bytes | None],
    members: list[Any] | None,
    versions: list[str] | None,
) -> tuple[ImageRef, ...]:
    """A sample's files, from lists with an item per file."""
    files = tuple(map(ImageRef, paths, data))
    if members is not None:
        refs = zip(files, members)
        files = tuple(replace(file, member=one and TarMember(*one)) for file, one in refs)
    if versions is not None:
        files = tuple(replace(file, version=one) for file, one in zip(files, versions))
    return files


def media_of(
    files: tuple[ImageRef, ...],
    videos: list[dict[str, Any]],
    options: list[tuple[int, dict[str, Any]]],
) -> list[Media] | None:
    """A sample's references, from its files, its video records, and (number, options) of those that have any; None
    if these do not belong together."""
    media: list[Media] = []
    end = 0
    for video in videos:
        begin, listed = video["place"], video["listed"]
        media += files[end:begin]
        end = begin + max(listed, 1)
        file = files[begin]
        frames = files[begin:end] if listed else ()
        data = None if listed else file.data
        known = {name: video[name] for name in ("num_frames", "fps", "folder")}
        member, version = (None, "") if listed else (file.member, file.version)
        known |= {"member": member, "version": version}
        media.append(VideoRef(file.path, data, frames, **known))
    media += files[end:]
    try:
        for place, values in options:
            if place < 0:
                return None
            media[place] = replace(media[place], options=MediaOptions(**values))
    except (IndexError, ValueError):
        return None
    return media


def arrays_of(sample: EncodedSample) -> list[NDArray[Any] | None]:
    """The arrays of a row."""
    grids = sample.grid_thw.ravel()
    return [sample.input_ids, sample.labels, grids, sample.temporal_step, sample.weights]


def row_checksum(arrays: Sequence[NDArray[Any] | None], *texts: Any) -> int:
    """CRC-32 of a row.

    Args:
        arrays: those of `arrays_of`.
        texts: paths of the files, their bytes (None: in the file), source, row, `videos_of`, `options_of`,
            `of_document`, `members_of` and `versions_of`.
    """
    checksum = 0
    for array in arrays:
        if array is not None:
            checksum = zlib.crc32(np.ascontiguousarray(array).data, checksum)
    paths, data, *rest, members, versions = texts
    if members is not None:  # without tar files, as before there were any
        rest.append(members)
    if versions is not None:
        rest.append(versions)
    data = data or ()
    lengths = [None if one is None else len(memoryview(one)) for one in (*arrays, *data)]
    contents = {id(one): zlib.crc32(one) for one in {id(one): one for one in data if one}.values()}
    of_data = [contents.get(id(one)) for one in data]
    return zlib.crc32(repr((lengths, paths, rest, of_data)).encode(), checksum)


def contents_checksum(samples: Iterable[EncodedSample]) -> int:
    """The `EncodedStore.contents` that a store of these samples would have. For PIL images, only the size is
    covered: a store holds them encoded, so its checksum differs."""
    rows = []
    for sample in samples:
        files = files_of(sample.media)
        data = [file.data for file in files]
        data = [repr(one.size).encode() if hasattr(one, "size") else one for one in data]
        paths = [file.path for file in files]
        rest = [videos_of(sample.media), options_of(sample.media), sample.of_document]
        given = (paths, data, sample.source, int(sample.row), *rest)
        places = (members_of(files), versions_of(files))
        rows.append(row_checksum(arrays_of(sample), *given, *places))
    return zlib.crc32(np.array(rows, dtype="<u4").tobytes())
