"""Where RFC 9111 is strict: what looks like a hit and is none, and clients and origins that are just within the rules.

Wherever a cache may choose, it may always ask the origin: so most of these say which body a caller must not be given.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import anyio.to_thread
import httpx
import pytest
from scripted import Answer, Asked, Scripted

from httpx_p2pcache import P2PCacheTransport, Settings
from httpx_p2pcache.entries import cache_key
from httpx_p2pcache.store import Store

CONTEXT = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # never used: every origin here is plain, and loading one takes long
PROMPT = 5.0  # seconds: half of what a claim lives, so that whoever waits for its end is noticed
LONG_AGO = "Tue, 14 Nov 2023 22:13:20 GMT"
Fields = dict[str, str | float | None]
FRESH = {"Cache-Control": "max-age=60"}
STALE = {"Cache-Control": "max-age=10", "Age": "100"}
STALE_WHILE_REVALIDATE = {"Cache-Control": "max-age=10, stale-while-revalidate=600", "Age": "100"}
A, B, NOBODY = {"authorization": "Bearer a"}, {"authorization": "Bearer b"}, dict[str, str]()

HIT = (True, False, False, "local")
STORED = (False, False, True, "origin")


def caching(response: httpx.Response) -> tuple[bool, bool, bool, str]:
    """``extensions["caching"]`` as (from_cache, revalidated, stored, source)."""
    found = response.extensions["caching"]
    return found["from_cache"], found["revalidated"], found["stored"], found["source"]


def who(fields: Mapping[str, str]) -> str:
    return fields.get("authorization", "Bearer nobody").removeprefix("Bearer ")


def always(answer: Answer) -> Callable[[Asked], Answer]:
    return lambda asked: answer


def in_turn(*answers: Answer) -> Callable[[Asked], Answer]:
    left = iter(answers)
    return lambda asked: next(left)


def versions(*answers: Answer) -> Callable[[Asked], Answer]:
    """Each of them once, and the last one for ever: who has that one, by its tag, is told 304."""
    left, last = iter(answers[:-1]), answers[-1]
    tag = dict(last.fields)["ETag"]

    def script(asked: Asked) -> Answer:
        found = next(left, None)
        if found is not None:
            return found
        validated = str(tag) in asked.fields.get("if-none-match", "")
        return Answer(status=304, fields={**dict(last.fields), "Date": 0.0}) if validated else last

    return script


@pytest.fixture
def origin() -> Iterator[Scripted]:
    """In the place of the stand-in GitHub that other files have."""
    with Scripted() as server:
        yield server


@pytest.fixture
def client_for(local: Settings) -> Iterator[Callable[..., httpx.Client]]:
    """``client_for()``: another client of the same CACHE_DIR, closed at the end."""
    with contextlib.ExitStack() as opened:

        def build(settings: Settings = local, below: httpx.BaseTransport | None = None, **how: Any) -> httpx.Client:
            transport = P2PCacheTransport(below or httpx.HTTPTransport(verify=CONTEXT), settings=settings)
            return opened.enter_context(httpx.Client(transport=transport, **how))

        yield build


def async_client(settings: Settings, below: httpx.AsyncBaseTransport | None = None) -> httpx.AsyncClient:
    transport = P2PCacheTransport(below or httpx.AsyncHTTPTransport(verify=CONTEXT), settings=settings)
    return httpx.AsyncClient(transport=transport)


# --- whose answer it is ---------------------------------------------------------------------------------------------


def test_what_is_private_as_well_as_public_is_for_nobody_else(
    origin: Scripted, client_for: Callable[..., httpx.Client]
) -> None:
    """RFC 9111 §4.2.1: of directives that conflict the most restrictive one counts."""
    origin.script = lambda asked: Answer(
        who(asked.fields).encode(),
        fields=[("Cache-Control", "private, max-age=60"), ("Cache-Control", "public")],
    )
    for expected in (STORED, HIT):
        for caller in (A, B, NOBODY):
            response = client_for().get(origin.url, headers=caller)
            assert (response.text, caching(response)) == (who(caller), expected)


def at_rest(settings: Settings, url: str) -> list[tuple[str | None, bytes]]:
    """Tag and body of each entry in the file."""
    store = Store(settings.dir, max_size=settings.max_size, default_ttl=settings.default_ttl)
    try:
        found = [(stored.entry.first("etag"), stored.entry.body) for stored in store.load(cache_key(url))]
    finally:
        store.close()
    assert found
    return found


WEAK: Fields = {"ETag": 'W/"2"', "Last-Modified": LONG_AGO, "Cache-Control": "public, max-age=2"}


def test_a_304_with_a_weak_tag_is_about_the_entry_whose_tag_was_sent_and_no_other_token_s(
    origin: Scripted, client_for: Callable[..., httpx.Client], local: Settings
) -> None:
    """RFC 9111 §4.3.4: that both were modified in one second does not make them one representation."""
    origin.script = versions(
        Answer(b"one", fields={**WEAK, "ETag": 'W/"1"', "Date": -20.0}), Answer(b"two", fields={**WEAK, "Date": -10.0})
    )
    client = client_for()
    assert [client.get(origin.url, headers=caller).content for caller in (A, B)] == [b"one", b"two"]
    for caller in (A, B, A, B, NOBODY):
        response = client.get(origin.url, headers=caller)
        assert (response.headers["etag"], response.content) == ('W/"2"', b"two")
    client.close()
    assert ('W/"2"', b"one") not in at_rest(local, origin.url + "/")


def test_a_304_with_a_weak_tag_is_about_the_entry_whose_tag_was_sent_and_not_one_in_another_coding(
    origin: Scripted, client_for: Callable[..., httpx.Client], local: Settings
) -> None:
    coded: Fields = {**WEAK, "Cache-Control": "max-age=0", "Content-Encoding": "gzip", "Date": -10.0}
    origin.script = versions(
        Answer(b"one", fields={**WEAK, "ETag": 'W/"1"', "Date": -20.0}),
        Answer(gzip.compress(b"two", mtime=0), fields=coded),
    )
    client = client_for()
    assert [client.get(origin.url).content for _ in range(2)] == [b"one", b"two"]
    for _ in range(4):
        response = client.get(origin.url)
        assert (response.headers["etag"], response.content) == ('W/"2"', b"two")
    client.close()
    assert ('W/"2"', b"one") not in at_rest(local, origin.url + "/")


HOSTS = (NOBODY, {"Host": "a.example"}, {"Host": "b.example"}, NOBODY, {"Host": "a.example"})


def by_host(asked: Asked) -> Answer:
    return Answer(asked.fields["host"].encode(), fields=FRESH)


def test_one_virtual_host_s_answer_is_not_another_s(origin: Scripted, client_for: Callable[..., httpx.Client]) -> None:
    """RFC 9110 §7.2: the Host field says whose resource it is, whatever address was dialled."""
    origin.script = by_host
    for host in HOSTS:
        assert client_for().get(origin.url, headers=host).text == host.get("Host", origin.netloc)
    named = client_for().get(origin.url, headers={"Host": origin.netloc})
    assert (named.text, caching(named)) == (origin.netloc, HIT)


@pytest.mark.anyio
async def test_one_virtual_host_s_answer_is_not_another_s_for_an_async_client(
    origin: Scripted, local: Settings
) -> None:
    origin.script = by_host
    async with async_client(local) as client:
        for host in HOSTS:
            assert (await client.get(origin.url, headers=host)).text == host.get("Host", origin.netloc)


def test_one_virtual_host_s_answer_is_not_another_s_for_requests(origin: Scripted, local: Settings) -> None:
    requests = pytest.importorskip("requests")
    from httpx_p2pcache.integrations.requests import P2PCacheAdapter

    origin.script = by_host
    with requests.Session() as session:
        session.mount("http://", P2PCacheAdapter(settings=local))
        for host in HOSTS:
            assert session.get(origin.url, headers=host).text == host.get("Host", origin.netloc)


def test_a_public_answer_that_sets_a_cookie_is_for_its_token_alone(
    origin: Scripted, client_for: Callable[..., httpx.Client]
) -> None:
    """The cookie is a credential: who is given another's is logged in as that one."""
    origin.script = lambda asked: Answer(
        b"welcome", fields={"Cache-Control": "public, max-age=60", "Set-Cookie": f"sid={who(asked.fields)}"}
    )
    for expected in (STORED, HIT):
        for caller in (A, B, NOBODY):  # each time with an empty jar: a cookie that is sent back is a credential as well
            response = client_for().get(origin.url, headers=caller)
            assert response.headers["set-cookie"] == f"sid={who(caller)}"
            if caller is A:
                assert caching(response) == expected


# --- what is done once, or must be done at all ----------------------------------------------------------------------


def revalidations(gate: threading.Event) -> Callable[[Asked], Answer]:
    """Something stale, and an origin that has nothing new to say, and says so late: each revalidation is a call."""
    answers = iter([Answer(b"old", fields=STALE_WHILE_REVALIDATE)])
    return lambda asked: next(answers, Answer(status=503, before=gate))


def test_a_url_is_revalidated_in_the_background_once_at_a_time(
    origin: Scripted, client_for: Callable[..., httpx.Client]
) -> None:
    gate = threading.Event()
    origin.script = revalidations(gate)
    client = client_for()
    before = set(threading.enumerate())
    assert [client.get(origin.url).content for _ in range(5)] == [b"old"] * 5
    origin.wait_for(2)
    begun = [t for t in set(threading.enumerate()) - before if t.name == "p2pcache-revalidate"]
    gate.set()
    client.close()  # waits for those in the background
    assert len(begun) <= 1
    assert len(origin.asked) == 2


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_url_is_revalidated_by_a_task_in_the_background_once_at_a_time(
    origin: Scripted, local: Settings
) -> None:
    gate = threading.Event()
    origin.script = revalidations(gate)
    async with async_client(local) as client:
        await client.get(origin.url)
        before = asyncio.all_tasks()
        assert [(await client.get(origin.url)).content for _ in range(4)] == [b"old"] * 4
        await anyio.to_thread.run_sync(origin.wait_for, 2)
        begun = asyncio.all_tasks() - before
        gate.set()
        if begun:
            await asyncio.wait(begun, timeout=PROMPT)
    assert len(begun) <= 1
    assert len(origin.asked) == 2


class Reading(httpx.BaseTransport):
    """Has read every response before it hands it on, as one that logs bodies does."""

    def __init__(self) -> None:
        self._below = httpx.HTTPTransport(verify=CONTEXT)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = self._below.handle_request(request)
        response.read()
        return response

    def close(self) -> None:
        self._below.close()


class AsyncReading(httpx.AsyncBaseTransport):
    def __init__(self) -> None:
        self._below = httpx.AsyncHTTPTransport(verify=CONTEXT)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._below.handle_async_request(request)
        await response.aread()
        return response

    async def aclose(self) -> None:
        await self._below.aclose()


READ = {**FRESH, "Connection": "close"}  # so that nobody waits who would read it once more
# Coded, so short a body is longer than it is decoded.
BODIES = {
    "plain": Answer(b"hello", fields=READ),
    "coded": Answer(gzip.compress(b"hello", mtime=0), fields={**READ, "Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("kind", BODIES)
def test_a_response_that_was_read_below_us_is_given_and_stored(
    kind: str, origin: Scripted, client_for: Callable[..., httpx.Client]
) -> None:
    origin.script = always(BODIES[kind])
    client = client_for(below=Reading())
    for expected in (STORED, HIT):
        response = client.get(origin.url)
        assert (response.content, caching(response)) == (b"hello", expected)
    assert len(origin.asked) == 1


@pytest.mark.anyio
@pytest.mark.parametrize("kind", BODIES)
async def test_a_response_that_was_read_below_us_is_given_and_stored_for_an_async_client(
    kind: str, origin: Scripted, local: Settings
) -> None:
    origin.script = always(BODIES[kind])
    async with async_client(local, AsyncReading()) as client:
        for expected in (STORED, HIT):
            response = await client.get(origin.url)
            assert (response.content, caching(response)) == (b"hello", expected)
    assert len(origin.asked) == 1


@pytest.mark.anyio
async def test_a_program_that_uses_all_of_anyio_s_worker_threads_is_answered(origin: Scripted, local: Settings) -> None:
    """They are the program's: what it does in them may be what waits for us."""
    limiter, answered = anyio.to_thread.current_default_thread_limiter(), anyio.Event()
    contents: list[bytes] = []
    async with async_client(local) as client, anyio.create_task_group() as group:

        async def ask() -> None:
            contents.append((await client.get(origin.url + "/thing")).content)
            answered.set()

        borrowers = [object() for _ in range(int(limiter.available_tokens))]
        for borrower in borrowers:
            limiter.acquire_on_behalf_of_nowait(borrower)
        try:
            assert limiter.available_tokens == 0
            group.start_soon(ask)
            with anyio.move_on_after(PROMPT / 2):
                await answered.wait()
            in_time = answered.is_set()
        finally:  # not by a cancellation: what is begun in the store is finished, and would wait for a thread for ever
            for borrower in borrowers:
                limiter.release_on_behalf_of(borrower)
    assert in_time
    assert contents == [b"/thing"]


# --- what may be served, and what may not any more ------------------------------------------------------------------

NO_LONGER: dict[str, tuple[dict[str, str], Answer]] = {
    "403 to a range": ({"Range": "bytes=0-1"}, Answer(b"?", 403)),
    "403 to what must not be stored": ({"Cache-Control": "no-store"}, Answer(b"?", 403)),
    "451": ({}, Answer(b"?", 451)),
    "302": ({}, Answer(b"?", 302, {"Location": "/login"})),
    "400": ({}, Answer(b"?", 400)),
    "200 that must not be stored": ({}, Answer(b"?", 200, {"Cache-Control": "no-store"})),
}


@pytest.mark.parametrize("between", NO_LONGER)
def test_what_the_origin_has_said_otherwise_of_since_is_not_served_stale(
    between: str, origin: Scripted, settings_for: Callable[..., Settings], client_for: Callable[..., httpx.Client]
) -> None:
    """RFC 9111 §4.3.3 and RFC 5861 §4: stale-if-error stands in for an answer, and there has been one."""
    headers, answer = NO_LONGER[between]
    old = Answer(b"old", fields={"Cache-Control": "max-age=0", "ETag": '"1"'})
    origin.script = in_turn(old, Answer(b"down", 503), answer, Answer(b"down", 503))
    client = client_for(settings_for(enable_p2p=False, stale_if_error=60), headers=A)
    asked: Sequence[dict[str, str]] = ({}, {}, headers, {})
    responses = [client.get(origin.url, headers=fields) for fields in asked]
    assert [r.content for r in responses] == [b"old", b"old", b"?", b"down"]
    assert [r.status_code for r in responses] == [200, 200, answer.status, 503]


def test_who_has_seen_something_newer_is_not_given_what_is_older_for_all(
    origin: Scripted, client_for: Callable[..., httpx.Client]
) -> None:
    old = Answer(b"old", fields={"Cache-Control": "public, max-age=600", "Date": -60.0})
    new = Answer(b"new", fields={"Cache-Control": "private, max-age=0", "ETag": '"2"'})
    origin.script = in_turn(old, new, Answer(b"newer", fields={"Cache-Control": "private, max-age=0"}))
    client = client_for()
    client.get(origin.url, headers=A)
    assert client.get(origin.url, headers={**B, "Cache-Control": "no-cache"}).content == b"new"
    assert client.get(origin.url, headers=B).content == b"newer"


def test_who_is_refused_is_not_served_what_others_have_when_the_origin_fails(
    origin: Scripted, client_for: Callable[..., httpx.Client]
) -> None:
    public = Answer(b"old", fields={"Cache-Control": "public, max-age=0, stale-if-error=600", "ETag": '"1"'})
    origin.script = in_turn(public, Answer(b"?", 403), Answer(b"down", 503), Answer(b"down", 503))
    client = client_for()
    asked = [client.get(origin.url, headers=fields).content for fields in (A, B, B, A)]
    assert asked == [b"old", b"?", b"down", b"old"]


@pytest.mark.anyio
async def test_a_write_that_is_cancelled_may_have_been_done(origin: Scripted, local: Settings) -> None:
    came, never = threading.Event(), threading.Event()

    def script(asked: Asked) -> Answer:
        if asked.method == "GET":
            return Answer(b"thing", fields=FRESH)
        came.set()
        never.wait(PROMPT)
        return Answer(b"late")

    origin.script = script
    async with async_client(local) as client:
        await client.get(origin.url)
        assert caching(await client.get(origin.url)) == HIT
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.patch, origin.url)
            await anyio.to_thread.run_sync(came.wait)
            tasks.cancel_scope.cancel()
        never.set()
        assert caching(await client.get(origin.url)) == STORED


@pytest.mark.parametrize("status", [202, 407, 408, 421, 425, 429])
def test_what_says_nothing_of_the_resource_takes_nothing_away(
    status: int, origin: Scripted, settings_for: Callable[..., Settings], client_for: Callable[..., httpx.Client]
) -> None:
    old = Answer(b"old", fields={"Cache-Control": "max-age=0", "ETag": '"1"'})
    origin.script = in_turn(old, Answer(b"?", status), Answer(b"down", 503))
    client = client_for(settings_for(enable_p2p=False, stale_if_error=60), headers=A)
    assert [client.get(origin.url).content for _ in range(3)][2] == b"old"


def test_what_one_token_is_refused_stays_with_those_who_may_have_it(
    origin: Scripted, client_for: Callable[..., httpx.Client]
) -> None:
    origin.script = in_turn(Answer(b"for all", fields={"Cache-Control": "public, max-age=60"}), Answer(b"?", 401))
    client = client_for()
    client.get(origin.url)
    assert client.get(origin.url, headers={**B, "Cache-Control": "no-cache"}).status_code == 401
    assert caching(client.get(origin.url)) == HIT


def test_a_date_ahead_of_time_does_not_hide_what_comes_later(
    origin: Scripted, client_for: Callable[..., httpx.Client]
) -> None:
    early = Answer(b"old", fields={"Cache-Control": "max-age=0", "Date": 3600.0})
    late = {"Cache-Control": "max-age=60", "Content-Encoding": "gzip"}
    origin.script = in_turn(early, Answer(gzip.compress(b"new"), fields=late))
    client = client_for()
    assert [client.get(origin.url).content for _ in range(3)] == [b"old", b"new", b"new"]


def test_no_part_is_made_of_a_coded_body(origin: Scripted, client_for: Callable[..., httpx.Client]) -> None:
    """RFC 9110 §14.2: a Range may be ignored. Nobody can decode what is cut out of a coded body."""
    coded = {**FRESH, "ETag": '"1"', "Content-Encoding": "gzip"}
    origin.script = always(Answer(gzip.compress(b"hello " * 100, mtime=0), fields=coded))
    client = client_for()
    client.get(origin.url)
    for asked in ("bytes=5-9", "bytes=0-9", "bytes=-5"):
        response = client.get(origin.url, headers={"Range": asked})
        assert (response.status_code, response.content) == (200, b"hello " * 100)
        assert "content-range" not in response.headers


LATER = {"Vary": {"Vary": "X-Version"}, "another coding": {"Content-Encoding": "gzip"}}


@pytest.mark.parametrize("change", LATER)
def test_of_two_answers_the_one_with_the_later_date_is_served_though_it_was_older_when_it_came(
    change: str, origin: Scripted, client_for: Callable[..., httpx.Client]
) -> None:
    """RFC 9111 §4: the most recent response, by its Date; Age tells only how long it was on its way."""
    new = gzip.compress(b"new", mtime=0) if change == "another coding" else b"new"
    fields = {"Cache-Control": "max-age=100", "Age": "50", **LATER[change]}
    origin.script = in_turn(
        Answer(b"old", fields={"Cache-Control": "max-age=100", "Date": -5.0}), Answer(new, fields=fields)
    )
    client = client_for(headers={"X-Version": "1"})
    assert client.get(origin.url).content == b"old"
    assert client.get(origin.url, headers={"Cache-Control": "no-cache"}).content == b"new"
    for wishes in ({}, {"Cache-Control": "max-age=90"}, {"Cache-Control": "only-if-cached"}):
        response = client.get(origin.url, headers=wishes)
        assert (response.content, caching(response)) == (b"new", HIT)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_a_post_s_answer_is_not_kept_if_another_write_has_ended_meanwhile(
    method: str, origin: Scripted, client_for: Callable[..., httpx.Client]
) -> None:
    """RFC 9110 §9.3.3: what it answers was true when it was made, and the other may have been made after it."""
    gate = threading.Event()

    def script(asked: Asked) -> Answer:
        if asked.body == b"first":
            return Answer(b"first", fields={**FRESH, "Content-Location": asked.target}, before=gate)
        return Answer(b"second")

    origin.script = script
    client = client_for()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, origin.url + "/thing", content=b"first")
        origin.wait_for(1)
        client.request(method, origin.url + "/thing", content=b"second")
        gate.set()
        assert first.result(PROMPT).content == b"first"
    assert client.get(origin.url + "/thing").content == b"second"


@pytest.mark.parametrize("pieces", [None, [b"new"]], ids=["of the same length", "of unknown length"])
def test_a_head_without_validators_does_not_freshen_what_is_stored(
    pieces: list[bytes] | None, origin: Scripted, client_for: Callable[..., httpx.Client]
) -> None:
    """RFC 9111 §4.3.5: there has to be a validator that matches."""
    new = Answer(b"new", fields=FRESH, pieces=pieces)
    origin.script = in_turn(Answer(b"old", fields=STALE, pieces=pieces and [b"old"]), new, new)
    client = client_for()
    assert client.get(origin.url).content == b"old"
    client.head(origin.url)
    assert client.get(origin.url).content == b"new"


def test_a_304_without_a_tag_to_the_caller_s_tag_and_ours_does_not_say_that_the_caller_s_is_right(
    origin: Scripted, client_for: Callable[..., httpx.Client]
) -> None:
    """RFC 9110 §15.4.5 asks for the tag. An origin that leaves it out would be asked about the caller's copy alone."""
    ours = Answer(b"two", fields={"ETag": '"2"', "Cache-Control": "max-age=0"})
    origin.script = lambda asked: Answer(status=304) if '"2"' in asked.fields.get("if-none-match", "") else ours
    client = client_for()
    assert client.get(origin.url).content == b"two"
    response = client.get(origin.url, headers={"If-None-Match": '"1"'})
    assert (response.status_code, response.content) == (200, b"two")
    assert client.get(origin.url, headers={"If-None-Match": '"2"'}).status_code == 304


# --- a transport below us, a client above us, and spellings ---------------------------------------------------------


def test_a_body_that_is_shorter_than_it_says_is_not_stored(client_for: Callable[..., httpx.Client]) -> None:
    """RFC 9111 §3.3: httpx's own transport notices; one that was written for a test, or for a tunnel, may not."""
    asked: list[httpx.Request] = []

    def half(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, headers={**FRESH, "Content-Length": "10"}, content=iter([b"half"]))

    client = client_for(below=httpx.MockTransport(half))
    for calls in (1, 2):
        assert client.get("http://origin.test/thing").content == b"half"
        assert len(asked) == calls


@pytest.mark.anyio
async def test_a_body_that_is_shorter_than_it_says_is_not_stored_for_an_async_client(local: Settings) -> None:
    asked: list[httpx.Request] = []

    async def pieces() -> AsyncIterator[bytes]:
        yield b"half"

    def half(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, headers={**FRESH, "Content-Length": "10"}, content=pieces())

    async with async_client(local, httpx.MockTransport(half)) as client:
        for calls in (1, 2):
            assert (await client.get("http://origin.test/thing")).content == b"half"
            assert len(asked) == calls


ONLY_IF_CACHED = {"Cache-Control": "only-if-cached"}


def test_a_504_of_ours_can_be_streamed(origin: Scripted, client_for: Callable[..., httpx.Client]) -> None:
    with client_for().stream("GET", origin.url, headers=ONLY_IF_CACHED) as response:
        assert (response.status_code, b"".join(response.iter_raw())) == (504, b"")
    assert origin.asked == []


@pytest.mark.anyio
async def test_a_504_of_ours_can_be_streamed_by_an_async_client(origin: Scripted, local: Settings) -> None:
    async with async_client(local) as client, client.stream("GET", origin.url, headers=ONLY_IF_CACHED) as response:
        assert (response.status_code, b"".join([piece async for piece in response.aiter_raw()])) == (504, b"")
    assert origin.asked == []


@pytest.mark.parametrize("name", ["Location", "Content-Location"])
def test_what_a_write_names_in_another_spelling_is_invalidated(
    name: str, origin: Scripted, client_for: Callable[..., httpx.Client]
) -> None:
    """RFC 9110 §4.2.3: scheme and host are the same in either case."""
    port = origin.netloc.partition(":")[2]
    item = f"http://localhost:{port}/item"
    origin.script = in_turn(
        Answer(b"old", fields=FRESH),
        Answer(status=201, fields={name: f"HTTP://LocalHost:{port}/item"}),
        Answer(b"new", fields=FRESH),
    )
    client = client_for()
    assert [client.get(item).content for _ in range(2)] == [b"old", b"old"]
    client.post(f"http://localhost:{port}/items")
    assert client.get(item).content == b"new"


# --- refusals, limits, and what is of no use to anybody -------------------------------------------------------------

SPENT = {"X-RateLimit-Limit": "60", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "4000000000"}
REFUSED = b'{"message": "Resource not accessible by integration"}'
LIMITED = b'{"message": "API rate limit exceeded for user ID 1."}'


@pytest.mark.parametrize(("said", "served"), [(REFUSED, REFUSED), (LIMITED, b"old"), (b"", b"old")])
def test_a_403_that_spends_the_last_of_a_limit_is_a_limit_only_if_it_says_so(
    origin: Scripted,
    settings_for: Callable[..., Settings],
    client_for: Callable[..., httpx.Client],
    said: bytes,
    served: bytes,
) -> None:
    """The one law: no token is shown what the origin has just refused it."""
    origin.script = in_turn(Answer(b"old", fields=STALE), Answer(said, 403, SPENT), Answer(said, 403, SPENT))
    client = client_for(settings_for(enable_p2p=False, github_hosts=(origin.netloc,)), headers=A)
    asked = [client.get(origin.url) for _ in range(3)]
    assert [response.content for response in asked] == [b"old", served, served]
    assert [response.status_code for response in asked[1:]] == [403 if served == REFUSED else 200] * 2


def test_a_403_with_retry_after_is_a_refusal_where_nobody_says_that_it_is_a_limit(
    origin: Scripted, client_for: Callable[..., httpx.Client]
) -> None:
    """RFC 5861 §4 names 500, 502, 503 and 504."""
    old = Answer(b"old", fields={**STALE, "Cache-Control": "max-age=10, stale-if-error=600"})
    origin.script = in_turn(old, Answer(b"?", 403, {"Retry-After": "60"}), Answer(b"down", 503))
    client = client_for(headers=A)
    assert [client.get(origin.url).content for _ in range(3)] == [b"old", b"?", b"down"]


@pytest.mark.parametrize("status", [428, 429, 431, 511, 600])
def test_what_must_not_be_stored_is_not_whatever_its_lifetime(
    origin: Scripted, client_for: Callable[..., httpx.Client], status: int
) -> None:
    """RFC 6585 §3 to §6."""
    origin.script = in_turn(
        Answer(b"?", status, {"Cache-Control": "public, max-age=60"}), Answer(b"fine", fields=FRESH)
    )
    client = client_for()
    assert [caching(client.get(origin.url))[2] for _ in range(2)] == [False, True]


@pytest.mark.parametrize("status", [401, 403, 404, 410, 451])
def test_who_was_refused_is_not_given_what_is_public_until_the_origin_says_otherwise(
    origin: Scripted, client_for: Callable[..., httpx.Client], status: int
) -> None:
    public = Answer(b"for all", fields={"Cache-Control": "public, max-age=600", "Date": -5.0})
    origin.script = in_turn(public, Answer(b"?", status), Answer(b"?", status))
    client = client_for()
    client.get(origin.url, headers=A)
    assert client.get(origin.url, headers={**B, "Cache-Control": "no-cache"}).status_code == status
    assert client.get(origin.url, headers=B).status_code == status


SINCE: dict[str, tuple[str, Answer]] = {
    "200 with another tag": ("GET", Answer(b"BBBBBBBB", fields={"ETag": '"2"', "Cache-Control": "max-age=0"})),
    "200 that must not be stored": ("GET", Answer(b"BBBBBBBB", fields={"Cache-Control": "no-store"})),
    "HEAD with another tag": ("HEAD", Answer(fields={"ETag": '"2"', **FRESH})),
    "451": ("GET", Answer(b"?", 451)),
}


@pytest.mark.parametrize("later", SINCE)
def test_a_part_does_not_outlive_what_came_later(
    origin: Scripted, client_for: Callable[..., httpx.Client], later: str
) -> None:
    """RFC 9111 §4, §4.3.3 and §4.3.5."""
    old = {"ETag": '"1"', "Cache-Control": "max-age=600", "Content-Range": "bytes 0-3/8", "Date": -5.0}
    new = {"ETag": '"2"', "Cache-Control": "max-age=600", "Content-Range": "bytes 0-3/8"}
    method, between = SINCE[later]
    origin.script = in_turn(Answer(b"AAAA", 206, old), between, Answer(b"BBBB", 206, new))
    client, part = client_for(), {"Range": "bytes=0-3"}
    assert client.get(origin.url, headers=part).content == b"AAAA"
    assert caching(client.get(origin.url, headers=part)) == HIT
    client.request(method, origin.url)
    assert client.get(origin.url, headers=part).content == b"BBBB"


def test_a_part_that_was_asked_for_by_if_range_is_no_beginning_of_a_whole(
    origin: Scripted, client_for: Callable[..., httpx.Client]
) -> None:
    """RFC 9110 §15.3.7: it leaves out what the asker is taken to know, as its Content-Type."""
    part = {"ETag": '"1"', "Cache-Control": "max-age=600", "Content-Range": "bytes 0-7/8"}
    whole = Answer(b"AAAAAAAA", fields={**FRESH, "ETag": '"1"', "Content-Type": "text/plain"})
    origin.script = in_turn(Answer(b"AAAAAAAA", 206, part), whole)
    client = client_for()
    client.get(origin.url, headers={"Range": "bytes=0-7", "If-Range": '"1"'})
    assert client.get(origin.url).headers["content-type"] == "text/plain"


@pytest.mark.parametrize(
    "fields",
    [
        {"Cache-Control": "no-cache"},
        {"Cache-Control": "max-age=60", "Vary": "*"},
        {"Content-Type": "text/event-stream"},
    ],
    ids=str,
)
def test_nobody_waits_for_what_can_never_be_an_answer(
    origin: Scripted, client_for: Callable[..., httpx.Client], fields: Fields
) -> None:
    gate = threading.Event()  # an endless stream
    origin.script = lambda asked: Answer(fields=fields, pieces=[b"first", b"last"], gate=gate)
    client = client_for(timeout=30)

    def first() -> bytes:
        with client.stream("GET", origin.url) as response:
            return next(response.iter_raw())

    with client.stream("GET", origin.url), ThreadPoolExecutor(1) as pool:
        assert pool.submit(first).result(PROMPT) == b"first"
        gate.set()


@pytest.mark.parametrize("beside", [{"Cache-Control": "only-if-cached, no-store"}, {"If-Match": '"1"'}], ids=str)
def test_only_if_cached_never_reaches_the_origin(
    origin: Scripted, client_for: Callable[..., httpx.Client], beside: dict[str, str]
) -> None:
    """RFC 9111 §5.2.1.7."""
    response = client_for().get(origin.url, headers={"Cache-Control": "only-if-cached", **beside})
    assert (response.status_code, origin.asked) == (504, [])


def test_cache_status_says_why_the_origin_was_asked(origin: Scripted, client_for: Callable[..., httpx.Client]) -> None:
    """RFC 9211 §2.2."""
    origin.script = lambda asked: Answer(b"x", fields={**FRESH, "ETag": '"1"'})
    client, demanding = client_for(), {"Cache-Control": "no-cache"}
    said = [client.get(origin.url, headers=fields).headers["cache-status"] for fields in (demanding, {}, demanding)]
    assert [one.split("; ")[1] for one in said] == ["fwd=miss", "hit", "fwd=request"]


def test_a_head_whose_length_a_chunked_body_has_takes_nothing_away(
    origin: Scripted, client_for: Callable[..., httpx.Client]
) -> None:
    chunked = Answer(fields={**FRESH, "ETag": '"1"'}, pieces=[b"ab", b"cd"])
    origin.script = in_turn(chunked, Answer(b"abcd", fields={"ETag": '"1"', **FRESH}))
    client = client_for()
    client.get(origin.url)
    client.head(origin.url, headers={"Cache-Control": "no-cache"})
    assert caching(client.get(origin.url)) == HIT


@pytest.mark.parametrize(
    ("target", "shared"),
    [
        ("/repos/o/r/actions/caches?key=npm-&ref=x", True),
        ("/list?pageToken=CAU", True),
        ("/list?next_page_token=CAU", True),
        ("/list?key=abc", False),
        ("/list?refresh_token=abc", False),
        ("/list?page_token=x&access_token=abc", False),
    ],
)
def test_a_place_in_a_list_is_no_secret(
    origin: Scripted, client_for: Callable[..., httpx.Client], target: str, shared: bool
) -> None:
    client = client_for()
    client.get(origin.url + target)
    assert (caching(client.get(origin.url + target)) == HIT) == shared


def test_versions_of_github_s_api_are_told_apart_though_its_vary_does_not_name_them(
    origin: Scripted, client_for: Callable[..., httpx.Client]
) -> None:
    def script(asked: Asked) -> Answer:
        version = asked.fields.get("x-github-api-version", "2022-11-28")
        return Answer(version.encode(), fields={**FRESH, "Vary": "Accept", "X-GitHub-Api-Version-Selected": version})

    origin.script = script
    client, name = client_for(), "X-GitHub-Api-Version"
    plain, same, other = {}, {name: "2022-11-28"}, {name: "2026-03-10"}
    asked: Sequence[dict[str, str]] = (plain, same, other, plain, other, same)
    responses = [client.get(origin.url, headers=fields) for fields in asked]
    assert [r.text for r in responses] == [fields.get(name, "2022-11-28") for fields in asked]
    assert [caching(r) == HIT for r in responses] == [False, True, False, True, True, True]


def test_a_slow_reader_does_not_put_an_older_answer_in_the_place_of_a_newer_one(
    origin: Scripted, client_for: Callable[..., httpx.Client]
) -> None:
    gate = threading.Event()
    first = Answer(fields=FRESH, pieces=[b"version", b" 1"], gate=gate)
    origin.script = in_turn(first, Answer(b"version 2", fields=FRESH))
    client = client_for()
    with client.stream("GET", origin.url) as slow:
        # As it would wait for itself, it is let go.
        assert client.get(origin.url).content == b"version 2"
        gate.set()
        assert slow.read() == b"version 1"
    assert client.get(origin.url).content == b"version 2"


def test_a_revalidation_in_the_background_that_breaks_off_holds_up_nobody(
    origin: Scripted, client_for: Callable[..., httpx.Client]
) -> None:
    body, cut = b"x" * 1000, {"Cache-Control": "max-age=60"}
    origin.script = in_turn(
        Answer(b"old", fields=STALE_WHILE_REVALIDATE), Answer(body, fields=cut, cut=10), Answer(b"new", fields=FRESH)
    )
    client = client_for(timeout=30)
    assert [client.get(origin.url).content for _ in range(2)] == [b"old", b"old"]
    origin.wait_for(2)
    began = time.monotonic()
    assert client.get(origin.url, headers={"Cache-Control": "no-cache"}).content == b"new"
    assert time.monotonic() - began < PROMPT


def test_a_response_that_is_dropped_unread_holds_up_nobody(
    origin: Scripted, client_for: Callable[..., httpx.Client]
) -> None:
    gate = threading.Event()
    origin.script = in_turn(Answer(fields=FRESH, pieces=[b"a", b"b"], gate=gate), Answer(b"whole", fields=FRESH))
    client = client_for(timeout=30)

    def drop() -> None:
        client.send(client.build_request("GET", origin.url), stream=True)

    drop()
    gc.collect()
    with ThreadPoolExecutor(1) as pool:  # another thread: the same would not wait for itself
        assert pool.submit(client.get, origin.url).result(PROMPT).content == b"whole"
    gate.set()
