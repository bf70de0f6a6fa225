"""Servers to fetch from, on ports of the system's choice: HTTP that can misbehave, S3, and a slow line."""

import os
import re
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from kandinsky_dist.data.remote.fetch import forget_connections

PIECE_BYTES = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class Fault:
    """How one request is treated; without any attribute, well.

    Attributes:
        status: answered instead of the content, with `body` and `headers`.
        is_silent: nothing is ever answered.
        truncate_bytes: the connection is closed after so much of the body.
        drip_bytes: after so much of the body a byte every `drip_seconds`.
        content_range: sent instead of the right one; "" leaves it out.
        has_ranges: whether Range is honoured.
        etag: sent instead of the right one.
    """

    status: int | None = None
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    is_silent: bool = False
    truncate_bytes: int | None = None
    drip_bytes: int | None = None
    drip_seconds: float = 0.02
    content_range: str | None = None
    has_ranges: bool = True
    etag: str | None = None


WELL = Fault()


@dataclass
class HttpServer:
    """A running server and what it saw.

    Attributes:
        url: of the folder, without a slash at the end.
        num_requests: by path below the folder.
        num_bytes: of bodies sent, by path.
        ranges: path and value of the header Range ("" without), in the order of the requests.
        authorizations: the header of that name of each request.
        num_connections: made so far.
    """

    url: str
    port: int
    num_requests: Counter[str] = field(default_factory=Counter)
    num_bytes: Counter[str] = field(default_factory=Counter)
    ranges: list[tuple[str, str]] = field(default_factory=list)
    authorizations: list[str] = field(default_factory=list)
    num_connections: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def forget(self) -> None:
        """Starts to count anew."""
        with self.lock:
            self.num_requests.clear()
            self.num_bytes.clear()
            self.ranges.clear()


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is what these tests are about."""


@contextmanager
def http_server(
    folder: Path, faults: Sequence[Fault] | Callable[[str, str], Fault | None] = ()
) -> Iterator[HttpServer]:
    """A folder over HTTP/1.1 on the loopback device, with ranges, ETags and kept connections.

    Args:
        folder: what is served.
        faults: of the first requests, one each; or a function of path and Range (None: no fault).
    """
    stopping = threading.Event()
    pending = list(faults) if not callable(faults) else []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def setup(self) -> None:
            super().setup()
            with seen.lock:
                seen.num_connections += 1

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0]).lstrip("/")
            wanted = self.headers.get("Range", "")
            with seen.lock:
                seen.num_requests[path] += 1
                seen.ranges.append((path, wanted))
                seen.authorizations.append(self.headers.get("Authorization", ""))
                fault = faults(path, wanted) if callable(faults) else pending.pop(0) if pending else None
            self._answer(path, wanted, fault or WELL)

        def _answer(self, path: str, wanted: str, fault: Fault) -> None:
            if fault.is_silent:
                stopping.wait()
                self.close_connection = True
                return
            if fault.status is not None:
                self._send(fault.status, dict(fault.headers), fault.body)
                return
            file = folder / path
            if not file.is_file():
                self._send(404, {}, b"no such file")
                return
            total = file.stat().st_size
            start, end, status = 0, total, 200
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
            if found and fault.has_ranges:
                start, end = int(found[1]), min(total, int(found[2] or total - 1) + 1)
                status = 206
            if start >= end and status == 206:
                self._send(416, {"Content-Range": f"bytes */{total}"}, b"")
                return
            about = file.stat()
            tag = md5(f"{about.st_size} {about.st_mtime_ns}".encode(), usedforsecurity=False).hexdigest()
            headers = {"ETag": f'"{tag if fault.etag is None else fault.etag}"'}
            if status == 206:
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{total}"
                if fault.content_range is not None:
                    headers["Content-Range"] = fault.content_range
            self._send(status, {name: value for name, value in headers.items() if value}, None, end - start)
            self._body(path, file, start, end, fault)

        def _send(self, status: int, headers: dict[str, str], body: bytes | None, num_bytes: int = 0) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(num_bytes if body is None else len(body)))
            self.end_headers()
            if body:
                self.wfile.write(body)

        def _body(self, path: str, file: Path, start: int, end: int, fault: Fault) -> None:
            cuts = [cut for cut in (fault.truncate_bytes, fault.drip_bytes) if cut is not None]
            stop = min([end, *(start + cut for cut in cuts)])
            with file.open("rb") as content:
                content.seek(start)
                while content.tell() < stop:
                    self._piece(path, content.read(min(PIECE_BYTES, stop - content.tell())))
                if fault.truncate_bytes is not None:
                    self.close_connection = True
                    return
                while content.tell() < end and not stopping.wait(fault.drip_seconds):
                    self._piece(path, content.read(1))

        def _piece(self, path: str, data: bytes) -> None:
            with seen.lock:
                seen.num_bytes[path] += len(data)  # before: a client that has all may look at once
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: stderr is for the program under test."""

    with _QuietServer(("127.0.0.1", 0), Handler) as server:
        port = server.server_address[1]
        seen = HttpServer(f"http://127.0.0.1:{port}", port)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield seen
        finally:
            stopping.set()
            server.shutdown()
            thread.join()


@contextmanager
def aws_environment(endpoint: str) -> Iterator[None]:
    """What boto3 needs to know of a server, and nothing of this machine's own settings."""
    wanted = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    for name in before:
        del os.environ[name]
    os.environ.update(wanted)
    forget_connections()  # those that an earlier test left go to an earlier server
    try:
        yield
    finally:
        for name in wanted:
            os.environ.pop(name, None)
        os.environ.update(before)
        forget_connections()


@contextmanager
def s3_server() -> Iterator[str]:
    """S3's real interface, by moto; its endpoint. The environment names it and credentials for it.

    The content is kept by the process, not by the server: use other buckets in other tests.
    """
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        with aws_environment(f"http://{host}:{port}"):
            yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextmanager
def delayed(port: int, seconds: float) -> Iterator[int]:
    """A line to a port of this machine on which every answer's first byte takes so long; its own port.

    One request at a time on a connection, as HTTP/1.1 clients do.
    """

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection(("127.0.0.1", port)) as upstream:
                asked_at = [0.0]  # of the request not yet answered; 0: none
                back = threading.Thread(target=self._answers, args=(upstream, asked_at), daemon=True)
                back.start()
                with suppress(OSError):
                    while data := self.request.recv(PIECE_BYTES):
                        asked_at[0] = time.monotonic()
                        upstream.sendall(data)
                _shut(upstream)
                back.join()

        def _answers(self, upstream: socket.socket, asked_at: list[float]) -> None:
            with suppress(OSError):
                while data := upstream.recv(PIECE_BYTES):
                    if asked_at[0]:
                        time.sleep(max(0.0, asked_at[0] + seconds - time.monotonic()))
                        asked_at[0] = 0.0
                    self.request.sendall(data)
            _shut(self.request)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 128

        def handle_error(self, request: object, client_address: object) -> None:
            """Connections end as their two sides wish."""

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
