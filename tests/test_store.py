"""Stores on shared disks: who builds, what a kill leaves, parts, damage, changed data, other readers."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pyarrow")

from mmpack import PackedDataset, assemble
from mmpack.cli import pack
from mmpack.cli.main import main
from mmpack.cli.pack import parse_shard
from mmpack.data.processor_folder import load_processor
from mmpack.store import build
from mmpack.store.atomic_folder import others, published, turn
from mmpack.store.encoded_store import open_store, write_store
from mmpack.store.manifest import About
from mmpack.store.plan_file import save_plan
from mmpack.types import PackPlan

ROWS = 600  # three chunks


@pytest.fixture(scope="module")
def data(tmp_path_factory, shared):
    """Rows, some bad, some too long, and the options to pack them."""
    folder = tmp_path_factory.mktemp("rows")
    Image.new("RGB", (60, 90)).save(folder / "a.png")
    lines = []
    for n in range(ROWS):
        words = "y " * (n % 50 + 300 * (n % 211 == 3))
        turns = [{"from": "human", "value": f"<image>{n}?"}, {"from": "gpt", "value": words + "."}]
        images = ["a.png", "a.png"] if n % 97 == 5 else ["a.png"]
        lines.append(json.dumps({"conversations": turns, "images": images}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    arguments = ["pack", folder / "rows.jsonl", "--tokenizer", shared / "tokenizer" / "qwen2_vl"]
    options = ["--capacity", 256, "--on-error", "skip", "--on-overflow", "drop", "--jobs", 1]
    return [*map(str, [*arguments, *options])]


@pytest.fixture(scope="module")
def processor(data):
    """Loaded once: it takes longer than packing the rows."""
    return load_processor(data[3])


@pytest.fixture
def run(data, processor, capsys, monkeypatch):
    """A command in this process: its report, or its error."""
    monkeypatch.setattr("mmpack.data.encoder.load_processor", lambda *options: processor)

    def run(*arguments, fails=False):
        arguments = [*(data if arguments[0] == "pack" else ["merge"]), *map(str, arguments[1:])]
        code = main([*arguments, "--json"])
        out, err = capsys.readouterr()
        assert code == (1 if fails else 0), err
        return err if fails else json.loads(out)

    return run


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The rows packed by one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main([*data, "--out", str(out)]) == 0
    return out


FORK = """
import json, mmap, os, sys, time
from mmpack.cli import main as cli, merge, pack
from mmpack.store import atomic_folder, build
from mmpack.data import encoder
processor = encoder.load_processor(sys.argv[2])
encoder.load_processor = lambda *options: processor
def kill(*args, **options): os.kill(os.getpid(), 9)
waiting = mmap.mmap(-1, 3)  # shared by forks: which of them wait
def told(n): return lambda *args, **options: (print(*args, **options), waiting.__setitem__(n, 1))
def patient(function):
    def run(*args):
        end = time.monotonic() + 60
        while sum(waiting[:]) < 2 and time.monotonic() < end: time.sleep(0.01)
        return function(*args)
    return run
children = []
for change, arguments in json.loads(sys.argv[1]):
    children.append(os.fork())
    if not children[-1]:
        exec(change)
        code = cli.main(arguments)
        sys.stdout.flush()
        os._exit(code)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def start(code, *arguments, **options):
    """A process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, **options)


# What becomes of mmpack in a process before it packs: SIGKILL with nothing written, after the samples,
# before the plan and before the rename; files that cannot grow, as on a full disk.
MOMENTS = {
    "nothing": "pack.media_folders = pack.index_rows = kill",
    "samples": "from mmpack.store import encoded_store; encoded_store.save_arrays = kill",
    "plan": "pack.plan_samples = kill",
    "rename": "import pathlib; pathlib.Path.rename = kill",
}
FULL = (
    "import resource as r, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    "r.setrlimit(r.RLIMIT_FSIZE, (100_000, 100_000))"
)


@pytest.fixture(scope="module")
def aftermath(data, tmp_path_factory):
    """Processes that pack at once, three of them to one folder: (exit codes, where, all they said)."""
    folder = tmp_path_factory.mktemp("fork")
    changes = {**MOMENTS, "full": FULL}
    # None ends before the two others wait.
    patient = "atomic_folder.print = told({}); pack.write_plan = patient(pack.write_plan)"
    changes |= {f"shared{n}": patient.format(n) for n in range(3)}
    outs = {name: folder / name.rstrip("012") / "out" for name in changes}
    commands = [(change, [*data, "--out", str(outs[name])]) for name, change in changes.items()]
    process = start(FORK, json.dumps(commands), data[3])
    said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    return dict(zip(changes, json.loads(said[0].splitlines()[-1]))), outs, "".join(said)


# Who builds


def test_one_builds_and_the_others_wait(aftermath, whole):
    codes, outs, said = aftermath
    out = outs["shared0"]
    assert [codes[f"shared{n}"] for n in range(3)] == [0, 0, 0], said
    # Who it is stands in the lock a moment after it is taken.
    whom = r"(?:process \d+ on .*|another process)"
    waits = re.findall(rf"^waiting for {whom} to build {re.escape(str(out))}$", said, re.M)
    assert len(waits) == 2, said
    assert said.count(f"nothing encoded anew: {out}") == 2
    for name in (
        "samples.arrow",
        "index.sizes.npy",
        "plan.json",
        "plan.sample_index.npy",
        "bad_rows.jsonl",
        "overflow.jsonl",
    ):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(path.name for path in out.parent.iterdir()) == [".out.lock", "out"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_a_kill_leaves_is_no_store(moment, aftermath, run, whole):
    codes, outs, _ = aftermath
    out = outs[moment]
    assert codes[moment] == -signal.SIGKILL
    left = [path.name for path in out.parent.glob("out*")]
    assert [bool(re.fullmatch(r"out\.partial-.+-\d+", name)) for name in left] == (
        [] if moment == "nothing" else [True]
    )
    run("pack", "--out", out)
    assert sorted(path.name for path in out.parent.iterdir()) == [".out.lock", "out"]
    assert (out / "plan.json").read_bytes() == (whole / "plan.json").read_bytes()


def test_a_full_disk_leaves_nothing(aftermath):
    codes, outs, said = aftermath
    assert codes["full"] == 1
    error = f"mmpack: cannot write {outs['full']}: File too large; nothing was left behind"
    assert error in said.splitlines()
    assert [path.name for path in outs["full"].parent.iterdir()] == [".out.lock"]


def test_who_waited_does_not_repeat_a_failure(run, tmp_path, monkeypatch):
    """Without this a hundred machines would find the same bad row one after the other."""
    out = tmp_path / "out"
    held, done = threading.Event(), threading.Event()

    def fail():
        with pytest.raises(RuntimeError), turn(out), published(out, False):
            held.set()
            done.wait()
            raise RuntimeError("a bad row")

    other = threading.Thread(target=fail)
    other.start()
    held.wait()

    def look(out):
        threading.Timer(0.2, done.set).start()
        return turn(out)

    monkeypatch.setattr(pack, "turn", look)
    assert re.search(
        rf"waiting for (process {os.getpid()} on \S+) to build .*\n"
        r"mmpack: \1 ended without making .*; its own message says why",
        run("pack", "--out", out, fails=True),
    )
    other.join()


def test_workers_end_with_the_process_that_reads(data, tmp_path):
    """Killed, it cannot end them."""
    code = "import sys; from mmpack.cli.main import main; main(sys.argv[1:])"
    assert data[-2:] == ["--jobs", "1"]
    arguments = [*data[:-1], 2, "--out", tmp_path / "out"]
    process = start(code, *arguments, start_new_session=True)
    workers = set()
    while len(workers) < 4 and process.poll() is None:  # a resource tracker and a fork server too
        text = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True)
        workers = set(map(int, text.stdout.split())) - {process.pid}
        time.sleep(0.02)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline, "workers live on"
        time.sleep(0.05)
    assert len(workers) == 4


def is_alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# What is not ours


def test_a_users_folder_is_never_removed(run, whole, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    for options in ([], ["--overwrite"]):
        assert "is not empty" in run("pack", "--out", out, *options, fails=True)
    (out / "mmpack.json").write_text("[]")
    error = run("pack", "--out", out, "--overwrite", fails=True)
    assert "also holds thesis.tex, not made by mmpack" in error
    assert others(out) == ["thesis.tex"]
    # Nor is one that has the name of a left-over.
    mine = tmp_path / "new.partial-me-1"
    mine.mkdir()
    (mine / "thesis.tex").write_text("precious")
    run("pack", "--out", tmp_path / "new")
    assert (mine / "thesis.tex").read_text() == (out / "thesis.tex").read_text() == "precious"


def test_nothing_is_renamed_over_what_came_meanwhile(tmp_path):
    """Where locks reach one machine only, the second to end gives way."""
    out = tmp_path / "out"
    with pytest.raises(OSError), published(out, False):
        out.mkdir()
        (out / "theirs").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_a_torn_store_is_refused_with_the_reason(run, whole, tmp_path):
    out = copy(whole, tmp_path)
    os.truncate(out / "samples.arrow", 1000)
    with pytest.raises(
        ValueError, match=r"is damaged: it has 1,000 bytes, \d.* were written; pack"
    ):
        PackedDataset.from_store(out)
    assert "it has 1,000 bytes" in run("pack", "--out", out, fails=True)
    assert not run("pack", "--out", out, "--overwrite")["reused"]
    (out / "mmpack.json").unlink()
    error = run("pack", "--out", out, "--overwrite", fails=True)
    assert "is not empty (an unfinished store)" in error


def copy(store, tmp_path):
    out = tmp_path / "copy"
    out.mkdir()
    for path in store.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


# Parts


@pytest.mark.parametrize("num_parts", [3, 8])
def test_parts_join_to_the_store_one_process_makes(num_parts, run, whole, tmp_path):
    parts = [tmp_path / str(n) for n in range(num_parts)]
    rows = 0
    for n, part in enumerate(parts, start=1):
        report = run("pack", "--out", part, "--shard", f"{n}/{num_parts}")
        assert report["part"] == f"{n}/{num_parts}"
        rows += report["rows"]
    assert rows == ROWS
    assert run("pack", "--out", parts[0], "--shard", f"1/{num_parts}")["reused"]
    random.Random(0).shuffle(parts)
    report = run("merge", tmp_path / "out", *parts)
    assert report["rows"] == ROWS
    for path in whole.iterdir():
        if path.name != "mmpack.json":  # which has the time
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    about, other = open_store(tmp_path / "out").about, open_store(whole).about
    assert replace(about, begun=0) == replace(other, begun=0)
    # It is what `mmpack pack` would make.
    again = run("pack", "--out", tmp_path / "out")
    assert {**again, "reused": False, "seconds": 0} == {**report, "seconds": 0}
    with pytest.raises(
        ValueError, match=rf"is part \d/{num_parts} of a store; join all parts with"
    ):
        PackedDataset.from_store(parts[0])


def test_wrong_parts_are_named(run, whole, tmp_path):
    parts = []
    for n in (1, 2, 3):
        parts.append(tmp_path / str(n))
        run("pack", "--out", parts[-1], "--shard", f"{n}/3")
    out = tmp_path / "out"
    cases = [
        ([*parts, "--overwrite"], "cannot write|is not empty"),
        (parts[1:2], r"2 of 3 parts are missing: 1 and 3; write them with mmpack pack --shard 1/3"),
        ([*parts, parts[1]], r"part 2 of 3 is given twice, .*/2 and .*/2"),
        ([parts[0], whole], "is a whole store, not a part"),
        ([tmp_path], "has no finished store"),
    ]
    run("pack", "--out", tmp_path / "half", "--shard", "2/2")
    cases.append(([parts[0], tmp_path / "half"], "the number of parts, 2 and 3, differ"))
    run("pack", "--out", tmp_path / "masked", "--shard", "2/3", "--mask-history")
    cases.append(([parts[0], tmp_path / "masked"], "do not belong together: mask_history differ"))
    run("pack", "--out", tmp_path / "small", "--shard", "2/3", "--plan-seed", 1)
    cases.append(([parts[0], tmp_path / "small"], "plan_seed differ"))
    (tmp_path / "file").write_text("")
    for folders, message in cases:
        to = tmp_path / "file" if "--overwrite" in folders else out
        assert re.search(message, run("merge", to, *folders, fails=True))
    assert "cannot write" in run("merge", tmp_path / "file" / "out", *parts, fails=True)
    flip(parts[2] / "samples.arrow", -300)
    assert "its bytes have changed" in run("merge", out, *parts, fails=True)
    assert not out.exists()
    error = run("pack", "--out", parts[0], "--shard", "2/3", fails=True)
    assert "--overwrite it: part changed since" in error


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "1/0", "-1/3", "1/3 "])
def test_shards_are_counted_from_one(text):
    with pytest.raises(ValueError, match="part I of N from 1/N to N/N, got"):
        parse_shard(text)


# Damage


def flip(path, place, bit=0):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.unlink()  # it may be a link
    path.write_bytes(content)


def everything(folder):
    """All that training reads of a store, as plain values."""
    dataset = PackedDataset.from_store(folder)
    samples = []
    for sample in dataset.samples:
        arrays = (sample.input_ids, sample.labels, sample.grid_thw, sample.temporal_step)
        values = [None if one is None else one.tolist() for one in arrays]
        samples.append((*values, sample.media, sample.source, sample.row, sample.vision))
    plan = dataset.plan
    fields = {name: np.array(getattr(plan, name)).tolist() for name in PackPlan.__slots__}
    return samples, fields, dataset.samples.num_tokens.tolist()


@pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=pytest.mark.slow)])
def test_one_flipped_bit_is_found_or_changes_nothing(count, whole, tmp_path):
    store = tmp_path / "store"
    samples = [open_store(whole)[number] for number in range(30)]
    write_store(store, samples, samples[0].vision, About(begun=1))
    save_plan(PackedDataset.from_samples(samples, 4096, [1] * 30).plan, store)
    names = ("samples.arrow", "index.sizes.npy", "mmpack.json", "plan.json", "plan.num_tokens.npy")
    good = {name: (store / name).read_bytes() for name in names}
    expected = everything(store)
    generator = random.Random(0)
    found = dict.fromkeys(names, 0)
    for n in range(count):
        name = names[n % 5]
        flip(store / name, generator.randrange(len(good[name])), generator.randrange(8))
        try:
            assert everything(store) == expected, name
        except ValueError as error:
            assert str(tmp_path) in str(error)
            found[name] += 1
        (store / name).write_bytes(good[name])
    assert min(found.values()) > count / 5 / 4, found  # the rest is padding and what nobody reads


def test_a_damaged_sample_is_named(whole, tmp_path):
    out = copy(whole, tmp_path)
    store = open_store(out)
    ids = store[400].input_ids
    flip(out / "samples.arrow", (whole / "samples.arrow").read_bytes().index(ids.tobytes()))
    dataset = PackedDataset.from_store(out)
    place = f"row {store[400].row} of rows.jsonl"
    with pytest.raises(ValueError, match=rf"sample 400 \({place}\) has changed; pack"):
        dataset.samples[400]
    assert dataset.samples[399].row == store[399].row


def test_packing_again_mends_damage(run, whole, tmp_path):
    out = copy(whole, tmp_path)
    flip(out / "samples.arrow", -300)
    assert not run("pack", "--out", out, "--overwrite")["reused"]
    flip(out / "plan.sample_index.npy", 500)
    assert "plan.sample_index.npy is damaged: its bytes have changed" in run(
        "pack", "--out", out, fails=True
    )
    run("pack", "--out", out, "--overwrite")
    assert everything(out) == everything(whole)


def test_a_plan_of_other_samples_is_refused(whole, tmp_path):
    samples = [open_store(whole)[number] for number in range(31)]
    write_store(tmp_path / "store", samples[:30], samples[0].vision)
    save_plan(PackedDataset.from_samples(samples[1:31], 8192).plan, tmp_path / "store")
    with pytest.raises(ValueError, match=r"store has a plan for other samples"):
        PackedDataset.from_store(tmp_path / "store")
    (tmp_path / "store" / "plan.json").unlink()
    with pytest.raises(ValueError, match="has no plan; pack again"):
        PackedDataset.from_store(tmp_path / "store")


# Changed data


def test_changed_data_is_named_before_training(whole, data, tmp_path, caplog):
    rows = data[1]
    before = os.stat(rows)
    content = open(rows, "rb").read()
    try:
        os.utime(rows)  # copied, or checked out again: the same content
        assert len(PackedDataset.from_store(whole)) > 0
        for other in (content + b"\n", content.replace(b"y", b"z", 1)):
            with open(rows, "wb") as file:
                file.write(other)
            message = (
                rf"{re.escape(rows)} changed since .* was packed \(1 of 1 data file\); pack again"
            )
            with pytest.raises(ValueError, match=message):
                PackedDataset.from_store(whole)
            dataset = PackedDataset.from_store(whole, on_changed_data="warn")
            assert "using the rows as packed" in caplog.text
            assert len(dataset[0]) > 0
        os.rename(rows, rows + ".moved")  # a machine that has the store alone
        assert len(PackedDataset.from_store(whole)) == len(dataset)
        os.rename(rows + ".moved", rows)
    finally:
        with open(rows, "wb") as file:
            file.write(content)
        os.utime(rows, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_data_that_changes_while_it_is_read(data, processor, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mmpack.data.encoder.load_processor", lambda *options: processor)
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(open(data[1], "rb").read())
    work = build._Work.__call__

    def touch(self, chunk):
        with open(rows, "a") as file:
            file.write("\n")
        return work(self, chunk)

    monkeypatch.setattr(build._Work, "__call__", touch)
    arguments = ["pack", str(rows), *data[2:], "--media-dir", os.path.dirname(data[1])]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert f"{rows} changed while it was read; pack again" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_image_of_another_size_names_its_row(encoder, vision, tmp_path):
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "!"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": turns, "images": ["a.png"]}]))
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    dataset = PackedDataset.from_files(tmp_path / "rows.json", encoder, 1000)
    write_store(tmp_path / "store", dataset.samples, vision)
    save_plan(dataset.plan, tmp_path / "store")
    Image.new("RGB", (600, 900)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"row 0 of rows\.json: image .*a\.png"):
        assemble(PackedDataset.from_store(tmp_path / "store")[0])


# Other readers


def test_load_from_disk(whole):
    datasets = pytest.importorskip("datasets")
    table = datasets.load_from_disk(str(whole))
    assert not {path.name for path in whole.iterdir()} & {"dataset_dict.json"}
    store = open_store(whole)
    assert len(table) == len(store)
    for number in (0, 255, 256, len(store) - 1):
        row, sample = table[number], store[number]
        assert row["input_ids"] == sample.input_ids.tolist()
        assert row["labels"] == sample.labels.tolist()
        assert np.reshape(row["grid_thw"], (-1, 3)).tolist() == sample.grid_thw.tolist()
        assert row["images"] == [image.path for image in sample.media]
        assert (row["source"], row["row"]) == (sample.source, sample.row)
        assert row["num_tokens"] == sample.num_tokens
    # Its caches go by the fingerprint, which follows the content.
    assert table._fingerprint == datasets.load_from_disk(str(whole))._fingerprint
    assert table.select([1])[0]["row"] == store[1].row


def test_opening_reads_no_batch(whole, monkeypatch):
    """So that it costs what the sizes cost, however large the samples are."""
    monkeypatch.setattr("mmpack.store.encoded_store.read_batch", None)
    assert len(PackedDataset.from_store(whole)) > 0
    assert open_store(whole).about.planning.capacity == 256


def test_a_rank_holds_no_copy_of_sizes_and_plan(whole):
    dataset = PackedDataset.from_store(whole)
    store, plan = dataset.samples, dataset.plan
    fields = [getattr(plan, name) for name in PackPlan.__slots__]
    arrays = [field for field in fields if isinstance(field, np.ndarray)]
    arrays += [store.num_tokens, store.num_patches, store.num_supervised]
    assert len(arrays) >= 6
    for array in arrays:
        assert array.flags.aligned
        assert not array.flags.writeable  # of the mapped file, not one's own
