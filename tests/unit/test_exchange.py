from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from unittest import mock

import hishel
import httpx
import pytest
from hishel import CacheOptions
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from made import a_request, an_entry

from httpx_p2pcache import P2PCacheTransport, Settings, runner
from httpx_p2pcache.answers import NOT_LOOKED, Answer, Miss
from httpx_p2pcache.entries import Entry, cache_key
from httpx_p2pcache.exchange import Exchange
from httpx_p2pcache.freshness import directives, machine_entry, machine_request, vary_names

NOW = 1_800_000_000.0
DEFAULT_TTL = 300.0
OPTIONS = CacheOptions(shared=False, supported_methods=["GET", "HEAD"])
TOKENS = ("", "Bearer one", "Bearer two")

numbers = itertools.count()


@pytest.fixture(scope="module")
def exchange(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exchange]:
    directory: Path = tmp_path_factory.mktemp("store")
    held = runner.acquire(Settings(dir=directory, enable_p2p=False, default_ttl=DEFAULT_TTL))
    held.store.behind = False  # its thread would outlive a test
    yield held
    runner.release(held)


def date_of(offset: float) -> str:
    return formatdate(NOW + offset, usegmt=True)


fields = st.fixed_dictionaries(
    {
        "cache-control": st.lists(
            st.sampled_from(
                [
                    *("max-age=0", "max-age=1", "max-age=60", "max-age=61", "max-age=99999999999", "max-age=soon"),
                    *("private", "public", "no-cache", 'no-cache="x"', "must-revalidate", "s-maxage=9", "no-store"),
                ]
            ),
            max_size=3,
        ).map(lambda parts: [", ".join(parts)])
    },
    optional={
        "expires": st.sampled_from([date_of(60), date_of(-60), "0"]).map(lambda value: [value]),
        "date": st.sampled_from([date_of(0), date_of(-30), date_of(3600), "soon"]).map(lambda value: [value]),
        "last-modified": st.sampled_from([date_of(-600), date_of(600)]).map(lambda value: [value]),
        "vary": st.sampled_from(["accept", "Accept, Authorization", "*", "x-tenant"]).map(lambda value: [value]),
        "etag": st.just(['"x"']),
    },
)
askers = st.fixed_dictionaries(
    {},
    optional={
        "accept": st.sampled_from(["text/plain", "text/html, text/plain"]),
        "authorization": st.sampled_from(TOKENS[1:]),
        "x_tenant": st.sampled_from(["a", "b"]),
    },
)
# Seconds, and parts of them: what is rounded must be rounded against freshness.
ages = st.sampled_from([0.0, 0.4, 1.0, 59.0, 59.2, 60.0, 60.5, 299.0, 299.9, 300.0]) | st.floats(0, 400)


@st.composite
def stored_entries(draw: st.DrawFn) -> dict[str, object]:
    return {
        "method": draw(st.sampled_from(["GET", "GET", "HEAD"])),
        "status": draw(st.sampled_from([200, 200, 404, 500])),
        "headers": draw(fields),
        "asked": draw(askers),
        "initial_age": draw(st.just(0.0) | ages),
        "received": NOW - draw(ages | st.floats(-50, 0)),
    }


def machine_says(entries: list[Entry], request: hishel.Request, now: float) -> tuple[hishel.AnyState, list[str]]:
    """The machine's verdict on entries that the request may have and selects, and the Date it was shown of each."""
    with mock.patch("time.time", return_value=now):
        shown = [
            machine_entry(entry, request.method, uuid.UUID(int=n), {}, now, DEFAULT_TTL)
            for n, entry in enumerate(entries)
        ]
        state = hishel.IdleClient(options=OPTIONS).next(machine_request(request), shown)
    return state, [one.response.headers["date"] for one in shown]


def for_all(entry: Entry) -> bool:
    """Whether another identity may have it as it is: public, and not for shared caches alone."""
    control = directives(entry.headers)
    return "public" in control and not {"private", "s-maxage", "proxy-revalidate"} & set(control)


PUBLIC = {"cache-control": ["public, max-age=600"]}


@given(
    st.lists(stored_entries(), min_size=1, max_size=4),
    st.sampled_from(["GET", "HEAD"]),
    askers,
    st.floats(0, 1, exclude_max=True),
)
@example(  # the most recent by Date is not the one that was received last
    [
        {"headers": PUBLIC, "asked": {}, "initial_age": 0.0, "received": NOW - 10},
        {"headers": PUBLIC, "asked": {"authorization": TOKENS[1]}, "initial_age": 100.0, "received": NOW - 5},
    ],
    "GET",
    {},
    0.0,
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_hot_path_answers_only_what_the_machine_would_and_with_the_same_entry(
    exchange: Exchange, kept: list[dict[str, object]], method: str, asks: dict[str, str], part: float
) -> None:
    keyring, now = exchange.keyring, NOW + part
    request = a_request(method, f"https://origin.example/{next(numbers)}", **asks)
    for one in kept:
        changes = dict(one)
        asked = a_request(url=request.url, **changes.pop("asked"))  # type: ignore[arg-type] # str to str
        headers = changes["headers"]
        assert isinstance(headers, dict)
        asker = keyring.asker(asked)
        entry = an_entry(
            **changes,
            url=request.url,
            identity=asker.identity,
            selecting=keyring.selecting(asked.headers, vary_names(headers)),
            body=b"%d" % next(numbers),
        )
        exchange.store.save(asker.vouch(entry))
    held = exchange.store.load(cache_key(request.url))
    held.sort(key=lambda stored: stored.made, reverse=True)
    usable = [
        entry
        for entry in (stored.entry for stored in held)
        if (entry.identity == keyring.asker(request).identity or for_all(entry))
        and (entry.method == method or (method, entry.method) == ("HEAD", "GET"))
        and all(
            name != "*" and keyring.selecting_value(request.headers, name) == entry.selecting.get(name)
            for name in vary_names(entry.headers)
        )
    ][:1]  # the most recent alone (RFC 9111 §4)
    with mock.patch("time.time", return_value=now):
        answer = exchange.hit(request)
    state, dates = machine_says(usable, request, now)
    if isinstance(answer, Miss):
        if all(entry.received <= now for entry in usable):
            in_a_second, _ = machine_says(usable, request, now + 1)
            assert not isinstance(in_a_second, hishel.FromCache), "fresh for a second more, and not answered"
        return
    assert isinstance(state, hishel.FromCache)
    assert answer.stored is not None
    assert dates[usable.index(answer.stored.entry)] == dates[state.entry.id.int]
    assert answer.age == answer.stored.entry.age(now)


@pytest.mark.parametrize(
    "fields",
    [
        {"cache_control": "max-age=5"},
        {"cache_control": "no-cache"},
        {"cache_control": "only-if-cached"},
        {"pragma": "no-cache"},
        {"if_none_match": '"x"'},
        {"if_modified_since": date_of(0)},
        {"range": "bytes=0-1"},
    ],
    ids=str,
)
def test_a_request_that_asks_something_special_is_not_for_the_hot_path(
    exchange: Exchange, fields: dict[str, str]
) -> None:
    url = f"https://origin.example/{next(numbers)}"
    exchange.store.save(an_entry(url=url))
    assert isinstance(exchange.hit(a_request(url=url)), Answer)
    assert exchange.hit(a_request(url=url, **fields)) is NOT_LOOKED


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "get"])
def test_other_methods_are_not_for_the_hot_path(exchange: Exchange, method: str) -> None:
    url = f"https://origin.example/{next(numbers)}"
    exchange.store.save(an_entry(url=url))
    assert exchange.hit(a_request(method, url)) is NOT_LOOKED


@pytest.mark.parametrize("location", ["http://[", "https://[::1", "//[x/", "https://a.test:port/", "\xff", " "])
@pytest.mark.parametrize("name", ["Location", "Content-Location"])
def test_a_location_that_is_no_url_does_not_fail_the_request(local: Settings, name: str, location: str) -> None:
    def created(request: httpx.Request) -> httpx.Response:
        return httpx.Response(201, headers=[(name.encode(), location.encode("latin-1"))])

    with httpx.Client(transport=P2PCacheTransport(httpx.MockTransport(created), settings=local)) as client:
        assert client.post("https://origin.example/things").status_code == 201
