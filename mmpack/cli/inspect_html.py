"""`mmpack inspect --html`: packs on one self-contained HTML page.

Text from rows is data: it is embedded as JSON that cannot close its element, and the script creates text nodes
from it. The page's security policy allows only this script and style sheet, by hash, and embedded images. Images
are decoded and re-encoded as thumbnails.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmpack.cli.inspect import (
    Medium,
    PackView,
    Span,
    frames,
    size_in_patches,
    span_text,
    view_pack,
)
from mmpack.cli.terminal import one_line
from mmpack.cli.token_text import TokenText
from mmpack.data import images, videos
from mmpack.errors import counted
from mmpack.packing.dataset import PackedDataset
from mmpack.types import ImageRef

_PACKS = 10  # on a page, by default
_SIDE = 192  # maximum pixels of a thumbnail's side: 6 kB for a photograph
# Per page: 15 MB with English text and images, 35 MB with Chinese.
_MOST_CHARACTERS, _MOST_IMAGE_BYTES = 4_000_000, 8_000_000
_SPAN = 50  # characters per span besides its text
_HERE = Path(__file__)
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name}: packs</title>
<style>{style}</style>
</head>
<body>
<noscript>The packs are drawn by this page's script; without it, mmpack inspect prints the same.</noscript>
<script type="application/json" id="packs">{packs}</script>
<script>{script}</script>
</body>
</html>
"""


@dataclass
class Page:
    """The packs on a page, and what was left out.

    Attributes:
        packs: each as JSON. numbers: their numbers.
        num_media: images and videos shown.
        num_unread, num_left: images and videos that could not be read, and those that did not fit.
        num_cut: characters that did not fit.
        characters, image_bytes: remaining room.
    """

    packs: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    num_media: int = 0
    num_unread: int = 0
    num_left: int = 0
    num_cut: int = 0
    characters: int = _MOST_CHARACTERS
    image_bytes: int = _MOST_IMAGE_BYTES

    def add(self, view: PackView, decode: TokenText | None) -> None:
        """Add a pack to the page, with as much text and as many images as fit."""
        data = {
            "number": view.number,
            "capacity": view.capacity,
            "tokens": view.pack.num_tokens,
            "supervised": len(view.pack.supervised_index),
            "media": [self._medium(view, medium) for medium in view.media],
            "segments": [self._segment(view, n, decode) for n in range(len(view.samples))],
        }
        self.packs.append(_json(data))
        self.numbers.append(view.number)

    @property
    def is_full(self) -> bool:
        """Whether no further pack fits."""
        return self.characters <= 0 or self.image_bytes <= 0

    def problems(self) -> list[str]:
        """What the page leaves out, one line each."""
        limits = f"a page holds {_MOST_CHARACTERS:,} characters and {_MOST_IMAGE_BYTES:,} bytes of images"
        problems = {
            f"{self.num_unread:,} of the images and videos cannot be read; the page says why": self.num_unread,
            f"{self.num_left:,} of the images and videos did not fit: {limits}": self.num_left,
            f"{counted(self.num_cut, 'character')} of text did not fit: {limits}": self.num_cut,
        }
        return [problem for problem, number in problems.items() if number]

    def _medium(self, view: PackView, medium: Medium) -> dict[str, Any]:
        num_frames, rows, columns = medium.grid_thw
        height, width = (n * view.pack.vision.patch_size for n in (rows, columns))
        shrink = min(1, _SIDE / max(height, width))
        return {
            "name": medium.name,
            "video": not isinstance(medium.ref, ImageRef),
            "segment": medium.segment,
            "frames": num_frames,
            "patches": rows * columns,  # of a frame
            "size": f"{size_in_patches(medium)} patches, {width:,} x {height:,} pixels",
            "width": max(1, round(width * shrink)),  # of the thumbnail
            "height": max(1, round(height * shrink)),
            "tokens": view.num_tokens(medium),
            "file": one_line(medium.ref.short_name),
            **self._thumbnail(view, medium),
        }

    def _thumbnail(self, view: PackView, medium: Medium) -> dict[str, str]:
        if self.image_bytes <= 0:
            self.num_left += 1
            return {"why": f"did not fit: a page holds {_MOST_IMAGE_BYTES:,} bytes of images"}
        vision, ref = view.pack.vision, medium.ref
        try:
            if isinstance(ref, ImageRef):
                data = images.thumbnail(frames(medium, vision, view.folders)[0], _SIDE)
            else:
                data = videos.thumbnail(ref, vision, _SIDE, view.folders)
        except ValueError as error:
            self.num_unread += 1
            return {"why": one_line(error)[:300]}
        self.num_media += 1
        self.image_bytes -= len(data)
        return {"jpeg": base64.b64encode(data).decode()}

    def _segment(self, view: PackView, segment: int, decode: TokenText | None) -> dict[str, Any]:
        sample, (begin, end) = view.samples[segment], view.bounds(segment)
        return {
            "row": sample.row,
            "source": one_line(sample.source),
            "begin": begin,
            "end": end,
            "supervised": view.num_supervised(segment),
            "spans": [self._span(view, span, decode) for span in view.spans_of(segment)],
        }

    def _span(self, view: PackView, span: Span, decode: TokenText | None) -> dict[str, Any]:
        self.characters -= _SPAN
        what: dict[str, Any] = {"begin": span.begin, "end": span.end}
        if span.medium >= 0:
            return what | {"medium": span.medium, "frame": span.first_frame}
        written = span_text(view, span, decode) + (" " if decode is None else "")
        shown = written[: max(self.characters, 0)]
        self.characters -= len(shown)
        cut = len(written) - len(shown)
        self.num_cut += cut
        return what | {"text": shown, "supervised": span.is_supervised, "cut": cut}


def write_page(
    dataset: PackedDataset,
    packs: range | None,
    decode: TokenText | None,
    path: str,
    *,
    name: str,
    segment: int | None = None,
) -> dict[str, Any]:
    """Write a page with packs of a packed data set, as many as fit.

    Args:
        packs: which packs; None: the first 10.
        decode: ids to text; None: show ids.
        name: the data set's name, for the title.
        segment: segment of the first pack to scroll to; None: the top.

    Returns:
        `packs` on the page, `images` shown, its `bytes`, the `next` packs for `--pack` (None after the last) and
        `problems`, one line each.

    Raises:
        ValueError: there is no such pack.
    """
    num_packs = dataset.plan.num_packs
    asked = range(min(_PACKS, num_packs)) if packs is None else packs
    view_pack(dataset, asked[-1])  # fail before the work
    page = Page()
    for number in asked:
        if page.is_full:
            break
        page.add(view_pack(dataset, number), decode)
    last = page.numbers[-1]
    problems = page.problems()
    if last < asked[-1]:
        rest = counted(asked[-1] - last, "pack")
        problems.append(f"{rest} of --pack {asked[0]}-{asked[-1]} did not fit")
    end = min(last + max(len(page.numbers), 2), num_packs - 1)
    following = None if last + 1 == num_packs else f"{last + 1}-{end}"
    about = {"packs": num_packs, "next": following, "segment": segment, "problems": problems}
    written = _html(name, about, page.packs)
    Path(path).write_text(written, encoding="ascii")
    return {
        "packs": page.numbers,
        "images": page.num_media,
        "bytes": len(written),
        "next": following,
        "problems": problems,
    }


def _html(name: str, about: dict[str, Any], packs: Iterable[str]) -> str:
    style, script = (
        _HERE.with_name(f"inspect_page.{kind}").read_text("ascii") for kind in ("css", "js")
    )
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    title = html.escape(one_line(name)).encode("ascii", "xmlcharrefreplace").decode()
    data = f'{{"name": {_json(one_line(name))}, "about": {_json(about)}, "packs": [{", ".join(packs)}]}}'
    return _PAGE.format(policy=policy, name=title, style=style, script=script, packs=data)


def _json(data: Any) -> str:
    """JSON in ASCII without HTML's special characters; U+2028 and U+2029 are escaped, too."""
    text = json.dumps(data)
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
