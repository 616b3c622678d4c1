"""EncodedSamples on disk: an Arrow stream, memory-mapped.

A store is a folder: `samples.arrow` is a stream any Arrow reader takes, `mmpack.json` holds the
`VisionSpec` and what the store was made from; two more small files are for `datasets.load_from_disk`.
Image and video files stay where they are; a row holds their paths, and the bytes of images and videos
that are in no file.

No byte of it is believed unseen. Every row ends with a checksum of itself, looked at whenever the row is
read: that costs as much as the row is long, where one of a batch would make the first look at any row
read 256. Offsets are validated when their batch is first touched, so that a wrong one reads no memory
that is not ours. What is read of all rows at once, their sizes, has a checksum in `mmpack.json`, which
has one too; and so has the file, for whoever makes another store of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow
import pyarrow.ipc
from numpy.typing import NDArray

from mmpack import images
from mmpack.types import IGNORE, EncodedSample, ImageRef, Int32, Int64, Media, VideoRef
from mmpack.video_spec import VideoSpec
from mmpack.vision import VisionSpec

FORMAT = 5
_CHUNK = 256  # samples of a batch
_VIDEO = {
    "place": pyarrow.int32(),  # of its file, or of its first frame, among the sample's
    "listed": pyarrow.int32(),  # frames that are images of their own; 0: a file
    "num_frames": pyarrow.int32(),
    "fps": pyarrow.float64(),
}
_SCHEMA = pyarrow.schema(
    {
        "input_ids": pyarrow.list_(pyarrow.int32()),
        "labels": pyarrow.list_(pyarrow.int32()),
        "grid_thw": pyarrow.list_(pyarrow.int32()),  # flat, three a marker
        "images": pyarrow.list_(pyarrow.string()),  # of every file: images, videos, frames
        "image_bytes": pyarrow.list_(pyarrow.large_binary()),  # null: in its file
        "source": pyarrow.string(),
        "row": pyarrow.int64(),
        "num_tokens": pyarrow.int64(),
        "num_patches": pyarrow.int64(),
        "num_supervised": pyarrow.int64(),
        "videos": pyarrow.list_(pyarrow.struct(_VIDEO)),
        "temporal_step": pyarrow.list_(pyarrow.float32()),  # of every marker, or null
        "checksum": pyarrow.uint32(),  # of all but the three sizes
    }
)
_SIZES = ("num_tokens", "num_patches", "num_supervised")


class EncodedStore(Sequence[EncodedSample]):
    """A store opened for reading; a sample is a view of the file, made when it is asked for.

    A worker that unpickles it opens the file again, so nothing is copied.

    Attributes:
        folder: where it lies.
        vision: the spec of all samples.
        num_tokens, num_patches, num_supervised: (N,) int64, known without reading a sample.
        about: what `write_store` was told.
    """

    def __init__(self, folder: Path, vision: VisionSpec, saved: dict[str, Any]) -> None:
        self.folder = folder
        self.vision = vision
        self.about: dict[str, Any] = saved["about"]
        self.written = (saved["bytes"], saved["checksum"], saved["sizes"])
        self._path = folder / "samples.arrow"
        try:
            size = self._path.stat().st_size
            if size != saved["bytes"]:
                raise ValueError(f"it has {size:,} bytes, {saved['bytes']:,} were written")
            with pyarrow.memory_map(str(self._path)) as mapped:  # views keep it open
                self._table = pyarrow.ipc.open_stream(mapped).read_all()
            self._table.validate()
            self.num_tokens, self.num_patches, self.num_supervised = map(self._column, _SIZES)
            if [zlib.crc32(self._column(name)) for name in _SIZES] != saved["sizes"]:
                raise ValueError("the sizes of its samples are not those that were written")
        except (OSError, ValueError) as error:  # Arrow's errors are of these
            raise self._damaged(error) from None
        self._batches = self._table.to_batches()
        self._columns: list[list[Any] | None] = [None] * len(self._batches)
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)]).tolist()

    def __reduce__(self) -> tuple[Any, ...]:
        return open_store, (self.folder,)

    @property
    def sources(self) -> NDArray[Any]:
        """(N,) files the samples come from."""
        return self._column("source")

    def grids(self) -> tuple[Int32, Int64]:
        """Of all markers: grid_thw (I, 3), and offsets (N + 1,): those of sample n are
        `offsets[n] : offsets[n + 1]`."""
        chunks = self._table["grid_thw"].chunks
        values = np.concatenate([chunk.flatten().to_numpy() for chunk in chunks])
        lengths = np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks])
        return values.reshape(-1, 3), np.cumsum([0, *lengths]) // 3

    def image_paths(self) -> Iterator[str]:
        """Files of images and videos, some more than once."""
        for n in range(len(self._batches)):
            _, _, _, paths, data, *_ = self._columns_of(n)
            yield from paths.flatten().filter(data.flatten().is_null()).unique().to_pylist()

    def batches(self) -> Iterator[bytes]:
        """What `write_batches` was given."""
        for batch in self._batches:
            yield batch.serialize().to_pybytes()

    def verify(self) -> None:
        """Read the whole file: before it becomes part of another store.

        Raises:
            ValueError: it is not what was written.
        """
        with self._path.open("rb") as file:
            checksum = 0
            for block in iter(lambda: file.read(1 << 20), b""):
                checksum = zlib.crc32(block, checksum)
        if checksum != self.written[1]:
            raise self._damaged("its bytes are not those that were written")

    def _damaged(self, why: Any) -> ValueError:
        return ValueError(f"{self._path} is damaged: {why}; pack again with --overwrite")

    def _column(self, name: str) -> NDArray[Any]:
        return self._table[name].to_numpy()

    def _columns_of(self, number: int) -> list[Any]:
        """The columns of a batch, offsets and nulls validated."""
        columns = self._columns[number]
        if columns is None:
            try:
                self._batches[number].validate(full=True)
            except pyarrow.ArrowException as error:
                rows = f"samples {self._starts[number]:,} to {self._starts[number + 1] - 1:,}"
                raise self._damaged(f"{rows}: {error}") from None
            columns = self._columns[number] = self._batches[number].columns
        return columns

    def __len__(self) -> int:
        return len(self.num_tokens)

    def __getitem__(self, number: int) -> EncodedSample:  # type: ignore[override]
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        number = int(number) % len(self)
        n = bisect_right(self._starts, number) - 1
        row = number - self._starts[n]
        columns = self._columns_of(n)
        arrays = [None if (v := c[row].values) is None else v.to_numpy() for c in columns[:3]]
        *_, videos, steps, checksums = columns
        step = steps[row].values
        if step is not None:
            step = step.to_numpy()
        paths, data, source, of_source = (column[row].as_py() for column in columns[3:7])
        clips = videos[row].as_py()
        if (
            _checksum([*arrays, step], paths, data, source, of_source, clips)
            != checksums[row].as_py()
        ):
            raise self._damaged(
                f"sample {number:,} (row {of_source} of {source}) is not what was written"
            )
        ids, labels, grid = arrays
        return EncodedSample(
            input_ids=ids,
            labels=labels,
            grid_thw=grid.reshape(-1, 3),
            images=_media(tuple(map(ImageRef, paths, data)), clips),
            vision=self.vision,
            source=source,
            row=of_source,
            temporal_step=step,
        )


def _checksum(arrays: Sequence[NDArray[Any] | None], *texts: Any) -> int:
    """CRC-32 of a row, as `as_batch` is given it and as it is read."""
    checksum = 0
    for array in arrays:
        if array is not None:
            checksum = zlib.crc32(np.ascontiguousarray(array), checksum)
    paths, data, *rest = texts
    data = data or ()
    lengths = [None if one is None else len(memoryview(one)) for one in (*arrays, *data)]
    checksum = zlib.crc32(repr((lengths, paths, rest)).encode(), checksum)
    for one in data:
        checksum = zlib.crc32(one or b"", checksum)
    return checksum


def _media(files: tuple[ImageRef, ...], videos: list[dict[str, Any]]) -> tuple[Media, ...]:
    """The references of a sample from its files, and which of them are videos'."""
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


def write_store(
    folder: str | os.PathLike[str],
    samples: Iterable[EncodedSample],
    vision: VisionSpec,
    about: dict[str, Any],
) -> EncodedStore:
    """Write samples to `folder` and open it.

    Args:
        folder: created; must not hold a store yet.
        samples: consumed once.
        vision: the spec they were encoded with.
        about: anything JSON holds that says what the store was made from.

    Raises:
        ValueError: no samples, or a folder that holds a store.
    """
    return write_batches(folder, map(as_batch, _chunks(samples)), vision, about)


def write_batches(
    folder: str | os.PathLike[str],
    batches: Iterable[bytes],
    vision: VisionSpec,
    about: dict[str, Any],
    may_be_empty: bool = False,
) -> EncodedStore:
    """`write_store` for samples that are batches already, made by `as_batch` in any process; none
    but the one being written is in memory. `about` is written when all are, so it may grow meanwhile."""
    folder = Path(folder)
    if (folder / "mmpack.json").exists():
        raise ValueError(f"{folder} holds a store already")
    folder.mkdir(parents=True, exist_ok=True)
    num_rows, sizes = 0, [0] * len(_SIZES)
    with open(folder / "samples.arrow", "wb") as opened:
        file = _Summed(opened)
        with pyarrow.ipc.new_stream(pyarrow.PythonFile(file, "w"), _SCHEMA) as stream:
            for data in batches:
                batch = pyarrow.ipc.read_record_batch(pyarrow.py_buffer(data), _SCHEMA)
                stream.write_batch(batch)
                num_rows += batch.num_rows
                columns = [batch.column(name).to_numpy() for name in _SIZES]
                sizes = [zlib.crc32(*both) for both in zip(columns, sizes)]
    if num_rows == 0 and not may_be_empty:
        raise ValueError("there are no samples to store: no row of the data was usable")
    return _finish(folder, vision, about, file.num_bytes, file.checksum, sizes)


class _Summed:
    """A file being written, its length and checksum."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.num_bytes = self.checksum = 0

    def write(self, data: Any) -> int:
        self.num_bytes += len(data)
        self.checksum = zlib.crc32(data, self.checksum)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def reuse_store(
    folder: str | os.PathLike[str], store: EncodedStore, about: dict[str, Any]
) -> EncodedStore:
    """The samples of a store as another one: a link to its file where the disk has links.

    Raises:
        ValueError: the file is not what was written.
    """
    store.verify()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    source, target = store.folder / "samples.arrow", folder / "samples.arrow"
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return _finish(folder, store.vision, about, *store.written)


def _finish(
    folder: Path,
    vision: VisionSpec,
    about: dict[str, Any],
    num_bytes: int,
    checksum: int,
    sizes: list[int],
) -> EncodedStore:
    """What lies beside the samples; `mmpack.json` last: then a store is whole."""
    for name, content in _for_datasets(checksum, num_bytes).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    saved: dict[str, Any] = {"format": FORMAT, "vision": asdict(vision), "about": about}
    saved |= {"bytes": num_bytes, "checksum": checksum, "sizes": sizes}
    saved["checksum of this file"] = _checksum_of(json.loads(json.dumps(saved)))
    text = json.dumps(saved, indent=2)
    (folder / "mmpack.json").write_text(text + "\n", encoding="utf-8")
    return open_store(folder)


def _checksum_of(saved: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(saved, sort_keys=True).encode())


def _for_datasets(checksum: int, num_bytes: int) -> dict[str, dict[str, Any]]:
    """What `datasets.load_from_disk` reads beside an Arrow stream (its `Dataset.save_to_disk`). The
    fingerprint names what it caches, so it follows the content."""
    state = {
        "_data_files": [{"filename": "samples.arrow"}],
        "_fingerprint": f"{checksum:08x}{num_bytes & 0xFFFFFFFF:08x}",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    return {"state.json": state, "dataset_info.json": {}}


def open_store(folder: str | os.PathLike[str]) -> EncodedStore:
    """Open a store.

    Raises:
        ValueError: the folder holds no store, one of another format, or a damaged one.
    """
    folder = Path(folder)
    path = folder / "mmpack.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{folder} holds no finished store; make one with mmpack pack") from None
    if not isinstance(saved, dict) or "format" not in saved:
        raise ValueError(f"{path} is not mmpack's; make a store with mmpack pack")
    if saved["format"] != FORMAT:
        raise ValueError(
            f"{folder} has store format {saved['format']}, not {FORMAT}; pack again with --overwrite"
        )
    if saved.pop("checksum of this file", None) != _checksum_of(saved):
        raise ValueError(
            f"{path} is damaged: it is not what was written; pack again with --overwrite"
        )
    vision = {k: tuple(v) if isinstance(v, list) else v for k, v in saved["vision"].items()}
    if vision["video"] is not None:
        vision["video"] = VideoSpec(**vision["video"])
    return EncodedStore(folder, VisionSpec(**vision), saved)


def changed_files(store: EncodedStore) -> list[str]:
    """Data files that are not what the store was made from: of another size, or of another time and
    other content. One that is not there, or cannot be read, is none: a store needs it no more."""
    changed = []
    for path, (num_bytes, time_ns, sha256) in store.about.get("files", {}).items():
        try:
            stat = os.stat(path)
            if stat.st_size != num_bytes or (
                stat.st_mtime_ns != time_ns and file_sha256(path) != sha256
            ):
                changed.append(path)
        except OSError:
            continue
    return changed


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def as_batch(samples: Sequence[EncodedSample]) -> bytes:
    """Samples of one spec as the bytes of an Arrow record batch."""
    vision = samples[0].vision
    ids, ids_offsets = _joined([sample.input_ids for sample in samples])
    labels, _ = _joined([sample.labels for sample in samples])
    grids, grid_offsets = _joined([sample.grid_thw for sample in samples])
    files = [_files(sample.images) for sample in samples]
    file_offsets = np.cumsum([0, *map(len, files)])
    refs = [file for of_sample in files for file in of_sample]
    is_supervised = labels != IGNORE
    is_supervised[ids_offsets[:-1]] = False  # the first of a segment has nothing before it
    num_tokens = np.diff(ids_offsets) - np.diff(grid_offsets)
    data = [_bytes(image) for image in refs]
    clips = [_videos(sample.images) for sample in samples]
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
            _checksum(
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
    return pyarrow.record_batch(columns, schema=_SCHEMA).serialize().to_pybytes()


def _chunks(samples: Iterable[EncodedSample]) -> Iterator[list[EncodedSample]]:
    remaining = iter(samples)
    while chunk := list(islice(remaining, _CHUNK)):
        yield chunk


def _joined(arrays: Sequence[NDArray[Any]]) -> tuple[NDArray[Any], Int64]:
    return np.concatenate(arrays), np.cumsum([0, *map(len, arrays)])


def _lists(values: Any, offsets: Int64, type: Any = None) -> pyarrow.ListArray:
    offsets_32 = pyarrow.array(offsets.astype(np.int32))
    return pyarrow.ListArray.from_arrays(offsets_32, pyarrow.array(values, type))


def _sums(values: NDArray[Any], offsets: Int64) -> Int64:
    """(N,) sums of the values between offsets."""
    sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return sums[offsets[1:]] - sums[offsets[:-1]]


def _files(media: Iterable[Media]) -> list[ImageRef]:
    """What references lie in: images, video files and frames."""
    files: list[ImageRef] = []
    for ref in media:
        if isinstance(ref, ImageRef):
            files.append(ref)
        else:
            files += ref.frames or (ImageRef(ref.path, ref.data),)
    return files


def _videos(media: Iterable[Media]) -> list[dict[str, Any]]:
    videos, place = [], 0
    for ref in media:
        if isinstance(ref, VideoRef):
            listed = len(ref.frames)
            fps = None if ref.fps is None else float(ref.fps)
            values = (place, listed, int(ref.num_frames), fps)
            videos.append(dict(zip(_VIDEO, values)))
            place += max(listed, 1)
        else:
            place += 1
    return videos


def _bytes(image: ImageRef) -> bytes | None:
    return None if image.data is None else images.encoded_bytes(image)
