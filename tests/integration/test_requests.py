"""What a user of ``requests.Session`` sees is the same with P2PCacheAdapter as without it, and cached besides.

Most of it is one table: each scene is played on a plain session, on one with the adapter, and on that once more, with
all that it does answered from the store where it may be. What the scenes return has to be equal, and so is what the
origin is sent, and over how many connections.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import gzip
import io
import ipaddress
import json
import pickle
import re
import shutil
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import pytest
from waiting import eventually

from httpx_p2pcache import P2PCacheTransport, Settings
from httpx_p2pcache.testing import Origin

requests = pytest.importorskip("requests")

import urllib3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase, HTTPDigestAuth
from urllib3.util import Retry

from httpx_p2pcache.integrations.requests import P2PCacheAdapter

PATIENCE = 10.0  # seconds after which a gate opens by itself, so that a failing test ends
PROMPT = 5.0  # seconds: half of what a claim lives, so that whoever waits for its end is noticed
FRESH = ("Cache-Control", "max-age=60")
TEXT = ("Content-Type", "text/plain; charset=utf-8")
TOKEN = "ghp_0123456789abcdefghijABCDEFGHIJ012345"

# --- the origin -----------------------------------------------------------------------------------------------------

Piece = bytes | threading.Event | None  # an event is waited for, None closes the connection
Script = Callable[["Asked"], Iterable[Piece]]


@dataclass(frozen=True)
class Asked:
    """One request as it reached the origin; names of fields in lower case, ``connection`` counts from 1."""

    method: str
    target: str
    fields: dict[str, str]
    body: bytes
    connection: int

    @property
    def shown(self) -> tuple[object, ...]:
        """All but the connection, and without the boundary that a multipart body makes up."""
        boundary = self.fields.get("content-type", "").partition("boundary=")[2]
        fields = {name: value.replace(boundary, "-") if boundary else value for name, value in self.fields.items()}
        body = self.body.replace(boundary.encode(), b"-") if boundary else self.body
        return self.method, self.target, fields, body


class Wire:
    """An origin that sends the bytes it is told to, and remembers what it was asked and how often it was connected to.

    ``tls``: every connection is TLS; one that begins with CONNECT is TLS after that, so that it is a proxy as well.
    """

    def __init__(self, script: Script, tls: ssl.SSLContext | None = None, *, proxy: bool = False) -> None:
        self.script = script
        self.asked: list[Asked] = []
        self.tunnels: list[str] = []
        self.accepted = 0
        self._tls = tls
        self._proxy = proxy
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._thread = threading.Thread(target=self._listen, name="wire", daemon=True)

    def __enter__(self) -> Wire:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(PATIENCE)
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def url(self) -> str:
        return f"{'https' if self._tls and not self._proxy else 'http'}://127.0.0.1:{self.port}"

    def wait_for(self, count: int) -> None:
        assert eventually(lambda: len(self.asked) >= count), f"only {len(self.asked)} have arrived"

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.accepted += 1
                number = self.accepted
            threading.Thread(target=self._serve, args=(connection, number), daemon=True).start()

    def _serve(self, connection: socket.socket, number: int) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            if self._tls and not self._proxy:
                connection = self._tls.wrap_socket(connection, server_side=True)
            self._open.add(connection)
            reading = connection.makefile("rb")
            while asked := self._read(reading, number):
                if asked.method == "CONNECT":
                    assert self._tls is not None
                    self.tunnels.append(asked.target)
                    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                    self._open.discard(connection)
                    connection = self._tls.wrap_socket(connection, server_side=True)
                    self._open.add(connection)
                    reading = connection.makefile("rb")
                    continue
                with self._lock:
                    self.asked.append(asked)
                if not self._answer(connection, asked):
                    return
        except OSError:  # the client has gone, or does not trust us
            pass
        finally:
            self._open.discard(connection)
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(OSError, UnboundLocalError):
                reading.close()
            connection.close()

    @staticmethod
    def _read(reading: Any, number: int) -> Asked | None:
        line = reading.readline().decode("latin-1").split()
        if len(line) != 3:
            return None
        fields: dict[str, str] = {}
        while field := reading.readline().decode("latin-1").strip():
            name, _, value = field.partition(":")
            fields[name.lower()] = value.strip()
        body = b""
        if "transfer-encoding" in fields:
            while size := int(reading.readline(), 16):
                body += reading.read(size)
                reading.readline()
            reading.readline()
        else:
            body = reading.read(int(fields.get("content-length", 0)))
        return Asked(line[0], line[1], fields, body, number)

    def _answer(self, connection: socket.socket, asked: Asked) -> bool:
        """Whether the connection stays open."""
        for number, piece in enumerate(self.script(asked)):
            if piece is None:
                return False
            if isinstance(piece, threading.Event):
                piece.wait(PATIENCE)
            elif number == 0 or asked.method != "HEAD":
                connection.sendall(piece)
        return True


def head(status: int, fields: Iterable[tuple[str, str]], version: str = "1.1") -> bytes:
    lines = [f"HTTP/{version} {status} {HTTPStatus(status).phrase}", *(f"{name}: {value}" for name, value in fields)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def answer(body: bytes = b"", *fields: tuple[str, str], status: int = 200) -> list[Piece]:
    length = [] if status in (204, 304) else [("Content-Length", str(len(body)))]
    return [head(status, [*fields, *length]), body]


def chunked(*pieces: Piece, fields: Iterable[tuple[str, str]] = (FRESH,), end: Piece = b"0\r\n\r\n") -> list[Piece]:
    """``pieces`` as one chunk each, and ``end`` after them."""
    sent = [b"%x\r\n%b\r\n" % (len(p), p) if isinstance(p, bytes) else p for p in pieces]
    return [head(200, [*fields, ("Transfer-Encoding", "chunked")]), *sent, end]


def fixed(pieces: Sequence[Piece]) -> Callable[[], Script]:
    return lambda: lambda asked: pieces


def in_turn(*answers: Sequence[Piece]) -> Callable[[], Script]:
    def begin() -> Script:
        left = iter(answers)
        return lambda asked: next(left)

    return begin


def by_target(**answers: Sequence[Piece]) -> Callable[[], Script]:
    """``by_target(here=…)``: what ``/here`` is answered."""
    return lambda: lambda asked: answers[asked.target.strip("/").partition("?")[0]]


@pytest.fixture
def wire() -> Iterator[Wire]:
    with Wire(lambda asked: answer(asked.target.encode(), FRESH)) as server:
        yield server


@pytest.fixture
def session_for(settings_for: Callable[..., Settings]) -> Iterator[Callable[..., Any]]:
    """``session_for(settings, max_retries=2)``: a session with the adapter, closed at the end."""
    with contextlib.ExitStack() as opened:

        def build(settings: Settings | None = None, **options: Any) -> Any:
            session = opened.enter_context(requests.Session())
            adapter = P2PCacheAdapter(settings=settings or settings_for(enable_p2p=False), **options)
            for scheme in ("http://", "https://"):
                session.mount(scheme, adapter)
            return session

        yield build


# --- what is compared -----------------------------------------------------------------------------------------------

# Ours, those of the moment, and those of one connection (RFC 9111 §3.1), which no cache stores.
_APART = re.compile(r"age|cache-status|date|x-ratelimit-.*|connection|keep-alive|transfer-encoding")


def seen(response: Any) -> dict[str, Any]:
    """What a response shows to whoever holds it."""
    assert isinstance(response.elapsed, datetime.timedelta)
    assert response.elapsed > datetime.timedelta()
    assert isinstance(response.connection, HTTPAdapter)
    try:
        decoded = response.json()
    except ValueError as exc:
        decoded = type(exc)
    return {
        "status_code": response.status_code,
        "reason": response.reason,
        "ok": response.ok,
        "content": response.content,
        "text": response.text,
        "json": decoded,
        "encoding": response.encoding,
        "headers": sorted((n.lower(), v) for n, v in response.headers.items() if not _APART.fullmatch(n.lower())),
        "lines": sorted((n.lower(), v) for n, v in response.raw.headers.iteritems() if not _APART.fullmatch(n.lower())),
        "url": response.url,
        "request": (response.request.method, response.request.url, dict(response.request.headers)),
        "is_redirect": (response.is_redirect, response.is_permanent_redirect),
        "links": response.links,
        "cookies": response.cookies.get_dict(),
        "history": [seen(hop) for hop in response.history],
        "next": response.next and response.next.url,
        "raw": (response.raw.status, response.raw.version, response.raw.reason),
    }


def caching(response: Any) -> tuple[bool, bool, bool, str]:
    """``response.caching`` as (from_cache, revalidated, stored, source)."""
    found = response.caching
    assert response.from_cache is found["from_cache"]
    assert response.headers["Cache-Status"].rpartition(", ")[2].startswith("p2pcache; ")
    return found["from_cache"], found["revalidated"], found["stored"], found["source"]


HIT = (True, False, False, "local")
STORED = (False, False, True, "origin")
PASSED = (False, False, False, "origin")
REVALIDATED = (True, True, False, "origin")


def raised(call: Callable[[], Any]) -> tuple[Any, ...]:
    """The error of ``call``, and the request that it names."""
    try:
        call()
    except Exception as exc:
        request = getattr(exc, "request", None)
        return type(exc), None if request is None else (request.method, request.url)
    raise AssertionError("nothing was raised")


# --- the table ------------------------------------------------------------------------------------------------------

Act = Callable[[Any, str], Any]
SCENES: list[Any] = []


def scene(script: Callable[[], Script], *, again: int = 0, **options: Any) -> Callable[[Act], Act]:
    """Adds a scene to the table. It calls the origin ``again`` times once all is stored; ``options`` of the adapter."""

    def add(act: Act) -> Act:
        SCENES.append(pytest.param(act, script, again, options, id=act.__name__))
        return act

    return add


@scene(fixed(answer(b'{"a": [1, "\xc3\xa9"]}', FRESH, ("Content-Type", "application/json; charset=utf-8"))))
def json_in_utf_8(session: Any, url: str) -> Any:
    return seen(session.get(url))


@scene(fixed(answer("café".encode("latin-1"), FRESH, ("Content-Type", "text/html"))))
def text_without_a_charset_is_latin_1(session: Any, url: str) -> Any:
    return seen(session.get(url))


@scene(fixed(answer("日本".encode("euc-jp"), FRESH, ("Content-Type", "text/plain; charset=euc-jp"))))
def text_in_another_charset(session: Any, url: str) -> Any:
    return seen(session.get(url))


@scene(fixed(answer(b"", FRESH)))
def an_empty_body(session: Any, url: str) -> Any:
    return seen(session.get(url))


@scene(fixed(answer(b"", FRESH, status=204)))
def no_content(session: Any, url: str) -> Any:
    return seen(session.get(url))


@scene(fixed(answer(b"gone", FRESH, TEXT, status=404)))
def a_404_that_is_raised(session: Any, url: str) -> Any:
    response = session.get(url)
    with pytest.raises(requests.HTTPError) as error:
        response.raise_for_status()
    return seen(response), str(error.value), error.value.response is response


@scene(fixed(answer(b"broken", TEXT, status=500)), again=1)
def a_500(session: Any, url: str) -> Any:
    return seen(session.get(url))


@scene(fixed(answer(gzip.compress(b"hello " * 3000, mtime=0), FRESH, TEXT, ("Content-Encoding", "gzip"))))
def gzip_is_unpacked(session: Any, url: str) -> Any:
    return seen(session.get(url))


@scene(fixed(answer(zlib.compress(b"hello " * 3000), FRESH, TEXT, ("Content-Encoding", "deflate"))))
def deflate_is_unpacked(session: Any, url: str) -> Any:
    return seen(session.get(url))


@scene(fixed(answer(gzip.compress(gzip.compress(b"deep", mtime=0)), FRESH, TEXT, ("Content-Encoding", "gzip, gzip"))))
def two_codings_are_unpacked(session: Any, url: str) -> Any:
    return seen(session.get(url))


@scene(fixed(answer(b"not gzip at all", FRESH, ("Content-Encoding", "gzip"))))
def a_body_that_does_not_unpack(session: Any, url: str) -> Any:
    return raised(lambda: session.get(url))


@scene(fixed(chunked(b"one ", b"two ", b"three", fields=[FRESH, TEXT])))
def a_chunked_body(session: Any, url: str) -> Any:
    return seen(session.get(url))


_PACKED = gzip.compress(bytes(range(256)) * 200, mtime=0)


@scene(fixed(chunked(_PACKED[:7], _PACKED[7:900], _PACKED[900:], fields=[FRESH, ("Content-Encoding", "gzip")])))
def a_chunked_body_that_is_packed(session: Any, url: str) -> Any:
    return seen(session.get(url))


@scene(fixed([head(200, [FRESH, TEXT, ("Connection", "close")]), b"until ", b"the end", None]))
def a_body_that_ends_with_the_connection(session: Any, url: str) -> Any:
    return seen(session.get(url))


@scene(fixed([head(200, [FRESH, TEXT, ("Content-Length", "5")]), b"12345678", None]))
def a_body_longer_than_content_length_ends_there(session: Any, url: str) -> Any:
    return seen(session.get(url)), seen(session.get(url + "/other"))


@scene(
    fixed(
        answer(
            b"x",
            FRESH,
            ("X-Many", "one"),
            ("X-Many", "two, three"),
            ("Link", '<http://127.0.0.1/2>; rel="next"'),
            ("Link", '<http://127.0.0.1/9>; rel="last"'),
            ("X-Empty", ""),
            ("X-Odd", "caf\xe9"),
        )
    )
)
def lines_of_one_field_stay_apart(session: Any, url: str) -> Any:
    response = session.get(url)
    return seen(response), response.raw.headers.getlist("x-many"), response.headers["x-many"], response.links


@scene(fixed(answer(b"welcome", FRESH, ("Set-Cookie", "a=1; Path=/"), ("Set-Cookie", "b=2; Path=/no"))))
def cookies_that_are_set(session: Any, url: str) -> Any:
    response = session.get(url)
    return seen(response), response.raw.headers.getlist("set-cookie"), session.cookies.get_dict()


@scene(lambda: lambda asked: answer(asked.fields.get("cookie", "none").encode(), FRESH))
def cookies_that_are_sent(session: Any, url: str) -> Any:
    session.cookies.set("mine", "1")
    return seen(session.get(url, cookies={"once": "2"})), seen(session.get(url))


@scene(
    by_target(
        here=answer(b"moved", FRESH, TEXT, ("Location", "/there?x=1"), status=301),
        there=answer(b"arrived", FRESH, TEXT),
    )
)
def a_permanent_redirect_is_followed(session: Any, url: str) -> Any:
    return seen(session.get(url.replace("/thing", "/here")))


@scene(
    by_target(here=answer(b"", ("Location", "/there"), status=302), there=answer(b"arrived", FRESH)),
    again=1,
)
def a_temporary_redirect_is_followed_and_asked_for_again(session: Any, url: str) -> Any:
    return seen(session.get(url.replace("/thing", "/here")))


@scene(fixed(answer(b"moved", FRESH, ("Location", "/there"), status=308)))
def a_redirect_that_is_not_followed_names_the_next(session: Any, url: str) -> Any:
    return seen(session.get(url, allow_redirects=False))


@scene(fixed(answer(b"", FRESH, ("Location", "/thing"), status=301)))
def a_redirect_without_end(session: Any, url: str) -> Any:
    return raised(lambda: session.get(url))


@scene(fixed(answer(b"the body", FRESH, TEXT)))
def head_without_a_body(session: Any, url: str) -> Any:
    return seen(session.head(url))


@scene(fixed(answer(b"0123456789", FRESH, ("ETag", '"v1"'))))
def a_get_and_then_head(session: Any, url: str) -> Any:
    return seen(session.get(url))["content"], session.head(url).headers["content-length"]


@scene(fixed(answer(b"done", TEXT)), again=8)
def bodies_of_every_kind_are_sent(session: Any, url: str) -> Any:
    return [
        seen(response)
        for response in (
            session.post(url, data=b"\x00bytes"),
            session.post(url, data="text é".encode()),
            session.post(url, data={"a": "1", "b": ["2", "3"]}),
            session.post(url, json={"a": [1]}),
            session.post(url, files={"file": ("name.txt", io.BytesIO(b"of a file"), "text/plain")}, data={"k": "v"}),
            session.put(url, data=io.BytesIO(b"an open file")),
            session.patch(url, data=iter([b"of ", b"a ", b"generator"]), headers={"X-Extra": "1"}),
            session.delete(url),
        )
    ]


@scene(lambda: lambda asked: answer(b"found " + asked.body, FRESH), again=3)
def a_get_with_content_is_answered_for_its_content(session: Any, url: str) -> Any:
    return [
        seen(response)
        for response in (
            session.get(url, json={"q": "apples"}),
            session.get(url, data=b"pears"),
            session.get(url, data=iter([b"plu", b"ms"])),
        )
    ]


@scene(fixed(answer(b"ok", ("Allow", "GET, OPTIONS"))), again=1)
def options(session: Any, url: str) -> Any:
    return seen(session.options(url))


@scene(lambda: lambda asked: answer(b"", FRESH, ("ETag", '"v1"'), status=304 if "if-none-match" in asked.fields else 200))
def a_condition_of_the_caller_s_own(session: Any, url: str) -> Any:
    first = session.get(url)
    second = session.get(url, headers={"If-None-Match": first.headers["etag"]})
    return second.status_code, second.content, second.headers["etag"], second.ok


@scene(lambda: lambda asked: answer(asked.target.encode(), FRESH))
def parameters_make_up_the_query(session: Any, url: str) -> Any:
    session.params = {"always": "yes"}
    return seen(session.get(url + "?own=1", params={"q": "repo:a/b is:open é", "none": None, "l": [1, 2]}))


@scene(lambda: lambda asked: answer(asked.fields.get("authorization", "none").encode(), FRESH))
def auth_of_the_session_of_the_request_and_of_the_url(session: Any, url: str) -> Any:
    session.auth = ("me", "pw")
    by_session = seen(session.get(url))
    by_request = seen(session.get(url, auth=("you", "pw2")))
    session.auth = None
    by_url = seen(session.get(url.replace("//", "//her:pw3@")))
    return by_session, by_request, by_url, seen(session.get(url))


class Signed(AuthBase):
    """An auth object as users write them."""

    def __call__(self, request: Any) -> Any:
        request.headers["X-Signature"] = f"of {request.path_url}"
        return request


@scene(lambda: lambda asked: answer(asked.fields["x-signature"].encode(), FRESH))
def an_auth_object_that_signs(session: Any, url: str) -> Any:
    return seen(session.get(url, auth=Signed()))


_CHALLENGE = answer(b"no", ("WWW-Authenticate", 'Digest realm="r", nonce="n", qop="auth"'), status=401)


@scene(
    lambda: lambda asked: (
        answer(b"welcome") if 'username="me"' in asked.fields.get("authorization", "") else _CHALLENGE
    ),
    again=2,
)
def digest_authentication(session: Any, url: str) -> Any:
    response = session.get(url, auth=HTTPDigestAuth("me", "pw"))
    return response.status_code, response.content, [hop.status_code for hop in response.history]


@scene(lambda: lambda asked: answer(asked.target.encode(), FRESH))
def hooks_see_every_response_and_may_replace_it(session: Any, url: str) -> Any:
    called: list[Any] = []
    session.hooks["response"].append(lambda response, **how: called.append((response.status_code, sorted(how))))

    def replace(response: Any, **_: Any) -> Any:
        response.extra = response.content.decode() * 2
        return response

    return session.get(url, hooks={"response": replace}).extra, called


@scene(lambda: lambda asked: answer(asked.target.encode(), FRESH))
def a_request_prepared_by_hand(session: Any, url: str) -> Any:
    prepared = session.prepare_request(requests.Request("GET", url, headers={"X-Name": "value"}))
    return seen(session.send(prepared)), raised(lambda: session.send(requests.Request("GET", url)))


@scene(lambda: lambda asked: answer(asked.fields["x-name"].encode(), FRESH))
def names_and_values_in_bytes(session: Any, url: str) -> Any:
    return seen(session.get(url, headers={b"X-Name": b"value"}))["content"]


TIMEOUTS: dict[str, Any] = {
    "none": None,
    "a number": 5,
    "a pair": (5, 5),
    "for the connection alone": (5, None),
    "for reading alone": (None, 5),
    "urllib3's": urllib3.Timeout(connect=5, read=5),
    "urllib3's, read alone": urllib3.Timeout(read=5),
    "urllib3's, in total": urllib3.Timeout(total=5),
    "urllib3's, in total and for reading": urllib3.Timeout(total=5, read=5),
}


for _name, _timeout in TIMEOUTS.items():

    def with_a_timeout(session: Any, url: str, timeout: Any = _timeout) -> Any:
        return seen(session.get(url, timeout=timeout))

    SCENES.append(pytest.param(with_a_timeout, fixed(answer(b"x", FRESH)), 0, {}, id=f"a_timeout-{_name}"))


@scene(in_turn(answer(b"busy", status=503), answer(b"busy", status=503), answer(b"at last", FRESH)))
def retries_until_it_works(session: Any, url: str) -> Any:
    retried(session, total=3)
    return seen(session.get(url))


@scene(fixed(answer(b"busy", status=503)), again=3)
def retries_that_run_out(session: Any, url: str) -> Any:
    retried(session, total=2)
    return raised(lambda: session.get(url))


@scene(fixed(answer(b"busy", status=503)), again=3)
def retries_that_run_out_and_return_what_came_last(session: Any, url: str) -> Any:
    retried(session, total=2, raise_on_status=False)
    return seen(session.get(url))


@scene(in_turn(answer(b"busy", status=503), answer(b"sent")), again=2)
def an_upload_is_begun_anew_by_a_retry(session: Any, url: str) -> Any:
    retried(session, total=1, allowed_methods=None)
    return seen(session.put(url, data=io.BytesIO(b"the whole file")))


def retried(session: Any, **how: Any) -> None:
    session.get_adapter("http://").max_retries = Retry(status_forcelist=[503], **how)


@scene(fixed(answer(b"\n".join(b"line %d" % n for n in range(300)), FRESH, TEXT)))
def a_stream_in_every_way_that_a_response_has(session: Any, url: str) -> Any:
    def read(number: int, how: Callable[[Any], Any]) -> Any:
        with session.get(f"{url}/{number}", stream=True) as response:
            return how(response), response.raw.tell()

    return [
        read(number, how)
        for number, how in enumerate(
            (
                lambda r: b"".join(r.iter_content(7)),
                lambda r: b"".join(r.iter_content(100_000)),
                lambda r: "".join(r.iter_content(50, decode_unicode=True)),
                lambda r: list(r.iter_lines()),
                lambda r: list(r.iter_lines(chunk_size=10, decode_unicode=True)),
                lambda r: list(r.iter_lines(delimiter=b"7")),
                lambda r: b"".join(r),
                lambda r: (r.content, r.text, list(r.iter_content(100))),
                lambda r: (r.json, r.content)[1],
            )
        )
    ]


def _copied(response: Any) -> bytes:
    into = io.BytesIO()
    shutil.copyfileobj(response.raw, into, 100)
    return into.getvalue()


def _into(response: Any) -> bytes:
    buffer = bytearray(64)
    return b"".join(bytes(buffer[:size]) for size in iter(lambda: response.raw.readinto(buffer), 0))


# Of ``raw``; the bytes as they came, unless decoding is asked for.
RAW_READS: dict[str, Callable[[Any], Any]] = {
    "read": lambda r: r.raw.read(),
    "read, decoded": lambda r: r.raw.read(decode_content=True),
    "read in pieces": lambda r: list(iter(lambda: r.raw.read(100), b"")),
    "read in pieces, decoded": lambda r: list(iter(lambda: r.raw.read(100, decode_content=True), b"")),
    "read nothing, then all": lambda r: (r.raw.read(0), r.raw.read()),
    "read one piece, then all": lambda r: (r.raw.read(10), r.raw.read()),
    "read beyond the end": lambda r: (r.raw.read(10**6), r.raw.read(10), r.raw.read()),
    "read1": lambda r: b"".join(iter(lambda: r.raw.read1(100), b"")),
    "read1, decoded": lambda r: b"".join(iter(lambda: r.raw.read1(100, decode_content=True), b"")),
    "stream": lambda r: b"".join(r.raw.stream(100)),
    "stream, decoded": lambda r: b"".join(r.raw.stream(100, decode_content=True)),
    "data": lambda r: (r.raw.data, r.raw.data),
    "lines": lambda r: list(r.raw),
    "readinto": _into,
    "a buffered reader": lambda r: io.BufferedReader(r.raw, 50).read(),
    "copied to a file": _copied,
    "drained": lambda r: r.raw.drain_conn(),
    "closed when read to the end": lambda r: (r.content, r.raw.closed)[1],
    "closed when closed": lambda r: (r.raw.closed, r.raw.close(), r.raw.closed),
}
_LINES = b"".join(b"line %d\n" % number for number in range(100))
BODIES: dict[str, tuple[Sequence[Piece], bool]] = {
    "plain": (answer(_LINES, FRESH), False),
    "gzip": (answer(gzip.compress(_LINES, mtime=0), FRESH, ("Content-Encoding", "gzip")), False),
    "chunked": (chunked(_LINES[:300], _LINES[300:]), False),
}

for _body, (_pieces, _) in BODIES.items():
    for _name, _read in RAW_READS.items():

        def read_raw(session: Any, url: str, read: Callable[[Any], Any] = _read) -> Any:
            with session.get(url, stream=True) as response:
                return read(response)

        _again = 1 if _name == "closed when closed" else 0
        SCENES.append(pytest.param(read_raw, fixed(_pieces), _again, {}, id=f"raw-{_body}-{_name}"))


@scene(fixed(answer(b"0123456789" * 1000, FRESH)))
def raw_says_what_urllib3_says(session: Any, url: str) -> Any:
    raw = session.get(url).raw
    return raw.version_string, raw.geturl(), raw.length_remaining, raw.isclosed(), raw.get_redirect_location()


@scene(in_turn(answer(b"busy", status=503), answer(b"at last")), again=2)
def raw_has_the_history_of_the_retries(session: Any, url: str) -> Any:
    retried(session, total=3)
    response = session.get(url)
    return [attempt.status for attempt in response.raw.retries.history]


@scene(in_turn(answer(b"busy", status=503), answer(b"at last", FRESH)), again=0)
def what_is_stored_has_the_history_of_its_retries_when_it_comes(session: Any, url: str) -> Any:
    retried(session, total=3)
    response = session.get(url)
    return response.from_cache if getattr(response, "from_cache", False) else len(response.raw.retries.history) == 1


# Errors of the origin; each is met by what requests makes of it, and is nothing that the next request suffers from.
BROKEN: dict[str, Sequence[Piece]] = {
    "cut short": [head(200, [FRESH, ("Content-Length", "10")]), b"0123", None],
    "cut short before it began": [head(200, [FRESH, ("Content-Length", "10")]), None],
    "chunked and cut in a chunk": [head(200, [FRESH, ("Transfer-Encoding", "chunked")]), b"a\r\n0123", None],
    "chunked and cut between two": chunked(b"0123", end=None),
    "chunked in no numbers": chunked(b"0123", end=b"none\r\n"),
    "no answer": [None],
    "not HTTP": [b"not HTTP at all\r\n\r\n", None],
    "half a head": [b"HTTP/1.1 200 OK\r\nContent-", None],
}


def _broken_once(pieces: Sequence[Piece]) -> Callable[[], Script]:
    return in_turn(pieces, answer(b"whole", FRESH))


for _name, _pieces in BROKEN.items():

    def an_error_and_then_an_answer(session: Any, url: str) -> Any:
        if getattr(session.get_adapter(url), "settings", None) and session.get(url + "?warm").from_cache:
            return None
        return raised(lambda: session.get(url)), session.get(url).content
