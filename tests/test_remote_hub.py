"""`hf://`: data sets on a hub on the loopback, listed and read by ranges."""

import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from mmpack import Encoder, PackedDataset, Reader
from mmpack.cli.demo import write_data
from mmpack.data import remote_files
from mmpack.data.remote_files import RemoteError, identity, listed
from mmpack.data.remote_objects import RemoteObject, open_object
from mmpack.errors import RowError
from mmpack.packing.assemble import assemble

OLD, NEW = "a" * 40, "b" * 40
DATA = "hf://datasets/owner/name"


class Hub(ThreadingHTTPServer):
    """The endpoints of a hub that `hf://` uses. `files`: of the data set owner/name, by commit."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.branch, self.requests, self.faults = {OLD: {}, NEW: {}}, OLD, [], []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.do_GET(parse_qs(body)["paths"])

    def do_GET(self, asked=()):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        path = (
            "/api/datasets/owner/name/revision/main" if path == "/api/datasets/owner/name" else path
        )
        what = re.fullmatch(r"(?:/api)?/datasets/owner/name/([a-z-]+)/(\w+)(?:/(.+))?", path)
        if what is None:
            return self._answer(404, b"", **{"X-Error-Code": "RepoNotFound"})
        kind, revision, name = what.groups()
        hub.requests.append((kind, name or (asked[0] if asked else None), self.headers["Range"]))
        if kind != "revision" and hub.faults:
            return self._answer(hub.faults.pop(0), b"")
        commit = hub.branch if revision == "main" else revision
        if commit not in hub.files:
            return self._answer(404, b"", **{"X-Error-Code": "RevisionNotFound"})
        files = hub.files[commit]
        if kind == "revision":
            return self._answer(200, json.dumps({"id": "owner/name", "sha": commit}).encode())
        if kind == "resolve":
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            return self._answer(206, files[name][first : last + 1])
        if kind == "paths-info":
            found = [_entry(one, files[one]) for one in asked if one in files]
            found += [_folder(one) for one in asked if any(f.startswith(f"{one}/") for f in files)]
        else:
            start = f"{name}/" if name else ""
            inside = {one[len(start) :] for one in files if one.startswith(start)}
            if not inside:
                return self._answer(404, b"", **{"X-Error-Code": "EntryNotFound"})
            found = [_entry(start + o, files[start + o]) for o in sorted(inside) if "/" not in o]
            found += [
                _folder(start + o) for o in sorted({o.split("/")[0] for o in inside if "/" in o})
            ]
        return self._answer(200, json.dumps(found).encode())

    def _answer(self, status, content, **headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def _entry(path, content):
    return {
        "type": "file",
        "path": path,
        "size": len(content),
        "oid": hashlib.sha1(content).hexdigest(),
    }


def _folder(path):
    return {"type": "directory", "path": path, "oid": "0" * 40}


@pytest.fixture
def hub(monkeypatch):
    hf = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(remote_files, "_WAITS_S", (0.01, 0.01))
    monkeypatch.setattr(hf.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "*")
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        fs = hf.HfFileSystem(endpoint=server.endpoint, token=False, skip_instance_cache=True)
        monkeypatch.setitem(remote_files._opened, (os.getpid(), "hf"), fs)
        yield server
        server.shutdown()


def test_a_folder_is_listed_and_a_range_is_a_range(hub):
    content = bytes(range(251)) * 4000
    hub.files[OLD] = {
        "data/a.bin": content,
        "data/b.bin": b"",
        "data/sub/c.bin": b"c",
        "README.md": b"#",
    }
    assert listed(f"{DATA}/data") == ["a.bin", "b.bin"]
    assert listed(DATA) == ["README.md"]
    hub.requests.clear()
    known = identity(f"{DATA}/data/a.bin")
    assert str(known) == f"{len(content)} blob {hashlib.sha1(content).hexdigest()}"
    assert hub.requests == [("paths-info", "data/a.bin", None)]  # the folder is not listed
    hub.requests.clear()
    with open_object(f"{DATA}/data/a.bin", str(known), 1000) as file:
        file.seek(500_000)
        assert file.read(10) == content[500_000:500_010]
        ranges = [wanted for kind, _, wanted in hub.requests if kind == "resolve"]
        assert ranges == ["bytes=0-999", "bytes=500000-501999"]
        file.seek(0)
        assert file.read() == content
    with open_object(f"{DATA}/data/b.bin") as file:
        assert file.read() == b""
    hub.faults = [503, 429]
    assert RemoteObject(f"{DATA}/data/a.bin", str(known)).read_at(0, 5) == content[:5]
    with pytest.raises(FileNotFoundError):
        identity(f"{DATA}/data/d.bin")
    hub.faults = [403]
    with pytest.raises(RemoteError, match="403 Forbidden"):
        identity(f"{DATA}/data/a.bin")
    with pytest.raises(FileNotFoundError):
        identity("hf://datasets/owner/other/a.bin")
    with pytest.raises(OSError, match="it is a folder"):
        identity(f"{DATA}/data/sub")
    hub.files[OLD]["data/d.bin"] = b"d"  # what was listed before is old
    assert listed(f"{DATA}/data") == ["a.bin", "b.bin", "d.bin"]


def test_a_branch_that_moves_and_a_commit(hub):
    for commit, letter in ((OLD, b"a"), (NEW, b"b")):
        hub.files[commit] = {"x.bin": letter * 10_000}
    moving = RemoteObject(f"{DATA}/x.bin", first=1000, most=1000)
    fixed = RemoteObject(f"{DATA}@{OLD}/x.bin", first=1000, most=1000)
    hub.branch = NEW
    with pytest.raises(RowError, match="x.bin changed while it was read"):
        moving.read_at(0, 10_000)
    hub.requests.clear()
    assert fixed.read_at(0, 10_000) == b"a" * 10_000
    assert {kind for kind, _, _ in hub.requests} == {"resolve"}  # nothing is looked at again


def test_a_data_set_is_packed(hub, tmp_path):
    pytest.importorskip("pyarrow")
    write_data(tmp_path / "demo", 3)
    folder = tmp_path / "demo"
    hub.files[OLD] = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    encoder = Encoder.from_folder(folder / "tokenizer")
    local = PackedDataset.from_files(folder / "train.json", encoder, 2048)
    web = PackedDataset.from_files(f"{DATA}/train.json", encoder, 2048)
    assert web.media_folders == [DATA]
    assert all(
        ref.version.partition(" ")[2].startswith("blob ") for s in web.samples for ref in s.media
    )
    for ours, theirs in zip(web, local, strict=True):
        assert (assemble(ours).pixels == assemble(theirs).pixels).all()
    hub.files[OLD] = {
        "data/a.jsonl": b'{"instruction": "?", "output": "!"}\n' * 2,
        "README.md": b"#",
    }
    assert len(list(Reader().read(DATA))) == 2
