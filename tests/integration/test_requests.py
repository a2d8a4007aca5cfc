"""What a user of ``requests.Session`` sees is the same with P2PCacheAdapter as without it, and cached besides.

Most of it is one table: each scene is played on a plain session, on one with the adapter, and on that once more, with
all that it does answered from the store where it may be. What the scenes return has to be equal, and so is what the
origin is sent, and over how many connections.
"""

from __future__ import annotations

import contextlib
import datetime as dt
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from waiting import eventually

from httpx_p2pcache import P2PCacheTransport, Settings, SettingsError
from httpx_p2pcache.testing import Origin

pytest.importorskip("requests")

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase, HTTPDigestAuth
from urllib3.util import Retry

from httpx_p2pcache.integrations.requests import P2PCacheAdapter

PATIENCE = 10.0  # seconds after which a gate opens by itself, so that a failing test ends
PROMPT = 5.0  # seconds: half of what a claim lives, so that whoever waits for its end is noticed
FRESH = ("Cache-Control", "max-age=60")
TEXT = ("Content-Type", "text/plain; charset=utf-8")
TOKEN = "ghp_0123456789abcdefghijABCDEFGHIJ012345"

_BOUNDARY = re.compile(rb"[0-9a-f]{32}")  # that urllib3 makes up for a multipart body


def same_each_time(fields: Mapping[str, str]) -> dict[str, str]:
    """Fields of a request without what is made up anew for each."""
    return {
        name: re.sub(r"(?<=boundary=)\w+|Digest .*", "-", value.decode() if isinstance(value, bytes) else value)
        for name, value in fields.items()
    }


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
        """All but the connection, and what is made up anew for each request."""
        return self.method, self.target, same_each_time(self.fields), _BOUNDARY.sub(b"boundary", self.body)


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


@pytest.fixture(autouse=True)
def _clean_environment_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "HTTPS_PROXY", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


# Ours, those of the moment, and those of one connection (RFC 9111 §3.1), which no cache stores.
_APART = re.compile(r"age|cache-status|date|x-ratelimit-.*|connection|keep-alive|transfer-encoding")


def seen(response: Any) -> dict[str, Any]:
    """What a response shows to whoever holds it."""
    assert isinstance(response.elapsed, dt.timedelta)
    assert response.elapsed > dt.timedelta()
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
        "request": (response.request.method, response.request.url, same_each_time(response.request.headers)),
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


Act = Callable[[Any, str], Any]
SCENES: list[Any] = []


def scene(script: Callable[[], Script], *, again: int | None = 0, saved: int = 0) -> Callable[[Act], Act]:
    """Adds a scene. Once all is stored it calls the origin ``again`` times; None: it is not played once more.

    ``saved``: the calls that the cache saves when it is played for the first time.
    """

    def add(act: Act) -> Act:
        SCENES.append(pytest.param(act, script, again, saved, id=act.__name__))
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


@scene(fixed([head(200, [FRESH, TEXT, ("Connection", "close"), ("Content-Length", "5")]), b"12345678", None]))
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


@scene(fixed(answer(b"", FRESH, ("Location", "/thing"), status=301)), saved=30)
def a_redirect_without_end(session: Any, url: str) -> Any:
    return raised(lambda: session.get(url))


@scene(fixed(answer(b"the body", FRESH, TEXT)))
def head_without_a_body(session: Any, url: str) -> Any:
    return seen(session.head(url))


@scene(fixed(answer(b"0123456789", FRESH, ("ETag", '"v1"'))), saved=1)
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


@scene(
    lambda: lambda asked: answer(b"", FRESH, ("ETag", '"v1"'), status=304 if "if-none-match" in asked.fields else 200),
    saved=1,
)
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
    lambda: (
        lambda asked: answer(b"welcome") if 'username="me"' in asked.fields.get("authorization", "") else _CHALLENGE
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


def with_timeout(timeout: Any) -> Act:
    return lambda session, url: seen(session.get(url, timeout=timeout))


SCENES += [
    pytest.param(with_timeout(timeout), fixed(answer(b"x", FRESH)), 0, 0, id=f"timeout-{name}")
    for name, timeout in TIMEOUTS.items()
]


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
BODIES: dict[str, Sequence[Piece]] = {
    "plain": answer(_LINES, FRESH),
    "gzip": answer(gzip.compress(_LINES, mtime=0), FRESH, ("Content-Encoding", "gzip")),
    "chunked": chunked(_LINES[:300], _LINES[300:]),
}


def reading(read: Callable[[Any], Any]) -> Act:
    def act(session: Any, url: str) -> Any:
        with session.get(url, stream=True) as response:
            return read(response)

    return act


SCENES += [
    pytest.param(reading(read), fixed(pieces), 1 if name == "closed when closed" else 0, 0, id=f"raw-{body}-{name}")
    for body, pieces in BODIES.items()
    for name, read in RAW_READS.items()
]


@scene(fixed(answer(b"0123456789" * 1000, FRESH)))
def raw_knows_that_it_is_at_its_end(session: Any, url: str) -> Any:
    raw = session.get(url).raw
    return raw.length_remaining, raw.isclosed(), raw.get_redirect_location()


@scene(fixed(answer(b"x", FRESH)))
def raw_names_the_version_of_http(session: Any, url: str) -> Any:
    return session.get(url).raw.version_string


@scene(fixed(answer(b"x", FRESH)))
def raw_names_its_target(session: Any, url: str) -> Any:
    return session.get(url).raw.geturl()


@scene(in_turn(answer(b"busy", status=503), answer(b"at last", FRESH)), again=None)
def raw_has_the_history_of_the_retries(session: Any, url: str) -> Any:
    retried(session, total=3)
    return [attempt.status for attempt in session.get(url).raw.retries.history]


def play(act: Act, script: Script, wire: Wire, adapter: P2PCacheAdapter | None) -> Any:
    """What ``act`` returns, what the origin was sent meanwhile, and over how many connections."""
    wire.script = script
    asked, accepted = len(wire.asked), wire.accepted
    with requests.Session() as session:
        if adapter is not None:
            session.mount("http://", adapter)
        result = act(session, f"{wire.url}/thing")
    return result, [one.shown for one in wire.asked[asked:]], wire.accepted - accepted


@pytest.mark.parametrize(("act", "script", "again", "saved"), SCENES)
def test_a_session_with_the_adapter_shows_what_one_without_it_shows(
    act: Act, script: Callable[[], Script], again: int | None, saved: int, local: Settings, wire: Wire
) -> None:
    plain, asked, connections = play(act, script(), wire, None)
    cold, asked_cold, connections_cold = play(act, script(), wire, P2PCacheAdapter(settings=local))
    assert plain == cold
    assert (len(asked) - saved, connections) == (len(asked_cold), connections_cold)
    assert asked[: len(asked_cold)] == asked_cold
    if again is not None:
        warm, asked_again, _ = play(act, script(), wire, P2PCacheAdapter(settings=local))
        assert plain == warm
        assert again == len(asked_again)


def test_what_comes_in_chunks_is_handed_on_as_it_comes(wire: Wire, session_for: Callable[..., Any]) -> None:
    """Of a log that is followed, each line is there when it is sent, and not when the next one is."""
    firsts: dict[str, Callable[[Any], Any]] = {
        "/lines": lambda r: next(r.iter_lines()),
        "/pieces": lambda r: next(r.iter_content(None)),
        "/large-pieces": lambda r: next(r.iter_content(1024)).strip(),
        "/raw": lambda r: next(r.raw.stream()).strip(),
    }
    with requests.Session() as plain:
        for session in (plain, session_for()):
            for path, first in firsts.items():
                gate = threading.Event()
                wire.script = lambda asked, gate=gate: chunked(b"one\n", gate, b"two\n")
                with session.get(wire.url + path, stream=True, timeout=PROMPT) as response:
                    assert first(response).strip() == b"one"
                    gate.set()


# What a server may do to an answer.
BROKEN: dict[str, Sequence[Piece]] = {
    "cut short": [head(200, [FRESH, ("Content-Length", "10")]), b"0123", None],
    "cut short before it began": [head(200, [FRESH, ("Content-Length", "10")]), None],
    "chunked and cut in a chunk": [head(200, [FRESH, ("Transfer-Encoding", "chunked")]), b"a\r\n0123", None],
    "chunked and cut between two": [*chunked(b"0123", end=b""), None],
    "chunked in no numbers": [*chunked(b"0123", end=b"none\r\n"), None],
    "packed and cut short": [
        head(200, [FRESH, ("Content-Encoding", "gzip"), ("Content-Length", str(len(_PACKED)))]),
        _PACKED[:100],
        None,
    ],
    "no answer": [None],
    "not HTTP": [b"not HTTP at all\r\n\r\n", None],
    "no status": [b"HTTP/1.1 nothing\r\n\r\n", None],
}
CUT = {name: pieces for name, pieces in BROKEN.items() if name.startswith(("cut", "chunked", "packed"))}


@pytest.mark.parametrize("pieces", BROKEN.values(), ids=BROKEN)
def test_a_broken_answer_is_the_error_that_requests_makes_of_it_and_is_not_stored(
    pieces: Sequence[Piece], wire: Wire, session_for: Callable[..., Any]
) -> None:
    met = []
    with requests.Session() as plain:
        for session in (plain, session_for()):
            wire.script = in_turn(pieces, answer(b"whole", FRESH))()
            met.append((raised(lambda session=session: session.get(wire.url)), session.get(wire.url).content))
        assert met[0] == met[1]
        assert caching(session.get(wire.url)) == HIT


@pytest.mark.parametrize("pieces", CUT.values(), ids=CUT)
@pytest.mark.parametrize(
    "read",
    [
        lambda r: r.content,
        lambda r: b"".join(r.iter_content(3)),
        lambda r: r.raw.read(),
        lambda r: list(iter(lambda: r.raw.read(3), b"")),
        lambda r: list(r.raw.stream(3)),
    ],
    ids=["content", "iter_content", "read", "read in pieces", "stream"],
)
def test_a_stream_that_breaks_off_is_not_stored_whatever_is_done_with_it_afterwards(
    read: Callable[[Any], Any], pieces: Sequence[Piece], wire: Wire, session_for: Callable[..., Any]
) -> None:
    met = []
    with requests.Session() as plain:
        for session in (plain, session_for()):
            wire.script = in_turn(pieces, answer(b"whole", FRESH))()
            with session.get(wire.url, stream=True) as response:
                met.append(raised(lambda response=response: read(response)))
                with contextlib.suppress(Exception):
                    response.raw.read(100)
                with contextlib.suppress(Exception):
                    response.raw.read()
            assert session.get(wire.url).content == b"whole"
    assert met[0] == met[1]


def test_a_redirect_whose_body_breaks_off_is_followed_and_not_stored(
    wire: Wire, session_for: Callable[..., Any]
) -> None:
    """requests follows it all the same, and reads on in what is left of the body."""
    fields = [FRESH, ("Location", "/there"), ("Transfer-Encoding", "chunked")]
    here: list[Piece] = [head(301, fields), b"5\r\nmoved\r\n", b"none\r\n", None]
    wire.script = by_target(here=here, there=answer(b"arrived", FRESH))()
    session = session_for()
    for _ in range(2):
        assert session.get(wire.url + "/here").content == b"arrived"
    assert [asked.target for asked in wire.asked] == ["/here", "/there", "/here"]


def _closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# What a caller may do wrong, and what may be wrong with the way there.
MISHAPS: dict[str, Callable[[Any, Wire], Any]] = {
    "the origin is down": lambda session, wire: session.get(f"http://127.0.0.1:{_PORT}/"),
    "the proxy is down": lambda session, wire: session.get(wire.url, proxies={"http": f"http://127.0.0.1:{_PORT}"}),
    "no scheme": lambda session, wire: session.get("127.0.0.1/thing"),
    "an unknown scheme": lambda session, wire: session.get("ftp://127.0.0.1/thing"),
    "no host": lambda session, wire: session.get("http:///thing"),
    "a port that is none": lambda session, wire: session.get("http://127.0.0.1:nine/"),
    "a field with a line break": lambda session, wire: session.get(wire.url, headers={"X-Name": "a\r\nb: c"}),
    "a timeout of one value": lambda session, wire: session.get(wire.url, timeout=(1,)),
    "a timeout of text": lambda session, wire: session.get(wire.url, timeout="soon"),
    "a proxy without a host": lambda session, wire: session.get(wire.url, proxies={"http": "http:///"}),
    "certificates that are not there": lambda session, wire: session.get("https://127.0.0.1:1/", verify="missing.pem"),
    "a client certificate that is not there": lambda session, wire: session.get("https://127.0.0.1:1/", cert="no.pem"),
    "the head is late": lambda session, wire: session.get(wire.url + "/late", timeout=(PROMPT, 0.1)),
    "the head is late, urllib3's timeout": lambda session, wire: session.get(
        wire.url + "/late", timeout=urllib3.Timeout(connect=PROMPT, read=0.1)
    ),
    "the body is late": lambda session, wire: session.get(wire.url + "/half", timeout=(PROMPT, 0.1)),
}
_PORT = _closed_port()


@pytest.mark.parametrize("mishap", MISHAPS.values(), ids=MISHAPS)
def test_a_mishap_is_the_error_that_requests_makes_of_it(
    mishap: Callable[[Any, Wire], Any], wire: Wire, session_for: Callable[..., Any]
) -> None:
    gate = threading.Event()
    late = {"/late": [gate, b""], "/half": [head(200, [FRESH, ("Content-Length", "10")]), b"half", gate, None]}
    wire.script = lambda asked: late.get(asked.target, answer(b"on time", FRESH))
    session = session_for()
    with requests.Session() as plain:
        assert raised(lambda: mishap(plain, wire)) == raised(lambda: mishap(session, wire))
    gate.set()
    assert session.get(wire.url).content == b"on time"


def test_an_origin_that_fails_gives_way_to_a_stale_entry(
    wire: Wire, session_for: Callable[..., Any], settings_for: Callable[..., Settings]
) -> None:
    gate = threading.Event()
    stale = answer(b"good", ("Cache-Control", "max-age=1"), ("Age", "5"))
    for fault in (answer(b"down", status=503), [None], [gate, b""]):
        session = session_for(settings_for(enable_p2p=False, stale_if_error=60))
        wire.script = in_turn(stale, fault, answer(b"better", FRESH))()
        url = f"{wire.url}/{len(wire.asked)}"
        answers = [session.get(url, timeout=(PROMPT, 0.2)) for _ in range(3)]
        assert [response.content for response in answers] == [b"good", b"good", b"better"]
        assert [caching(response) for response in answers] == [STORED, HIT, STORED]
    gate.set()


def leave_unread(session: Any, url: str) -> None:
    session.get(url, stream=True).close()


def leave_in_the_middle(session: Any, url: str) -> None:
    with session.get(url, stream=True) as response:
        assert next(response.iter_content(4)) == b"half"


def leave_raw_in_the_middle(session: Any, url: str) -> None:
    raw = session.get(url, stream=True).raw
    assert raw.read(4) == b"half"
    raw.close()


def forget_it(session: Any, url: str) -> None:
    response = session.get(url, stream=True)
    assert response.raw.read(4) == b"half"
    del response
    gc.collect()


@pytest.mark.parametrize("leave", [leave_unread, leave_in_the_middle, leave_raw_in_the_middle, forget_it])
# urllib3 warns of a connection that is forgotten, as it does without the adapter.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_response_that_is_not_read_to_its_end_is_not_stored_and_holds_up_nobody(
    leave: Callable[[Any, str], None], wire: Wire, session_for: Callable[..., Any]
) -> None:
    gate = threading.Event()
    half: list[Piece] = [head(200, [FRESH, ("Content-Length", "8")]), b"half", gate, b"rest"]
    wire.script = in_turn(half, answer(b"whole", FRESH))()
    session = session_for()
    with ThreadPoolExecutor(2) as pool:
        pool.submit(leave, session, wire.url).result(PROMPT)
        second = pool.submit(lambda: session.get(wire.url)).result(PROMPT)
        gate.set()
    assert (second.content, caching(second)) == (b"whole", STORED)
    assert caching(session.get(wire.url)) == HIT


def test_a_response_that_is_still_being_read_does_not_hold_up_its_own_thread(
    wire: Wire, session_for: Callable[..., Any]
) -> None:
    session = session_for()
    began = time.monotonic()
    with session.get(wire.url, stream=True) as first:
        assert session.get(wire.url).content == b"/"
        assert first.content == b"/"
    assert time.monotonic() - began < PROMPT


class Arrivals(AuthBase):
    """Counts requests as the session prepares them."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def __call__(self, request: Any) -> Any:
        with self._lock:
            self.count += 1
        return request

    def wait_for(self, count: int) -> None:
        assert eventually(lambda: self.count >= count)


def test_twenty_threads_that_ask_one_cold_url_make_one_call(wire: Wire, session_for: Callable[..., Any]) -> None:
    gate = threading.Event()
    wire.script = lambda asked: [gate, *answer(b"body", FRESH)]
    session = session_for()
    session.auth = arrivals = Arrivals()
    with ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(session.get, wire.url) for _ in range(20)]
        arrivals.wait_for(20)
        gate.set()
        responses = [one.result(PROMPT) for one in asked]
    assert [response.content for response in responses] == [b"body"] * 20
    assert sorted(caching(response)[0] for response in responses) == [False] + [True] * 19
    assert len(wire.asked) == 1


# How the first who asks ends, and how many calls the origin sees at most when four more wait for it.
ENDS: dict[str, tuple[Callable[[threading.Event], Sequence[Piece]], int]] = {
    "gets a protocol error": (lambda gate: [gate, b"?\r\n\r\n", None], 2),
    "gets half a body": (lambda gate: [gate, head(200, [FRESH, ("Content-Length", "10")]), b"0123", None], 2),
    "gets half a chunk": (
        lambda gate: [gate, head(200, [FRESH, ("Transfer-Encoding", "chunked")]), b"a\r\n0123", None],
        2,
    ),
    "waits in vain for the body": (
        lambda gate: [gate, head(200, [FRESH, ("Content-Length", "10")]), b"0123", threading.Event()],
        2,
    ),
    "gets an error": (lambda gate: [gate, *answer(b"down", status=500)], 2),
    "may not store": (lambda gate: [gate, *answer(b"secret", ("Cache-Control", "no-store"))], 5),
}


@pytest.mark.parametrize("end", ENDS)
def test_when_the_first_thread_fails_the_others_are_answered(
    end: str, wire: Wire, session_for: Callable[..., Any]
) -> None:
    """Even while somebody holds the error, as a future does."""
    (first, calls), gate = ENDS[end], threading.Event()
    wire.script = lambda asked: first(gate) if "x-first" in asked.fields else answer(b"good", FRESH)
    session = session_for()
    session.auth = arrivals = Arrivals()
    with ThreadPoolExecutor(5) as pool:
        leading = pool.submit(session.get, wire.url, headers={"X-First": "1"}, timeout=(PROMPT, 1.0))
        wire.wait_for(1)
        asked = [pool.submit(session.get, wire.url) for _ in range(4)]
        arrivals.wait_for(5)
        gate.set()
        failed = leading.exception(PROMPT)
        responses = [one.result(PROMPT) for one in asked]
    assert (failed is None) == (end in ("gets an error", "may not store"))
    assert [response.content for response in responses] == [b"good"] * 4
    assert len(wire.asked) <= calls


def test_many_threads_may_use_one_session(wire: Wire, session_for: Callable[..., Any]) -> None:
    session = session_for(pool_maxsize=8)

    def ask(number: int) -> tuple[str, bool]:
        response = session.get(f"{wire.url}/{number % 25}")
        return response.text, response.from_cache

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(200)))
    assert [text for text, _ in answers] == [f"/{number % 25}" for number in range(200)]
    assert len(wire.asked) == 25 == sum(not from_cache for _, from_cache in answers)
    assert wire.accepted <= 8


def test_a_hit_says_so_in_headers_and_attributes(wire: Wire, session_for: Callable[..., Any]) -> None:
    session = session_for()
    first, second = session.get(wire.url), session.get(wire.url)
    assert [caching(first), caching(second)] == [STORED, HIT]
    assert first.headers["Cache-Status"] == "p2pcache; fwd=miss; stored"
    assert re.fullmatch(r"p2pcache; hit; ttl=\d+", second.headers["Cache-Status"])
    assert 0 <= int(second.headers["Age"]) <= 60


def test_another_cache_s_status_stays_before_ours(wire: Wire, session_for: Callable[..., Any]) -> None:
    wire.script = lambda asked: answer(b"body", FRESH, ("Cache-Status", "cdn; hit; ttl=3"))
    session = session_for()
    for _ in range(2):
        said = session.get(wire.url).headers["Cache-Status"]
        assert re.fullmatch(r"cdn; hit; ttl=3, p2pcache; .*", said)


def test_a_stale_response_is_validated_over_the_same_connection(wire: Wire, session_for: Callable[..., Any]) -> None:
    stale = ("Cache-Control", "max-age=0"), ("ETag", '"v1"'), TEXT
    wire.script = lambda asked: (
        answer(b"", *stale, status=304) if "if-none-match" in asked.fields else answer(b"body", *stale)
    )
    session = session_for()
    responses = [session.get(wire.url, headers={"X-Name": "value"}) for _ in range(3)]
    assert [response.content for response in responses] == [b"body"] * 3
    assert [caching(response) for response in responses] == [STORED, REVALIDATED, REVALIDATED]
    assert [response.request.headers.get("If-None-Match") for response in responses] == [None] * 3
    assert [asked.fields["x-name"] for asked in wire.asked] == ["value"] * 3
    assert wire.accepted == 1


def test_an_unsafe_method_invalidates_what_is_stored(wire: Wire, session_for: Callable[..., Any]) -> None:
    session = session_for()
    session.get(wire.url)
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        hit, written, again = session.get(wire.url), session.request(method, wire.url), session.get(wire.url)
        assert [caching(hit), caching(written), caching(again)] == [HIT, PASSED, STORED]


def test_a_part_of_what_is_held_is_served_from_it(wire: Wire, session_for: Callable[..., Any]) -> None:
    wire.script = lambda asked: answer(b"0123456789", FRESH, ("ETag", '"v1"'))
    session = session_for()
    session.get(wire.url)
    part = session.get(wire.url, headers={"Range": "bytes=2-4"})
    assert (part.status_code, part.reason, part.content) == (206, "Partial Content", b"234")
    assert part.headers["Content-Range"] == "bytes 2-4/10"


def test_what_only_the_cache_may_answer_and_cannot_is_a_504(wire: Wire, session_for: Callable[..., Any]) -> None:
    response = session_for().get(wire.url, headers={"Cache-Control": "only-if-cached"})
    assert (response.status_code, response.reason, response.content) == (504, "Gateway Timeout", b"")
    assert wire.asked == []


def test_a_body_above_the_limit_streams_through_unstored(
    wire: Wire, session_for: Callable[..., Any], settings_for: Callable[..., Settings]
) -> None:
    session = session_for(settings_for(enable_p2p=False, max_body_size=1000))
    for pieces in (answer(b"a" * 2000, FRESH), chunked(b"a" * 800, b"a" * 800, b"a" * 400)):
        wire.script = lambda asked, pieces=pieces: pieces
        for _ in range(2):
            response = session.get(wire.url)
            assert (response.content, response.from_cache) == (b"a" * 2000, False)


def test_stale_while_revalidate_answers_at_once_and_asks_the_origin_meanwhile(
    wire: Wire, session_for: Callable[..., Any]
) -> None:
    gate = threading.Event()
    wire.script = in_turn(
        answer(b"old", ("Cache-Control", "max-age=10, stale-while-revalidate=600"), ("Age", "100")),
        [gate, *answer(b"new", FRESH)],
    )()
    session = session_for()
    assert [session.get(wire.url).content for _ in range(2)] == [b"old", b"old"]
    wire.wait_for(2)
    gate.set()
    session.close()
    assert session_for().get(wire.url).content == b"new"
    assert len(wire.asked) == 2


def test_a_token_s_answer_is_for_nobody_else(wire: Wire, session_for: Callable[..., Any]) -> None:
    wire.script = lambda asked: answer(json.dumps(asked.fields.get("authorization")).encode(), FRESH)
    session = session_for()
    for expected in (STORED, HIT):
        for token in ("Bearer a", "Bearer b", None):
            response = session.get(wire.url, headers={"Authorization": token})
            assert (response.json(), caching(response)) == (token, expected)


def test_mounted_it_caches_only_what_it_is_mounted_for(wire: Wire, local: Settings) -> None:
    with Wire(lambda asked: answer(b"other", FRESH)) as other, requests.Session() as session:
        session.mount(wire.url, P2PCacheAdapter(settings=local))
        for _ in range(2):
            session.get(wire.url)
            assert not hasattr(session.get(other.url), "from_cache")
        assert (len(wire.asked), len(other.asked)) == (1, 2)


def test_its_settings_are_those_of_the_environment(wire: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "named"))
    monkeypatch.setenv("CACHE_ENABLE_P2P", "false")
    with requests.Session() as session:
        session.mount("http://", P2PCacheAdapter(max_retries=3))
        assert session.get_adapter("http://").max_retries.total == 3
        session.get(wire.url)
    assert list((tmp_path / "named").glob("*.db"))
    monkeypatch.setenv("CACHE_ENABLE_P2P", "perhaps")
    with pytest.raises(SettingsError, match="CACHE_ENABLE_P2P"):
        P2PCacheAdapter()


def test_a_session_that_is_pickled_has_its_settings_and_finds_what_is_stored(
    wire: Wire, session_for: Callable[..., Any]
) -> None:
    session = session_for(max_retries=7, pool_maxsize=3)
    session.get(wire.url)
    with pickle.loads(pickle.dumps(session)) as copy:
        adapter = copy.get_adapter(wire.url)
        assert (adapter.max_retries.total, adapter._pool_maxsize) == (7, 3)
        assert adapter.settings == session.get_adapter(wire.url).settings
        assert caching(copy.get(wire.url)) == HIT
    assert caching(session.get(wire.url)) == HIT


def test_a_response_can_be_pickled_whether_it_was_stored_or_not(wire: Wire, session_for: Callable[..., Any]) -> None:
    session = session_for()
    for _ in range(2):
        response = session.get(wire.url)
        copy = pickle.loads(pickle.dumps(response))
        assert (copy.status_code, copy.content, copy.headers) == (200, b"/", response.headers)


def test_a_closed_session_can_be_used_and_closed_again(wire: Wire, session_for: Callable[..., Any]) -> None:
    """As one of requests alone can."""
    session = session_for()
    session.close()
    session.close()
    for expected in (STORED, HIT):
        assert caching(session.get(wire.url)) == expected
        session.close()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="there is no /proc here")
def test_close_leaves_no_file_open(wire: Wire, session_for: Callable[..., Any], local: Settings) -> None:
    session = session_for(local)
    session.get(wire.url)
    assert open_files(local.dir)
    session.close()
    assert open_files(local.dir) == []
    session.get(wire.url)
    session.close()
    assert open_files(local.dir) == []


def open_files(directory: Path) -> list[str]:
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(str(descriptor.readlink()))
    return [name for name in found if name.startswith(str(directory))]


def test_closing_one_session_does_not_take_the_runner_from_another(wire: Wire, session_for: Callable[..., Any]) -> None:
    one, two = session_for(), session_for()
    one.get(wire.url)
    one.close()
    one.close()
    assert caching(two.get(wire.url)) == HIT
    assert two.get_adapter(wire.url).stats()["local_hits"] == 1


# urllib3 warns of a connection that is forgotten, as it does without the adapter.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_forgotten_response_may_be_collected_at_any_moment(wire: Wire, session_for: Callable[..., Any]) -> None:
    """The garbage collector runs in whichever thread allocates: also in one that is just looking at the claims."""
    gate = threading.Event()
    wire.script = lambda asked: [head(200, [FRESH, ("Content-Length", "8")]), b"half", gate, b"rest"]
    session = session_for()
    response = session.get(wire.url, stream=True)
    response.itself = response
    del response
    claims = session.get_adapter(wire.url)._usage.exchange.flights._lock
    collected = threading.Event()

    def collect() -> None:
        claims.acquire()
        gc.collect()
        collected.set()
        with contextlib.suppress(RuntimeError):
            claims.release()

    gc.disable()
    worker = threading.Thread(target=collect, daemon=True)
    try:
        worker.start()
        in_time = collected.wait(PROMPT)
    finally:
        gc.enable()
        gate.set()
        if not collected.is_set():  # so that the test ends, and the thread with it
            claims.release()
        worker.join(PROMPT)
    assert in_time


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a key and its certificate for 127.0.0.1 and origin.test, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a stand-in")])
    now = dt.datetime.now(dt.timezone.utc)
    names = [x509.DNSName("origin.test"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    unlocked = serialization.NoEncryption()
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, unlocked)
        + signed.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def test_verify_reaches_the_origin_s_connection(
    tls: ssl.SSLContext, certificate: Path, session_for: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Wire(lambda asked: answer(asked.target.encode(), FRESH), tls) as origin, requests.Session() as plain:
        session = session_for()
        assert raised(lambda: plain.get(origin.url)) == raised(lambda: session.get(origin.url))
        with pytest.raises(requests.exceptions.SSLError):
            session.get(origin.url)
        for expected in (STORED, HIT):
            assert caching(session.get(origin.url + "/file", verify=str(certificate))) == expected
        with pytest.warns(urllib3.exceptions.InsecureRequestWarning):
            assert caching(session.get(origin.url + "/off", verify=False)) == (False, False, False, "origin")
        session.verify = str(certificate)
        assert caching(session.get(origin.url + "/session")) == STORED
        session.verify = True
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        assert caching(session.get(origin.url + "/environment")) == STORED


def test_what_was_fetched_without_a_look_at_the_certificate_is_not_for_those_who_ask_for_one(
    tls: ssl.SSLContext, session_for: Callable[..., Any]
) -> None:
    with Wire(lambda asked: answer(b"who knows whose", FRESH), tls) as origin:
        session = session_for()
        with pytest.warns(urllib3.exceptions.InsecureRequestWarning):
            session.get(origin.url, verify=False)
        with pytest.raises(requests.exceptions.SSLError):
            session.get(origin.url)


def test_cert_reaches_the_origin_s_connection(
    tls: ssl.SSLContext, certificate: Path, session_for: Callable[..., Any]
) -> None:
    tls.verify_mode = ssl.CERT_REQUIRED
    tls.load_verify_locations(certificate)
    with Wire(lambda asked: answer(b"welcome", FRESH), tls) as origin:
        session = session_for()
        session.verify = str(certificate)
        with pytest.raises(requests.ConnectionError):
            session.get(origin.url)
        assert session.get(origin.url, cert=str(certificate)).content == b"welcome"
        session.cert = (str(certificate), str(certificate))
        assert session.get(origin.url + "/pair").content == b"welcome"


def test_proxies_reach_the_origin_s_connection(
    wire: Wire, session_for: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with requests.Session() as plain:
        session = session_for()
        for one in (plain, session):
            by_request = one.get("http://origin.test/a", proxies={"http": wire.url.replace("//", "//me:pw@")})
            one.proxies = {"http": wire.url}
            by_session = one.get("http://origin.test/b")
            one.proxies = {}
            monkeypatch.setenv("HTTP_PROXY", wire.url)
            by_environment = one.get("http://origin.test/c")
            monkeypatch.setenv("NO_PROXY", "127.0.0.1")
            direct = one.get(f"{wire.url}/d")
            monkeypatch.delenv("HTTP_PROXY")
            assert [by_request.text, by_session.text, by_environment.text, direct.text] == [
                "http://origin.test/a",
                "http://origin.test/b",
                "http://origin.test/c",
                "/d",
            ]
    asked = [one.shown for one in wire.asked]
    assert asked[:4] == asked[4:]
    assert wire.asked[4].fields["proxy-authorization"] == "Basic bWU6cHc="
    assert caching(session.get("http://origin.test/a", proxies={"http": wire.url})) == HIT


def test_https_goes_through_a_proxy_s_tunnel(
    tls: ssl.SSLContext, certificate: Path, session_for: Callable[..., Any]
) -> None:
    with Wire(lambda asked: answer(b"tunnelled", FRESH), tls, proxy=True) as proxy:
        session = session_for()
        session.proxies, session.verify = {"https": proxy.url}, str(certificate)
        for expected in (STORED, HIT):
            response = session.get("https://origin.test/thing")
            assert (response.content, caching(response)) == (b"tunnelled", expected)
        assert proxy.tunnels == ["origin.test:443"]


# What requests is asked for, and what httpx is: the same, so that it is one entry.
SPELLINGS: dict[str, tuple[str, str]] = {
    "as it is": ("http://origin.test/thing?x=1", "http://origin.test/thing?x=1"),
    "port 80": ("http://origin.test:80/thing", "http://origin.test/thing"),
    "port 443": ("https://origin.test:443/thing", "https://origin.test/thing"),
    "port 443 for httpx": ("https://origin.test/thing", "https://origin.test:443/thing"),
    "another port": ("http://origin.test:8080/thing", "http://origin.test:8080/thing"),
    "port 443 of http": ("http://origin.test:443/thing", "http://origin.test:443/thing"),
    "case of the host": ("http://Origin.TEST/Thing", "http://origin.test/Thing"),
    "case of the scheme": ("HTTP://origin.test/thing", "http://origin.test/thing"),
    "a fragment": ("http://origin.test/thing#top", "http://origin.test/thing#bottom"),
    "no path": ("http://origin.test", "http://origin.test/"),
    "no path, but a query": ("http://origin.test?x=1", "http://origin.test/?x=1"),
    "user information": ("http://me:p%40w@origin.test/thing", "http://me:p%40w@origin.test/thing"),
    "all of it": ("HTTP://me:pw@Origin.test:80/thing?x=1#top", "http://me:pw@origin.test/thing?x=1"),
    "what must be quoted": ("http://origin.test/a b/é?q=c d", "http://origin.test/a%20b/%C3%A9?q=c%20d"),
    "steps up": ("http://origin.test/a/../thing", "http://origin.test/thing"),
    "a host in another script": ("http://bücher.test/thing", "http://xn--bcher-kva.test/thing"),
}


def caching_of_httpx(response: httpx.Response) -> tuple[bool, str]:
    return response.extensions["caching"]["from_cache"], response.extensions["caching"]["source"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_httpx_has_fetched_is_a_hit_for_requests(
    spelling: str, local: Settings, session_for: Callable[..., Any]
) -> None:
    ours, theirs = SPELLINGS[spelling]
    below = httpx.MockTransport(lambda request: httpx.Response(200, content=b"body", headers=[FRESH]))
    with httpx.Client(transport=P2PCacheTransport(below, settings=local)) as client:
        client.get(theirs)
    response = session_for(local).get(ours, headers={"Cache-Control": "only-if-cached"})
    assert (response.status_code, response.content) == (200, b"body")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_requests_has_fetched_is_a_hit_for_httpx(
    spelling: str, local: Settings, session_for: Callable[..., Any], tls: ssl.SSLContext, certificate: Path
) -> None:
    ours, theirs = SPELLINGS[spelling]
    with Wire(lambda asked: answer(b"body", FRESH), tls, proxy=True) as proxy:
        session = session_for(local)
        session.proxies, session.verify = {"http": proxy.url, "https": proxy.url}, str(certificate)
        assert session.get(ours).content == b"body"
    below = httpx.MockTransport(lambda request: httpx.Response(500))
    with httpx.Client(transport=P2PCacheTransport(below, settings=local)) as client:
        response = client.get(theirs)
    assert (response.content, caching_of_httpx(response)) == (b"body", (True, "local"))


def test_one_token_is_one_user_of_the_stand_in_whichever_client_has_it(
    origin: Origin, settings_for: Callable[..., Settings], session_for: Callable[..., Any]
) -> None:
    settings = settings_for(enable_p2p=False, github_hosts=(origin.netloc,))
    mine = {"Authorization": f"Bearer {TOKEN}", "Accept": "application/vnd.github+json"}
    session = session_for(settings)
    session.headers.update(mine)
    transport = P2PCacheTransport(settings=settings)
    with httpx.Client(transport=transport, headers=mine, base_url=origin.url) as client:
        for first, second in ((session.get, client.get), (client.get, session.get)):
            target = f"/repos/octo-org/repo-{len(origin.calls)}"
            urls = {session.get: origin.url + target, client.get: target}
            assert first(urls[first]).json() == second(urls[second]).json()
        another = session.get(f"{origin.url}/repos/octo-org/repo-0", headers={"Authorization": "Bearer another"})
    assert [call.status for call in origin.calls] == [200, 200, 304]
    assert caching(another) == REVALIDATED


@pytest.mark.p2p
def test_what_requests_has_fetched_a_peer_s_httpx_gets_and_the_other_way_round(
    origin: Origin, settings_for: Callable[..., Settings], session_for: Callable[..., Any]
) -> None:
    pytest.importorskip("libp2p")
    mine = {"Authorization": f"Bearer {TOKEN}", "Accept": "application/vnd.github+json"}
    session = session_for(settings_for("a", lookup_timeout=PROMPT))
    session.headers.update(mine)
    transport = P2PCacheTransport(settings=settings_for("b", lookup_timeout=PROMPT))
    with httpx.Client(transport=transport, headers=mine, base_url=origin.url, timeout=30) as client:
        adapter = session.get_adapter(origin.url)
        assert adapter.wait_until_joined(30)
        assert transport.wait_until_joined(30)
        assert eventually(lambda: adapter.stats()["connected_peers"] == 1)
        assert eventually(lambda: transport.stats()["connected_peers"] == 1)
        paid = session.get(f"{origin.url}/repos/octo-org/repo-1")
        assert eventually(lambda: transport.stats()["cache_size"] == 1)
        given = client.get("/repos/octo-org/repo-1")
        assert (paid.content, True) == (given.content, caching_of_httpx(given)[0])
        paid_there = client.get("/repos/octo-org/repo-2")
        assert eventually(lambda: adapter.stats()["cache_size"] == 2)
        given_here = session.get(f"{origin.url}/repos/octo-org/repo-2")
        assert (paid_there.content, True) == (given_here.content, given_here.from_cache)
    assert len(origin.calls) == 2
