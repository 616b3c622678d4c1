"""EncodedSamples <-> an Arrow record batch with one row per sample, whose last column is the row's checksum.

Images and videos without a file (bytes in rows) are not in the batch: the store's `media.bin` holds each distinct
one once, and the rows hold its position.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.ipc
from numpy.typing import NDArray

from mmpack.data import images
from mmpack.media_options import VIDEO_KEYS
from mmpack.store.media_file import Position
from mmpack.store.row_checksum import (
    arrays_of,
    files_from,
    files_of,
    media_of,
    members_of,
    options_of,
    row_checksum,
    versions_of,
    videos_of,
)
from mmpack.types import IGNORE, EncodedSample, ImageRef, Int64
from mmpack.vision_spec import VisionSpec

_VIDEO = {
    "place": pyarrow.int32(),  # index of its file, or of its first frame, in `images`
    "listed": pyarrow.int32(),  # number of frames given as images; 0: one video file
    "num_frames": pyarrow.int32(),
    "fps": pyarrow.float64(),
    "folder": pyarrow.string(),  # whose pictures are the frames; null: none is named
}
_POSITION = {"offset": pyarrow.int64(), "length": pyarrow.int64()}  # in media.bin, in bytes
_MEMBER = {  # as `TarMember`
    "name": pyarrow.string(),
    "offset": pyarrow.int64(),
    "length": pyarrow.int64(),
    "header": pyarrow.uint32(),
    "archive_bytes": pyarrow.int64(),
}
_FLOATS = ("fps", "video_start", "video_end")
_OPTIONS = {
    "place": pyarrow.int32(),  # number of the image or video in the row
    **{key: pyarrow.float64() if key in _FLOATS else pyarrow.int64() for key in VIDEO_KEYS},
}
SCHEMA = pyarrow.schema(
    {
        "input_ids": pyarrow.list_(pyarrow.int32()),
        "labels": pyarrow.list_(pyarrow.int32()),
        "grid_thw": pyarrow.list_(pyarrow.int32()),  # flat, 3 values per marker
        "images": pyarrow.list_(pyarrow.string()),  # paths of images, videos and frames
        "in_media": pyarrow.list_(pyarrow.struct(_POSITION)),  # null: read from its file
        "source": pyarrow.string(),
        "row": pyarrow.int64(),
        "num_tokens": pyarrow.int64(),
        "num_patches": pyarrow.int64(),
        "num_supervised": pyarrow.int64(),
        "videos": pyarrow.list_(pyarrow.struct(_VIDEO)),
        "options": pyarrow.list_(pyarrow.struct(_OPTIONS)),  # of images and videos that have any
        "temporal_step": pyarrow.list_(pyarrow.float32()),  # per marker, or null
        "weights": pyarrow.list_(pyarrow.float32()),  # per id, or null
        "of_document": pyarrow.int64(),
        "in_tar": pyarrow.list_(pyarrow.struct(_MEMBER)),  # per file, or null: none is in one
        "versions": pyarrow.list_(pyarrow.string()),  # per file, or null: none is in object storage
        "checksum": pyarrow.uint32(),  # covers everything but SIZES
    }
)
SIZES = ("num_tokens", "num_patches", "num_supervised")


class Batch(NamedTuple):
    """Samples on their way into a store.

    Attributes:
        rows: the bytes of an Arrow record batch; an `offset` in it is a number in `media`.
        media: the distinct images and videos that have no file, by SHA-256.
    """

    rows: bytes
    media: dict[bytes, bytes]

    def contents(self, positions: Sequence[Position]) -> list[bytes]:
        """The images and videos at positions in `rows`, for `sample_of`."""
        media = list(self.media.values())
        return [media[number] for number, _ in positions]


def as_batch(samples: Sequence[EncodedSample]) -> Batch:
    """Samples with one spec as a batch."""
    vision = samples[0].vision
    ids, ids_offsets = _joined([sample.input_ids for sample in samples])
    labels, _ = _joined([sample.labels for sample in samples])
    grids, grid_offsets = _joined([sample.grid_thw for sample in samples])
    files = [files_of(sample.media) for sample in samples]
    file_offsets = np.cumsum([0, *map(len, files)])
    refs = [file for of_sample in files for file in of_sample]
    is_supervised = labels != IGNORE
    is_supervised[ids_offsets[:-1]] = False  # nothing predicts a segment's first token
    num_tokens = np.diff(ids_offsets) - np.diff(grid_offsets)
    data = [_bytes(image) for image in refs]
    positions, media = _numbered(data)
    members = [members_of(of_sample) for of_sample in files]
    clips = [videos_of(sample.media) for sample in samples]
    options = [options_of(sample.media) for sample in samples]
    columns = [
        _lists(ids, ids_offsets),
        _lists(labels, ids_offsets),
        _lists(grids.ravel(), 3 * grid_offsets),
        _lists([image.path for image in refs], file_offsets, pyarrow.string()),
        _lists(positions, file_offsets),
        [sample.source for sample in samples],
        [sample.row for sample in samples],
        num_tokens + _sums(vision.num_features(grids), grid_offsets),
        _sums(grids.astype(np.int64).prod(axis=-1), grid_offsets),
        _sums(is_supervised, ids_offsets),
        clips,
        [[{"place": place, **given} for place, given in one] for one in options],
        [sample.temporal_step for sample in samples],
        [sample.weights for sample in samples],
        [sample.of_document for sample in samples],
        [
            None if row is None else [one and dict(zip(_MEMBER, one)) for one in row]
            for row in members
        ],
        [versions_of(of_sample) for of_sample in files],
        [
            row_checksum(
                arrays_of(sample),
                [image.path for image in refs[begin:end]],
                data[begin:end],
                sample.source,
                int(sample.row),
                clip,
                given,
                sample.of_document,
                of_tar,
                versions_of(refs[begin:end]),
            )
            for sample, clip, given, of_tar, begin, end in zip(
                samples, clips, options, members, file_offsets, file_offsets[1:]
            )
        ],
    ]
    return Batch(pyarrow.record_batch(columns, schema=SCHEMA).serialize().to_pybytes(), media)


def _numbered(
    data: Sequence[bytes | None],
) -> tuple[pyarrow.StructArray, dict[bytes, bytes]]:
    """(the position of each file, null if it has no content; `Batch.media`), of the files' contents."""
    media: dict[bytes, bytes] = {}
    numbers: dict[bytes, int] = {}
    numbered, lengths = np.zeros((2, len(data)), dtype=np.int64)
    for place, content in enumerate(data):
        if content is not None:
            digest = hashlib.sha256(content).digest()
            media.setdefault(digest, content)
            numbered[place] = numbers.setdefault(digest, len(numbers))
            lengths[place] = len(content)
    return _positions(numbered, lengths, [one is None for one in data]), media


def with_offsets(batch: Any, offsets: Int64) -> bytes:
    """The rows of a `Batch`, which was read, with offsets in `media.bin`: `offsets[n]` for its n-th medium."""
    inside, numbers, lengths = position_arrays(batch["in_media"])
    return _replaced(batch, _positions(offsets[numbers], lengths, ~inside))


def with_media(
    rows: Any, contents: Callable[[Sequence[Position]], list[bytes] | None]
) -> Batch | None:
    """The `Batch` of which these rows of a store were made; None if `contents`, as in `sample_of`, has not all of
    its media."""
    batch = read_batch(rows)
    inside, offsets, lengths = position_arrays(batch["in_media"])
    if not inside.any():
        return Batch(rows.to_pybytes(), {})
    positions = list(zip(offsets.tolist(), lengths.tolist()))
    distinct = list(dict.fromkeys(one for one, is_in in zip(positions, inside) if is_in))
    found = contents(distinct)
    if found is None:
        return None
    digests = [hashlib.sha256(content).digest() for content in found]
    media = dict(zip(digests, found))
    order = {digest: number for number, digest in enumerate(media)}
    number_of = {one: order[digest] for one, digest in zip(distinct, digests)}
    numbers = np.array([number_of.get(one, 0) for one in positions], dtype=np.int64)
    return Batch(_replaced(batch, _positions(numbers, lengths, ~inside)), media)


def _replaced(batch: Any, positions: pyarrow.StructArray) -> bytes:
    """The bytes of a batch with other positions."""
    lists = pyarrow.ListArray.from_arrays(batch["in_media"].offsets, positions)
    number = SCHEMA.get_field_index("in_media")
    rows: bytes = batch.set_column(number, SCHEMA.field(number), lists).serialize().to_pybytes()
    return rows


def position_arrays(column: Any) -> tuple[NDArray[np.bool_], Int64, Int64]:
    """(whether each file of a batch is in `media.bin`, offsets, lengths), in the order of rows; of those that are
    not in it, 0."""
    values = column.values
    inside: NDArray[np.bool_] = values.is_valid().to_numpy(zero_copy_only=False)
    offsets, lengths = (np.where(inside, values.field(name).to_numpy(), 0) for name in _POSITION)
    return inside, offsets, lengths


def _positions(offsets: Int64, lengths: Int64, is_null: Any) -> pyarrow.StructArray:
    fields = [pyarrow.field(name, kind) for name, kind in _POSITION.items()]
    mask = pyarrow.array(np.asarray(is_null, dtype=bool))
    return pyarrow.StructArray.from_arrays(
        [pyarrow.array(offsets), pyarrow.array(lengths)], fields=fields, mask=mask
    )


def _joined(arrays: Sequence[NDArray[Any]]) -> tuple[NDArray[Any], Int64]:
    return np.concatenate(arrays), np.cumsum([0, *map(len, arrays)])


def _lists(values: Any, offsets: Int64, type: Any = None) -> pyarrow.ListArray:
    offsets_32 = pyarrow.array(offsets.astype(np.int32))
    return pyarrow.ListArray.from_arrays(offsets_32, pyarrow.array(values, type))


def _sums(values: NDArray[Any], offsets: Int64) -> Int64:
    """(N,) sums of `values[offsets[n] : offsets[n + 1]]`."""
    sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    totals: Int64 = sums[offsets[1:]] - sums[offsets[:-1]]
    return totals


def _bytes(image: ImageRef) -> bytes | None:
    return None if image.data is None else images.encoded_bytes(image)


_REQUIRED = {
    "videos": 3,
    "in_media": 2,
    "options": 1,
    "in_tar": len(_MEMBER),
}  # first fields, never null


def read_batch(data: Any) -> Any:
    """Read a record batch that `as_batch` wrote, as views of its bytes, with offsets and nulls validated.

    Raises:
        ValueError, OSError: it is damaged, so that using it could read memory outside it.
    """
    try:
        if _is_compressed(data):
            raise ValueError("its batch is compressed, mmpack writes uncompressed batches")
        batch = pyarrow.ipc.read_record_batch(data, SCHEMA)
        batch.validate(full=True)
    except struct.error:
        raise ValueError("it is not a record batch") from None
    except (pyarrow.ArrowException, EOFError) as error:  # some are not ValueErrors
        raise ValueError(str(error) or type(error).__name__) from None
    for name, column in zip(batch.schema.names, batch.columns):
        num_nulls = (
            0 if name in ("temporal_step", "weights", "in_tar", "versions") else column.null_count
        )
        if pyarrow.types.is_list(column.type) and name not in ("in_media", "in_tar"):
            num_nulls += column.values.null_count
        values = (
            column.flatten().drop_null() if name == "in_tar" else getattr(column, "values", column)
        )
        for number in range(_REQUIRED.get(name, 0)):
            num_nulls += values.field(number).null_count
        if num_nulls:
            raise ValueError(f"{name} has {num_nulls:,} nulls")
    lengths, num_files = (
        batch[one].value_lengths().to_numpy(False) for one in ("in_tar", "images")
    )
    if not ((lengths == num_files) | np.isnan(lengths.astype(float))).all():
        raise ValueError("in_tar does not have an entry per file")
    return batch


def _is_compressed(data: Any) -> bool:
    """Whether an Arrow message has compressed buffers, which could claim any size; Arrow would allocate it. Reads
    the table Message.header.compression of Arrow's Message.fbs."""
    view = memoryview(data)[8:]  # after a marker and a length

    def field(table: int, slot: int) -> int:
        """The position of a table's field; 0 if the table lacks it."""
        entries = table - int(struct.unpack_from("<i", view, table)[0])
        if entries < 0 or 4 + 2 * slot >= struct.unpack_from("<H", view, entries)[0]:
            return 0
        offset = int(struct.unpack_from("<H", view, entries + 4 + 2 * slot)[0])
        return table + offset if offset else 0

    header = field(struct.unpack_from("<I", view, 0)[0], 2)
    return bool(header) and field(header + struct.unpack_from("<I", view, header)[0], 3) != 0


def sample_of(
    columns: Sequence[Any],
    row: int,
    vision: VisionSpec,
    contents: Callable[[Sequence[Position]], list[bytes] | None],
) -> EncodedSample | None:
    """A row of a batch as a sample; None if it does not match its checksum or is inconsistent.

    Args:
        contents: the images and videos at distinct positions in `media.bin`; None: a position is outside.
    """
    ids, labels, grid = (column[row].values.to_numpy() for column in columns[:3])
    paths, at, source, number = (column[row].as_py() for column in columns[3:7])
    *_, clips, options, step, weights, of_document, in_tar, versions, checksum = columns
    clips, of_document, versions, checksum = (
        one[row].as_py() for one in (clips, of_document, versions, checksum)
    )
    members = in_tar[row].as_py()
    if members is not None:
        members = [one and tuple(one[key] for key in _MEMBER) for one in members]
    step, weights = (
        None if one[row].values is None else one[row].values.to_numpy() for one in (step, weights)
    )
    given = [
        (one.pop("place"), {key: value for key, value in one.items() if value is not None})
        for one in options[row].as_py()
    ]
    pairs = [None if one is None else (one["offset"], one["length"]) for one in at]
    distinct = list(dict.fromkeys(pair for pair in pairs if pair is not None))
    found = contents(distinct) if distinct else []
    if found is None:
        return None
    by_position = dict(zip(distinct, found))
    data = [None if pair is None else by_position[pair] for pair in pairs]
    arrays = [ids, labels, grid, step, weights]
    rest = (source, number, clips, given, of_document, members, versions)
    if row_checksum(arrays, paths, data, *rest) != checksum:
        return None
    if (
        not len(ids)
        or len(labels) != len(ids)
        or len(grid) % 3
        or (step is not None and 3 * len(step) != len(grid))
        or (weights is not None and len(weights) != len(ids))
        or of_document < 0
        or any(len(one) != len(paths) for one in (data, members or paths, versions or paths))
        or not all(0 <= clip["place"] < len(paths) for clip in clips)
    ):
        return None
    media = media_of(files_from(paths, data, members, versions), clips, given)
    if media is None:
        return None
    return EncodedSample(
        input_ids=ids,
        labels=labels,
        grid_thw=grid.reshape(-1, 3),
        media=tuple(media),
        vision=vision,
        source=source,
        row=number,
        temporal_step=step,
        weights=weights,
        of_document=of_document,
    )
