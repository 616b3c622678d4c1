"""Mutated data files of every kind, each batch in a process of its own: rows, refusals, never a crash.

`python -m pytest -m slow tests/test_rows_fuzz.py` changes 20,000 bytes behind each door; a failing case is named
by its kind and number, `mutated(kind, number)` makes it again.
"""

import gzip
import json
import os
import random
import resource
import signal
import sys
import traceback
import warnings

import pytest

from mmpack import Reader
from mmpack.data.file_formats import count_rows

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

HOSTILE = (-1, -8, 0, 1, 127, 2**16, 2**31 - 1, 2**31, 2**40, 2**63 - 1)
MEMORY = 8 << 30  # of address space: what asks for more than it holds fails here
SECONDS = 20  # of CPU a batch


def table():
    """Types that data sets have, and some that none has."""
    count = range(24)
    turns = [[{"from": "human", "value": f"Hi {n}"}, {"from": "gpt", "value": "Ho"}] for n in count]
    columns = {
        "conversations": turns,
        "id": pa.array(count),
        "when": pa.array(count, pa.timestamp("us", "Europe/Berlin")),
        "day": pa.array(count, pa.int32()).cast(pa.date32()),
        "time": pa.array(count, pa.time64("us")),
        "span": pa.array(count, pa.duration("s")),
        "number": pa.array(count, pa.decimal128(30, 2)),
        "source": pa.array([f"s{n % 3}" for n in count]).dictionary_encode(),
        "picture": [{"data": b"x" * n, "path": None} for n in count],
        "map": pa.array([[("a", n)] for n in count], pa.map_(pa.string(), pa.int64())),
        "pair": pa.array([[n, n] for n in count], pa.list_(pa.int32(), 2)),
        "long": pa.array([["x"] * (n % 3) for n in count], pa.large_list(pa.large_string())),
        "flag": pa.array([None if n % 2 else True for n in count]),
        "key": pa.array([b"abcd"] * 24, pa.binary(4)),
        "view": pa.array(
            [f"a text that is longer than a view: {n}" for n in count], pa.string_view()
        ),
        "bytes": pa.array([b"bytes that are longer than a view"] * 24, pa.binary_view()),
    }
    return pa.table(columns)


def written(opener, **options):
    sink = pa.BufferOutputStream()
    with opener(sink, table().schema, **options) as writer:
        writer.write_table(table(), **({} if opener is pq.ParquetWriter else {"max_chunksize": 10}))
    return sink.getvalue().to_pybytes()


def seeds():
    """file name -> its bytes, unharmed"""
    rows = table().select(["conversations", "id"]).to_pylist()
    array = json.dumps(rows).encode()
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    comma = "instruction,output,history\n" + 'Hi,"Ho, \u4e2d","[[""a"", ""b""]]"\n' * 12
    files = {"a.json": array, "a.jsonl": lines, "a.csv": comma.encode()}
    for name in list(files):
        files[f"{name}.gz"] = gzip.compress(files[name])
        files[f"{name}.zst"] = pa.compress(files[name], "zstd", asbytes=True)
    files["stream.arrow"] = written(pa.ipc.new_stream)
    files["file.arrow"] = written(pa.ipc.new_file)
    for codec in ("lz4", "zstd"):
        options = pa.ipc.IpcWriteOptions(compression=codec)
        files[f"{codec}.arrow"] = written(pa.ipc.new_file, options=options)
    files["snappy.parquet"] = written(pq.ParquetWriter)
    files["plain.parquet"] = written(pq.ParquetWriter, compression="none", use_dictionary=False)
    files["v2.parquet"] = written(pq.ParquetWriter, compression="zstd", data_page_version="2.0")
    return files


SEEDS = seeds()


def mutated(kind, number):
    """The file with one to four places changed, and how many bytes that are."""
    rng = random.Random(f"{kind} {number}")
    data, changed = bytearray(SEEDS[kind]), 0
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        place, way = rng.randrange(len(data)), rng.random()
        if way < 0.6:
            data[place] ^= 1 << rng.randrange(8)
            changed += 1
        elif way < 0.8:
            data[place] = rng.choice([0, 1, 127, 128, 255])
            changed += 1
        elif way < 0.93:
            value = rng.choice(HOSTILE).to_bytes(8, "little", signed=True)[: rng.choice([4, 8])]
            data[place : place + len(value)] = value
            changed += len(value)
        elif way < 0.97:
            data[place : place + rng.choice([0, 1, 5])] = rng.choice(
                [b'"', b"[" * 50, b"9" * 50, b"\n"]
            )
            changed += 1
        else:
            del data[max(place, 12) :]
            changed += 1
    return bytes(data), changed


def outcome(path):
    """ "rows", "refused", or what went wrong."""
    bad_rows = []
    try:
        count_rows(path)  # for a progress bar: None where it cannot
        count = len(list(Reader(on_error=bad_rows).read(path)))
    except ValueError as error:
        return (
            "refused" if 0 < len(str(error)) < 3000 else f"an error of {len(str(error))} characters"
        )
    except BaseException:
        return traceback.format_exc()
    if not all(len(str(bad)) < 3000 for bad in bad_rows):
        return "a long reason"
    return "rows" if count or bad_rows else "nothing"


def child(kind, numbers, folder, pipe):
    warnings.simplefilter("ignore")
    for what in (resource.RLIMIT_AS, resource.RLIMIT_CORE):
        resource.setrlimit(what, (MEMORY if what == resource.RLIMIT_AS else 0,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    path = folder / kind
    for number in numbers:
        os.write(
            pipe, f"{json.dumps([number, None])}\n".encode()
        )  # which one, should it be the last
        path.write_bytes(mutated(kind, number)[0])
        os.write(pipe, f"{json.dumps([number, outcome(path)])}\n".encode())


def outcomes(kind, count, folder):
    """Of each number what came of it, in a child that is replaced where it dies."""
    found, todo = {}, list(range(count))
    while todo:
        reader, pipe = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(reader)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                child(kind, todo, folder, pipe)
            finally:
                os._exit(0)
        os.close(pipe)
        with os.fdopen(reader) as lines:
            found.update(map(json.loads, lines))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status < 0:
            last = max(found)
            found[last] = f"killed by {signal.Signals(-status).name}"
        todo = [number for number in todo if number not in found]
    return found


def door(kind):
    """What reads a file: one of six doors, each with some of the files."""
    return "compressed" if kind.endswith((".gz", ".zst")) else kind.rpartition(".")[2]


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and rlimits")
@pytest.mark.parametrize("is_long", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", SEEDS)
def test_mutated_files_end_in_rows_or_reasons(kind, is_long, tmp_path):
    """40 files of a kind, or as many as change 20,000 bytes behind each door."""
    num_bytes = 20_000 // sum(door(other) == door(kind) for other in SEEDS)
    count = num_bytes // 2 if is_long else 40
    (tmp_path / kind).write_bytes(SEEDS[kind])
    assert outcome(tmp_path / kind) == "rows"
    assert len(list(Reader().read(tmp_path / kind))) >= 12  # unharmed, every one is good
    found = outcomes(kind, count, tmp_path)
    wrong = {n: what for n, what in found.items() if what not in ("rows", "refused")}
    assert wrong == {}
    assert len(found) == count
    if door(kind) in ("arrow", "parquet"):
        assert {"rows", "refused"} <= set(found.values()), "one end alone is met"
    if is_long:
        assert sum(mutated(kind, number)[1] for number in range(count)) >= num_bytes
