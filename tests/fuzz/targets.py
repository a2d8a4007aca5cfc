"""What is fuzzed: a name, a function of bytes that raises only for a fault, and seeds to begin with.

A target lets the one documented exception of what it calls pass; whatever else leaves it is a finding.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h11
import httpx
import msgspec
from hishel import Headers
from hishel._core._storages._packing import pack as packed

from httpx_p2pcache import P2PCacheTransport, Settings
from httpx_p2pcache.conditions import viewed
from httpx_p2pcache.entries import Entry, Keyring, body_digest, cache_key
from httpx_p2pcache.exceptions import Rejected, SettingsError
from httpx_p2pcache.freshness import machine_entry
from httpx_p2pcache.github import GitHub
from httpx_p2pcache.network import Question
from httpx_p2pcache.node.checks import believed
from httpx_p2pcache.node.daemon.protocol import from_daemon, from_process
from httpx_p2pcache.node.protocol import (
    ANSWERS,
    Ask,
    Found,
    Granted,
    Hello,
    Introduce,
    Inventory,
    Proof,
    Push,
    TellCounts,
    admit,
    pack,
    read_frame,
    unpack,
)
from httpx_p2pcache.rows import from_row, to_hishel
from httpx_p2pcache.stats import Stats
from httpx_p2pcache.stored import Stored

KEYRING = Keyring(b"the secret of a fleet", "octo-org/repo-0")
HOST = "api.github.com"
URL = f"https://{HOST}/repos/octo-org/repo-0"
SLOW_SECONDS = 2.0  # for one input of a few kilobytes: more is a finding


class Target(NamedTuple):
    run: Callable[[bytes], None]
    seeds: list[bytes]


class Slow(Exception):
    """A small input has kept the interpreter busy for long."""


@contextlib.contextmanager
def _soon() -> Any:
    began = time.process_time()
    yield
    if time.process_time() - began > SLOW_SECONDS:
        raise Slow(f"{time.process_time() - began:.1f} s")


def _walk(coroutine: Any) -> Any:
    """A coroutine that waits for nothing outside, to its end."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    coroutine.close()
    raise AssertionError("it waits for something that memory does not say")


class _Memory:
    """A stream that says ``said`` in pieces of at most ``step`` bytes, then its end; keeps what is written to it."""

    def __init__(self, said: bytes, step: int) -> None:
        self._said, self._step = said, max(1, step)
        self.written = b""

    async def read(self, n: int | None = None) -> bytes:
        count = min(self._step, len(self._said) if n is None else n)
        piece, self._said = self._said[:count], self._said[count:]
        return piece

    async def write(self, data: bytes) -> None:
        self.written += data


# Frames


def frames(data: bytes) -> None:
    with _soon():
        try:
            message = unpack(data)
        except Rejected:
            pass
        else:
            again = unpack(pack(message)[4:])
            assert pack(again) == pack(message)
            assert not isinstance(message, ANSWERS) or message.call >= 0
        for decode in (from_process, from_daemon):
            with contextlib.suppress(Rejected):
                decode(data)
        stream = _Memory(data[1:], data[0] if data else 1)
        with contextlib.suppress(Rejected, EOFError):
            while True:
                body = _walk(read_frame(stream, 4096))
                assert 0 < len(body) <= 4096
                with contextlib.suppress(Rejected):
                    unpack(body)


def _question() -> Question:
    return Question(key=bytes(32), claim=bytes(16), method="GET", identity="", selecting={"accept": "*/*"})


_FRAMES = [
    pack(frame)[4:]
    for frame in (
        Ask(1, _question()),
        Found(1, b"sealed", 0.5),
        Granted(1, bytes(16), 7, b"", 0.0),
        Introduce(["/ip4/127.0.0.1/tcp/1"], "host", [(b"id", ["/ip4/127.0.0.1/tcp/2"])], 1000, True),
        Inventory(1, [bytes(32)], [(bytes(16), 1, 2.0)]),
        Push(bytes(32), bytes(16), b"sealed", 0.0),
        TellCounts("runner", {"requests": 1}),
    )
]

# Admission: nothing that a stranger says admits it


def admission(data: bytes) -> None:
    dialled, step = bool(data[:1] > b"\x7f"), data[1] if len(data) > 1 else 1
    stream = _Memory(data[2:], step)
    with _soon(), contextlib.suppress(Rejected, EOFError):
        _walk(
            admit(stream, KEYRING.admission, dialler=b"dialler", listener=b"listener", dialled=dialled, nonce=bytes(32))
        )
        raise AssertionError("a stranger was admitted")


_ADMISSION = [first + b"\x20" + pack(Hello(1, bytes(32))) + pack(Proof(bytes(32))) for first in (b"\x00", b"\xff")] + [
    b"\x00\x01" + pack(Hello(2, bytes(32)))
]

# Sealed entries


def entries(data: bytes) -> None:
    """Any msgpack, sealed as a member would: believed or rejected, and what is believed can be used."""
    try:
        url = msgspec.msgpack.decode(data)[1]
        key = cache_key(url)
    except Exception:  # no entry: it is to be rejected all the same
        key = cache_key(URL)
    with _soon():
        now = time.time()
        try:
            entry = KEYRING.open_entry(KEYRING.seal(data, b"entry " + key), key)
            if not entry.body:
                entry = msgspec.structs.replace(entry, headers={n: v for n, v in entry.headers.items() if n != "etag"})
            entry = believed(entry, 1.0, now, 2**20)
        except Rejected:
            return
        use(entry, now)


def use(entry: Entry, now: float) -> None:
    """All that is done with an entry that has been stored."""
    assert from_row(packed(*to_hishel(entry, None)), entry.body, None).headers == entry.headers
    stored = Stored(uuid.UUID(int=1), entry, 300.0, True)
    stored.fresh(now)
    stored.matches("GET", {"accept": "*/*"}.get)
    machine_entry(entry, "GET", uuid.UUID(int=1), {"max-age": "5"}, now, 300.0)
    viewed(entry, "GET", Headers({"range": "bytes=1-3", "if-none-match": '"a"', "if-range": '"a"'}))
    viewed(entry, "GET", Headers({"if-modified-since": "Mon, 01 Jan 2024 00:00:00 GMT"}))
    GitHub(Settings(enable_p2p=False), Stats()).validator(Headers({"accept": "*/*"}), entry, {})


def _entry(body: bytes = b'[{"id": 1}]', **fields: str) -> bytes:
    headers = {"cache-control": ["public, max-age=60"]} | {n.replace("_", "-"): [v] for n, v in fields.items()}
    return msgspec.msgpack.encode(
        Entry(
            method="GET",
            url=URL,
            identity="",
            selecting={"accept": "*/*"},
            status=200,
            headers=headers,
            body=body,
            digest=body_digest(body),
            initial_age=1.0,
            received=0.0,
        )
    )


_ENTRIES = [
    _entry(),
    _entry(etag='W/"1"', link=f'<{URL}?page=2>; rel="next"', date="Mon, 01 Jan 2024 00:00:00 GMT", vary="Accept"),
    _entry(content_length="11", last_modified="Mon, 01 Jan 2024 00:00:00 GMT", expires="0", content_encoding="gzip"),
]

# Registry files


def registry(data: bytes) -> None:
    from httpx_p2pcache.node.discovery.registry import Registry

    directory = _directory() / "registry"
    directory.mkdir(exist_ok=True)
    plain, sealed = (directory / f"{KEYRING.label}-{name}.peer" for name in ("plain", "sealed"))
    plain.write_bytes(data)
    sealed.write_bytes(KEYRING.seal(data, b"registry"))
    with _soon():
        for sighting in Registry(directory, KEYRING, 1800.0).find():
            assert 2 <= len(sighting.peer_id) <= 64
            assert all(isinstance(address, str) and len(address) <= 256 for address in sighting.addresses)
    if plain.exists():
        assert plain.read_bytes() == data


_RECORD = msgspec.msgpack.encode((b"peer-id", ["/ip4/127.0.0.1/tcp/1"], "host", 1.7e9))

# Settings


def settings(data: bytes) -> None:
    """Lines ``NAME=value`` as an environment: usable settings or a SettingsError, and nothing else."""
    environ = {}
    for line in data.split(b"\n"):
        name, _, value = line.partition(b"=")
        if name and b"\0" not in line:  # an environment cannot hold it
            environ[os.fsdecode(name)] = os.fsdecode(value)
    with _soon():
        try:
            found = Settings.from_env(environ)
        except SettingsError as exc:
            str(exc)
            return
        repr(found)
        hash(found)
        for scheme in found.origins().values():
            assert scheme
        assert 0 <= found.lookup_timeout <= 31_536_000
        assert found.max_body_size >= 0
        Keyring(found.shared_secret.encode(), found.fleet)  # as the runner does


_NAMES = [f"CACHE_{name.upper()}" for name in Settings.__struct_fields__]
_SETTINGS = [
    b"CACHE_DIR=~/x\nCACHE_MAX_SIZE=1GiB\nCACHE_LISTEN_HOST=127.0.0.1\nCACHE_NODE=none",
    b"CACHE_GITHUB_HOSTS=api.github.com,http://[::1]:80,localhost\nCACHE_LOOKUP_TIMEOUT=nan\nGITHUB_TOKEN=x",
    b"CACHE_SHARED_SECRET=p\xe4ss\nCACHE_FLEET=a/b\nCACHE_PEER_REGISTRY=~/y\nRUNNER_TEMP=/tmp",
    *(f"{name}=true\n{name[:-1]}=1".encode() for name in _NAMES),
]

# An origin's fields through the transport


FIELD_NAMES = [
    "cache-control", "age", "date", "vary", "etag", "link", "content-range", "expires", "last-modified", "content-type",
    "content-location", "x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset", "retry-after",
    "x-ratelimit-resource", "pragma", "warning", "content-length", "content-encoding", "connection", "location",
    "set-cookie", "stale-field",
]  # fmt: skip
ASKED_NAMES = [
    "cache-control", "range", "if-none-match", "if-modified-since", "if-range", "accept", "authorization", "vary",
    "pragma",
]  # fmt: skip
SECTION, BODY = b"\x1e", b"\x1f"  # between the question and two answers; between fields and body
_numbers = itertools.count()


def fields(data: bytes) -> None:
    """Two answers made of ``data``, in turns, to one question that is asked three times: nothing is raised."""
    question, first, second, *_ = (*data.split(SECTION, 2), b"", b"")
    asked = _fields(question, ASKED_NAMES)
    method = ("GET", "HEAD", "POST")[len(question) % 3] if len(question) % 7 == 0 else "GET"
    path = f"/repos/octo-org/repo-{next(_numbers)}?per_page=2"

    def ask(transport: httpx.BaseTransport) -> None:
        for _ in range(3):
            response = transport.handle_request(httpx.Request(method, f"https://{HOST}{path}", headers=asked))
            for _chunk in response.stream:  # type: ignore[union-attr] # a sync one
                pass
            response.close()

    answers = itertools.cycle([_answer(first), _answer(second)])

    def answer(request: httpx.Request) -> httpx.Response:
        return next(answers)()

    with _soon():
        transport = _cache(None)
        transport.next_transport = httpx.MockTransport(answer)
        ask(transport)


def _fields(block: bytes, names: list[str]) -> list[tuple[bytes, bytes]]:
    """Lines that begin with a letter for the name; the rest is the value, in any bytes."""
    return [(names[line[0] % len(names)].encode(), line[1:]) for line in block.split(b"\n") if line]


def _answer(block: bytes) -> Callable[[], httpx.Response]:
    head, _, body = block.partition(BODY)
    status = (200, 304, 200, 404, 301, 206, 403, 503, 202, 429)[head[0] % 10] if head else 200
    found = _fields(head[1:], FIELD_NAMES)
    return lambda: httpx.Response(status, headers=found, stream=httpx.ByteStream(body))


_caches: dict[bool | None, P2PCacheTransport] = {}


def _cache(kind: bool | None) -> P2PCacheTransport:
    if kind not in _caches:
        logging.getLogger("httpx_p2pcache").setLevel(logging.CRITICAL)
        given = Settings(dir=_directory() / str(kind), enable_p2p=False, github_hosts=(HOST,), max_size=2**24)
        _caches[kind] = P2PCacheTransport(httpx.MockTransport(lambda _: httpx.Response(200)), settings=given)
    return _caches[kind]


_temporary: list[tempfile.TemporaryDirectory[str]] = []


def _directory() -> Path:
    if not _temporary:
        _temporary.append(tempfile.TemporaryDirectory(prefix="p2pcache-fuzz-"))
    return Path(_temporary[0].name)


def _line(name: str, value: bytes, names: list[str] = FIELD_NAMES) -> bytes:
    return bytes([names.index(name)]) + value + b"\n"


_OK = b"\x00"  # status 200
_AGED = _line("cache-control", b"max-age=60") + _line("age", b"70")
_DATE = b"Mon, 01 Jan 2001 00:00:00 GMT"
_FIELDS = [
    SECTION + _OK + _AGED + _line("etag", b'"a"') + BODY + b'[{"a":1}]',
    SECTION + _OK + _AGED + _line("etag", b'"a"') + BODY + b"[1,2]" + SECTION + b"\x01" + _line("etag", b'"a"'),
    SECTION + _OK + _line("date", _DATE) + _line("expires", b"0"),
    SECTION
    + _OK
    + _line("vary", b"accept, x")
    + _line("link", b'<https://api.github.com/a>; rel="next"')
    + BODY
    + b"{}",
    SECTION + _OK + b"".join(_line(f"x-ratelimit-{n}", b"5") for n in ("limit", "remaining", "reset")),
    _line("range", b"bytes=0-1", ASKED_NAMES)
    + SECTION
    + b"\x05"
    + _line("etag", b'"a"')
    + _line("content-range", b"bytes 0-1/5")
    + BODY
    + b"ab",
    SECTION + _OK + _line("content-length", b"3") + _line("last-modified", _DATE) + BODY + b"abc",
]

# The daemon's HTTP door: what an HTTP/1.1 parser lets through, as the server hands it over


def door(data: bytes) -> None:
    parser = h11.Connection(h11.SERVER)
    parts = data.split(b"\0\0", 1)
    parser.receive_data(parts[0])
    parser.receive_data(b"")
    try:
        request = parser.next_event()
        if not isinstance(request, h11.Request):
            return
        body = b""
        while isinstance(event := parser.next_event(), h11.Data):
            body += bytes(event.data)
    except h11.RemoteProtocolError:
        return
    path, _, query = request.target.partition(b"?")
    scope = {
        "type": "http",
        "method": request.method.decode("ascii").upper(),
        "path": path.decode("ascii"),
        "raw_path": path,
        "query_string": query,
        "headers": [(bytes(name), bytes(value)) for name, value in request.headers],
    }
    answer = _answer(parts[1] if len(parts) > 1 else b"")
    sent: list[Any] = []
    with _soon():
        _loop().run_until_complete(asyncio.wait_for(_through_the_door(scope, body, answer, sent), 20))
    assert sent[0]["type"] == "http.response.start", sent
    assert not sent[-1].get("more_body", False), sent
    for name, value in sent[0]["headers"]:
        assert isinstance(name, bytes)
        assert isinstance(value, bytes)


async def _through_the_door(
    scope: dict[str, Any], body: bytes, answer: Callable[[], httpx.Response], sent: list[Any]
) -> None:
    from httpx_p2pcache.daemon.door import Door

    async def control(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    transport = _cache(True)
    transport.next_transport = httpx.MockTransport(lambda _: answer())
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop(0)
        await asyncio.Event().wait()
        return None

    async def send(message: Any) -> None:
        sent.append(message)

    token = "token" if scope["raw_path"].startswith(b"/token") else None
    await Door(transport, control, token=token, used=lambda: None)(scope, receive, send)


_loops: list[asyncio.AbstractEventLoop] = []


def _loop() -> asyncio.AbstractEventLoop:
    if not _loops:
        _loops.append(asyncio.new_event_loop())
    return _loops[0]


def close() -> None:
    """End what the targets have begun."""
    for transport in _caches.values():
        transport.next_transport = None
        transport.close()
    _caches.clear()
    for loop in _loops:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
    _loops.clear()
    for directory in _temporary:
        directory.cleanup()
    _temporary.clear()


_DOOR = [
    b"GET /repos/o/r?per_page=2 HTTP/1.1\r\nHost: api.github.com\r\n\r\n\0\0" + _OK + _AGED + BODY + b"[]",
    b"GET http://api.github.com/x HTTP/1.1\r\nHost: a\r\nRange: bytes=0-1\r\n\r\n\0\0" + _OK + BODY + b"abc",
    b"GET /token/api.github.com/x HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\n\0\0"
    + _OK
    + _line("link", b'<https://api.github.com/y>; rel="next"'),
    b"POST /x HTTP/1.1\r\nHost: api.github.com\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
    b"GET /status HTTP/1.1\r\nHost: p2pcache\r\n\r\n",
]

TARGETS: dict[str, Target] = {
    "frames": Target(frames, _FRAMES),
    "admission": Target(admission, _ADMISSION),
    "entries": Target(entries, _ENTRIES),
    "registry": Target(registry, [_RECORD]),
    "settings": Target(settings, _SETTINGS),
    "fields": Target(fields, _FIELDS),
    "door": Target(door, _DOOR),
}

WORDS = [
    b"max-age=", b"no-cache", b"must-revalidate", b"\xb2", b"\xff", b"[" * 3000, b'{"a":', b"; rel=", b"<", b"GMT",
    b"stale-while-revalidate=", b"stale-if-error=", b"private", b"public", b"Mon, 01 Jan 0001 00:00:00 GMT",
    b"bytes=", b"999999999999999999999", b"-1", b"nan", SECTION + b"\x00", BODY, b"\r\n", b"gzip", b"W/", b"immutable",
    b"~nobody/", b"per_page=", b"//", b"%", b"*", b"Mon, 01 Jan 1700 00:00:00 GMT",
]  # fmt: skip
