"""Terminal tables of `mmpack check`, and the statistics of packs that `mmpack pack` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpack.cli.check import Summary
from mmpack.cli.terminal import one_line
from mmpack.data.row_keys import unread_line
from mmpack.errors import counted
from mmpack.packing.pack_stats import (
    busiest,
    cost_floor,
    image_shares,
    rank_imbalance,
    share_spread,
    token_shares,
)
from mmpack.packing.plan import padded_utilization
from mmpack.types import IGNORE, EncodedSample, Int64, PackPlan

_SHOWN_BAD = 10
SHOWN_SOURCES = 10
_RANKS = (8, 64)


def check_table(summary: Summary) -> str:
    """A data set's summary as text."""
    refused = summary.num_rows - summary.num_usable
    lines = [f"{summary.num_rows:,} rows: {summary.num_usable:,} usable, {refused:,} refused"]
    lines += _bad_lines(summary)
    if summary.twice:
        name, earlier = summary.twice[0]
        files = "file is" if len(summary.twice) == 1 else "files are"
        lines.append(
            f"{len(summary.twice):,} {files} the same as another, read twice ({name} is {earlier})"
        )
    if summary.again is not None:
        row, earlier = summary.again
        rows = "row equals" if summary.num_again == 1 else "rows equal"
        lines.append(f"{summary.num_again:,} {rows} an earlier one ({row} equals {earlier})")
    lines += [unread_line(source, fields) for source, fields in summary.unread]
    if not summary.num_usable:
        return "\n".join(lines)

    unit = "tokens" if summary.has_tokens else "characters"
    lengths = np.array([length for length, _, _ in summary.lengths])
    lines += [
        "",
        "fields  " + _counts(summary.fields),
        "turns   " + _counts(summary.roles),
        f"images  {summary.num_images:,} in {len(summary.image_uses):,} files, "
        f"{sum(count > 1 for count in summary.image_uses.values()):,} of them used more than once",
    ]
    if summary.num_videos:
        frames = np.array(summary.video_frames)
        lines.append(
            f"videos  {summary.num_videos:,}; {frames.min():,}-{frames.max():,} frames, median "
            f"{int(np.median(frames)):,}"
        )
    if summary.weights:
        low, high = min(summary.weights), max(summary.weights)
        rows = counted(summary.num_weighted, "row")
        lines.append(f"weights of the loss  {rows}, from {low:g} to {high:g}; 1 elsewhere")
    if summary.same_content:
        extra = sum(len(paths) - 1 for paths in summary.same_content)
        example = " = ".join(one_line(Path(path).name) for path in summary.same_content[0])
        lines.append(f"        {extra:,} files have the content of another ({example})")
    if summary.image_sizes:
        heights, widths = np.array(summary.image_sizes).T
        lines.append(
            f"        {widths.min()}-{widths.max()} wide, {heights.min()}-{heights.max()} high, median "
            f"{int(np.median(widths))} x {int(np.median(heights))} pixels"
        )
    lines += [
        "rows by images  " + _counts(dict(sorted(summary.images_per_row.items()))),
        f"{unit}  {lengths.sum():,} in total; per row: median {int(np.median(lengths)):,}, "
        f"p99 {int(np.percentile(lengths, 99)):,}, longest {lengths.max():,}",
        *(
            f"special tokens in rows that {what}  {_counts(counts)}"
            for what, counts in (
                ("stay text", summary.typed_text),
                ("become their ids", summary.typed_ids),
            )
            if counts
        ),
        f"rows by {unit}  "
        + ", ".join(f"<= {end:,}: {count:,}" for end, count in summary.histogram().items()),
        "longest rows  "
        + ", ".join(
            f"{one_line(source)} row {row}: {length:,}" for length, source, row in summary.longest()
        ),
        "",
        *_source_table(summary),
    ]
    if summary.has_tokens:
        lines += ["", *_capacity_table(summary, lengths)]
    else:
        lines += ["", "pass --tokenizer FOLDER to count tokens and compare capacities"]
    return "\n".join(lines)


def _bad_lines(summary: Summary) -> list[str]:
    lines = [
        f"  {one_line(bad if bad.row >= 0 else bad.error)}" for bad in summary.bad_rows[:_SHOWN_BAD]
    ]
    if len(summary.bad_rows) > _SHOWN_BAD:
        lines.append(
            f"  ... {len(summary.bad_rows) - _SHOWN_BAD:,} more; --bad FILE lists them all"
        )
    return lines


def _counts(counts: Counter[str] | dict[int, int]) -> str:
    return ", ".join(f"{one_line(name)}: {count:,}" for name, count in counts.items())


def _source_table(summary: Summary) -> list[str]:
    rows = [("source", "rows", "refused", "images", "tokens")]
    for name, group in sorted(summary.groups.items(), key=lambda item: -item[1]["rows"]):
        tokens = f"{sum(group['tokens']):,}" if group["tokens"] else "-"
        rows.append(
            (name, f"{group['rows']:,}", f"{group['refused']:,}", f"{group['images']:,}", tokens)
        )
    return aligned(rows)


def _capacity_table(summary: Summary, lengths: np.ndarray) -> list[str]:
    table = summary.by_capacity()
    rows = [["capacity", "packs", "full", "rows too long"]]
    for line in table:
        full = f"{line['utilization']:.1%}"
        rows.append([f"{line['capacity']:,}", f"{line['packs']:,}", full, f"{line['too_long']:,}"])
    shares = [line["patches"] for line in table if "patches" in line]
    notes = [f"padded batches of 8 would be {padded_utilization(lengths):.0%} full"]
    if shares:
        rows[0] += ["patches", "once per pack", "--group-images"]
        for row, share in zip(rows[1:], shares):
            less = [fewer(share[name], share["rows"]) for name in ("packs", "grouped")]
            row += [f"{share['rows']:,}", *less]
        notes.insert(
            0,
            "patches enter the vision tower; a pack encodes an image once, and mmpack pack --group-images plans "
            "the rows of an image together (less closely with --config, which also balances costs)",
        )
    return [*aligned(rows), *notes]


def supervised_cell(number: int, sample: EncodedSample) -> str:
    """A segment's number of supervised tokens, and their weights if they have any."""
    if sample.weights is None or not number:
        return f"{number:,}"
    weights = sample.weights[1:][sample.labels[1:] != IGNORE]
    low, high = weights.min(), weights.max()
    return f"{number:,} x {low:g}" + (f" to {high:g}" if low < high else "")


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Rows of cells as lines. Columns are right-aligned, except those in `left`; each cell is printed on one
    line."""
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]


def fewer(less: int, more: int) -> str:
    """By how much a number is smaller, in words."""
    return f"{1 - less / more:.0%} fewer" if less < more else "none fewer"


def balance_report(
    plan: PackPlan,
    sources: NDArray[Any],
    image_tokens: NDArray[Any],
    costs: tuple[Int64, Int64] | None = None,
) -> dict[str, Any]:
    """Composition and balance of packs, for JSON.

    `image_share` and each of `sources`: share of all tokens, and 10th, 50th and 90th percentile over packs; for
    each source also `images`, the share of images in its tokens. With `costs` (`pack_costs`): `imbalance` and
    `imbalance_floor`, by number of ranks, the mean over steps of the costliest pack over the mean pack, and its
    lower bound for any plan; `busiest` and `busiest_floor`, the same for the costliest pack overall.
    """
    image_tokens = np.minimum(image_tokens, plan.num_tokens)
    report: dict[str, Any] = {
        "image_share": share_spread(plan, image_tokens),
        "sources": token_shares(plan, sources),
    }
    for name, share in image_shares(plan, sources, image_tokens).items():
        report["sources"][name]["images"] = share
    if costs is not None:
        alone, packs = costs
        floor = cost_floor(plan, alone, packs)
        ranks = [n for n in _RANKS if n <= plan.num_packs]
        report["imbalance"] = {str(n): round(rank_imbalance(packs, n), 4) for n in ranks}
        report["imbalance_floor"] = {str(n): round(rank_imbalance(floor, n), 4) for n in ranks}
        most, least = busiest(plan, alone, packs)
        report |= {"busiest": round(most, 4), "busiest_floor": round(least, 4)}
    return report


def balance_lines(report: dict[str, Any]) -> list[str]:
    """The same as text."""
    parts = [("images", report["image_share"])]
    if len(report["sources"]) > 1:
        parts += list(report["sources"].items())[:SHOWN_SOURCES]
    lines = [
        f"{one_line(name)}: {part['share']:.0%} of all tokens; per pack {part['p10']:.0%} to "
        f"{part['p90']:.0%} (p10 to p90)"
        + (f"; {part['images']:.0%} of them images" if "images" in part else "")
        for name, part in parts
    ]
    if (more := len(report["sources"]) - SHOWN_SOURCES) > 0:
        lines.append(f"... {more:,} more, smaller; --json has all")
    for ranks, imbalance in report.get("imbalance", {}).items():
        floor = report["imbalance_floor"][ranks]
        lines.append(
            f"on {ranks} ranks, the busiest rank takes {imbalance:.3f}x the mean per step (lower bound for "
            f"these samples: {floor:.3f}x)"
        )
    if "busiest" in report:
        lines.append(
            f"the costliest pack takes {report['busiest']:.3f}x the mean (lower bound: "
            f"{report['busiest_floor']:.3f}x)"
        )
    return lines


def mixture_lines(report: Sequence[dict[str, Any]]) -> list[str]:
    """What `mmpack train` says about the sources of a mixture, from `MixedDataset.report`."""
    return [
        f"{one_line(part['name'])}: {part['share']:.1%} of the tokens of an epoch (asked: {part['asked']:.1%} of "
        f"{part['by']}), per pack {part['p10']:.0%} to {part['p90']:.0%} (p10 to p90); {part['tokens']:,} tokens "
        f"in {part['drawn']:,} samples, {part['passes']:.2f} passes over {part['samples']:,}"
        for part in report
    ]
