"""Data files from anywhere: damaged, hostile or none at all. Each ends in rows, a row's error or one sentence."""

import datetime
import gzip
import json
import os
import random
import struct
import subprocess
import sys
import tracemalloc
import zoneinfo

import pytest
from PIL import Image

from mmpack import Reader
from mmpack.cli.main import main
from mmpack.cli.terminal import escaped_streams, printable
from mmpack.data import columnar_files, file_formats, limits

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROW = {"instruction": "Hi", "output": "Ho"}


def read(path, **options):
    """(rows that can be used, errors of the others)"""
    bad_rows = []
    samples = list(Reader(on_error=bad_rows, **options).read(path))
    return [sample.row for sample in samples], [bad.error for bad in bad_rows]


def refused(path, **options):
    with pytest.raises(ValueError) as error:
        read(path, **options)
    return str(error.value)


def write_arrow(path, table, **options):
    opener = pa.ipc.new_file if path.stem.startswith("file") else pa.ipc.new_stream
    with opener(path, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --------------------------------------------------------------------------------------------------
# Arrow and Parquet
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stream.arrow", "file.arrow"])
@pytest.mark.parametrize("offsets", [[0, 2, 1 << 30], [0, -8, 4], [4, 2, 0], [-1 << 20, 2, 4]])
def test_offsets_are_checked_before_they_are_followed(tmp_path, name, offsets):
    """Each was memory of somebody else: a crash, or its bytes as a row's text."""
    table = pa.table({"instruction": ["Hi", "Ho"], "output": ["Answer", "B"]})
    path = write_arrow(tmp_path / name, table)
    data = path.read_bytes()
    good = struct.pack("<3i", 0, 2, 4)
    assert data.count(good) == 1
    path.write_bytes(data.replace(good, struct.pack("<3i", *offsets)))
    said = refused(path)
    assert f"{name} is damaged in rows 0 to 1: In column 0: " in said
    assert said.endswith("; write it again")


def test_a_damaged_arrow_file_ends_check_with_a_sentence(tmp_path, capsys):
    broken = pa.DictionaryArray.from_arrays(
        pa.array([0, 9], pa.int8()), pa.array(["a"]), safe=False
    )
    table = pa.table({"instruction": broken, "output": pa.array(["a", "b"])})
    path = write_arrow(tmp_path / "stream.arrow", table)
    assert main(["check", str(path)]) == 1
    assert "stream.arrow is damaged in rows 0 to 1" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["stream.arrow", "file.arrow", "a.parquet"])
def test_values_that_python_cannot_hold_matter_where_they_are_read(tmp_path, name):
    days = pa.array([0, 2**31 - 1, 1], pa.int32()).cast(pa.date32())
    zone = pa.array([0, 1, 2], pa.timestamp("ns", "Nowhere/Land"))
    late = pa.array([0, 2**52, 1], pa.timestamp("s"))
    inside = pa.StructArray.from_arrays([late, zone], ["late", "zone"])
    texts = pa.array(["Hi", "Ho", "Hu"])
    columns = {"instruction": texts, "output": texts, "d": days, "z": zone, "l": late, "s": inside}
    if name.endswith("arrow"):  # a type that may name its bytes many times
        columns["u"] = pa.UnionArray.from_sparse(pa.array([0, 0, 0], pa.int8()), [texts])
        columns["r"] = pa.RunEndEncodedArray.from_arrays(pa.array([3], pa.int16()), pa.array(["x"]))
        columns["v"] = pa.array([["x"]] * 3, pa.list_view(pa.string()))
    path = tmp_path / name

    def write(columns):
        table = pa.table(columns)
        pq.write_table(table, path) if name == "a.parquet" else write_arrow(path, table)

    write(columns)
    assert read(path) == ([0, 1, 2], [])
    write({**columns, "output": zone})
    rows, errors = read(path)
    assert rows == []
    assert len(errors) == 3
    assert errors[0].startswith(
        "the text of the output must be a string, got <a timestamp[ns, tz=N"
    )
    write({**columns, "system": days})
    rows, errors = read(path)
    assert rows == []  # a date is no text, one of the year 5,881,580 neither
    assert len(errors) == 3


def test_pyarrow_zones_that_are_files(tmp_path):
    """A time zone is the name of a file: one that leads elsewhere is no zone."""
    for zone in ("../../../../../etc/passwd", "/etc/passwd", "posix"):
        times = pa.array([0], pa.timestamp("s", zone))
        table = pa.table({"instruction": ["Hi"], "output": ["Ho"], "t": times})
        assert read(write_arrow(tmp_path / "stream.arrow", table)) == ([0], [])
    assert "Europe/Berlin" in zoneinfo.available_timezones()  # else the next lines show nothing
    times = pa.array([0], pa.timestamp("s", "Europe/Berlin"))
    (cell,) = columnar_files._cells(times, "")
    assert cell.utcoffset() == datetime.timedelta(hours=1)


def test_rows_may_not_outgrow_their_file(tmp_path):
    """What a few bytes of Arrow may say: 2 ** 31 rows of nothing, a list of 2 ** 31 nulls, one text a
    million times."""
    nothing = pa.Array.from_buffers(pa.null(), (1 << 31) - 1, [None])
    path = write_stream(tmp_path, pa.record_batch({"x": nothing}))
    assert "claims to hold 2,147,483,647 rows in" in refused(path)
    ends = pa.array([0, (1 << 31) - 1], pa.int32()).buffers()[1]
    nulls = pa.Array.from_buffers(pa.null(), (1 << 31) - 1, [None])
    listed = pa.Array.from_buffers(pa.list_(pa.null()), 1, [None, ends], children=[nulls])
    path = write_stream(tmp_path, pa.record_batch({"x": listed, "instruction": ["Hi"]}))
    assert read(path)[1] == ["the row takes 17,179,869,194 bytes, at most 67,108,864 are read"]
    text, indices = pa.array(["x" * 100_000]), pa.array([0] * 1001, pa.int16())
    repeated = pa.DictionaryArray.from_arrays(indices, text)
    rows = pa.ListArray.from_arrays(pa.array([0, 1, 1001], pa.int32()), repeated)
    batch = pa.record_batch({"x": rows, "instruction": ["Hi", "Hi"], "output": ["Ho", "Ho"]})
    usable, errors = read(write_stream(tmp_path, batch))
    assert usable == [0]  # its neighbour is not to blame
    assert errors == ["the row takes 100,008,028 bytes, at most 67,108,864 are read"]


def write_stream(folder, batch):
    path = folder / "stream.arrow"
    with pa.ipc.new_stream(path, batch.schema) as writer:
        writer.write_batch(batch)
    return path


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
@pytest.mark.parametrize("name", ["stream.arrow", "file.arrow"])
def test_compressed_arrow(tmp_path, name, codec, monkeypatch):
    options = pa.ipc.IpcWriteOptions(compression=codec)
    words = pa.array(["Hi", "Ho", "Hi"]).dictionary_encode()
    table = pa.table({"instruction": words, "output": ["Ho" * 500] * 3})
    path = write_arrow(tmp_path / name, table, options=options)
    assert read(path) == ([0, 1, 2], [])
    zeros = pa.table({"instruction": ["Hi"], "output": ["\0" * (1 << 20)]})
    path = write_arrow(tmp_path / name, zeros, options=options)
    monkeypatch.setattr(limits, "FREE_BYTES", 1000)
    assert f"{name} claims to hold 1,048," in refused(path)  # before any room is made for it
    monkeypatch.setattr(limits, "FREE_BYTES", 1 << 26)
    assert read(path) == ([0], [])


def test_a_parquet_file_that_says_too_much(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    texts = ["\0" * (1 << 20)]
    pq.write_table(pa.table({"instruction": texts, "output": ["Ho"]}), path, compression="zstd")
    assert read(path) == ([0], [])
    monkeypatch.setattr(limits, "FREE_BYTES", 1000)
    assert "a.parquet claims to hold 1,048," in refused(path)


def test_a_feather_file_without_its_end(tmp_path):
    table = pa.table({"instruction": ["Hi"] * 4, "output": ["Ho"] * 4})
    path = write_arrow(tmp_path / "file.arrow", table)
    path.write_bytes(path.read_bytes()[:-40])
    assert "file.arrow" in refused(path)


# --------------------------------------------------------------------------------------------------
# Compressed files, long rows
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_cut_or_flipped_compressed_file_is_a_sentence(tmp_path, suffix, compression, capsys):
    rng = random.Random(0)
    rows = [{"instruction": f"{rng.random()}", "output": "Ho"} for _ in range(500)]
    text = {
        ".json": json.dumps(rows),
        ".jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        ".csv": "instruction,output\n" + "".join(f"{row['instruction']},Ho\n" for row in rows),
    }[suffix]
    data = pa.compress(text.encode(), compression, asbytes=True)
    path = tmp_path / f"a{suffix}{'.gz' if compression == 'gzip' else '.zst'}"
    for cut in (3, 11, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        assert f"cannot read {path}: " in refused(path)
    assert main(["check", str(path)]) == 1  # the sentence, and no traceback
    assert f"cannot read {path}: " in capsys.readouterr().out
    for place in range(4, len(data), len(data) // 12):
        flipped = bytearray(data)
        flipped[place] ^= 8
        path.write_bytes(flipped)
        try:
            read(path)  # zstd, which need have no checksum, may hold another text
        except ValueError as error:
            assert path.name in str(error)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.jsonl.zst"])
def test_a_decompression_bomb_is_refused(tmp_path, name, monkeypatch):
    free = 64 << 20 if name == "a.jsonl.gz" else 1 << 20  # one is as large as it would be
    monkeypatch.setattr(limits, "FREE_BYTES", free)
    line = b'{"instruction": "Hi", "output": "Ho"}\n'
    data = line + b" " * (free + (7 << 20))
    packed = (
        gzip.compress(data, 1) if name.endswith("gz") else pa.compress(data, "zstd", asbytes=True)
    )
    (tmp_path / name).write_bytes(packed)
    said = refused(tmp_path / name)
    assert (
        f"{name} decompresses from {len(packed):,} to more than {limits.most_bytes(len(packed)):,} bytes"
        in said
    )


def test_a_ratio_that_text_has_is_read(tmp_path, monkeypatch):
    rng = random.Random(0)
    rows = [{**ROW, "id": rng.getrandbits(60)} for _ in range(300)]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    monkeypatch.setattr(limits, "FREE_BYTES", 1000)
    assert len(read(tmp_path / "a.jsonl.gz")[0]) == 300


def test_a_row_that_is_too_long_is_a_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr(file_formats, "MAX_ROW", 2000)
    rows = [ROW, {**ROW, "output": "o" * 3000}, ROW]
    path = write_lines(tmp_path / "a.jsonl", rows)
    assert read(path) == ([0, 2], [f"line 2 is not JSON: {file_formats._LONG}"])
    (tmp_path / "a.json").write_text(json.dumps(rows))
    usable, errors = read(tmp_path / "a.json")
    assert (usable, errors) == ([0, 2], [f"the row is {file_formats._LONG}"])
    long = "instruction,output\nHi,Ho\nHi," + "o" * 3000 + "\nHi,Ho\n"
    unclosed = 'instruction,output\nHi,"' + "Ho\n" * 1000
    for text in (long, unclosed):
        (tmp_path / "a.csv").write_text(text)
        said = refused(tmp_path / "a.csv")
        assert said.startswith("a.csv is not CSV (line ")
        assert said.endswith(file_formats._LONG)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_lines_without_an_end_are_not_kept(tmp_path, name, monkeypatch):
    """However long the line, what is asked of the file at once is bounded."""
    monkeypatch.setattr(file_formats, "MAX_ROW", 5000)
    (tmp_path / name).write_text('instruction,output\n"' + "x" * 1_000_000)
    tracemalloc.start()
    said = refused(tmp_path / name) if name == "a.csv" else read(tmp_path / name)[1][1]
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert file_formats._LONG in said
    assert most < 500_000


# --------------------------------------------------------------------------------------------------
# What is no file, descriptions of files
# --------------------------------------------------------------------------------------------------


def test_only_regular_files_are_read(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.jsonl")  # opening it would wait for ever
    (tmp_path / "folder.jsonl").mkdir()
    write_lines(tmp_path / "folder.jsonl" / "a.jsonl", [ROW])
    os.symlink("/dev/zero", tmp_path / "zero.jsonl")
    os.symlink("/dev/zero", tmp_path / "zero.json.gz")
    os.symlink(tmp_path / "gone", tmp_path / "dangling.jsonl")
    for name, what in (
        ("pipe.jsonl", "is a named pipe, not a regular file"),
        ("zero.jsonl", "is a device, not a regular file"),
        ("zero.json.gz", "is a device, not a regular file"),
        ("dangling.jsonl", "no such file"),
        ("nul\0.jsonl", "no such file"),
        ("n" * 300 + ".jsonl", "File name too long"),
    ):
        assert what in refused(tmp_path / name)
        if "\0" not in name:
            assert main(["check", str(tmp_path / name)]) == 1
            assert what in capsys.readouterr().err
    assert read(tmp_path / "folder.jsonl") == ([0], [])  # a folder of data, whatever its name


@pytest.mark.parametrize("what", ["pipe", "folder", "link", "device"])
def test_a_folder_with_what_is_no_file(tmp_path, what):
    """It was passed over in silence: rows that somebody believes are trained on."""
    write_lines(tmp_path / "a.jsonl", [ROW])
    other = tmp_path / "b.jsonl"
    if what == "pipe":
        os.mkfifo(other)
    elif what == "folder":
        other.mkdir()
    else:
        os.symlink("/dev/null" if what == "device" else tmp_path / "gone", other)
    expected = {"link": "no such file", "pipe": "is a named pipe"}.get(what, f"is a {what}")
    assert expected in refused(tmp_path)


def test_a_dataset_info_that_is_no_file(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [ROW])
    os.mkfifo(tmp_path / "dataset_info.json")
    assert "dataset_info.json is a named pipe" in refused(path)
    assert "dataset_info.json is a named pipe" in refused(tmp_path, mapping="mine")


CHAT = {"formatting": "sharegpt"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"columns": [1]}, "'columns' of a dataset_info.json entry is a list of 1"),
        (
            {"columns": "prompt"},
            "'columns' of a dataset_info.json entry is 'prompt'; 'columns' must",
        ),
        ({"columns": {"prompt": ["a"]}}, "'prompt' of a dataset_info.json entry is a list of 1"),
        ({"columns": {"images": 2**70}}, "'images' of a dataset_info.json entry is 11805916207"),
        ({**CHAT, "tags": [1]}, "'tags' of a dataset_info.json entry is a list of 1; 'tags' must"),
        (
            {**CHAT, "tags": {"user_tag": {}, "role_tag": "from"}},
            "'user_tag' of a dataset_info.json",
        ),
        ({"formatting": []}, "formatting a list of 0 is not supported; use sharegpt"),
        ({"formatting": {"a": 1}}, "formatting a dict of 1 is not supported"),
        ({"file_name": 5}, "has no file_name"),
        ({"file_name": ["a.jsonl"]}, "has no file_name"),
        ({"file_name": ""}, "has no file_name"),
        ({"file_name": "\0"}, "no such file"),
    ],
)
def test_a_dataset_info_of_wrong_types(tmp_path, entry, message, capsys):
    path = write_lines(tmp_path / "a.jsonl", [ROW])
    entry = {"file_name": "a.jsonl", **entry}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    assert message in refused(tmp_path, mapping="mine")
    assert main(["check", str(tmp_path), "--dataset", "mine"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("mmpack: ")
    assert said.count("\n") == 1
    if entry["file_name"] == "a.jsonl":
        assert message in refused(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"mine": ', "\ud800"])
def test_a_dataset_info_that_is_not_json(tmp_path, text):
    path = write_lines(tmp_path / "a.jsonl", [ROW])
    (tmp_path / "dataset_info.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "dataset_info.json is not JSON" in refused(path)  # which may say what its fields mean
    assert "dataset_info.json is not JSON" in refused(tmp_path, mapping="mine")


# --------------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------------


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(("name", "jobs"), [("deep.jsonl", 2), ("deep.json", 1), ("deep.csv", 2)])
def test_deep_rows_are_skipped_by_any_number_of_processes(tmp_path, name, jobs, small_set, capsys):
    """They broke the way to a worker, and the list of what was left out, with a RecursionError."""
    deep = '{"instruction": "Hi", "output": "Ho", "x": ' + nested(900) + "}"
    good = json.dumps(ROW)
    text = {
        "deep.jsonl": f"{good}\n{deep}\n{good}\n",
        "deep.json": f"[{good}, {deep}, {good}]",
        "deep.csv": f'instruction,output,history\nHi,Ho,\nHi,Ho,"{nested(900)}"\nHi,Ho,\n',
    }[name]
    (tmp_path / name).write_text(text)
    out = tmp_path / "out"
    arguments = ["pack", tmp_path / name, "--tokenizer", small_set / "tokenizer", "--out", out]
    arguments += ["--capacity", 2048, "--on-error", "skip", "--jobs", jobs, "--json"]
    assert main([*map(str, arguments)]) == 0
    assert json.loads(capsys.readouterr().out)["bad_rows"] == 1
    (line,) = map(json.loads, (out / "bad_rows.jsonl").read_text().splitlines())
    assert line["row"] == 1
    assert (
        "nested too deeply" in line["error"] or "'history' must be a list of pairs" in line["error"]
    )


def test_depth_that_rows_have_is_read(tmp_path):
    for depth, is_read in ((90, True), (98, True), (101, False)):
        row = json.dumps({**ROW, "x": 0, "y": "[{" * 500})[:-1] + f', "z": {nested(depth)}}}'
        (tmp_path / "a.jsonl").write_text(row + "\n")
        (tmp_path / "a.json").write_text(f"[{row}]")
        for name in ("a.jsonl", "a.json"):
            assert (read(tmp_path / name)[0] == [0]) == is_read, (name, depth)


@pytest.mark.parametrize(
    "value",
    ["NaN", "-Infinity", "1e999", str(2**63), str(-(2**70)), "9" * 400, '"\\ud800"', "null"],
)
@pytest.mark.parametrize(
    "field", ["id", "source", "output", "system", "images", "videos", "history"]
)
def test_numbers_that_are_none(tmp_path, field, value, capsys):
    """NaN, infinities, integers beyond 64 bits and half characters, in fields that are read and are not."""
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"instruction": "Hi", "output": "Ho", "{field}": {value}}}\n')
    is_unread = field in ("id", "source") or (value == "null" and field != "output")
    rows, errors = read(path)
    assert (len(rows), len(errors)) == ((1, 0) if is_unread else (0, 1))
    bad = tmp_path / "bad.jsonl"
    assert main(["check", str(path), "--json", "--bad", str(bad)]) == (0 if is_unread else 1)
    for line in [*capsys.readouterr().out.splitlines(), *bad.read_text().splitlines()]:
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_of_doubled_keys_the_last_one_counts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": 5, "output": "Ho", "instruction": "Hi"}\n')
    assert read(path) == ([0], [])
    table = pa.table([["a"], [5], ["Hi"]], names=["output", "instruction", "instruction"])
    assert read(write_arrow(tmp_path / "stream.arrow", table)) == ([0], [])


def test_a_data_set_whose_image_is_missing(tmp_path):
    datasets = pytest.importorskip("datasets")
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    columns = {"instruction": ["<image>Hi"] * 5, "output": ["Ho"] * 5}
    columns["image"] = [
        str(tmp_path / name) for name in ("a.png", "gone.png", "a.png", "b.png", "a.png")
    ]
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    usable, errors = read(rows)
    assert usable == [0, 2, 4]
    assert len(errors) == 2
    assert all(error.startswith("the data set cannot load the row: ") for error in errors)
    with pytest.raises(
        ValueError, match=r"row 1 of rows: the data set cannot load the row: .*gone\.png"
    ):
        list(Reader().read(rows))


def test_an_error_of_a_users_generator_stays_the_users():
    def rows():
        yield ROW
        raise FileNotFoundError("mine")

    with pytest.raises(FileNotFoundError, match="mine"):
        list(Reader(on_error=[]).read(rows()))


# --------------------------------------------------------------------------------------------------
# Terminals
# --------------------------------------------------------------------------------------------------

NASTY = "\x1b]0;owned\x07\x1b[2K\x1b[1A\r\x9b31m\u202egnp\u2066\u2028\x7fok\nmmpack: all is well"
HARMLESS = (
    r"\x1b]0;owned\x07\x1b[2K\x1b[1A\r\x9b31m\u202egnp\u2066\u2028\u007fok\nmmpack: all is well"
)


def seen(text):
    """What a terminal would obey, and lines somebody's text would begin."""
    obeyed = [char for char in text if char not in "\n\t" and not char.isprintable()]
    return [
        *obeyed,
        *[line for line in text.splitlines() if line.startswith("mmpack: all is well")],
    ]


@pytest.mark.parametrize("place", ["field", "source", "role", "text", "image", "tokens"])
def test_rows_send_a_terminal_nothing(tmp_path, place, small_set, capsys):
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    row = {"conversations": turns}
    bad = {**row, "videos": [NASTY]}
    if place in ("field", "source"):
        row = {**row, NASTY if place == "field" else "source": NASTY}
    elif place == "role":
        bad = {"conversations": [{**turns[0], "from": NASTY}, turns[1]]}
    elif place == "text":
        bad = {"conversations": NASTY}
    elif place == "image":
        turns = [{**turns[0], "value": "<image>"}, turns[1]]
        bad = {"conversations": turns, "images": [NASTY.replace("\n", "")]}
    else:
        row = {"conversations": [turns[0], {**turns[1], "value": NASTY}]}
    path = write_lines(tmp_path / "train.jsonl", [row, bad, row])
    said = ""
    assert main(["check", str(path)]) == 1
    said += "".join(capsys.readouterr())
    arguments = ["pack", path, "--tokenizer", small_set / "tokenizer", "--capacity", 2048]
    for more in ([], ["--on-error", "skip"]):
        out = tmp_path / f"out{len(more)}"
        assert main([*map(str, [*arguments, "--out", out, *more])]) == (0 if more else 1)
        said += "".join(capsys.readouterr())
    assert main(["inspect", str(tmp_path / "out2"), "--pack", "0"]) == 0
    shown = "".join(capsys.readouterr())
    assert (HARMLESS.partition(r"\n")[0] in shown) == (place == "tokens")
    assert [char for char in shown if char not in "\n\t" and not char.isprintable()] == []
    assert seen(said) == []


def test_names_of_files_send_a_terminal_nothing(tmp_path, capsys):
    folder = tmp_path / NASTY.replace("/", "")
    folder.mkdir()
    path = write_lines(folder / f"{NASTY.partition('[2K')[0]}.jsonl", [ROW, {}])
    for arguments in (
        [str(path)],
        [str(folder / "gone.json")],
        [str(path), "--tokenizer", str(folder)],
    ):
        assert main(["check", *arguments]) == 1
        assert seen("".join(capsys.readouterr())) == []
    (folder / "dataset_info.json").write_text(
        json.dumps({"n": {"file_name": path.name, "tags": {}}})
    )
    assert main(["check", str(path)]) == 1
    assert main(["check", str(folder), "--dataset", NASTY]) == 1
    with pytest.raises(SystemExit):
        main(["check", str(path), "--" + NASTY.replace(" ", "")])
    said = "".join(capsys.readouterr())
    assert [char for char in said if char not in "\n\t" and not char.isprintable()] == []


def test_json_stays_json(tmp_path, capsys):
    path = write_lines(
        tmp_path / "a.jsonl", [{**ROW, "source": NASTY, "output": NASTY}, {NASTY: NASTY}]
    )
    assert main(["check", str(path), "--json"]) == 1
    said = capsys.readouterr().out
    assert seen(said) == []
    assert HARMLESS.replace("\\", "") not in said
    *lines, _ = map(json.loads, said.splitlines())
    assert NASTY[:20] not in lines[1]["error"]  # names are shown as Python does
    assert [line["ok"] for line in lines] == [True, False]


def test_tracebacks_and_warnings_send_a_terminal_nothing(tmp_path):
    """A bug of ours that quotes a row, a warning, a logger: whatever is written to the streams."""
    code = """
import logging, sys, warnings
from mmpack.cli import main
nasty = sys.argv[1]
def bug(options):
    warnings.warn(nasty)
    logging.getLogger("mmpack").warning("log %s", nasty)
    sys.stderr.write("\\rhalf a bar"); sys.stderr.write("\\n\\x1b[A")
    raise RuntimeError(nasty)
main._COMMANDS["env"] = bug
sys.exit(main.main(["env"]))
"""
    done = subprocess.run([sys.executable, "-c", code, NASTY], capture_output=True, text=False)
    said = done.stderr.decode()
    assert done.returncode == 1
    assert "RuntimeError: " in said
    bars = said.replace("\rhalf a bar\n\x1b[A", "", 1)
    assert len(bars) < len(said)  # which may move the cursor
    assert [char for char in bars if char not in "\n\t" and not char.isprintable()] == []
    assert bars.count(HARMLESS.partition(r"\n")[0]) >= 3


def test_streams_are_given_back(capsys):
    before = sys.stdout, sys.stderr
    with pytest.raises(RuntimeError, match="x"), escaped_streams():
        assert sys.stdout is not before[0]
        raise RuntimeError("x")
    assert (sys.stdout, sys.stderr) == before
    assert printable(NASTY) == HARMLESS.replace(r"\n", "\n")
    assert printable("\u00e9\u4e2d \U0001f600\t\n") == "\u00e9\u4e2d \U0001f600\t\n"
