"""How full and how similar are the packs of a stream, how regularly do they come, and what does a larger buffer
gain?

A stream only sees a buffer of rows, so its packs cannot be as similar as planned ones; the ceiling is a plan of
all of a rank's rows, known before the first pack. Ranks take packs in order; cost is as in `bench_plan`. Jitter is
the number of rows read between two packs: a packer that fills a window and empties it at once reads none, then
hundreds. Peers, implemented from their descriptions: next-fit, which closes a pack when a row does not fit
(torchtune, most collators), and first-fit over a window of rows that is emptied at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from benchmarks.bench_plan import LENGTHS, real_rows, synthetic_rows
from mmpack import plan_packs
from mmpack.packing.stream_select import choose_packs

CAPACITIES = (4096, 8192, 32768)
BUFFERS = (25, 50, 100, 200, 400)
RANKS, BUFFER, PACKS = 8, 200, 100  # PACKS per rank
WHICH = "real" if LENGTHS.is_file() else "synthetic"

Packs = Iterator[tuple[list[int], int]]  # rows of a pack, and rows read so far

pytestmark = pytest.mark.cpu


def next_fit(tokens: np.ndarray, cost: np.ndarray, capacity: int, buffer: int) -> Packs:
    pack: list[int] = []
    room = capacity
    for row, size in enumerate(tokens.tolist()):
        if size > room:
            yield pack, row + 1
            pack, room = [], capacity
        pack.append(row)
        room -= size
    yield pack, len(tokens)


def first_fit(tokens: np.ndarray, cost: np.ndarray, capacity: int, buffer: int) -> Packs:
    for start in range(0, len(tokens), buffer):
        bins: list[list[int]] = []
        rooms: list[int] = []
        for row in range(start, min(start + buffer, len(tokens))):
            size = int(tokens[row])
            place = next((n for n, room in enumerate(rooms) if room >= size), len(bins))
            if place == len(bins):
                bins.append([])
                rooms.append(capacity)
            bins[place].append(row)
            rooms[place] -= size
        for pack in bins:
            yield pack, min(start + buffer, len(tokens))


def mmpack(tokens: np.ndarray, cost: np.ndarray, capacity: int, buffer: int) -> Packs:
    yield from choose_packs(tokens, cost, capacity, buffer=buffer)


def planned(tokens: np.ndarray, cost: np.ndarray, capacity: int, buffer: int) -> Packs:
    """The ceiling: knows all rows before the first pack. As for all packers, the last pack is left out."""
    plan = plan_packs(tokens, capacity, cost=cost)
    for pack in range(plan.num_packs):
        is_end = pack >= plan.num_packs - 1
        yield plan.samples_of(pack).tolist(), len(tokens) if is_end else len(tokens) - 1


IMPLS: dict[str, Callable[..., Packs]] = {
    "mmpack": mmpack,
    "next-fit": next_fit,
    "first-fit": first_fit,
    "planned": planned,
}


def rows_for(capacity: int, packs: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, FLOPs) of enough rows to fill that many packs on each rank."""
    tokens, cost = real_rows() if WHICH == "real" else synthetic_rows(150_000)
    keep = tokens <= capacity
    count = int(RANKS * packs * capacity / tokens[keep].mean())
    return tokens[keep][:count], cost[keep][:count]


def measured(
    impl: str, tokens: np.ndarray, cost: np.ndarray, capacity: int, buffer: int
) -> dict[str, float]:
    """All metrics of a packer, without the last packs, for which no more rows arrive."""
    used, costs, read, first = [], [], [], []
    start = time.process_time()
    made = 0
    for rank in range(RANKS):
        mine, mine_cost = tokens[rank::RANKS], cost[rank::RANKS]
        packs = list(IMPLS[impl](mine, mine_cost, capacity, buffer))
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
        found = measured(impl, tokens, cost, capacity, BUFFER)
        for metric, value in found.items():
            recorder.add(
                "stream", impl, "pack", metric=metric, unit="ms" if "ms" in metric else "1",
                values=[value], x=("capacity", capacity), config=f"{WHICH} rows={len(tokens)}",
            )  # fmt: skip
        print(capacity, impl, ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    few = tokens[: len(tokens) // 20], cost[: len(tokens) // 20]
    benchmark.pedantic(lambda: list(mmpack(*few, capacity, BUFFER)), rounds=1)


@pytest.mark.parametrize("buffer", BUFFERS)
def test_buffer(buffer, recorder, quick):
    """Utilization and imbalance by buffer size, at a capacity of 8,192."""
    if quick and buffer not in (50, 200):
        pytest.skip("not among the quick cases")
    tokens, cost = rows_for(8192, 12 if quick else PACKS)
    for impl in IMPLS:
        found = measured(impl, tokens, cost, 8192, buffer)
        for metric in ("utilization", "flops max over mean"):
            recorder.add(
                "stream", impl, "buffer", metric=metric, unit="1", values=[found[metric]],
                x=("buffer", buffer), config=f"{WHICH} rows={len(tokens)} capacity=8192",
            )  # fmt: skip


def test_jitter(recorder):
    """Rows read before each of a rank's first 50 packs."""
    tokens, cost = rows_for(8192, 60)
    for impl in ("mmpack", "first-fit", "next-fit"):
        packs = IMPLS[impl](tokens[::RANKS], cost[::RANKS], 8192, BUFFER)
        read = np.diff([0, *(at for _, at in packs)])[:50]
        for pack, rows in enumerate(read.tolist()):
            recorder.add(
                "stream", impl, "jitter", metric="rows read before", unit="1", values=[rows],
                x=("pack", pack), config=f"{WHICH} rows, capacity=8192 buffer={BUFFER}",
            )  # fmt: skip
