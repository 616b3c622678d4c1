"""A web server on the loopback with ranges and ETags, in a process of its own.

`python -m benchmarks.range_server FOLDER` prints its port and ends with its input.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from benchmarks.harness import ROOT


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The URL of a folder, while the block runs."""
    words = [sys.executable, "-m", "benchmarks.range_server", str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, cwd=ROOT, text=True, **pipes) as server:
        assert server.stdin is not None and server.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.stdin.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(is_head=True)

    def do_GET(self) -> None:
        self._answer(is_head=False)

    def _answer(self, is_head: bool) -> None:
        path = Path(sys.argv[1], unquote(self.path).lstrip("/"))
        if not path.is_file():
            self.send_error(404)
            return
        stat = path.stat()
        first, last = 0, stat.st_size - 1
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        self.send_response(206 if wanted else 200)
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or last), last)
            self.send_header("Content-Range", f"bytes {first}-{last}/{stat.st_size}")
        self.send_header("ETag", f'"{stat.st_mtime_ns}"')
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        if not is_head:
            with path.open("rb") as file:
                file.seek(first)
                self.wfile.write(file.read(last + 1 - first))


if __name__ == "__main__":
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        print(server.server_port, flush=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        sys.stdin.read()
        server.shutdown()
