"""Objects behind a real web server with ranges, on the loopback, and its faults; and `memory://`."""

import errno
import importlib
import multiprocessing
import os
import sys

import fsspec
import pytest
from object_server import serving

from mmpack.data import remote_files, remote_http
from mmpack.data.remote_files import RemoteError, identity, in_parallel, listed
from mmpack.data.remote_objects import HEADER, RemoteObject, identity_of, open_object
from mmpack.errors import RowError

CONTENT = bytes(range(251)) * 2000  # 502,000 bytes


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of a folder with `a.bin`; further tries come at once, and a request may take a second."""
    monkeypatch.setattr(remote_files, "_WAITS_S", (0.01, 0.01, 0.01))
    (tmp_path / "a.bin").write_bytes(CONTENT)
    with serving(tmp_path) as running:
        yield running


def test_a_header_is_one_range(server):
    with open_object(f"{server.url}/a.bin", block=HEADER) as file:
        assert file.read(100) == CONTENT[:100]
        assert identity_of(file).size == len(CONTENT)
    assert server.requests == [("GET", "/a.bin", f"bytes=0-{HEADER - 1}")]
    assert server.num_sent == HEADER


def test_a_file_of_ranges(server):
    with open_object(f"{server.url}/a.bin", block=1000) as file:
        for start, length in ((0, 10), (250_000, 7), (501_990, 100), (3, 1500), (400_000, 90_000)):
            assert file.seek(start) == start
            assert file.read(length) == CONTENT[start : start + length]
        assert file.seek(-5, os.SEEK_END) == len(CONTENT) - 5
        assert file.read() == CONTENT[-5:]
        assert file.read() == b""
        file.seek(0)
        assert file.read() == CONTENT
        with pytest.raises(ValueError, match="negative"):
            file.raw.seek(-1)


def test_ranges_grow(server):
    """What needs more than a header has all of it in a few requests."""
    remote = RemoteObject(f"{server.url}/a.bin", first=HEADER)
    read = b"".join(remote.read_at(at, 1000) for at in range(0, len(CONTENT), 1000))
    assert read == CONTENT
    assert len(server.requests) == 4  # 64, 128 and 256 KiB, and the rest


def test_an_empty_object(server, tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    with open_object(f"{server.url}/empty") as file:
        assert file.read() == b""
        assert identity_of(file).size == 0


@pytest.mark.parametrize(
    ("faults", "tries"),
    [(["500"], 2), (["503", "429", "408"], 4), (["cut"], 2), (["cut", "500"], 3), (["no size"], 1)],
)
def test_a_fault_that_passes(server, faults, tries):
    server.faults["/a.bin"] = faults
    with open_object(f"{server.url}/a.bin") as file:
        assert file.read() == CONTENT
    assert len(server.requests) == tries


@pytest.mark.parametrize(
    ("fault", "tries", "reason"),
    [
        ("403", 1, "403 Forbidden"),
        ("401", 1, "401 Unauthorized"),
        ("400", 1, "400 Bad Request"),
        ("500", 4, r"500 Internal Server Error \(tried 4 times\)"),
        ("503", 4, r"503 Service Unavailable \(tried 4 times\)"),
        ("cut", 4, r"the answer was cut off \(tried 4 times\)"),
        ("gzip", 1, "compresses it"),
        ("to http://127.0.0.2:1/a.bin?token=hunter2", 1, "redirects to another host, 127.0.0.2"),
        ("to http://user:hunter2@127.0.0.2/", 1, "redirects to another host"),
        ("to file:///etc/passwd", 1, "redirects to another host"),
        ("to //[", 1, "redirects to another host"),
        ("to /a.bin", 6, "more than 5 redirects"),
    ],
)
def test_a_fault_that_stays(server, fault, tries, reason):
    server.faults["/a.bin"] = [f"{fault}!"]
    url = f"{server.url}/a.bin"
    with pytest.raises(RemoteError, match=reason) as failed:
        open_object(url)
    assert failed.value.filename == url
    assert "hunter2" not in str(failed.value) and failed.value.__cause__ is None
    assert len(server.requests) == tries


def test_a_redirect_on_the_same_host(server, tmp_path):
    (tmp_path / "b.bin").write_bytes(CONTENT[:70])
    server.faults["/a.bin"] = ["to /b.bin!"]
    with open_object(f"{server.url}/a.bin") as file:
        assert file.read() == CONTENT[:70]


@pytest.mark.parametrize("url", ["https://host.example/a", "http://host.example:81/a", "//b/a"])
def test_where_redirects_may_lead(url):
    leaves = remote_http._redirected("http://host.example/a", "https://host.example/b?c")
    assert leaves == "https://host.example/b?c"  # the same host, now encrypted
    with pytest.raises(OSError, match="another host"):
        remote_http._redirected(url, "http://host.example/b")


def test_what_does_not_exist(server):
    with pytest.raises(FileNotFoundError) as failed:
        identity(f"{server.url}/b.bin")
    assert failed.value.errno == errno.ENOENT
    assert len(server.requests) == 1


def test_a_server_that_is_not_there(monkeypatch):
    monkeypatch.setattr(remote_files, "_WAITS_S", (0.01,))
    with pytest.raises(RemoteError, match=r"Connect.*\(tried 2 times\)"):
        identity("http://127.0.0.1:9/a.bin")


def test_slow(server, monkeypatch):
    monkeypatch.setattr(remote_files, "_TIMEOUT_S", 0.2)
    server.seconds = 0.6
    server.faults["/a.bin"] = ["slow"]
    assert identity(f"{server.url}/a.bin").size == len(CONTENT)
    server.faults["/a.bin"] = ["slow!"]
    with pytest.raises(RemoteError, match=r"it took too long \(tried 4 times\)"):
        open_object(f"{server.url}/a.bin", block=1000)


def test_a_server_that_ignores_ranges(server, tmp_path, monkeypatch):
    """It would send all; what was not asked for is not read."""
    server.faults["/a.bin"] = ["no range!"]
    with open_object(f"{server.url}/a.bin", block=HEADER) as file:
        assert file.read(10) == CONTENT[:10]
        file.seek(300_000)
        assert file.read(10) == CONTENT[300_000:300_010]  # some may be skipped
    with open(tmp_path / "large.bin", "wb") as large:
        large.truncate(1 << 32)
    server.faults["/large.bin"] = ["no range!"]
    server.num_sent = 0
    with open_object(f"{server.url}/large.bin", block=HEADER) as file:
        assert file.read(10) == bytes(10)
        assert identity_of(file).size == 1 << 32
        file.seek(1 << 30)
        with pytest.raises(RemoteError, match="ignores ranges"):
            file.read(10)
    assert server.num_sent < 1 << 25  # of 4 GiB


@pytest.mark.parametrize("fault", ["400", "403", "405", "501", "no size"])
def test_a_server_without_head(server, tmp_path, fault):
    """The first byte's answer tells what HEAD does not."""
    (tmp_path / "empty").write_bytes(b"")
    for name, size in (("a.bin", len(CONTENT)), ("empty", 0)):
        url = f"{server.url}/{name}"
        with_head = identity(url)
        server.faults[f"/{name}"] = [f"HEAD {fault}"]
        server.requests.clear()
        if size or fault != "no size":  # then not even the range says it
            assert identity(url) == (with_head if size else (0, ""))
            assert server.requests[-1] == ("GET", f"/{name}", "bytes=0-0")
        assert server.num_sent <= 1


def test_headers_named_like_keys_of_fsspec(server):
    server.faults["/a.bin"] = ["odd headers!"]
    url = f"{server.url}/a.bin"
    found = identity(url)
    assert found.size == len(CONTENT) and found.tag.startswith("ETag")
    assert open_object(url, str(found)).read() == CONTENT


def test_values_are_taken_as_results_are(monkeypatch):
    taken = []

    def values():
        for n in range(1000):
            taken.append(n)
            yield n

    results = in_parallel(lambda n: n * n, values())
    assert next(results) == 0
    assert len(taken) <= 4 * remote_files.IN_FLIGHT
    assert list(results) == [n * n for n in range(1, 1000)]

    def torn():
        yield from range(20)
        raise ValueError("torn")

    found = []
    with pytest.raises(ValueError, match="torn"):
        for one in in_parallel(lambda n: n, torn()):
            found.append(one)  # noqa: PERF402
    assert found == list(range(20))

    failing = in_parallel(lambda n: 1 // (n - 3), values())
    assert [next(failing) for _ in range(3)] == [-1, -1, -1]
    with pytest.raises(ZeroDivisionError):
        next(failing)


def test_many_at_once(server):
    found = list(in_parallel(lambda n: identity(f"{server.url}/a.bin?{n}").size, range(100)))
    assert found == [len(CONTENT)] * 100


def test_memory():
    memory = fsspec.filesystem("memory")
    memory.pipe("/remote_files/a.bin", CONTENT)
    memory.pipe("/remote_files/sub/b.bin", b"b")
    url = "memory://remote_files/a.bin"
    file = open_object(url, block=HEADER)
    file.seek(300_000)
    assert file.read(10) == CONTENT[300_000:300_010]
    assert listed("memory://remote_files") == ["a.bin"]
    version = str(identity(url))
    assert version.startswith("502000 created ")
    with pytest.raises(RemoteError, match="folder"):
        identity("memory://remote_files/sub")
    with pytest.raises(FileNotFoundError):
        identity("memory://remote_files/c.bin")
    memory.pipe("/remote_files/a.bin", CONTENT)
    with pytest.raises(RowError, match="changed since it was packed"):
        open_object(url, version)
    memory.rm("/remote_files", recursive=True)


class _Odd:
    """A file system of a library that raises what it likes."""

    def __init__(self, error):
        self.error, self.tries = error, 0

    def _strip_protocol(self, url):
        return url

    def info(self, path, **_):
        self.tries += 1
        raise self.error


def _of_library(*names, base=Exception):
    """An error of a class with these names, derived from each other; by default no OSError."""
    kind = base
    for name in reversed(names):
        kind = type(name, (kind,), {})
    return kind("the server went away")


@pytest.mark.parametrize(
    ("error", "reason", "tries"),
    [
        (RuntimeError("no credentials were found"), "no credentials were found", 1),
        (RuntimeError("https://bucket.example/a?X-Amz-Signature=hunter2"), "RuntimeError", 1),
        (ValueError("secret key hunter2 is wrong"), "ValueError", 1),
        (PermissionError("Forbidden"), "Forbidden", 1),
        (OSError(errno.EBUSY, "Please reduce your request rate"), "reduce your request rate", 3),
        (_of_library("ConnectError", "NetworkError", "TransportError"), "went away", 3),
        (_of_library("ReadTimeout", "TimeoutException"), "it took too long", 3),
        (_of_library("RemoteProtocolError", "ProtocolError"), "went away", 3),
        (_of_library("UnsupportedProtocol", "TransportError"), "went away", 1),
        (_of_library("ServerDisconnectedError", "ClientConnectionError"), "went away", 3),
        (_of_library("ClientPayloadError", "ClientError"), "went away", 3),
        (_of_library("ClientSSLError", "ClientConnectionError"), "went away", 1),
        (
            _of_library("EndpointConnectionError", "ConnectionError", "BotoCoreError"),
            "went away",
            3,
        ),
        (_of_library("ConnectionClosedError", "HTTPClientError"), "went away", 3),
        (_of_library("NoCredentialsError", "BotoCoreError"), "went away", 1),
        (_of_library("OfflineModeIsEnabled", base=ConnectionError), "went away", 1),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "reset by peer", 3),
    ],
)
def test_what_libraries_raise(monkeypatch, error, reason, tries):
    monkeypatch.setattr(remote_files, "_WAITS_S", (0.01, 0.01))
    odd = _Odd(error)
    monkeypatch.setitem(remote_files._opened, (os.getpid(), "gs"), odd)
    with pytest.raises(RemoteError, match=reason) as failed:
        identity("gs://bucket/a")
    assert "hunter2" not in str(failed.value)
    assert odd.tries == tries


@pytest.mark.parametrize(
    ("scheme", "module", "package"),
    [("s3", "s3fs", "s3fs"), ("gs", "gcsfs", "gcsfs"), ("https", "aiohttp", "'mmpack.remote.'")],
)
def test_a_missing_package_is_named(monkeypatch, scheme, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    for name in [name for name in sys.modules if name.startswith("fsspec.implementations.http")]:
        monkeypatch.delitem(sys.modules, name)
    registry = importlib.import_module("fsspec.registry")  # `fsspec.registry` is its table
    monkeypatch.delitem(registry._registry, scheme, raising=False)
    monkeypatch.setattr(remote_files, "_opened", {})
    with pytest.raises(ValueError, match=f"{scheme}://.* pip install {package}"):
        identity(f"{scheme}://bucket/a")


def _in_child(url, before, pipe):
    here = (os.getpid(), "http")
    pipe.send((identity(url), id(remote_files._opened[here]) != before, here != os.getppid()))


def test_a_forked_process_opens_its_own(server):
    url = f"{server.url}/a.bin"
    found = identity(url)
    ours = remote_files._opened[os.getpid(), "http"]
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(
        target=_in_child, args=(url, id(ours), send)
    )
    child.start()
    assert receive.poll(20)
    assert receive.recv() == (found, True, True)
    child.join(20)
    assert child.exitcode == 0
