"""GitHub's rules: the entity tags that can be computed, and what a 304 does not tell."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hishel import Headers
from hypothesis import given
from hypothesis import strategies as st

from httpx_p2pcache import Settings
from httpx_p2pcache.conditions import opaque
from httpx_p2pcache.entries import Entry, body_digest
from httpx_p2pcache.freshness import http_date
from httpx_p2pcache.github import GitHub, computed_etag, decoded, family, links_stay, may_have_grown
from httpx_p2pcache.stats import Stats
from httpx_p2pcache.testing import github_etag

RECORDED = Path(__file__).parents[3] / "shared" / "data" / "github.har"
URL = "https://api.github.com/repos/octo-org/octo-repo/issues"


def entry(body: bytes = b"{}", url: str = URL, **headers: str) -> Entry:
    fields = {name.replace("_", "-"): [value] for name, value in headers.items()}
    return Entry(
        method="GET",
        url=url,
        identity="a" * 32,
        selecting={},
        status=200,
        headers={"cache-control": ["private, max-age=60"], "vary": ["Accept, Authorization, Cookie"], **fields},
        body=body,
        digest=body_digest(body),
        initial_age=0.0,
        received=0.0,
    )


def github(**changes: object) -> tuple[GitHub, Stats]:
    stats = Stats()
    return GitHub(Settings(**changes), stats), stats  # type: ignore[arg-type] # heterogeneous on purpose


def test_the_tag_is_that_of_the_published_example() -> None:
    headers = Headers({"Accept": "application/vnd.github+json", "Authorization": "Bearer T"})
    import hashlib

    assert computed_etag(headers, b"B") == hashlib.sha256(b"application/vnd.github+json:Bearer T:B").hexdigest()


@pytest.mark.skipif(not RECORDED.exists(), reason="the recorded exchanges are not here")
def test_recorded_tags_in_which_no_token_plays_a_part_are_reproduced() -> None:
    """Of public answers newer than February 2023, all; what PyGithub sends unrecorded is ``Accept: */*``."""
    found = []
    for exchange in json.loads(RECORDED.read_bytes())["log"]["entries"]:
        sent = {field["name"].lower(): field["value"] for field in exchange["request"]["headers"]}
        got = {field["name"].lower(): field["value"] for field in exchange["response"]["headers"]}
        date = http_date(got.get("date"))
        if "public" not in got.get("cache-control", "") or "etag" not in got or date is None or date < 1675209600:
            continue
        body = exchange["response"]["content"]["text"].encode()
        found.append(computed_etag({"accept": sent.get("accept", "*/*")}, body) == opaque(got["etag"]))
    assert found == [True, True, True]


@given(st.binary(max_size=2000), st.text("abc/*+; =", max_size=20), st.text("abcdef123", max_size=40))
def test_the_stand_in_origin_follows_the_same_rule(body: bytes, accept: str, token: str) -> None:
    fields = {"Accept": accept, "Authorization": f"Bearer {token}"}
    assert computed_etag(Headers(dict(fields)), body) == github_etag(body, fields)


def test_a_coded_body_is_decoded_before_it_is_hashed() -> None:
    assert decoded(entry(gzip.compress(b"[1]", mtime=0), content_encoding="gzip")) == b"[1]"


@pytest.mark.parametrize(
    ("body", "coding"),
    [
        (b"not gzip", "gzip"),
        (gzip.compress(b"cut short", mtime=0)[:-3], "gzip"),
        (b"\x00", "br"),
        (gzip.compress(bytes(80 * 1024**2), 9, mtime=0), "gzip"),
    ],
    ids=["no gzip", "cut short", "unknown coding", "bomb"],
)
def test_a_body_that_cannot_be_decoded_has_no_tag(body: bytes, coding: str) -> None:
    rules, _ = github()
    assert rules.validator(Headers({}), entry(body, content_encoding=coding), {}) is None


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://api.github.com/repos/o/r/pulls/7/files", "repos/pulls/*/files"),
        ("https://api.github.com/repositories/55/pulls/9/files", "repos/pulls/*/files"),
        ("https://api.github.com/users/octocat/repos", "users/repos"),
        ("https://api.github.com/user/583231/repos", "users/repos"),
        ("https://api.github.com/user/repos", "/user/repos"),
        ("https://ghe.example/api/v3/orgs/x/teams", "orgs/teams"),
        ("https://api.github.com/repos/o/r/commits/0791cc7b1a706ab5d7c607ddf", "repos/commits/*"),
    ],
)
def test_paths_of_one_kind_are_one_family(url: str, expected: str) -> None:
    assert family(url) == expected


@pytest.mark.parametrize(
    ("link", "stays"),
    [
        ("", True),
        ('<https://api.github.com/repositories/5/issues?page=2>; rel="next"', True),
        ('<https://evil.example/repositories/5/issues?page=2>; rel="next"', False),
        ('<https://api.github.com/user/keys>; rel="next"', False),
        ('<https://api.github.com/repositories/5/issues?page=7>; rel="last"', True),
        ('<https://api.github.com/repositories/5/issues?page=3>; rel="next"', False),
        ('<https://api.github.com/repositories/5/issues?page=1>; rel="next"', False),
        ('<https://api.github.com/repositories/5/issues?page=2&per_page=1>; rel="next"', False),
        ('<https://api.github.com/repositories/5/issues?after=abc>; rel="next"', False),
        ('<https://api.github.com/repositories/5/issues?page=2>; rel="next last"', False),
        ('<https://api.github.com/repositories/5/issues?page=2>; rel="next"; rel="last"', False),
        ('<https://api.github.com/repositories/5/issues?page=2>; rel="previous"', False),
        ("<https://api.github.com/repositories/5/issues?page=2>; REL=NEXT", True),
        ('<https://api.github.com/repositories/5/issues>; rel="alternate"', True),
    ],
)
def test_a_link_is_used_only_within_its_origin_and_family_and_to_the_pages_around_it(link: str, stays: bool) -> None:
    assert links_stay(entry(link=link)) is stays


@pytest.mark.parametrize(
    ("items", "query", "link", "grown"),
    [
        (29, "", "", False),
        (30, "", "", True),
        (30, "", '<https://api.github.com/x?page=2>; rel="next"', False),
        (30, "", '<https://api.github.com/x?page=1>; rel="prev"', True),
        (30, "?per_page=100", "", False),
        (100, "?per_page=100", "", True),
        (100, "?per_page=200", "", True),
        (
            1,
            "?per_page=1",
            '<https://api.github.com/x?page=2>; rel="next", <https://api.github.com/x>; rel="last"',
            True,
        ),
    ],
)
def test_only_a_full_last_page_may_have_grown(items: int, query: str, link: str, grown: bool) -> None:
    assert may_have_grown(entry(json.dumps(list(range(items))).encode(), URL + query, link=link)) is grown


def test_a_search_result_is_a_page_as_well() -> None:
    body = json.dumps({"total_count": 30, "items": list(range(30))}).encode()
    assert may_have_grown(entry(body))
    assert not may_have_grown(entry(json.dumps({"labels": list(range(30))}).encode()))


def test_a_family_where_the_rule_fails_is_left_alone_until_it_holds_again() -> None:
    rules, stats = github()
    headers = Headers({"Accept": "a", "Authorization": "t"})
    rules.learn(headers, entry(etag='W/"another"'))
    assert not rules.shares("GET", URL, headers)
    assert rules.shares("GET", "https://api.github.com/repos/octo-org/octo-repo/pulls", headers)
    for _ in range(2):
        rules.learn(headers, entry(etag=f'W/"{computed_etag(headers, b"{}")}"'))
    assert rules.shares("GET", URL, headers)
    assert (stats.snapshot()["validators_held"], stats.snapshot()["validators_failed"]) == (2, 1)


def test_a_host_where_the_rule_mostly_fails_is_given_up_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    rules, _ = github()
    headers = Headers({"Accept": "a", "Authorization": "t"})
    for number in range(20):
        rules.learn(headers, entry(url=f"https://api.github.com/kind-{'x' * number}", etag='"another"'))
    assert not rules.shares("GET", "https://api.github.com/never/asked", headers)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("changes", "method", "url", "agent", "shares"),
    [
        ({}, "GET", URL, "python-httpx/0.28", True),
        ({}, "HEAD", URL, "python-httpx/0.28", False),
        ({}, "GET", "https://example.com/", "python-httpx/0.28", False),
        ({}, "GET", URL, "curl/8.5", False),
        ({}, "GET", URL, "Mozilla/5.0 (X11) Firefox/130", False),
        ({"computed_validators": False}, "GET", URL, "python-httpx/0.28", False),
        ({"shared_identity": True}, "GET", URL, "python-httpx/0.28", False),
        ({"github_hosts": ("ghe.example:8443",)}, "GET", "https://ghe.example:8443/api/v3/user", "x", True),
    ],
)
def test_another_identitys_entry_helps_only_where_the_rule_can_hold(
    changes: dict[str, object], method: str, url: str, agent: str, shares: bool
) -> None:
    rules, _ = github(**changes)
    assert rules.shares(method, url, Headers({"User-Agent": agent})) is shares


@pytest.mark.parametrize(
    ("kind", "usable"),
    [("application/json", True), ("application/json; charset=utf-8", True), ("text/plain; charset=utf-16", False)],
)
def test_a_body_whose_characters_no_304_speaks_of_is_not_proven(kind: str, usable: bool) -> None:
    told = entry(b"{}", **{"content-type": kind})
    assert (github()[0].validator(Headers({}), told, {}) is not None) is usable
