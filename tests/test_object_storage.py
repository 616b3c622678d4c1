"""Data files, images and tar shards in object storage: packed and trained as on a disk."""

import gzip
import io
import json
import os
import re
from dataclasses import replace

import fsspec
import numpy as np
import pytest
from object_server import serving
from PIL import Image
from torch.utils.data import DataLoader

pytest.importorskip("pyarrow")

import pyarrow
import pyarrow.parquet

from mmpack import Encoder, PackedDataset, PackStream, Reader
from mmpack.cli.demo import write_data
from mmpack.cli.main import main
from mmpack.data import remote_files
from mmpack.errors import BadImageError
from mmpack.hf import PackCollator
from mmpack.store.encoded_store import open_store

NUM_ROWS = 10


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's folder, with a picture of 200 KB and one of each kind that is read in its own way."""
    folder = tmp_path_factory.mktemp("objects") / "data"
    write_data(folder, NUM_ROWS)
    rows = json.loads((folder / "train.json").read_text())
    noise = np.random.default_rng(0).integers(0, 256, (280, 280, 3), dtype=np.uint8)
    for number, (name, options) in enumerate(
        {"noise 1.png": {}, "b.jpg": {"quality": 95}, "c.webp": {"lossless": True}}.items()
    ):
        Image.fromarray(np.roll(noise, number)).save(folder / name, **options)
        turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "Noise."}]
        rows.append({"conversations": turns, "images": [f"./{name}"]})
    (folder / "train.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def server(demo, monkeypatch):
    monkeypatch.setattr(remote_files, "_WAITS_S", (0.01, 0.01))
    with serving(demo) as running:
        yield running


def encoder_of(demo, **options):
    return Encoder.from_folder(demo / "tokenizer", **options)


def pack(demo, data, out, *more):
    words = ["pack", data, "--tokenizer", demo / "tokenizer", "--capacity", 2048, "--out", out]
    return main([str(word) for word in [*words, "--quiet", *more]])


def in_memory(folder):
    """Copy a folder to `memory://`; its URL."""
    memory = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            memory.pipe(f"/{folder.name}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return f"memory://{folder.name}"


def batches(dataset, encoder, **loading):
    collator = PackCollator(encoder)
    return list(DataLoader(dataset, batch_size=1, collate_fn=collator, **loading))


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs):
        names = [name for name, value in one.items() if hasattr(value, "equal")]
        assert {"input_ids", "labels", "pixel_values"} <= set(names)
        for name in names:
            assert one[name].equal(other[name]), name


def test_a_store_from_the_web_is_the_local_one_but_for_paths(demo, server, tmp_path, capsys):
    assert pack(demo, demo / "train.json", tmp_path / "local") == 0
    assert pack(demo, f"{server.url}/train.json", tmp_path / "web") == 0
    local, web = open_store(tmp_path / "local"), open_store(tmp_path / "web")
    tables = [
        pyarrow.ipc.open_stream(store.folder / "samples.arrow").read_all() for store in (local, web)
    ]
    assert [n for n in tables[0].column_names if tables[0][n] != tables[1][n]] == [
        "images",
        "versions",
        "checksum",
    ]
    files = [path for row in tables[0]["images"].to_pylist() for path in row]
    urls = [url for row in tables[1]["images"].to_pylist() for url in row]
    assert "noise%201.png" in urls[-3]
    assert [os.path.basename(one).replace(" ", "%20") for one in files] == [
        url.rpartition("/")[2] for url in urls
    ]
    assert web.about.media_folders == (server.url,)
    (name,), (known,) = web.about.files, web.about.files.values()
    assert name == f"{server.url}/train.json"
    assert known[2].startswith(f"{known[0]} ETag ")
    for plan in ("plan.sample_index.npy", "plan.bin_offsets.npy"):
        assert (local.folder / plan).read_bytes() == (web.folder / plan).read_bytes()
    # A header is one range, and the end of what is longer another; nothing is read whole.
    of_noise = [wanted for _, path, wanted in server.requests if path == "/noise 1.png"]
    assert of_noise[0] == "bytes=0-65535" and len(of_noise) == 2
    assert os.path.getsize(demo / "noise 1.png") > 3 << 16
    # Again: nothing is encoded.
    assert pack(demo, f"{server.url}/train.json", tmp_path / "web") == 0


def test_training_reads_the_same_pixels(demo, server, tmp_path):
    """In this process, and in workers that are forked after it opened its own file system."""
    encoder = encoder_of(demo)
    local = PackedDataset.from_files(demo / "train.json", encoder, 2048)
    web = PackedDataset.from_files(f"{server.url}/train.json", encoder, 2048)
    assert web.media_folders == [server.url]
    expected = batches(local, encoder)
    assert_equal(batches(web, encoder), expected)
    assert_equal(batches(web, encoder, num_workers=2), expected)
    web.save(tmp_path / "saved")
    saved = PackedDataset.from_store(tmp_path / "saved")
    assert saved.fingerprint() == web.fingerprint()
    assert_equal(batches(saved, encoder), expected)


@pytest.mark.slow
def test_several_processes(demo, server):
    encoder = encoder_of(demo)
    url = f"{server.url}/train.json"
    alone = PackedDataset.from_files(url, encoder, 2048)
    several = PackedDataset.from_files(url, encoder, 2048, jobs=2)
    assert several.fingerprint() == alone.fingerprint()


def test_inspect(demo, server, tmp_path, capsys):
    """It shows images as training reads them."""
    assert pack(demo, f"{server.url}/train.json", tmp_path / "web") == 0
    page = tmp_path / "page.html"
    assert main(["inspect", str(tmp_path / "web"), "--html", str(page), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["problems"] == []
    assert "noise%201.png" in page.read_text() and "data:image/jpeg" in page.read_text()


def test_memory(demo, tmp_path):
    encoder = encoder_of(demo)
    url = in_memory(demo)
    expected = batches(PackedDataset.from_files(demo / "train.json", encoder, 2048), encoder)
    dataset = PackedDataset.from_files(f"{url}/train.json", encoder, 2048)
    assert_equal(batches(dataset, encoder), expected)
    # local rows, and images in storage
    rows = tmp_path / "train.json"
    rows.write_bytes((demo / "train.json").read_bytes())
    mixed = PackedDataset.from_files(rows, replace(encoder, media_dir=url), 2048)
    assert_equal(batches(mixed, encoder), expected)
    fsspec.filesystem("memory").rm("/data", recursive=True)


def test_a_stream(demo, server):
    encoder = encoder_of(demo)
    url = f"{server.url}/train.json"
    web = PackStream(lambda: encoder.read(url), replace(encoder, media_dir=server.url), 2048)
    local = PackStream(lambda: encoder.read(demo / "train.json"), encoder, 2048)
    assert_equal(batches(web, encoder), batches(local, encoder))
    rows = json.loads((demo / "train.json").read_text())
    of_rows = PackStream(rows, replace(encoder, media_dir=server.url), 2048)
    assert_equal(batches(of_rows, encoder), batches(local, encoder))


def test_every_kind_of_data_file(demo, server, tmp_path, monkeypatch):
    rows = json.loads((demo / "train.json").read_text())[:4]
    rows = [{**row, "n": str(n)} for n, row in enumerate(rows)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = pyarrow.Table.from_pylist(rows)
    files = {"a.json": json.dumps(rows).encode(), "a.jsonl": lines}
    files["a.jsonl.gz"] = gzip.compress(lines)
    files["a.jsonl.zst"] = pyarrow.compress(lines, "zstd", asbytes=True)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    files["a.parquet"] = buffer.getvalue()
    buffer = io.BytesIO()
    with pyarrow.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    files["a.arrow"] = buffer.getvalue()
    expected = list(Reader().read(demo / "train.json"))[:4]
    for name, content in files.items():
        (demo / name).write_bytes(content)
        found = list(Reader().read(f"{server.url}/{name}"))
        (demo / name).unlink()
        assert len(found) == 4, name
        for ours, theirs in zip(found, expected):
            assert [m.role for m in ours.messages] == [m.role for m in theirs.messages], name
            assert [i.size for i in ours.images] == [i.size for i in theirs.images], name
    (demo / "a.csv").write_text("prompt,response\nWhat?,That.\n")
    (sample,) = Reader(
        mapping={"columns": {"prompt": "prompt", "response": "response"}}
    ).read(f"{server.url}/a.csv")  # fmt: skip
    assert sample.messages[1].content == ("That.",)
    (demo / "a.csv").unlink()


def test_a_folder_on_a_web_server_has_no_list(server):
    with pytest.raises(ValueError, match="a web server has no list of a folder's files; name the"):
        list(Reader().read(server.url))


def test_a_root_of_an_entry(demo, server, tmp_path):
    """`media_dir` of a dataset_info.json entry beside the data, or that leads elsewhere."""
    rows = [{"instruction": "<image>?", "output": "!", "images": ["000_0.png"]}]
    (demo / "short.json").write_text(json.dumps(rows))
    try:
        for place in ("charts", "../x", "http://127.0.0.2/", "/etc", "memory://x"):
            info = {"d": {"file_name": "short.json", "media_dir": place}}
            (demo / "dataset_info.json").write_text(json.dumps(info))
            if place == "charts":
                (sample,) = Reader().read(f"{server.url}/short.json")
                assert sample.images[0].path == f"{server.url}/charts/000_0.png"
                continue
            with pytest.raises(ValueError, match="media_dir"):
                next(Reader().read(f"{server.url}/short.json"))
    finally:
        (demo / "dataset_info.json").unlink()
        (demo / "short.json").unlink()


def test_an_entry_names_no_root_of_its_own(demo, server, tmp_path):
    """A local dataset_info.json may name a URL as `media_dir` only inside of one that the user names."""
    rows = [{"instruction": "<image>?", "output": "!", "images": ["000_0.png"]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    info = {"d": {"file_name": "rows.json", "media_dir": f"{server.url}/charts"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="is outside .*; add it with --media-dir"):
        list(Reader().read(tmp_path / "rows.json"))
    (sample,) = Reader(media_dir=server.url).read(tmp_path / "rows.json")
    assert sample.images[0].path == f"{server.url}/charts/000_0.png"
    info = {"d": {"file_name": f"{server.url}/train.json"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="has a URL as file_name"):
        list(Reader(mapping="d").read(tmp_path))


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("403", "cannot be read: 403 Forbidden"),
        ("404", "does not exist"),
        ("500", r"cannot be read: 500 Internal Server Error \(tried 3 times\)"),
        ("cut", "cannot be read: the answer was cut off"),
        ("to http://127.0.0.2:1/?sig=hunter2", "another host, 127.0.0.2"),
    ],
)
def test_a_failing_object_is_an_error_of_its_row(demo, server, fault, why):
    url = f"{server.url}/noise%201.png"
    server.faults["/noise 1.png"] = [f"{fault}!"]
    bad = []
    encoder = encoder_of(demo, on_error=bad)
    dataset = PackedDataset.from_files(f"{server.url}/train.json", encoder, 2048)
    assert len(dataset.samples) == NUM_ROWS + 2
    (row,) = bad
    assert row.row == NUM_ROWS and f"image {url}" in row.error and "hunter2" not in str(row)
    assert re.search(why, row.error)
    with pytest.raises(ValueError, match=f"row {NUM_ROWS} of train.json: image {url} .*{why}"):
        list(replace(encoder, on_error="raise").read(f"{server.url}/train.json"))


def test_faults_that_pass_change_nothing(demo, server):
    for path in ("/train.json", "/noise 1.png", "/b.jpg"):
        server.faults[path] = ["500", "cut"]
    found = list(Reader().read(f"{server.url}/train.json"))
    assert len(found) == NUM_ROWS + 3


def test_a_url_in_a_row_stays_refused(demo, server):
    url = f"{server.url}/b.jpg"
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "Noise."}]
    row = {"conversations": turns, "images": [url]}
    for media_dir in (server.url, str(demo)):
        with pytest.raises(ValueError, match="is a URL, not a file"):
            list(Reader(media_dir=media_dir).read([row]))
    row["images"] = ["../b.jpg"]
    with pytest.raises(ValueError, match=r"has '\.\.'"):
        list(Reader(media_dir=server.url).read([row]))
    assert server.requests == []


def test_several_roots(demo, server, tmp_path):
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "Noise."}]
    rows = [{"conversations": turns, "images": ["b.jpg"]}]
    (sample,) = Reader(media_dir=[tmp_path, server.url]).read(rows)
    assert sample.images[0].path == f"{server.url}/b.jpg"
    with pytest.raises(ValueError, match="is ambiguous"):
        list(Reader(media_dir=[demo, server.url]).read(rows))
    with pytest.raises(ValueError, match="does not exist in"):
        list(Reader(media_dir=[tmp_path, f"{server.url}/charts"]).read(rows))
    rows[0]["images"] = [str(demo / "b.jpg")]  # absolute: of the local folder
    (sample,) = Reader(media_dir=[demo, server.url]).read(rows)
    assert sample.images[0].path == str(demo / "b.jpg")


def test_a_changed_image(demo, server, tmp_path, capsys):
    """It is refused in training; packing again encodes anew."""
    encoder = encoder_of(demo)
    assert pack(demo, f"{server.url}/train.json", tmp_path / "web") == 0
    dataset = PackedDataset.from_store(tmp_path / "web")
    before = (demo / "b.jpg").read_bytes()
    try:
        Image.new("RGB", (280, 280)).save(demo / "b.jpg")
        with pytest.raises(BadImageError) as failed:
            batches(dataset, encoder)
        text = str(failed.value)
        assert f"row {NUM_ROWS + 1} of train.json: image {server.url}/b.jpg changed since" in text
        assert "--overwrite" in text
        assert pack(demo, f"{server.url}/train.json", tmp_path / "web") == 1
        assert f"{server.url}/b.jpg changed since" in capsys.readouterr().err
        assert pack(demo, f"{server.url}/train.json", tmp_path / "web", "--overwrite") == 0
        assert batches(PackedDataset.from_store(tmp_path / "web"), encoder)
    finally:
        (demo / "b.jpg").write_bytes(before)


def test_a_changed_data_file(demo, server, tmp_path):
    assert pack(demo, f"{server.url}/train.json", tmp_path / "web") == 0
    before = (demo / "train.json").read_bytes()
    try:
        (demo / "train.json").write_bytes(before + b" ")
        with pytest.raises(ValueError, match=f"{server.url}/train.json changed since"):
            PackedDataset.from_store(tmp_path / "web")
        (demo / "train.json").unlink()  # a store no longer needs it
        PackedDataset.from_store(tmp_path / "web")
    finally:
        (demo / "train.json").write_bytes(before)


def test_objects_are_opened_inside_named_roots_only(demo, server, tmp_path):
    encoder = encoder_of(demo)
    dataset = PackedDataset.from_files(f"{server.url}/train.json", encoder, 2048)
    asked = len(server.requests)
    for folders, why in (
        (None, "no root there was named"),
        ([str(demo)], "is outside"),
        ([f"{server.url}/charts2"], "is outside"),
        (["http://127.0.0.2:1"], "is outside"),
    ):
        dataset.media_folders = folders
        with pytest.raises(BadImageError, match=why):
            batches(dataset, encoder)
    assert len(server.requests) == asked


@pytest.mark.parametrize("out", ["s3://bucket/out", "https://host.example/out", "memory://out"])
def test_packed_data_stay_local(demo, out, capsys):
    assert pack(demo, demo / "train.json", out) == 1
    assert "is not a local folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is not a local folder"):
        PackedDataset.from_store(out)
    dataset = PackedDataset.from_files(demo / "train.json", encoder_of(demo), 2048)
    with pytest.raises(ValueError, match="is not a local folder"):
        dataset.save(out)


def test_check(demo, server, tmp_path, capsys):
    assert main(["check", f"{server.url}/train.json", f"{server.url}/train.json", "--decode", "--json"]) == 0  # fmt: skip
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])["summary"]
    assert summary["usable"] == 2 * (NUM_ROWS + 3)
    assert summary["files_twice"] == 1
    assert main(["check", f"https://user:hunter2@127.0.0.1/{server.url}/train.json"]) == 1
    assert main(["check", "https://127.0.0.1/train.json?X-Amz-Signature=hunter2"]) == 1
    secret = "https://user:hunter2@127.0.0.1/{0..999999}"
    data, out = str(demo / "train.json"), str(tmp_path / "out")
    to_pack = ["pack", data, "--out", out, "--capacity", "2048"]
    for words in (
        ["check", secret],
        ["inspect", secret],
        [*to_pack, "--tokenizer", secret],
        [*to_pack, "--tokenizer", str(demo / "tokenizer"), "--config", secret],
        [*to_pack, "--tokenizer", str(demo / "tokenizer"), "--media-dir", secret],
        ["train", "--data", secret, "--model", secret, "--output_dir", out],
        ["train", "--data", secret, "--model", secret, "--tokenizer", secret, "--capacity", "9"],
        ["train", "--data", data, "--model", secret, "--tokenizer", secret, "--capacity", "9"],
    ):
        assert main(words) == 1, words
    found = capsys.readouterr()
    assert "hunter2" not in found.out + found.err


@pytest.mark.parametrize("place", ["memory://data/train.json", "tr*.json", "{train,train}.json"])
def test_the_train_command_reads_what_the_others_do(demo, tmp_path, monkeypatch, place):
    """URLs and patterns, of training and of evaluation."""
    in_memory(demo)
    seen = {}

    def train(model, dataset, args, *more, eval_dataset=None, **options):
        seen.update(train=dataset, eval=eval_dataset)
        return {}

    monkeypatch.setattr("mmpack.hf.training.train", train)
    data = place if "://" in place else demo / place
    words = [
        "--capacity",
        2048,
        "--tokenizer",
        demo / "tokenizer",
        "--config",
        demo / "config.json",
    ]
    words = ["train", "--data", data, "--eval-data", data, *words, "--output_dir", tmp_path]
    assert main(list(map(str, [*words, "--quiet"]))) == 0
    rows = (2 if "{" in place else 1) * len(json.loads((demo / "train.json").read_text()))
    for dataset in seen.values():
        assert sum(map(len, dataset)) == rows


def test_the_train_command_names_what_is_missing(demo, tmp_path, capsys):
    words = ["train", "--tokenizer", demo / "tokenizer", "--capacity", 2048, "--data"]
    for place, text in (
        (tmp_path / "no.json", "no such file or folder; fix the path"),
        (tmp_path / "no*.json", "no file matches"),
        ("memory://nowhere", "memory://nowhere has no data files"),
    ):
        config = ["--config", demo / "config.json", "--output_dir", tmp_path]
        assert main(list(map(str, [*words, place, *config]))) == 1
        assert text in capsys.readouterr().err
