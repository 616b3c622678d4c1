"""Stores made or changed by others: their records, the files they name, who reopens them, and the network."""

import json
import multiprocessing
import os
import pickle
import shutil
import socket
from dataclasses import replace

import pytest
from builders import encoded, small_spec
from torch.utils.data import DataLoader

pytest.importorskip("pyarrow")

import pyarrow

from mmpack import PackedDataset
from mmpack.cli.main import main
from mmpack.store.arrow_schema import SCHEMA, read_batch
from mmpack.store.atomic_folder import others
from mmpack.store.build import why_outdated
from mmpack.store.encoded_store import open_store, write_store
from mmpack.store.file_stamps import changed_files, file_sha256
from mmpack.store.manifest import About, Part, Planning
from mmpack.store.plan_file import save_plan
from mmpack.store.records import MAX_RECORD_BYTES, write_record
from mmpack.types import ImageRef

SPEC = small_spec()
PLANNING = Planning(capacity=64)
PART = Part(number=1, of=1, max_bad=0.05, chunks=[(2, 0, True)])


def write(folder, first=1, on_overflow="error", **about):
    """Two packs, or one long text in pieces."""
    text = encoded(SPEC, *range(first, 80))
    image = encoded(SPEC, 3, (2, 4), first)
    samples = [text, replace(image, media=(ImageRef("a.png"),))]
    store = write_store(folder, samples, SPEC, About(begun=1, **about))
    dataset = PackedDataset.from_samples(
        store, 40 if on_overflow == "split" else 80, on_overflow=on_overflow
    )
    if on_overflow == "split":
        dataset.samples.save(folder)
    save_plan(dataset.plan, folder)
    return folder


def reseal(folder, change, name="mmpack.json"):
    """A record changed by `change`, with the checksum that fits."""
    record = json.loads((folder / name).read_text())
    record.pop("checksum of this file")
    change(record)
    write_record(folder / name, record)


def put(*path_and_value):
    *path, name, value = path_and_value

    def change(record):
        for one in path:
            record = record[one]
        if value is ...:
            del record[name]
        else:
            record[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (put("vision", ...), "'vision' is missing"),
        (put("vision", 3), "'vision' is 3, not an object"),
        (put("vision", "patch_size", 0), "'vision'.'patch_size' is 0, not an integer from 1"),
        (put("vision", "merge_size", True), "'vision'.'merge_size' is True, not an integer"),
        (put("vision", "image_mean", ["x"]), "'vision'.'image_mean'[0] is 'x', not a number"),
        (put("vision", "image_mean", [10**400]), "'vision'.'image_mean'[0] is 1000000000"),
        (put("vision", "image_std", [0, 1, 1]), "image_mean and image_std do not match"),
        (put("vision", "video", "fps", None), "'vision'.'video'.'fps' is None, not a number"),
        (put("vision", "resizer", "torch"), "'vision'.'resizer' is not known"),
        (put("vision", "more", 1), "'vision'.'more' is not known"),
        (put("about", []), "'about' is [], not an object"),
        (put("about", "files", 3), "'about'.'files' is 3, not an object"),
        (put("about", "files", {"a": [1]}), "'about'.'files'.'a' is [1], not a list of 3"),
        (put("about", "files", {"a": [1, 2, 3]}), "'a'[2] is 3, not a string"),
        (put("about", "made_from", {"a": None}), "'about'.'made_from'.'a' is None, not a string"),
        (put("about", "begun", "x"), "'about'.'begun' is 'x', not an integer"),
        (put("about", "begun", 1 << 70), "'about'.'begun' is 1180591620717411303424, not"),
        (put("about", "more", 1), "'about'.'more' is not known"),
        (put("about", "tokenizer", ...), "'about'.'tokenizer' is missing"),
        (put("about", "media_folders", "x"), "'about'.'media_folders' is 'x', not a list"),
        (put("about", "planning", "capacity", "8"), "'planning'.'capacity' is '8', not an integer"),
        (put("about", "planning", "frozen", "vision"), "'frozen' is 'vision', not a list"),
        (put("about", "planning", "jobs", 2), "'about'.'planning'.'jobs' is not known"),
        (put("about", "part", 1), "'about'.'part' is 1, not an object"),
        (put("about", "part", "number", 9), "there is no part 9 of 1"),
        (put("about", "part", "chunks", [[2, 0, 2]]), "'chunks'[0][2] is 2, not true or false"),
        (put("about", "part", "chunks", [[-1, 0, True]]), "'chunks'[0][0] is -1, not an integer"),
        (put("id_range", [1]), "'id_range' is [1], not a list of 2"),
        (put("checksum", ...), "'checksum' is missing"),
        (put("checksum", -1), "'checksum' is -1, not an integer from 0"),
        (put("\x1b[31m", 1), r"'\x1b[31m' is not known"),
    ],
)
def test_a_manifest_fits_its_schema(change, why, tmp_path, capsys):
    """One line on the command line, whatever the record holds."""
    write(tmp_path / "store", planning=PLANNING, part=PART)
    reseal(tmp_path / "store", change)
    assert main(["inspect", str(tmp_path / "store")]) == 1
    said = capsys.readouterr().err
    assert why in said
    assert "mmpack.json is damaged: " in said
    assert said.endswith("; pack again with --overwrite\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"{",
        b"[" * 100_000,
        b"1" * 10_000,
        b'{"format": ' + b"[" * 900 + b"]" * 900 + b"}",
    ],
    ids=["empty", "no UTF-8", "cut", "deep", "a long number", "a deep format"],
)
def test_a_manifest_that_is_none(content, tmp_path):
    write(tmp_path / "store")
    (tmp_path / "store" / "mmpack.json").write_bytes(content)
    with pytest.raises(ValueError, match="has no finished store.*; make one|has store format"):
        open_store(tmp_path / "store")


def test_a_record_is_bounded(tmp_path):
    write(tmp_path / "store")
    os.truncate(tmp_path / "store" / "mmpack.json", MAX_RECORD_BYTES + 1)  # sparse
    with pytest.raises(ValueError, match=r"67,108,865 bytes, at most 67,108,864 are read"):
        open_store(tmp_path / "store")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda a: a["sample_of"].__iadd__(1), "do not cover samples 0 to 1"),
        (lambda a: a["sample_of"].__imul__(-1), "do not cover samples 0"),
        (lambda a: a["bounds"].__setitem__((1, 0), 90), "overlap or have gaps"),
        (lambda a: a["bounds"].__setitem__((0, 0), -1), "overlap or have gaps"),
        (lambda a: a["bounds"].__setitem__((-2, 1), 10_000), "overlap or have gaps"),
        (lambda a: a["bounds"].__setitem__((0, 1), 0), "whole and in pieces"),
        (lambda a: a["sizes"].__setitem__((-1, 0), 999), "sizes of pieces do not match"),
        (lambda a: a["sizes"].__setitem__((0, 3), -1), "sizes of pieces do not match"),
    ],
)
def test_pieces_are_of_their_samples(change, why, tmp_path):
    folder = write(tmp_path / "store", on_overflow="split")
    samples = PackedDataset.from_store(folder).samples
    arrays = {
        "sample_of": samples.sample_of.copy(),
        "bounds": samples.bounds.copy(),
        "sizes": samples._sizes.copy(),
    }
    change(arrays)
    type(samples)(samples.samples, **arrays).save(folder)
    with pytest.raises(ValueError, match=rf"pieces\.json is damaged: .*{why}.*; pack again"):
        PackedDataset.from_store(folder)


def test_a_piece_beyond_its_sample_is_refused_when_it_is_read(tmp_path):
    """How many tokens a sample has before images are expanded is known when it is read."""
    folder = write(tmp_path / "store", on_overflow="split")
    samples = PackedDataset.from_store(folder).samples
    bounds = samples.bounds.copy()
    bounds[-2, 1] += 1  # the last piece of the first sample; its 79 tokens are 79
    with pytest.raises(ValueError, match="a piece of it ends after 80"):
        type(samples)(samples.samples, samples.sample_of, bounds, samples._sizes)[-2]


def test_a_batch_that_is_compressed_is_not_made_large(tmp_path):
    """A few bytes could become gigabytes."""
    folder = write(tmp_path / "store")
    batch = read_batch(next(open_store(folder).batches()).rows)
    sink = pyarrow.BufferOutputStream()
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with pyarrow.ipc.new_stream(sink, SCHEMA, options=options) as writer:
        writer.write_batch(batch)
    message = sink.getvalue()[len(SCHEMA.serialize()) : -8]
    assert pyarrow.ipc.read_record_batch(message, SCHEMA).equals(batch)
    with pytest.raises(ValueError, match="its batch is compressed"):
        read_batch(message)


# What a store names


def fifo(path):
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("name", ["mmpack.json", "samples.arrow", "index.json", "plan.json"])
def test_a_fifo_is_no_file_of_a_store(name, tmp_path):
    write(tmp_path / "store")
    (tmp_path / "store" / name).unlink()
    fifo(tmp_path / "store" / name)
    with pytest.raises(ValueError, match="is a named pipe, not a regular file"):
        PackedDataset.from_store(tmp_path / "store")


def test_recorded_paths_are_hashed_only_if_they_are_regular_files(tmp_path):
    """/dev/zero would be hashed for ever, a FIFO waited for."""
    wrong = ["/dev/zero", str(fifo(tmp_path / "fifo")), str(tmp_path)]
    sizes = [os.stat(path).st_size for path in wrong]  # as recorded, so that content decides
    gone = [str(tmp_path / "gone"), "a\0b"]
    files = {path: [size, 1, "0"] for path, size in zip(wrong, sizes)}
    files |= {path: [1, 1, "0"] for path in gone}
    folder = write(tmp_path / "store", files=files)
    assert changed_files(open_store(folder)) == wrong
    with pytest.raises(ValueError, match=r"/dev/zero and .*fifo and .* changed since"):
        PackedDataset.from_store(folder)
    for path in wrong:
        with pytest.raises(ValueError, match="not a regular file"):
            file_sha256(path)


def test_an_image_that_is_no_regular_file_makes_a_store_outdated(tmp_path):
    for path in (str(fifo(tmp_path / "fifo")), "a\0b"):
        sample = replace(encoded(SPEC, 1, (2, 4), 2), media=(ImageRef(path),))
        store = write_store(tmp_path / f"store{len(path)}", [sample], SPEC, About(begun=1 << 62))
        assert why_outdated(store, {}) == [path]


# Who reopens a store


def another(folder, first):
    """What `mmpack pack --overwrite` of another process leaves."""
    shutil.rmtree(folder)
    return write(folder, first=first)


def test_a_pickled_store_is_the_one_it_was(tmp_path):
    folder = write(tmp_path / "store")
    store = open_store(folder)
    pickled, ids = pickle.dumps(store), store[0].input_ids.tolist()
    copy = pickle.loads(pickled)
    assert copy[0].input_ids.tolist() == ids
    assert len(pickled) < 1000
    another(folder, 1)  # packed again from the same rows
    assert pickle.loads(pickle.dumps(pickle.loads(pickled)))[0].input_ids.tolist() == ids
    another(folder, 2)
    assert copy[0].input_ids.tolist() == ids  # mapped before
    late = pickle.loads(pickled)
    for _ in range(2):
        with pytest.raises(ValueError, match="store has changed since this run opened"):
            late[0]
    with pytest.raises(ValueError, match="start the run again, or pack to another --out"):
        len(pickle.loads(pickled))
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="has no finished store"):
        pickle.loads(pickled)[0]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_of_another_store_are_refused(method, tmp_path):
    """An error that says so, out of the worker; not other samples under the old plan."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    dataset = PackedDataset.from_store(write(tmp_path / "store"))
    options = {"num_workers": 1, "collate_fn": list, "multiprocessing_context": method}
    loader = DataLoader(dataset, **options)
    another(tmp_path / "store", 2)
    with pytest.raises(ValueError, match="store has changed since this run opened it"):
        next(iter(loader))


# Merging and inspecting


@pytest.fixture
def no_network(monkeypatch):
    """Whoever asks a host for anything fails the test."""
    asked = []

    def refuse(*args, **options):
        asked.append(args)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield asked
    assert asked == []


@pytest.mark.parametrize("config", ["somebody/model", f"hf:somebody/model@{'a' * 40}"])
def test_merge_asks_no_hub_for_a_recorded_config(config, no_network, tmp_path, capsys):
    planning = Planning(capacity=64, config=config)
    write(tmp_path / "part", planning=planning, part=PART)
    assert main(["merge", str(tmp_path / "out"), str(tmp_path / "part")]) == 1
    said = capsys.readouterr().err
    reason = ": there is no such file or folder"
    assert config + (" is not in the Hugging Face cache" if "@" in config else reason) in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "where", ["somebody/model", f"hf:somebody/model@{'a' * 40}", "https://127.0.0.1/x", "/dev"]
)
def test_inspect_asks_no_hub_for_a_recorded_tokenizer(where, no_network, tmp_path, capsys):
    write(tmp_path / "store", tokenizer=where)
    code = main(["inspect", str(tmp_path / "store")])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    if where == "/dev":  # a folder, of no tokenizer
        assert code == 1 and "/dev has no Qwen-VL tokenizer" in said.err
    else:
        assert code == 0 and f"is not at {where};" in said.err


def test_a_recorded_tokenizer_runs_no_code_and_waits_for_no_fifo(no_network, tmp_path, capsys):
    where = tmp_path / "tokenizer"
    where.mkdir()
    settings = {"auto_map": {"AutoTokenizer": ["somebody/code--module.Class", None]}}
    (where / "tokenizer_config.json").write_text(json.dumps(settings))
    (where / "module.py").write_text("raise SystemExit('ran')")
    fifo(where / "tokenizer.json")
    fifo(where / "chat_template.jinja")
    write(tmp_path / "store", tokenizer=str(where))
    assert main(["inspect", str(tmp_path / "store")]) == 1
    assert "has no Qwen-VL tokenizer" in capsys.readouterr().err


def test_inspect_counts_what_rows_name(tmp_path, capsys):
    sample = encoded(SPEC, 3, (2, 4), 5)  # of no image
    store = write_store(tmp_path / "store", [sample], SPEC)
    save_plan(PackedDataset.from_samples(store, 80).plan, tmp_path / "store")
    assert main(["inspect", str(tmp_path / "store")]) == 1
    assert "placeholders for 1 grid, but its rows have 0" in capsys.readouterr().err


def chunks(*values):
    return put("about", "part", "chunks", list(values))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (put("about", "planning", None), "mmpack.json is damaged: it has no planning options"),
        (chunks([2, 0, False]), "its chunks are not those of its samples"),
        (chunks([2, 0, True], [2, 0, True]), "its chunks are not those of its samples"),
        (chunks([2, 2, True]), "bad_rows.jsonl is damaged: it has 0 lines, but 2 were written"),
        (put("about", "part", "of", 10**11), "'of' is 100000000000, not an integer from 1"),
        (
            put("about", "part", "max_bad", 2),
            "--max-bad (max_bad) must be a share from 0 to 1, got 2",
        ),
        (put("about", "part", None), "is a whole store, not a part"),
    ],
)
def test_parts_that_are_none(change, why, tmp_path, capsys):
    write(tmp_path / "part", planning=PLANNING, part=PART)
    reseal(tmp_path / "part", change)
    assert main(["merge", str(tmp_path / "out"), str(tmp_path / "part")]) == 1
    assert why in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line", ["x", "3", "[" * 100_000, "{}", '{"source": 1, "row": 0, "error": "", "advice": ""}']
)
def test_bad_rows_of_a_part_that_are_none(line, tmp_path, capsys):
    write(tmp_path / "part", planning=PLANNING, part=replace(PART, chunks=[(3, 1, True)]))
    (tmp_path / "part" / "bad_rows.jsonl").write_text(line + "\n")
    assert main(["merge", str(tmp_path / "out"), str(tmp_path / "part")]) == 1
    assert "bad_rows.jsonl is damaged: b" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Replacing a store


def test_a_store_of_the_format_before_is_replaced_not_a_folder_in_one(tmp_path):
    """--overwrite is what its error advises; a folder is never a file of a store."""
    folder = write(tmp_path / "store")
    for name in ("index.npz", "plan.npz", "pieces.npz"):
        (folder / name).write_bytes(b"")
    assert others(folder) == []
    (folder / "plan.thesis.npy").mkdir()
    assert others(folder) == ["plan.thesis.npy"]
