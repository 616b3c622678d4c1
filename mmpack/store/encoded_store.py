"""EncodedSamples on disk: an Arrow stream, memory-mapped.

A store is a folder. `samples.arrow` is a stream for any Arrow reader. `index.json` and its arrays hold the
positions of its batches and the sizes of its samples. `mmpack.json` holds the `VisionSpec` and what the store was
made from. Two more small files are for `datasets.load_from_disk`. Image and video files are not copied: a row
holds their paths. Images and videos that have no file (bytes in rows) are in `media.bin`, each distinct one once;
a row holds their positions.

All data is checked before use. Each row has a checksum, checked whenever the row is read; a checksum per batch
would make the first read of any row read 256 rows. A batch's offsets are validated on first use, so that a wrong
one cannot read memory outside it. The small files have their own checksums and a schema. The checksums of all of
`samples.arrow` and `media.bin` are checked when another store is made from them. Only regular files are opened.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow
from numpy.typing import NDArray

from mmpack.data.chunks import chunks, item_at
from mmpack.data.remote_roots import require_local
from mmpack.regular_files import regular_stat
from mmpack.store import media_rows
from mmpack.store.arrow_schema import (
    SCHEMA,
    SIZES,
    Batch,
    as_batch,
    read_batch,
    sample_of,
    with_media,
    with_offsets,
)
from mmpack.store.manifest import About, Manifest, read_manifest, write_manifest
from mmpack.store.mapped_arrays import ArrayType, array_files, load_arrays, save_arrays
from mmpack.store.media_file import NAME, MediaFile, MediaWriter
from mmpack.store.records import damaged
from mmpack.types import IGNORE, EncodedSample, Int32, Int64
from mmpack.vision_spec import VisionSpec

_OPEN_BATCHES = 4096  # cached batches, about 20 KiB each without their views, to bound memory
_END = b"\xff\xff\xff\xff\0\0\0\0"  # end of an Arrow stream
_INDEX: dict[str, ArrayType] = {
    "offsets": ("int64", ("batches + 1",)),  # byte offset of each batch in the file
    "starts": ("int64", ("batches + 1",)),  # first sample of each batch
    "sizes": ("int64", (3, "N")),  # SIZES of each sample
}


class EncodedStore(Sequence[EncodedSample]):
    """A store opened for reading. A sample is a view of the file, created on access.

    Pickling copies no data: a worker that unpickles the store opens the file again on first use. If the folder
    holds another store by then, that is an error.

    Attributes:
        folder: the store's folder.
        vision: the spec of all samples.
        num_tokens, num_patches, num_supervised: (N,) int64, known without reading a sample.
        id_range: (smallest, largest) token id, including supervised labels; None: not known.
        contents: checksum of all samples, for `PackedDataset.fingerprint`.
        about: the `About` passed to `write_store`. manifest: the content of `mmpack.json`.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.vision, self.about = manifest.vision, manifest.about
        self.checksum, self.contents = manifest.checksum, manifest.contents
        self.manifest = manifest
        self.id_range = manifest.id_range
        self._path = folder / "samples.arrow"
        index, _ = load_arrays(folder, "index", _INDEX)
        if flaw := _index_flaw(**index):
            raise damaged(folder / "index.json", flaw)
        self.num_tokens, self.num_patches, self.num_supervised = index["sizes"]
        self._offsets, self._starts = index["offsets"].tolist(), index["starts"].tolist()
        self._media = MediaFile(folder, manifest.media_bytes)
        try:
            size = regular_stat(self._path).st_size
            if size != self._offsets[-1] + len(_END):
                raise ValueError(
                    f"it has {size:,} bytes, {self._offsets[-1] + len(_END):,} were written"
                )
            with pyarrow.memory_map(str(self._path)) as mapped:
                self._mapped = mapped.read_buffer()  # keeps the mapping open
        except (OSError, ValueError) as error:
            raise self._damaged(error) from None
        self._columns = lru_cache(maxsize=_OPEN_BATCHES)(self._read_columns)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unopened, (self.folder, self.vision, self.checksum)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_path" in self.__dict__ or "checksum" not in self.__dict__:
            raise AttributeError(name)
        # First use after unpickling. Opening earlier would raise inside pickle, without a useful message.
        now = open_store(self.folder)
        if (now.checksum, now.vision) != (self.checksum, self.vision):
            raise ValueError(
                f"{self.folder} has changed since this run opened it (mmpack pack --overwrite?); "
                "start the run again, or pack to another --out"
            )
        self.__dict__.update(now.__dict__)
        return getattr(self, name)

    @property
    def sources(self) -> NDArray[Any]:
        """(N,) the data file of each sample."""
        chunks = [
            self._columns(n)[5].to_numpy(zero_copy_only=False) for n in range(self.num_batches)
        ]
        return np.concatenate(chunks)

    @property
    def rows(self) -> Int64:
        """(N,) the row number of each sample in its data file."""
        chunks = [self._columns(n)[6].to_numpy() for n in range(self.num_batches)]
        return np.concatenate(chunks)

    def grids(self) -> tuple[Int32, Int64]:
        """grid_thw of all markers (I, 3), and offsets (N + 1,) of each sample's: `offsets[n] : offsets[n + 1]`."""
        chunks = [self._columns(n)[2] for n in range(self.num_batches)]
        values = np.concatenate([chunk.flatten().to_numpy() for chunk in chunks]).reshape(-1, 3)
        lengths = np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks])
        return values, np.cumsum([0, *lengths]) // 3

    def image_paths(self) -> Iterator[str]:
        """Paths of all image and video files, with duplicates."""
        for n in range(self.num_batches):
            yield from media_rows.image_paths(self._columns(n))

    def objects(self) -> Iterator[tuple[str, str]]:
        """(URL, version) of all images and videos in object storage, with duplicates."""
        for n in range(self.num_batches):
            yield from media_rows.objects(self._columns(n))

    def frame_folders(self) -> Iterator[str]:
        """Folders whose pictures are the frames of a video, with duplicates."""
        for n in range(self.num_batches):
            yield from media_rows.frame_folders(self._columns(n))

    def media_rows(self) -> Iterator[media_rows.MediaRows]:
        """The images and videos of each batch's rows."""
        for n in range(self.num_batches):
            yield media_rows.media_rows(self._columns(n))

    def batches(self) -> Iterator[Batch]:
        """The batches that were given to `write_batches`.

        Raises:
            ValueError: one is damaged.
        """
        for number in range(self.num_batches):
            batch = with_media(self._batch(number), self._media.contents)
            if batch is None:
                raise self._damaged(f"batch {number:,} names media that are not there")
            yield batch

    def verify(self) -> None:
        """Check the checksums of whole files, before they become part of another store.

        Raises:
            ValueError: a file has changed.
        """
        checksum = 0
        for start in range(0, self._mapped.size, 1 << 20):
            checksum = zlib.crc32(self._mapped[start : start + (1 << 20)], checksum)
        if checksum != self.checksum:
            raise self._damaged("its bytes have changed")
        self._media.verify(self.manifest.media_checksum)

    @property
    def num_batches(self) -> int:
        """The number of record batches in `samples.arrow`."""
        return len(self._starts) - 1

    def _batch(self, number: int) -> Any:
        return self._mapped[self._offsets[number] : self._offsets[number + 1]]

    def _read_columns(self, number: int) -> list[Any]:
        begin, end = self._starts[number : number + 2]
        try:
            batch = read_batch(self._batch(number))
            if batch.num_rows != end - begin:
                raise ValueError(f"{batch.num_rows} of {end - begin} samples are left")
            columns: list[Any] = batch.columns
            return columns
        except (OSError, ValueError) as error:
            raise self._damaged(f"samples {begin:,} to {end - 1:,}: {error}") from None

    def _damaged(self, why: Any) -> ValueError:
        return damaged(self._path, why)

    def __repr__(self) -> str:
        if "_path" not in self.__dict__:  # sent to a worker, which has not looked yet
            return f"EncodedStore({str(self.folder)!r})"
        tokens = int(self.num_tokens.sum())
        return f"EncodedStore({str(self.folder)!r}, {len(self):,} samples, {tokens:,} tokens)"

    def __len__(self) -> int:
        return len(self.num_tokens)

    @overload
    def __getitem__(self, number: int) -> EncodedSample: ...
    @overload
    def __getitem__(self, number: slice) -> list[EncodedSample]: ...
    def __getitem__(self, number: int | slice) -> EncodedSample | list[EncodedSample]:
        return item_at(number, len(self), self._sample, "sample")  # type: ignore[no-any-return]

    def _sample(self, number: int) -> EncodedSample:
        n = bisect_right(self._starts, number) - 1
        columns, row = self._columns(n), number - self._starts[n]
        sample = sample_of(columns, row, self.vision, self._media.contents)
        if sample is None:
            place = f"row {columns[6][row]} of {columns[5][row]}"
            raise self._damaged(f"sample {number:,} ({place}) has changed")
        return sample


def write_store(
    folder: str | os.PathLike[str],
    samples: Iterable[EncodedSample],
    vision: VisionSpec,
    about: About | None = None,
) -> EncodedStore:
    """Write samples to `folder` and open it.

    Args:
        folder: the store's folder; created if needed, must not hold a store.
        samples: iterated once.
        vision: the spec they were encoded with.
        about: what the samples were made from; by default nothing is recorded.

    Raises:
        ValueError: there are no samples, or the folder already holds a store, or is not local.
    """
    return write_batches(folder, map(as_batch, chunks(samples)), vision, about)


def write_batches(
    folder: str | os.PathLike[str],
    batches: Iterable[Batch],
    vision: VisionSpec,
    about: About | None = None,
    may_be_empty: bool = False,
) -> EncodedStore:
    """Like `write_store`, for batches made by `as_batch` in any process; only one batch is in memory at a time.
    `about` is written last, so its `Part.chunks` may grow until then."""
    require_local(folder, "the packed folder")
    folder = Path(folder)
    if (folder / "mmpack.json").exists():
        raise ValueError(f"{folder} already holds a store; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    starts, sizes, checksum, contents = [0], [], 0, 0
    ids: list[int] = []  # smallest and largest of each batch
    with open(folder / "samples.arrow", "wb") as file, MediaWriter(folder) as media:

        def write(data: Any) -> None:
            nonlocal checksum
            checksum = zlib.crc32(data, checksum)
            file.write(data)

        header = SCHEMA.serialize()
        write(header)
        offsets = [len(header)]
        for rows, inside in batches:
            batch = read_batch(rows)
            data = with_offsets(batch, media.add(inside)) if inside else rows
            write(data)
            offsets.append(offsets[-1] + len(data))
            starts.append(starts[-1] + batch.num_rows)
            sizes.append(np.array([batch[name].to_numpy() for name in SIZES]))
            contents = zlib.crc32(batch["checksum"].to_numpy().astype("<u4").tobytes(), contents)
            values = [batch[name].flatten().to_numpy() for name in ("input_ids", "labels")]
            found = np.concatenate([values[0], values[1][values[1] != IGNORE]])
            ids += [int(found.min()), int(found.max())] if len(found) else []
        write(_END)
    if not sizes and not may_be_empty:
        raise ValueError(
            "no row of the data is usable, so there is nothing to store; see mmpack check"
        )
    table = np.concatenate(sizes, axis=1) if sizes else np.empty((len(SIZES), 0), dtype=np.int64)
    arrays = {"offsets": offsets, "starts": starts, "sizes": table}
    save_arrays(folder, "index", _INDEX, arrays)
    manifest = Manifest(
        vision=vision,
        about=about or About(),
        checksum=checksum,
        contents=contents,
        media_bytes=media.num_bytes,
        media_checksum=media.checksum,
        id_range=(min(ids), max(ids)) if ids else None,
    )
    return _finish(folder, manifest)


def reuse_store(folder: str | os.PathLike[str], store: EncodedStore, about: About) -> EncodedStore:
    """Make another store with the same samples: hard links to its files if possible, else copies.

    Raises:
        ValueError: a file has changed since it was written.
    """
    store.verify()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("samples.arrow", *([NAME] if store.manifest.media_bytes else [])):
        source, target = store.folder / name, folder / name
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
    for path in array_files(store.folder, "index"):
        shutil.copyfile(path, folder / path.name)
    return _finish(folder, replace(store.manifest, about=about))


def _finish(folder: Path, manifest: Manifest) -> EncodedStore:
    """Write the files beside the samples; `mmpack.json` last, which marks the store as complete."""
    # For datasets' load_from_disk. The fingerprint names its caches, so it depends on the content.
    state: dict[str, Any] = {
        "_data_files": [{"filename": "samples.arrow"}],
        "_fingerprint": f"mmpack{manifest.checksum:010x}",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    for name, content in (("state", state), ("dataset_info", {})):
        text = json.dumps(content, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    write_manifest(folder, manifest)
    return open_store(folder)


def _index_flaw(offsets: Int64, starts: Int64, sizes: Int64) -> str:
    """Why these arrays are not a valid index; empty if they are."""
    if not len(offsets) or (starts[0], starts[-1]) != (0, sizes.shape[1]):
        return f"the batches do not cover samples 0 to {sizes.shape[1]:,}"
    if offsets[0] < 0 or not all((one[1:] > one[:-1]).all() for one in (offsets, starts)):
        return "the batches overlap or are out of order"
    if sizes.size and sizes.min() < 0:
        return "a size is negative"
    return ""


def _unopened(folder: Path, vision: VisionSpec, checksum: int) -> EncodedStore:
    """An unpickled store, not opened yet."""
    store = EncodedStore.__new__(EncodedStore)
    store.folder, store.vision, store.checksum = folder, vision, checksum
    return store


def open_store(folder: str | os.PathLike[str]) -> EncodedStore:
    """Open a store.

    Raises:
        ValueError: the folder has no store, one in another format, or a damaged one.
    """
    require_local(folder, "the packed folder")
    return EncodedStore(Path(folder), read_manifest(Path(folder)))
