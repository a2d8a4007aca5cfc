"""What holds for httpx holds for httpx2: the same transport, for its clients, on asyncio and on trio; and no httpx.

Most behaviours are scenes, as in test_transport.py: generators that yield what to ask, are sent the response or thrown
the error, and assert. One table of them is played by ``httpx2.Client`` and by ``httpx2.AsyncClient``.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import pytest
from scripted import Answer, Asked, Scripted
from waiting import eventually

import httpx_p2pcache
from httpx_p2pcache import ConfigurationError, Settings
from httpx_p2pcache.testing import Origin, made_up

pytest.importorskip("httpx2")

import httpx2

from httpx_p2pcache.integrations.httpx2 import P2PCacheTransport

CONTEXT = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # never used: every origin here is plain, and loading one takes long
FRESH = {"Cache-Control": "max-age=60"}
STALE = {"Cache-Control": "max-age=0", "ETag": '"v1"'}
PROMPT = 5.0  # seconds: half of what a claim lives, so that whoever waits for its end is noticed
TOKEN = "ghp_0123456789abcdefghijABCDEFGHIJ012345"

HIT = (True, False, False, "local")
STORED = (False, False, True, "origin")
PASSED = (False, False, False, "origin")
REVALIDATED = (True, True, False, "origin")


def caching(response: Any) -> tuple[bool, bool, bool, str]:
    """``extensions["caching"]`` as (from_cache, revalidated, stored, source)."""
    found = response.extensions["caching"]
    assert response.headers.get_list("cache-status")[-1].startswith("p2pcache; ")
    return found["from_cache"], found["revalidated"], found["stored"], found["source"]


@dataclass(frozen=True)
class Ask:
    """A request. ``read``: the response is streamed by that method, up to ``take`` pieces; then it is closed."""

    method: str
    path: str = "/thing"
    how: dict[str, Any] = field(default_factory=dict)
    read: str | None = None
    take: int | None = None


def get(path: str = "/thing", **how: Any) -> Ask:
    return Ask("GET", path, how)


Scene = Generator[Ask, Any, None]
SCENES: list[Any] = []


def scene(**settings: Any) -> Callable[[Callable[[Scripted], Scene]], Callable[[Scripted], Scene]]:
    """Adds a scene to the table; ``settings`` differ from those of ``local``."""

    def add(play: Callable[[Scripted], Scene]) -> Callable[[Scripted], Scene]:
        SCENES.append(pytest.param(play, settings, id=play.__name__))
        return play

    return add


def in_turn(*answers: Answer) -> Callable[[Asked], Answer]:
    left = iter(answers)
    return lambda asked: next(left)


@scene()
def a_repeated_request_is_answered_from_the_store(origin: Scripted) -> Scene:
    first = yield get()
    second = yield get()
    assert isinstance(first, httpx2.Response)
    assert isinstance(second, httpx2.Response)
    assert (first.content, caching(first)) == (b"/thing", STORED)
    assert (second.content, caching(second)) == (b"/thing", HIT)
    assert len(origin.asked) == 1


@scene()
def a_hit_has_the_bytes_and_the_fields_of_the_miss(origin: Scripted) -> Scene:
    packed = gzip.compress(b"hello " * 1000, mtime=0)
    fields = [*FRESH.items(), ("Content-Encoding", "gzip"), ("X-Odd", "caf\xe9"), ("X-Many", "1"), ("X-Many", "2")]
    origin.script = lambda asked: Answer(packed, fields=fields)
    responses = []
    for _ in range(2):
        responses.append((yield get()))
    assert [response.content for response in responses] == [b"hello " * 1000] * 2
    kept = [
        sorted((n.lower(), v) for n, v in response.headers.raw if n.lower() not in (b"age", b"cache-status"))
        for response in responses
    ]
    assert kept[0] == kept[1]
    assert [caching(response) for response in responses] == [STORED, HIT]


@scene()
def every_way_to_read_gives_the_same_on_a_hit_as_on_a_miss(origin: Scripted) -> Scene:
    origin.script = lambda asked: Answer(fields=FRESH, pieces=[b"one\ntw", b"o\nthree\n", b"end"])
    for read, joined in (
        ("iter_bytes", b"one\ntwo\nthree\nend"),
        ("iter_raw", b"one\ntwo\nthree\nend"),
        ("iter_text", "one\ntwo\nthree\nend"),
        ("iter_lines", "onetwothreeend"),
    ):
        for expected in (STORED, HIT):
            response, pieces = yield Ask("GET", f"/{read}", read=read)
            assert joined == type(joined)().join(pieces)
            assert expected == caching(response)


@scene()
def a_response_that_is_closed_early_is_not_stored_and_does_not_block_the_next(origin: Scripted) -> Scene:
    gate = threading.Event()
    origin.script = in_turn(Answer(fields=FRESH, pieces=[b"half", b"rest"], gate=gate), Answer(b"whole", fields=FRESH))
    _, pieces = yield Ask("GET", read="iter_bytes", take=1)
    second = yield get()
    third = yield get()
    gate.set()
    assert pieces == [b"half"]
    assert [(r.content, caching(r)) for r in (second, third)] == [(b"whole", STORED), (b"whole", HIT)]


@scene()
def a_stale_response_is_validated_over_the_same_connection(origin: Scripted) -> Scene:
    origin.script = lambda asked: Answer(b"body", 304 if "if-none-match" in asked.fields else 200, STALE)
    responses = []
    for _ in range(3):
        responses.append((yield get()))
    assert [response.content for response in responses] == [b"body"] * 3
    assert [caching(response) for response in responses] == [STORED, REVALIDATED, REVALIDATED]
    assert len({asked.connection for asked in origin.asked}) == 1


@scene()
def an_unsafe_method_invalidates_what_is_stored(origin: Scripted) -> Scene:
    yield get()
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        hit = yield get()
        written = yield Ask(method, how={"content": b"new"})
        again = yield get()
        assert [caching(response) for response in (hit, written, again)] == [HIT, PASSED, STORED]
    assert [asked.body for asked in origin.asked if asked.method != "GET"] == [b"new"] * 4


@scene()
def a_get_with_content_is_not_answered_with_the_answer_to_other_content(origin: Scripted) -> Scene:
    origin.script = lambda asked: Answer(b"found " + asked.body, fields=FRESH)
    apples = yield get("/search", json={"q": "apples"})
    pears = yield get("/search", json={"q": "pears"})
    assert [apples.content, pears.content] == [b'found {"q":"apples"}', b'found {"q":"pears"}']


@scene()
def head_has_the_fields_without_the_body_on_a_miss_and_on_a_hit(origin: Scripted) -> Scene:
    origin.script = lambda asked: Answer(b"body", fields=FRESH)
    for expected in (STORED, HIT):
        response = yield Ask("HEAD")
        assert (b"", "4", expected) == (response.content, response.headers["content-length"], caching(response))


@scene()
def redirects_are_followed_and_each_hop_is_stored(origin: Scripted) -> Scene:
    origin.script = lambda asked: (
        Answer(status=301, fields={**FRESH, "Location": "/there"})
        if asked.target == "/here"
        else Answer(b"arrived", fields=FRESH)
    )
    for expected in (STORED, HIT):
        response = yield get("/here", follow_redirects=True)
        assert (response.content, response.url.path) == (b"arrived", "/there")
        assert [expected] * 2 == [caching(response), caching(response.history[0])]


@scene()
def cookies_are_kept_by_the_client_and_sent(origin: Scripted) -> Scene:
    origin.script = lambda asked: Answer(asked.fields.get("cookie", "none").encode(), fields={"Set-Cookie": "a=1"})
    first = yield get("/login")
    second = yield get("/login")
    assert [first.content, second.content] == [b"none", b"a=1"]


@scene()
def basic_auth_reaches_the_origin_and_has_a_store_of_its_own(origin: Scripted) -> Scene:
    origin.script = lambda asked: Answer(asked.fields.get("authorization", "none").encode(), fields=FRESH)
    mine = yield get(auth=("me", "pw"))
    again = yield get(auth=("me", "pw"))
    other = yield get()
    assert [response.content for response in (mine, again, other)] == [b"Basic bWU6cHc="] * 2 + [b"none"]
    assert [caching(response) for response in (mine, again, other)] == [STORED, HIT, STORED]


@scene()
def a_read_timeout_is_httpx2_s_own_and_the_next_request_works(origin: Scripted) -> Scene:
    gate = threading.Event()
    origin.script = in_turn(Answer(b"late", before=gate), Answer(b"on time", fields=FRESH))
    with pytest.raises(httpx2.ReadTimeout) as raised:
        yield get(timeout=httpx2.Timeout(5, read=0.1))
    gate.set()
    assert str(raised.value.request.url) == origin.url + "/thing"
    response = yield get()
    assert response.content == b"on time"


@scene()
def a_protocol_error_is_httpx2_s_own(origin: Scripted) -> Scene:
    origin.script = lambda asked: Answer(raw=b"not HTTP at all\r\n\r\n")
    with pytest.raises(httpx2.RemoteProtocolError) as raised:
        yield get()
    assert str(raised.value.request.url) == origin.url + "/thing"


@scene()
def a_body_that_breaks_off_is_httpx2_s_own_error_and_is_not_stored(origin: Scripted) -> Scene:
    origin.script = in_turn(Answer(b"0123456789", fields=FRESH, cut=4), Answer(b"whole", fields=FRESH))
    with pytest.raises(httpx2.RemoteProtocolError):
        yield get()
    response = yield get()
    assert (response.content, caching(response)) == (b"whole", STORED)


@scene()
def a_connect_error_is_httpx2_s_own(origin: Scripted) -> Scene:
    with Scripted() as gone:
        closed = gone.url
    with pytest.raises(httpx2.ConnectError) as raised:
        yield get(closed + "/x")
    assert str(raised.value.request.url) == closed + "/x"


@scene()
def an_unsupported_scheme_is_httpx2_s_own_error(origin: Scripted) -> Scene:
    with pytest.raises(httpx2.UnsupportedProtocol):
        yield get("ftp://127.0.0.1/x")


@scene()
def a_status_that_is_raised_is_httpx2_s_own_error(origin: Scripted) -> Scene:
    origin.script = lambda asked: Answer(b"gone", 404, FRESH)
    for expected in (STORED, HIT):
        response = yield get()
        with pytest.raises(httpx2.HTTPStatusError):
            response.raise_for_status()
        assert expected == caching(response)


@scene(stale_if_error=60)
def a_failing_origin_gives_way_to_a_stale_entry(origin: Scripted) -> Scene:
    stale = {"Cache-Control": "max-age=1", "Age": "5"}
    origin.script = in_turn(
        Answer(b"good", fields=stale), Answer(b"down", 503), Answer(raw=b"?\r\n\r\n"), Answer(b"better", fields=FRESH)
    )
    for expected in (b"good", b"good", b"good", b"better"):
        response = yield get()
        assert expected == response.content


@scene(max_body_size=1000)
def a_body_above_the_limit_streams_through_unstored(origin: Scripted) -> Scene:
    origin.script = lambda asked: Answer(b"a" * 5000, fields=FRESH)
    for _ in range(2):
        response = yield get()
        assert (len(response.content), caching(response)) == (5000, PASSED)


@scene()
def a_part_of_what_is_held_is_served_from_it(origin: Scripted) -> Scene:
    origin.script = lambda asked: Answer(b"0123456789", fields={**FRESH, "ETag": '"v1"'})
    yield get()
    part = yield get(headers={"Range": "bytes=2-4"})
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, b"234", "bytes 2-4/10")


@scene()
def what_only_the_cache_may_answer_and_cannot_is_a_504(origin: Scripted) -> Scene:
    response = yield get(headers={"Cache-Control": "only-if-cached"})
    assert (response.status_code, response.content) == (504, b"")
    assert origin.asked == []


@scene()
def elapsed_is_measured_on_a_miss_and_on_a_hit(origin: Scripted) -> Scene:
    for _ in range(2):
        response = yield get()
        assert 0 < response.elapsed.total_seconds() < PROMPT


@scene()
def a_token_s_answer_is_for_nobody_else(origin: Scripted) -> Scene:
    origin.script = lambda asked: Answer(json.dumps(asked.fields.get("authorization")).encode(), fields=FRESH)
    for expected in (STORED, HIT):
        for token in ("Bearer a", "Bearer b", None):
            response = yield get(headers={"Authorization": token} if token else {})
            assert (token, expected) == (response.json(), caching(response))


@scene()
def another_cache_s_status_stays_before_ours(origin: Scripted) -> Scene:
    origin.script = lambda asked: Answer(b"body", fields={**FRESH, "Cache-Status": "cdn; hit; ttl=3"})
    for expected in (STORED, HIT):
        response = yield get()
        assert response.headers.get_list("cache-status")[0] == "cdn; hit; ttl=3"
        assert expected == caching(response)


@pytest.fixture
def origin() -> Iterator[Scripted]:
    with Scripted() as server:
        yield server


def perform(client: httpx2.Client, ask: Ask) -> Any:
    if ask.read is None:
        return client.request(ask.method, ask.path, **ask.how)
    pieces = []
    with client.stream(ask.method, ask.path, **ask.how) as response:
        for piece in getattr(response, ask.read)():
            pieces.append(piece)
            if len(pieces) == ask.take:
                break
    return response, pieces


async def async_perform(client: httpx2.AsyncClient, ask: Ask) -> Any:
    if ask.read is None:
        return await client.request(ask.method, ask.path, **ask.how)
    pieces = []
    async with client.stream(ask.method, ask.path, **ask.how) as response:
        async for piece in getattr(response, f"a{ask.read}")():
            pieces.append(piece)
            if len(pieces) == ask.take:
                break
    return response, pieces


_POOL: dict[str, Any] = {"verify": CONTEXT, "limits": httpx2.Limits(max_connections=1)}
_TIMEOUT = httpx2.Timeout(5, pool=1)
Play = Callable[[Scripted], Scene]


@pytest.mark.parametrize(("play", "changes"), SCENES)
def test_sync(play: Play, changes: dict[str, Any], origin: Scripted, settings_for: Callable[..., Settings]) -> None:
    settings = settings_for(enable_p2p=False, **changes)
    transport = P2PCacheTransport(httpx2.HTTPTransport(**_POOL), settings=settings)
    with httpx2.Client(transport=transport, timeout=_TIMEOUT, base_url=origin.url) as client:
        played = play(origin)
        with contextlib.suppress(StopIteration):
            ask = next(played)
            while True:
                try:
                    result = perform(client, ask)
                except Exception as exc:
                    ask = played.throw(exc)
                else:
                    ask = played.send(result)


@pytest.mark.anyio
@pytest.mark.parametrize(("play", "changes"), SCENES)
# Leaving a response early leaves its generators to the garbage collector, which trio warns of: so it does of httpx2's.
@pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")
async def test_async(
    play: Play, changes: dict[str, Any], origin: Scripted, settings_for: Callable[..., Settings]
) -> None:
    settings = settings_for(enable_p2p=False, **changes)
    transport = P2PCacheTransport(httpx2.AsyncHTTPTransport(**_POOL), settings=settings)
    async with httpx2.AsyncClient(transport=transport, timeout=_TIMEOUT, base_url=origin.url) as client:
        played = play(origin)
        with contextlib.suppress(StopIteration):
            ask = next(played)
            while True:
                try:
                    result = await async_perform(client, ask)
                except Exception as exc:
                    ask = played.throw(exc)
                else:
                    ask = played.send(result)


def answering(request: httpx2.Request) -> httpx2.Response:
    """A handler for ``httpx2.MockTransport`` that answers 304 to conditions."""
    status = 304 if "if-none-match" in request.headers else 200
    content = b"" if status == 304 else request.url.path.encode()
    return httpx2.Response(status, headers=STALE, content=content, extensions={"of-origin": status})


def test_a_mock_transport_is_asked_for_what_is_not_held(local: Settings) -> None:
    transport = P2PCacheTransport(httpx2.MockTransport(answering), settings=local)
    with httpx2.Client(transport=transport) as client:
        first, second = (client.get("http://origin.test/x") for _ in range(2))
    assert [(r.content, caching(r)) for r in (first, second)] == [(b"/x", STORED), (b"/x", REVALIDATED)]
    assert first.extensions["of-origin"] == 200


@pytest.mark.anyio
async def test_a_mock_transport_of_an_async_client_is_asked_for_what_is_not_held(local: Settings) -> None:
    transport = P2PCacheTransport(httpx2.MockTransport(answering), settings=local)
    async with httpx2.AsyncClient(transport=transport) as client:
        responses = [await client.get("http://origin.test/x") for _ in range(2)]
    assert [(r.content, caching(r)) for r in responses] == [(b"/x", STORED), (b"/x", REVALIDATED)]


def test_what_the_caller_adds_reaches_the_transport_below(local: Settings) -> None:
    seen: list[httpx2.Request] = []

    def note(request: httpx2.Request) -> httpx2.Response:
        assert isinstance(request, httpx2.Request)
        seen.append(request)
        return answering(request)

    timeout = {"connect": 1.0, "read": 2.0, "write": 3.0, "pool": 4.0}
    with httpx2.Client(transport=P2PCacheTransport(httpx2.MockTransport(note), settings=local)) as client:
        for _ in range(2):  # the second is sent with a condition added
            client.get(
                "http://origin.test/",
                timeout=httpx2.Timeout(**timeout),
                extensions={"sni_hostname": "other.test"},
                headers={"X-Name": "value"},
            )
    assert [request.extensions["timeout"] for request in seen] == [timeout] * 2
    assert [request.extensions["sni_hostname"] for request in seen] == ["other.test"] * 2
    assert [request.headers.get("if-none-match") for request in seen] == [None, '"v1"']
    assert [request.headers["x-name"] for request in seen] == ["value"] * 2


def test_a_sync_client_with_an_async_next_transport_is_told_so(local: Settings) -> None:
    transport = P2PCacheTransport(httpx2.AsyncHTTPTransport(verify=CONTEXT), settings=local)
    with httpx2.Client(transport=transport) as client, pytest.raises(ConfigurationError, match=r"httpx2\.Client"):
        client.get("http://127.0.0.1/")


@pytest.mark.anyio
async def test_an_async_client_with_a_sync_next_transport_is_told_so(local: Settings) -> None:
    transport = P2PCacheTransport(httpx2.HTTPTransport(verify=CONTEXT), settings=local)
    async with httpx2.AsyncClient(transport=transport) as client:
        with pytest.raises(ConfigurationError, match=r"httpx2\.AsyncClient"):
            await client.get("http://127.0.0.1/")


def test_mounted_it_caches_only_what_it_is_mounted_for(origin: Scripted, local: Settings) -> None:
    cached = P2PCacheTransport(httpx2.HTTPTransport(verify=CONTEXT), settings=local)
    with Scripted() as other, httpx2.Client(mounts={origin.url: cached}, verify=CONTEXT) as client:
        for _ in range(2):
            client.get(origin.url)
            assert "caching" not in client.get(other.url).extensions
        assert (len(origin.asked), len(other.asked)) == (1, 2)


ENVIRONMENTS: dict[str, tuple[dict[str, str], bool]] = {
    "none": ({}, False),
    "HTTP_PROXY": ({"HTTP_PROXY": "http://{proxy}"}, True),
    "ALL_PROXY without a scheme": ({"ALL_PROXY": "{proxy}"}, True),
    "for another scheme": ({"HTTPS_PROXY": "http://{proxy}"}, False),
    "NO_PROXY with this host": ({"HTTP_PROXY": "http://{proxy}", "NO_PROXY": "example.org,127.0.0.1"}, False),
    "NO_PROXY with another host": ({"HTTP_PROXY": "http://{proxy}", "NO_PROXY": "example.org"}, True),
    "NO_PROXY with all hosts": ({"HTTP_PROXY": "http://{proxy}", "NO_PROXY": "*"}, False),
}


@pytest.fixture
def proxy(origin: Scripted, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Scripted]:
    """A proxy that answers by itself, named to the process as the test's ``environment`` says."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    with Scripted(lambda asked: Answer(f"proxied {asked.target}".encode(), fields=FRESH)) as server:
        for name, value in ENVIRONMENTS[request.param][0].items():
            monkeypatch.setenv(name, value.format(proxy=server.netloc))
        yield server


@pytest.mark.parametrize(
    ("proxy", "proxied"), [(name, proxied) for name, (_, proxied) in ENVIRONMENTS.items()], indirect=["proxy"]
)
def test_its_own_transport_takes_the_environment_s_proxies_as_httpx2_does(
    origin: Scripted, proxy: Scripted, proxied: bool, local: Settings
) -> None:
    url = origin.url + "/thing"
    expected = f"proxied {url}" if proxied else "/thing"
    with httpx2.Client(verify=CONTEXT) as plain:
        assert expected == plain.get(url).text
    with httpx2.Client(transport=P2PCacheTransport(settings=local)) as client:
        assert [expected] * 2 == [client.get(url).text for _ in range(2)]
    assert len(origin.asked) + len(proxy.asked) == 2  # one of plain httpx2, one of ours


@pytest.mark.anyio
@pytest.mark.parametrize(("proxy", "proxied"), [("none", False), ("HTTP_PROXY", True)], indirect=["proxy"])
async def test_an_async_client_s_own_transport_takes_the_environment_s_proxies(
    origin: Scripted, proxy: Scripted, proxied: bool, local: Settings
) -> None:
    url = origin.url + "/thing"
    async with httpx2.AsyncClient(transport=P2PCacheTransport(settings=local)) as client:
        texts = [(await client.get(url)).text for _ in range(2)]
    assert [f"proxied {url}" if proxied else "/thing"] * 2 == texts
    assert len(origin.asked) + len(proxy.asked) == 1


class Closing(httpx2.BaseTransport, httpx2.AsyncBaseTransport):
    """Counts how often it was closed."""

    def __init__(self) -> None:
        self.closed = 0

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, content=b"body", headers=FRESH)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, content=b"body", headers=FRESH)

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
    with httpx2.Client(transport=transport) as client:
        client.get("http://origin.test/")
        assert open_files(local.dir)
    assert below.closed >= 1
    transport.close()
    assert open_files(local.dir) == []


@linux_only
@pytest.mark.anyio
async def test_aclose_is_idempotent_closes_what_is_below_and_leaves_no_file_open(local: Settings) -> None:
    below = Closing()
    transport = P2PCacheTransport(below, settings=local)
    async with httpx2.AsyncClient(transport=transport) as client:
        await client.get("http://origin.test/")
        assert open_files(local.dir)
    assert below.closed >= 1
    await transport.aclose()
    assert open_files(local.dir) == []


def test_a_transport_that_was_never_used_can_be_closed(local: Settings) -> None:
    P2PCacheTransport(settings=local).close()


def test_twenty_threads_that_ask_one_cold_url_make_one_call(origin: Scripted, local: Settings) -> None:
    gate, arrived = threading.Event(), threading.Semaphore(0)
    origin.script = lambda asked: Answer(b"body", fields=FRESH, before=gate)
    hooks: dict[str, list[Callable[..., Any]]] = {"request": [lambda request: arrived.release()]}
    transport = P2PCacheTransport(httpx2.HTTPTransport(verify=CONTEXT), settings=local)
    with httpx2.Client(transport=transport, event_hooks=hooks) as client, ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(client.get, origin.url) for _ in range(20)]
        assert all(arrived.acquire(timeout=PROMPT) for _ in range(20))
        gate.set()
        responses = [one.result(PROMPT) for one in asked]
    assert [response.content for response in responses] == [b"body"] * 20
    assert sorted(caching(response)[0] for response in responses) == [False] + [True] * 19
    assert len(origin.asked) == 1


@pytest.mark.anyio
async def test_twenty_tasks_that_ask_one_cold_url_make_one_call(origin: Scripted, local: Settings) -> None:
    gate = threading.Event()
    origin.script = lambda asked: Answer(b"body", fields=FRESH, before=gate)
    responses: list[httpx2.Response] = []
    transport = P2PCacheTransport(httpx2.AsyncHTTPTransport(verify=CONTEXT), settings=local)
    async with httpx2.AsyncClient(transport=transport) as client:

        async def ask() -> None:
            responses.append(await client.get(origin.url))

        with anyio.fail_after(PROMPT):
            async with anyio.create_task_group() as tasks:
                for _ in range(20):
                    tasks.start_soon(ask)
                await anyio.to_thread.run_sync(origin.wait_for, 1)
                await anyio.wait_all_tasks_blocked()
                gate.set()
    assert [response.content for response in responses] == [b"body"] * 20
    assert len(origin.asked) == 1


@pytest.mark.anyio
async def test_a_task_that_is_cancelled_leaves_its_claim_to_the_others(origin: Scripted, local: Settings) -> None:
    gate, leaving = threading.Event(), anyio.CancelScope()
    origin.script = lambda asked: Answer(before=gate) if "x-first" in asked.fields else Answer(b"good", fields=FRESH)
    responses: list[httpx2.Response] = []
    transport = P2PCacheTransport(httpx2.AsyncHTTPTransport(verify=CONTEXT), settings=local)
    async with httpx2.AsyncClient(transport=transport) as client, anyio.create_task_group() as tasks:

        async def lead() -> None:
            with leaving:
                await client.get(origin.url, headers={"X-First": "1"})

        async def ask() -> None:
            responses.append(await client.get(origin.url))

        tasks.start_soon(lead)
        await anyio.to_thread.run_sync(origin.wait_for, 1)
        with anyio.fail_after(PROMPT):
            async with anyio.create_task_group() as others:
                for _ in range(4):
                    others.start_soon(ask)
                await anyio.wait_all_tasks_blocked()
                leaving.cancel()
        gate.set()
    assert [response.content for response in responses] == [b"good"] * 4
    assert len(origin.asked) == 2


def stale_once(gate: threading.Event) -> Callable[[Asked], Answer]:
    return in_turn(
        Answer(b"old", fields={"Cache-Control": "max-age=10, stale-while-revalidate=600", "Age": "100"}),
        Answer(b"new", fields=FRESH, before=gate),
    )


def test_stale_while_revalidate_answers_at_once_and_asks_the_origin_meanwhile(
    origin: Scripted, local: Settings
) -> None:
    gate = threading.Event()
    origin.script = stale_once(gate)
    with httpx2.Client(transport=P2PCacheTransport(settings=local)) as client:
        assert [client.get(origin.url).content for _ in range(2)] == [b"old", b"old"]
        origin.wait_for(2)
        gate.set()
    with httpx2.Client(transport=P2PCacheTransport(settings=local)) as client:
        assert (client.get(origin.url).content, len(origin.asked)) == (b"new", 2)


def test_a_generator_is_uploaded_to_its_end(origin: Scripted, local: Settings) -> None:
    with httpx2.Client(transport=P2PCacheTransport(settings=local)) as client:
        response = client.post(origin.url, content=iter([b"one ", b"two"]))
    assert (origin.asked[0].body, caching(response)) == (b"one two", PASSED)


@pytest.mark.anyio
async def test_an_async_generator_is_uploaded_to_its_end(origin: Scripted, local: Settings) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"one "
        yield b"two"

    async with httpx2.AsyncClient(transport=P2PCacheTransport(settings=local)) as client:
        response = await client.post(origin.url, content=pieces())
    assert (origin.asked[0].body, caching(response)) == (b"one two", PASSED)


ALONE = """
import sys
import httpx2
from httpx_p2pcache import Settings, get_stats
from httpx_p2pcache.integrations.httpx2 import P2PCacheTransport

with httpx2.Client(transport=P2PCacheTransport()) as client:
    sources = [client.get(sys.argv[1]).extensions["caching"]["source"] for _ in range(2)]
foreign = [name for name in ("httpx", "httpcore", "requests", "urllib3", "libp2p") if name in sys.modules]
print(sources, foreign)
"""


def test_a_process_that_uses_httpx2_imports_neither_httpx_nor_requests(origin: Scripted, tmp_path: Path) -> None:
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("CACHE_", "GITHUB_", "GH_", "RUNNER_"))}
    ours = {"CACHE_DIR": str(tmp_path / "alone"), "CACHE_ENABLE_P2P": "false", "NO_PROXY": "127.0.0.1"}
    ran = subprocess.run(
        [sys.executable, "-c", ALONE, origin.url], env=kept | ours, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout == "['origin', 'local'] []\n", ran.stderr


def test_an_httpx_and_an_httpx2_client_of_one_runner_share(origin: Scripted, local: Settings) -> None:
    with (
        httpx2.Client(transport=P2PCacheTransport(settings=local)) as two,
        httpx.Client(transport=httpx_p2pcache.P2PCacheTransport(settings=local)) as one,
    ):
        assert [caching(two.get(origin.url + "/a")), caching(one.get(origin.url + "/a"))] == [STORED, HIT]
        assert [caching(one.get(origin.url + "/b")), caching(two.get(origin.url + "/b"))] == [STORED, HIT]
        one.put(origin.url + "/b")
        assert caching(two.get(origin.url + "/b")) == STORED
    assert len(origin.asked) == 4


def test_twenty_threads_of_both_libraries_make_one_call(origin: Scripted, local: Settings) -> None:
    gate, arrived = threading.Event(), threading.Semaphore(0)
    origin.script = lambda asked: Answer(b"body", fields=FRESH, before=gate)
    hooks: dict[str, list[Callable[..., Any]]] = {"request": [lambda request: arrived.release()]}
    with (
        httpx2.Client(transport=P2PCacheTransport(settings=local), event_hooks=hooks) as two,
        httpx.Client(transport=httpx_p2pcache.P2PCacheTransport(settings=local), event_hooks=hooks) as one,
        ThreadPoolExecutor(20) as pool,
    ):
        asked = [pool.submit(client.get, origin.url) for client in (one, two) for _ in range(10)]
        assert all(arrived.acquire(timeout=PROMPT) for _ in range(20))
        gate.set()
        assert [one.result(PROMPT).content for one in asked] == [b"body"] * 20
    assert len(origin.asked) == 1


@pytest.mark.p2p
def test_what_a_peer_s_httpx_has_fetched_an_httpx2_client_gets(settings_for: Callable[..., Settings]) -> None:
    pytest.importorskip("libp2p")
    mine = {"Authorization": f"Bearer {TOKEN}", "Accept": "application/vnd.github+json"}
    here = httpx_p2pcache.P2PCacheTransport(settings=settings_for("a", lookup_timeout=PROMPT))
    there = P2PCacheTransport(settings=settings_for("b", lookup_timeout=PROMPT))
    with (
        Origin(made_up(3)) as origin,
        httpx.Client(transport=here, headers=mine, timeout=30) as one,
        httpx2.Client(transport=there, headers=mine, timeout=30) as two,
    ):
        for transport in (here, there):
            assert transport.wait_until_joined(30)
            assert eventually(lambda transport=transport: transport.stats()["connected_peers"] == 1)
        first, second = (f"{origin.url}/repos/octo-org/repo-{number}" for number in (1, 2))
        paid = one.get(first)
        assert eventually(lambda: there.stats()["cache_size"] == 1)
        given = two.get(first)
        assert (given.content, caching(given)[0]) == (paid.content, True)
        paid_there = two.get(second)
        assert eventually(lambda: here.stats()["cache_size"] == 2)
        given_here = one.get(second)
        assert (given_here.content, caching(given_here)[0]) == (paid_there.content, True)
        assert len(origin.calls) == 2
