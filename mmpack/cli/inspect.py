"""`mmpack inspect`: shows one pack as training gets it: segments, text, images, supervision.

Everything is taken from the assembled `Pack`, not from the rows, so this shows what the model gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpack.cli.tables import aligned, supervised_cell
from mmpack.cli.terminal import one_line, printable
from mmpack.cli.token_text import TokenText
from mmpack.data import images, videos
from mmpack.data.encoder import Encoder
from mmpack.data.media_paths import MediaFolders
from mmpack.data.model_folder import local_path
from mmpack.data.processor_folder import load_tokenizer
from mmpack.errors import counted
from mmpack.pack_html import frames_of
from mmpack.packing.assemble import assemble
from mmpack.packing.dataset import PackedDataset
from mmpack.packing.split_documents import unsplit
from mmpack.types import IGNORE, EncodedSample, ImageRef, Media, Pack
from mmpack.vision_spec import VisionSpec

_SUPERVISED, _FOLDED, _PLAIN = (
    "\x1b[30;42m",
    "\x1b[36m",
    "\x1b[0m",
)  # black on green, cyan, reset


@dataclass(frozen=True)
class Medium:
    """An image or a video in a pack."""

    name: str  # such as "image 1", counted within its segment
    segment: int
    ref: Media
    grids: NDArray[np.int64]  # (G, 3); for a video with timestamps, one per temporal patch
    is_shared: bool  # the pack shows it before, and encodes it once

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        """(t, h, w) in patches, over all grids."""
        return int(self.grids[:, 0].sum()), int(self.grids[0, 1]), int(self.grids[0, 2])


@dataclass(frozen=True)
class Span:
    """Tokens `begin` to `end` of a pack: supervised text, unsupervised text, or placeholders."""

    begin: int
    end: int
    segment: int
    is_supervised: bool
    medium: int  # index of the placeholders' medium; -1: text
    first_frame: int  # the medium's temporal patch at `begin`


@dataclass(frozen=True)
class PackView:
    """A pack with its media and spans."""

    number: int
    num_packs: int
    capacity: int
    pack: Pack
    samples: Sequence[EncodedSample]
    media: list[Medium]
    spans: list[Span]
    folders: MediaFolders | None  # where image and video files must be

    def bounds(self, segment: int) -> tuple[int, int]:
        """First and last (excluded) token of a segment."""
        begin, end = self.pack.cu_seqlens[segment : segment + 2].tolist()
        return begin, end

    def num_supervised(self, segment: int) -> int:
        """The number of supervised tokens in a segment."""
        begin, end = self.bounds(segment)
        return int((self.pack.labels[begin:end] != IGNORE).sum())

    def spans_of(self, segment: int) -> list[Span]:
        return [span for span in self.spans if span.segment == segment]

    def media_of(self, segment: int) -> list[Medium]:
        return [medium for medium in self.media if medium.segment == segment]

    def num_tokens(self, medium: Medium) -> int:
        """The number of placeholders of an image or video."""
        return int(self.pack.vision.num_features(medium.grids).sum())


def view_pack(dataset: PackedDataset, number: int) -> PackView:
    """View pack `number` of a packed data set without opening images.

    Raises:
        ValueError: there is no such pack.
    """
    num_packs = dataset.plan.num_packs
    if not 0 <= number < num_packs:
        raise ValueError(f"there is no pack {number}; packs are 0 to {num_packs - 1:,}")
    samples = dataset[number]
    pack = assemble(samples, pixels=False)
    media, medium_of, first_frame = _media(samples, pack)
    spans = _spans(pack, medium_of, first_frame)
    named = dataset.media_folders
    folders = None if named is None else MediaFolders(named)
    return PackView(number, num_packs, dataset.capacity, pack, samples, media, spans, folders)


def pack_range(packs: str) -> range:
    """The packs that `--pack` names: K, or K-L including L.

    Raises:
        ValueError: it is malformed or empty.
    """
    first, dash, last = packs.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise ValueError(f"--pack takes K, or K-L with --html, got {packs!r}")
    found = range(int(first), int(last or first) + 1)
    if not found:
        raise ValueError(f"--pack {packs} is empty; put the smaller number first")
    return found


def find_row(dataset: PackedDataset, row: str) -> list[tuple[int, int]]:
    """(pack, segment) of a row, several if it is a document in pieces. `row` is a number or FILE:NUMBER.

    Raises:
        ValueError: the row is in no pack, or several files have a row with this number.
    """
    file, _, number = row.rpartition(":")
    if not number.isdecimal():
        raise ValueError(f"--row takes N or FILE:N, got {row!r}")
    store, plan = unsplit(dataset.samples), dataset.plan
    rows, sources = store.rows, dataset.samples.sources  # type: ignore[attr-defined]
    if store is not dataset.samples:
        rows = rows[dataset.samples.sample_of]  # type: ignore[attr-defined]
    is_it = rows == int(number)
    if file:
        is_it &= sources == file
    names = sorted(set(sources[is_it]))
    if len(names) > 1:
        raise ValueError(
            f"row {number} is in {' and '.join(names)}; pass --row {names[0]}:{number}"
        )
    places = np.flatnonzero(is_it[plan.sample_index])
    if not len(places):
        raise ValueError(
            f"row {row} is in no pack; was it refused, dropped or held out (FOLDER:val) when this was packed?"
        )
    packs = np.searchsorted(plan.bin_offsets, places, side="right") - 1
    return list(zip(packs.tolist(), (places - plan.bin_offsets[packs]).tolist()))


def _media(
    samples: Sequence[EncodedSample], pack: Pack
) -> tuple[list[Medium], list[int], list[int]]:
    """A pack's media, images first like its grids; and for every grid, its medium and its first temporal patch in
    that medium."""
    media: list[Medium] = []
    medium_of: list[int] = []
    first_frame: list[int] = []
    for kind in ("image", "video"):
        for segment, sample in enumerate(samples):
            refs = [ref for ref in sample.media if isinstance(ref, ImageRef) == (kind == "image")]
            for place, ref in enumerate(refs, start=1):
                begin, count = len(medium_of), videos.num_grids(ref, pack.vision)
                grids = pack.grid_thw[begin : begin + count]
                shown, before = pack.vision_index[begin : begin + 1], pack.vision_index[:begin]
                first_frame += np.cumsum([0, *grids[:-1, 0]]).tolist()
                medium_of += [len(media)] * count
                is_shared = bool(np.isin(shown, before).any())
                media.append(Medium(f"{kind} {place}", segment, ref, grids, is_shared))
    if len(medium_of) != len(pack.grid_thw):
        raise ValueError(
            f"the pack has placeholders for {counted(len(pack.grid_thw), 'grid')}, but its rows have "
            f"{len(medium_of)}; pack again with --overwrite"
        )
    return media, medium_of, first_frame


def _spans(pack: Pack, medium_of: list[int], first_frame: list[int]) -> list[Span]:
    grid = np.full(len(pack.input_ids), -1)
    sizes = pack.vision.num_features(pack.grid_thw)
    for number, (first, size) in enumerate(zip(pack.grid_token, sizes)):
        grid[first : first + size] = number
    kinds = np.stack([pack.segment_ids, pack.labels != IGNORE, grid])
    starts = np.flatnonzero((np.diff(kinds, axis=1) != 0).any(axis=0)) + 1
    edges = [0, *starts.tolist(), len(pack.input_ids)]
    spans = []
    for begin, end in zip(edges, edges[1:]):
        segment, is_supervised, number = kinds[:, begin].tolist()
        medium, frame = (medium_of[number], first_frame[number]) if number >= 0 else (-1, 0)
        spans.append(Span(begin, end, segment, bool(is_supervised), medium, frame))
    return spans


def table(view: PackView, width: int | None = None) -> str:
    """A line per segment, and one for each further image or video. If that is wider than `width`, each image and
    video is on a line of its own."""
    tokens, supervised = len(view.pack.input_ids), len(view.pack.supervised_index)
    lines = [
        f"pack {view.number} of {view.num_packs:,}: {tokens:,} of {view.capacity:,} tokens "
        f"({tokens / view.capacity:.1%}), {counted(len(view.samples), 'segment')}, {supervised:,} supervised, "
        f"{len(view.media)} images and videos in {len(view.pack.feature_token):,} tokens",
        "",
    ]
    rows = [("segment", "row", "tokens", "of pack", "supervised", "images and videos")]
    for segment, sample in enumerate(view.samples):
        begin, end = view.bounds(segment)
        media = [_described(view, medium) for medium in view.media_of(segment)]
        rows.append(
            (
                str(segment),
                f"{sample.row} of {one_line(sample.source)}",
                f"{end - begin:,}",
                f"{(end - begin) / tokens:.1%}",
                supervised_cell(view.num_supervised(segment), sample),
                media[0] if media else "",
            )
        )
        rows += [("", "", "", "", "", other) for other in media[1:]]
    wide = [line.rstrip() for line in aligned(rows, left=(1, 5))]
    if width is None or max(map(len, wide)) <= width:
        return "\n".join(lines + wide)
    narrow = iter(aligned([row[:5] for row in rows if row[0]], left=(1,)))
    for row in rows:
        lines += [next(narrow)] if row[0] else []
        lines += [f"    {row[5]}"] if row[5] and row is not rows[0] else []
    return "\n".join(lines)


def _described(view: PackView, medium: Medium) -> str:
    _, height, width = medium.grid_thw
    p = view.pack.vision.patch_size
    return (
        f"{medium.name}: {size_in_patches(medium)} patches of {p} ({width * p} x {height * p} pixels), "
        f"{view.num_tokens(medium):,} tokens, {one_line(medium.ref.short_name)}"
        f"{', shared' if medium.is_shared else ''}"
    )


def size_in_patches(medium: Medium) -> str:
    """Such as "24x32"; for a video with temporal patches, such as "4x24x32"."""
    is_image = isinstance(medium.ref, ImageRef)
    return "x".join(map(str, medium.grid_thw[1:] if is_image else medium.grid_thw))


def text(view: PackView, segment: int, decode: TokenText | None, color: bool) -> str:
    """A segment's text, with an image's placeholders as one word. Supervised tokens are green or, without color,
    between [[ and ]].

    Args:
        decode: ids to text; None: show ids.
    """
    parts = []
    for span in view.spans_of(segment):
        if span.medium >= 0:
            folded = _folded(view, span)
            parts.append(f"{_FOLDED}{folded}{_PLAIN}" if color else folded)
            continue
        written = span_text(view, span, decode)
        if decode is None:
            written += " "
        if span.is_supervised and color:  # line by line, with visible line ends
            lines = written.replace("\n", "\u21b5\n").split("\n")
            written = "\n".join(f"{_SUPERVISED}{line}{_PLAIN}" if line else "" for line in lines)
        elif span.is_supervised:
            written = f"[[{written}]]"
        parts.append(written)
    sample = view.samples[segment]
    begin, end = view.bounds(segment)
    place = f"row {sample.row} of {one_line(sample.source)}, tokens {begin:,} to {end:,}"
    return f"--- segment {segment}: {place}\n{''.join(parts)}"


def span_text(view: PackView, span: Span, decode: TokenText | None) -> str:
    """A span's text with control and format characters escaped and spelled out special tokens dotted, or its
    ids."""
    ids = view.pack.input_ids[span.begin : span.end].tolist()
    return " ".join(map(str, ids)) if decode is None else printable(decode.shown(ids))


def _folded(view: PackView, span: Span) -> str:
    medium = view.media[span.medium]
    if len(medium.grids) == 1:
        return (
            f"<{medium.name}: {size_in_patches(medium)} patches, {span.end - span.begin:,} tokens>"
        )
    frames, height, width = medium.grid_thw
    place = f"{medium.name}, part {span.first_frame + 1} of {frames}"
    return f"<{place}: {height}x{width} patches, {span.end - span.begin:,} tokens>"


def as_dict(view: PackView, decode: TokenText | None, chosen: Sequence[int]) -> dict[str, Any]:
    """The pack and its segments `chosen` for JSON; `begin`, `end` and those of `special` tokens are positions in
    the pack."""
    segments = []
    for segment in chosen:
        sample = view.samples[segment]
        begin, end = view.bounds(segment)
        spans: list[dict[str, Any]] = []
        for span in view.spans_of(segment):
            ids = view.pack.input_ids[span.begin : span.end].tolist()
            where = {"begin": span.begin, "end": span.end, "supervised": span.is_supervised}
            if span.medium >= 0:
                what: dict[str, Any] = {"medium": view.media[span.medium].name}
            else:
                what = {"ids": ids}
                if decode is not None:
                    special = [(span.begin + n, word) for n, word in decode.special(ids)]
                    what = {"text": decode(ids), "special": special}
            spans.append(where | what)
        media = [
            {
                "name": medium.name,
                "path": medium.ref.name,
                "grid_thw": medium.grid_thw,
                "tokens": view.num_tokens(medium),
                "shared": medium.is_shared,
            }
            for medium in view.media_of(segment)
        ]
        segments.append(
            {
                "segment": segment,
                "source": sample.source,
                "row": sample.row,
                "begin": begin,
                "end": end,
                "supervised": view.num_supervised(segment),
                "media": media,
                "spans": spans,
            }
        )
    return {
        "pack": view.number,
        "packs": view.num_packs,
        "capacity": view.capacity,
        "tokens": len(view.pack.input_ids),
        "supervised": len(view.pack.supervised_index),
        "segments": segments,
    }


def frames(
    medium: Medium, vision: VisionSpec, folders: MediaFolders | None = None
) -> NDArray[np.uint8]:
    """(t, height, width, C) uint8 pixels of an image or video as the model gets them: the first frame of each
    temporal patch.

    Raises:
        ValueError: it can no longer be decoded, or is outside of `folders`.
    """
    if isinstance(medium.ref, ImageRef):
        patches = images.load_patches(medium.ref, medium.grids[0], vision, folders=folders)
    else:
        patches = videos.load_patches(medium.ref, medium.grids, vision, folders=folders)
    return frames_of(patches, medium.grid_thw, vision)


def find_tokenizer(dataset: PackedDataset, name: str | None) -> tuple[TokenText | None, str]:
    """(ids to text, a note to the user), from the named tokenizer, else from the recorded one if it is on this
    machine: it is not downloaded."""
    about = unsplit(dataset.samples).about
    recorded = about.tokenizer
    if name is not None:
        tokenizer = load_tokenizer(local_path(name))
    elif recorded is None:
        return (
            None,
            "the store names no tokenizer; showing token ids, --tokenizer FOLDER shows text",
        )
    else:
        try:
            folder = local_path(recorded, download=False)
        except ValueError:
            gone = f"the tokenizer this was packed with is not at {recorded}; showing token ids"
            what = recorded if recorded.startswith("hf:") else "FOLDER"
            return None, f"{gone}, --tokenizer {what} shows text"
        tokenizer = load_tokenizer(folder)
    before = about.made_from.get("the tokenizer")  # None: `PackedDataset.save` does not know
    is_same = (
        before is None or before == Encoder(tokenizer, dataset.vision).settings()["the tokenizer"]
    )
    note = "" if is_same else f"{name or recorded} is not the tokenizer this was packed with"
    return TokenText(tokenizer), note
