"""The benchmark tables: our measurements beside those of peers and the ceiling of the same run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.harness import CEILING, Row, kind_of

H200 = "nvidia-h200"
ALL = ""  # instead of an implementation: all of them
Red = dict[
    tuple[str, str], dict[str, list[str]]
]  # (machine's kind, benchmark) -> implementation -> test files


@dataclass(frozen=True)
class Line:
    """A row of the table: our value beside the peers' values and the ceiling, all measured in the same run.

    `ours` and the peers are patterns for the full name of an impl. The first of `ours` that was measured is shown,
    with its name if it is not the first. If there are several cases, uses the one whose config contains `config`,
    at `x`, else at the largest x. A peer is compared with our value from the same test, which interleaved both.
    `brief` is the row's title in README.md's short table, which only has the first peer.
    """

    title: str
    bench: str
    mode: str
    metric: str
    ours: tuple[str, ...]
    peers: dict[str, str]
    config: str = ""
    x: float | None = None
    is_host: bool = False  # does not use a GPU
    as_values: bool = False  # show the peers' values instead of ratios
    fallback: str = ""  # replaces the first of `ours` if that cannot run
    has_ceiling: bool = True  # the recorded ceiling applies to this row
    brief: str = ""


_KERNEL = {"fallback": "library ops"}
_HOST = {"is_host": True}
_ATTENTION = {
    "flash-attn 2": "flash2",
    "flash-attn 3": "flash3",
    "flash-attn 4": "flash4",
    "torch varlen": "torch_varlen",
    "flex": "flex",
    "dense mask": "dense mask",
}
_INSERTION = {"transformers": "transformers", "compiled": "compiled reference"}
_PLANNERS = {
    "LLaMA-Factory": r"llamafactory .* by 1000",
    "TRL": "trl .*",
    "axolotl": "axolotl .*",
}
_COLLATORS = {
    **{name: name for name in ("transformers", "LLaMA-Factory", "VeOmni")},
    "Pillow's decoding and resizing": CEILING,  # a ceiling only for what resizes with Pillow
}
_STREAMS = {"next-fit": "next-fit", "first-fit": "first-fit", "planned": "planned"}
_STEPS = {
    "padded": "padded, 8 rows",
    "padded by length": "padded, 8 rows of like length",
    "transformers' packing": "transformers packed",
}

LINES = [
    Line("training step, useful tokens", "train", "step", "useful tokens", ("mmpack, triton", "mmpack"),
         _STEPS, brief="training step, useful tokens", **_KERNEL),
    Line("logits and loss, 15 % supervised, peak memory", "head", "forward and backward", "peak", ("mmpack",),
         {"transformers": "transformers", "Liger": "liger"}, x=0.15,
         brief="logits and loss, 15 % supervised, peak memory"),
    Line("attention, real rows, forward", "varlen_attention", "forward", "rate", ("triton", "sdpa"),
         _ATTENTION, config="real rows, ", **_KERNEL),
    Line("attention, real rows, backward", "varlen_attention", "backward", "rate", ("triton", "sdpa"),
         _ATTENTION, config="real rows, ", **_KERNEL),
    Line("embedding and insertion, forward", "embed_features", "forward", "bandwidth",
         ("mmpack", "index_copy"), _INSERTION, config="share=0.7", **_KERNEL),
    Line("embedding and insertion, backward", "embed_features", "backward", "bandwidth",
         ("mmpack", "index_copy"), _INSERTION, config="share=0.7",
         brief="embedding with image features inserted, backward", **_KERNEL),
    Line("rotary embedding, forward", "mrope", "forward", "bandwidth", ("mmpack",),
         {"transformers": "transformers", "Liger": "liger", "compiled": "compiled"}, config="K=128"),
    Line("patch embedding, forward and backward", "patch_embed", "forward and backward", "bandwidth",
         ("mmpack",), {"transformers": "transformers", "linear": "linear"},
         brief="patch embedding, forward and backward"),
    Line("vision tower with windows (Qwen2.5-VL), step", "tower", "step", "time", ("mmpack",),
         {"transformers": "transformers"}, config="qwen2_5_vl"),
    Line("assembling a pack, without pixels", "assemble", "assemble", "time", ("mmpack",),
         {"transformers": "transformers"}, config="segments=7 ",
         brief="assembling a pack of 8,192 tokens and 28 images, without decoding", **_HOST),
    Line("rows to a batch, images decoded", "host", "collate", "time", ("mmpack uint8",),
         _COLLATORS, has_ceiling=False, brief="rows to a batch, images decoded", **_HOST),
    Line("a decoded picture of 1024 x 768 to patches", "pixels", "a picture", "time", ("mmpack",),
         {"transformers": "transformers"}, config="1024 x 768", **_HOST),
    Line("indexing rows", "index", "index", "time", ("mmpack",), {"transformers": "transformers"},
         brief="indexing 2,109 rows with 2,793 images", **_HOST),
    Line("reading tar shards, rows", "sources", "read", "rows", ("tar shards",), {"webdataset": "webdataset"},
         **_HOST),
    Line("reading Parquet with images, rows", "sources", "read", "rows", ("Parquet",), {"datasets": "datasets"},
         **_HOST),
    Line("packs of 8,192 full", "plan", "plan", "utilization", ("mmpack by cost",), _PLANNERS,
         config="real", x=8192, as_values=True, **_HOST),
    Line("busiest of 64 ranks over the mean", "plan", "plan", "imbalance 64", ("mmpack by cost",), _PLANNERS,
         config="real", x=8192, as_values=True, brief="busiest of 64 ranks over the mean", **_HOST),
    Line("packs of a stream full, buffer of 200 rows", "stream", "pack", "utilization", ("mmpack",), _STREAMS,
         x=8192, as_values=True, **_HOST),
    Line("busiest of 8 ranks over the mean, stream", "stream", "pack", "flops max over mean", ("mmpack",),
         _STREAMS, x=8192, as_values=True, **_HOST),
    Line("an epoch inside TRL's trainer, useful tokens", "inside TRL", "epoch", "useful tokens", ("TRL mmpack",),
         {"padded": "TRL padded"}, **_HOST),
]  # fmt: skip

_MORE_IS_BETTER = ("1/s", "GB/s", "TFLOP/s")


def figures(line: Line, rows: Sequence[Row]) -> tuple[Row | None, dict[str, tuple[Row, float]]]:
    """(our row for a line, None if it was not measured; the peers' rows by name, each with our speedup in the same
    test). `rows` are a machine's rows, without those that are withheld."""
    rows = [
        row
        for row in rows
        if (row.bench, row.mode, row.metric) == (line.bench, line.mode, line.metric)
        and line.config in row.config
        and line.x in (None, row.x)
    ]
    ours = next(filter(None, (_last(rows, name) for name in line.ours)), None)
    if ours is None:
        return None, {}
    rows = [row for row in rows if (row.x, row.config) == (ours.x, ours.config)]
    peers = {}
    for shown, pattern in line.peers.items():
        peer = _last(rows, pattern)
        if peer is None:
            continue
        beside = _last([row for row in rows if row.test == peer.test], re.escape(ours.impl))
        if beside is None and line.as_values:
            beside = ours
        if beside is None:
            raise ValueError(f"{peer.test} measured {peer.impl} without {ours.impl}")
        more_is_better = ours.unit in _MORE_IS_BETTER or ours.metric == "utilization"
        peers[shown] = (peer, beside.p50 / peer.p50 if more_is_better else peer.p50 / beside.p50)
    return ours, peers


def withheld(line: Line, red: dict[str, list[str]]) -> str:
    """The text that replaces a line's values if their tests do not pass; "" if they pass. `red` maps
    implementations, or ALL, to the failing test files."""
    bad = {file for impl in (*line.ours, ALL) for file in red.get(impl, ())}
    return f"withheld: {', '.join(f'`tests/{file}.py`' for file in sorted(bad))} not green" * bool(
        bad
    )


def cell(line: Line, rows: Sequence[Row], red: dict[str, list[str]] | None = None) -> str:
    """A line's cells from a machine's rows; `red` as in `withheld`."""
    red = red or {}
    if why_not := withheld(line, red):
        return why_not
    rows = [row for row in rows if row.impl not in red]
    ours, peers = figures(line, rows)
    if ours is None:
        return "not measured"
    told = [
        f"{shown} {_number(peer)}" if line.as_values else f"{_times(ratio)} x {shown}"
        for shown, (peer, ratio) in peers.items()
    ]
    same = [
        row for row in rows if (row.test, row.x, row.config) == (ours.test, ours.x, ours.config)
    ]
    ceiling = _last([row for row in same if row.metric == line.metric], CEILING)
    if ceiling and line.has_ceiling:
        told.append(f"ceiling {_number(ceiling)}")
    by = f" ({line.fallback})" if ours.impl != line.ours[0] and line.fallback else ""
    text = f"**{_number(ours)}**{by}" + (": " + ", ".join(told) if told else "")
    at = f"{ours.x_name}={ours.x:g}" if line.x is not None or not ours.config else ""
    return f"{text}<br>{' '.join(filter(None, (ours.config, at)))}"


def _times(ratio: float) -> str:
    return f"{ratio:.{1 if ratio < 9.95 else 0}f}"


def _last(rows: Sequence[Row], pattern: str) -> Row | None:
    """The newest row of an impl at the largest x."""
    found = [row for row in rows if re.fullmatch(pattern, row.impl)]
    return max(reversed(found), key=lambda row: row.x, default=None)


def _number(row: Row) -> str:
    value, unit = row.p50, row.unit
    if row.metric == "utilization":
        return f"{100 * value:.1f} %"
    if unit == "TFLOP/s" and value < 1:
        value, unit = 1000 * value, "GFLOP/s"
    if unit == "1":
        return f"{value:.3f}"
    number = f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")
    return number + ("/s" if unit == "1/s" else f" {unit}")


def table(rows: Sequence[Row], red: Red | None = None) -> str:
    """The Markdown table, without rows that are `red`."""
    kinds = list(dict.fromkeys(["cpu", H200, *(kind_of(row.machine) for row in rows)]))
    of = {kind: [row for row in rows if kind_of(row.machine) == kind] for kind in kinds}
    names = {kind: of[kind][-1].machine if of[kind] else "NVIDIA H200" for kind in kinds}
    names["cpu"] = "CPU"
    lines = ["| | " + " | ".join(names[kind] for kind in kinds) + " |"]
    lines.append("| --- |" + " --- |" * len(kinds))
    for line in LINES:
        cells = []
        for kind in kinds:
            if line.is_host and kind != "cpu":
                cells.append("host work")
            else:
                cells.append(cell(line, of[kind], (red or {}).get((kind, line.bench))))
        lines.append(f"| {line.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines + ["", *(_origin(names[kind], of[kind]) for kind in kinds)])


def brief_table(rows: Sequence[Row], red: Red | None = None) -> str:
    """README.md's table: the lines with a `brief`, each with its first peer, from a GPU if one was measured, else
    from the CPU."""
    kinds = dict.fromkeys(kind_of(row.machine) for row in reversed(rows))
    kinds = [*(kind for kind in kinds if kind != "cpu"), "cpu"]
    lines = ["| | mmpack | peer, same run | ratio |", "| --- | --- | --- | --- |"]
    for line in (line for line in LINES if line.brief):
        for kind in ["cpu"] if line.is_host else kinds:
            of_line = (red or {}).get((kind, line.bench), {})
            of_kind = [r for r in rows if kind_of(r.machine) == kind and r.impl not in of_line]
            ours, peers = figures(line, of_kind)
            if ours is None or not peers or withheld(line, of_line):
                continue
            name, (peer, ratio) = next(iter(peers.items()))
            where = "" if kind == "cpu" else f", {ours.machine}"
            cells = (line.brief + where, f"**{_number(ours)}**", f"{_number(peer)}, {name}")
            lines.append(f"| {' | '.join(cells)} | {_times(ratio)}x |")
            break
    if all(kind == "cpu" for kind in kinds):
        lines += [
            "",
            "On one CPU thread; not measured on a GPU yet (`benchmarks/gpu.sh` does that).",
        ]
    return "\n".join(lines)


def _origin(name: str, rows: Sequence[Row]) -> str:
    if not rows:
        return f"{name}: not measured; `benchmarks/gpu.sh FOLDER` measures it."
    parts = (
        dict.fromkeys(getattr(row, part) for row in rows)
        for part in ("machine", "versions", "commit", "date")
    )
    machines, versions, commits, dates = map(list, parts)
    packages: dict[str, list[str]] = {}
    for package, version in (one.split(" ", 1) for row in versions for one in row.split(", ")):
        packages.setdefault(package, []).append(version)
    shown = [f"{name} {' and '.join(dict.fromkeys(of))}" for name, of in packages.items()]
    machine, version, commit, date = map(", ".join, (machines, shown, commits, dates))
    return f"{machine}; {version}; commit {commit}, {date}."
