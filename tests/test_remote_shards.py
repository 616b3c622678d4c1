"""Tar shards in object storage: members are ranges, and nothing is unpacked or read that is not needed."""

import fsspec
import numpy as np
import pytest
from object_server import serving
from tar_files import captions, chat, picture, write_tar
from torch.utils.data import DataLoader

pytest.importorskip("pyarrow")

import pyarrow

from mmpack import Encoder, PackedDataset, PackStream, Reader
from mmpack.cli.demo import write_data
from mmpack.data import archives, remote_files
from mmpack.errors import BadImageError
from mmpack.hf import PackCollator


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_data(folder, 1)
    return Encoder.from_folder(folder / "tokenizer")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of two shards with 5 and 4 samples."""
    monkeypatch.setattr(remote_files, "_WAITS_S", (0.01, 0.01))
    write_tar(tmp_path / "train-000.tar", captions(range(5)))
    write_tar(tmp_path / "train-001.tar", captions(range(5, 9)))
    with serving(tmp_path) as running:
        yield running


def batches(dataset, encoder, **loading):
    return list(DataLoader(dataset, collate_fn=PackCollator(encoder), batch_size=1, **loading))


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs):
        for name in ("input_ids", "labels", "pixel_values"):
            assert one[name].equal(other[name]), name


def test_a_store_is_the_local_one_but_for_paths(server, encoder, tmp_path):
    local = PackedDataset.from_files([tmp_path / f"train-00{n}.tar" for n in (0, 1)], encoder, 512)
    web = PackedDataset.from_files(f"{server.url}/train-{{000..001}}.tar", encoder, 512)
    tables = []
    for name, dataset in (("a", local), ("b", web)):
        dataset.save(tmp_path / name)
        tables.append(pyarrow.ipc.open_stream(tmp_path / name / "samples.arrow").read_all())
    differ = [name for name in tables[0].column_names if tables[0][name] != tables[1][name]]
    assert differ == ["images", "versions", "checksum"]
    assert tables[0]["in_tar"].null_count == 0
    expected = batches(local, encoder)
    saved = PackedDataset.from_store(tmp_path / "b")
    assert saved.media_folders == [server.url]
    assert_equal(batches(web, encoder), expected)
    assert_equal(batches(saved, encoder, num_workers=2), expected)


def test_memory(server, encoder, tmp_path):
    memory = fsspec.filesystem("memory")
    for name in ("train-000.tar", "train-001.tar"):
        memory.pipe(f"/shards/{name}", (tmp_path / name).read_bytes())
    local = PackedDataset.from_files([tmp_path / f"train-00{n}.tar" for n in (0, 1)], encoder, 512)
    dataset = PackedDataset.from_files("memory://shards", encoder, 512)
    assert_equal(batches(dataset, encoder), batches(local, encoder))
    memory.rm("/shards", recursive=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream(server, encoder, tmp_path, workers):
    names = "train-{000..001}.tar"
    web = PackStream(f"{server.url}/{names}", encoder, 512, buffer=4)
    local = PackStream(str(tmp_path / names), encoder, 512, buffer=4)
    assert web.media_folders == [server.url]
    assert_equal(
        batches(web, encoder, num_workers=workers), batches(local, encoder, num_workers=workers)
    )


def test_members_are_ranges(server, encoder, tmp_path, monkeypatch):
    """Of large images, the header is read, and the end; in training, an image and its tar header are one range."""
    monkeypatch.setattr(archives, "_SCANNED", 4096)
    large = np.random.default_rng(0).integers(0, 256, 600_000, dtype=np.uint8).tobytes()
    image = picture(0, "PNG", (280, 420))
    assert len(image) > 200_000
    write_tar(
        tmp_path / "large.tar",
        [("a.json", chat()), ("a.png", image), ("b.json", chat()), ("b.png", image), ("b.npy", large)],
    )  # fmt: skip
    dataset = PackedDataset.from_files(f"{server.url}/large.tar", encoder, 512)
    assert server.num_sent < 200_000 < 1_000_000 < (tmp_path / "large.tar").stat().st_size
    server.requests.clear()
    batches(dataset, encoder)
    begins = {sample.media[0].member.offset for sample in dataset.samples}
    asked = {wanted for _, _, wanted in server.requests}
    assert asked == {f"bytes={at - 512}-{at + len(image) - 1}" for at in begins}


def test_a_changed_shard(server, encoder, tmp_path):
    path = tmp_path / "train-000.tar"
    dataset = PackedDataset.from_files(f"{server.url}/train-000.tar", encoder, 512)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"That", b"This") + bytes(10_240))
    with pytest.raises(BadImageError, match=r"image 000..png .* changed since it was packed"):
        batches(dataset, encoder)


@pytest.mark.parametrize("size", [100, 5_000, 20_000, 25_000])
def test_a_torn_shard_is_an_error_as_on_a_disk(server, tmp_path, size):
    path = tmp_path / "train-000.tar"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="damaged at byte") as local:
        list(Reader().read(path))
    with pytest.raises(ValueError) as web:
        list(Reader().read(f"{server.url}/train-000.tar"))
    assert str(web.value).replace(server.url, str(tmp_path)) == str(local.value)


def test_names(server):
    url = server.url
    with pytest.raises(ValueError, match=f"cannot read {url}/train-002.tar: no such object"):
        list(Reader().read(f"{url}/train-{{000..002}}.tar"))
    with pytest.raises(ValueError, match="has '[*]', which is not looked up"):
        list(Reader().read("s3://bucket/train-*.tar"))
    with pytest.raises(ValueError, match="compressed tar file"):
        list(Reader().read(f"{url}/train-000.tar.gz"))
    server.faults["/train-001.tar"] = ["403!"]
    with pytest.raises(ValueError, match=f"{url}/train-001.tar cannot be read: 403 Forbidden"):
        list(Reader().read(f"{url}/train-{{000..001}}.tar"))
