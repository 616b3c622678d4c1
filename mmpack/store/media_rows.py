"""Columns of a store's batch -> the files of its images and videos, read without making samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmpack.store.arrow_schema import SCHEMA, position_arrays
from mmpack.types import Int32, Int64

_GRIDS, _IMAGES, _AT, _VIDEOS, _OPTIONS, _TAR, _VERSIONS = (
    SCHEMA.get_field_index(name)
    for name in ("grid_thw", "images", "in_media", "videos", "options", "in_tar", "versions")
)


class MediaRows(NamedTuple):
    """The images and videos of a batch's rows.

    Attributes:
        paths: distinct paths of the batch. path: (n,) the number in `paths` of each image, video or frame.
        offset: (n,) its position in `media.bin`; -1: it is a file.
        in_tar: (n,) its position in that file, a tar file; 0: it is the whole file.
        files: (rows + 1,) those of row r are `files[r] : files[r + 1]`.
        grid_thw: (I, 3) of all markers. grids: (rows + 1,) those of row r are `grids[r] : grids[r + 1]`.
        is_plain: (rows,) whether a row has only images, one per grid, without options.
    """

    paths: list[str]
    path: Int64
    offset: Int64
    in_tar: Int64
    files: Int64
    grid_thw: Int32
    grids: Int64
    is_plain: NDArray[np.bool_]


def media_rows(columns: Sequence[Any]) -> MediaRows:
    """The images and videos of a batch, from its columns, which were validated."""
    encoded = columns[_IMAGES].values.dictionary_encode()
    inside, offsets, _ = position_arrays(columns[_AT])
    files = columns[_IMAGES].offsets.to_numpy().astype(np.int64)
    members = columns[_TAR].flatten()
    in_tar = np.zeros(len(inside), dtype=np.int64)
    is_valid = columns[_TAR].is_valid().to_numpy(zero_copy_only=False)
    in_tar[np.repeat(is_valid, np.diff(files))] = members.field("offset").fill_null(0).to_numpy()
    grids = columns[_GRIDS].offsets.to_numpy().astype(np.int64) // 3
    videos, options = (columns[n].value_lengths().to_numpy() for n in (_VIDEOS, _OPTIONS))
    return MediaRows(
        paths=encoded.dictionary.to_pylist(),
        path=encoded.indices.to_numpy().astype(np.int64),
        offset=np.where(inside, offsets, -1),
        in_tar=in_tar,
        files=files,
        grid_thw=columns[_GRIDS].values.to_numpy().reshape(-1, 3),
        grids=grids,
        is_plain=(videos == 0) & (options == 0) & (np.diff(files) == np.diff(grids)),
    )


def image_paths(columns: Sequence[Any]) -> list[str]:
    """The distinct paths of a batch's image and video files."""
    paths, is_file = columns[_IMAGES].flatten(), columns[_AT].flatten().is_null()
    found: list[str] = paths.filter(is_file).unique().to_pylist()
    return found


def objects(columns: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """(URL, version) of a batch's images and videos in object storage."""
    versions = columns[_VERSIONS]
    urls = columns[_IMAGES].filter(versions.is_valid()).flatten().to_pylist()
    pairs = zip(urls, versions.drop_null().flatten().to_pylist())
    return ((url, version) for url, version in pairs if version)


def frame_folders(columns: Sequence[Any]) -> list[str]:
    """The distinct folders of a batch whose pictures are the frames of a video."""
    folders: list[str] = columns[_VIDEOS].flatten().field("folder").drop_null().unique().to_pylist()
    return folders
