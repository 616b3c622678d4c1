"""EncodedSamples on disk: an Arrow stream, memory-mapped.

A store is a folder: `samples.arrow` is a stream any Arrow reader takes (`datasets.Dataset.from_file`
too), `mmpack.json` holds the `VisionSpec` and what the store was made from. Image and video files stay
where they are; a row holds their paths, and the bytes of images and videos that are in no file.
"""

from __future__ import annotations

import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
from numpy.typing import NDArray

from mmpack import images
from mmpack.types import IGNORE, EncodedSample, ImageRef, Int32, Int64, Media, VideoRef
from mmpack.video_spec import VideoSpec
from mmpack.vision import VisionSpec

FORMAT = 4
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
    }
)


class EncodedStore(Sequence[EncodedSample]):
    """A store opened for reading; a sample is a view of the file, made when it is asked for.

    A worker that unpickles it opens the file again, so nothing is copied.

    Attributes:
        folder: where it lies.
        vision: the spec of all samples.
        num_tokens, num_patches, num_supervised: (N,) int64, known without reading a sample.
        about: what `write_store` was told.
    """

    def __init__(self, folder: Path, vision: VisionSpec, about: dict[str, Any]) -> None:
        self.folder = folder
        self.vision = vision
        self.about = about
        with pyarrow.memory_map(str(folder / "samples.arrow")) as mapped:  # views keep it open
            self._table = pyarrow.ipc.open_stream(mapped).read_all()
        batches = self._table.to_batches()
        self._columns = [batch.columns for batch in batches]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)]).tolist()
        self.num_tokens = self._column("num_tokens")
        self.num_patches = self._column("num_patches")
        self.num_supervised = self._column("num_supervised")

    def __reduce__(self) -> tuple[Any, ...]:
        return open_store, (self.folder,)

    @property
    def sources(self) -> NDArray[Any]:
        """(N,) files the samples come from."""
        return self._column("source")

    @property
    def rows(self) -> Int64:
        """(N,) their numbers there."""
        return self._column("row")

    def grids(self) -> tuple[Int32, Int64]:
        """Of all markers: grid_thw (I, 3), and offsets (N + 1,): those of sample n are
        `offsets[n] : offsets[n + 1]`."""
        chunks = self._table["grid_thw"].chunks
        values = np.concatenate([chunk.flatten().to_numpy() for chunk in chunks])
        lengths = np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks])
        return values.reshape(-1, 3), np.cumsum([0, *lengths]) // 3

    def image_paths(self) -> Iterator[str]:
        """Files of images and videos, some more than once."""
        for _, _, _, paths, data, *_ in self._columns:
            yield from paths.flatten().filter(data.flatten().is_null()).unique().to_pylist()

    def _column(self, name: str) -> NDArray[Any]:
        return self._table[name].to_numpy()

    def __len__(self) -> int:
        return len(self.num_tokens)

    def __getitem__(self, number: int) -> EncodedSample:  # type: ignore[override]
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        number = int(number) % len(self)
        n = bisect_right(self._starts, number) - 1
        row = number - self._starts[n]
        ids, labels, grid, paths, data, source, of_source, *_, videos, steps = self._columns[n]
        files = tuple(map(ImageRef, paths[row].as_py(), data[row].as_py()))
        step = steps[row].values
        return EncodedSample(
            input_ids=ids[row].values.to_numpy(),
            labels=labels[row].values.to_numpy(),
            grid_thw=grid[row].values.to_numpy().reshape(-1, 3),
            images=_media(files, videos[row].as_py()),
            vision=self.vision,
            source=source[row].as_py(),
            row=of_source[row].as_py(),
            temporal_step=None if step is None else step.to_numpy(),
        )


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
) -> EncodedStore:
    """`write_store` for samples that are batches already, made by `as_batch` in any process; none
    but the one being written is in memory."""
    folder = Path(folder)
    if (folder / "mmpack.json").exists():
        raise ValueError(f"{folder} holds a store already")
    folder.mkdir(parents=True, exist_ok=True)
    num_rows = 0
    with pyarrow.OSFile(str(folder / "samples.arrow"), "wb") as file:
        with pyarrow.ipc.new_stream(file, _SCHEMA) as stream:
            for data in batches:
                batch = pyarrow.ipc.read_record_batch(pyarrow.py_buffer(data), _SCHEMA)
                stream.write_batch(batch)
                num_rows += batch.num_rows
    if num_rows == 0:
        raise ValueError("there are no samples to store: no row of the data was usable")
    return _finish(folder, vision, about)


def reuse_store(
    folder: str | os.PathLike[str], store: EncodedStore, about: dict[str, Any]
) -> EncodedStore:
    """The samples of a store as another one: a link to its file where the disk has links."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    source, target = store.folder / "samples.arrow", folder / "samples.arrow"
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return _finish(folder, store.vision, about)


def _finish(folder: Path, vision: VisionSpec, about: dict[str, Any]) -> EncodedStore:
    text = json.dumps({"format": FORMAT, "vision": asdict(vision), "about": about}, indent=2)
    (folder / "mmpack.json").write_text(text + "\n", encoding="utf-8")  # last: a store is whole
    return open_store(folder)


def open_store(folder: str | os.PathLike[str]) -> EncodedStore:
    """Open a store.

    Raises:
        ValueError: the folder holds no store, or one of another format.
    """
    folder = Path(folder)
    try:
        saved = json.loads((folder / "mmpack.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{folder} holds no finished store; make one with mmpack pack") from None
    if saved.get("format") != FORMAT:
        raise ValueError(
            f"{folder} has store format {saved.get('format')}, not {FORMAT}; pack again"
        )
    vision = {k: tuple(v) if isinstance(v, list) else v for k, v in saved["vision"].items()}
    if vision["video"] is not None:
        vision["video"] = VideoSpec(**vision["video"])
    return EncodedStore(folder, VisionSpec(**vision), saved["about"])


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
    columns = [
        _lists(ids, ids_offsets),
        _lists(labels, ids_offsets),
        _lists(grids.ravel(), 3 * grid_offsets),
        _lists([image.path for image in refs], file_offsets, pyarrow.string()),
        _lists([_bytes(image) for image in refs], file_offsets, pyarrow.large_binary()),
        [sample.source for sample in samples],
        [sample.row for sample in samples],
        num_tokens + _sums(vision.num_features(grids), grid_offsets),
        _sums(grids.astype(np.int64).prod(axis=-1), grid_offsets),
        _sums(is_supervised, ids_offsets),
        [_videos(sample.images) for sample in samples],
        [sample.temporal_step for sample in samples],
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
            values = (place, listed, ref.num_frames, ref.fps)
            videos.append(dict(zip(_VIDEO, values)))
            place += max(listed, 1)
        else:
            place += 1
    return videos


def _bytes(image: ImageRef) -> bytes | None:
    return None if image.data is None else images.encoded_bytes(image)
