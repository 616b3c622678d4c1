"""What does it cost to index rows, compared with only tokenizing them and with transformers' processor?

Uses the real rows, and is skipped if they are not beside the checkout. Indexing includes reading the file,
checking rows, image headers, template, ids, labels and batches on disk. The peer is transformers' processor; the
ceiling is the chat template and one batched call of the tokenizer on conversations in memory.

And what do the ways cost that rows come: JSON lines, Parquet with the images' bytes, a `datasets` stream, tar
shards on disk and over HTTP (loopback), in rows and images per second? The peers of reading are `datasets` and
`webdataset`, which give the same rows and image sizes of the same files and check nothing; of a Ray, as many
processes.

`python -m benchmarks.bench_index ROWS FOLDER` indexes synthetic JSON lines with texts of realistic lengths, and
prints the memory of the whole process tree.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.harness import CEILING, SHARED, measure, time_ms
from benchmarks.peer_collators import chat_of
from benchmarks.range_server import serving
from benchmarks.row_sources import (
    REALSET,
    opened,
    read_by_datasets,
    read_by_webdataset,
    write_sources,
)
from mmpack import Encoder

pytestmark = pytest.mark.cpu

MAX_PIXELS = 28 * 28 * 1280


@pytest.fixture(scope="module")
def encoder():
    if not REALSET.is_file():
        pytest.skip("needs the real rows, which are not here")
    return Encoder.from_folder(SHARED / "tokenizer" / "qwen2_vl", max_pixels=MAX_PIXELS)


@pytest.fixture(scope="module")
def samples(encoder, quick):
    return list(encoder.read(REALSET))[: 200 if quick else None]


def index(path, encoder, folder, jobs=None, ray=None):
    """Index a file, or rows, into a store."""
    from mmpack.store.build import index_rows
    from mmpack.store.encoded_store import write_batches

    encoder = replace(encoder, media_dir=REALSET.parent)
    rows = index_rows(list(encoder.groups(path)), encoder, jobs=jobs, ray=ray)
    batches = (indexed.batch for indexed in rows if indexed.batch)
    return write_batches(folder, batches, encoder.vision)


def test_build(encoder, samples, tmp_path, benchmark, recorder, quick):
    from PIL import Image
    from transformers import Qwen2VLImageProcessorPil

    tokenizer, vision = encoder.tokenizer, encoder.vision
    rows = json.loads(REALSET.read_text(encoding="utf-8"))[: len(samples)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    conversations = [chat_of(sample) for sample in samples]
    files = [[image.path for image in sample.images] for sample in samples]
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": vision.min_pixels, "longest_edge": vision.max_pixels}
    )
    names = (tmp_path / str(n) for n in range(1000))

    def tokenize(conversations):
        texts = tokenizer.apply_chat_template(conversations, tokenize=False)
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)

    def process():
        """The processor on a part of the rows, which computes pixels to know their grids."""
        part = slice(None, None, 10)
        for paths in files[part]:
            if paths:
                pictures = [Image.open(path).convert("RGB") for path in paths]
                processor(images=pictures, return_tensors="np")
        tokenize(conversations[part])

    rounds = 1 if quick else 7
    candidates = {
        "mmpack": lambda: index(path, encoder, next(names)),
        CEILING: lambda: tokenize(conversations),
    }
    x, config = ("rows", len(samples)), f"rows={len(samples)} images={sum(map(len, files))}"
    medians = measure(
        recorder, "index", "index", candidates, x=x, config=config, rounds=rounds, warmup=1,
        on_host=True,
    )  # fmt: skip
    tenth = time_ms({"process": process}, rounds=1 if quick else 3, warmup=0)["process"]
    processed = [ms * len(samples) / len(files[::10]) for ms in tenth]
    recorder.add(
        "index", "transformers", "index", metric="time", unit="ms", x=x, values=processed,
        config=config,
    )  # fmt: skip
    floor = medians[CEILING]
    print(f"x template and tokenizer: {medians['mmpack'] / floor:.2f}", end=", ")
    print(f"transformers' processor {np.median(processed) / floor:.1f}")
    benchmark.pedantic(candidates["mmpack"], rounds=1)


def test_sources(encoder, tmp_path, benchmark, recorder, quick):
    rows = json.loads(REALSET.read_text(encoding="utf-8"))[: 60 if quick else None]
    sources = write_sources(rows, tmp_path)
    reader = replace(encoder, media_dir=REALSET.parent)
    names = (tmp_path / str(n) for n in range(1000))
    rounds = 1 if quick else 5
    with ExitStack() as stack:
        if find_spec("aiohttp") is None:
            print("\nnothing reads over HTTP here: pip install 'mmpack[remote]'")
        else:
            url = stack.enter_context(serving(tmp_path))
            shards = len(list(sources["tar shards"].iterdir()))
            sources["tar shards over HTTP"] = f"{url}/shards/{{000..{shards - 1:03d}}}.tar"
        candidates: dict[str, Callable[[], Any]] = {
            name: lambda name=name: sum(1 for _ in reader.read(opened(sources[name], name)))
            for name in sources
        }
        candidates["datasets"] = lambda: read_by_datasets(sources["Parquet"])
        if find_spec("webdataset") is None:
            print("\nthe peer is not installed: pip install --no-deps webdataset braceexpand")
        else:
            candidates["webdataset"] = lambda: read_by_webdataset(sources["tar shards"])
        assert {run() for run in candidates.values()} == {len(rows)}
        times = time_ms(candidates, rounds=rounds, warmup=0, on_host=True)
        tell_rates(recorder, "read", times, rows)

        candidates = {
            name: lambda name=name: index(opened(sources[name], name), encoder, next(names), 1)
            for name in sources
        }
        assert {len(run()) for run in candidates.values()} == {len(rows)}
        times = time_ms(candidates, rounds=rounds, warmup=0, on_host=True)
        tell_rates(recorder, "index", times, rows)
    benchmark.pedantic(candidates["tar shards"], rounds=1)


def test_in_parallel(encoder, tmp_path, benchmark, recorder, quick):
    """Processes are started anew in each round, for about three seconds, and Ray's before the first one; both load
    the tokenizer in each round. Ray's workers have nice 15: beside other work they starve."""
    if quick:
        pytest.skip("starting processes takes longer than the rest of the quick benchmarks")
    rows = json.loads(REALSET.read_text(encoding="utf-8")) * 4
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    names = (tmp_path / str(n) for n in range(1000))
    candidates = {
        "1 process": lambda: index(path, encoder, next(names), 1),
        "2 processes": lambda: index(path, encoder, next(names), 2),
    }
    with ray_of_two() as has_ray:
        if has_ray:
            candidates["Ray, 2 workers"] = lambda: index(path, encoder, next(names), ray="local")
        times = time_ms(candidates, rounds=3, warmup=1, on_host=True)
    tell_rates(recorder, "in parallel", times, rows)
    benchmark.pedantic(candidates["1 process"], rounds=1)


def tell_rates(recorder, mode: str, times: dict[str, list[float]], rows: list[Any]) -> None:
    """Record and print rows and images per second of each candidate."""
    num_images = sum(len(row["images"]) for row in rows)
    for name, taken in times.items():
        rates = {"rows": len(rows), "images": num_images}
        for metric, number in rates.items():
            recorder.add(
                "sources", name, mode, metric=metric, unit="1/s", x=("rows", len(rows)),
                values=[1000 * number / ms for ms in taken], config=f"images={num_images}",
            )  # fmt: skip
        told = (f"{1000 * n / np.median(taken):,.0f} {metric}/s" for metric, n in rates.items())
        print(f"{mode}, {name}: {', '.join(told)}")


@contextmanager
def ray_of_two() -> Iterator[bool]:
    """A Ray with two workers on this machine, for the block; False: it is not installed."""
    if find_spec("ray") is None:
        print("\nRay is not installed: pip install 'mmpack[ray]'")
        yield False
        return
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
    try:
        yield True
    finally:
        ray.shutdown()


def test_headers(encoder, benchmark, recorder, quick):
    from mmpack.data import images
    from mmpack.types import ImageRef

    folder = REALSET.parent
    lines = (folder / "image_meta.jsonl").read_text().splitlines()[: 100 if quick else None]
    refs = [ImageRef(str(folder / json.loads(line)["path"])) for line in lines]

    def just_open():
        for image in refs:
            with open(image.path, "rb") as file:
                file.read(1)

    candidates = {"mmpack": lambda: [images.probe(image) for image in refs], CEILING: just_open}
    measure(
        recorder, "headers", "size", candidates, x=("images", len(refs)), per=("us", len(refs)),
        rounds=2 if quick else 20, on_host=True,
    )  # fmt: skip
    benchmark.pedantic(candidates["mmpack"], rounds=1)


def test_samples_of_a_store(encoder, samples, tmp_path, benchmark, recorder, quick):
    from mmpack.store.encoded_store import write_store

    store = write_store(tmp_path / "store", encoder.encode(samples), encoder.vision)
    numbers = np.random.default_rng(0).integers(0, len(store), 50).tolist()

    def fetch():
        return [store[number] for number in numbers]

    measure(
        recorder, "store", "fetch", {"mmpack": fetch}, x=("samples", len(numbers)),
        per=("us", len(numbers)), rounds=5 if quick else 100, on_host=True,
    )  # fmt: skip
    benchmark.pedantic(fetch, rounds=1)


def write_rows(path: Path, num_rows: int) -> None:
    """JSON lines, text only: words of the real rows, with their number of tokens per row."""
    words = " ".join(
        turn["value"]
        for row in json.loads(REALSET.read_text(encoding="utf-8"))
        for turn in row["conversations"]
    ).split()
    data = np.load(SHARED / "lengths" / "sft_mix.npz")
    rng = np.random.default_rng(0)
    tokens = rng.choice(data["text_tokens"][~data["imputed"]], num_rows)
    # 1.3 tokens per word, plus 22 of the template; the log states the result
    lengths = np.maximum(2, (tokens - 22) / 1.3).astype(int)
    starts = rng.integers(0, len(words) - lengths.max() - 1, num_rows)
    with path.open("w", encoding="utf-8") as file:
        for start, length in zip(starts.tolist(), lengths.tolist()):
            middle = start + max(1, length // 2)
            turns = [words[start:middle], words[middle : start + length]]
            values = [" ".join(turn).replace("<image>", "picture") for turn in turns]
            conversation = [
                {"from": who, "value": value} for who, value in zip(("human", "gpt"), values)
            ]
            file.write(json.dumps({"conversations": conversation}, ensure_ascii=False) + "\n")


def watch_memory(peaks: list[float], done: threading.Event) -> None:
    """Append this process group's memory in MiB twice per second: PSS, which counts shared pages once."""
    while not done.wait(0.5):
        kib = 0
        for process in Path("/proc").glob("[0-9]*"):
            try:
                group = int((process / "stat").read_text().rsplit(")", 1)[1].split()[2])
                if group == os.getpgrp():
                    lines = (process / "smaps_rollup").read_text().splitlines()
                    kib += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            except OSError:  # it has ended
                continue
        peaks.append(kib / 1024)


def main() -> None:
    """Index ROWS synthetic rows in FOLDER."""
    num_rows, folder = int(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{num_rows}.jsonl"
    if not path.exists():
        write_rows(path, num_rows)
    encoder = Encoder.from_folder(SHARED / "tokenizer" / "qwen2_vl", max_pixels=MAX_PIXELS)
    peaks, done = [0.0], threading.Event()
    watcher = threading.Thread(target=watch_memory, args=(peaks, done), daemon=True)
    watcher.start()
    jobs = int(sys.argv[3]) if len(sys.argv) > 3 else None
    start = time.perf_counter()
    store = index(path, encoder, folder / f"store{time.time_ns()}", jobs)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    print(
        f"{len(store):,} rows, {store.num_tokens.mean():.0f} tokens each, in {seconds:.1f} s, "
        f"{len(store) / seconds:,.0f} rows/s, at most {max(peaks):,.0f} MiB"
    )


if __name__ == "__main__":
    main()
