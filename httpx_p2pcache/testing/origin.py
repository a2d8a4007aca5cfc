"""A stand-in for GitHub's REST API on loopback: real sockets, GitHub's own rules, and counters.

What it does as GitHub does: ETags bound to the token (weak on a 200, strong on its 304), ``Vary``, ``Cache-Control``,
``x-ratelimit-*`` per token, 304s that cost no quota, refusals when the limit is reached, 404 for what a token may not
see, gzip for those who accept it, a ``Date``. Writes change what is read afterwards.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_VARY = {True: ("Accept", "Authorization", "Cookie", "X-GitHub-OTP"), False: ("Accept",)}
_ALSO_VARIES = "Accept-Encoding, Accept, X-Requested-With"


def github_etag(body: bytes, fields: Mapping[str, str], names: tuple[str, ...] = _VARY[True]) -> str:
    """The entity tag, without quotes, that GitHub gives ``body`` for a request with these ``fields``.

    It is the SHA-256 of the values of Accept, Authorization and Cookie, as far as the request carries and ``names``
    (those of Vary) nominate them, each followed by a colon, and of the body before any content coding.
    """
    lower = {name.lower(): value for name, value in fields.items()}
    bound = [n.lower() for n in ("Accept", "Authorization", "Cookie") if n in names]
    preimage = "".join(f"{lower[name]}:" for name in bound if name in lower)
    return hashlib.sha256(preimage.encode() + body).hexdigest()


@dataclass
class Resource:
    """What the origin answers for one target. ``max_age`` in seconds; None: no Cache-Control at all."""

    body: bytes
    status: int = 200
    fields: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json; charset=utf-8"})
    max_age: int | None = 60


@dataclass(frozen=True)
class Call:
    """One request that reached the origin."""

    at: float  # Unix time
    method: str
    target: str
    token: str  # the Authorization field, "" for none
    status: int


class Origin:
    """The server. ``with Origin(made_up(100), latency=0.08) as origin: origin.url``; every method is thread-safe.

    ``latency`` is the seconds each answer takes, ``limit`` the calls each token has (a 304 is free). ``resources``
    and ``latency`` may be changed while it runs: a request takes the latency that there was when it arrived.
    """

    def __init__(
        self,
        resources: Mapping[str, Resource] | None = None,
        *,
        latency: float = 0.0,
        limit: int = 5000,
        reset_after: float = 3600.0,
        port: int = 0,
    ) -> None:
        self.resources = dict(resources or {})
        self.latency = latency
        self.limit = limit
        self.calls: list[Call] = []
        self.arrived = 0  # requests, answered or not
        self._reset_at = time.time() + reset_after
        self._used: Counter[str] = Counter()
        self._forbidden: set[tuple[str, str]] = set()
        self._failing: int | None = None
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", port), self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="origin", daemon=True)

    def __enter__(self) -> Origin:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening, and close every connection."""
        self._server.shutdown()
        self._server.server_close()
        self._server.close_connections()
        self._thread.join(5)

    @property
    def url(self) -> str:
        """``http://127.0.0.1:port``."""
        return f"http://{self.netloc}"

    @property
    def netloc(self) -> str:
        """Host and port, as ``CACHE_GITHUB_HOSTS`` takes them."""
        return f"127.0.0.1:{self._server.server_address[1]}"

    def counted(self) -> int:
        """Calls that cost quota: all but the 304s."""
        with self._lock:
            return sum(call.status != 304 for call in self.calls)

    def reset(self) -> None:
        """Forget the calls so far, and what they cost."""
        with self._lock:
            self.calls.clear()
            self._used.clear()

    def forbid(self, token: str, target: str) -> None:
        """From now on ``target`` is 404 for ``token`` (the whole Authorization field)."""
        with self._lock:
            self._forbidden.add((token, target))

    def fail(self, status: int | None) -> None:
        """Answer everything with this status until told None."""
        self._failing = status

    def _answer(self, method: str, target: str, fields: Mapping[str, str], body: bytes) -> tuple[int, list[Any], bytes]:
        token = fields.get("Authorization", "")
        with self._lock:
            latency = self.latency
            self.arrived += 1
        if latency:
            time.sleep(latency)
        with self._lock:
            status, head, content = self._decide(method, target, token, fields, body)
            if status != 304:
                self._used[token] += 1
            used = min(self._used[token], self.limit)
            self.calls.append(Call(time.time(), method, target, token, status))
        head += [
            ("X-RateLimit-Limit", str(self.limit)),
            ("X-RateLimit-Remaining", str(self.limit - used)),
            ("X-RateLimit-Used", str(used)),
            ("X-RateLimit-Reset", str(int(self._reset_at))),
            ("X-RateLimit-Resource", "core"),
        ]
        return status, head, content

    def _decide(
        self, method: str, target: str, token: str, fields: Mapping[str, str], body: bytes
    ) -> tuple[int, list[Any], bytes]:
        if self._failing is not None:
            return _message(self._failing, "failing, as it was told to")
        if self._used[token] >= self.limit:
            return _message(403, "API rate limit exceeded")
        if (token, target) in self._forbidden:
            return _message(404, "Not Found")
        if method not in ("GET", "HEAD"):
            return self._write(method, target, body)
        resource = self.resources.get(target)
        if resource is None:
            return _message(404, "Not Found")
        return _represent(resource, fields, bool(token))

    def _write(self, method: str, target: str, body: bytes) -> tuple[int, list[Any], bytes]:
        if method == "DELETE":
            self.resources.pop(target, None)
            return 204, [], b""
        known = self.resources.get(target)
        max_age = known.max_age if known else 60
        self.resources[target] = Resource(body or json.dumps({"written": time.time()}).encode(), max_age=max_age)
        return (200 if known else 201), [("Content-Type", "application/json")], self.resources[target].body


def _message(status: int, text: str) -> tuple[int, list[Any], bytes]:
    return status, [("Content-Type", "application/json")], json.dumps({"message": text}).encode()


def _represent(resource: Resource, fields: Mapping[str, str], private: bool) -> tuple[int, list[Any], bytes]:
    names = _VARY[private]
    etag = github_etag(resource.body, fields, names)
    head: list[Any] = [("Vary", ", ".join([*names, _ALSO_VARIES]))]
    if resource.max_age is not None:
        scope = "private" if private else "public"
        head.append(("Cache-Control", f"{scope}, max-age={resource.max_age}, s-maxage={resource.max_age}"))
    held = [tag.strip().removeprefix("W/").strip('"') for tag in fields.get("If-None-Match", "").split(",")]
    if resource.status == 200 and etag in held:
        return 304, [*head, ("ETag", f'"{etag}"')], b""
    head += [*resource.fields.items(), ("ETag", f'W/"{etag}"')]
    if "gzip" in fields.get("Accept-Encoding", "") and resource.body:
        return resource.status, [*head, ("Content-Encoding", "gzip")], gzip.compress(resource.body, 1, mtime=0)
    return resource.status, head, resource.body


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fields = {name.title(): value for name, value in self.headers.items()}
        status, head, content = self.server.origin._answer(self.command, self.path, fields, body)
        lines = [f"HTTP/1.1 {status} {self.responses.get(status, ('',))[0]}", f"Date: {formatdate(usegmt=True)}"]
        lines += [f"{name}: {value}" for name, value in head]
        if status not in (204, 304):
            lines.append(f"Content-Length: {len(content)}")
        try:
            self.wfile.write("\r\n".join([*lines, "", ""]).encode() + (b"" if self.command == "HEAD" else content))
        except OSError:  # the client has gone
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _handle  # noqa: N815 - their names

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], origin: Origin) -> None:
        super().__init__(address, _Handler)
        self.origin = origin
        self._connections: set[Any] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        for connection in list(self._connections):
            try:
                connection.shutdown(2)
            except OSError:
                pass

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that vanishes is what some tests are about


def made_up(count: int) -> dict[str, Resource]:
    """``count`` resources of the sizes that GitHub's answers have: median 2.4 KB, a tenth above 24 KB."""
    found = {}
    for number in range(count):
        fraction = (number * 61 % 97) / 97  # spread over 0 to 1, the same in every run
        size = int(600 * 2.4 ** (1 + fraction * 4.2))
        body = {
            "id": number,
            "full_name": f"octo-org/repo-{number}",
            "description": hashlib.sha256(b"%d" % number).hexdigest() * (size // 64),
        }
        found[f"/repos/octo-org/repo-{number}"] = Resource(json.dumps(body).encode())
    return found


def from_har(path: Path, count: int | None = None) -> dict[str, Resource]:
    """The recorded 200s of a HAR file (HTTP Archive 1.2), up to ``count`` of them, by request target.

    Raises ValueError if the file is not one.
    """
    found: dict[str, Resource] = {}
    for target, resource in _recorded(path):
        found.setdefault(target, resource)
        if count is not None and len(found) == count:
            break
    if not found:
        raise ValueError(f"{path} holds no GET that was answered by a 200 with text")
    return found


def targets_of(path: Path) -> list[str]:
    """The request targets of a HAR file's 200s as they were asked for, repeats included. Raises ValueError."""
    return [target for target, _ in _recorded(path)]


def _recorded(path: Path) -> Iterator[tuple[str, Resource]]:
    try:
        for entry in json.loads(path.read_bytes())["log"]["entries"]:
            request, response = entry["request"], entry["response"]
            text = response["content"].get("text")
            if request["method"] != "GET" or response["status"] != 200 or not text:
                continue
            if response["content"].get("encoding"):  # base64 or the like: not JSON
                continue
            parts = urlsplit(request["url"])
            target = parts.path + (f"?{parts.query}" if parts.query else "")
            kind = response["content"].get("mimeType") or "application/json"
            yield target, Resource(text.encode(), fields={"Content-Type": kind})
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as exc:
        raise ValueError(f"{path} is not an HTTP Archive (HAR 1.2): {type(exc).__name__}") from exc
