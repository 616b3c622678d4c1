"""Objects that are replaced after they were packed, or while they are read, and damaged records of them."""

import errno
import os

import pytest
from object_server import serving

from mmpack.data import remote_files
from mmpack.data.remote_files import identity
from mmpack.data.remote_objects import RemoteObject, open_object
from mmpack.errors import RowError

CONTENT = bytes(range(251)) * 2000  # 502,000 bytes


@pytest.fixture
def server(tmp_path):
    """A server of a folder with `a.bin`."""
    (tmp_path / "a.bin").write_bytes(CONTENT)
    with serving(tmp_path) as running:
        yield running


def test_a_changed_object(server, tmp_path):
    url = f"{server.url}/a.bin"
    before = str(identity(url))
    assert open_object(url, before).read() == CONTENT
    file = open_object(url, before, block=1000)
    (tmp_path / "a.bin").write_bytes(CONTENT[::-1])
    with pytest.raises(RowError, match=r"changed while it was read: it has 502,000 bytes and ETag"):
        file.seek(400_000), file.read(10)
    with pytest.raises(
        RowError, match=r"changed since it was packed: .* 502,000 bytes .* --overwr"
    ):
        open_object(url, before)


def test_without_a_tag_the_size_is_compared(server, tmp_path):
    server.faults["/a.bin"] = ["no tag!"]
    url = f"{server.url}/a.bin"
    assert str(identity(url)) == "502000"
    (tmp_path / "a.bin").write_bytes(CONTENT[::-1])
    assert open_object(url, "502000").read() == CONTENT[::-1]
    (tmp_path / "a.bin").write_bytes(CONTENT[:-1])
    with pytest.raises(RowError, match="501,999 bytes and no ETag, but 502,000 bytes and no ETag"):
        open_object(url, "502000")


class _Replaced:
    """A file system without conditional requests, in which an object is replaced after some calls."""

    def __init__(self, after):
        self.after, self.calls = after, 0

    def _strip_protocol(self, url):
        return url

    def _now(self):
        self.calls += 1
        return b"new" if self.calls > self.after else b"before"

    def info(self, path):
        content = self._now()
        return {"size": len(content), "type": "file", "etag": content.decode()}

    def cat_file(self, path, start, end):
        content = self._now()
        if start >= len(content):
            raise OSError(errno.EINVAL, "Range Not Satisfiable")
        return content[start:end]


@pytest.mark.parametrize("version", ["", "6 ETag before"])
def test_no_read_mixes_two_objects(monkeypatch, version):
    """Wherever an object is replaced: the bytes of one, or an error at once."""
    monkeypatch.setattr(remote_files, "_WAITS_S", (60.0,))
    read = set()
    for after in range(12):
        storage = _Replaced(after)
        monkeypatch.setitem(remote_files._opened, (os.getpid(), "gs"), storage)
        try:
            remote = RemoteObject("gs://bucket/a", version, first=2, most=2)
            read.add(b"".join(remote.read_at(at, 2) for at in range(0, remote.size, 2)))
        except RowError as error:
            assert "gs://bucket/a changed" in str(error)
            assert version or after, "the new one, from its beginning, is no error"
    assert read == ({b"before"} if version else {b"before", b"new"})
    monkeypatch.setitem(remote_files._opened, (os.getpid(), "gs"), _Replaced(0))
    with pytest.raises(RowError, match="changed since it was packed"):
        RemoteObject("gs://bucket/a", "0 ETag before")  # it was empty: there is no range
    if version:  # an image in training: its bytes, and one look
        storage = _Replaced(99)
        monkeypatch.setitem(remote_files._opened, (os.getpid(), "gs"), storage)
        assert RemoteObject("gs://bucket/a", version).read_at(0, 6) == b"before"
        assert storage.calls == 2


@pytest.mark.parametrize("version", ["", "x ETag 1", "-5", "1" * 5000, "1.5 ETag", "\u0661"])
def test_a_damaged_version(server, version):
    url = f"{server.url}/a.bin"
    with pytest.raises(RowError, match="a.bin was recorded with the version .* --overwrite"):
        remote_files.size_of(url, version)
    if version:
        with pytest.raises(RowError, match="was recorded with the version"):
            open_object(url, version)
