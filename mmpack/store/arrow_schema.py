"""EncodedSamples <-> an Arrow record batch with one row per sample, whose last column is the row's checksum."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
from numpy.typing import NDArray

from mmpack.data import images
from mmpack.store.row_checksum import files_of, row_checksum, videos_of
from mmpack.types import IGNORE, EncodedSample, ImageRef, Int64, Media, VideoRef
from mmpack.vision_spec import VisionSpec

_VIDEO = {
    "place": pyarrow.int32(),  # index of its file, or of its first frame, in `images`
    "listed": pyarrow.int32(),  # number of frames given as images; 0: one video file
    "num_frames": pyarrow.int32(),
    "fps": pyarrow.float64(),
}
SCHEMA = pyarrow.schema(
    {
        "input_ids": pyarrow.list_(pyarrow.int32()),
        "labels": pyarrow.list_(pyarrow.int32()),
        "grid_thw": pyarrow.list_(pyarrow.int32()),  # flat, 3 values per marker
        "images": pyarrow.list_(pyarrow.string()),  # paths of images, videos and frames
        "image_bytes": pyarrow.list_(pyarrow.large_binary()),  # null: read from its file
        "source": pyarrow.string(),
        "row": pyarrow.int64(),
        "num_tokens": pyarrow.int64(),
        "num_patches": pyarrow.int64(),
        "num_supervised": pyarrow.int64(),
        "videos": pyarrow.list_(pyarrow.struct(_VIDEO)),
        "temporal_step": pyarrow.list_(pyarrow.float32()),  # per marker, or null
        "checksum": pyarrow.uint32(),  # covers everything but SIZES
    }
)
SIZES = ("num_tokens", "num_patches", "num_supervised")


def as_batch(samples: Sequence[EncodedSample]) -> bytes:
    """Samples with one spec as the bytes of an Arrow record batch."""
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
    clips = [videos_of(sample.media) for sample in samples]
    columns = [
        _lists(ids, ids_offsets),
        _lists(labels, ids_offsets),
        _lists(grids.ravel(), 3 * grid_offsets),
        _lists([image.path for image in refs], file_offsets, pyarrow.string()),
        _lists(data, file_offsets, pyarrow.large_binary()),
        [sample.source for sample in samples],
        [sample.row for sample in samples],
        num_tokens + _sums(vision.num_features(grids), grid_offsets),
        _sums(grids.astype(np.int64).prod(axis=-1), grid_offsets),
        _sums(is_supervised, ids_offsets),
        clips,
        [sample.temporal_step for sample in samples],
        [
            row_checksum(
                [sample.input_ids, sample.labels, sample.grid_thw.ravel(), sample.temporal_step],
                [image.path for image in refs[begin:end]],
                data[begin:end],
                sample.source,
                int(sample.row),
                clip,
            )
            for sample, clip, begin, end in zip(samples, clips, file_offsets, file_offsets[1:])
        ],
    ]
    batch: bytes = pyarrow.record_batch(columns, schema=SCHEMA).serialize().to_pybytes()
    return batch


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
        num_nulls = 0 if name == "temporal_step" else column.null_count
        if pyarrow.types.is_list(column.type) and name != "image_bytes":
            num_nulls += column.values.null_count
        if name == "videos":
            num_nulls += sum(column.values.field(n).null_count for n in range(len(_VIDEO) - 1))
        if num_nulls:
            raise ValueError(f"{name} has {num_nulls:,} nulls")
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


def sample_of(columns: Sequence[Any], row: int, vision: VisionSpec) -> EncodedSample | None:
    """A row of a batch as a sample; None if it does not match its checksum or is inconsistent."""
    ids, labels, grid = (column[row].values.to_numpy() for column in columns[:3])
    paths, data, source, number = (column[row].as_py() for column in columns[3:7])
    *_, clips, step, checksum = columns
    clips, step, checksum = clips[row].as_py(), step[row].values, checksum[row].as_py()
    step = None if step is None else step.to_numpy()
    arrays = [ids, labels, grid, step]
    if row_checksum(arrays, paths, data, source, number, clips) != checksum:
        return None
    if (
        not len(ids)
        or len(labels) != len(ids)
        or len(grid) % 3
        or (step is not None and 3 * len(step) != len(grid))
        or len(data) != len(paths)
        or not all(0 <= clip["place"] < len(paths) for clip in clips)
    ):
        return None
    return EncodedSample(
        input_ids=ids,
        labels=labels,
        grid_thw=grid.reshape(-1, 3),
        media=_media(tuple(map(ImageRef, paths, data)), clips),
        vision=vision,
        source=source,
        row=number,
        temporal_step=step,
    )


def _media(files: tuple[ImageRef, ...], videos: list[dict[str, Any]]) -> tuple[Media, ...]:
    """A sample's references, from its files and its video records."""
    media: list[Media] = []
    end = 0
    for video in videos:
        begin, listed = video["place"], video["listed"]
        media += files[end:begin]
        end = begin + max(listed, 1)
        file = files[begin]
        frames = files[begin:end] if listed else ()
        media.append(
            VideoRef(
                file.path, None if listed else file.data, frames, video["num_frames"], video["fps"]
            )
        )
    return (*media, *files[end:])
