"""Tar shards in WebDataset's convention -> rows, whose images and videos stay where they are.

A member's key is its name up to the first dot after the last slash; the rest, in lower case, is its extension.
Members of one key that follow one another are a sample: `key.json` is its row, `key.txt` its text, pictures and
videos are its images and videos (`0001.jpg`, or `0001.0.jpg` and `0001.1.jpg`).

A member that is no regular file, a name that leads out of the archive, and a key or an extension that comes twice
make a sample a bad row. A damaged archive ends its rows (`mmpack.data.tar_headers`).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mmpack.data.archives import open_archive
from mmpack.data.limits import MAX_ROW
from mmpack.data.path_forms import PICTURE_SUFFIXES, VIDEO_SUFFIXES, natural
from mmpack.data.remote_roots import DataPath, RemotePath
from mmpack.data.tar_headers import Archive, Entry, entries
from mmpack.errors import RowError, names
from mmpack.media_refs import ImageRef, TarMember
from mmpack.types import Message

SUFFIX = ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_MOST_MEMBERS = 10_000  # of a sample
_RECENT = 1 << 16  # keys that are not yet in the sorted array


@dataclass(frozen=True)
class TarSample:
    """What a tar file has of one key, beside its row.

    Attributes:
        place: where it begins, for errors.
        media: (extension, image or video as a member) of each picture and video, in order.
        text: its `.txt`; None: it has none.
        has_row: whether it has a `.json`.
        unread: extensions of other members, as `*.cls`.
    """

    place: str
    media: tuple[tuple[str, ImageRef], ...]
    text: str | None
    has_row: bool
    unread: tuple[str, ...]

    def content(
        self, row: Any, is_row: bool, are_documents: bool, unread: Callable[[Iterable[str]], None]
    ) -> Any:
        """The content of its row: the `.json`, or the `.txt` if there is no `.json` that is a row.

        Args:
            row: the content of its `.json`. is_row: whether it is a row.
            unread: called with members that are not read.

        Raises:
            RowError: it has only a text, and rows are conversations.
        """
        unread(self.unread)
        if self.text is None or (self.has_row and is_row):
            unread(["*.txt"] * (self.text is not None))
            return row
        if not (are_documents or is_row):
            raise RowError(
                "the sample has a text (.txt) and no conversation",
                "for captions and documents use --stage pretrain (stage='pretrain')",
            )
        unread(["*.json"] * self.has_row)
        images = self._of_kind("image")
        markers = "" if "<image>" in self.text else "<image>" * len(images)
        return {"text": markers + self.text, "images": images}

    def fill(self, values: dict[str, list[Any]], is_given: bool, are_documents: bool) -> None:
        """Put its images and videos into `values`, a list per kind, if the row names none of any kind.

        Args:
            is_given: whether the row's turns name any.

        Raises:
            RowError: it has a video, and rows are documents.
        """
        if not is_given and not any(values.values()):
            values.update({kind: self._of_kind(kind) for kind in values})
        if are_documents and values["video"]:
            raise RowError("the sample has a video", "remove it; documents can only have images")

    def unused(self, messages: Iterable[Message]) -> list[str]:
        """Its images and videos that messages do not have."""
        media = [part for one in messages for part in one.content if not isinstance(part, str)]
        files = [file for ref in media for file in (getattr(ref, "frames", ()) or (ref,))]
        used = {file.member for file in files}
        return [f"*.{extension}" for extension, ref in self.media if ref.member not in used]

    def named(self, value: Any, kind: str) -> Any:
        """An image or a video as a row has it, with names of members replaced by the members.

        Raises:
            RowError: the sample has no such member.
        """
        if isinstance(value, str) and not value.startswith("data:"):
            return self._find(value, kind)
        if isinstance(value, (list, tuple)):
            return [self.named(one, "image") for one in value]
        if isinstance(value, dict):
            if "frames" in value:
                return {**value, "frames": self.named(value["frames"], kind)}
            if value.get("path") is not None and value.get("bytes") is None:
                return self.named(value["path"], kind)
        return value

    def _of_kind(self, kind: str) -> list[ImageRef]:
        """Its images or videos in order: that of their numbers, if only the numbers of their extensions differ,
        else that of the archive."""
        found = [(extension, ref) for extension, ref in self.media if _kind(extension) == kind]
        if len({re.sub(r"[0-9]+", "", extension) for extension, _ in found}) == 1:
            found.sort(key=lambda one: natural(one[0]))
        return [ref for _, ref in found]

    def _find(self, name: str, kind: str) -> ImageRef:
        plain = name.removeprefix("./")
        for extension, ref in self.media:
            assert ref.member is not None
            if plain in (ref.member.name, os.path.basename(ref.member.name)) or (
                plain.lower() == extension
            ):
                return ref
        has = names([extension for extension, _ in self.media]) if self.media else "none"
        raise RowError(
            f"the row names the {kind} {name:.200}, which is not in its sample; images and videos there: {has}",
            "name a member by its extension, such as 0.jpg, or leave the names out: images are taken in order",
        )


class TarRow(NamedTuple):
    """A row of a tar file: its content, or why it cannot be used (`content` is then its key)."""

    content: Any
    error: RowError | None
    sample: TarSample | None


@dataclass
class _Found:
    """A sample that is being read."""

    key: str
    begin: int
    members: dict[str, Entry] = field(default_factory=dict)  # by extension
    error: RowError | None = None

    def add(self, extension: str, entry: Entry) -> None:
        if entry.flaw:
            self._refuse(f"the member {_shown(entry)} {entry.flaw}", "write it as a regular file")
        elif extension in self.members:
            first = _shown(self.members[extension])
            self._refuse(
                f"the member {_shown(entry)} has the key and extension of {first}", "rename one"
            )
        elif len(self.members) >= _MOST_MEMBERS:
            self._refuse(
                f"it has more than {_MOST_MEMBERS:,} members", "give each sample its own key"
            )
        else:
            self.members[extension] = entry

    def _refuse(self, error: str, advice: str) -> None:
        self.error = self.error or RowError(error, advice)


def tar_rows(path: DataPath, parse: Callable[[str], Any]) -> Iterator[TarRow]:
    """The samples of a tar file, in order; one of them is in memory at a time, and 8 to 20 bytes per key.

    Args:
        parse: makes the value of JSON.

    Raises:
        TornArchiveError: it is cut off or damaged.
        OSError: it cannot be read.
    """
    archive = open_archive(path.url if isinstance(path, RemotePath) else os.path.realpath(path))
    seen = _Keys()
    found: _Found | None = None
    keyless = 0
    for entry in entries(archive):
        match = _KEY.fullmatch(entry.name)
        if match is None and not entry.flaw:
            keyless += 1  # a name such as README or .hidden
            continue
        key, extension = match.groups() if match else (entry.name, "")
        if found is None or key != found.key:
            if found is not None:
                yield _row(archive, found, keyless, parse)
                keyless = 0
            found = _Found(key, entry.begin)
            if not seen.add(key):
                found.error = RowError(
                    f"the key {key:.200} comes again at byte {entry.begin:,}",
                    "members of a key must follow one another, and each sample needs a key of its own",
                )
        found.add(extension.lower(), entry)
    if found is not None:
        yield _row(archive, found, keyless, parse)


def rows_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of what rows are made of: names and positions of all members, and the bytes of `.json` and `.txt`.
    The bytes of images and videos are not read.

    Raises:
        ValueError: it is damaged, or not a regular file.
        OSError: it cannot be read.
    """
    archive = open_archive(os.path.realpath(path))
    digest = hashlib.sha256()
    for entry in entries(archive):
        digest.update(f"{tuple(entry)!a}".encode())
        if entry.name.lower().endswith((".json", ".txt")) and entry.length <= MAX_ROW:
            digest.update(archive.read_at(entry.offset, entry.length))
    return digest.hexdigest()


def _row(archive: Archive, found: _Found, keyless: int, parse: Callable[[str], Any]) -> TarRow:
    try:
        if found.error is not None:
            raise found.error
        media, unread = [], ["(no extension)"] * bool(keyless)
        for extension, entry in found.members.items():
            if _kind(extension):
                place = (entry.name, entry.offset, entry.length, entry.header, archive.size)
                ref = ImageRef(archive.path, member=TarMember(*place), version=archive.version)
                media.append((extension, ref))
            elif extension not in ("json", "txt"):
                unread.append(f"*.{extension}")
        text = _text(archive, found.members.get("txt"))
        json_text = _text(archive, found.members.get("json"))
        if text is None and json_text is None:
            raise RowError(
                f"it has no .json and no .txt, only {names(found.members)}",
                "add its row or its text",
            )
        text = None if text is None else text.removesuffix("\n").removesuffix("\r")
        first = next(iter(found.members.values()))
        sample = TarSample(_shown(first), tuple(media), text, json_text is not None, tuple(unread))
        if json_text is None:
            return TarRow({}, None, sample)
        try:
            return TarRow(parse(json_text), None, sample)
        except ValueError as error:
            json = _shown(found.members["json"])
            raise RowError(f"the member {json} is not JSON: {error}", "fix it") from None
    except RowError as error:
        bad = RowError(
            f"sample {found.key:.200} (byte {found.begin:,}): {error.error}", error.advice
        )
        return TarRow({"__key__": found.key[:1000]}, bad, None)


def _text(archive: Archive, entry: Entry | None) -> str | None:
    if entry is None:
        return None
    if entry.length > MAX_ROW:
        raise RowError(
            f"the member {_shown(entry)} has {entry.length:,} bytes, at most {MAX_ROW:,} are read",
            "shorten it",
        )
    data = archive.read_at(entry.offset, entry.length)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError(
            f"the member {_shown(entry)} is not UTF-8 (byte {error.start} of it)",
            "save it as UTF-8",
        ) from None


def _kind(extension: str) -> str:
    """ "image", "video", or "" for other members."""
    suffix = "." + extension.rpartition(".")[2]
    return "image" if suffix in PICTURE_SUFFIXES else "video" if suffix in VIDEO_SUFFIXES else ""


def _shown(entry: Entry) -> str:
    return f"{entry.name:.200} (byte {entry.begin:,})"


class _Keys:
    """The keys seen so far, by their hashes: of most of them, in a sorted array."""

    def __init__(self) -> None:
        self._recent = set[int]()
        self._sorted = np.empty(0, dtype=np.int64)

    def add(self, key: str) -> bool:
        """Whether a key is new."""
        digest = hash(key)
        place = int(self._sorted.searchsorted(digest))
        is_old = place < len(self._sorted) and self._sorted[place] == digest
        if is_old or digest in self._recent:
            return False
        self._recent.add(digest)
        if len(self._recent) > max(_RECENT, len(self._sorted) >> 3):
            recent = np.fromiter(self._recent, np.int64, len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, recent]))
            self._recent.clear()
        return True
