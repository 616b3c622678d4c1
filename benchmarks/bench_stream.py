"""How full and how alike are the packs of a stream, and how evenly do they come?

A stream sees a buffer of rows, so its packs can be neither as full nor as alike as planned ones. Ranks
take packs in the order they come; cost is as in `bench_plan`. Jitter is what lies between two packs, in
rows read: a packer that fills a window and empties it at once reads none, and then hundreds.

    pytest benchmarks/bench_stream.py --csv FILE
    python -m benchmarks.bench_stream docs/stream.png    # the rows read before each pack, drawn

Peers, as they are described: next-fit, which closes a pack when a row does not fit (torchtune, most
collators), and first-fit over a window of 200 rows, emptied at once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from benchmarks.bench_plan import LENGTHS, real_rows, synthetic_rows
from mmpack.select import choose_packs

CAPACITIES = (4096, 8192, 32768)
RANKS, BUFFER, PACKS = 8, 200, 100  # packs of a rank

Packs = Iterator[tuple[list[int], int]]  # rows of a pack, and rows read until it came


def next_fit(tokens: np.ndarray, cost: np.ndarray, capacity: int) -> Packs:
    pack: list[int] = []
    room = capacity
    for row, size in enumerate(tokens.tolist()):
        if size > room:
            yield pack, row + 1
            pack, room = [], capacity
        pack.append(row)
        room -= size
    yield pack, len(tokens)


def first_fit(tokens: np.ndarray, cost: np.ndarray, capacity: int) -> Packs:
    for start in range(0, len(tokens), BUFFER):
        bins: list[list[int]] = []
        rooms: list[int] = []
        for row in range(start, min(start + BUFFER, len(tokens))):
            size = int(tokens[row])
            place = next((n for n, room in enumerate(rooms) if room >= size), len(bins))
            if place == len(bins):
                bins.append([])
                rooms.append(capacity)
            bins[place].append(row)
            rooms[place] -= size
        for pack in bins:
            yield pack, min(start + BUFFER, len(tokens))


def mmpack(tokens: np.ndarray, cost: np.ndarray, capacity: int) -> Packs:
    yield from choose_packs(tokens, cost, capacity, buffer=BUFFER)


IMPLS: dict[str, Callable[..., Packs]] = {
    "mmpack": mmpack,
    "next-fit": next_fit,
    "first-fit by 200": first_fit,
}


def rows_for(capacity: int, packs: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, operations) of as many rows as fill that many packs on every rank."""
    tokens, cost = real_rows() if LENGTHS.is_file() else synthetic_rows(150_000)
    keep = tokens <= capacity
    count = int(RANKS * packs * capacity / tokens[keep].mean())
    return tokens[keep][:count], cost[keep][:count]


def measured(impl: str, tokens: np.ndarray, cost: np.ndarray, capacity: int) -> dict[str, float]:
    """Every figure of a packer; the last packs, when no more rows come, are left out of all."""
    used, costs, read, first = [], [], [], []
    start = time.process_time()
    made = 0
    for rank in range(RANKS):
        mine, mine_cost = tokens[rank::RANKS], cost[rank::RANKS]
        packs = list(IMPLS[impl](mine, mine_cost, capacity))
        made += len(packs)
        packs = [(pack, at) for pack, at in packs if at < len(mine)]
        used.append([int(mine[pack].sum()) for pack, _ in packs])
        costs.append([int(mine_cost[pack].sum()) for pack, _ in packs])
        read += np.diff([at for _, at in packs]).tolist()
        first.append(packs[0][1])
    seconds = time.process_time() - start
    steps = min(map(len, costs))
    matrix = np.array([rank[:steps] for rank in costs], dtype=np.float64)
    return {
        "utilization": float(np.mean(np.concatenate(used)) / capacity),
        "flops max over mean": float((matrix.max(axis=0) / matrix.mean(axis=0)).mean()),
        "rows before the first pack": float(max(first)),
        "rows between packs p99": float(np.percentile(read, 99)),
        "time of a pack ms": 1e3 * seconds / made,
    }


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_stream(capacity, benchmark, recorder, quick):
    if quick and capacity != 8192:
        pytest.skip("not among the quick cases")
    tokens, cost = rows_for(capacity, 20 if quick else PACKS)
    print()
    for impl in IMPLS:
        found = measured(impl, tokens, cost, capacity)
        for metric, value in found.items():
            recorder.add(
                "stream", impl, "pack", metric=metric, unit="ms" if "ms" in metric else "1",
                values=[value], x=("capacity", capacity), config=f"rows={len(tokens)}",
            )  # fmt: skip
        print(capacity, impl, ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    few = tokens[: len(tokens) // 20], cost[: len(tokens) // 20]
    benchmark.pedantic(lambda: list(mmpack(*few, capacity)), rounds=1)


def main(path: str) -> None:
    """Draw the rows read before each pack of one rank to `path`."""
    from matplotlib.figure import Figure

    tokens, cost = rows_for(8192, 60)
    figure = Figure(figsize=(9, 3), layout="constrained", facecolor="white")
    axes = figure.subplots(1, 2, sharey=True)
    shown = (("first-fit by 200", "#cc3311"), ("mmpack", "#0077bb"))
    for place, (impl, color) in zip(axes, shown):
        packs = list(IMPLS[impl](tokens[::RANKS], cost[::RANKS], 8192))
        read = np.diff([0, *(at for _, at in packs)])[:50]
        place.vlines(np.arange(len(read)), 0, read, color=color, linewidth=3)
        place.set(title=impl, xlabel="pack")
        place.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("rows read before it")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
