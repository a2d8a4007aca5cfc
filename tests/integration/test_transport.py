"""What httpx promises holds through P2PCacheTransport, without peers, for both clients, on asyncio and on trio.

Most behaviours are scenes: generators that yield what to ask, are sent the response or thrown the error, and assert.
One table of them is played by ``httpx.Client`` and by ``httpx.AsyncClient``. The pool of every scene holds a single
connection, so whatever does not give its connection back fails the next request.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import re
import signal
import socket
import sqlite3
import ssl
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest
from scripted import Answer, Asked, Scripted, ScriptedHTTP2

from httpx_p2pcache import ConfigurationError, P2PCacheTransport, Settings
from httpx_p2pcache.testing import Origin

CONTEXT = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # never used: every origin here is plain, and loading one takes long
FRESH = {"Cache-Control": "max-age=60"}
TOKEN = "ghp_0123456789abcdefghijABCDEFGHIJ012345"
PROMPT = 5.0  # seconds: half of what a claim lives, so that whoever waits for its end is noticed

# RFC 9211: an sf-list (RFC 8941) whose members are tokens with parameters.
_ITEM = r'(?:-?\d+|[A-Za-z*][!#$%&\'*+.^_`|~0-9A-Za-z:/-]*|"(?:[ !#-\[\]-~]|\\["\\])*"|\?[01])'
_CACHE_STATUS = re.compile(rf"p2pcache(?:; *[a-z*][a-z0-9_.*-]*(?:={_ITEM})?)+")
_FORWARDED = {"bypass", "method", "uri-miss", "vary-miss", "miss", "request", "stale", "partial"}


def parameters(response: httpx.Response) -> dict[str, str]:
    """The parameters of our member of Cache-Status, which has to be the last one and well-formed."""
    member = response.headers.get_list("cache-status")[-1]
    assert _CACHE_STATUS.fullmatch(member), member
    found = dict(part.strip().partition("=")[::2] for part in member.split(";")[1:])
    # Neither a hit nor forwarded is only what we have made ourselves.
    assert ("hit" in found) != ("fwd" in found) or found == {"detail": "only-if-cached"}, member
    assert found.get("fwd", "miss") in _FORWARDED, member
    return found


def caching(response: httpx.Response) -> tuple[bool, bool, bool, str]:
    """``extensions["caching"]`` as (from_cache, revalidated, stored, source)."""
    found = response.extensions["caching"]
    assert {"from_cache", "revalidated", "stored", "source"} <= set(found)
    return found["from_cache"], found["revalidated"], found["stored"], found["source"]


HIT = (True, False, False, "local")
STORED = (False, False, True, "origin")
PASSED = (False, False, False, "origin")
REVALIDATED = (True, True, False, "origin")


@dataclass(frozen=True)
class Ask:
    """A request. ``read``: the response is streamed by that method, up to ``take`` pieces; then it is closed."""

    method: str
    url: str
    how: dict[str, Any] = field(default_factory=dict)
    read: str | None = None
    take: int | None = None
    upload: Sequence[bytes] | None = None  # sent by a generator


@dataclass(frozen=True)
class Streamed:
    response: httpx.Response
    pieces: list[Any]


@dataclass
class World:
    origin: Scripted
    settings: Settings

    def get(self, path: str = "/thing", **how: Any) -> Ask:
        return Ask("GET", self.origin.url + path, how)

    def ask(self, method: str, path: str = "/thing", **how: Any) -> Ask:
        return Ask(method, self.origin.url + path, how)

    def stream(self, read: str, path: str = "/thing", take: int | None = None) -> Ask:
        return Ask("GET", self.origin.url + path, {}, read, take)

    @property
    def calls(self) -> list[str]:
        return [f"{asked.method} {asked.target}" for asked in self.origin.asked]


Scene = Generator[Ask, Any, None]
SCENES: list[Any] = []


def scene(**settings: Any) -> Callable[[Callable[[World], Scene]], Callable[[World], Scene]]:
    """Adds a scene to the table; ``settings`` differ from those of ``local``."""

    def add(play: Callable[[World], Scene]) -> Callable[[World], Scene]:
        SCENES.append(pytest.param(play, settings, id=play.__name__))
        return play

    return add


def always(answer: Answer) -> Callable[[Asked], Answer]:
    return lambda asked: answer


def in_turn(*answers: Answer) -> Callable[[Asked], Answer]:
    left = iter(answers)
    return lambda asked: next(left)


# --- the table ------------------------------------------------------------------------------------------------------


@scene()
def a_repeated_request_is_answered_from_the_store(world: World) -> Scene:
    first = yield world.get()
    second = yield world.get()
    assert (first.content, caching(first)) == (b"/thing", STORED)
    assert (second.content, caching(second)) == (b"/thing", HIT)
    assert world.calls == ["GET /thing"]


@scene()
def a_hit_has_the_bytes_and_the_fields_of_the_miss(world: World) -> Scene:
    packed = gzip.compress(b"hello " * 1000, mtime=0)
    fields = {**FRESH, "Content-Encoding": "gzip", "Content-Type": "text/plain", "X-Odd": "caf\xe9"}
    world.origin.script = always(Answer(packed, fields=fields))
    first = yield world.stream("iter_raw")
    second = yield world.stream("iter_raw")
    third = yield world.get()
    assert [packed, packed] == [b"".join(streamed.pieces) for streamed in (first, second)]
    assert third.content == b"hello " * 1000
    kept = [
        sorted((n.lower(), v) for n, v in r.headers.raw if n.lower() not in (b"age", b"cache-status"))
        for r in (first.response, second.response, third)
    ]
    assert [kept[0]] * 2 == kept[1:]
    assert [caching(r) for r in (first.response, second.response, third)] == [STORED, HIT, HIT]


@scene()
def every_way_to_read_gives_the_same_on_a_hit_as_on_a_miss(world: World) -> Scene:
    world.origin.script = always(Answer(fields=FRESH, pieces=[b"one\ntw", b"o\nthree\n", b"end"]))
    for read, joined in (
        ("iter_bytes", b"one\ntwo\nthree\nend"),
        ("iter_raw", b"one\ntwo\nthree\nend"),
        ("iter_text", "one\ntwo\nthree\nend"),
        ("iter_lines", "onetwothreeend"),
    ):
        for expected in (STORED, HIT):
            streamed = yield world.stream(read, f"/{read}")
            assert joined == type(joined)().join(streamed.pieces)
            assert expected == caching(streamed.response)


@scene()
def a_response_that_is_closed_early_is_not_stored_and_does_not_block_the_next(world: World) -> Scene:
    gate = threading.Event()
    world.origin.script = in_turn(
        Answer(fields=FRESH, pieces=[b"half", b"rest"], gate=gate),
        Answer(b"whole", fields=FRESH),
    )
    began = time.monotonic()
    streamed = yield world.stream("iter_bytes", take=1)
    assert streamed.pieces == [b"half"]
    second = yield world.get()
    third = yield world.get()
    gate.set()
    assert (second.content, caching(second)) == (b"whole", STORED)
    assert (third.content, caching(third)) == (b"whole", HIT)
    assert time.monotonic() - began < PROMPT


@scene()
def a_response_that_is_closed_unread_is_not_stored(world: World) -> Scene:
    yield world.stream("iter_bytes", take=0)
    second = yield world.get()
    assert caching(second) == STORED
    assert len(world.calls) == 2


@scene()
def a_generator_is_uploaded_to_its_end(world: World) -> Scene:
    response = yield Ask("POST", world.origin.url + "/up", upload=[b"one ", b"two ", b"three"])
    assert caching(response) == PASSED
    assert world.origin.asked[0].body == b"one two three"


@scene()
def a_get_with_content_is_not_answered_with_the_answer_to_other_content(world: World) -> Scene:
    world.origin.script = lambda asked: Answer(b"found " + asked.body, fields=FRESH)
    apples = yield world.get("/search", json={"q": "apples"})
    pears = yield world.get("/search", json={"q": "pears"})
    assert [apples.content, pears.content] == [b'found {"q":"apples"}', b'found {"q":"pears"}']


@scene()
def a_connect_error_keeps_its_type_and_its_request(world: World) -> Scene:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = f"http://127.0.0.1:{listener.getsockname()[1]}/x"
    with pytest.raises(httpx.ConnectError) as raised:
        yield Ask("GET", closed)
    assert closed == str(raised.value.request.url)


@scene()
def a_read_timeout_keeps_its_type_and_its_request_and_the_next_request_works(world: World) -> Scene:
    gate = threading.Event()
    world.origin.script = in_turn(Answer(b"late", before=gate), Answer(b"on time", fields=FRESH))
    with pytest.raises(httpx.ReadTimeout) as raised:
        yield world.get(timeout=httpx.Timeout(5, read=0.1))
    gate.set()
    assert world.origin.url + "/thing" == str(raised.value.request.url)
    response = yield world.get()
    assert response.content == b"on time"


@scene()
def a_read_timeout_in_the_middle_of_a_body_keeps_its_type_and_its_request(world: World) -> Scene:
    gate = threading.Event()
    world.origin.script = in_turn(
        Answer(fields=FRESH, pieces=[b"half", b"rest"], gate=gate), Answer(b"whole", fields=FRESH)
    )
    with pytest.raises(httpx.ReadTimeout) as raised:
        yield world.get(timeout=httpx.Timeout(5, read=0.1))
    gate.set()
    assert world.origin.url + "/thing" == str(raised.value.request.url)
    response = yield world.get()
    assert (response.content, caching(response)) == (b"whole", STORED)


@scene()
def a_protocol_error_keeps_its_type_and_its_request(world: World) -> Scene:
    world.origin.script = always(Answer(raw=b"not HTTP at all\r\n\r\n"))
    with pytest.raises(httpx.RemoteProtocolError) as raised:
        yield world.get()
    assert world.origin.url + "/thing" == str(raised.value.request.url)


@scene()
def a_body_that_breaks_off_is_an_error_and_is_not_stored(world: World) -> Scene:
    world.origin.script = in_turn(Answer(b"0123456789", fields=FRESH, cut=4), Answer(b"whole", fields=FRESH))
    with pytest.raises(httpx.RemoteProtocolError) as raised:
        yield world.get()
    assert world.origin.url + "/thing" == str(raised.value.request.url)
    response = yield world.get()
    assert (response.content, caching(response)) == (b"whole", STORED)


@scene()
def an_unsupported_scheme_keeps_its_type_and_its_request(world: World) -> Scene:
    with pytest.raises(httpx.UnsupportedProtocol) as raised:
        yield Ask("GET", "ftp://127.0.0.1/x")
    assert str(raised.value.request.url) == "ftp://127.0.0.1/x"


@scene()
def redirects_are_followed_and_each_hop_is_stored(world: World) -> Scene:
    world.origin.script = lambda asked: (
        Answer(status=301, fields={**FRESH, "Location": "/there"})
        if asked.target == "/here"
        else Answer(b"arrived", fields=FRESH)
    )
    for expected in (STORED, HIT):
        response = yield world.get("/here", follow_redirects=True)
        assert (response.content, response.url.path) == (b"arrived", "/there")
        assert [hop.status_code for hop in response.history] == [301]
        assert [expected] * 2 == [caching(response), caching(response.history[0])]
    assert world.calls == ["GET /here", "GET /there"]


@scene()
def cookies_are_kept_by_the_client_and_sent(world: World) -> Scene:
    world.origin.script = lambda asked: Answer(
        asked.fields.get("cookie", "none").encode(), fields=[("Set-Cookie", "a=1; Path=/"), ("Set-Cookie", "b=2")]
    )
    first = yield world.get("/login")
    second = yield world.get("/login")
    assert [first.content, second.content] == [b"none", b"a=1; b=2"]


@scene()
def basic_auth_reaches_the_origin_and_has_a_store_of_its_own(world: World) -> Scene:
    world.origin.script = lambda asked: Answer(asked.fields.get("authorization", "none").encode(), fields=FRESH)
    mine = yield world.get(auth=("me", "pw"))
    again = yield world.get(auth=("me", "pw"))
    other = yield world.get()
    assert [mine.content, again.content, other.content] == [b"Basic bWU6cHc=", b"Basic bWU6cHc=", b"none"]
    assert [caching(r) for r in (mine, again, other)] == [STORED, HIT, STORED]


class Challenged(httpx.Auth):
    """Answers a nonce that comes in the body, as digest authentication answers one in a field."""

    requires_response_body = True

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        response = yield request
        if response.status_code == 401:
            request.headers["Authorization"] = "Answer " + response.text[::-1]
            yield request


@scene()
def an_auth_flow_that_reads_a_challenge_works(world: World) -> Scene:
    world.origin.script = lambda asked: (
        Answer(b"welcome", fields=FRESH)
        if asked.fields.get("authorization") == "Answer 321"
        else Answer(b"123", 401, {"WWW-Authenticate": "Answer"})
    )
    first = yield world.get(auth=Challenged())
    second = yield world.get(auth=Challenged())
    assert [first.content, second.content] == [b"welcome", b"welcome"]
    assert [caching(first), caching(second)] == [STORED, HIT]


@scene()
def digest_auth_works(world: World) -> Scene:
    world.origin.script = lambda asked: (
        Answer(b"welcome", fields=FRESH)
        if 'username="me"' in asked.fields.get("authorization", "")
        else Answer(status=401, fields={"WWW-Authenticate": 'Digest realm="r", nonce="n", qop="auth"'})
    )
    response = yield world.get(auth=httpx.DigestAuth("me", "pw"))
    assert (response.status_code, response.content) == (200, b"welcome")


@scene()
def elapsed_is_measured_on_a_miss_and_on_a_hit(world: World) -> Scene:
    for _ in range(2):
        response = yield world.get()
        assert 0 < response.elapsed.total_seconds() < PROMPT


@scene()
def head_has_the_fields_without_the_body_on_a_miss_and_on_a_hit(world: World) -> Scene:
    world.origin.script = always(Answer(b"body", fields=FRESH))
    for expected in (STORED, HIT):
        response = yield world.ask("HEAD")
        assert (b"", "4", expected) == (response.content, response.headers["content-length"], caching(response))
    response = yield world.get()
    assert response.content == b"body"


@scene()
def no_content_is_stored_as_such(world: World) -> Scene:
    world.origin.script = always(Answer(status=204, fields=FRESH))
    for expected in (STORED, HIT):
        response = yield world.get()
        assert (204, b"", expected) == (response.status_code, response.content, caching(response))


@scene(max_body_size=1000)
def a_body_above_the_limit_streams_through_unstored(world: World) -> Scene:
    body = os.urandom(100_000)
    world.origin.script = always(Answer(body, fields=FRESH))
    for _ in range(2):
        response = yield world.get()
        assert (body, PASSED) == (response.content, caching(response))


@scene(max_body_size=1000)
def a_body_that_grows_above_the_limit_streams_through_unstored(world: World) -> Scene:
    world.origin.script = always(Answer(fields=FRESH, pieces=[b"a" * 600, b"b" * 600, b"c" * 600]))
    for calls in (1, 2):
        response = yield world.get()
        assert response.content == b"a" * 600 + b"b" * 600 + b"c" * 600
        assert calls == len(world.calls)


@scene(max_body_size=1000)
def a_body_whose_first_piece_is_above_the_limit_streams_through_unstored(world: World) -> Scene:
    world.origin.script = always(Answer(fields=FRESH, pieces=[b"a" * 5000]))
    for calls in (1, 2):
        response = yield world.get()
        assert (5000, calls) == (len(response.content), len(world.calls))


@scene(max_body_size=1000)
def a_body_of_exactly_the_limit_is_stored(world: World) -> Scene:
    world.origin.script = always(Answer(fields=FRESH, pieces=[b"a" * 500, b"b" * 500]))
    for expected in (STORED, HIT):
        response = yield world.get()
        assert (1000, expected) == (len(response.content), caching(response))


@scene()
def an_unsafe_method_invalidates_what_is_stored(world: World) -> Scene:
    yield world.get()
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        hit = yield world.get()
        written = yield world.ask(method)
        again = yield world.get()
        assert (caching(hit), caching(written), caching(again)) == (HIT, PASSED, STORED)


@scene()
def a_stale_response_is_validated_over_the_same_connection(world: World) -> Scene:
    fields = {"Cache-Control": "max-age=0", "ETag": '"v1"'}
    world.origin.script = lambda asked: (
        Answer(status=304, fields=fields) if "if-none-match" in asked.fields else Answer(b"body", fields=fields)
    )
    first = yield world.get()
    second = yield world.get()
    third = yield world.get()
    assert [r.content for r in (first, second, third)] == [b"body"] * 3
    assert [caching(r) for r in (first, second, third)] == [STORED, REVALIDATED, REVALIDATED]
    assert len({asked.connection for asked in world.origin.asked}) == 1


@scene(stale_if_error=60)
def a_failing_origin_gives_way_to_a_stale_entry_and_its_connection_is_given_back(world: World) -> Scene:
    stale = {"Cache-Control": "max-age=1", "Age": "5"}
    world.origin.script = in_turn(
        Answer(b"good", fields=stale), Answer(b"down", 503), Answer(raw=b"?\r\n\r\n"), Answer(b"better", fields=FRESH)
    )
    for expected in (b"good", b"good", b"good", b"better"):
        response = yield world.get()
        assert expected == response.content
    assert len(world.calls) == 4


@scene(stale_if_error=60)
def a_stale_answer_says_so(world: World) -> Scene:
    world.origin.script = in_turn(
        Answer(b"good", fields={"Cache-Control": "max-age=1", "Age": "5"}), Answer(b"slow down", 429)
    )
    yield world.get()
    response = yield world.get()
    assert (response.status_code, response.content, caching(response)) == (200, b"good", HIT)
    said = parameters(response)
    assert (said["fwd"], said["fwd-status"]) == ("stale", "429")
    assert int(said["ttl"]) < 0
    assert int(response.headers["age"]) >= 5


@scene()
def cache_status_tells_what_happened(world: World) -> Scene:
    stale = {"Cache-Control": "max-age=0", "ETag": '"v1"'}

    def script(asked: Asked) -> Answer:
        if asked.target != "/stale":
            return Answer(b"body", fields=FRESH)
        return Answer(b"body", 304 if "if-none-match" in asked.fields else 200, stale)

    world.origin.script = script
    missed = parameters((yield world.get()))
    assert (missed["fwd"], missed["stored"]) == ("miss", "")
    hit = parameters((yield world.get()))
    assert (hit["hit"], 55 <= int(hit["ttl"]) <= 60) == ("", True)
    assert parameters((yield world.ask("POST")))["fwd"] == "method"
    assert parameters((yield world.get(headers={"Range": "bytes=0-1"})))["fwd"] == "miss"
    assert parameters((yield world.get(headers={"Cache-Control": "no-cache"})))["fwd"] == "request"
    yield world.get("/stale")
    revalidated = parameters((yield world.get("/stale")))
    assert (revalidated["fwd"], revalidated["fwd-status"]) == ("stale", "304")
    refused = yield world.get("/never", headers={"Cache-Control": "only-if-cached"})
    assert (refused.status_code, parameters(refused)) == (504, {"detail": "only-if-cached"})
    assert caching(refused)[:3] == (False, False, False)


@scene()
def another_cache_s_status_stays_before_ours(world: World) -> Scene:
    world.origin.script = always(Answer(b"body", fields={**FRESH, "Cache-Status": "cdn; hit; ttl=3"}))
    for _ in range(2):
        response = yield world.get()
        assert response.headers.get_list("cache-status")[0] == "cdn; hit; ttl=3"
        assert parameters(response)


@scene()
def a_token_s_answer_is_for_nobody_else(world: World) -> Scene:
    world.origin.script = lambda asked: Answer(
        json.dumps([asked.fields.get(n) for n in ("authorization", "x-api-key", "cookie")]).encode(), fields=FRESH
    )
    callers: list[dict[str, str]] = [
        {"Authorization": "Bearer a"},
        {"Authorization": "Bearer b"},
        {"Authorization": "token a"},
        {"X-Api-Key": "a"},
        {"Cookie": "session=a"},
        {"Authorization": "Bearer a", "Cookie": "session=a"},
        {},
    ]
    for expected in (STORED, HIT):
        for headers in callers:
            response = yield world.get(headers=headers)
            own = [headers.get(name) for name in ("Authorization", "X-Api-Key", "Cookie")]
            assert (own, expected) == (response.json(), caching(response))


@scene()
def a_public_answer_is_for_everybody(world: World) -> Scene:
    world.origin.script = always(Answer(b"body", fields={"Cache-Control": "public, max-age=60"}))
    first = yield world.get(headers={"Authorization": "Bearer a"})
    second = yield world.get(headers={"Authorization": "Bearer b"})
    third = yield world.get()
    assert [caching(r) for r in (first, second, third)] == [STORED, HIT, HIT]


@scene()
def the_query_counts_and_the_fragment_does_not(world: World) -> Scene:
    yield world.get("/thing?page=1#top")
    other = yield world.get("/thing?page=2")
    same = yield world.get("/thing?page=1#bottom")
    assert [caching(other), caching(same)] == [STORED, HIT]


@scene()
def a_store_that_breaks_while_it_is_in_use_costs_hits_and_no_answers(world: World) -> Scene:
    yield world.get()
    (database,) = world.settings.dir.glob("*.db")
    with contextlib.closing(sqlite3.connect(database)) as other:
        other.executescript("DROP TABLE entries")
    read = yield world.get()
    written = yield world.ask("POST")
    again = yield world.get("/else")
    assert [r.status_code for r in (read, written, again)] == [200] * 3


# --- who plays it ---------------------------------------------------------------------------------------------------


def _generator(pieces: Iterable[bytes]) -> Iterator[bytes]:
    yield from pieces


async def _async_generator(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def _perform(client: httpx.Client, ask: Ask) -> httpx.Response | Streamed:
    content = {} if ask.upload is None else {"content": _generator(ask.upload)}
    if ask.read is None:
        return client.request(ask.method, ask.url, **content, **ask.how)
    with client.stream(ask.method, ask.url, **content, **ask.how) as response:
        pieces = []
        if ask.take != 0:
            for piece in getattr(response, ask.read)():
                pieces.append(piece)
                if len(pieces) == ask.take:
                    break
    return Streamed(response, pieces)


async def _async_perform(client: httpx.AsyncClient, ask: Ask) -> httpx.Response | Streamed:
    content = {} if ask.upload is None else {"content": _async_generator(ask.upload)}
    if ask.read is None:
        return await client.request(ask.method, ask.url, **content, **ask.how)
    async with client.stream(ask.method, ask.url, **content, **ask.how) as response:
        pieces = []
        if ask.take != 0:
            async for piece in getattr(response, f"a{ask.read}")():
                pieces.append(piece)
                if len(pieces) == ask.take:
                    break
    return Streamed(response, pieces)


@pytest.fixture
def world(local: Settings) -> Iterator[World]:
    with Scripted() as origin:
        yield World(origin, local)


def with_changes(world: World, changes: dict[str, Any], settings_for: Callable[..., Settings]) -> World:
    return World(world.origin, settings_for(enable_p2p=False, **changes))


_POOL: dict[str, Any] = {"verify": CONTEXT, "limits": httpx.Limits(max_connections=1)}
_TIMEOUT = httpx.Timeout(5, pool=1)


@pytest.mark.parametrize(("play", "changes"), SCENES)
def test_sync(
    play: Callable[[World], Scene], changes: dict[str, Any], world: World, settings_for: Callable[..., Settings]
) -> None:
    world = with_changes(world, changes, settings_for)
    transport = P2PCacheTransport(httpx.HTTPTransport(**_POOL), settings=world.settings)
    with httpx.Client(transport=transport, timeout=_TIMEOUT) as client, contextlib.suppress(StopIteration):
        played = play(world)
        ask = next(played)
        while True:
            try:
                result = _perform(client, ask)
            except Exception as exc:
                ask = played.throw(exc)
            else:
                ask = played.send(result)


@pytest.mark.anyio
@pytest.mark.parametrize(("play", "changes"), SCENES)
# Leaving a response early leaves its generators to the garbage collector, which trio warns of: httpx alone does so too.
@pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")
async def test_async(
    play: Callable[[World], Scene], changes: dict[str, Any], world: World, settings_for: Callable[..., Settings]
) -> None:
    world = with_changes(world, changes, settings_for)
    transport = P2PCacheTransport(httpx.AsyncHTTPTransport(**_POOL), settings=world.settings)
    async with httpx.AsyncClient(transport=transport, timeout=_TIMEOUT) as client:
        played = play(world)
        with contextlib.suppress(StopIteration):
            ask = next(played)
            while True:
                try:
                    result = await _async_perform(client, ask)
                except Exception as exc:
                    ask = played.throw(exc)
                else:
                    ask = played.send(result)


# --- where it is mounted, and what is below it ----------------------------------------------------------------------


def sync_client(settings: Settings, **how: Any) -> httpx.Client:
    transport = P2PCacheTransport(httpx.HTTPTransport(verify=CONTEXT), settings=settings)
    return httpx.Client(transport=transport, **how)


def async_client(settings: Settings, **how: Any) -> httpx.AsyncClient:
    transport = P2PCacheTransport(httpx.AsyncHTTPTransport(verify=CONTEXT), settings=settings)
    return httpx.AsyncClient(transport=transport, **how)


def test_mounted_it_caches_only_what_it_is_mounted_for(world: World) -> None:
    with Scripted() as other:
        cached = P2PCacheTransport(httpx.HTTPTransport(verify=CONTEXT), settings=world.settings)
        with httpx.Client(mounts={world.origin.url: cached}, verify=CONTEXT) as client:
            for _ in range(2):
                assert client.get(world.origin.url + "/thing").content == b"/thing"
                assert "caching" not in client.get(other.url + "/thing").extensions
        assert (len(world.origin.asked), len(other.asked)) == (1, 2)


@pytest.mark.anyio
async def test_mounted_on_an_async_client_it_caches_only_what_it_is_mounted_for(world: World) -> None:
    with Scripted() as other:
        cached = P2PCacheTransport(httpx.AsyncHTTPTransport(verify=CONTEXT), settings=world.settings)
        async with httpx.AsyncClient(mounts={world.origin.url: cached}, verify=CONTEXT) as client:
            for _ in range(2):
                assert (await client.get(world.origin.url + "/thing")).content == b"/thing"
                assert "caching" not in (await client.get(other.url + "/thing")).extensions
        assert (len(world.origin.asked), len(other.asked)) == (1, 2)


def test_a_sync_client_with_an_async_next_transport_is_told_so(world: World) -> None:
    transport = P2PCacheTransport(httpx.AsyncHTTPTransport(verify=CONTEXT), settings=world.settings)
    with httpx.Client(transport=transport) as client, pytest.raises(ConfigurationError, match="AsyncHTTP") as raised:
        client.get(world.origin.url)
    assert isinstance(raised.value, TypeError)


@pytest.mark.anyio
async def test_an_async_client_with_a_sync_next_transport_is_told_so(world: World) -> None:
    transport = P2PCacheTransport(httpx.HTTPTransport(verify=CONTEXT), settings=world.settings)
    async with httpx.AsyncClient(transport=transport) as client:
        with pytest.raises(ConfigurationError, match="HTTPTransport") as raised:
            await client.get(world.origin.url)
    assert isinstance(raised.value, TypeError)


def test_http2_may_be_offered_to_an_origin_that_speaks_http1(world: World) -> None:
    transport = P2PCacheTransport(httpx.HTTPTransport(http2=True, verify=CONTEXT), settings=world.settings)
    with httpx.Client(transport=transport) as client:
        assert [caching(client.get(world.origin.url)) for _ in range(2)] == [STORED, HIT]


def test_an_origin_that_speaks_http2_is_cached(local: Settings) -> None:
    with ScriptedHTTP2() as origin:
        below = httpx.HTTPTransport(http1=False, http2=True, verify=CONTEXT)
        with httpx.Client(transport=P2PCacheTransport(below, settings=local)) as client:
            first, second = client.get(origin.url + "/x"), client.get(origin.url + "/x")
        assert (first.http_version, first.content, caching(first)) == ("HTTP/2", b"/x", STORED)
        assert (second.content, caching(second)) == (b"/x", HIT)
        assert origin.asked == ["/x"]


@pytest.mark.anyio
async def test_an_origin_that_speaks_http2_is_cached_for_an_async_client(local: Settings) -> None:
    with ScriptedHTTP2() as origin:
        below = httpx.AsyncHTTPTransport(http1=False, http2=True, verify=CONTEXT)
        async with httpx.AsyncClient(transport=P2PCacheTransport(below, settings=local)) as client:
            first, second = await client.get(origin.url + "/x"), await client.get(origin.url + "/x")
        assert (first.http_version, first.content, caching(first)) == ("HTTP/2", b"/x", STORED)
        assert (second.content, caching(second)) == (b"/x", HIT)


class Watching:
    """A handler for ``httpx.MockTransport`` that keeps what it was sent and answers 304 to conditions."""

    def __init__(self) -> None:
        self.extensions: list[dict[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.extensions.append(dict(request.extensions))
        status = 304 if "if-none-match" in request.headers else 200
        head = {"Cache-Control": "max-age=0", "ETag": '"v1"'}
        return httpx.Response(status, headers=head, extensions={"reason_phrase": b"Fine", "of-origin": status})


def test_extensions_and_timeouts_pass_through_both_ways(local: Settings) -> None:
    watching = Watching()
    timeout = {"connect": 1.0, "read": 2.0, "write": 3.0, "pool": 4.0}
    transport = P2PCacheTransport(httpx.MockTransport(watching), settings=local)
    with httpx.Client(transport=transport) as client:
        for _ in range(2):  # the second is sent with a condition added
            response = client.get(
                "http://origin.test/", timeout=httpx.Timeout(**timeout), extensions={"sni_hostname": "other.test"}
            )
            assert response.status_code == 200
        first = client.post("http://origin.test/")
    assert [(timeout, "other.test")] * 2 == [(e["timeout"], e["sni_hostname"]) for e in watching.extensions[:2]]
    assert (first.reason_phrase, first.extensions["of-origin"]) == ("Fine", 200)


def test_trace_sees_the_connection_on_a_miss_and_on_a_validation(world: World) -> None:
    fields = {"Cache-Control": "max-age=0", "ETag": '"v1"'}
    world.origin.script = lambda asked: Answer(b"", 304 if "if-none-match" in asked.fields else 200, fields)
    with sync_client(world.settings) as client:
        for _ in range(2):
            events: list[str] = []
            client.get(world.origin.url, extensions={"trace": lambda name, _, events=events: events.append(name)})
            assert "http11.send_request_headers.started" in events


@pytest.mark.anyio
async def test_trace_of_an_async_client_sees_the_connection(world: World) -> None:
    events: list[str] = []

    async def trace(name: str, _: object) -> None:
        events.append(name)

    async with async_client(world.settings) as client:
        await client.get(world.origin.url, extensions={"trace": trace})
    assert "http11.send_request_headers.started" in events


def test_event_hooks_see_hits_and_misses(world: World) -> None:
    seen: list[object] = []
    hooks = {"request": [lambda r: seen.append(r.url.path)], "response": [lambda r: seen.append(caching(r))]}
    with sync_client(world.settings, event_hooks=hooks) as client:
        client.get(world.origin.url + "/a")
        client.get(world.origin.url + "/a")
    assert seen == ["/a", STORED, "/a", HIT]


@pytest.mark.anyio
async def test_async_event_hooks_see_hits_and_misses(world: World) -> None:
    seen: list[object] = []

    async def request(found: httpx.Request) -> None:
        seen.append(found.url.path)

    async def response(found: httpx.Response) -> None:
        seen.append(caching(found))

    async with async_client(world.settings, event_hooks={"request": [request], "response": [response]}) as client:
        await client.get(world.origin.url + "/a")
        await client.get(world.origin.url + "/a")
    assert seen == ["/a", STORED, "/a", HIT]


# --- its own inner transport, and the environment's proxies ----------------------------------------------------------

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
ENVIRONMENTS: dict[str, tuple[dict[str, str], bool]] = {
    "none": ({}, False),
    "HTTP_PROXY": ({"HTTP_PROXY": "http://{proxy}"}, True),
    "http_proxy": ({"http_proxy": "http://{proxy}"}, True),
    "ALL_PROXY": ({"ALL_PROXY": "http://{proxy}"}, True),
    "without a scheme": ({"HTTP_PROXY": "{proxy}"}, True),
    "for another scheme": ({"HTTPS_PROXY": "http://{proxy}"}, False),
    "NO_PROXY with this host": ({"HTTP_PROXY": "http://{proxy}", "NO_PROXY": "example.org,127.0.0.1"}, False),
    "NO_PROXY with this host and port": ({"HTTP_PROXY": "http://{proxy}", "NO_PROXY": "{origin}"}, False),
    "NO_PROXY with this scheme and host": ({"HTTP_PROXY": "http://{proxy}", "NO_PROXY": "http://127.0.0.1"}, False),
    "NO_PROXY with another host": ({"HTTP_PROXY": "http://{proxy}", "NO_PROXY": "example.org"}, True),
    "NO_PROXY with all hosts": ({"HTTP_PROXY": "http://{proxy}", "NO_PROXY": "*"}, False),
    "no_proxy": ({"HTTP_PROXY": "http://{proxy}", "no_proxy": "127.0.0.1"}, False),
}


@pytest.fixture
def proxy(world: World, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Scripted]:
    """A proxy that answers by itself, named to the process as the test's ``environment`` says."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    with Scripted(lambda asked: Answer(f"proxied {asked.target}".encode(), fields=FRESH)) as server:
        for name, value in ENVIRONMENTS[request.param][0].items():
            monkeypatch.setenv(name, value.format(proxy=server.netloc, origin=world.origin.netloc))
        yield server


@pytest.mark.parametrize(
    ("proxy", "proxied"), [(name, proxied) for name, (_, proxied) in ENVIRONMENTS.items()], indirect=["proxy"]
)
def test_its_own_transport_takes_the_environment_s_proxies_as_httpx_does(
    world: World, proxy: Scripted, proxied: bool
) -> None:
    url = world.origin.url + "/thing"
    expected = f"proxied {url}" if proxied else "/thing"
    with httpx.Client(verify=CONTEXT) as plain:
        assert expected == plain.get(url).text
    with httpx.Client(transport=P2PCacheTransport(settings=world.settings)) as client:
        assert [expected, expected] == [client.get(url).text for _ in range(2)]
    assert len(world.origin.asked) + len(proxy.asked) == 2  # one of plain httpx, one of ours


@pytest.mark.anyio
@pytest.mark.parametrize(("proxy", "proxied"), [("none", False), ("HTTP_PROXY", True)], indirect=["proxy"])
async def test_an_async_client_s_own_transport_takes_the_environment_s_proxies(
    world: World, proxy: Scripted, proxied: bool
) -> None:
    url = world.origin.url + "/thing"
    async with httpx.AsyncClient(transport=P2PCacheTransport(settings=world.settings)) as client:
        texts = [(await client.get(url)).text for _ in range(2)]
    assert [f"proxied {url}" if proxied else "/thing"] * 2 == texts
    assert len(world.origin.asked) + len(proxy.asked) == 1


# --- closing and sharing --------------------------------------------------------------------------------------------


class Closing(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Counts how often it was closed."""

    def __init__(self) -> None:
        self.closed = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=b"body", headers=FRESH)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=b"body", headers=FRESH)

    def close(self) -> None:
        self.closed += 1

    async def aclose(self) -> None:
        self.closed += 1


def open_files(directory: Path) -> list[str]:
    """The files below ``directory`` that this process holds open."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(str(descriptor.readlink()))
    return [name for name in found if name.startswith(str(directory))]


linux_only = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="there is no /proc here")


@linux_only
def test_close_is_idempotent_closes_what_is_below_and_leaves_no_file_open(local: Settings) -> None:
    below = Closing()
    transport = P2PCacheTransport(below, settings=local)
    with httpx.Client(transport=transport) as client:
        client.get("http://origin.test/")
        assert open_files(local.dir)
    assert below.closed >= 1
    transport.close()
    transport.close()
    assert open_files(local.dir) == []


@linux_only
@pytest.mark.anyio
async def test_aclose_is_idempotent_closes_what_is_below_and_leaves_no_file_open(local: Settings) -> None:
    below = Closing()
    transport = P2PCacheTransport(below, settings=local)
    async with httpx.AsyncClient(transport=transport) as client:
        await client.get("http://origin.test/")
        assert open_files(local.dir)
    assert below.closed >= 1
    await transport.aclose()
    await transport.aclose()
    assert open_files(local.dir) == []


def test_a_transport_that_was_never_used_can_be_closed(local: Settings) -> None:
    P2PCacheTransport(settings=local).close()


def test_what_is_stored_outlives_the_transport(local: Settings) -> None:
    below = httpx.MockTransport(lambda request: httpx.Response(200, content=b"body", headers=FRESH))
    for expected in (STORED, HIT):
        with httpx.Client(transport=P2PCacheTransport(below, settings=local)) as client:
            response = client.get("http://origin.test/")
            assert (b"body", expected) == (response.content, caching(response))


def test_what_is_stored_outlives_the_transport_to_the_byte(world: World) -> None:
    packed = gzip.compress(b"hello " * 1000, mtime=0)
    fields = [
        ("Cache-Control", "max-age=60"),
        ("Content-Encoding", "gzip"),
        ("X-Odd", "caf\xe9"),
        ("Link", '</a>; rel="next", </b>; rel="last"'),
        ("Set-Cookie", "a=1; Expires=Wed, 01 Jan 2070 00:00:00 GMT; Path=/no"),
        ("Set-Cookie", "b=2; Path=/no"),
        ("X-Empty", ""),
    ]
    world.origin.script = always(Answer(packed, fields=fields))
    seen = []
    for _ in range(2):
        with (
            sync_client(world.settings) as client,
            client.stream("GET", world.origin.url, headers={"Accept-Encoding": "gzip"}) as response,
        ):
            raw = b"".join(response.iter_raw())
            head = [(n.lower(), v) for n, v in response.headers.raw if n.lower() not in (b"age", b"cache-status")]
            seen.append((response.status_code, sorted(head), raw))
    assert seen[0] == seen[1]
    assert len(world.origin.asked) == 1


@linux_only
def test_a_closed_transport_opens_its_store_again_and_can_be_closed_again(local: Settings) -> None:
    below = httpx.MockTransport(lambda request: httpx.Response(200, content=b"body", headers=FRESH))
    transport = P2PCacheTransport(below, settings=local)
    for expected in (STORED, HIT):
        with httpx.Client(transport=transport) as client:
            assert expected == caching(client.get("http://origin.test/"))
        assert open_files(local.dir) == []


def test_two_clients_with_the_same_settings_share_one_store(world: World) -> None:
    with sync_client(world.settings) as one, sync_client(world.settings) as two:
        assert [caching(client.get(world.origin.url)) for client in (one, two)] == [STORED, HIT]
        two.post(world.origin.url)
        assert caching(one.get(world.origin.url)) == STORED


@pytest.mark.anyio
async def test_a_sync_and_an_async_client_share_one_store(world: World) -> None:
    async with async_client(world.settings) as one:
        assert caching(await one.get(world.origin.url)) == STORED
        with sync_client(world.settings) as two:
            assert caching(await anyio.to_thread.run_sync(two.get, world.origin.url)) == HIT
        assert caching(await one.get(world.origin.url)) == HIT


def test_two_stores_on_one_directory_see_each_other_s_entries_and_invalidations(
    world: World, settings_for: Callable[..., Settings]
) -> None:
    other = settings_for(enable_p2p=False, default_ttl=1.0)  # the same directory, but not the same runner
    with sync_client(world.settings) as one, sync_client(other) as two:
        assert [caching(client.get(world.origin.url)) for client in (one, two)] == [STORED, HIT]
        two.post(world.origin.url)
        assert [caching(client.get(world.origin.url)) for client in (one, two)] == [STORED, HIT]


def test_closing_one_transport_twice_does_not_close_another_s_share(local: Settings) -> None:
    below = httpx.MockTransport(lambda request: httpx.Response(200, content=b"body", headers=FRESH))
    twice = P2PCacheTransport(below, settings=local)
    with httpx.Client(transport=P2PCacheTransport(below, settings=local)) as stays:
        with httpx.Client(mounts={"http://a.test": twice, "http://b.test": twice}):
            pass  # a client closes each of its mounts
        later = P2PCacheTransport(below, settings=local)
        with httpx.Client(transport=later):
            stays.get("http://origin.test/")
            assert later.stats()["requests"] == 1


# --- many at once ---------------------------------------------------------------------------------------------------


class Arrivals:
    """Counts requests as they are handed to the client; an event hook."""

    def __init__(self) -> None:
        self._count = 0
        self._changed = threading.Condition()

    def __call__(self, request: httpx.Request) -> None:
        with self._changed:
            self._count += 1
            self._changed.notify_all()

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._count >= count, PROMPT)


def test_fifty_threads_that_ask_one_cold_url_make_one_call(world: World) -> None:
    gate, arrivals = threading.Event(), Arrivals()
    world.origin.script = always(Answer(b"body", fields=FRESH, before=gate))
    with (
        sync_client(world.settings, event_hooks={"request": [arrivals]}) as client,
        ThreadPoolExecutor(50) as pool,
    ):
        asked = [pool.submit(client.get, world.origin.url) for _ in range(50)]
        arrivals.wait_for(50)
        gate.set()
        responses = [one.result(PROMPT) for one in asked]
    assert [r.content for r in responses] == [b"body"] * 50
    assert len(world.origin.asked) == 1
    assert sorted(caching(r)[0] for r in responses) == [False] + [True] * 49
    assert all(parameters(r) for r in responses)


@pytest.mark.anyio
async def test_fifty_tasks_that_ask_one_cold_url_make_one_call(world: World) -> None:
    gate = threading.Event()
    world.origin.script = always(Answer(b"body", fields=FRESH, before=gate))
    responses: list[httpx.Response] = []

    async def ask() -> None:
        responses.append(await client.get(world.origin.url))

    async with async_client(world.settings) as client:
        with anyio.fail_after(PROMPT):
            async with anyio.create_task_group() as tasks:
                for _ in range(50):
                    tasks.start_soon(ask)
                await anyio.to_thread.run_sync(world.origin.wait_for, 1)
                await anyio.wait_all_tasks_blocked()
                gate.set()
    assert [r.content for r in responses] == [b"body"] * 50
    assert len(world.origin.asked) == 1
    assert all(parameters(r) for r in responses)


GOOD = Answer(b"good", fields=FRESH)
# How the first who asks ends, and how many calls the origin sees at most when eight more wait for it.
ENDS: dict[str, tuple[Callable[[threading.Event], Answer], dict[str, Any], int]] = {
    "gets a protocol error": (lambda gate: Answer(raw=b"?\r\n\r\n", before=gate), {}, 2),
    "gets half a body": (lambda gate: Answer(b"0123456789", fields=FRESH, cut=4, before=gate), {}, 2),
    "gets an error": (lambda gate: Answer(b"down", 500, before=gate), {}, 2),
    "may not store": (lambda gate: Answer(b"secret", fields={"Cache-Control": "no-store"}, before=gate), {}, 9),
    "times out": (lambda gate: Answer(b"late", before=gate), {"timeout": 0.5}, 2),
}


@pytest.mark.parametrize("end", ENDS)
def test_when_the_first_thread_fails_the_others_are_answered(world: World, end: str) -> None:
    (answer, how, calls), gate, arrivals = ENDS[end], threading.Event(), Arrivals()
    first = answer(gate)
    world.origin.script = lambda asked: first if "x-first" in asked.fields else GOOD
    with (
        sync_client(world.settings, event_hooks={"request": [arrivals]}) as client,
        ThreadPoolExecutor(9) as pool,
    ):
        leading = pool.submit(client.get, world.origin.url, headers={"X-First": "1"}, **how)
        world.origin.wait_for(1)
        asked = [pool.submit(client.get, world.origin.url) for _ in range(8)]
        arrivals.wait_for(9)
        if end != "times out":
            gate.set()
        responses = [one.result(PROMPT) for one in asked]
        gate.set()
        assert (leading.exception(PROMPT) is not None) == (end in {*ENDS} - {"gets an error", "may not store"})
    assert [r.content for r in responses] == [b"good"] * 8
    assert len(world.origin.asked) <= calls


def test_when_the_first_thread_closes_early_the_others_are_answered(world: World) -> None:
    gate, arrivals = threading.Event(), Arrivals()
    half = Answer(fields=FRESH, pieces=[b"half", b"rest"], gate=gate)
    world.origin.script = lambda asked: half if "x-first" in asked.fields else GOOD
    with (
        sync_client(world.settings, event_hooks={"request": [arrivals]}) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        with client.stream("GET", world.origin.url, headers={"X-First": "1"}) as leading:
            assert next(leading.iter_bytes()) == b"half"
            asked = [pool.submit(client.get, world.origin.url) for _ in range(8)]
            arrivals.wait_for(9)
        responses = [one.result(PROMPT) for one in asked]
        gate.set()
    assert [r.content for r in responses] == [b"good"] * 8
    assert len(world.origin.asked) == 2


@pytest.mark.anyio
@pytest.mark.parametrize("end", [*ENDS, "is cancelled", "is cancelled in the body", "closes early"])
@pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")  # as above
async def test_when_the_first_task_fails_the_others_are_answered(world: World, end: str) -> None:
    gate, calls, how = threading.Event(), 2, {}
    leaving, closing = anyio.CancelScope(), anyio.Event()
    if end in ENDS:
        answer, how, calls = ENDS[end]
        first = answer(gate)
    elif end == "is cancelled":
        first = Answer(before=gate)
    else:
        first = Answer(fields=FRESH, pieces=[b"half", b"rest"], gate=gate)
    world.origin.script = lambda asked: first if "x-first" in asked.fields else GOOD
    responses: list[httpx.Response] = []

    async def lead() -> None:
        with leaving, contextlib.suppress(httpx.TransportError):
            async with client.stream("GET", world.origin.url, headers={"X-First": "1"}, **how) as response:
                if end == "closes early":
                    await closing.wait()
                else:
                    await response.aread()

    async def ask() -> None:
        responses.append(await client.get(world.origin.url))

    async with async_client(world.settings) as client, anyio.create_task_group() as tasks:
        tasks.start_soon(lead)
        await anyio.to_thread.run_sync(world.origin.wait_for, 1)
        with anyio.fail_after(PROMPT):
            async with anyio.create_task_group() as others:
                for _ in range(8):
                    others.start_soon(ask)
                await anyio.wait_all_tasks_blocked()
                if "cancelled" in end:
                    leaving.cancel()
                elif end == "closes early":
                    closing.set()
                elif end != "times out":
                    gate.set()
        gate.set()
    assert [r.content for r in responses] == [b"good"] * 8
    assert len(world.origin.asked) <= calls


@pytest.mark.anyio
async def test_when_the_first_tasks_are_cancelled_together_the_last_is_answered(local: Settings) -> None:
    """The claim may be handed to one who is being cancelled in the same tick: it must not be lost there."""
    asked: dict[str, int] = {}

    async def handle(request: httpx.Request) -> httpx.Response:
        asked[request.url.path] = asked.get(request.url.path, 0) + 1
        if "x-doomed" in request.headers:
            await anyio.sleep_forever()
        return httpx.Response(200, content=b"good", headers=FRESH)

    async def ask(path: str, headers: dict[str, str]) -> None:
        response = await client.get("http://origin.test" + path, headers=headers)
        if not headers:
            answers.append(response.content)

    answers: list[bytes] = []
    async with httpx.AsyncClient(transport=P2PCacheTransport(httpx.MockTransport(handle), settings=local)) as client:
        for path in (f"/{number}" for number in range(8)):
            with anyio.fail_after(PROMPT):
                async with anyio.create_task_group() as survivors, anyio.create_task_group() as doomed:
                    doomed.start_soon(ask, path, {"X-Doomed": "1"})
                    while path not in asked:
                        await anyio.lowlevel.checkpoint()
                    for _ in range(4):
                        doomed.start_soon(ask, path, {"X-Doomed": "1"})
                    await anyio.wait_all_tasks_blocked()
                    survivors.start_soon(ask, path, {})
                    await anyio.wait_all_tasks_blocked()
                    doomed.cancel_scope.cancel()
    assert answers == [b"good"] * 8


def test_waiting_for_another_s_fetch_does_not_outlast_the_caller_s_own_timeout(
    world: World, settings_for: Callable[..., Settings]
) -> None:
    gate = threading.Event()
    world.origin.script = lambda asked: Answer(b"late", before=gate) if "x-first" in asked.fields else GOOD
    with (
        sync_client(settings_for(enable_p2p=False, claim_timeout=3.0)) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        leading = pool.submit(client.get, world.origin.url, headers={"X-First": "1"}, timeout=None)
        world.origin.wait_for(1)
        began = time.monotonic()
        with contextlib.suppress(httpx.TimeoutException):
            client.get(world.origin.url, timeout=0.2)
        took = time.monotonic() - began
        gate.set()
        leading.result(PROMPT)
    assert took < 1.5


@pytest.mark.parametrize("answer", [Answer(b"old", fields=FRESH), Answer(status=304, fields=FRESH)], ids=["200", "304"])
def test_what_was_under_way_during_a_write_is_not_served_after_it(world: World, answer: Answer) -> None:
    """The origin was asked before the write, and answers after it."""
    gate, arrivals = threading.Event(), Arrivals()
    held = Answer(answer.body, answer.status, answer.fields, before=gate)
    world.origin.script = in_turn(
        Answer(b"old", fields={"Cache-Control": "max-age=0", "ETag": '"v1"'}),
        held,
        Answer(b"written"),
        Answer(b"new", fields=FRESH),
    )
    with (
        sync_client(world.settings, event_hooks={"request": [arrivals]}) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        client.get(world.origin.url)
        reading = pool.submit(client.get, world.origin.url)
        world.origin.wait_for(2)
        client.put(world.origin.url)
        gate.set()
        assert reading.result(PROMPT).content == b"old"
        assert client.get(world.origin.url).content == b"new"


def test_stale_while_revalidate_answers_at_once_and_asks_the_origin_meanwhile(world: World) -> None:
    gate = threading.Event()
    world.origin.script = in_turn(
        Answer(b"old", fields={"Cache-Control": "max-age=10, stale-while-revalidate=600", "Age": "100"}),
        Answer(b"new", fields=FRESH, before=gate),
    )
    with sync_client(world.settings) as client:
        client.get(world.origin.url)
        assert client.get(world.origin.url).content == b"old"
        world.origin.wait_for(2)
        gate.set()
    with sync_client(world.settings) as client:
        response = client.get(world.origin.url)
        assert (response.content, caching(response)) == (b"new", HIT)
    assert len(world.origin.asked) == 2


class Stoppable(httpx.AsyncByteStream):
    """An empty body that knows whether it was closed."""

    closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        return
        yield b""

    async def aclose(self) -> None:
        self.closed = True


@pytest.mark.anyio
async def test_a_write_that_is_cancelled_as_its_answer_arrives_invalidates_and_frees_its_connection(
    local: Settings,
) -> None:
    """The origin has written: what is stored is out of date, whether the caller still wants to know or not."""
    streams: list[Stoppable] = []
    bodies = iter([b"old", b"new"])

    async def handle(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, content=next(bodies), headers=FRESH)
        streams.append(Stoppable())
        leaving.cancel()
        return httpx.Response(200, stream=streams[0])

    async with httpx.AsyncClient(transport=P2PCacheTransport(httpx.MockTransport(handle), settings=local)) as client:
        assert (await client.get("http://origin.test/")).content == b"old"
        with anyio.CancelScope() as leaving:
            await client.put("http://origin.test/")
        assert [stream.closed for stream in streams] == [True]
        assert (await client.get("http://origin.test/")).content == b"new"


# --- secrets, logs --------------------------------------------------------------------------------------------------


def test_no_token_is_in_a_file_a_log_line_or_a_repr(
    world: World, settings_for: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_for(
        enable_p2p=False, shared_secret=TOKEN + "-fleet", previous_secret=TOKEN + "-old", stale_if_error=60
    )
    varying = {"Vary": "Authorization, Cookie, X-Api-Key, X-GitHub-OTP, X-Custom-Token", "ETag": '"v1"'}

    def script(asked: Asked) -> Answer:
        if asked.target == "/down" and "if-none-match" in asked.fields:
            return Answer(b"down", 503)
        return Answer(b"body", fields={**varying, "Cache-Control": "max-age=60" if asked.target != "/down" else ""})

    world.origin.script = script
    caplog.set_level(logging.DEBUG, logger="httpx_p2pcache")
    host = world.origin.netloc
    with sync_client(settings) as client:
        for headers in (
            {"Authorization": f"Bearer {TOKEN}"},
            {"Authorization": f"token {TOKEN}"},
            {"Cookie": f"session={TOKEN}"},
            {"X-Api-Key": TOKEN},
            {"X-GitHub-OTP": TOKEN},
            {"X-Custom-Token": TOKEN},
            {"Proxy-Authorization": f"Basic {TOKEN}"},
        ):
            for path in ("/thing", "/thing", "/down", "/down"):
                assert client.get(f"http://{host}{path}", headers=headers).status_code == 200
            client.put(f"http://{host}/thing", headers=headers)
        client.get(f"http://me:{TOKEN}@{host}/userinfo")
        client.get(f"http://{host}/basic", auth=(TOKEN, "x-oauth-basic"))
        for name in ("access_token", "client_secret", "private_token", "api_key", "X-Amz-Signature"):
            client.get(f"http://{host}/query?page=1&{name}={TOKEN}")
        open_now = _files(settings.dir)
        texts = [repr(client._transport), repr(settings), str(settings), repr(vars(client._transport))]
    texts += [record.getMessage() + (record.exc_text or "") for record in caplog.records]
    basic = httpx.BasicAuth(TOKEN, "x-oauth-basic")._auth_header.split()[1]
    userinfo = httpx.BasicAuth("me", TOKEN)._auth_header.split()[1]
    assert any(b"body" in content for content in open_now.values())  # it is where we look
    for found in (open_now, _files(settings.dir)):
        for secret in (TOKEN, basic, userinfo):
            assert [name for name, content in found.items() if secret.encode() in content] == []
    for secret in (TOKEN, basic, userinfo):
        assert [text for text in texts if secret in text] == []


@pytest.mark.parametrize("parameter", ["access_token", "token", "refresh_token", "id_token", "auth", "key", "jwt"])
def test_no_token_of_a_query_is_in_a_file(local: Settings, parameter: str) -> None:
    below = httpx.MockTransport(lambda request: httpx.Response(200, content=b"body", headers=FRESH))
    with httpx.Client(transport=P2PCacheTransport(below, settings=local)) as client:
        client.get(f"http://origin.test/?page=1&{parameter}={TOKEN}")
        files = _files(local.dir)
    assert [name for name, content in files.items() if TOKEN.encode() in content] == []


def _files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"enable_p2p": True}, "CACHE_SHARED_SECRET"),
        ({"shared_secret": "hunter2"}, "CACHE_SHARED_SECRET can be guessed"),
        ({"shared_secret": "9f86d081884c7d65", "previous_secret": "hunter2"}, "CACHE_PREVIOUS_SECRET can be guessed"),
    ],
    ids=["no secret", "a weak secret", "a weak previous secret"],
)
def test_a_local_cache_says_once_what_is_off_and_what_to_set(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], named: str
) -> None:
    below = httpx.MockTransport(lambda request: httpx.Response(200, content=b"body", headers=FRESH))
    settings = Settings(dir=tmp_path / "cache", **changes)
    for expected in (STORED, HIT):
        with httpx.Client(transport=P2PCacheTransport(below, settings=settings)) as client:
            assert expected == caching(client.get("http://origin.test/"))
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 1
    assert "off" in said[0]
    assert named in said[0]


def test_the_stand_in_origin_sees_each_token_once_and_its_304_costs_nothing(origin: Origin, local: Settings) -> None:
    resource = origin.resources["/repos/octo-org/repo-1"]
    url = f"{origin.url}/repos/octo-org/repo-1"
    with sync_client(local) as client:
        for token in ("token a", "token b"):
            first = client.get(url, headers={"Authorization": token})
            again = client.get(url, headers={"Authorization": token})
            checked = client.get(url, headers={"Authorization": token, "Cache-Control": "no-cache"})
            assert [resource.body] * 3 == [r.content for r in (first, again, checked)]
            assert [caching(r) for r in (first, again, checked)] == [STORED, HIT, REVALIDATED]
    assert origin.counted() == 2


# --- fork -----------------------------------------------------------------------------------------------------------


def _in_child(answer: Callable[[], object]) -> object:
    """What ``answer`` returns in a forked child, by way of JSON; as text the child's own error, or that it hung."""
    readable, writable = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads here: that is the point
        child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(PROMPT))  # ends a child that hangs, whatever it hangs in
        try:
            said = json.dumps(answer())
        except BaseException as exc:
            said = json.dumps(repr(exc))
        os.write(writable, said.encode())
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return json.loads(said) if said else "the child hung"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_after_a_fork_child_and_parent_can_both_go_on(world: World) -> None:
    with httpx.Client(transport=P2PCacheTransport(settings=world.settings), timeout=2) as client:

        def ask(*paths: str) -> list[object]:
            responses = [client.get(world.origin.url + path) for path in paths]
            return [[r.text, caching(r)[0]] for r in responses]

        ask("/before")
        assert _in_child(lambda: ask("/before", "/child", "/child")) == [
            ["/before", True],
            ["/child", False],
            ["/child", True],
        ]
        assert ask("/before", "/child", "/parent") == [["/before", True], ["/child", True], ["/parent", False]]
        assert _in_child(lambda: ask("/parent")) == [["/parent", True]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_after_a_fork_the_child_does_not_use_the_parent_s_connections(world: World) -> None:
    """On a connection that both use, each may read the other's answer, and would store it."""
    with httpx.Client(transport=P2PCacheTransport(settings=world.settings), timeout=2) as client:
        client.get(world.origin.url + "/before")
        assert _in_child(lambda: client.get(world.origin.url + "/child").text) == "/child"
        client.get(world.origin.url + "/parent")
    used = {asked.target: asked.connection for asked in world.origin.asked}
    assert used["/before"] == used["/parent"]
    assert used["/before"] != used["/child"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_while_other_threads_ask_leaves_the_child_no_lock_that_nobody_frees(world: World) -> None:
    stop = threading.Event()

    def keep_asking(client: httpx.Client, number: int) -> None:
        count = 0
        while not stop.is_set():
            client.get(f"{world.origin.url}/{number}/{count % 50}")
            count += 1

    with (
        sync_client(world.settings, timeout=2) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        busy = [pool.submit(keep_asking, client, number) for number in range(4)]
        try:
            world.origin.wait_for(20)
            # A new client, as a child should: httpx's own pool is not made to be forked while it is in use.
            answers = [
                _in_child(lambda: sync_client(world.settings, timeout=2).get(world.origin.url + "/0/1").text)
                for _ in range(5)
            ]
        finally:
            stop.set()
        for one in busy:
            one.result(PROMPT)
    assert answers == ["/0/1"] * 5


def test_an_ssl_context_that_could_not_be_loaded_is_loaded_again(
    origin: Origin, local: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where descriptors are missing for a moment."""
    real, failing = httpx.create_ssl_context, [OSError(24, "Too many open files")]

    def load() -> Any:
        if failing:
            raise failing.pop()
        return real()

    monkeypatch.setattr(httpx, "create_ssl_context", load)
    url = f"{origin.url}/repos/octo-org/repo-1"
    with httpx.Client(transport=P2PCacheTransport(settings=local)) as client:
        with pytest.raises(OSError, match="Too many open files"):
            client.get(url)
        assert client.get(url).content == origin.resources["/repos/octo-org/repo-1"].body


def test_a_304_to_the_callers_own_condition_counts_as_no_call(local: Settings, origin: Origin) -> None:
    target = next(iter(origin.resources))
    tag = httpx.get(origin.url + target, headers={"Authorization": "Bearer one"}).headers["etag"]
    fields = {"Authorization": "Bearer one", "If-None-Match": tag, "Cache-Control": "no-store"}
    transport = P2PCacheTransport(settings=local)
    with httpx.Client(transport=transport) as client:
        assert [client.get(origin.url + target, headers=fields).status_code for _ in range(3)] == [304] * 3
        stats = transport.stats()
    assert (stats["origin_calls"], stats["not_modified"], stats["api_calls_made"]) == (3, 3, 0)


def test_settings_that_are_none_are_named(local: Settings) -> None:
    with pytest.raises(ConfigurationError, match="not dict"):
        P2PCacheTransport(settings={})  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="settings="):
        P2PCacheTransport(local)  # type: ignore[arg-type]


def test_who_has_turned_sharing_off_is_not_told_to_turn_it_on(
    local: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    P2PCacheTransport(settings=local).close()
    assert caplog.records == []
