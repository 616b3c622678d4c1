"""Packs of tar shards: those of the same rows in files, from memory, a store and a stream; and shards that
change."""

import dataclasses
import itertools
import json
import logging
import os
from collections import Counter

import numpy as np
import pytest
from fuzzing import damaged, survives
from tar_files import chat, picture, write_tar
from test_stream import delivered
from test_stream_errors import numbering as numbering  # a fixture
from test_stream_errors import numbers_in

from mmpack import PackedDataset, PackStream, Reader, Skip, assemble
from mmpack.cli.main import main
from mmpack.data import archives
from mmpack.errors import BadImageError
from mmpack.hf import PackCollator
from mmpack.packing.held_out import _groups
from mmpack.packing.sample_images import images_of
from mmpack.store.build import why_outdated
from mmpack.store.encoded_store import open_store
from mmpack.store.file_stamps import changed_files
from mmpack.types import PACK_ARRAYS


def rows_of(numbers):
    """(key, row, images by extension) of samples that say their number; some have no image, some show one
    twice."""
    for number in numbers:
        count = number % 3
        markers, images = (
            "<image>" * count,
            {f"{n}.png": picture(5 * number + n) for n in range(count)},
        )
        row = chat(f"{markers}#{number}#", "a q w")
        if number % 5 == 1 and count:
            row = chat(f"<image>#{number}#<image>", "q", images=["0.png"] * 2)
        yield f"{number:04d}", row, images


def members_of(numbers):
    for key, row, images in rows_of(numbers):
        for extension, content in images.items():
            yield f"{key}.{extension}", content
        yield f"{key}.json", row


@pytest.fixture
def shards(tmp_path):
    """5 tar files of 12 samples each."""
    (tmp_path / "shards").mkdir()
    for number in range(5):
        path = tmp_path / "shards" / f"train-{number:05d}.tar"
        write_tar(path, members_of(range(12 * number, 12 * number + 12)))
    return tmp_path / "shards"


def in_files(folder):
    """The same rows in a JSON file, with image files."""
    folder.mkdir()
    rows = []
    for key, row, images in rows_of(range(60)):
        for extension, content in images.items():
            (folder / f"{key}.{extension}").write_bytes(content)
        names = row.get("images", list(images))
        rows.append({**row, "images": [f"{key}.{name}" for name in names]})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def same_packs(one, other):
    assert len(one) == len(other)
    for a, b in zip(map(assemble, one), map(assemble, other)):
        for name in PACK_ARRAYS:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)
        np.testing.assert_array_equal(a.pixels, b.pixels)


def test_packs_are_those_of_files(shards, tmp_path, numbering):
    files = PackedDataset.from_files(in_files(tmp_path / "files"), numbering, 200)
    tars = PackedDataset.from_files(shards / "train-{00000..00004}.tar", numbering, 200)
    same_packs(files, tars)
    images = [images_of(one.samples) for one in (files, tars)]
    np.testing.assert_array_equal(images[0].ids, images[1].ids)
    assert len(set(images[1].ids.tolist())) < len(images[1].ids)
    np.testing.assert_array_equal(_groups(files.samples), _groups(tars.samples))
    tars.save(tmp_path / "packed")
    saved = PackedDataset.from_store(tmp_path / "packed")
    same_packs(tars, saved)
    assert saved.fingerprint() == tars.fingerprint()
    assert saved.media_folders == [str(shards)]
    of_store = images_of(saved.samples)
    np.testing.assert_array_equal(of_store.ids, images[1].ids)
    np.testing.assert_array_equal(_groups(saved.samples), _groups(tars.samples))
    plain = dataclasses.replace
    for one, other in zip(tars.samples, saved.samples):
        assert [plain(image, size=None) for image in one.media] == list(other.media)
    # Rows that cannot be read by columns are numbered alike.
    media_rows = saved.samples.media_rows
    saved.samples.media_rows = lambda: (
        r._replace(is_plain=r.is_plain & False) for r in media_rows()
    )
    np.testing.assert_array_equal(images_of(saved.samples).ids, images[1].ids)


@pytest.fixture
def packed(shards, small_set, tmp_path):
    """`mmpack pack`, with its arguments."""
    arguments = [
        str(shards),
        "--tokenizer",
        str(small_set / "tokenizer"),
        "--capacity",
        "400",
        "--quiet",
    ]
    assert main(["pack", *arguments, "--out", str(tmp_path / "packed")]) == 0
    return tmp_path / "packed", arguments


def test_the_commands(packed, shards, tmp_path, capsys):
    folder, arguments = packed
    assert main(["check", *arguments[:3], "--json"]) == 0
    text = capsys.readouterr().out
    assert '"rows": 60' in text and '"refused": 0' in text
    store = open_store(folder)
    assert Counter(store.sources) == Counter({f"train-{n:05d}.tar": 12 for n in range(5)})
    assert changed_files(store) == []
    for number in "12":
        out = ["--out", str(tmp_path / number), "--shard", f"{number}/2"]
        assert main(["pack", *arguments, *out]) == 0
    merged = tmp_path / "merged"
    assert main(["merge", str(merged), str(tmp_path / "1"), str(tmp_path / "2")]) == 0
    same_packs(PackedDataset.from_store(folder), PackedDataset.from_store(merged))
    assert main(["inspect", str(folder), "--pack", "0"]) == 0
    assert ".0.png" in capsys.readouterr().out


def test_a_store_notices_changed_shards(packed, shards):
    folder, _ = packed
    store = open_store(folder)
    parts = store.about.made_from
    path = shards / "train-00001.tar"
    assert why_outdated(store, parts) == []
    os.utime(path, ns=(1, 1))  # copied, say: the rows are the same
    assert changed_files(store) == []
    assert why_outdated(store, parts) == [str(path)]
    data = path.read_bytes()
    path.write_bytes(data.replace(b"a q w", b"a w q", 1))
    assert changed_files(store) == [str(path)]
    path.write_bytes(data + bytes(512))
    assert changed_files(store) == [str(path)]
    path.write_bytes(bytes(len(data)))
    assert changed_files(store) == [str(path)]
    path.write_bytes(b"x" * len(data))  # no tar file
    assert changed_files(store) == [str(path)]


def test_training_on_changed_shards_names_the_member(packed, shards):
    folder, _ = packed
    path = shards / "train-00001.tar"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"0013.0.png", b"0013.9.png", 1))
    archives._archives._open.clear()
    with pytest.raises(
        BadImageError,
        match=r"row 1 of train-00001.tar: .*image 0013.0.png \(byte [\d,]+ of .*/train-00001.tar\) cannot be read: the tar file has another member",
    ):
        list(map(assemble, PackedDataset.from_store(folder, on_changed_data="warn")))  # fmt: skip
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="train-00001.tar changed since .* was packed"):
        PackedDataset.from_store(folder)
    dataset = PackedDataset.from_store(folder, on_changed_data="warn")
    dataset.on_bad_image = "drop"
    packs = [PackCollator()([item]) for item in dataset]
    shown = sum(number % 3 > 0 for number in range(12, 24))
    assert len(packs) == len(dataset) and dataset.num_dropped_segments == shown
    path.write_bytes(data)
    path.rename(shards.with_name("elsewhere.tar"))
    path.symlink_to(shards.with_name("elsewhere.tar"))
    with pytest.raises(BadImageError, match=r"a link to .*elsewhere.* is outside"):
        list(map(assemble, PackedDataset.from_store(folder, on_changed_data="warn")))


# --------------------------------------------------------------------------------------------------
# Streams
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (2, 1), (2, 2), (4, 2)])
def test_a_stream_deals_files_or_rows(shards, numbering, workers, ranks, monkeypatch):
    """5 files: to 1, 2 and 4 workers by file, to 8 by row."""
    opened = []
    real = archives.open_archive
    monkeypatch.setattr(
        "mmpack.data.tar_shards.open_archive", lambda p: opened.append(p) or real(p)
    )
    seen = Counter()
    for rank in range(ranks):
        stream = PackStream(shards, numbering, 200, buffer=8).shard(rank, ranks)
        assert stream.media_folders == [str(shards)]
        first = set()
        for pack in delivered(stream, workers):
            place = json.loads(pack.resume)["sources"][0]
            first.add(place["rows"])
            seen.update(numbers_in(pack, numbering))
            assert len(assemble(pack).pixels) == sum(s.num_patches for s in pack) or len(pack) > 0
            stream.consume(pack.resume)
    assert seen == Counter(range(60))
    assert len(first) == 1
    parts = max(workers, 1) * ranks
    assert len(opened) == (5 if parts <= 5 else 5 * parts)


@pytest.mark.parametrize("kind", ["files", "rows"])
def test_a_stream_stopped_at_any_pack_goes_on(shards, numbering, tmp_path, kind):
    """With bad rows, a torn file, and, by file, a state that passes over files that are through."""
    workers = 2 if kind == "files" else 7
    write_tar(shards / "train-00005.tar", [("a.json", b"{"), *members_of([60]), ("b.png", b"")])
    write_tar(shards / "train-00006.tar", members_of(range(61, 150)))
    torn = shards / "train-00002.tar"
    torn.write_bytes(torn.read_bytes()[: 30 * 1024])

    def new():
        found = PackStream(shards, numbering, 200, buffer=6, on_error=[])
        found.bad_rows_file = tmp_path / "bad.jsonl"
        return found

    stream = new()
    states, packs = [], []
    for pack in delivered(stream, workers):
        stream.consume(pack.resume)
        states.append(json.loads(json.dumps(stream.state_dict())))
        packs.append(numbers_in(pack, numbering))
    numbers = [number for pack in packs for number in pack]
    lost = set(range(150)) - set(numbers)
    assert len(numbers) == len(set(numbers)) and 0 < len(lost) < 12 and lost < set(range(24, 36))
    reasons = [(bad.source, bad.row, bad.error) for bad in stream.on_error]
    assert sorted((source, row) for source, row, _ in reasons) == [
        ("train-00002.tar", 12 - len(lost)), ("train-00005.tar", 0), ("train-00005.tar", 2),
    ]  # fmt: skip
    assert any("train-00002.tar is damaged at byte" in error for *_, error in reasons)
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 3 == stream.num_bad_rows
    for place in range(0, len(states), 3 if kind == "files" else 9):
        resumed = new()
        resumed.load_state_dict(states[place])
        rest = [numbers_in(pack, numbering) for pack in delivered(resumed, workers)]
        assert rest == packs[place + 1 :]
        assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 3
    if kind == "files":
        assert any(state["consumed"]["0"]["sources"][0]["source"] for state in states)


def test_a_torn_file_ends_a_strict_stream_and_counts_once(shards, numbering):
    torn = shards / "train-00002.tar"
    torn.write_bytes(torn.read_bytes()[: 30 * 1024])
    with pytest.raises(ValueError, match=r"train-00002.tar is damaged at byte .*, write it again"):
        list(PackStream(shards, numbering, 200))
    stream = PackStream(shards, numbering, 200, on_error=Skip(0.5, []))
    for pack in stream:
        stream.consume(pack.resume)
    assert stream.num_bad_rows == 1
    torn.unlink()
    with pytest.raises(ValueError, match=r"cannot read .*train-00002.tar: no such file"):
        list(stream)  # may be there again when the run goes on: no bad row


def test_a_stream_of_files_needs_an_encoder_and_files(shards, numbering):
    with pytest.raises(ValueError, match="data files need an encoder"):
        PackStream(str(shards), None, 200)
    with pytest.raises(ValueError, match="no such file"):
        PackStream([shards / "gone.tar"], numbering, 200)
    rows = in_files(shards.with_name("files"))
    mixed = PackStream({"tars": (shards, 0.5), "json": ([str(rows)], 0.5)}, numbering, 200)
    taken = list(itertools.islice(mixed, 4))
    sources = {sample.source.rpartition("/")[2] for pack in taken for sample in pack}
    assert any("train-0" in one for one in sources) and any("rows.json" in one for one in sources)
    assert sorted(mixed.media_folders) == sorted(map(str, (shards, rows.parent)))
    pack = PackCollator()([taken[0]])
    assert len(pack["pixel_values"]) > 0


def test_unread_members_of_shards_are_told_once(shards, numbering, caplog):
    for number in range(5):
        members = [*members_of(range(3)), ("x.cls", b"1"), ("x.json", chat("q"))]
        write_tar(shards / f"train-{number:05d}.tar", members)
    list(Reader().read(shards))
    list(PackStream(shards, numbering, 200))
    PackedDataset.from_files(shards, numbering, 200)
    told = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert told == ["train-00000.tar: unread fields: *.cls (1 row)"] * 3


# --------------------------------------------------------------------------------------------------
# Damaged archives
# --------------------------------------------------------------------------------------------------


def fuzz(tmp_path, count, seeds):
    """Every image is the bytes that the archive has at its place, or there is an error."""
    path, bad = tmp_path / "a.tar", []

    def mutate(rng):
        whole = seeds[rng.randrange(len(seeds))]
        if rng.random() < 0.5:  # in a header
            place = rng.choice(
                [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
            )
            block = damaged(whole[place : place + 512], rng)[:512].ljust(512, b"\0")
            if rng.random() < 0.8:  # with a right checksum
                block = bytearray(block)
                block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
            spoilt = whole[:place] + bytes(block) + whole[place + 512 :]
        else:
            spoilt = damaged(whole, rng)
        path.write_bytes(spoilt)
        return "archive"

    def door():
        archives._archives._open.clear()
        bad.clear()
        data = path.read_bytes()
        for sample in Reader(on_error=bad).read(path):
            for image in sample.images:
                member = image.member
                content = data[member.offset : member.offset + member.length]
                with archives.open_member(image.path, member, "image") as file:
                    assert file.read() == content
                assert len(content) == member.length and content[:4] == b"\x89PNG"
        assert all("a.tar" in str(one) for one in bad)

    return survives(door, mutate, count)


def seeds_of(tmp_path):
    import tarfile

    long = [(f"{'folder/' * 30}{name}", content) for name, content in members_of(range(3))]
    extra = [
        ("x.png", {"type": tarfile.SYMTYPE, "linkname": "y"}),
        ("d", {"type": tarfile.DIRTYPE}),
    ]
    seeds = []
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        members = [*members_of(range(4)), *extra, *(long if format else [])]
        small = [(n, picture(1, size=(28, 28)) if n.endswith("png") and isinstance(c, bytes) else c) for n, c in members]  # fmt: skip
        seeds.append(write_tar(tmp_path / "seed.tar", small, format).read_bytes())
    return seeds


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_damaged_archives_give_rows_or_errors(tmp_path, count):
    outcomes = fuzz(tmp_path, count, seeds_of(tmp_path))
    assert outcomes["TornArchiveError"] > count // 10 and outcomes["result"] > count // 10
