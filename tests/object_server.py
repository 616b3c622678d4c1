"""A web server on the loopback that serves objects with ranges and ETags, and has faults on demand."""

import contextlib
import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import numpy as np


class ObjectServer(ThreadingHTTPServer):
    """Serves the files of a folder.

    Attributes:
        faults: path -> faults, such as {"/a.png": ["500", "500"]}: one is taken at each request, and the last
            stays if it ends with "!". "403", "404", "500", "503": that status. "cut": half of the body. "slow":
            waits `seconds` first. "no range": all bytes, whatever was asked for. "no tag": no ETag. "no size".
            "gzip". "to URL": a redirect.
            "odd headers": some named like keys of fsspec. "HEAD 405": the fault is of HEAD alone, and stays.
        requests: (method, path, Range) of each.
        num_sent: bytes of bodies.
    """

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.faults, self.requests, self.num_sent = folder, {}, [], 0
        self.seconds = 5.0
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def fault(self, path, method):
        with self.lock:
            faults = self.faults.get(path, [])
            if not faults:
                return ""
            if faults[0].startswith("HEAD "):
                return faults[0][5:] if method == "HEAD" else ""
            return faults[0][:-1] if faults[0].endswith("!") else faults.pop(0)

    def handle_error(self, request, client_address):
        """Clients that have read enough close the connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(is_head=True)

    def do_GET(self):
        self._answer(is_head=False)

    def _answer(self, is_head):
        server = self.server
        path = unquote(urlsplit(self.path).path)
        wanted = self.headers.get("Range")
        server.requests.append((self.command, path, wanted))
        fault = server.fault(path, self.command)
        if fault == "slow":
            time.sleep(server.seconds)
        if fault.startswith("to "):
            return self._send(302, b"", {"Location": fault[3:]})
        if fault.isdigit():
            return self._send(int(fault), b"no", {}, is_head)
        try:
            file = server.folder / path.lstrip("/")
            size = file.stat().st_size
            content = file.read_bytes() if size < 1 << 28 else memoryview(np.memmap(file))
        except OSError:
            return self._send(404, b"", {})
        headers = {"ETag": f'"{hashlib.md5(content[: 1 << 24]).hexdigest()}"'}
        if fault == "no tag":
            headers = {}
        if fault == "gzip":
            headers["Content-Encoding"] = "gzip"
        if fault == "odd headers":
            headers |= {"Size": "3", "Type": "directory", "Created": str(len(server.requests))}
        status, body = 200, content
        if wanted and fault != "no range":
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            if first >= len(content):
                return self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            body = content[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{first + len(body) - 1}/{len(content)}"
            status = 206
        self._send(status, body, headers, is_head, fault)

    def _send(self, status, body, headers, is_head=False, fault=""):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if fault == "no size":
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "cut":
            body, self.close_connection = body[: len(body) // 2], True
        for start in range(0, 0 if is_head else len(body), 1 << 16):
            block = body[start : start + (1 << 16)]
            self.server.num_sent += len(block)  # first: the client may be ahead of this thread
            self.wfile.write(block)


@contextlib.contextmanager
def serving(folder):
    """An `ObjectServer` of a folder, while the block runs."""
    with ObjectServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
