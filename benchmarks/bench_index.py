"""What does it cost to index rows, against only tokenising them and against transformers' processor?

Rows are the real ones where they lie beside the checkout. Indexing is all of it: reading the file,
checking rows, image headers, template, ids, labels, batches on disk. The floor is transformers' chat
template and one batched call of its tokenizer on conversations at hand. `python -m
benchmarks.bench_index ROWS FOLDER` indexes synthetic JSON lines, texts as long as the real ones, and
says what memory the whole process tree took.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
REALSET = SHARED / "realset" / "realset_sft.json"
MAX_PIXELS = 28 * 28 * 1280


@pytest.fixture(scope="module")
def parts():
    if not REALSET.is_file():
        pytest.skip("needs the real rows, which are not here")
    from mmpack.hf.training import load_processor

    return load_processor(SHARED / "tokenizer" / "qwen2_vl", MAX_PIXELS)


@pytest.fixture(scope="module")
def samples(parts, quick):
    from mmpack import read_samples

    return list(read_samples(REALSET))[: 200 if quick else None]


def index(path, parts, folder, jobs=None):
    """Index a file into a store."""
    from mmpack.index import index_rows
    from mmpack.readers import row_groups
    from mmpack.store import write_batches

    tokenizer, vision = parts
    rows = index_rows(list(row_groups(path, None, REALSET.parent)), tokenizer, vision, jobs=jobs)
    batches = (indexed.batch for indexed in rows if indexed.batch)
    return write_batches(folder, batches, vision, {})


def chats(samples):
    """Conversations as transformers' processor takes them, and the images of each."""
    for sample in samples:
        chat = [
            {
                "role": message.role,
                "content": [
                    {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                    for part in message.content
                ],
            }
            for message in sample.messages
        ]
        yield chat, [image.path for image in sample.images]


def test_index(parts, samples, tmp_path, benchmark, recorder, quick):
    from PIL import Image
    from transformers import Qwen2VLImageProcessorPil

    from benchmarks.harness import time_ms

    tokenizer, vision = parts
    rows = json.loads(REALSET.read_text(encoding="utf-8"))[: len(samples)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    conversations, files = zip(*chats(samples))
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": vision.min_pixels, "longest_edge": vision.max_pixels}
    )
    names = (tmp_path / str(n) for n in range(1000))

    def tokenize(conversations):
        texts = tokenizer.apply_chat_template(conversations, tokenize=False)
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)

    def process():
        """The processor's way over a part of the rows: pixels are made to know their grids."""
        part = slice(None, None, 10)
        for paths in files[part]:
            if paths:
                pictures = [Image.open(path).convert("RGB") for path in paths]
                processor(images=pictures, return_tensors="np")
        tokenize(list(conversations[part]))

    rounds = 1 if quick else 7
    candidates = {
        "mmpack": lambda: index(path, parts, next(names)),
        "template and tokenizer": lambda: tokenize(list(conversations)),
    }
    times = time_ms(candidates, rounds=rounds, warmup=1)
    tenth = time_ms({"process": process}, rounds=1 if quick else 3, warmup=0)["process"]
    times["transformers' processor"] = [ms * len(samples) / len(files[::10]) for ms in tenth]
    config = f"rows={len(samples)} images={sum(map(len, files))}"
    print()
    for impl, values in times.items():
        x = ("rows", len(samples))
        recorder.add(
            "index", impl, "index", metric="time", unit="ms", x=x, values=values, config=config
        )
        ratio = np.median(values) / np.median(times["template and tokenizer"])
        print(f"{impl}: {np.median(values):.0f} ms, {ratio:.2f} x tokenising alone; {config}")
    benchmark.pedantic(candidates["mmpack"], rounds=1)


def test_headers(parts, benchmark, recorder, quick):
    from benchmarks.harness import time_ms
    from mmpack import images
    from mmpack.types import ImageRef

    folder = REALSET.parent
    lines = (folder / "image_meta.jsonl").read_text().splitlines()[: 100 if quick else None]
    refs = [ImageRef(str(folder / json.loads(line)["path"])) for line in lines]

    def just_open():
        for image in refs:
            with open(image.path, "rb") as file:
                file.read(1)

    candidates = {"mmpack": lambda: [images.probe(image) for image in refs], "open": just_open}
    times = time_ms(candidates, rounds=2 if quick else 20)
    print()
    for impl, values in times.items():
        us = [1e3 * ms / len(refs) for ms in values]
        x = ("images", len(refs))
        recorder.add("headers", impl, "size", metric="time", unit="us", x=x, values=us)
        print(f"{impl}: {np.median(us):.1f} us an image of {len(refs)}")
    benchmark.pedantic(candidates["mmpack"], rounds=1)


def test_samples_of_a_store(parts, samples, tmp_path, benchmark, recorder, quick):
    from benchmarks.harness import time_ms
    from mmpack.encode import encode_samples
    from mmpack.store import write_store

    store = write_store(tmp_path / "store", encode_samples(samples, *parts), parts[1], {})
    numbers = np.random.default_rng(0).integers(0, len(store), 50).tolist()

    def fetch():
        return [store[number] for number in numbers]

    times = time_ms({"mmpack": fetch}, rounds=5 if quick else 100)["mmpack"]
    us = [1e3 * ms / len(numbers) for ms in times]
    x = ("samples", len(numbers))
    recorder.add("store", "mmpack", "fetch", metric="time", unit="us", x=x, values=us)
    print(f"\na sample of a store: {np.median(us):.1f} us")
    benchmark.pedantic(fetch, rounds=1)


def write_rows(path: Path, num_rows: int) -> None:
    """JSON lines, text only: words of the real rows, as many tokens a row as real rows have."""
    words = " ".join(
        turn["value"]
        for row in json.loads(REALSET.read_text(encoding="utf-8"))
        for turn in row["conversations"]
    ).split()
    data = np.load(SHARED / "lengths" / "sft_mix.npz")
    rng = np.random.default_rng(0)
    tokens = rng.choice(data["text_tokens"][~data["imputed"]], num_rows)
    # 1.3 tokens a word, and 22 of the template; the log states what came of it
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
    """Appends, twice a second, the MiB this process group has: PSS, shared pages counted once."""
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
    from mmpack.hf.training import load_processor

    num_rows, folder = int(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{num_rows}.jsonl"
    if not path.exists():
        write_rows(path, num_rows)
    parts = load_processor(SHARED / "tokenizer" / "qwen2_vl", MAX_PIXELS)
    peaks, done = [0.0], threading.Event()
    watcher = threading.Thread(target=watch_memory, args=(peaks, done), daemon=True)
    watcher.start()
    jobs = int(sys.argv[3]) if len(sys.argv) > 3 else None
    start = time.perf_counter()
    store = index(path, parts, folder / f"store{time.time_ns()}", jobs)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    print(
        f"{len(store):,} rows, {store.num_tokens.mean():.0f} tokens each, in {seconds:.1f} s, "
        f"{len(store) / seconds:,.0f} rows/s, at most {max(peaks):,.0f} MiB"
    )


if __name__ == "__main__":
    main()
