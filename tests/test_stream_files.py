"""Data files as a stream's source: damaged and empty files, names of rows in errors, and files that change."""

import itertools
import json
import re
from dataclasses import replace

import pytest
from tar_files import chat, picture, write_tar
from test_stream import delivered
from test_stream_errors import numbering as numbering  # a fixture
from test_stream_errors import numbers_in

from mmpack import PackStream, Skip


def shards_of(folder, *counts):
    """Tar files of so many rows, which say their number."""
    folder.mkdir(exist_ok=True)
    numbers = itertools.count()
    for place, count in enumerate(counts):
        rows = (
            (f"{n:05d}.json", chat(f"#{n}#", "a q w")) for n in itertools.islice(numbers, count)
        )
        write_tar(folder / f"{place:03d}.tar", rows)
    return folder


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size) // 512 * 512])


def lines_file(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(stream, workers=0):
    """The numbers of all rows, which the stream consumes."""
    found = []
    for pack in delivered(stream, workers):
        stream.consume(pack.resume)
        found.append(numbers_in(pack, stream._row_sources[0].encoder))
    return found


# --------------------------------------------------------------------------------------------------
# Names of rows
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overflow", ["error", "drop", "truncate"])
def test_a_row_that_is_too_long_is_named_by_its_file(tmp_path, numbering, overflow, caplog):
    for name in "ab":
        lines_file(tmp_path / f"{name}.jsonl", [chat("#1#", "a"), chat("q", "a " * 300)])
    stream = PackStream(tmp_path, numbering, 60, on_overflow=overflow)
    if overflow == "error":
        with pytest.raises(ValueError, match="^row 1 of a.jsonl has .* too many for a pack"):
            list(stream)
        return
    list(stream)
    told = [m.partition(" has")[0] for m in caplog.messages if m.startswith(("dropped", "cut"))]
    kind = {"drop": "dropped", "truncate": "cut"}[overflow]
    assert told == [f"{kind}: row 1 of {name}.jsonl" for name in "ab"]


def test_errors_of_two_workers_are_two_lines(tmp_path, numbering):
    """Found while a row is read, encoded and fitted. Each worker counts rows of its own files, which have one
    name."""
    (tmp_path / "long.png").write_bytes(picture(1, size=(900, 3)))
    (tmp_path / "large.png").write_bytes(picture(1))
    documents = replace(numbering, stage="pretrain", media_dir=str(tmp_path))
    rows = [
        {"text": 3},
        {"text": "#1#"},
        {"text": "<image>", "images": ["long.png"]},
        {"text": "<image>", "images": ["large.png"]},
    ]
    paths = [lines_file(tmp_path / name / "p.jsonl", rows) for name in "ab"]

    def made(workers):
        stream = PackStream(paths, documents, 7, on_overflow="split", on_error=[])
        stream.bad_rows_file = tmp_path / "bad.jsonl"
        read(stream, workers)
        lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
        return stream.on_error, lines

    expected = {(str(path), "p.jsonl", row) for path in paths for row in (0, 2, 3)}
    bad_rows, lines = made(2)
    assert {(line["path"], line["source"], line["row"]) for line in lines} == expected
    assert {(bad.path, bad.source, bad.row) for bad in bad_rows} == expected
    assert any("does not fit into a piece" in line["error"] for line in lines)
    assert len(lines) == len(bad_rows) == len(made(0)[1]) == 6


# --------------------------------------------------------------------------------------------------
# Damaged and empty files
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2, 3])  # 3: by row
def test_the_limit_on_bad_rows_holds_for_rows_that_damaged_files_lack(
    tmp_path, numbering, workers, caplog
):
    """Nine of ten files are cut to a fifth: the rows left are all good, and far fewer than there were."""
    count = 2 if workers == 3 else 10
    folder = shards_of(tmp_path / "shards", *[30] * count)
    for path in sorted(folder.glob("*.tar"))[1:]:
        cut(path, 0.2)
    stream = PackStream(folder, numbering, 300, on_error="skip")
    with pytest.raises(
        ValueError, match=r"damaged tar files lack about .*, at most 5.0% may be .*--max-bad"
    ):
        read(stream, workers)
    told = []
    stream = PackStream(folder, numbering, 300, on_error=told)
    numbers = sum(read(stream, workers), [])
    assert len(numbers) < 30 * count * (0.7 if count == 2 else 0.4)
    assert len(told) == count - 1 == stream.num_bad_rows


def test_few_damaged_files_are_left_out_and_each_is_told(tmp_path, numbering, caplog):
    """One byte of each file is wrong, in its last header: of 20 KiB, from byte 11,264 on. The
    sample before may lack members."""
    folder = shards_of(tmp_path / "shards", *[12] * 7)
    for path in folder.glob("*.tar"):
        data = bytearray(path.read_bytes())
        data[11 * 1024 + 3] ^= 1  # in the header of the last member
        path.write_bytes(bytes(data))
    stream = PackStream(folder, numbering, 300, on_error=Skip(0.5))
    numbers = sum(read(stream), [])
    assert sorted(numbers) == [n for n in range(84) if n % 12 < 10]
    told = [m for m in caplog.messages if m.startswith("left out")]
    assert len(told) == 7
    assert all(re.search(f"{n:03d}.tar is damaged at byte", text) for n, text in enumerate(told))
    with pytest.raises(
        ValueError, match=r"lack about 64,512 of the 143,360 bytes of 7 data files \(45.0%\)"
    ):
        list(PackStream(folder, numbering, 300, on_error=Skip(0.449)))


def test_the_limit_is_the_same_after_a_stop(tmp_path, numbering):
    """Four of 24 files are damaged, by 1/24 of all bytes each; the state counts those before it."""
    folder = shards_of(tmp_path / "shards", *[5] * 24)
    for place in (1, 9, 12, 20):
        (folder / f"{place:03d}.tar").write_bytes(b"x" * 10240)

    def made(max_bad):
        return PackStream(folder, numbering, 200, buffer=3, on_error=Skip(max_bad))

    stream, states = made(0.17), []
    for pack in stream:
        stream.consume(pack.resume)
        states.append(json.loads(json.dumps(stream.state_dict())))
    for place in range(0, len(states), 3):
        rest, strict = made(0.17), made(0.15)
        rest.load_state_dict(states[place])
        assert len(list(rest)) == len(states) - place - 1
        strict.load_state_dict(states[place])
        snapshot = states[place]["consumed"]["0"]["sources"][0]["source"]
        if snapshot is not None and snapshot[1][0] > 20:
            assert snapshot[1][2] == 4 * 10240
            continue
        with pytest.raises(ValueError, match=r"lack about 40,960 of the 245,760 bytes of 24 data"):
            list(strict)


@pytest.mark.parametrize("workers", [0, 2, 5])  # 5: by row
@pytest.mark.parametrize("kind", ["tar", "jsonl"])
def test_a_file_without_rows_is_a_bad_row_of_a_stream(tmp_path, numbering, kind, workers):
    counts = 3, 0, 3, 3
    if kind == "tar":
        shards_of(tmp_path / "files", *counts)
    else:
        for place, count in enumerate(counts):
            rows = [chat(f"#{n}#", "a") for n in range(3 * max(place - 1, 0), 9)[:count]]
            lines_file(tmp_path / "files" / f"{place:03d}.jsonl", rows)
    bad_rows = []
    stream = PackStream(tmp_path / "files", numbering, 200, on_error=bad_rows)
    numbers = sum(read(stream, workers), [])
    assert sorted(numbers) == list(range(9))
    assert [str(bad) for bad in bad_rows] == [
        f"row 0 of 001.{kind}: 001.{kind} holds no rows; remove it or fix the path"
    ]
    with pytest.raises(ValueError, match=f"001.{kind} holds no rows"):
        list(PackStream(tmp_path / "files", numbering, 200))


# --------------------------------------------------------------------------------------------------
# Files that change
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["added", "removed", "grown"])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_state_of_other_files_is_refused(tmp_path, numbering, change, mixed):
    folder = shards_of(tmp_path / "shards", 12, 12, 12)

    def made():
        source = {"tars": (folder, 0.5), "rows": ([chat("q", "a")], 0.5)} if mixed else folder
        return PackStream(source, numbering, 200, buffer=3)

    stream = made()
    for pack in itertools.islice(delivered(stream, 1), 2):
        stream.consume(pack.resume)
    state = json.loads(json.dumps(stream.state_dict()))
    again = made()
    again.load_state_dict(state)
    last = folder / "002.tar"
    if change == "added":
        (folder / "003.tar").write_bytes(last.read_bytes())
    elif change == "removed":
        last.unlink()
    else:
        last.write_bytes(last.read_bytes() + bytes(512))
    count = {"added": 4, "removed": 2, "grown": 3}[change]
    of = " of 'tars'" if mixed else ""
    why = (
        f"other data files: some{of} were added, removed or changed, .* sizes of the {count} files"
    )
    with pytest.raises(ValueError, match=why):
        made().load_state_dict(state)


def test_ranks_with_other_files_are_told_so(tmp_path, numbering, monkeypatch):
    """Each rank has a disk of its own, say, and one lacks a file."""
    folder = shards_of(tmp_path / "shards", 6, 6)
    streams = [PackStream(files, numbering, 200) for files in (folder, folder / "000.tar")]
    for stream in streams:
        read(stream)
    (sums,) = ({(0, 0): one._row_sources[0].source.checksum} for one in streams[1:])
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr(
        "torch.distributed.all_gather_object",
        lambda into, own: into.__setitem__(slice(2), [own, sums]),
    )
    with pytest.raises(
        ValueError, match="rank 1 reads other rows .* its data files have other names or"
    ):
        streams[0].check_ranks()
