"""Plots of results, one per question, each of one machine: a GPU if it was measured there.

Backgrounds are transparent: lines, text and colors have a contrast of 4 to 1 on white and on #0d1117, so they are
readable on light and dark pages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import CEILING, Row, kind_of

OURS, PEERS, NAIVE = "#1583dc", ("#d2691e", "#2c9555", "#9a6ce0", "#b8860b", "#d64550"), "#848484"
INK, FAINT = "#7b7b7b", "#7b7b7b55"


def draw(rows: Sequence[Row], folder: Path) -> Iterator[tuple[str, str]]:
    """Draw all plots of the rows into a folder; yields (name, why it is not drawn, or "")."""
    for name, (bench, picture) in PLOTS.items():
        found = [row for row in rows if row.bench == bench]
        kinds = sorted({kind_of(row.machine) for row in found}, key=lambda kind: kind == "cpu")
        if not kinds:
            yield name, f"no figures of {bench}"
            continue
        found = [row for row in found if kind_of(row.machine) == kinds[0]]
        figure = picture(found)
        if figure is None:
            yield name, f"too few figures of {bench}"
            continue
        machine = found[-1].machine
        where = f"{machine}; GPU: not measured" if kinds == ["cpu"] and bench in ON_GPU else machine
        figure.suptitle(where, x=0.99, ha="right", fontsize=8, color=INK)
        figure.savefig(folder / f"{name}.png", dpi=120, transparent=True)
        yield name, ""


def throughput(rows: Sequence[Row]) -> Any:
    """Useful tokens per second of a whole step, relative to padded batches."""
    found = {row.impl: row.p50 for row in rows if row.metric == "useful tokens"}
    found.pop(CEILING, None)
    padded = found.get("padded, 8 rows")
    if not padded or len(found) < 2:
        return None
    figure, (axes,) = _figure(1, 0.6 + 0.42 * len(found))
    for place, (impl, rate) in enumerate(found.items()):
        axes.barh(place, rate / padded, 0.62, color=_color(impl, {}))
        label = f"{rate / padded:.1f} x  ({rate:,.0f} tokens/s)"
        axes.text(rate / padded, place, f" {label}", va="center", fontsize=9, color=INK)
    axes.set(yticks=range(len(found)), yticklabels=list(found))
    axes.invert_yaxis()
    axes.grid(False)
    axes.set_xlim(0, 1.45 * max(found.values()) / padded)
    axes.set_xlabel("useful tokens per second of a training step, padded batches of 8 = 1")
    return figure


def attention(rows: Sequence[Row]) -> Any:
    """TFLOP/s by segment length, for equal segments, forward and backward."""
    heads = ", 12/2 heads"
    found = [r for r in rows if r.metric == "rate" and re.match(rf"\d+ x \w+{heads}$", r.config)]
    if len({row.x for row in found}) < 2:
        return None
    figure, panels = _figure(2, 3.2)
    unit, factor = ("TFLOP/s", 1) if max(row.p50 for row in found) > 1 else ("GFLOP/s", 1000)
    seen = _libraries_way(found, "triton", "sdpa")
    for axes, mode in zip(panels, ("forward", "backward")):
        for impl in dict.fromkeys(row.impl for row in found):
            of = {row.x: row for row in found if (row.mode, row.impl) == (mode, impl)}
            _line(axes, [of[x] for x in sorted(of)], impl, seen, factor)
        axes.set(xscale="log", title=f"{mode}, causal, 12 + 2 heads of 128", ylim=(0, None))
        axes.set_xticks(sorted({row.x for row in found}), [f"{x:,.0f}" for x in sorted(of)])
        axes.minorticks_off()
        axes.set_xlabel("tokens per segment")
    panels[0].set_ylabel(f"{unit} of the segments' own scores")
    _legend(figure, panels[0], 4)
    return figure


def insertion(rows: Sequence[Row]) -> Any:
    """GB/s of embedding and insertion, by mode, for the largest pack measured."""
    found = [row for row in rows if row.metric == "bandwidth" and "share=0.7" in row.config]
    if not found:
        return None
    wide = "D=3584" if any("D=3584" in row.config for row in found) else "D=1536"
    found = [row for row in found if wide in row.config]
    largest = max(row.x for row in found)
    found = [row for row in found if row.x == largest]
    figure, (axes,) = _figure(1, 3.0)
    modes = list(dict.fromkeys(row.mode for row in found))
    impls = [i for i in dict.fromkeys(row.impl for row in found) if i != CEILING]
    seen = _libraries_way(found, "mmpack", "index_copy")
    for place, impl in enumerate(impls):
        of = {row.mode: row.p50 for row in found if row.impl == impl}
        middles = [
            modes.index(mode) + (place - (len(impls) - 1) / 2) * 0.8 / len(impls) for mode in of
        ]
        color = _color(impl, seen)
        axes.bar(
            middles, list(of.values()), 0.7 / len(impls), color=color, label=SHOWN.get(impl, impl)
        )
        for middle, value in zip(middles, of.values()):
            axes.text(
                middle, value, f"{value:.3g}", ha="center", va="bottom", fontsize=8, color=INK
            )
    ceilings = [row.p50 for row in found if row.impl == CEILING]
    axes.axhline(np.median(ceilings), color=INK, linestyle="--", linewidth=1.2, label="a copy")
    axes.set_xticks(range(len(modes)), [_MODES[mode] for mode in modes])
    axes.set_ylabel("GB/s of the fewest bytes")
    axes.set_title(f"{found[0].config.replace('share=', 'image share ')}")
    _legend(figure, axes, 5)
    return figure


_MODES = {
    "forward": "forward",
    "backward": "backward",
    "accumulate": "backward into a gradient",
}


def balance(rows: Sequence[Row]) -> Any:
    """The cost of each rank in each step."""
    impls = list(dict.fromkeys(row.impl for row in rows))
    theirs = next((impl for impl in impls if impl.startswith("llamafactory")), "mmpack")
    if not {theirs, "mmpack by cost"} <= set(impls):
        return None
    titles = {theirs: "packed by tokens alone", "mmpack by cost": "mmpack"}
    if theirs.startswith("llamafactory"):
        titles[theirs] = f"LLaMA-Factory {theirs.split()[1]}"
    figure, panels = _figure(2, 3.4, sharey=True)
    for axes, (impl, title), color in zip(panels, titles.items(), (PEERS[0], OURS)):
        of = [row for row in rows if row.impl == impl]
        cost, busiest = ([row for row in of if row.metric == m] for m in ("cost", "busiest"))
        steps = [row.x for row in cost]
        low, high = [row.p20 for row in cost], [row.p80 for row in cost]
        axes.vlines(steps, low, high, color=NAIVE, linewidth=4, alpha=0.55)
        axes.plot(steps, [row.p50 for row in cost], ".", color=INK, markersize=4)
        axes.plot(steps, [row.p50 for row in busiest], "_", color=color, ms=8, markeredgewidth=2)
        of_all = {row.metric: row.p50 for row in of if row.mode == "epoch"}
        waits = f"packs {100 * of_all['utilization']:.1f} % full, ranks wait {100 * of_all['waiting']:.1f} %"
        axes.axhline(1, color=INK, linewidth=0.8)
        axes.set(title=f"{title}\n{waits}", xlabel="step", ylim=(0, 2.1))
    ranks = re.search(r"ranks=(\d+)", rows[0].config)[1]
    panels[0].set_ylabel(
        f"cost of {ranks} ranks, 1 = mean pack\nbar: middle 60 %, dash: the busiest"
    )
    return figure


def stream(rows: Sequence[Row]) -> Any:
    """Utilization by buffer size, and the rows that a stream reads before each pack."""
    full = [row for row in rows if (row.mode, row.metric) == ("buffer", "utilization")]
    read = [row for row in rows if row.mode == "jitter"]
    if len({row.x for row in full}) < 2 or not read:
        return None
    figure, (left, right) = _figure(2, 3.2)
    seen: dict[str, str] = {}
    for impl in dict.fromkeys(row.impl for row in full):
        of = sorted((row for row in full if row.impl == impl), key=lambda row: row.x)
        _line(left, of, impl, seen, 100)
    left.set(
        xlabel="rows held", ylabel="% of a pack filled", title="how full packs are", xscale="log"
    )
    ticks = sorted({row.x for row in full})
    left.set_xticks(ticks, [f"{x:.0f}" for x in ticks])
    left.minorticks_off()
    for impl, offset in (("first-fit", -0.2), ("mmpack", 0.2)):
        of = [row for row in read if row.impl == impl]
        places = [row.x + offset for row in of]
        right.vlines(places, 0, [row.p50 for row in of], color=_color(impl, seen), linewidth=2.4)
    right.set(
        xlabel="pack", ylabel="rows read before it", title="how evenly packs come, 200 rows held"
    )
    _legend(figure, left, 4)
    return figure


def memory(rows: Sequence[Row]) -> Any:
    """Memory of logits, loss and their gradients, by the share of supervised tokens."""
    found = [row for row in rows if row.metric == "peak"]
    if len({row.x for row in found}) < 2:
        return None
    figure, (axes,) = _figure(1, 3.2)
    seen: dict[str, str] = {}
    for impl in dict.fromkeys(row.impl for row in found):
        of = {row.x: row for row in found if row.impl == impl}
        shown = "the gradients alone" if impl == CEILING else impl
        _line(axes, [of[x] for x in sorted(of)], impl, seen, 1, label=shown)
    axes.set(xlabel="share of tokens that are supervised", ylabel="MiB at most", ylim=(0, None))
    axes.set_xlim(0, 1.02)
    axes.set_title(f"logits, loss and back: {found[0].config}")
    _legend(figure, axes, 4)
    return figure


ON_GPU = ("embed_features", "head", "train", "varlen_attention")
SHOWN = {
    "sdpa": "sdpa per segment (mmpack, library ops)",
    "dense mask": "sdpa, dense mask",
    "index_copy": "torch by index (mmpack by libraries)",
    "triton": "mmpack",
    "planned": "planned, all rows known",
    CEILING: "ceiling",
}
PLOTS: dict[str, tuple[str, Callable[[Sequence[Row]], Any]]] = {
    "throughput": ("train", throughput),
    "attention": ("varlen_attention", attention),
    "insertion": ("embed_features", insertion),
    "balance": ("ranks", balance),
    "stream": ("stream", stream),
    "memory": ("head", memory),
}


def _figure(panels: int, height: float, **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height + 0.5), layout="constrained")
    places = figure.subplots(1, panels, squeeze=False, **options)[0]
    for axes in places:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.tick_params(colors=INK, labelsize=9)
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set(color=INK, fontsize=10)
    return figure, places


def _libraries_way(rows: Sequence[Row], kernel: str, library: str) -> dict[str, str]:
    """Initial colors: if our kernel was not measured, its substitute has our color."""
    return {} if any(row.impl == kernel for row in rows) else {library: OURS}


def _color(impl: str, seen: dict[str, str]) -> str:
    """Blue for ours, grey for baselines, a separate color for each other peer."""
    if impl.startswith(("mmpack", "triton")):
        return OURS if impl != "mmpack, triton" else "#0f9bb8"
    if impl == CEILING:
        return INK
    if impl.startswith("padded"):
        return NAIVE
    return seen.setdefault(impl, PEERS[len(set(seen.values()) - {OURS}) % len(PEERS)])


def _line(
    axes: Any, rows: list[Row], impl: str, seen: dict[str, str], factor: float, label: str = ""
) -> None:
    """Medians as a line, and the middle range of the rounds."""
    style = {"linestyle": "--", "linewidth": 1.2} if impl == CEILING else {"marker": "o", "ms": 5}
    if impl == "mmpack, logits kept":
        style["linestyle"] = ":"
    color, x = _color(impl, seen), [row.x for row in rows]
    axes.plot(
        x,
        [factor * row.p50 for row in rows],
        color=color,
        label=label or SHOWN.get(impl, impl),
        **style,
    )
    if impl != CEILING:
        low, high = ([factor * getattr(row, name) for row in rows] for name in ("p20", "p80"))
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def _legend(figure: Any, axes: Any, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9,
        labelcolor=INK,
    )  # fmt: skip
