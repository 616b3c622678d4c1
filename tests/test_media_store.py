"""`media.bin`: pictures and films that came as bytes are in a store once, and come out as they went in."""

import json
import os
import pickle
import time
import zlib
from dataclasses import replace

import numpy as np
import pytest
from builders import encoded, small_spec

pytest.importorskip("pyarrow")

import pyarrow.parquet
from PIL import Image

from mmpack import PackedDataset, assemble
from mmpack.cli.main import main
from mmpack.data import videos
from mmpack.data.media_paths import MediaFolders
from mmpack.media_options import MediaOptions
from mmpack.store.arrow_schema import as_batch, read_batch, with_media
from mmpack.store.build import why_outdated
from mmpack.store.encoded_store import open_store, reuse_store, write_batches, write_store
from mmpack.store.manifest import About
from mmpack.store.records import write_record
from mmpack.store.row_checksum import contents_checksum
from mmpack.types import ImageRef, VideoRef

SPEC = small_spec()
BYTES = [bytes([n]) * (n + 3) for n in range(4)]


def samples_of(rows):
    """A sample for each list of contents; None: an image in a file."""
    one = encoded(SPEC, 1, 2, (2, 4), 3)
    media = [
        tuple(ImageRef(f"{n}.png") if data is None else ImageRef(f"{n}", data) for n, data in enumerate(row))
        for row in rows
    ]  # fmt: skip
    return [replace(one, media=refs, row=n) for n, refs in enumerate(media)]


ROWS = [
    [BYTES[0]],
    [None, BYTES[1]],
    [],
    [BYTES[0], BYTES[0], b"", BYTES[2]],
    [None],
    [BYTES[1], BYTES[3]],
]


def test_each_distinct_content_is_written_once(tmp_path):
    """Across batches, in the order of their first use; an empty one and files between them do no harm."""
    samples = samples_of(ROWS)
    batches = [as_batch(samples[:2]), as_batch(samples[2:5]), as_batch(samples[5:])]
    store = write_batches(tmp_path / "store", batches, SPEC)
    assert (tmp_path / "store" / "media.bin").read_bytes() == b"".join(BYTES)
    for one, other in zip(samples, store, strict=True):
        assert [(ref.path, ref.data) for ref in one.media] == [
            (r.path, r.data) for r in other.media
        ]
    assert list(store.image_paths()) == ["0.png", "0.png"]
    assert store.contents == contents_checksum(samples) == contents_checksum(store)
    assert pickle.loads(pickle.dumps(store))[3].media[3].data == BYTES[2]
    assert not why_outdated(store, {}, look_at_images=False)
    # What is read back as batches makes the same store, in other batches the same samples.
    again = write_batches(tmp_path / "again", store.batches(), SPEC)
    for name in ("samples.arrow", "media.bin", "index.sizes.npy"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "store" / name).read_bytes()
    assert again.contents == write_store(tmp_path / "one", samples, SPEC).contents
    linked = reuse_store(tmp_path / "linked", store, About(begun=1))
    assert linked[3].media == store[3].media
    assert os.stat(tmp_path / "linked" / "media.bin").st_nlink == 2


def test_a_store_without_bytes_has_no_such_file(tmp_path):
    store = write_store(tmp_path / "store", samples_of([[None], []]), SPEC)
    assert not (tmp_path / "store" / "media.bin").exists()
    assert store[0].media[0].data is None
    assert reuse_store(tmp_path / "linked", store, About()).contents == store.contents


def reseal(folder, **values):
    record = json.loads((folder / "mmpack.json").read_text())
    record.pop("checksum of this file")
    write_record(folder / "mmpack.json", {**record, **values})


def test_damage_is_named(tmp_path):
    folder = tmp_path / "store"
    write_store(folder, samples_of(ROWS), SPEC)
    good = (folder / "media.bin").read_bytes()
    (folder / "media.bin").write_bytes(good[:-1] + b"\0")
    store = open_store(folder)
    assert store[0].media[0].data == BYTES[0]
    with pytest.raises(ValueError, match=r"sample 5 \(row 5 of .*\) has changed; pack again"):
        store[5]
    with pytest.raises(ValueError, match=r"media\.bin is damaged: its bytes have changed"):
        reuse_store(tmp_path / "other", store, About())
    for change, why in (
        (lambda path: path.write_bytes(good + b"x"), "it has 19 bytes, 18 were written"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.unlink(), "it is missing"),
        (os.mkfifo, "is a named pipe, not a regular file"),
    ):
        if change is os.mkfifo:
            assert not (folder / "media.bin").exists()
        change(folder / "media.bin")
        with pytest.raises(ValueError, match=rf"media\.bin is damaged: .*{why}|{why}"):
            open_store(folder)


@pytest.mark.parametrize("size", [0, 5, 17])
def test_a_position_outside_is_no_crash(size, tmp_path, monkeypatch):
    """Hostile: all checksums fit, because all are 0, and the record says the file is as short as it is."""
    monkeypatch.setattr(zlib, "crc32", lambda data, value=0: 0)
    write_store(tmp_path / "store", samples_of(ROWS), SPEC)
    os.truncate(tmp_path / "store" / "media.bin", size)
    reseal(tmp_path / "store", media_bytes=size)
    store = open_store(tmp_path / "store")
    with pytest.raises(ValueError, match="sample 5 .* has changed"):
        store[5]
    with pytest.raises(ValueError, match="names media that are not there"):
        list(store.batches())


def test_overlapping_positions_take_no_more_memory_than_the_file():
    """A few bytes could name a large file a million times."""
    batch = as_batch(samples_of([BYTES]))
    calls = []
    assert with_media(pyarrow.py_buffer(batch.rows), lambda at: calls.append(at)) is None
    assert calls == [[(n, n + 3) for n in range(4)]]
    from mmpack.store.media_file import MediaFile

    media = MediaFile.__new__(MediaFile)
    media._mapped = b"0123456789"
    assert media.contents([(0, 4), (4, 6)]) == [b"0123", b"456789"]
    assert media.contents([(0, 10), (1, 9)]) is None
    assert media.contents([(8, 3)]) is None
    assert media.contents([(-1, 3)]) is None
    assert media.contents([(4, -1)]) is None


def test_options_come_back(tmp_path):
    spec = small_spec("qwen3_vl")
    one = encoded(spec, 1, 2, (2, 4), 3)
    media = (
        ImageRef("a.png"),
        VideoRef("b.mp4", None, (), 90, 30.0, options=MediaOptions(fps=1, video_start=2, max_frames=8)),
        ImageRef("c.png", options=MediaOptions(resized_height=28, resized_width=1 << 12)),
    )  # fmt: skip
    samples = [replace(one, media=media), replace(one, media=media[:1], row=1)]
    store = write_store(tmp_path / "store", samples, spec)
    assert [ref.options for ref in store[0].media] == [ref.options for ref in media]
    assert store[1].media[0].options is None
    assert store.contents == contents_checksum(samples) == contents_checksum(store)
    without = [replace(one, media=tuple(replace(ref, options=None) for ref in media)), samples[1]]
    assert contents_checksum(without) != store.contents


@pytest.mark.parametrize(
    "values", [{"place": 9}, {"place": -1}, {"max_pixels": -5}, {"fps": 1.0, "nframes": 4}]
)
def test_options_that_are_none_are_no_crash(values, tmp_path, monkeypatch):
    monkeypatch.setattr(zlib, "crc32", lambda data, value=0: 0)
    from mmpack.store import arrow_schema

    given = {"place": 0, **values}
    place = given.pop("place")
    monkeypatch.setattr(arrow_schema, "options_of", lambda media: [(place, given)])
    store = write_store(tmp_path / "store", samples_of([[None]]), SPEC)
    with pytest.raises(ValueError, match="sample 0 .* has changed"):
        store[0]


@pytest.fixture
def parquet(small_set, tmp_path):
    """Rows with one picture of noise as bytes, in Parquet; options that pack them."""
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    data = (tmp_path / "noise.png").read_bytes()
    assert len(data) > 1_400_000
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "It."}]
    rows = [{"messages": turns, "images": [{"bytes": data, "path": None}]} for _ in range(8)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    arguments = ["pack", tmp_path / "rows.parquet", "--tokenizer", small_set / "tokenizer"]
    arguments += ["--capacity", 2048, "--max-pixels", 40000, "--quiet"]
    return data, [str(argument) for argument in arguments]


def test_a_picture_of_many_rows_is_stored_once(parquet, tmp_path):
    data, arguments = parquet
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "media.bin").read_bytes() == data
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) < len(data) + 30_000
    dataset = PackedDataset.from_store(tmp_path / "out")
    alone, eight = assemble([dataset.samples[0]]), assemble(list(dataset.samples))
    assert np.array_equal(alone.pixels, eight.pixels)  # a pack has it once
    for n in (1, 2):
        assert main([*arguments, "--out", str(tmp_path / str(n)), "--shard", f"{n}/2"]) == 0
    parts = [str(tmp_path / "1"), str(tmp_path / "2")]
    assert main(["merge", str(tmp_path / "joined"), *parts, "--quiet"]) == 0
    for name in ("samples.arrow", "media.bin"):
        joined = (tmp_path / "joined" / name).read_bytes()
        assert joined == (tmp_path / "out" / name).read_bytes()


def test_parts_with_the_same_picture_join_to_a_store_with_one(tmp_path):
    stores = [write_store(tmp_path / str(n), samples_of(ROWS[n:]), SPEC) for n in range(2)]
    batches = [batch for store in stores for batch in store.batches()]
    joined = write_batches(tmp_path / "joined", batches, SPEC)
    assert joined.manifest.media_bytes == sum(map(len, BYTES))
    assert [ref.data for ref in joined[0].media] == ROWS[0]
    assert [ref.data for ref in joined[-1].media] == ROWS[-1]
    assert read_batch(batches[0].rows).num_rows == len(ROWS)


def test_a_store_is_outdated_by_a_frame_that_is_added_to_a_folder(tmp_path):
    """A list of frames is what the row says, whatever else is beside them."""
    frames = tmp_path / "frames"
    frames.mkdir()
    for n in range(2):
        Image.new("RGB", (28, 28)).save(frames / f"{n}.png")
    named = [str(frames / f"{n}.png") for n in range(2)]
    begun = (frames / "1.png").stat().st_ctime_ns + 1
    one = encoded(SPEC, 1, (1, 2, 2), 2)
    stores = {}
    for name, value in {"folder": str(frames), "list": named}.items():
        ref = videos.probe(MediaFolders([tmp_path]).locate_video(value))
        assert [frame.path for frame in ref.frames] == named
        sample = replace(one, media=(ref,))
        stores[name] = write_store(tmp_path / name, [sample], SPEC, About(begun=begun))
        assert stores[name][0].media[0].folder == ref.folder
        assert stores[name].contents == contents_checksum([sample])
        assert not why_outdated(stores[name], {})
    assert list(stores["folder"].frame_folders()) == [str(frames)]
    while time.time_ns() <= begun:
        time.sleep(0.001)
    Image.new("RGB", (28, 28)).save(tmp_path / "2.png")
    (tmp_path / "2.png").rename(frames / "2.png")
    assert why_outdated(stores["folder"], {}) == [str(frames)]
    assert not why_outdated(stores["folder"], {}, look_at_images=False)
    assert not why_outdated(stores["list"], {})
