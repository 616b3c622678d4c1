"""Folders, braces and roots in object storage, alone and beside local ones; what is read of them, and what not."""

import io
import json
from unittest import mock
from urllib.parse import quote

import fsspec
import pytest
from builders import VOCAB, tiny_config
from object_server import serving

pytest.importorskip("pyarrow")

import pyarrow
import pyarrow.parquet

from mmpack import Encoder, PackedDataset, Reader, assemble
from mmpack.cli.demo import write_data
from mmpack.cli.main import main
from mmpack.data import remote_files
from mmpack.data.progress import row_progress
from mmpack.packing.assemble import load_pixels
from mmpack.packing.context_group import ContextGroup
from mmpack.packing.fetched_images import FetchedImages


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objects") / "data"
    write_data(folder, 6)
    return folder


@pytest.fixture
def server(demo, monkeypatch):
    monkeypatch.setattr(remote_files, "_WAITS_S", (0.01, 0.01))
    with serving(demo) as running:
        yield running


def test_folders():
    memory = fsspec.filesystem("memory")
    row = b'{"instruction": "?", "output": "!"}\n'
    memory.pipe("/hub/data/train-00000-of-00002.jsonl", row)
    memory.pipe("/hub/data/train-00001-of-00002.jsonl", row * 2)
    memory.pipe("/hub/README.md", b"#")
    assert len(list(Reader().read("memory://hub"))) == 3
    assert len(list(Reader().read("memory://hub/data/"))) == 3
    info = {"d": {"file_name": "data/train-00000-of-00002.jsonl"}, "up": {"file_name": "../x.json"}}
    memory.pipe("/hub/dataset_info.json", json.dumps(info).encode())
    assert len(list(Reader(mapping="d").read("memory://hub"))) == 1
    with pytest.raises(ValueError, match=r"'\.\.'"):
        list(Reader(mapping="up").read("memory://hub"))
    memory.pipe("/hub/data/test-00000-of-00001.jsonl", row)
    with pytest.raises(ValueError, match="several splits"):
        list(Reader().read("memory://hub"))
    memory.rm("/hub/data/test-00000-of-00001.jsonl")
    memory.pipe("/more/data/a.jsonl", row)
    memory.pipe("/more/b.jsonl", row)
    assert len(list(Reader().read("memory://{hub,more}/data"))) == 4
    assert len(list(Reader().read("memory://{hub/data,more/b.jsonl}"))) == 4
    memory.pipe("/more/c.jsonl/d.jsonl", row)
    with pytest.raises(ValueError, match=r"c\.jsonl .*it is a folder; name an object in it$"):
        list(Reader().read("memory://more/c.jsonl"))
    memory.rm("/more", recursive=True)
    with pytest.raises(ValueError, match="memory://nowhere has no data files"):
        list(Reader().read("memory://nowhere"))
    memory.rm("/hub", recursive=True)


def test_names_in_a_local_root_beside_a_remote_one(demo, server, tmp_path):
    """Backslashes and another Unicode form, as without the remote root."""
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "Noise."}]
    (tmp_path / "sub").mkdir()
    picture = (demo / "charts/000_0.png").read_bytes()
    for name in ("x.jpg", "e\u0301.jpg"):
        (tmp_path / "sub" / name).write_bytes(picture)
    for root in (
        [tmp_path],
        [tmp_path, server.url],
        [tmp_path, server.url, tmp_path / "." / "sub" / ".."],
    ):
        for name, found in (("sub\\x.jpg", "x.jpg"), ("sub/\u00e9.jpg", "e\u0301.jpg")):
            row = {"conversations": turns, "images": [name]}
            (sample,) = Reader(media_dir=root).read([row])
            assert sample.images[0].path == str(tmp_path / "sub" / found)
    (demo / "sub").mkdir()
    try:
        (demo / "sub" / "x.jpg").write_bytes(picture)
        row = {"conversations": turns, "images": ["sub\\x.jpg"]}
        with pytest.raises(ValueError, match="is ambiguous"):
            list(Reader(media_dir=[tmp_path, server.url]).read([row]))
    finally:
        (demo / "sub" / "x.jpg").unlink()
        (demo / "sub").rmdir()


def test_rows_of_objects_are_not_counted_for_a_bar(demo, server):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"a": [1, 2]}), buffer)
    (demo / "a.parquet").write_bytes(buffer.getvalue())
    try:
        for name, total in ((demo / "a.parquet", 2), (f"{server.url}/a.parquet", None)):
            groups = list(Reader().groups(name))
            server.requests.clear()
            with row_progress("rows", groups) as (_, shown):
                assert shown._total == total
            assert server.requests == []
    finally:
        (demo / "a.parquet").unlink()


def test_ranks_that_share_a_pack_read_their_own_images(demo, server):
    """Each rank reads several at once, and no image of another rank."""
    encoder = Encoder.from_folder(demo / "tokenizer")
    dataset = PackedDataset.from_files(f"{server.url}/train.json", encoder, 1 << 16)
    urls = {ref.path for sample in dataset[0] for ref in sample.media}
    whole = assemble(dataset[0])
    read, at_once, patches = [], [], 0
    for rank in range(2):
        server.requests.clear()
        with mock.patch.object(
            FetchedImages, "image", autospec=True, side_effect=FetchedImages.image
        ) as image:
            _, buffer = load_pixels([dataset[0]], context=ContextGroup(rank, 2))
        at_once.append(
            all(len(call.args[0]._found) == image.call_count for call in image.mock_calls)
        )
        read += [f"{server.url}{quote(path)}" for _, path, _ in server.requests]
        patches += len(buffer.stills)
    assert sorted(read) == sorted(urls) and at_once == [True, True]
    assert patches == len(whole.pixels)


@pytest.mark.parametrize("place", ["web", "disk"])
def test_train_takes_what_pack_takes(demo, server, tmp_path, capsys, place):
    """A URL, and names with braces, as rows that are packed now."""
    config = tiny_config(VOCAB, vision=Encoder.from_folder(demo / "tokenizer").vision)
    config.to_json_file(tmp_path / "config.json")
    data = f"{server.url if place == 'web' else demo}/{{train,train}}.json"
    words = ["train", "--data", data, "--tokenizer", demo / "tokenizer", "--capacity", 1024]
    words += ["--config", tmp_path / "config.json", "--steps", 1, "--save_strategy", "no"]
    assert main(list(map(str, [*words, "--output_dir", tmp_path / "run"]))) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 1
