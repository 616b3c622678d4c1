"""`mmpack.json`, a store's manifest: the `VisionSpec` of its samples and what they were made from.

The dataclasses here define the format: their fields are the file's fields, their types its schema. A change to
them must increase `FORMAT`; a store in another format must be packed again.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from mmpack.data.limits import MAX_COUNT
from mmpack.store.records import (
    check_record,
    damaged,
    from_record,
    read_json,
    schema_of,
    write_record,
)
from mmpack.video_spec import VideoSpec
from mmpack.vision_spec import VisionSpec

FORMAT = 13
_POSITIVE, _ID, _COUNT = range(1, 1 << 31), range(1 << 31), range(MAX_COUNT + 1)
_CAPACITY = range(1, 1 << 63)


@dataclass(frozen=True, kw_only=True)
class Planning:
    """How samples were packed: the options of `mmpack pack` with these names."""

    capacity: Annotated[int, _CAPACITY]
    patch_capacity: Annotated[int, _CAPACITY] | None = None
    max_image_share: float | None = None
    on_overflow: str = "error"
    plan_seed: Annotated[int, range(1 << 64)] = 0
    group_images: bool = False
    config: str | None = None
    frozen: tuple[str, ...] = ()
    val_size: float | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """What `mmpack merge` needs to know about part `number` (from 1) `of` a store's parts.

    Attributes:
        max_bad: the share of rows that may be left out.
        chunks: for each chunk of rows: (number of rows, number of bad rows, whether it has samples). Appended to
            while the part is written.
    """

    number: Annotated[int, range(1, 1_000_000)]
    of: Annotated[int, range(1, 1_000_000)]
    max_bad: float
    chunks: list[tuple[Annotated[int, _COUNT], Annotated[int, _COUNT], bool]] = field(
        default_factory=list
    )

    def __post_init__(self) -> None:
        if self.number > self.of:
            raise ValueError(f"there is no part {self.number} of {self.of}")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@dataclass(frozen=True, kw_only=True)
class About:
    """What a store was made from, and how. All fields are optional in a store written from Python.

    Attributes:
        begun: `time.time_ns()` when reading began; images that changed later make the store out of date.
        files: data files by path: (bytes, modification time in ns, SHA-256); by URL: (bytes, 0, what identifies
            the object).
        made_from: everything that the samples depend on, see `mmpack.store.build.made_from`.
        media_folders: folders that images and videos must be in, and URLs of roots; None: any folder.
        tokenizer: the tokenizer's folder, or `hf:owner/name@commit`.
        planning: how the samples were packed; None: unknown.
        part: which part of a store this is; None: the whole store.
        limits: files of a `dataset_info.json` entry, joined by "/" -> (num_samples, max_samples) of rows that are
            planned; 0: no limit.
    """

    begun: int = 0
    files: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    made_from: dict[str, str] = field(default_factory=dict)
    media_folders: tuple[str, ...] | None = None
    tokenizer: str | None = None
    planning: Planning | None = None
    part: Part | None = None
    limits: dict[str, tuple[Annotated[int, _COUNT], Annotated[int, _COUNT]]] = field(
        default_factory=dict
    )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `mmpack.json`.

    Attributes:
        checksum: CRC-32 of `samples.arrow`.
        contents: CRC-32 of the rows' checksums, in order.
        media_bytes, media_checksum: length and CRC-32 of `media.bin`; length 0: there is no such file.
        id_range: the smallest and the largest token id, including supervised labels; None: no samples.
    """

    format: int = FORMAT
    vision: VisionSpec
    about: About
    checksum: Annotated[int, range(1 << 32)]
    contents: Annotated[int, range(1 << 32)]
    media_bytes: Annotated[int, range(1 << 63)]
    media_checksum: Annotated[int, range(1 << 32)]
    id_range: tuple[int, int] | None


# Narrower than the specs' types; the specs themselves check their other fields.
_VIDEO = schema_of(VideoSpec) | dict.fromkeys(("min_frames", "max_frames"), _POSITIVE)
_VISION = schema_of(VisionSpec) | {
    **dict.fromkeys(("patch_size", "merge_size", "temporal_patch_size"), _POSITIVE),
    **dict.fromkeys(("image_token_id", "video_token_id"), _ID),
    **dict.fromkeys(("vision_start_token_id", "vision_end_token_id"), _ID),
    "video": (None, _VIDEO),
}
_SCHEMA: dict[str, Any] = schema_of(Manifest) | {"vision": _VISION}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `mmpack.json`."""
    write_record(folder / "mmpack.json", asdict(manifest))


def packed_split(word: str | os.PathLike[str]) -> tuple[str, Literal["train", "val"]] | None:
    """(folder, split) of a folder that `mmpack pack` wrote, given as FOLDER, or as FOLDER:val for its rows held
    out; None: it is none."""
    word = os.fspath(word)
    if (Path(word) / "mmpack.json").exists():
        return word, "train"
    folder, mark, split = word.rpartition(":")
    if mark and split == "val" and (Path(folder) / "mmpack.json").exists():
        return folder, "val"
    return None


def read_manifest(folder: Path) -> Manifest:
    """Read and check `mmpack.json`.

    Raises:
        ValueError: it is missing, in another format, damaged, or does not fit the schema.
    """
    path = folder / "mmpack.json"
    try:
        saved = read_json(path)
    except (OSError, ValueError) as error:
        reason = "" if isinstance(error, FileNotFoundError) else f" ({error})"
        if not folder.exists():
            reason = " (there is no such folder)"
        raise ValueError(
            f"{folder} has no finished store{reason}; make one with mmpack pack"
        ) from None
    if not isinstance(saved, dict) or "format" not in saved:
        raise ValueError(f"{path} was not made by mmpack; make a store with mmpack pack")
    if saved["format"] != FORMAT:
        raise ValueError(
            f"{folder} has store format {saved['format']!a:.20}, not {FORMAT}; pack again: "
            f"mmpack pack ... --out {shlex.quote(str(folder))} --overwrite, with the same options"
        )
    saved = check_record(path, saved, _SCHEMA)
    try:
        manifest: Manifest = from_record(Manifest, saved)
        spec = manifest.vision
        if not len(spec.image_mean) == len(spec.image_std) > 0 or 0 in spec.image_std:
            raise ValueError("image_mean and image_std do not match, or image_std has a zero")
    except ValueError as error:
        raise damaged(path, error) from None
    return manifest
