"""Servers on loopback that answer as they are told, and remember what they were asked."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import time as _real_time
from types import TracebackType
from typing import Any

import h2.config
import h2.connection
import h2.events

PATIENCE = 10.0  # seconds after which a gate opens by itself, so that a failing test ends


@dataclass(frozen=True)
class Answer:
    """What the server says. A field whose value is a number holds the HTTP-date that many seconds from now.

    ``Date`` is added unless named; None leaves it out. ``pieces`` are sent one by one as chunks, with ``gate`` waited
    for before the second; ``before`` is waited for before the head. ``cut`` bytes of the body are sent, then the
    connection is closed. ``raw`` is sent instead of all that.
    """

    body: bytes = b""
    status: int = 200
    fields: Mapping[str, str | float | None] | Sequence[tuple[str, str | float | None]] = field(default_factory=dict)
    pieces: Sequence[bytes] | None = None
    gate: threading.Event | None = None
    before: threading.Event | None = None
    cut: int | None = None
    raw: bytes | None = None

    def head(self, now: float) -> bytes:
        pairs = list(self.fields.items()) if isinstance(self.fields, Mapping) else list(self.fields)
        if "date" not in [name.lower() for name, _ in pairs]:
            pairs.append(("Date", 0.0))
        lines = [f"HTTP/1.1 {self.status} Scripted"]
        for name, value in pairs:
            if value is not None:
                lines.append(f"{name}: {value if isinstance(value, str) else formatdate(now + value, usegmt=True)}")
        if self.pieces is not None:
            lines.append("Transfer-Encoding: chunked")
        elif self.status not in (204, 304):
            lines.append(f"Content-Length: {len(self.body)}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


@dataclass(frozen=True)
class Asked:
    """One request as it reached the server; ``connection`` is the client's port."""

    method: str
    target: str
    fields: Mapping[str, str]  # names in lower case
    body: bytes
    connection: int


class Scripted:
    """``with Scripted(lambda asked: Answer(b"hello")) as server: server.url``."""

    def __init__(self, script: Callable[[Asked], Answer] | None = None) -> None:
        self.script = script or (lambda asked: Answer(asked.target.encode(), fields={"Cache-Control": "max-age=60"}))
        self.clock: Callable[[], float] = _real_time
        self.asked: list[Asked] = []
        self._changed = threading.Condition()
        self._server = _Server(("127.0.0.1", 0), self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="scripted", daemon=True)

    def __enter__(self) -> Scripted:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    @property
    def netloc(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    @property
    def url(self) -> str:
        return f"http://{self.netloc}"

    def reset(self, script: Callable[[Asked], Answer]) -> None:
        """Forget what was asked, and answer by another script."""
        with self._changed:
            self.script = script
            self.asked = []

    def wait_for(self, count: int, timeout: float = 5.0) -> None:
        """Return once ``count`` requests have arrived."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.asked) >= count, timeout), f"only {len(self.asked)} arrived"

    def note(self, asked: Asked) -> Answer:
        with self._changed:
            self.asked.append(asked)
            self._changed.notify_all()
        return self.script(asked)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _handle(self) -> None:
        fields = {name.lower(): ", ".join(self.headers.get_all(name) or ()) for name in self.headers}
        body = (
            self._chunks() if "transfer-encoding" in fields else self.rfile.read(int(fields.get("content-length", 0)))
        )
        answer = self.server.owner.note(Asked(self.command, self.path, fields, body, self.client_address[1]))
        try:
            self._answer(answer)
        except OSError:  # the client has gone
            self.close_connection = True

    def _chunks(self) -> bytes:
        read = b""
        while size := int(self.rfile.readline(), 16):
            read += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return read

    def _answer(self, answer: Answer) -> None:
        if answer.before is not None:
            answer.before.wait(PATIENCE)
        if answer.raw is not None:
            self.wfile.write(answer.raw)
            self.close_connection = True
            return
        self.wfile.write(answer.head(self.server.owner.clock()))
        if self.command == "HEAD" or answer.status in (204, 304):
            return
        if answer.pieces is None:
            self.wfile.write(answer.body if answer.cut is None else answer.body[: answer.cut])
            self.close_connection = answer.cut is not None
            return
        for number, piece in enumerate(answer.pieces):
            if number == 1 and answer.gate is not None:
                answer.gate.wait(PATIENCE)
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_PURGE = _handle  # noqa: N815 - their names

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], owner: Scripted) -> None:
        super().__init__(address, _Handler)
        self.owner = owner

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that vanishes is what some tests are about


class ScriptedHTTP2:
    """The smallest HTTP/2 origin: every stream is answered with its path, fresh for a minute."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(PATIENCE)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.asked: list[str] = []
        self._thread = threading.Thread(target=self._serve, name="scripted-h2", daemon=True)

    def __enter__(self) -> ScriptedHTTP2:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._listener.close()
        self._thread.join(5)

    def _serve(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        http2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        http2.initiate_connection()
        with client:
            client.sendall(http2.data_to_send())
            while received := client.recv(65536):
                for event in http2.receive_data(received):
                    if isinstance(event, h2.events.RequestReceived) and event.stream_id and event.headers:
                        path = dict(event.headers)[b":path"]
                        self.asked.append(path.decode())
                        head = [(":status", "200"), ("cache-control", "max-age=60")]
                        http2.send_headers(event.stream_id, head)
                        http2.send_data(event.stream_id, path, end_stream=True)
                client.sendall(http2.data_to_send())
