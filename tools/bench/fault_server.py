"""A web server for one folder, in a thread: byte ranges, ETags, and faults on demand."""

from __future__ import annotations

import gzip
import hashlib
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# What a request is answered with: the name of a fault, or None.
Fault = Callable[[str, int], str | None]
PASSING = ("500", "503", "429", "reset", "silent", "stall", "short", "cut_length", "changed", "changed_mark", "whole")
_TURNED = bytes(byte ^ 0x10 for byte in range(256))


def no_fault(name: str, number: int) -> str | None:
    return None


def random_faults(rate: float, seed: int, kinds: tuple[str, ...] = PASSING) -> Fault:
    """Each request fails with probability `rate`, in one of `kinds`."""
    generator, lock = random.Random(seed), threading.Lock()

    def fault(name: str, number: int) -> str | None:
        with lock:
            return generator.choice(kinds) if generator.random() < rate else None

    return fault


class ShardServer(ThreadingHTTPServer):
    """Serves `root` under /set. `fault(name, number of the request)` says how a request fails; `requests` has
    (name, Range, Authorization) of all."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, root: Path, fault: Fault = no_fault, stall: float = 30.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.fault = fault
        self.stall = stall
        self.requests: list[tuple[str, str | None, str | None]] = []
        self.targets: list[str] = []
        self.contents: dict[tuple[Path, int, int], tuple[bytes, str]] = {}
        self._changed: dict[str, bytes] = {}  # by ETag
        self.hits: dict[str, int] = {}  # faults by kind
        self.marks = True  # whether answers have an ETag
        self.redirect = ""  # where "redirect" leads
        self.latency = 0.0  # seconds before every answer
        self.stopping = threading.Event()
        self.lock = threading.Lock()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    @property
    def url(self) -> str:
        return f"http://{self.host}/set"

    def content(self, path: Path) -> tuple[bytes, str]:
        """Bytes of a file as it is now, and their ETag."""
        found = path.stat()
        key = (path, found.st_mtime_ns, found.st_size)
        if key not in self.contents:
            data = path.read_bytes()
            self.contents[key] = data, f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        return self.contents[key]

    def changed(self, path: Path) -> bytes:
        """Bytes of a file with a bit of every 97th turned, made once: a copy for each answer would hold all others
        up."""
        data, mark = self.content(path)
        if mark not in self._changed:
            changed = bytearray(data)
            changed[5::97] = changed[5::97].translate(_TURNED)
            self._changed[mark] = bytes(changed)
        return self._changed[mark]

    def named(self, name: str) -> int:
        """The number of requests for a file."""
        return sum(request[0] == name for request in self.requests)


@contextmanager
def serving(root: Path, fault: Fault = no_fault, stall: float = 30.0) -> Iterator[ShardServer]:
    server = ShardServer(root, fault, stall)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ShardServer
    disable_nagle_algorithm = True

    def log_message(self, format: str, *values: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        server = self.server
        name = self.path.partition("?")[0].removeprefix("/set/").removeprefix("/moved/")
        with server.lock:
            server.requests.append((name, self.headers.get("Range"), self.headers.get("Authorization")))
            server.targets.append(self.path)
            number = len(server.requests)
        kind = server.fault(name, number)
        if server.latency:
            server.stopping.wait(server.latency)
        if kind:
            with server.lock:
                server.hits[kind] = server.hits.get(kind, 0) + 1
        path = server.root / name
        if not path.is_file():
            self._plain(404)
            return
        if kind in ("500", "503", "429", "403", "401", "404"):
            self._plain(int(kind))
        elif kind == "redirect":
            self._plain(302)
        elif kind in ("reset", "silent"):
            if kind == "silent":
                server.stopping.wait(server.stall)
            self.close_connection = True
        else:
            self._file(path, kind)

    def _plain(self, status: int) -> None:
        self.send_response(status)
        if status in (429, 503):
            self.send_header("Retry-After", "0")
        if status == 302:
            self.send_header(
                "Location", self.server.redirect.replace("NAME", self.path.partition("?")[0].rpartition("/")[2])
            )
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _file(self, path: Path, kind: str | None) -> None:
        data, mark = self.server.content(path)
        if kind in ("changed", "changed_mark"):
            data = self.server.changed(path)
            mark = '"other"' if kind == "changed_mark" else mark
        if kind == "digit":  # the last one is another: what was JSON still is
            at = [found.start() for found in re.finditer(rb"[0-9]", data)][-1]
            data = data[:at] + (b"1" if data[at : at + 1] != b"1" else b"2") + data[at + 1 :]
            mark = '"digit"'
        if self.headers.get("If-None-Match") == mark:
            self.send_response(304)
            self.send_header("ETag", mark)
            self.end_headers()
            return
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        body, total = data, len(data)
        if found and kind != "whole":
            start, stop = int(found[1]), int(found[2]) + 1 if found[2] else total
            if start >= total:
                self._plain(416)
                return
            body = data[start:stop]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{total}")
        else:
            self.send_response(200)
        if self.server.marks:
            self.send_header("ETag", mark)
        self._body(body, kind)

    def _body(self, body: bytes, kind: str | None) -> None:
        if kind == "gzip":
            self.send_header("Content-Encoding", "gzip")
            body = gzip.compress(b"\0" * 10**7)
        length = len(body)
        if kind == "cut_length":
            length //= 2
            body = body[:length]
        if kind == "giant":
            length = 10**15
        if kind in ("endless", "chunked"):
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if kind in ("stall", "short", "drip"):
            half = max(len(body) // 2, 1) if len(body) > 1 else 0
            self.wfile.write(body[:half])
            self.wfile.flush()
            self._rest(body[half:], kind)
            self.close_connection = True
        elif kind == "chunked":
            half = len(body) // 2
            for piece in (body[:half], body[half:], b""):
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        elif kind in ("endless", "giant"):
            piece = b"\0" * 65536
            while not self.server.stopping.is_set():
                self.wfile.write(b"10000\r\n" + piece + b"\r\n" if kind == "endless" else piece)
        else:
            self.wfile.write(body)

    def _rest(self, rest: bytes, kind: str) -> None:
        if kind == "stall":
            self.server.stopping.wait(self.server.stall)
        elif kind == "drip":
            ends = time.monotonic() + self.server.stall
            for byte in rest:
                if self.server.stopping.is_set() or time.monotonic() > ends:
                    return
                self.wfile.write(bytes((byte,)))
                time.sleep(0.02)
