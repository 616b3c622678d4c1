"""A `Pack` as HTML for notebooks: lengths, counts and thumbnails, without scripts and style sheets.

Colors are readable on light and dark backgrounds, because a notebook's theme is unknown.
"""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from mmpack.errors import counted
from mmpack.types import IGNORE, Pack, PackPlan
from mmpack.vision_spec import VisionSpec

_MOST_SEGMENTS, _MOST_PICTURES = 100, 12  # 0.5 MB at most
_SIDE = 96  # pixels of a picture, at most
_KINDS = {"supervised text": "#2e9e5b", "other text": "#909090", "images and videos": "#4a86c5"}
_CELL = 'style="padding:.15em .8em .15em 0;text-align:right"'


def counts(pack: Pack) -> str:
    """The contents of a pack in one line."""
    videos = len(pack.grid_thw) - pack.num_images
    distinct = len(pack.vision_grid_thw)
    parts = [
        f"{counted(pack.num_tokens, 'token')} in {counted(pack.num_segments, 'segment')}",
        f"{len(pack.supervised_index):,} supervised",
        counted(pack.num_images, "image"),
        *([counted(videos, "video grid")] if videos else []),
        *([f"{distinct:,} of them distinct"] if distinct < len(pack.grid_thw) else []),
    ]
    return ", ".join(parts)


def plan_counts(plan: PackPlan) -> str:
    """What a plan holds, in one line."""
    parts = [
        f"{counted(plan.num_packs, 'pack')} of {plan.capacity:,} tokens",
        f"{plan.utilization:.0%}".replace("%", " % full"),
        counted(len(plan.num_tokens), "sample"),
        *([f"{len(plan.unused):,} not in this plan"] if len(plan.unused) else []),
        *([f"{plan.num_dropped:,} dropped"] if plan.num_dropped else []),
        *([f"{plan.num_truncated:,} truncated"] if plan.num_truncated else []),
    ]
    return ", ".join(parts)


def pack_html(pack: Pack) -> str:
    """A pack as an HTML table with one row per segment, and thumbnails of its images if it has pixels, limited in
    number and size. Text is not shown, because a pack has no tokenizer."""
    rows = _rows(pack)
    shown, more = rows[:_MOST_SEGMENTS], len(rows) - _MOST_SEGMENTS
    longest = max((tokens for tokens, *_ in rows), default=1)
    has_videos = len(pack.grid_thw) > pack.num_images
    media = "images and video grids" if has_videos else "images"
    names = ("segment", "tokens", "supervised", "vision tokens", media, "")
    lines = ["".join(f"<th {_CELL}>{name}</th>" for name in names)]
    for number, (tokens, supervised, placeholders, grids) in enumerate(shown):
        numbers = (number, tokens, supervised, placeholders, grids)
        cells = "".join(f"<td {_CELL}>{value:,}</td>" for value in numbers)
        parts = (supervised, tokens - supervised - placeholders, placeholders)
        lines.append(f'{cells}<td style="text-align:left">{_bar(parts, 16 / longest)}</td>')
    table = "".join(f"<tr>{line}</tr>" for line in lines)
    legend = " ".join(f"{_box(color, 0.8)} {name} &nbsp;" for name, color in _KINDS.items())
    return (
        f'<div style="max-width:100%;overflow-x:auto"><div><b>Pack</b>: {counts(pack)}</div>'
        f'<div style="margin:.4em 0;font-size:.9em">{legend}</div>'
        f'<table style="border-collapse:collapse;white-space:nowrap;font:inherit">{table}</table>'
        + (f"<div>and {counted(more, 'more segment')}</div>" if more > 0 else "")
        + f"{_pictures(pack)}</div>"
    )


def frames_of(
    patches: NDArray[np.uint8], grid_thw: tuple[int, int, int], vision: VisionSpec
) -> NDArray[np.uint8]:
    """Reassemble patches into frames: (t * h * w, C * frames * p * p) in merge order -> (t, height, width, C)
    uint8, the first frame of each temporal patch."""
    (t, h, w), p, m = grid_thw, vision.patch_size, vision.merge_size
    channels = len(vision.image_mean)
    first = patches.reshape(t * h * w, channels, -1, p * p)[:, :, 0]
    blocks = first.reshape(t, h // m, w // m, m, m, channels, p, p)
    pixels: NDArray[np.uint8] = blocks.transpose(0, 1, 3, 6, 2, 4, 7, 5)
    return pixels.reshape(t, h * p, w * p, channels)


def _rows(pack: Pack) -> list[tuple[int, int, int, int]]:
    """(tokens, supervised tokens, placeholders, grids) of each segment."""
    size = pack.num_segments
    supervised = np.bincount(pack.segment_ids[pack.labels != IGNORE], minlength=size)
    placeholders = np.bincount(pack.segment_ids[pack.feature_token], minlength=size)
    grids = np.bincount(pack.segment_ids[pack.grid_token], minlength=size)
    columns = (np.diff(pack.cu_seqlens), supervised, placeholders, grids)
    return list(zip(*(column.tolist() for column in columns)))


def _bar(parts: tuple[int, ...], em_per_token: float) -> str:
    return "".join(_box(color, n * em_per_token) for n, color in zip(parts, _KINDS.values()) if n)


def _box(color: str, em: float) -> str:
    style = f"display:inline-block;height:.7em;width:{em:.2f}em;background:{color}"
    return f'<span style="{style}"></span>'


def _pictures(pack: Pack) -> str:
    """The first distinct images, then the first frames of distinct videos."""
    all_grids, num_images = pack.vision_grid_thw, pack.num_distinct_images
    sources = (
        (pack.pixels, all_grids[:num_images], "image"),
        (pack.video_pixels, all_grids[num_images:], "video grid"),
    )
    pictures: list[str] = []
    for patches, grids, kind in sources:
        if patches is None:
            continue
        end = 0
        for number, (t, h, w) in enumerate(grids[: _MOST_PICTURES - len(pictures)].tolist()):
            begin, end = end, end + t * h * w
            frame = patches[begin : begin + h * w]
            small = _shrunk(frames_of(frame, (1, h, w), pack.vision)[0])
            data = base64.b64encode(_png(small)).decode()
            size = f"{kind} {number}: {w * pack.vision.patch_size} x {h * pack.vision.patch_size}"
            style = "display:inline-block;margin:.5em .8em 0 0;vertical-align:top;font-size:.8em"
            image = f'<img src="data:image/png;base64,{data}" alt="{size} pixels"'
            image += ' style="display:block;margin:0 0 .2em">'
            pictures.append(f'<span style="{style}">{image}{size}</span>')
    if not len(all_grids):
        return ""
    left = len(all_grids) - len(pictures)
    more = f"<div>{counted(left, 'picture')} not shown</div>" if left else ""
    return f"<div>{''.join(pictures)}</div>{more}"


def _shrunk(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Downscale by averaging square blocks, so that no side exceeds `_SIDE`."""
    height, width, channels = pixels.shape
    step = -(-max(height, width) // _SIDE)
    rows, columns = max(height // step, 1), max(width // step, 1)
    kept = pixels[: rows * step, : columns * step]
    blocks = kept.reshape(rows, min(step, height), columns, min(step, width), channels)
    small: NDArray[np.uint8] = blocks.mean(axis=(1, 3)).round().astype(np.uint8)
    return small


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode (height, width, 3) as PNG (W3C's specification, sections 5 and 9), with the filter "up" on all
    rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    height, width, _ = pixels.shape
    differences = np.diff(pixels, axis=0, prepend=np.uint8(0)).reshape(height, -1)
    rows = np.pad(differences, ((0, 0), (1, 0)), constant_values=2)  # filter type "up"
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)
