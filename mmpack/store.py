"""EncodedSamples on disk: an Arrow table through `datasets`, memory-mapped.

A store is a folder: `samples/` is a data set `datasets.load_from_disk` reads, `mmpack.json` holds
the `VisionSpec` and what the store was made from. Image files stay where they are; a row holds their
paths, and the bytes of images that are in no file. The only file that imports `datasets`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from mmpack import images
from mmpack.types import EncodedSample, ImageRef
from mmpack.vision import VisionSpec

FORMAT = 2
_CHUNK = 1000
_FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        "grid_thw": datasets.List(datasets.Value("int32")),  # flat, three an image
        "images": datasets.List(datasets.Value("string")),
        "image_bytes": datasets.List(datasets.Value("large_binary")),  # null: in its file
        "source": datasets.Value("string"),
        "row": datasets.Value("int64"),
        "num_tokens": datasets.Value("int64"),
        "num_patches": datasets.Value("int64"),
        "num_supervised": datasets.Value("int64"),
    }
)


class EncodedStore(Sequence[EncodedSample]):
    """A store opened for reading; rows are read from disk when they are asked for.

    Attributes:
        vision: the spec of all samples.
        num_tokens, num_patches, num_supervised: (N,) int64, known without reading a sample.
        about: what `write_store` was told.
    """

    def __init__(self, rows: datasets.Dataset, vision: VisionSpec, about: dict[str, Any]) -> None:
        self._rows = rows.with_format("arrow")
        self.vision = vision
        self.about = about
        self.num_tokens = self._column("num_tokens")
        self.num_patches = self._column("num_patches")
        self.num_supervised = self._column("num_supervised")

    @property
    def sources(self) -> np.ndarray:
        """(N,) files the samples come from."""
        return self._column("source")

    def grids(self) -> tuple[np.ndarray, np.ndarray]:
        """Of all images: grid_thw (I, 3), and offsets (N + 1,): images of sample n are
        `offsets[n] : offsets[n + 1]`."""
        rows = self._rows.select_columns("grid_thw")[:]["grid_thw"]
        values = [chunk.flatten().to_numpy() for chunk in rows.chunks]
        lengths = [chunk.value_lengths().to_numpy() for chunk in rows.chunks]
        return np.concatenate(values).reshape(-1, 3), np.cumsum([0, *np.concatenate(lengths)]) // 3

    def _column(self, name: str) -> np.ndarray:
        return self._rows.select_columns(name)[:][name].to_numpy()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> EncodedSample:  # type: ignore[override]
        row = self._rows[int(number)]
        return EncodedSample(
            input_ids=row["input_ids"][0].values.to_numpy(),
            labels=row["labels"][0].values.to_numpy(),
            grid_thw=row["grid_thw"][0].values.to_numpy().reshape(-1, 3),
            images=tuple(map(ImageRef, row["images"][0].as_py(), row["image_bytes"][0].as_py())),
            vision=self.vision,
            source=row["source"][0].as_py(),
            row=row["row"][0].as_py(),
        )


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
    folder = Path(folder)
    if (folder / "mmpack.json").exists():
        raise ValueError(f"{folder} holds a store already")
    chunks = [_table(chunk) for chunk in _chunks(samples)]
    if not chunks:
        raise ValueError("there are no samples to store: no row of the data was usable")
    rows = datasets.concatenate_datasets(chunks)
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        rows.save_to_disk(folder / "samples")
    finally:
        if shown:
            datasets.enable_progress_bars()
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
    rows = datasets.load_from_disk(str(folder / "samples"))
    return EncodedStore(rows, VisionSpec(**vision), saved["about"])


def _chunks(samples: Iterable[EncodedSample]) -> Iterator[list[EncodedSample]]:
    remaining = iter(samples)
    while chunk := list(islice(remaining, _CHUNK)):
        yield chunk


def _table(samples: Sequence[EncodedSample]) -> datasets.Dataset:
    columns = {
        "input_ids": [sample.input_ids for sample in samples],
        "labels": [sample.labels for sample in samples],
        "grid_thw": [sample.grid_thw.ravel() for sample in samples],
        "images": [[image.path for image in sample.images] for sample in samples],
        "image_bytes": [[_bytes(image) for image in sample.images] for sample in samples],
        "source": [sample.source for sample in samples],
        "row": [sample.row for sample in samples],
        "num_tokens": [sample.num_tokens for sample in samples],
        "num_patches": [sample.num_patches for sample in samples],
        "num_supervised": [sample.num_supervised for sample in samples],
    }
    return datasets.Dataset.from_dict(columns, features=_FEATURES)


def _bytes(image: ImageRef) -> bytes | None:
    return None if image.data is None else images.encoded_bytes(image)
