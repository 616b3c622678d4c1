"""EncodedSamples on disk: an Arrow stream, memory-mapped.

A store is a folder: `samples.arrow` is a stream any Arrow reader takes; `index.json` and its arrays say
where its batches lie and how large the samples are; `mmpack.json` holds the `VisionSpec` and what the store
was made from; two more small files are for `datasets.load_from_disk`. Image and video files stay where they are; a row
holds their paths, and the bytes of images and videos that are in no file.

No byte is believed unseen. A row has a checksum, looked at whenever the row is read: that costs as much as
the row is long, where one of a batch would make the first look at any row read 256. A batch's offsets are
validated when it is first touched, so that a wrong one reads no memory that is not ours. The small files
have checksums of their own and fit a schema; the checksum of all of `samples.arrow` is for whoever makes
another store of it. Whatever a store names, only regular files are opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow
from numpy.typing import NDArray

from mmpack.data.chunks import chunks, item_at
from mmpack.regular_files import NotRegularError, open_regular, regular_stat
from mmpack.store.arrow_schema import SCHEMA, SIZES, as_batch, read_batch, sample_of
from mmpack.store.manifest import About, Manifest, read_manifest, write_manifest
from mmpack.store.mapped_arrays import ArrayType, array_files, load_arrays, save_arrays
from mmpack.store.records import damaged
from mmpack.types import IGNORE, EncodedSample, Int32, Int64
from mmpack.vision_spec import VisionSpec

_OPEN_BATCHES = 4096  # of some 20 KiB each, views aside, so that memory has a bound
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream
_INDEX: dict[str, ArrayType] = {
    "offsets": ("int64", ("batches + 1",)),  # of the batches in the file
    "starts": ("int64", ("batches + 1",)),  # their first samples
    "sizes": ("int64", (3, "N")),  # of every sample, as SIZES
}


class EncodedStore(Sequence[EncodedSample]):
    """A store opened for reading; a sample is a view of the file, made when it is asked for.

    A worker that unpickles it opens the file again when it first looks, so nothing is copied; where another
    store lies there by then, that is an error.

    Attributes:
        folder: where it lies.
        vision: the spec of all samples.
        num_tokens, num_patches, num_supervised: (N,) int64, known without reading a sample.
        id_range: (smallest, largest) token id, labels that count among them; None: not known.
        contents: checksum of all its samples, for `PackedDataset.fingerprint`.
        about: what `write_store` was told.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.vision, self.about = manifest.vision, manifest.about
        self.checksum, self.contents = manifest.checksum, manifest.contents
        self.id_range = manifest.id_range
        self._path = folder / "samples.arrow"
        index, _ = load_arrays(folder, "index", _INDEX)
        if flaw := _index_flaw(**index):
            raise damaged(folder / "index.json", flaw)
        self.num_tokens, self.num_patches, self.num_supervised = index["sizes"]
        self._offsets, self._starts = index["offsets"].tolist(), index["starts"].tolist()
        try:
            size = regular_stat(self._path).st_size
            if size != self._offsets[-1] + len(_END):
                raise ValueError(
                    f"it has {size:,} bytes, {self._offsets[-1] + len(_END):,} were written"
                )
            with pyarrow.memory_map(str(self._path)) as mapped:
                self._mapped = mapped.read_buffer()  # which keeps it open
        except (OSError, ValueError) as error:
            raise self._damaged(error) from None
        self._columns = lru_cache(maxsize=_OPEN_BATCHES)(self._read_columns)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unopened, (self.folder, self.vision, self.checksum)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_path" in self.__dict__ or "checksum" not in self.__dict__:
            raise AttributeError(name)
        # Unpickled: the first look. Not earlier, so that a worker can say what is wrong.
        now = open_store(self.folder)
        if (now.checksum, now.vision) != (self.checksum, self.vision):
            raise ValueError(
                f"{self.folder} holds other samples than when this run opened it (mmpack pack "
                "--overwrite meanwhile?); start the run again, or pack to another --out"
            )
        self.__dict__.update(now.__dict__)
        return getattr(self, name)

    @property
    def sources(self) -> NDArray[Any]:
        """(N,) files the samples come from."""
        chunks = [
            self._columns(n)[5].to_numpy(zero_copy_only=False) for n in range(self.num_batches)
        ]
        return np.concatenate(chunks)

    @property
    def rows(self) -> Int64:
        """(N,) their numbers there."""
        chunks = [self._columns(n)[6].to_numpy() for n in range(self.num_batches)]
        return np.concatenate(chunks)

    def grids(self) -> tuple[Int32, Int64]:
        """Of all markers: grid_thw (I, 3), and offsets (N + 1,): those of sample n are
        `offsets[n] : offsets[n + 1]`."""
        chunks = [self._columns(n)[2] for n in range(self.num_batches)]
        values = np.concatenate([chunk.flatten().to_numpy() for chunk in chunks])
        lengths = np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks])
        return values.reshape(-1, 3), np.cumsum([0, *lengths]) // 3

    def image_paths(self) -> Iterator[str]:
        """Files of images and videos, some more than once."""
        for n in range(self.num_batches):
            _, _, _, paths, data, *_ = self._columns(n)
            yield from paths.flatten().filter(data.flatten().is_null()).unique().to_pylist()

    def batches(self) -> Iterator[bytes]:
        """What `write_batches` was given."""
        return (self._batch(n).to_pybytes() for n in range(self.num_batches))

    def verify(self) -> None:
        """Read the whole file: before it becomes part of another store.

        Raises:
            ValueError: it is not what was written.
        """
        checksum = 0
        for start in range(0, self._mapped.size, 1 << 20):
            checksum = zlib.crc32(self._mapped[start : start + (1 << 20)], checksum)
        if checksum != self.checksum:
            raise self._damaged("its bytes are not those that were written")

    @property
    def num_batches(self) -> int:
        """Record batches in `samples.arrow`."""
        return len(self._starts) - 1

    def _batch(self, number: int) -> Any:
        return self._mapped[self._offsets[number] : self._offsets[number + 1]]

    def _read_columns(self, number: int) -> list[Any]:
        begin, end = self._starts[number : number + 2]
        try:
            batch = read_batch(self._batch(number))
            if batch.num_rows != end - begin:
                raise ValueError(f"{batch.num_rows} of {end - begin} samples are there")
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
        sample = sample_of(columns, row, self.vision)
        if sample is None:
            place = f"row {columns[6][row]} of {columns[5][row]}"
            raise self._damaged(f"sample {number:,} ({place}) is not what was written")
        return sample


def write_store(
    folder: str | os.PathLike[str],
    samples: Iterable[EncodedSample],
    vision: VisionSpec,
    about: About | None = None,
) -> EncodedStore:
    """Write samples to `folder` and open it.

    Args:
        folder: created; must not hold a store yet.
        samples: consumed once.
        vision: the spec they were encoded with.
        about: what the samples were made from; by default nothing is said of it.

    Raises:
        ValueError: no samples, or a folder that holds a store.
    """
    return write_batches(folder, map(as_batch, chunks(samples)), vision, about)


def write_batches(
    folder: str | os.PathLike[str],
    batches: Iterable[bytes],
    vision: VisionSpec,
    about: About | None = None,
    may_be_empty: bool = False,
) -> EncodedStore:
    """`write_store` for samples that are batches already, made by `as_batch` in any process; none
    but the one being written is in memory. `about` is written when all are, so the chunks of a part may
    grow meanwhile."""
    folder = Path(folder)
    if (folder / "mmpack.json").exists():
        raise ValueError(f"{folder} holds a store already")
    folder.mkdir(parents=True, exist_ok=True)
    starts, sizes, checksum, contents = [0], [], 0, 0
    ids: list[int] = []  # the smallest and the largest of every batch
    with open(folder / "samples.arrow", "wb") as file:

        def write(data: Any) -> None:
            nonlocal checksum
            checksum = zlib.crc32(data, checksum)
            file.write(data)

        header = SCHEMA.serialize()
        write(header)
        offsets = [len(header)]
        for data in batches:
            write(data)
            batch = read_batch(data)
            offsets.append(offsets[-1] + len(data))
            starts.append(starts[-1] + batch.num_rows)
            sizes.append(np.array([batch[name].to_numpy() for name in SIZES]))
            contents = zlib.crc32(batch["checksum"].to_numpy().astype("<u4").tobytes(), contents)
            values = [batch[name].flatten().to_numpy() for name in ("input_ids", "labels")]
            found = np.concatenate([values[0], values[1][values[1] != IGNORE]])
            ids += [int(found.min()), int(found.max())] if len(found) else []
        write(_END)
    if not sizes and not may_be_empty:
        raise ValueError("there are no samples to store: no row of the data was usable")
    table = np.concatenate(sizes, axis=1) if sizes else np.empty((len(SIZES), 0), dtype=np.int64)
    arrays = {"offsets": offsets, "starts": starts, "sizes": table}
    save_arrays(folder, "index", _INDEX, arrays)
    manifest = Manifest(
        vision=vision,
        about=about or About(),
        checksum=checksum,
        contents=contents,
        id_range=(min(ids), max(ids)) if ids else None,
    )
    return _finish(folder, manifest)


def reuse_store(folder: str | os.PathLike[str], store: EncodedStore, about: About) -> EncodedStore:
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
    for path in array_files(store.folder, "index"):
        shutil.copyfile(path, folder / path.name)
    return _finish(
        folder,
        Manifest(
            vision=store.vision,
            about=about,
            checksum=store.checksum,
            contents=store.contents,
            id_range=store.id_range,
        ),
    )


def _finish(folder: Path, manifest: Manifest) -> EncodedStore:
    """What lies beside the samples; `mmpack.json` last: then a store is whole."""
    # What datasets' load_from_disk reads. The fingerprint names its caches, so it follows the content.
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
    """What makes it no index; empty: it is one."""
    if not len(offsets) or (starts[0], starts[-1]) != (0, sizes.shape[1]):
        return f"the batches do not go from sample 0 to {sizes.shape[1]:,}"
    rises = all((one[1:] > one[:-1]).all() for one in (offsets, starts))
    if offsets[0] < 0 or not rises:
        return "the batches do not lie one behind the other"
    if sizes.size and sizes.min() < 0:
        return "a size is negative"
    return ""


def _unopened(folder: Path, vision: VisionSpec, checksum: int) -> EncodedStore:
    """The store as a worker has it before it looks."""
    store = EncodedStore.__new__(EncodedStore)
    store.folder, store.vision, store.checksum = folder, vision, checksum
    return store


def open_store(folder: str | os.PathLike[str]) -> EncodedStore:
    """Open a store.

    Raises:
        ValueError: the folder holds no store, one of another format, or a damaged one.
    """
    return EncodedStore(Path(folder), read_manifest(Path(folder)))


def changed_files(store: EncodedStore) -> list[str]:
    """Data files that are not what the store was made from: of another size, or of another time and
    other content. One that is not there, or cannot be read, is none: a store needs it no more."""
    changed = []
    for path, (num_bytes, time_ns, sha256) in store.about.files.items():
        try:
            found = regular_stat(path)
            if found.st_size != num_bytes or (
                found.st_mtime_ns != time_ns and file_sha256(path) != sha256
            ):
                changed.append(path)
        except NotRegularError:
            changed.append(path)
        except (OSError, ValueError):  # a name that no file can have
            continue
    return changed


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Of a regular file's content, as long as it is when it is opened.

    Raises:
        ValueError: it is no regular file.
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        left = os.fstat(file.fileno()).st_size
        while block := file.read(min(left, 1 << 20)):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()
