from __future__ import annotations

import string
import time
import uuid
from datetime import datetime, timezone
from email.utils import formatdate
from unittest import mock

import hishel
import pytest
from hishel import CacheOptions, Headers
from hypothesis import example, given
from hypothesis import strategies as st
from made import URL, a_request, an_entry, few, many

from httpx_p2pcache.freshness import (
    directives,
    freshened,
    http_date,
    initial_age,
    lifetime,
    machine_entry,
    machine_request,
    machine_response,
    must_not_be_stale,
    seconds,
    storable_fields,
    vary_names,
)

NOW = 1_800_000_000
OPTIONS = CacheOptions(shared=False, supported_methods=["GET", "HEAD"])

words = st.text(string.ascii_letters + string.digits + "-_.", min_size=1, max_size=10)
quotables = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=12)


def quoted(text: str) -> str:
    return '"' + text.replace("\\", r"\\").replace('"', r"\"") + '"'


def date_of(at: float) -> str:
    return formatdate(at, usegmt=True)


# Cache-Control


@pytest.mark.parametrize(
    ("lines", "parsed"),
    [
        ([], {}),
        ([""], {}),
        ([" , ,"], {}),
        (["max-age=60"], {"max-age": "60"}),
        (['max-age="60"'], {"max-age": "60"}),
        (["max-age = 60"], {"max-age": "60"}),
        (["MAX-AGE=60, Private"], {"max-age": "60", "private": None}),
        (["max-age=60,private", "must-revalidate"], {"max-age": "60", "private": None, "must-revalidate": None}),
        (["max-age="], {"max-age": None}),
        (['max-age=""'], {"max-age": None}),
        (['private="x-a, x-b", max-age=5'], {"private": "x-a, x-b", "max-age": "5"}),
        (['ext="a, no-store", private'], {"ext": "a, no-store", "private": None}),
        ([r'ext="a\"b\\c"'], {"ext": 'a"b\\c'}),
        (["max-age=60, max-age=30"], {"max-age": "30"}),
        (["max-age=30", "max-age=60"], {"max-age": "30"}),
        (["max-age=60, max-age=60"], {"max-age": "60"}),
        (["max-age=60, max-age"], {"max-age": None}),
        (["max-age=60, max-age=soon"], {"max-age": "0"}),
        (['no-cache="a", no-cache'], {"no-cache": None}),
        (['no-cache, no-cache="a"'], {"no-cache": None}),
        (['no-cache="a", no-cache="b"'], {"no-cache": "a,b"}),
        (["(comment), no-store"], {"no-store": None}),
        (["max-age=" + "9" * 10_000], {"max-age": "9" * 10_000}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_cache_control_is_read_as_rfc_9111_says(lines: list[str], parsed: dict[str, str | None]) -> None:
    assert directives({"cache-control": lines}) == parsed
    assert directives(Headers({"cache-control": lines})) == parsed


def test_without_the_field_there_is_no_directive() -> None:
    assert directives({}) == directives(Headers({})) == {}


@given(st.dictionaries(words.map(str.lower), st.none() | words | quotables, max_size=5), st.booleans())
@many
def test_what_is_written_is_what_is_read(written: dict[str, str | None], in_lines: bool) -> None:
    parts = [name if argument is None else f"{name}={quoted(argument)}" for name, argument in written.items()]
    assert directives({"cache-control": parts if in_lines else [" ,\t".join(parts)]}) == written


@given(st.lists(st.text(max_size=40), max_size=3))
@many
def test_nothing_that_is_sent_as_cache_control_breaks_the_reader(lines: list[str]) -> None:
    found = directives({"cache-control": lines})
    assert all(name == name.lower() and seconds(argument) >= 0 for name, argument in found.items())


def test_a_hostile_field_is_read_in_linear_time() -> None:
    began = time.perf_counter()
    for unit in ('a="', 'a="\\', "a ", 'a="b" ', "a=b ", '"', "=", " \t", 'a="x,'):
        directives({"cache-control": [unit * (60_000 // len(unit))]})
    assert time.perf_counter() - began < 5


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=4))
@few
def test_of_a_repeated_lifetime_the_shortest_counts_in_whatever_order(ages: list[int]) -> None:
    control = directives({"cache-control": [f"max-age={age}" for age in ages]})
    assert seconds(control["max-age"]) == min(min(ages), 2**31)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("0", 0),
        ("60", 60),
        (" 60 ", 60),
        ("0060", 60),
        ("2147483647", 2**31 - 1),
        ("2147483649", 2**31),
        ("9" * 10_000, 2**31),
        (None, 0),
        ("", 0),
        ("-1", 0),
        ("+1", 0),
        ("1.5", 0),
        ("1e3", 0),
        ("60s", 0),
        ("soon", 0),
    ],
    ids=lambda value: str(value)[:12],
)
def test_delta_seconds_that_are_absurd_are_bounded_and_malformed_ones_are_stale(
    argument: str | None, value: int
) -> None:
    assert seconds(argument) == value


# Dates


@pytest.mark.parametrize(
    "written", ["Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"]
)
def test_the_three_formats_of_a_date_say_the_same(written: str) -> None:
    assert http_date(written) == http_date(f"  {written} ") == 784_111_777


@given(st.datetimes(datetime(1970, 1, 1), datetime(9999, 12, 31)))  # noqa: DTZ001 - hypothesis wants naive bounds
@many
def test_a_date_that_is_written_is_read(naive: datetime) -> None:
    moment = naive.replace(microsecond=0, tzinfo=timezone.utc)
    day, month = moment.strftime("%a"), moment.strftime("%b")
    assert http_date(f"{day}, {moment:%d} {month} {moment.year:04} {moment:%H:%M:%S} GMT") == moment.timestamp()
    assert http_date(f"{day} {month} {moment.day:2} {moment:%H:%M:%S} {moment.year:04}") == moment.timestamp()


@given(st.integers(-49, 50), st.integers(0, 364 * 86400))
@few
def test_a_year_of_two_digits_is_at_most_fifty_years_ahead(years: int, offset: int) -> None:
    year = datetime.now(timezone.utc).year + years
    moment = datetime.fromtimestamp(datetime(year, 1, 1, tzinfo=timezone.utc).timestamp() + offset, timezone.utc)
    assert http_date(moment.strftime("%A, %d-%b-%y %H:%M:%S GMT")) == moment.timestamp()


def test_a_leap_second_counts_as_the_one_before_it() -> None:
    assert http_date("Sat, 31 Dec 2016 23:59:60 GMT") == http_date("Sat, 31 Dec 2016 23:59:59 GMT") is not None


@pytest.mark.parametrize(
    "written",
    [
        None,
        "",
        "0",
        "-1",
        "784111777",
        "1994-11-06T08:49:37Z",
        "06 Nov 1994 08:49:37 GMT",
        "Sun, 06 Nov 1994 08:49:37",
        "Sun, 06 Nov 1994 08:49:37 UTC",
        "Sun, 06 Nov 1994 08:49:37 +0000",
        "Sun, 06 Nov 1994 08:49:37 EST",
        "Sun, 06 Nov 94 08:49:37 GMT",
        "Sun, 6 Nov 1994 08:49:37 GMT",
        "Sun, 06 Nov 1994 8:49:37 GMT",
        "sun, 06 nov 1994 08:49:37 gmt",
        "Xxx, 06 Nov 1994 08:49:37 GMT",
        "Sun, 06 Xxx 1994 08:49:37 GMT",
        "Sun, 32 Nov 1994 08:49:37 GMT",
        "Wed, 30 Feb 1994 08:49:37 GMT",
        "Sun, 06 Nov 0000 08:49:37 GMT",
        "Sun, 06 Nov 1994 24:00:00 GMT",
        "Sun, 06 Nov 1994 08:60:00 GMT",
        "Sun, 06 Nov 1994 08:49:37 GMT, Sun, 06 Nov 1994 08:49:37 GMT",
        "Sunday, 06-Nov-1994 08:49:37 GMT",
        "Sun Nov 06 08:49:37 94",
        "Sun, 06 Nov 99999 08:49:37 GMT",
    ],
)
def test_anything_else_is_no_date(written: str | None) -> None:
    assert http_date(written) is None


@given(st.text(max_size=40))
@few
def test_nothing_that_is_sent_as_a_date_breaks_the_reader(text: str) -> None:
    assert http_date(text) is None or isinstance(http_date(text), float)


# Age


@pytest.mark.parametrize(
    ("fields", "delay", "age"),
    [
        ({}, 0.0, 0.0),
        ({}, 2.5, 2.5),
        ({"date": [date_of(NOW)]}, 0.0, 0.0),
        ({"date": [date_of(NOW - 90)]}, 0.0, 90.0),
        ({"date": [date_of(NOW + 7200)]}, 0.0, 0.0),  # the origin's clock is ahead
        ({"age": ["30"]}, 2.0, 32.0),
        ({"age": ["30"], "date": [date_of(NOW - 90)]}, 0.0, 90.0),
        ({"age": ["120"], "date": [date_of(NOW - 90)]}, 1.0, 121.0),
        ({"age": ["30", "90"]}, 0.0, 30.0),
        ({"age": ["30, 90"]}, 0.0, 30.0),
        ({"age": ["soon"]}, 0.0, 0.0),
        ({"age": ["-5"]}, 0.0, 0.0),
        ({"age": ["1.5"]}, 0.0, 0.0),
        ({"age": [""]}, 0.0, 0.0),
        ({"age": ["9" * 10_000]}, 0.0, float(2**31)),
        ({"date": ["yesterday"]}, 0.0, 0.0),
        ({"date": [date_of(NOW - 90), date_of(NOW)]}, 0.0, 0.0),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_age_on_arrival_is_the_corrected_initial_age(
    fields: dict[str, list[str]], delay: float, age: float
) -> None:
    assert initial_age(fields, NOW - delay, NOW) == age


def test_a_response_that_took_no_time_is_not_aged_by_the_whole_seconds_of_its_date() -> None:
    assert initial_age({"date": [date_of(NOW)]}, NOW + 0.9, NOW + 0.9) == 0.0


@given(st.integers(0, 10**6), st.integers(-(10**6), 10**6), st.floats(-100, 100))
@few
def test_whatever_the_clocks_say_an_age_is_at_least_what_was_seen_to_pass(age: int, skew: int, delay: float) -> None:
    """The clock may even have been set back between request and response: ``delay`` is negative then."""
    found = initial_age({"age": [str(age)], "date": [date_of(NOW - skew)]}, NOW - delay, NOW)
    assert found == pytest.approx(max(age + max(delay, 0), skew), abs=1e-6)


# Lifetime


@pytest.mark.parametrize(
    ("status", "fields", "expected"),
    [
        (200, {"cache-control": ["max-age=60"]}, 60),
        (200, {"cache-control": ["max-age=60, s-maxage=600"]}, 60),
        (200, {"cache-control": ["s-maxage=600"]}, 300),
        (200, {"cache-control": ["max-age=60"], "expires": [date_of(NOW + 999)]}, 60),
        (200, {"cache-control": ["max-age=soon"], "expires": [date_of(NOW + 999)]}, 0),
        (200, {"cache-control": ["max-age=99999999999999"]}, 2**31),
        (500, {"cache-control": ["max-age=60"]}, 60),
        (200, {"expires": [date_of(NOW + 120)], "date": [date_of(NOW)]}, 120),
        (200, {"expires": [date_of(NOW + 120)], "date": [date_of(NOW + 100)]}, 20),
        (200, {"expires": [date_of(NOW + 120)]}, 120),
        (200, {"expires": [date_of(NOW - 120)], "date": [date_of(NOW)]}, 0),
        (200, {"expires": ["0"]}, 0),
        (200, {"expires": [date_of(NOW + 120), date_of(NOW + 120)]}, 0),
        (200, {}, 300),
        (301, {}, 300),
        (404, {}, None),
        (500, {}, None),
        (200, {"last-modified": [date_of(NOW - 100)]}, 10),
        (200, {"last-modified": [date_of(NOW - 10**6)]}, 300),
        (200, {"last-modified": [date_of(NOW + 100)]}, 0),
        (200, {"last-modified": ["yesterday"]}, 300),
    ],
    ids=str,
)
def test_a_lifetime_is_the_first_that_the_response_names(
    status: int, fields: dict[str, list[str]], expected: float | None
) -> None:
    assert lifetime(an_entry(status=status, headers=fields, received=float(NOW)), 300.0) == expected


@given(
    st.sampled_from([200, 203, 301, 404, 500]),
    st.floats(0, 10_000),
    st.integers(-(10**7), 10**7),
    st.sampled_from(["public", "private", ""]),
)
@few
def test_a_guessed_lifetime_is_never_longer_than_the_default(
    status: int, default: float, modified: int, control: str
) -> None:
    fields = {"last-modified": [date_of(NOW + modified)], "cache-control": [control]}
    found = lifetime(an_entry(status=status, headers=fields, received=float(NOW)), default)
    assert found is None or 0 <= found <= default


@pytest.mark.parametrize(
    ("control", "forbidden"),
    [
        ("max-age=1", False),
        ("must-revalidate", True),
        ("no-cache", True),
        ('no-cache="set-cookie"', False),
        ("proxy-revalidate", False),
        ("stale-if-error=5", False),
    ],
)
def test_which_responses_must_not_be_used_stale(control: str, forbidden: bool) -> None:
    assert must_not_be_stale(an_entry(headers={"cache-control": [control]})) == forbidden


# What the machine is shown


@pytest.mark.parametrize(
    ("fields", "demands"),
    [
        ({}, False),
        ({"cache_control": "no-cache"}, True),
        ({"cache_control": "max-age=0"}, False),
        ({"cache_control": 'no-cache="x"'}, False),
        ({"pragma": "no-cache"}, True),
        ({"pragma": "No-Cache, x"}, True),
        ({"pragma": "no-cache", "cache_control": "max-age=60"}, False),
        ({"accept": "no-cache"}, False),
    ],
)
def test_a_request_demands_validation_by_no_cache_alone(fields: dict[str, str], demands: bool) -> None:
    shown = machine_request(a_request(**fields))
    assert dict(shown.headers) == ({"cache-control": "no-cache"} if demands else {})
    assert (shown.method, shown.url) == ("GET", URL)


def verdict(
    response: dict[str, list[str]], wishes: dict[str, str | None], age: float, now: float = NOW
) -> type[hishel.AnyState]:
    entry = an_entry(headers=response, received=now - age)
    with mock.patch("time.time", return_value=now):
        shown = machine_entry(entry, "GET", uuid.uuid4(), wishes, now, 300.0)
        return type(hishel.IdleClient(options=OPTIONS).next(machine_request(a_request()), [shown]))


@given(
    st.integers(0, 200),
    st.integers(0, 200),
    st.none() | st.integers(0, 200),
    st.none() | st.integers(0, 200),
    st.none() | st.just("any") | st.integers(0, 200),
    st.sampled_from(["", ", must-revalidate", ", no-cache", ', no-cache="x"', ", immutable"]),
)
@many
def test_an_entry_is_used_exactly_when_rfc_9111_allows_it(
    age: int, fresh_for: int, max_age: int | None, min_fresh: int | None, max_stale: int | str | None, more: str
) -> None:
    wishes: dict[str, str | None] = {}
    if max_age is not None:
        wishes["max-age"] = str(max_age)
    if min_fresh is not None:
        wishes["min-fresh"] = str(min_fresh)
    if max_stale is not None:
        wishes["max-stale"] = None if max_stale == "any" else str(max_stale)
    allowance = 0.0
    if max_stale is not None and more not in (", must-revalidate", ", no-cache"):
        allowance = float("inf") if isinstance(max_stale, str) else max_stale
    may = (
        age + (min_fresh or 0) < fresh_for + allowance
        and (max_age is None or (age <= max_age and max_age > 0))  # 0 is how clients ask for validation
        and more != ", no-cache"
    )
    state = verdict({"cache-control": [f"max-age={fresh_for}{more}"]}, wishes, float(age))
    assert (state is hishel.FromCache) == may


@given(st.floats(0, 100), st.floats(0, 1, exclude_max=True), st.integers(0, 100))
@many
def test_parts_of_seconds_never_make_a_stale_entry_fresh(age: float, part: float, fresh_for: int) -> None:
    state = verdict({"cache-control": [f"max-age={fresh_for}"]}, {}, age, NOW + part)
    if age >= fresh_for + 1e-6:
        assert state is not hishel.FromCache
    if age + 1 < fresh_for - 1e-6:
        assert state is hishel.FromCache


def stores(status: int, control: str, **fields: str) -> bool:
    miss = hishel.CacheMiss(options=OPTIONS, request=hishel.Request("GET", URL))
    response = hishel.Response(status, Headers({"cache-control": control, **fields}))
    return isinstance(miss.next(machine_response(response)), hishel.StoreAndUse)


@pytest.mark.parametrize(
    ("status", "control", "stored"),
    [
        (200, "", True),
        (200, "private", True),
        (200, "no-cache", True),
        (200, "no-store", False),
        (200, "No-Store, max-age=60", False),
        (200, "max-age=60, no-store, must-understand", True),
        (299, "max-age=60, no-store, must-understand", False),
        (500, "", False),
        (500, "max-age=60", True),
        (500, "public", True),
        (206, "max-age=60", False),
        (304, "max-age=60", False),
        (404, "", True),
    ],
)
def test_which_responses_may_be_stored(status: int, control: str, stored: bool) -> None:
    assert stores(status, control) == stored


@given(
    st.dictionaries(words.map(str.lower).filter(lambda w: w != "must-understand"), st.none() | quotables, max_size=4),
    st.integers(0, 4),
)
@example({"ext": "\\", "max-age": "60"}, 1)
@example({"ext": '", private="', "max-age": "60"}, 1)
@many
def test_no_store_is_heeded_whatever_stands_beside_it(beside: dict[str, str | None], at: int) -> None:
    parts = [name if argument is None else f"{name}={quoted(argument)}" for name, argument in beside.items()]
    parts.insert(at, "no-store")
    assert not stores(200, ", ".join(parts))


@given(st.dictionaries(words.map(lambda w: "x-" + w.lower()), st.none() | quotables, max_size=4))
@example({"x-a": 'a", no-store, b="'})
@few
def test_an_extension_that_nobody_knows_changes_nothing(beside: dict[str, str | None]) -> None:
    parts = [name if argument is None else f"{name}={quoted(argument)}" for name, argument in beside.items()]
    assert stores(200, ", ".join([*parts, "max-age=60"]))


# Fields


def test_the_members_of_vary_are_read_from_all_its_lines() -> None:
    assert vary_names({"vary": ["Accept, Cookie,", "accept , Authorization"]}) == ["accept", "authorization", "cookie"]
    assert vary_names({"vary": ["*"]}) == ["*"]
    assert vary_names({}) == []


def test_what_belongs_to_the_connection_is_not_stored() -> None:
    fields = {
        "Connection": "close, X-Hop",
        "Keep-Alive": "timeout=5",
        "Proxy-Authenticate": "Basic",
        "TE": "trailers",
        "Trailer": "X-Sum",
        "Transfer-Encoding": "chunked",
        "Upgrade": "h2c",
        "X-Hop": "1",
        "ETag": '"x"',
        "Link": ["<a>; rel=next", "<b>; rel=last"],
    }
    assert storable_fields(Headers(fields)) == {"etag": ['"x"'], "link": ["<a>; rel=next", "<b>; rel=last"]}


def test_the_fields_that_no_cache_names_are_not_stored() -> None:
    fields = Headers({"cache-control": 'no-cache="X-Once, x-twice"', "x-once": "1", "x-twice": "2", "etag": '"x"'})
    assert sorted(storable_fields(fields)) == ["cache-control", "etag"]


def test_an_unqualified_no_cache_takes_no_field_away() -> None:
    assert sorted(storable_fields(Headers({"cache-control": "no-cache", "etag": '"x"'}))) == ["cache-control", "etag"]


def test_a_304_updates_the_stored_fields_but_not_those_that_describe_the_body() -> None:
    stored = {
        "etag": ['W/"x"'],
        "date": ["then"],
        "content-length": ["9"],
        "content-encoding": ["gzip"],
        "link": ["<a>", "<b>"],
        "x-kept": ["1"],
    }
    not_modified = Headers(
        {
            "ETag": '"x"',
            "Date": "now",
            "Content-Length": "0",
            "Content-Encoding": "br",
            "Content-Range": "bytes 0-1/2",
            "Link": "<c>",
            "Connection": "x-hop",
            "X-Hop": "1",
            "X-New": "2",
        }
    )
    assert freshened(stored, not_modified) == {
        "etag": ['"x"'],
        "date": ["now"],
        "content-length": ["9"],
        "content-encoding": ["gzip"],
        "link": ["<c>"],
        "x-kept": ["1"],
        "x-new": ["2"],
    }
    assert stored["etag"] == ['W/"x"']
