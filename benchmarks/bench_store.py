"""What does a store cost a rank before its first pack, by the number of rows?

A store is written from lengths, the real ones if they are beside the checkout. Then it is opened, its plan loaded
and packs assembled, each time in a new process, whose memory is measured. There is no peer: others read every row.
The ceiling is reading the bytes of the store's index and plan.

`python -m benchmarks.bench_store FOLDER [ROWS ...]` uses 10,000 and 1,000,000 rows, or the given numbers, in
FOLDER, and keeps the stores there for the next run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.harness import CEILING, SHARED

LENGTHS = SHARED / "lengths" / "sft_mix.npz"
CAPACITY = 8192
NUM_PACKS = 50


def made_up_samples(num_rows: int, vision: Any) -> Iterator[Any]:
    """Samples with realistic lengths and image paths; ids are arbitrary."""
    from mmpack.types import EncodedSample, ImageRef

    rng = np.random.default_rng(0)
    if LENGTHS.is_file():
        data = {name: values for name, values in np.load(LENGTHS).items()}
    else:
        has_image = rng.random(10_000) < 0.5
        grids = np.repeat(rng.integers(4, 20, has_image.sum())[:, None] * 2, 2, axis=1)
        text = rng.lognormal(5, 1, len(has_image)).astype(int).clip(8, 4000)
        data = {"text_tokens": text, "answer_tokens": text // 2, "grid_h": grids[:, 0]}
        data |= {"grid_w": grids[:, 1], "image_offset": np.cumsum([0, *has_image])}
    ids = rng.integers(1000, 100_000, 100_000).astype(np.int32)
    rows = rng.integers(0, len(data["text_tokens"]), num_rows)
    for number, row in enumerate(rows.tolist()):
        begin, end = data["image_offset"][row : row + 2].tolist()
        start, length = number % 1000, int(data["text_tokens"][row]) + end - begin
        input_ids = ids[start : start + length].copy()
        input_ids[1 : 1 + end - begin] = vision.image_token_id
        labels = np.full(length, -100, dtype=np.int32)
        answer = max(1, length - int(data["answer_tokens"][row]))
        labels[answer:] = input_ids[answer:]
        grids = np.ones((end - begin, 3), dtype=np.int32)
        grids[:, 1], grids[:, 2] = data["grid_h"][begin:end], data["grid_w"][begin:end]
        images = tuple(ImageRef(f"images/{number}_{n}.jpg") for n in range(end - begin))
        yield EncodedSample(input_ids, labels, grids, images, vision, "rows.jsonl", number)


def write(folder: Path, num_rows: int) -> None:
    """Write a store and its plan, with costs, into a folder."""
    from mmpack import VisionSpec
    from mmpack.packing.plan_samples import plan_samples
    from mmpack.store.encoded_store import write_store
    from mmpack.store.plan_file import save_plan

    vision = VisionSpec(min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
    store = write_store(folder, made_up_samples(num_rows, vision), vision)
    cost = store.num_tokens + store.num_patches
    save_plan(plan_samples(store, CAPACITY, None, "drop", 0, cost), folder)


LOOK = """
import json, sys, time
def memory():
    lines = open("/proc/self/smaps_rollup").read().splitlines()[1:]
    fields = dict(line.split()[:2] for line in lines)
    return [int(fields[name]) / 1024 for name in ("Anonymous:", "Rss:")]
from pathlib import Path
from mmpack import PackedDataset, assemble
from mmpack.store.encoded_store import open_store
from mmpack.store.plan_file import load_plan
import pyarrow.compute
folder = Path(sys.argv[1])
found = {"nothing": memory()}
def timed(name, run):
    start = time.perf_counter()
    result = run()
    found[name + " ms"] = 1e3 * (time.perf_counter() - start)
    return result
timed("open", lambda: open_store(folder))
timed("plan", lambda: load_plan(folder))
dataset = timed("both", lambda: PackedDataset.from_store(folder))
found["opened"] = memory()
def packs(numbers):
    for n in numbers:
        assemble([dataset.samples[k] for k in dataset.plan.samples_of(n)], pixels=False)
count = int(sys.argv[2])
for begin in range(0, 2 * count, count):
    timed("packs", lambda: packs(range(begin, begin + count)))
found["packed"] = memory()
dataset.set_epoch(1)
timed("epoch", lambda: dataset[0])
found["planned"] = memory()
numbers = dataset.plan.sample_index[:1000].tolist()
timed("again", lambda: [dataset.samples[n] for n in numbers])
print(json.dumps(found))
"""


def look(folder: Path, num_packs: int) -> dict[str, Any]:
    """Measurements of a new process: milliseconds, and memory in MiB, its own and with the pages of files."""
    command = [sys.executable, "-c", LOOK, str(folder), str(num_packs)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.cpu
def test_open(tmp_path, benchmark, recorder, quick):
    rows, rounds = (3000, 1) if quick else (10_000, 5)
    write(tmp_path / "store", rows)
    found = [benchmark.pedantic(lambda: look(tmp_path / "store", 5), rounds=1)]
    found += [look(tmp_path / "store", 5) for _ in range(rounds - 1)]
    print()
    for name in ("open", "plan", "packs"):
        values = [one[f"{name} ms"] for one in found]
        recorder.add(
            "opening", "mmpack", name, metric="time", unit="ms", x=("rows", rows), values=values
        )
        print(f"{name}: {np.median(values):.1f} ms; {rows} rows")
    start = time.perf_counter()
    for path in (tmp_path / "store").glob("*.npy"):
        path.read_bytes()
    values = [1e3 * (time.perf_counter() - start)]
    recorder.add(
        "opening", CEILING, "open", metric="time", unit="ms", x=("rows", rows), values=values
    )


def main() -> None:
    """The table in the log."""
    folder = Path(sys.argv[1])
    for rows in [int(text) for text in sys.argv[2:]] or [10_000, 1_000_000]:
        store = folder / str(rows)
        if not (store / "plan.json").exists():
            write(store, rows)
        found = [look(store, NUM_PACKS) for _ in range(5)]
        of = {name: np.median([one[name] for one in found], axis=0) for name in found[0]}
        size = sum(path.stat().st_size for path in store.iterdir()) / 1e6
        print(
            f"{rows:,} rows, {size:,.0f} MB: opened in {of['open ms']:.0f} ms, the plan in "
            f"{of['plan ms']:.0f}, both and their checks {of['both ms']:.0f}; "
            f"{of['packs ms'] / NUM_PACKS:.1f} ms per pack without pixels, {of['again ms']:.1f} us per sample "
            f"seen before, {of['epoch ms']:.0f} ms to plan an epoch; MiB of its own, and with the files' pages: "
            + ", ".join(
                f"{name} {of[name][0]:.0f}, {of[name][1]:.0f}"
                for name in ("nothing", "opened", "packed", "planned")
            )
        )


if __name__ == "__main__":
    main()
