from __future__ import annotations

import gzip
import math
from email.utils import formatdate

import httpx
import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from made import URL, an_entry, few, many

from httpx_p2pcache.entries import Entry
from httpx_p2pcache.exceptions import Rejected
from httpx_p2pcache.node.checks import MAX_FIELD_BYTES, MAX_FIELDS, MAX_FUTURE, MAX_RESIDENT, believed

NOW = 1_800_000_000.0
LIMIT = 10_000
GZIP = {"cache-control": ["max-age=60"], "content-encoding": ["gzip"]}
FRESH = {"cache-control": ["private, max-age=60"]}


def check(entry: Entry, resident: float = 0.0) -> Entry:
    return believed(entry, resident, NOW, LIMIT)


@given(st.floats(0, 2**32), st.floats(0, MAX_RESIDENT), st.floats(-1e9, 1e12))
@few
def test_an_entry_goes_on_ageing_from_where_it_was_when_it_was_sealed(
    age: float, resident: float, received: float
) -> None:
    """By whoever's clock it was received: only ours counts from now on."""
    entry = an_entry(initial_age=age, received=received)
    found = check(entry, resident)
    assert found == msgspec.structs.replace(entry, initial_age=age + resident, received=NOW)
    assert found.age(NOW + 5) == age + resident + 5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "HEAD", "body": b"", "headers": {**FRESH, "content-length": ["1234"]}},
        {"url": "http://[::1]:8080/x?page=2"},
        {"status": 404},
        {"status": 301, "headers": {"location": [f"{URL}/moved"]}},
        {"status": 301, "headers": {"location": ["/moved"]}},
        {"status": 404, "headers": FRESH},
        {"headers": {}},
        {"headers": {**FRESH, "content-length": ["9"], "date": [formatdate(NOW + 3000, usegmt=True)]}},
        {"headers": {**FRESH, "date": ["no date at all"]}},
        {"headers": {**FRESH, "vary": ["Accept, Authorization"]}},
        {"headers": {**FRESH, "x-text": ["caf\xe9\t!", ""]}},
        {"headers": {**FRESH, "link": [f'<{URL}?page=2>; rel="next", </x>; rel=last', "<?page=1>; rel=first"]}},
        {"headers": {**FRESH, "link": ['<https://docs.example/>; rel="help"']}},
        {"body": bytes(LIMIT)},
        {"selecting": {"authorization": "d" * 32, "accept": "text/html, application/json"}},
        {"identity": "e" * 32},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_what_an_honest_peer_sends_is_believed(changes: dict[str, object]) -> None:
    entry = an_entry(**changes)
    assert check(entry) == msgspec.structs.replace(entry, received=NOW)


def test_an_entry_is_as_old_as_its_date_says_as_far_as_clocks_agree() -> None:
    """RFC 9111 §4.2.3: what a member says of its age makes it older, never younger."""
    headers = {"cache-control": ["max-age=864000"], "date": [formatdate(NOW - 7 * 86400, usegmt=True)]}
    assert check(an_entry(headers=headers)).initial_age == 7 * 86400 - MAX_FUTURE


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"method": "POST"}, "method or URL"),
        ({"method": "get"}, "method or URL"),
        ({"url": "ftp://a.test/"}, "method or URL"),
        ({"url": "file:///etc/passwd"}, "method or URL"),
        ({"url": "HTTPS://A.TEST/"}, "method or URL"),
        ({"url": URL + "?access_token=hush"}, "credentials"),
        ({"selecting": {"authorization": "Bearer hush"}}, "credentials"),
        ({"selecting": {"cookie": "hush=1"}}, "credentials"),
        ({"selecting": {"x-api-key": "hush"}}, "credentials"),
        ({"body": bytes(LIMIT + 1)}, "larger than"),
        ({"headers": {f"x-{n}": ["1"] for n in range(MAX_FIELDS + 1)}}, "too many"),
        ({"headers": {"x": ["1"] * (MAX_FIELDS + 1)}}, "too many"),
        ({"headers": {"x": ["1" * MAX_FIELD_BYTES]}}, "too large"),
        ({"headers": {"x": []}}, "without a line"),
        ({"headers": {"": ["1"]}}, "RFC 9110 §5"),
        ({"headers": {"ETag": ["1"]}}, "RFC 9110 §5"),
        ({"headers": {":p2pcache": ["x", "0", "0"]}}, "RFC 9110 §5"),
        ({"headers": {"x y": ["1"]}}, "RFC 9110 §5"),
        ({"headers": {"x\n": ["1"]}}, "RFC 9110 §5"),
        ({"headers": {"x": ["a\r\nset-cookie: b"]}}, "RFC 9110 §5"),
        ({"headers": {"x": ["a\n"]}}, "RFC 9110 §5"),
        ({"headers": {"x": ["a\x00"]}}, "RFC 9110 §5"),
        ({"headers": {"x": ["\u20ac"]}}, "RFC 9110 §5"),
        ({"headers": {**FRESH, "set-cookie": ["a=b"]}}, "one user"),
        ({"headers": {**FRESH, "vary": ["accept", "*"]}}, "one user"),
        ({"headers": {**FRESH, "date": [formatdate(NOW + MAX_FUTURE + 1, usegmt=True)]}}, "future"),
        ({"headers": {**FRESH, "content-length": ["8"]}}, "Content-Length"),
        ({"headers": {**FRESH, "content-length": ["9", "9"]}}, "Content-Length"),
        ({"body": b"", "headers": {**FRESH, "content-length": ["9"]}}, "Content-Length"),
        ({"headers": {"cache-control": ["no-store"]}}, "RFC 9111 §3"),
        ({"headers": {"cache-control": ["max-age=60", 'ext="\\\\", No-Store, a="b"']}}, "RFC 9111 §3"),
        ({"status": 206, "headers": FRESH}, "RFC 9111 §3"),
        ({"status": 304, "headers": FRESH}, "RFC 9111 §3"),
        ({"status": 302, "headers": {}}, "RFC 9111 §3"),
        *(
            ({"status": status, "headers": FRESH}, "a refusal, or a failure")
            for status in (401, 403, 429, 451, 500, 503)
        ),
        ({"status": 301, "headers": {"location": ["https://elsewhere.example/"]}}, "Location"),
        ({"status": 301, "headers": {"location": ["//elsewhere.example/"]}}, "Location"),
        (
            {"body": gzip.compress(b"{}", mtime=0) + gzip.compress(b"evil", mtime=0), "headers": GZIP},
            "goes on after its end",
        ),
        ({"body": gzip.compress(b"{}", mtime=0) + b"?", "headers": GZIP}, "goes on after its end"),
        ({"body": gzip.compress(b"{}", mtime=0), "headers": {**FRESH, "content-encoding": ["x-gzip"]}}, "not checked"),
        (
            {"body": gzip.compress(b"{}", mtime=0), "headers": {**FRESH, "content-encoding": ["deflate"]}},
            "not in the coding",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_a_faulty_peer_sends_is_rejected_with_the_reason(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(Rejected, match=reason) as caught:
        check(an_entry(**changes))
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("resident", [-0.001, -1e300, MAX_RESIDENT + 1, math.inf, -math.inf, math.nan])
def test_an_impossible_time_on_the_way_is_rejected(resident: float) -> None:
    with pytest.raises(Rejected, match="on its way"):
        check(an_entry(), resident)


RELS = ["next", "prev", "first", "last"]


def pages(*lines: str) -> dict[str, list[str]]:
    return {**FRESH, "link": list(lines)}


@pytest.mark.parametrize(
    "link",
    [
        '<https://evil.example/>; rel="next"',
        "<https://evil.example/>; rel=next",
        "<//evil.example/>;rel=LAST",
        '<http://api.github.com/>; rel="prev"',
        '<https://api.github.com:8443/>; rel="first"',
        '<https://evil.example/>; rel="help next"',
        f'<{URL}>; rel="last", <https://evil.example/>; rel="next"',
        '<https://evil.example/>; title="a, b"; rel="next"',
        '<https://evil.example/>; title="<"; rel="next"',
        '<https://evil.example/>; rel = "next"',
        "<https://evil.example/>; rel='next'",
        '<https://evil.example/>; rel="next";',
    ],
)
def test_a_page_of_another_origin_is_rejected(link: str) -> None:
    with pytest.raises(Rejected, match="another origin"):
        check(an_entry(headers=pages(link)))


@pytest.mark.parametrize("target", ["http://[", "https://[::1", "https://a.test:port/", "https://a.test:99999/"])
def test_a_page_that_is_no_url_is_rejected(target: str) -> None:
    with pytest.raises(Rejected):
        check(an_entry(headers=pages(f'<{target}>; rel="next"')))


def test_an_entry_whose_own_url_is_none_is_rejected() -> None:
    with pytest.raises(Rejected):
        check(an_entry(url="https://[::1", headers=pages('</2>; rel="next"')))


targets = st.sampled_from([URL + "?page=2", "https://evil.example/", "/relative", "?page=3", "//evil.example/x"])
parameters = st.sampled_from(
    [
        *(f'; rel="{rel}"' for rel in RELS),
        "; rel=next",
        ';rel = "next"',
        '; title="a, b"',
        '; title="x"',
        ";",
        " ",
        "; rel",
    ]
)


@given(st.lists(st.tuples(targets, st.lists(parameters, max_size=3)), min_size=1, max_size=3))
@example([("https://evil.example/", ['; title="a, b"', '; rel="next"'])])
@many
def test_whoever_follows_the_links_of_a_believed_entry_stays_at_its_origin(
    links: list[tuple[str, list[str]]],
) -> None:
    """As httpx reads them."""
    line = ", ".join(f"<{target}>{''.join(more)}" for target, more in links)
    try:
        entry = check(an_entry(headers=pages(line)))
    except Rejected:
        return
    read = httpx.Response(200, headers=[("link", value) for value in entry.headers["link"]]).links
    followed = [httpx.URL(URL).join(read[rel]["url"]).host for rel in RELS if rel in read]
    assert set(followed) <= {"api.github.com"}


@given(
    st.dictionaries(st.text(max_size=12), st.lists(st.text(max_size=30), max_size=2), max_size=4),
    st.integers(200, 599),
    st.text(min_size=8, max_size=30) | st.text(max_size=20).map(lambda rest: "https://" + rest),
    st.dictionaries(st.text(max_size=12), st.text(max_size=40), max_size=2),
    st.floats(),
)
@many
def test_whatever_comes_is_believed_or_rejected_and_nothing_else(
    headers: dict[str, list[str]], status: int, url: str, selecting: dict[str, str], resident: float
) -> None:
    entry = an_entry(headers=headers, status=status, url=url, selecting=selecting)
    try:
        found = check(entry, resident)
    except Rejected:
        return
    assert math.isfinite(found.age(NOW))
    assert all(line.encode("latin-1") is not None for lines in found.headers.values() for line in lines)
