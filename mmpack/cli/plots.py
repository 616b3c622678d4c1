"""Draws PNG files of a data set, of its packs and of one pack; the only file that uses matplotlib.

A white background makes them readable on light and dark pages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmpack.cli.check import Summary
from mmpack.cli.inspect import Medium, PackView, Span, frames
from mmpack.cli.tables import SHOWN_SOURCES, balance_report
from mmpack.types import PackPlan

_SEGMENTS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")  # Paul Tol's bright
_LINES, _LINE_STEP = 8, 8  # maximum lines per pack; tokens per line are a multiple of the step
_BAND_IN, _LINE_IN, _SQUARE_IN = (
    10.0,
    1.0,
    3.3,
)  # inches: width and height of a line, attention's side
_LABEL, _BAND, _STRIP = (
    (0.02, 0.18),
    (0.2, 0.84),
    (0.87, 0.95),
)  # fractions of a line's height, from the top
_GLYPH_IN = 0.066  # width of a letter at font size 7.5
_INK, _FREE = "#222222", "#999999"


def check_picture(summary: Summary, path: str) -> None:
    """Draw lengths, images per row and utilization by capacity.

    Raises:
        ValueError: there is no usable row, or matplotlib is not installed.
    """
    if not summary.lengths:
        raise ValueError("there is no usable row to draw")
    unit = "tokens" if summary.has_tokens else "characters"
    lengths = np.array([length for length, _, _ in summary.lengths])
    figure = _figure((12, 3.6))
    from matplotlib.ticker import LogLocator, NullFormatter  # _figure says what to do without

    left, middle, right = figure.subplots(1, 3)

    left.hist(
        lengths, bins=np.geomspace(max(1, lengths.min()), lengths.max() + 1, 40), color="#4477aa"
    )
    left.set(xscale="log", xlabel=f"{unit} per row", ylabel="rows", title="lengths")
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter("{x:,.0f}")
    left.xaxis.set_minor_formatter(NullFormatter())
    left.tick_params(axis="x", rotation=30)
    counts = sorted(summary.images_per_row.items())
    middle.bar([str(n) for n, _ in counts], [count for _, count in counts], color="#228833")
    middle.set(xlabel="images per row", ylabel="rows", title="images")
    if summary.has_tokens:
        table = summary.by_capacity()
        names = [f"{line['capacity']:,}" for line in table]
        right.bar(names, [100 * line["utilization"] for line in table], color="#ee6677")
        for place, line in enumerate(table):
            too_long, packs = f"{line['too_long']:,} too long", f"{line['packs']:,} packs"
            style = {"rotation": 90, "ha": "center", "va": "top", "color": "white"}
            top = 100 * line["utilization"] - 3
            right.text(place, top, too_long if line["too_long"] else packs, **style)
        padded = 100 * summary.as_dict()["padded_utilization"]
        right.axhline(padded, color="#333333", linestyle="--")
        right.set(
            xlabel=f"capacity (dashed: padded batches of 8, {padded:.0f} %)",
            ylabel="% of a pack filled",
            ylim=(0, 105),
            title="utilization",
        )
        right.tick_params(axis="x", rotation=30)
    else:
        right.text(0.5, 0.5, "--tokenizer shows\nutilization by capacity", ha="center", va="center")
        right.axis("off")
    figure.savefig(path, dpi=120)


def pack_picture(
    plan: PackPlan, sources: NDArray[Any], image_tokens: NDArray[Any], path: str
) -> None:
    """Draw the share of images in each pack, and the shares of text and images in each source.

    Args:
        sources, image_tokens: (N,) each sample's file and its number of image tokens.

    Raises:
        ValueError: there are no packs, or matplotlib is not installed.
    """
    if not plan.num_packs:
        raise ValueError("there is no pack to draw")
    figure = _figure((9, 3.6))
    left, right = figure.subplots(1, 2)
    image_tokens = np.minimum(image_tokens, plan.num_tokens)
    shares = 100 * plan.totals(image_tokens) / plan.pack_tokens
    left.hist(shares, bins=np.linspace(0, 100, 26), color="#228833")
    mean = 100 * image_tokens[plan.sample_index].sum() / plan.pack_tokens.sum()
    left.axvline(mean, color="#333333", linestyle="--")
    left.set(xlabel="image tokens, % of a pack's", ylabel="packs", title="packs (dashed: all)")

    parts = balance_report(plan, sources, image_tokens)["sources"]
    shown = list(parts.items())[:SHOWN_SOURCES][::-1]
    names = [Path(name).name for name, _ in shown]
    share, images = (
        np.array([100 * part[key] for _, part in shown]) for key in ("share", "images")
    )
    right.barh(range(len(names)), share * (100 - images) / 100, color="#4477aa", label="text")
    starts = share * (100 - images) / 100
    right.barh(range(len(names)), share - starts, left=starts, color="#228833", label="images")
    right.set(yticks=range(len(names)), yticklabels=names)
    right.set(xlabel="% of all tokens", title="files")
    figure.legend(loc="outside lower right", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


def inspect_picture(view: PackView, path: str) -> None:
    """Draw a pack: its tokens folded into lines, segments in colors, images at their positions in the model's
    pixels, supervised tokens as a dark strip; and beside it the attention masks of the text and the vision tower.

    An image that can no longer be decoded is labeled as such.

    Raises:
        ValueError: matplotlib is not installed.
    """
    num_tokens = len(view.pack.input_ids)
    width = _LINE_STEP * -(-num_tokens // (_LINES * _LINE_STEP))
    lines = -(-num_tokens // width)
    high = max(lines * _LINE_IN, _SQUARE_IN + bool(view.media) * (_SQUARE_IN + 0.9))
    size = (1.0 + _BAND_IN + 1.0 + _SQUARE_IN + 0.3, high + 1.6)
    figure = _figure(size, layout=None)

    def place(left: float, top: float, wide: float, tall: float) -> Any:
        """Axes at a place in inches from the upper left."""
        bottom = size[1] - top - tall
        return figure.add_axes((left / size[0], bottom / size[1], wide / size[0], tall / size[1]))

    figure.text(1.0 / size[0], 1 - 0.42 / size[1], _title(view), fontsize=12, color=_INK)
    band = place(1.0, 0.75, _BAND_IN, lines * _LINE_IN)
    _draw_tokens(band, view, width, lines)
    left = 1.0 + _BAND_IN + 1.0
    _draw_attention(place(left, 0.95, _SQUARE_IN, _SQUARE_IN), view)
    if view.media:
        _draw_vision(place(left, 0.95 + _SQUARE_IN + 0.9, _SQUARE_IN, _SQUARE_IN), view)
    figure.savefig(path, dpi=120)


def _title(view: PackView) -> str:
    num_tokens, supervised = len(view.pack.input_ids), len(view.pack.supervised_index)
    return (
        f"pack {view.number} of {view.num_packs:,}: {num_tokens:,} of {view.capacity:,} tokens, "
        f"{len(view.samples)} segments, {len(view.media)} images and videos, {supervised:,} supervised"
    )


def _draw_tokens(axes: Any, view: PackView, width: int, lines: int) -> None:
    def parts(begin: int, end: int) -> list[tuple[int, int, int]]:
        """(line, first column, last column + 1) of tokens, per line."""
        numbers = range(begin // width, (end - 1) // width + 1)
        return [(n, max(begin - n * width, 0), min(end - n * width, width)) for n in numbers]

    def fill(begin: int, end: int, of_line: tuple[float, float], **style: Any) -> None:
        top, bottom = of_line
        for line, first, last in parts(begin, end):
            axes.barh(line + top, last - first, bottom - top, first, align="edge", lw=0, **style)

    num_tokens, letter = len(view.pack.input_ids), _GLYPH_IN * width / _BAND_IN
    for segment, sample in enumerate(view.samples):
        begin, end = view.bounds(segment)
        color = _SEGMENTS[segment % len(_SEGMENTS)]
        fill(begin, end, _LABEL, color=_mixed(color, 0.65))
        fill(begin, end, _BAND, color=_mixed(color, 0.16))
        fill(begin, end, _STRIP, color="#e4e4e4")
        line, first, last = max(parts(begin, end), key=lambda part: part[2] - part[1])
        row = f" {segment}: row {sample.row}"
        source = ascii(sample.source)[1:-1]  # the font lacks many glyphs
        for label in (f"{row} of {source}", row, f" {segment}"):
            if (len(label) + 1) * letter <= last - first:
                style = {"fontsize": 7.5, "color": _INK, "va": "center_baseline"}
                axes.text(first, line + sum(_LABEL) / 2 + 0.005, label, parse_math=False, **style)
                break
    decoded: dict[int, Any] = {}  # a video with timestamps is in many spans
    for span in view.spans:
        if span.is_supervised:
            fill(span.begin, span.end, _STRIP, color=_INK)
        if span.medium >= 0:
            color = _SEGMENTS[span.segment % len(_SEGMENTS)]
            fill(span.begin, span.end, _BAND, color=_mixed(color, 0.4))
            if span.medium not in decoded:
                decoded[span.medium] = _decoded(view.media[span.medium], view)
            pieces = _frame_pieces(view, span)
            for frame, begin, end in pieces:
                widest = max(parts(begin, end), key=lambda part: part[2] - part[1])
                _put_picture(axes, decoded[span.medium], frame, widest, width)
    free = min(view.capacity, lines * width)
    if free > num_tokens:
        fill(num_tokens, free, _BAND, facecolor="none", edgecolor=_FREE, hatch="////")
    _finish_tokens(axes, view, width, lines)


def _frame_pieces(view: PackView, span: Span) -> list[tuple[int, int, int]]:
    """(temporal patch, begin, end) of each frame in a span."""
    _, height, width = view.media[span.medium].grid_thw
    step = height * width // view.pack.vision.merge_size**2
    begins = range(span.begin, span.end, step)
    return [(span.first_frame + n, begin, begin + step) for n, begin in enumerate(begins)]


def _decoded(medium: Medium, view: PackView) -> NDArray[np.uint8] | None:
    try:
        return frames(medium, view.pack.vision, view.folders)
    except ValueError:
        return None


def _put_picture(
    axes: Any, pictures: Any, frame: int, part: tuple[int, int, int], width: int
) -> None:
    """Draw an image centered in a part of a line, as large as fits."""
    line, first, last = part
    middle = (first + last) / 2
    room, high = last - first, (_BAND[1] - _BAND[0]) * _LINE_IN  # tokens, inches
    if pictures is None:
        style = {"ha": "center", "va": "center", "fontsize": 7, "color": _INK, "clip_on": True}
        axes.text(middle, line + sum(_BAND) / 2, "cannot\nbe read", **style)
        return
    picture = pictures[frame]
    tokens_an_inch = width / _BAND_IN
    wide = picture.shape[1] / picture.shape[0] * high  # inches, at full height
    shrink = min(1, room / tokens_an_inch / wide)
    half_wide = wide * shrink * tokens_an_inch / 2
    half_high = (_BAND[1] - _BAND[0]) * shrink / 2
    center = line + sum(_BAND) / 2
    extent = (middle - half_wide, middle + half_wide, center + half_high, center - half_high)
    axes.imshow(picture, extent=extent, aspect="auto", interpolation="antialiased", zorder=3)


def _finish_tokens(axes: Any, view: PackView, width: int, lines: int) -> None:
    from matplotlib.patches import Patch

    starts = range(0, lines * width, width)
    axes.set(xlim=(0, width), ylim=(lines, 0), xlabel="token of the line")
    axes.set_yticks([n + sum(_BAND) / 2 for n in range(lines)], [f"{n:,}" for n in starts])
    axes.tick_params(length=0, colors="#555555", labelsize=8)
    axes.xaxis.label.set(color="#555555", fontsize=8)
    axes.spines[:].set_visible(False)
    handles = [
        Patch(color=_mixed(_SEGMENTS[0], 0.65), label="segment: number and row"),
        Patch(color=_mixed(_SEGMENTS[0], 0.16), label="text"),
        Patch(color=_mixed(_SEGMENTS[0], 0.4), label="image or video"),
        Patch(color=_INK, label="supervised"),
        Patch(color="#e4e4e4", label="not supervised"),
        Patch(facecolor="none", edgecolor=_FREE, hatch="////", label="free"),
    ]
    below = {"loc": "upper left", "bbox_to_anchor": (0, -0.32 / (lines * _LINE_IN))}
    axes.legend(handles=handles, ncols=6, frameon=False, fontsize=8, labelcolor=_INK, **below)


def _draw_attention(axes: Any, view: PackView) -> None:
    num_tokens = len(view.pack.input_ids)
    for segment in range(len(view.samples)):
        begin, end = view.bounds(segment)
        color = _SEGMENTS[segment % len(_SEGMENTS)]
        seen = [(begin, begin), (begin, end), (end, end)]
        axes.fill(*zip(*seen), color=_mixed(color, 0.35), lw=0)
        for span in view.spans_of(segment):
            if span.is_supervised:
                rows = [(begin, span.begin), (begin, span.end), (span.end, span.end)]
                axes.fill(*zip(*rows, (span.begin, span.begin)), color=color, lw=0)
    _finish_square(axes, num_tokens, "tokens see (darker: supervised)")


def _draw_vision(axes: Any, view: PackView) -> None:
    begin = 0
    for medium in view.media:
        color = _mixed(_SEGMENTS[medium.segment % len(_SEGMENTS)], 0.4)
        frames, height, width = medium.grid_thw
        for _ in range(frames):
            side = height * width
            axes.barh(begin, side, side, begin, align="edge", color=color, lw=0)
            begin += side
    _finish_square(axes, begin, "patches of the tower see, at most")


def _finish_square(axes: Any, end: int, title: str) -> None:
    axes.set(xlim=(0, end), ylim=(end, 0))
    axes.set_title(title, fontsize=9, color=_INK)
    axes.locator_params(nbins=5)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(colors="#555555", labelsize=7)
    axes.spines[:].set_color("#cccccc")


def _mixed(color: str, share: float) -> tuple[float, float, float]:
    """A color blended with white."""
    parts = (int(color[n : n + 2], 16) / 255 for n in (1, 3, 5))
    red, green, blue = (1 - share + share * part for part in parts)
    return red, green, blue


def _figure(
    size: tuple[float, float], layout: Literal["constrained"] | None = "constrained"
) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a picture needs matplotlib: pip install 'mmpack[report]'") from None
    return Figure(figsize=size, layout=layout, facecolor="white")
