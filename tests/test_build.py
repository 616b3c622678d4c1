"""Indexing: the same samples, errors and order for any number of processes, and what is reused."""

import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pyarrow")

from mmpack import PackedDataset, Reader
from mmpack.cli.main import main
from mmpack.data import images
from mmpack.data.content_parts import MediaPart
from mmpack.data.conversations import Turn
from mmpack.data.file_formats import count_rows
from mmpack.data.readers import RowReader
from mmpack.store import build
from mmpack.store.build import index_rows
from mmpack.store.encoded_store import open_store
from mmpack.types import ImageRef


@pytest.fixture
def rows(tmp_path):
    """Two files of 600 and 150 rows, several of them bad for several reasons."""
    Image.new("RGB", (60, 90)).save(tmp_path / "a.png")
    for name, count in (("a.jsonl", 600), ("b.jsonl", 150)):
        lines = []
        for n in range(count):
            turns = [{"from": "human", "value": f"<image>{n}?"}, {"from": "gpt", "value": "y" * n}]
            row = {"conversations": turns, "images": ["a.png"]}
            if n % 97 == 5:
                row["images"] = ["missing.png"]
            if n % 89 == 7:
                row["images"] = ["a.png", "a.png"]
            lines.append("{" if n % 101 == 11 else json.dumps(row))
        (tmp_path / name).write_text("\n".join(lines))
    return [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]


def indexed(files, encoder, jobs, on_error="raise"):
    """(batches, what ended it)"""
    encoder = replace(encoder, on_error=on_error)
    done = []
    try:
        for one in index_rows(list(encoder.groups(files)), encoder, jobs=jobs):
            done.append(one.batch)
    except ValueError as error:
        return done, str(error)
    return done, None


def test_any_number_of_processes_does_the_same(rows, encoder):
    outcomes = []
    for jobs in (1, 2, None):
        bad_rows = []
        batches, error = indexed(rows, encoder, jobs, bad_rows)
        assert error is None
        outcomes.append((batches, [(bad.source, str(bad), bad.content) for bad in bad_rows]))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    batches, bad_rows = outcomes[0]
    assert len(batches) == 4
    assert len(bad_rows) > 15
    numbers = [int(text.split()[1]) for source, text, _ in bad_rows if source == "a.jsonl"]
    assert numbers == sorted(numbers)

    # The first bad row ends it, and a file that is none ends it after the rows before it.
    raised = [indexed(rows, encoder, jobs)[1] for jobs in (1, 2)]
    assert raised[0] == raised[1] == bad_rows[0][1]
    broken = rows[0].with_name("broken.json")
    broken.write_text("[")
    ended = [indexed([*rows, broken, rows[0]], encoder, jobs, []) for jobs in (1, 2)]
    assert ended[0] == ended[1]
    assert ended[0][0] == batches
    assert ended[0][1].startswith("broken.json is not a JSON array")


def test_a_data_set_made_by_processes(rows, encoder):
    """`from_files(jobs=)`: equal samples and bad rows, in memory."""
    made = []
    for jobs in (1, 2):
        bad_rows = []
        skipping = replace(encoder, on_error=bad_rows)
        dataset = PackedDataset.from_files(rows, skipping, 512, jobs=jobs)
        made.append((dataset.fingerprint(), dataset.media_folders, sorted(map(str, bad_rows))))
    assert made[0] == made[1]
    assert len(bad_rows) > 15


def test_a_worker_that_dies_is_told(rows, encoder, monkeypatch):
    chunks = build._chunks

    def killed(groups):
        for number, chunk in enumerate(chunks(groups)):
            if number == 2:
                children = subprocess.check_output(["pgrep", "-P", forkserver()], text=True)
                os.kill(int(children.split()[0]), signal.SIGKILL)
            yield chunk

    def forkserver():
        from multiprocessing.forkserver import _forkserver

        return str(_forkserver._forkserver_pid)

    monkeypatch.setattr(build, "_chunks", killed)
    _, error = indexed(rows, encoder, 2, [])
    assert error.startswith("a worker process died")


def test_skipped_rows_warn(rows, encoder):
    with pytest.warns(UserWarning, match="left out row 5 of b.jsonl") as warned:
        indexed(rows[1], encoder, 1, "skip")
    assert len(warned) == 7
    with pytest.raises(ValueError, match=r"--jobs \(jobs\) must be positive, got 0"):
        next(index_rows([], encoder, jobs=0))


@pytest.fixture
def pack(rows, shared, tmp_path, capsys):
    """Run `mmpack pack` on the rows: (its exit code, its report or error)."""

    def run(*options):
        arguments = ["pack", str(rows[1]), "--out", str(tmp_path / "out"), "--json"]
        arguments += ["--tokenizer", str(shared / "tokenizer" / "qwen2_vl"), "--on-error", "skip"]
        capacity = [] if "--capacity" in options else ["--capacity", "4096"]
        code = main([*arguments, *capacity, *options])
        out, err = capsys.readouterr()
        return code, err if code else json.loads(out)

    return run


def test_the_same_again_encodes_nothing(pack, tmp_path, rows, monkeypatch):
    _, first = pack()
    assert not first["reused"]
    before = (tmp_path / "out" / "samples.arrow").stat()
    bad_rows = (tmp_path / "out" / "bad_rows.jsonl").read_text()

    with monkeypatch.context() as patch:
        patch.setattr(build, "index_rows", None)
        code, again = pack()
        assert code == 0
        assert again["reused"]
        assert {**again, "reused": 0, "seconds": 0} == {**first, "reused": 0, "seconds": 0}
        # Another plan is made of the samples that are there, if one may be replaced.
        code, error = pack("--capacity", "2048")
        assert "choose another --out, or --overwrite it: capacity changed since" in error
        assert pack("--capacity", "2048", "--overwrite")[1]["reused"]
    after = (tmp_path / "out" / "samples.arrow").stat()
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    assert (tmp_path / "out" / "bad_rows.jsonl").read_text() == bad_rows
    assert len(open_store(tmp_path / "out")) == first["rows"] - first["bad_rows"]
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.parametrize("change", ["data", "image", "setting", "format"])
def test_what_changed_is_named(pack, tmp_path, rows, change):
    assert pack()[0] == 0
    options = []
    if change == "data":
        rows[1].write_text(rows[1].read_text() + "\n{")
        name = "b.jsonl changed since"
    elif change == "image":
        time.sleep(0.02)
        Image.new("RGB", (90, 90)).save(tmp_path / "a.png")
        name = "a.png changed since"
    elif change == "setting":
        options = ["--mask-history"]
        name = "mask_history changed since"
    else:
        (tmp_path / "out" / "mmpack.json").write_text('{"format": 2}')
        name = "store format 2, not 13"
    code, error = pack(*options)
    assert code == 1
    assert name in error
    assert not pack(*options, "--overwrite")[1]["reused"]


def fork_servers(pid):
    """The fork servers that a process has started; where there is no /proc, none are found."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        found = [Path(f"/proc/{child}/cmdline") for child in children.read_text().split()]
        return [one for one in found if "forkserver" in one.read_text()]
    except OSError:
        return []


@pytest.mark.parametrize("begun", ["partial", "imports"])
def test_ctrl_c_leaves_nothing(rows, shared, tmp_path, begun):
    """Sent to all processes, as by a terminal; also while the fork server imports what workers need."""
    command = [sys.executable, "-m", "mmpack", "pack", *map(str, rows), "--jobs", "2"]
    command += ["--tokenizer", str(shared / "tokenizer" / "qwen2_vl"), "--capacity", "4096"]
    command += ["--out", str(tmp_path / "out"), "--on-error", "skip"]
    # A shell lets what it starts in the background ignore Ctrl-C, and children inherit that.
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    options = {"stderr": subprocess.PIPE, "text": True, "preexec_fn": hear}
    with subprocess.Popen(command, **options, start_new_session=True) as process:
        while not list(tmp_path.glob("out.partial*")) and process.poll() is None:
            time.sleep(0.01)
        if begun == "imports":
            if not Path("/proc").exists():
                process.kill()
                pytest.skip("needs /proc, to see when the fork server starts")
            while not fork_servers(process.pid) and process.poll() is None:
                time.sleep(0.01)
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        error = process.communicate(timeout=60)[1]  # at its end when workers have ended, too
    assert process.returncode == 130
    assert error.endswith("mmpack: interrupted\n")
    assert "Traceback" not in error
    assert not list(tmp_path.glob("out*"))


def test_rows_are_counted_unread(rows, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows[0].write_text("{}\n{}\n{}")
    assert count_rows(rows[0]) in (2, 3)  # a bar may end one early
    pyarrow.parquet.write_table(pyarrow.table({"a": [1, 2, 3]}), tmp_path / "a.parquet")
    assert count_rows(tmp_path / "a.parquet") == 3
    (tmp_path / "b.parquet").write_text("no")
    for name in ("b.parquet", "none.jsonl", "a.csv"):
        assert count_rows(tmp_path / name) is None


def test_data_uris_are_not_remembered(tmp_path):
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    from base64 import b64encode

    uri = "data:image/png;base64," + b64encode((tmp_path / "a.png").read_bytes()).decode()
    how = Reader(media_dir=[tmp_path, "data:"])
    (group,) = how.groups([{}])
    reader = RowReader(how, group)
    for value in (uri, "a.png"):
        turns = [Turn("user", ["?"]), Turn("user", [MediaPart()])]
        reader.place_media(turns, {"image": [value]})
    assert reader._file.cache_info().currsize == 1


def test_a_store_travels_as_its_path(realset, vision, tmp_path):
    from mmpack.store.encoded_store import write_store

    store = write_store(tmp_path / "store", realset[:600], vision)
    sent = pickle.dumps(store)
    assert len(sent) < 1000
    other = pickle.loads(sent)
    for number in (0, 255, 256, 599, -1):
        assert np.array_equal(store[number].labels, realset[:600][number].labels)
        assert np.array_equal(other[number].input_ids, realset[:600][number].input_ids)
    with pytest.raises(IndexError, match="sample 600 of 600"):
        store[600]


def test_other_readers_take_a_store(realset, vision, tmp_path):
    datasets = pytest.importorskip("datasets")
    from mmpack.store.encoded_store import write_store

    write_store(tmp_path / "store", realset[:300], vision)
    table = datasets.Dataset.from_file(str(tmp_path / "store" / "samples.arrow"))
    assert table.num_rows == 300
    assert table[299]["input_ids"] == realset[299].input_ids.tolist()


def encoded_pictures():
    """WebP pictures of several kinds."""
    rng = np.random.default_rng(0)
    for size in [(1, 1), (40, 60), (61, 33)]:
        picture = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        clear = picture.convert("RGBA")
        clear.putalpha(100)
        for one in (picture, clear):
            for lossless in (False, True):
                buffer = io.BytesIO()
                one.save(buffer, "WEBP", lossless=lossless)
                yield buffer.getvalue()
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", save_all=True, append_images=[picture.rotate(90)])
    yield buffer.getvalue()


@pytest.mark.parametrize("count", [2000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_webp_sizes_are_pillows(count):
    generator = random.Random(0)
    pictures = list(encoded_pictures())
    known = 0
    for number in range(count):
        data = bytearray(generator.choice(pictures))
        for _ in range(generator.choice([0, 1, 1, 2, 3]) if number >= len(pictures) else 0):
            if generator.random() < 0.8:
                data[generator.randrange(min(len(data), 34))] = generator.choice([0, 1, 255])
            elif len(data) > 30:
                del data[generator.randrange(30, len(data)) :]
        size = images._webp_size(ImageRef("a.webp", bytes(data)))
        if size is not None:
            known += 1
            with Image.open(io.BytesIO(data)) as opened:
                assert (opened.height, opened.width) == size
    assert known > count // 5


def test_webp_files_are_looked_at_without_a_decoder(tmp_path, monkeypatch):
    Image.new("RGB", (60, 90)).save(tmp_path / "a.webp")
    monkeypatch.setattr(images, "_open", None)
    assert images.probe(ImageRef(str(tmp_path / "a.webp"))) == (90, 60)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # then Pillow is asked
    assert images._webp_size(ImageRef(str(tmp_path / "a.webp"))) is None
