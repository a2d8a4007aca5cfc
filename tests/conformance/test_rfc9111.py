"""RFC 9111 as a private cache has to obey it: scripted origin answers, requests, and what of them may reach the origin.

Each scenario is a tuple of steps, run through a sync client and through an async one on asyncio and on trio. The clock
stands still, but for the seconds that a step lets pass before its request.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate

import httpx
import pytest
from scripted import Answer, Asked, Scripted

from httpx_p2pcache import P2PCacheTransport, Settings

CONTEXT = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # never used: every origin here is plain, and loading one takes long
Fields = Mapping[str, str | float | None] | Sequence[tuple[str, str | float | None]]


ETAG = {"ETag": '"v1"'}


@dataclass(frozen=True)
class Step:
    """One request. ``answer`` is what the origin says to it; None: it must not be asked."""

    answer: Answer | None
    body: str = ""
    status: int = 200
    method: str = "GET"
    path: str = "/thing"
    request: Fields = field(default_factory=dict)
    after: float = 0.0  # seconds that pass before it
    sent: Mapping[str, str | None] = field(default_factory=dict)  # what the origin must see of these; None: nothing
    seen: Mapping[str, str | None] = field(default_factory=dict)  # what the caller must see of these; None: nothing


def fetched(
    body: str = "one",
    cc: str | None = None,
    fields: Fields = (),
    *,
    status: int = 200,
    cut: int | None = None,
    **step: object,
) -> Step:
    """The request reaches the origin, and the caller gets its full answer."""
    return Step(Answer(body.encode(), status, _pairs(cc, fields), cut=cut), body, status, **step)  # type: ignore[arg-type]


def validated(body: str = "one", cc: str | None = None, fields: Fields = (), **step: object) -> Step:
    """The request reaches the origin, which says 304; the caller gets the stored body."""
    return Step(Answer(b"", 304, _pairs(cc, fields)), body, **step)  # type: ignore[arg-type]


def instead(body: str, origin: Answer, **step: object) -> Step:
    """The origin says something, and the caller gets the stored body instead."""
    return Step(origin, body, **step)  # type: ignore[arg-type]


def stored(body: str = "one", **step: object) -> Step:
    """The caller gets the stored body, and the origin is not asked."""
    return Step(None, body, **step)  # type: ignore[arg-type]


def part(body: str, first: int, cc: str = "max-age=60", fields: Fields = ETAG, **step: object) -> Step:
    """The request reaches the origin, which answers with the part of ten bytes that begins at ``first``."""
    held = {"Content-Range": f"bytes {first}-{first + len(body) - 1}/10", "X-Mine": "yes", **dict(_pairs(None, fields))}
    return fetched(body, cc, held, status=206, **step)


def completed(rest: str, first: int, body: str, **step: object) -> Step:
    """The origin is asked for the rest alone; the caller gets the whole."""
    answer = part(rest, first).answer
    return Step(answer, body, sent={"range": f"bytes={first}-", "if-range": '"v1"'}, **step)  # type: ignore[arg-type]


def _pairs(cc: str | None, fields: Fields) -> list[tuple[str, str | float | None]]:
    pairs = list(fields.items()) if isinstance(fields, Mapping) else list(fields)
    return [*pairs, ("Cache-Control", cc)] if cc is not None else pairs


def cc(value: str) -> dict[str, str]:
    return {"Cache-Control": value}


DATED = {"Last-Modified": "Tue, 01 Jan 2019 00:00:00 GMT"}
NO_LIFETIME = {"Expires": "0"}

SCENARIOS: dict[str, tuple[Step, ...]] = {
    # --- freshness, §4.2 -------------------------------------------------------------------------------------------
    "max-age gives the lifetime (5.2.2.1)": (
        fetched(cc="max-age=60"),
        stored(after=50, seen={"age": "50"}),
        fetched("two", "max-age=60", after=11),
        stored("two"),
    ),
    "max-age counts before Expires (5.3)": (fetched(cc="max-age=60", fields={"Expires": -100}), stored(after=30)),
    "max-age=0 counts before an Expires in the future (5.3)": (
        fetched(cc="max-age=0", fields={"Expires": 100}),
        fetched("two"),
    ),
    "s-maxage says nothing to a private cache (5.2.2.10)": (
        fetched(cc="max-age=0, s-maxage=60"),
        fetched("two", "max-age=60, s-maxage=0"),
        stored("two", after=30),
    ),
    "Expires less Date gives the lifetime (4.2.1)": (
        fetched(fields={"Expires": 60}),
        stored(after=50),
        fetched("two", after=20),
    ),
    "Expires is compared with the origin's own Date, not with our clock (4.2.1)": (
        fetched(fields={"Expires": 3660, "Date": 3600}),
        stored(after=50),
        fetched("two", after=20),
    ),
    "Expires: 0 is a time in the past (5.3)": (fetched(fields={"Expires": "0"}), fetched("two")),
    "Expires in an unknown format is a time in the past (5.3)": (
        fetched(fields={"Expires": "next Thursday"}),
        fetched("two", fields={"Expires": "Thu, 32 Jan 2090 00:00:00 GMT"}),
        fetched("three", fields={"Expires": "2090-01-01T00:00:00Z"}),
        fetched("four", fields={"Expires": "Mon, 01 Jan 2090 00:00:00 +0100"}),
        fetched("five"),
    ),
    "Expires more than once is a time in the past (4.2.1)": (
        fetched(fields=[("Expires", 60), ("Expires", 600)]),
        fetched("two"),
    ),
    "an obsolete RFC 850 date is understood (RFC 9110 5.6.7)": (
        fetched(fields={"Expires": "Sunday, 01-Jan-62 00:00:00 GMT"}),
        stored(after=1000),
    ),
    "an obsolete asctime date is understood (RFC 9110 5.6.7)": (
        fetched(fields={"Expires": "Sun Jan  1 00:00:00 2062"}),
        stored(after=1000),
    ),
    "a response without any lifetime gets CACHE_DEFAULT_TTL (4.2.2)": (
        fetched(),
        stored(after=290),
        fetched("two", after=20),
    ),
    "a response without any lifetime stays fresh for a tenth of its age at most (4.2.2)": (
        fetched(fields={"Last-Modified": -1000}),
        stored(after=90),
        fetched("two", after=20),
    ),
    "a Last-Modified in the future gives no lifetime (4.2.2)": (
        fetched(fields={"Last-Modified": 1000}),
        fetched("two"),
    ),
    # --- Age and Date, §4.2.3, §5.1 --------------------------------------------------------------------------------
    "Age counts against the lifetime (4.2.3)": (
        fetched(cc="max-age=60", fields={"Age": "50"}),
        stored(after=5, seen={"age": "55"}),
        fetched("two", after=10),
    ),
    "an Age beyond the lifetime makes a response stale at once (4.2.3)": (
        fetched(cc="max-age=60", fields={"Age": "61"}),
        fetched("two"),
    ),
    "a Date in the past counts against the lifetime (4.2.3)": (
        fetched(cc="max-age=60", fields={"Date": -50}),
        stored(after=5, seen={"age": "55"}),
        fetched("two", after=10),
    ),
    "of Age and Date the larger counts (4.2.3)": (
        fetched(cc="max-age=100", fields={"Date": -20, "Age": "70"}),
        stored(after=10, seen={"age": "80"}),
        fetched("two", "max-age=100", {"Date": -70, "Age": "20"}, after=30),
        stored("two", after=10, seen={"age": "80"}),
    ),
    "a Date in the future does not make a response younger than new (4.2.3)": (
        fetched(cc="max-age=60", fields={"Date": 500}),
        stored(after=50, seen={"age": "50"}),
        fetched("two", after=20),
    ),
    "an Age that is no number is ignored (5.1)": (
        fetched(cc="max-age=60", fields={"Age": "old"}),
        stored(after=50),
        fetched("two", "max-age=60", {"Age": "-5"}, after=20),
        stored("two", after=50),
    ),
    "of several Age values the first counts (5.1)": (
        fetched(cc="max-age=60", fields={"Age": "50, 0"}),
        fetched("two", after=20),
    ),
    "a Date that is none does not disturb max-age (4.2.3)": (
        fetched(cc="max-age=60", fields={"Date": "today"}),
        stored(after=50),
        fetched("two", after=20),
    ),
    "an Age beyond every number is as old as can be (1.2.2)": (
        fetched(cc="max-age=60", fields={"Age": "9" * 40}),
        fetched("two"),
    ),
    "every answer from the store has one Age (5.1)": (
        fetched(cc="max-age=60", fields={"Age": "7"}),
        stored(after=3, seen={"age": "10"}),
        stored(after=10, seen={"age": "20"}),
    ),
    # --- Cache-Control as it comes, §5.2, §1.2.2 -------------------------------------------------------------------
    "directive names are compared without case (5.2)": (
        fetched(cc="MAX-AGE=60"),
        stored(),
        fetched("two", "No-Store", after=61),
        fetched("three"),
    ),
    "a quoted max-age is understood (5.2)": (fetched(cc='max-age="60"'), stored(after=50), fetched("two", after=20)),
    "directives on several lines count together (RFC 9110 5.3)": (
        fetched(fields=[("Cache-Control", "max-age=60"), ("Cache-Control", "no-store")]),
        fetched("two"),
    ),
    "empty members of the list are ignored (RFC 9110 5.6.1)": (fetched(cc=", ,max-age=60,,"), stored(after=50)),
    "an unknown directive is ignored (5.2.3)": (
        fetched(cc='community="UCI", max-age=60, immutable, foo=bar'),
        stored(after=50),
    ),
    "what an unknown directive quotes is no directive (5.2.3)": (
        fetched(cc='x="a, no-store, max-age=0", max-age=60'),
        stored(after=50),
    ),
    "what an unknown directive quotes does not lengthen a lifetime": (
        fetched(cc='x="a, max-age=600", max-age=0'),
        fetched("two", 'x="\\", max-age=600", max-age=0'),
        fetched("three"),
    ),
    "no-store with an argument is still no-store (5.2.2.5)": (fetched(cc="no-store=1, max-age=60"), fetched("two")),
    "the smallest of several max-age counts (4.2.1)": (
        fetched(cc="max-age=600, max-age=10"),
        stored(after=5),
        fetched("two", after=10),
    ),
    "a max-age that is no number makes a response stale (4.2.1)": (
        fetched(cc="max-age=soon"),
        fetched("two", "max-age=-1"),
        fetched("three", "max-age=1.5"),
        fetched("four", "max-age"),
        fetched("five", "max-age="),
        fetched("six", "max-age=60;no-cache"),
        fetched("seven"),
    ),
    "a max-age beyond every number is as long as can be (1.2.2)": (
        fetched(cc="max-age=" + "9" * 40),
        stored(after=86400 * 365),
    ),
    "Cache-Control that cannot be read never fails a request": (
        fetched("1", '"'),
        fetched("2", '=,"="no-cache;"max-age=\\', after=301),
        fetched("3", 'private="', after=301),
        fetched("4", 'no-cache="a\\"b", max-age=0', after=301),
        fetched("5", "\x01\x02=\x03", after=301),
        fetched("6", "caf\xe9=\xff, max-age=0", after=301),
        fetched("7", "," * 4000, after=301),
    ),
    # --- what may be stored, §3 ------------------------------------------------------------------------------------
    "no-store is not stored (5.2.2.5)": (fetched(cc="no-store, max-age=60"), fetched("two")),
    "private is stored by a private cache (5.2.2.7)": (fetched(cc="private, max-age=60"), stored(after=50)),
    "private with field names is stored whole by a private cache (5.2.2.7)": (
        fetched(cc='private="x-mine", max-age=60', fields={"X-Mine": "1"}),
        stored(seen={"x-mine": "1"}),
    ),
    "an answer to a request with Authorization is stored for whoever sent it (3.5)": (
        fetched(cc="max-age=60", request={"Authorization": "Bearer a"}),
        stored(request={"Authorization": "Bearer a"}),
        fetched("two", "max-age=60", request={"Authorization": "Bearer b"}),
        fetched("three", "max-age=60"),
    ),
    "an answer to a request with Authorization is for everybody if it is public (3.5)": (
        fetched(cc="public, max-age=60", request={"Authorization": "Bearer a"}),
        stored(request={"Authorization": "Bearer b"}),
        stored(),
    ),
    "a partial response is not stored by a cache that does not combine them (3.3)": (
        fetched(cc="max-age=60", status=206, fields={"Content-Range": "bytes 0-2/10"}),
        fetched("two"),
    ),
    "heuristically cacheable success is stored without any lifetime (RFC 9110 15.1)": (
        fetched("a", status=203),
        stored("a", status=203),
        fetched("b", status=300, path="/b"),
        stored("b", status=300, path="/b"),
        fetched("c", status=301, path="/c"),
        stored("c", status=301, path="/c"),
        fetched("d", status=308, path="/d"),
        stored("d", status=308, path="/d"),
        fetched("", status=204, path="/e"),
        stored("", status=204, path="/e"),
    ),
    "other status codes are not stored without a lifetime (3)": (
        fetched("a", status=302),
        fetched("b", status=307),
        fetched("c", status=400),
        fetched("d", status=401),
        fetched("e", status=403),
        fetched("f", status=500),
        fetched("g", status=503),
        fetched("h"),
    ),
    "other status codes are stored with a lifetime (3)": (
        fetched("a", "max-age=60", status=302, path="/a"),
        stored("a", status=302, path="/a"),
        fetched("b", fields={"Expires": 60}, status=400, path="/b"),
        stored("b", status=400, path="/b"),
    ),
    "an error without a lifetime is not held back from appearing mended": (
        fetched("none", status=404),
        fetched("here"),
    ),
    "an error is stored for as long as it says (RFC 9110 15.1)": (
        fetched("none", "max-age=10", status=404),
        stored("none", status=404, after=5),
        fetched("here", after=10),
    ),
    "an unknown status code is stored only with a lifetime (3)": (
        fetched("a", status=299),
        fetched("b", "max-age=60", status=299),
        stored("b", status=299),
        fetched("c", status=499, path="/c"),
        fetched("d", "max-age=60", status=499, path="/c"),
        stored("d", status=499, path="/c"),
    ),
    "must-understand overrides no-store where the status code is understood (5.2.2.3)": (
        fetched(cc="must-understand, no-store, max-age=60"),
        stored(after=50),
    ),
    "must-understand keeps no-store where the status code is not understood (5.2.2.3)": (
        fetched(cc="must-understand, no-store, max-age=60", status=299),
        fetched("two"),
    ),
    "must-understand alone forbids storing a status code that is not understood (3)": (
        fetched(cc="must-understand, max-age=60", status=299),
        fetched("two"),
    ),
    # --- no-cache, must-revalidate, §5.2.2 -------------------------------------------------------------------------
    "no-cache is stored and validated each time (5.2.2.4)": (
        fetched(cc="no-cache, max-age=60", fields=ETAG),
        validated(cc="no-cache, max-age=60", fields=ETAG, sent={"if-none-match": '"v1"'}),
        validated(cc="no-cache, max-age=60", fields=ETAG, sent={"if-none-match": '"v1"'}),
    ),
    "no-cache with field names keeps only these from being used again (5.2.2.4)": (
        fetched(cc='no-cache="X-Once, set-cookie", max-age=60', fields={"X-Once": "1", "X-Always": "2"}),
        stored(seen={"x-once": None, "x-always": "2"}),
    ),
    "must-revalidate is served while it is fresh, and validated after that (5.2.2.2)": (
        fetched(cc="must-revalidate, max-age=60", fields=ETAG),
        stored(after=50),
        validated(fields=ETAG, after=20, sent={"if-none-match": '"v1"'}),
    ),
    "must-revalidate forbids max-stale (5.2.2.2)": (
        fetched(cc="must-revalidate, max-age=60"),
        fetched("two", after=70, request=cc("max-stale=100")),
    ),
    "must-revalidate forbids stale-if-error (5.2.2.2)": (
        fetched(cc="must-revalidate, max-age=60, stale-if-error=600"),
        fetched("down", status=503, after=70),
    ),
    "no-cache forbids max-stale and stale-if-error (4.2.4)": (
        fetched(cc="no-cache, max-age=60, stale-if-error=600"),
        fetched("two", "no-cache, max-age=60, stale-if-error=600", request=cc("max-stale")),
        fetched("down", status=503, after=70),
    ),
    # --- Vary, §4.1 ------------------------------------------------------------------------------------------------
    "Vary keeps representations apart, and each is found again (4.1)": (
        fetched("en", "max-age=60", {"Vary": "Accept-Language"}, request={"Accept-Language": "en"}),
        fetched("de", "max-age=60", {"Vary": "Accept-Language"}, request={"Accept-Language": "de"}),
        stored("en", request={"Accept-Language": "en"}),
        stored("de", request={"Accept-Language": "de"}),
        fetched("none", "max-age=60", {"Vary": "Accept-Language"}),
        stored("none"),
    ),
    "Vary matches a field that is absent only with one that is absent (4.1)": (
        fetched(cc="max-age=60", fields={"Vary": "X-Kind"}),
        fetched("two", "max-age=60", {"Vary": "X-Kind"}, request={"X-Kind": ""}),
        stored(),
    ),
    "Vary does not see white space (4.1)": (
        fetched(cc="max-age=60", fields={"Vary": "Accept"}, request={"Accept": "text/html, text/plain"}),
        stored(request={"Accept": "text/html,text/plain"}),
        stored(request={"Accept": "text/html  ,   text/plain"}),
    ),
    "Vary does not see how a field is spread over lines (4.1)": (
        fetched(cc="max-age=60", fields={"Vary": "X-Kind"}, request=[("X-Kind", "a, b")]),
        stored(request=[("X-Kind", "a"), ("X-Kind", "b")]),
        fetched("two", request=[("X-Kind", "b"), ("X-Kind", "a")]),
    ),
    "Vary names are compared without case, on several lines (4.1)": (
        fetched(cc="max-age=60", fields=[("Vary", "ACCEPT"), ("Vary", "x-kind")], request={"X-Kind": "a"}),
        stored(request={"x-kind": "a"}),
        fetched("two", request={"x-kind": "b"}),
    ),
    "Vary: * never matches (4.1)": (
        fetched(cc="max-age=60", fields={"Vary": "*"}),
        fetched("two", "max-age=60", {"Vary": "Accept, *"}),
        fetched("three"),
    ),
    "fields that Vary does not name do not matter (4.1)": (
        fetched(cc="max-age=60", fields={"Vary": "Accept"}, request={"X-Kind": "a"}),
        stored(request={"X-Kind": "b"}),
    ),
    "of several that match, the most recent is used (4)": (
        fetched("old", "max-age=600", {"Vary": "X-Kind"}, request={"X-Kind": "a"}),
        fetched("new", "max-age=600", request={"X-Kind": "b"}, after=10),
        stored("new", request={"X-Kind": "b"}, after=1),
        stored("new", request={"X-Kind": "a"}, after=1),
    ),
    # --- validation, §4.3 ------------------------------------------------------------------------------------------
    "a stale response is validated by its entity tag (4.3.1)": (
        fetched(cc="max-age=60", fields={"ETag": 'W/"v1"'}),
        validated(cc="max-age=60", after=61, sent={"if-none-match": 'W/"v1"'}),
        stored(after=50),
    ),
    "a stale response is validated by its date of modification (4.3.1)": (
        fetched(cc="max-age=60", fields=DATED),
        validated(cc="max-age=60", after=61, sent={"if-modified-since": DATED["Last-Modified"], "if-none-match": None}),
        stored(after=50),
    ),
    "a stale response without a validator is fetched again, without conditions (4.3.1)": (
        fetched(cc="max-age=60"),
        fetched("two", after=61, sent={"if-none-match": None, "if-modified-since": None}),
    ),
    "a 304 updates the stored fields, but not those that say how the body is stored (3.2)": (
        fetched(cc="max-age=60", fields={**ETAG, "X-Remaining": "10", "X-Kept": "1", "Content-Type": "text/plain"}),
        validated(
            cc="max-age=30",
            fields={**ETAG, "X-Remaining": "9", "Content-Type": "text/html", "Content-Encoding": "gzip"},
            after=61,
            seen={"x-remaining": "9", "x-kept": "1", "content-type": "text/html", "content-encoding": None},
        ),
        stored(after=20, seen={"x-remaining": "9", "cache-control": "max-age=30", "content-length": "3"}),
        validated(fields=ETAG, after=11),
    ),
    "a 304 makes the age begin anew (4.3.4)": (
        fetched(cc="max-age=60", fields={**ETAG, "Age": "50"}),
        validated(cc="max-age=60", fields=ETAG, after=61, seen={"age": "0"}),
        stored(after=50, seen={"age": "50"}),
    ),
    "a 304 through another cache brings its Age (4.2.3)": (
        fetched(cc="max-age=60", fields=ETAG),
        validated(cc="max-age=60", fields={**ETAG, "Age": "40"}, after=61, seen={"age": "40"}),
        stored(after=10),
        validated(fields=ETAG, after=11),
    ),
    "a 304 with a new Expires and no Date counts from when it came (RFC 9110 6.6.1)": (
        fetched(fields={**ETAG, "Expires": 60}),
        validated(fields={**ETAG, "Expires": 60, "Date": None}, after=100),
        stored(after=50),
        validated(fields=ETAG, after=20),
    ),
    "a 304 about something else is not believed: it is fetched again (4.3.4)": (
        fetched(cc="max-age=60", fields=ETAG),
        Step(Answer(b"", 304, {"ETag": '"other"'}), "two", after=61),
        stored("two"),
    ),
    "a full answer to a validation replaces what was stored (4.3.3)": (
        fetched(cc="max-age=60", fields=ETAG),
        fetched("two", "max-age=60", {"ETag": '"v2"'}, after=61, sent={"if-none-match": '"v1"'}),
        stored("two", after=50),
        validated("two", fields={"ETag": '"v2"'}, after=11, sent={"if-none-match": '"v2"'}),
    ),
    "a server error to a validation is passed on where stale is not allowed (4.3.3)": (
        fetched(cc="max-age=60", fields=ETAG),
        fetched("down", status=503, after=61, sent={"if-none-match": '"v1"'}),
        validated(fields=ETAG, sent={"if-none-match": '"v1"'}),
    ),
    "a 404 to a validation is passed on, and so are those that follow (4.3.3)": (
        fetched(cc="max-age=60", fields=ETAG),
        fetched("gone", status=404, after=61),
        fetched("gone", status=404),
    ),
    # --- request directives, §5.2.1, and Pragma, §5.4 --------------------------------------------------------------
    "a request's max-age limits the age (5.2.1.1)": (
        fetched(cc="max-age=600"),
        stored(after=20, request=cc("max-age=30")),
        fetched("two", "max-age=600", after=20, request=cc("max-age=30")),
        stored("two", request=cc("max-age=30")),
    ),
    "a request's max-age=0 takes nothing that has aged (5.2.1.1)": (
        fetched(cc="max-age=600", fields=ETAG),
        validated(fields=ETAG, after=5, request=cc("max-age=0"), sent={"if-none-match": '"v1"'}),
    ),
    "a request's max-age does not lengthen a lifetime (5.2.1.1)": (
        fetched(cc="max-age=10"),
        fetched("two", after=20, request=cc("max-age=600")),
    ),
    "a request's min-fresh wants that much lifetime left (5.2.1.3)": (
        fetched(cc="max-age=60"),
        stored(after=20, request=cc("min-fresh=30")),
        fetched("two", after=20, request=cc("min-fresh=30")),
    ),
    "a request's max-stale takes that much staleness (5.2.1.2)": (
        fetched(cc="max-age=60"),
        stored(after=80, request=cc("max-stale=30"), seen={"age": "80"}),
        fetched("two", after=20, request=cc("max-stale=30")),
    ),
    "a request's max-stale without an argument takes any staleness (5.2.1.2)": (
        fetched(cc="max-age=60"),
        stored(after=86400, request=cc("max-stale")),
        fetched("two"),
    ),
    "a request's no-cache is validated end to end (5.2.1.4)": (
        fetched(cc="max-age=60", fields=ETAG),
        validated(cc="max-age=60", fields=ETAG, request=cc("no-cache"), sent={"if-none-match": '"v1"'}),
        stored(after=50),
    ),
    "what a request's no-cache brings is stored for the next (5.2.1.4)": (
        fetched(cc="max-age=60"),
        fetched("two", "max-age=60", request=cc("no-cache")),
        stored("two"),
    ),
    "a request's no-cache is not served stale when the origin fails (5.2.1.4)": (
        fetched(cc="max-age=60, stale-if-error=600"),
        fetched("down", status=503, request=cc("no-cache")),
    ),
    "nothing of a request's no-store is stored (5.2.1.5)": (
        fetched(cc="max-age=60", request=cc("no-store")),
        fetched("two", "max-age=60"),
        stored("two"),
    ),
    "a request's no-store leaves alone what is stored (5.2.1.5)": (
        fetched(cc="max-age=60"),
        fetched("two", "max-age=60", request=cc("no-store")),
        stored(),
    ),
    "a request's only-if-cached is answered from the store or with 504 (5.2.1.7)": (
        stored("", status=504, request=cc("only-if-cached")),
        fetched(cc="max-age=60"),
        stored(after=50, request=cc("only-if-cached")),
        stored("", status=504, after=20, request=cc("only-if-cached")),
        stored(request=cc("only-if-cached, max-stale=100")),
    ),
    "Pragma: no-cache is understood where there is no Cache-Control (5.4)": (
        fetched(cc="max-age=60"),
        fetched("two", "max-age=60", request={"Pragma": "no-cache"}),
        stored("two", request={"Pragma": "no-cache", "Cache-Control": "max-age=60"}),
        stored("two", request={"Pragma": "else"}),
    ),
    "Pragma in a response means nothing (5.4)": (
        fetched(cc="max-age=60", fields={"Pragma": "no-cache"}),
        stored(after=50),
    ),
    "request directives that cannot be read never fail a request": (
        fetched(cc="max-age=60"),
        stored(request=cc("max-stale=abc, ,=,foo")),
        stored(request=cc("min-fresh=x")),
        stored(request=cc("max-age=" + "9" * 40)),
        fetched("two", after=5, request=cc("max-age=abc")),
    ),
    # --- invalidation, §4.4 ----------------------------------------------------------------------------------------
    **{
        f"{method} invalidates its URL (4.4)": (
            fetched(cc="max-age=60"),
            fetched("done", method=method, after=1),
            fetched("two", "max-age=60", after=1),
            stored("two"),
        )
        for method in ("POST", "PUT", "PATCH", "DELETE")
    },
    "a method whose safety is unknown invalidates its URL (4.4)": (
        fetched(cc="max-age=60"),
        fetched("done", method="PURGE", after=1),
        fetched("two", after=1),
    ),
    "a redirect of an unsafe method invalidates as well (4.4)": (
        fetched(cc="max-age=60"),
        fetched("done", method="POST", status=303, fields={"Location": "/else"}, after=1),
        fetched("two", after=1),
    ),
    "an unsafe method that fails invalidates nothing (4.4)": (
        fetched(cc="max-age=60"),
        fetched("no", method="POST", status=404, after=1),
        fetched("no", method="PUT", status=500, after=1),
        stored(after=1),
    ),
    "a safe method invalidates nothing, and OPTIONS is not stored (4.4, 9.3.7 of RFC 9110)": (
        fetched(cc="max-age=60"),
        fetched("options", "max-age=60", method="OPTIONS", after=1),
        fetched("options", "max-age=60", method="OPTIONS", after=1),
        stored(after=1),
    ),
    "an answer to an unsafe method is not stored": (
        fetched(cc="max-age=60", method="POST"),
        fetched("two", "max-age=60", after=1),
        fetched("three", method="POST", after=1),
    ),
    "an unsafe method invalidates Location and Content-Location of its origin (4.4)": (
        fetched("a", "max-age=60", path="/a"),
        fetched("b", "max-age=60", path="/b?x=1"),
        fetched("done", method="POST", path="/c", fields={"Location": "/a", "Content-Location": "b?x=1"}, after=1),
        fetched("a2", path="/a", after=1),
        fetched("b2", path="/b?x=1", after=1),
    ),
    "an unsafe method does not invalidate a Location at another origin (4.4)": (
        fetched("a", "max-age=60", path="/a"),
        fetched("done", method="POST", path="/c", fields={"Location": "http://127.0.0.2/a"}, after=1),
        fetched("done", method="POST", path="/c", fields={"Content-Location": "http://127.0.0.1:1/a"}, after=1),
        fetched("done", method="POST", path="/c", fields={"Location": "https://127.0.0.1:bad/a"}, after=1),
        stored("a", path="/a", after=1),
    ),
    "an unsafe method invalidates every representation, whoever's (4.4)": (
        fetched("a", "max-age=60", {"Vary": "X-Kind"}, request={"X-Kind": "a"}),
        fetched("b", "max-age=60", {"Vary": "X-Kind"}, request={"X-Kind": "b", "Authorization": "Bearer b"}),
        fetched("done", method="PUT", request={"Authorization": "Bearer c"}, after=1),
        fetched("a2", request={"X-Kind": "a"}, after=1),
        fetched("b2", request={"X-Kind": "b", "Authorization": "Bearer b"}, after=1),
    ),
    "an unsafe method leaves the rest of the query space alone (4)": (
        fetched("a", "max-age=60", path="/a?x=1"),
        fetched("done", method="PUT", path="/a?x=2", after=1),
        stored("a", path="/a?x=1", after=1),
    ),
    # --- fields, §3.1 ----------------------------------------------------------------------------------------------
    "fields of the connection are not stored (3.1)": (
        fetched(
            cc="max-age=60",
            fields={
                "Connection": "X-Hop, keep-alive",
                "X-Hop": "1",
                "Keep-Alive": "timeout=5",
                "Proxy-Authenticate": "Basic",
                "X-End": "2",
            },
        ),
        stored(
            seen={
                "connection": None,
                "x-hop": None,
                "keep-alive": None,
                "proxy-authenticate": None,
                "transfer-encoding": None,
                "x-end": "2",
            }
        ),
    ),
    "a stored response without Date gets the time it came (RFC 9110 6.6.1)": (
        fetched(cc="max-age=60", fields={"Date": None}),
        stored(after=10, seen={"date": formatdate(2_000_000_000, usegmt=True), "age": "10"}),
    ),
    "Set-Cookie does not keep a private response from being stored (7.3)": (
        fetched(cc="max-age=60", fields=[("Set-Cookie", "a=1; Path=/else"), ("Set-Cookie", "b=2; Path=/else")]),
        stored(seen={"set-cookie": "a=1; Path=/else, b=2; Path=/else"}),
    ),
    # --- HEAD ------------------------------------------------------------------------------------------------------
    "HEAD is stored apart from GET, as it has no body (4)": (
        Step(Answer(b"one", 200, cc("max-age=60")), "", method="HEAD", seen={"content-length": "3"}),
        stored("", method="HEAD", seen={"content-length": "3"}),
        fetched("one", "max-age=60"),
        stored("one"),
        stored("", method="HEAD"),
    ),
    # --- stale-if-error, RFC 5861 ----------------------------------------------------------------------------------
    "a response's stale-if-error allows stale when the origin fails (RFC 5861 4)": (
        fetched(cc="max-age=60, stale-if-error=100"),
        instead("one", Answer(b"down", 500), after=70, seen={"age": "70"}),
        instead("one", Answer(b"down", 503), after=50),
        fetched("down", status=503, after=50),
    ),
    "a request's stale-if-error allows stale when the origin fails (RFC 5861 4)": (
        fetched(cc="max-age=60"),
        fetched("down", status=502, after=70),
        instead("one", Answer(b"down", 502), request=cc("stale-if-error=100")),
    ),
    "stale-if-error is not for errors that are answers (RFC 5861 4)": (
        fetched(cc="max-age=60, stale-if-error=100"),
        fetched("no", status=401, after=70),
        fetched("no", status=403),
        fetched("no", status=410),
    ),
    "an origin that breaks off gives way to stale-if-error (RFC 5861 4)": (
        fetched(cc="max-age=60, stale-if-error=100"),
        instead("one", Answer(raw=b"garbage\r\n\r\n"), after=70),
    ),
    "an origin that breaks off within its error gives way to stale-if-error (RFC 5861 4)": (
        fetched(cc="max-age=60, stale-if-error=100"),
        instead("one", Answer(b"down and out", 503, cut=4), after=70),
    ),
    "stale-while-revalidate ends with its seconds (RFC 5861 3)": (
        fetched(cc="max-age=60, stale-while-revalidate=100"),
        fetched("two", after=170),
    ),
    "must-revalidate forbids stale-while-revalidate (5.2.2.2)": (
        fetched(cc="max-age=60, must-revalidate, stale-while-revalidate=100"),
        fetched("two", after=70),
    ),
    # --- the caller's own conditions and ranges, RFC 9110 §13 and §14, RFC 9111 §4.3.2 -------------------------------
    "the caller's If-None-Match is answered from the store (4.3.2)": (
        fetched(cc="max-age=60", fields=ETAG),
        stored("", status=304, request={"If-None-Match": '"v1"'}, seen={"etag": '"v1"', "cache-control": "max-age=60"}),
        stored("", status=304, request={"If-None-Match": 'W/"v1"'}),
        stored("", status=304, request={"If-None-Match": '"v0", "v1"'}),
        stored("", status=304, request={"If-None-Match": "*"}),
        stored("one", request={"If-None-Match": '"v2"'}),
        stored("one"),
    ),
    "the caller's If-Modified-Since is answered from the store (4.3.2)": (
        fetched(cc="max-age=60", fields=DATED),
        stored("", status=304, request={"If-Modified-Since": DATED["Last-Modified"]}),
        stored("", status=304, request={"If-Modified-Since": "Wed, 02 Jan 2019 00:00:00 GMT"}),
        stored("one", request={"If-Modified-Since": "Mon, 31 Dec 2018 00:00:00 GMT"}),
        stored("one", request={"If-Modified-Since": "yesterday"}),
    ),
    "If-None-Match counts before If-Modified-Since (RFC 9110 13.2.2)": (
        fetched(cc="max-age=60", fields={**ETAG, **DATED}),
        stored("one", request={"If-None-Match": '"v2"', "If-Modified-Since": DATED["Last-Modified"]}),
    ),
    "a 304 to the caller's condition about what is not held is the caller's, and is not stored (4.3.3)": (
        Step(Answer(b"", 304, ETAG), "", 304, request={"If-None-Match": '"v1"'}, sent={"if-none-match": '"v1"'}),
        fetched("one", "max-age=60"),
    ),
    "when the stored response is stale, the caller's entity tag is asked about together with ours (4.3.1)": (
        fetched(cc="max-age=60", fields=ETAG),
        Step(
            Answer(b"", 304, {"ETag": '"mine"'}),
            "",
            304,
            request={"If-None-Match": '"mine"'},
            after=61,
            sent={"if-none-match": '"mine", "v1"'},
        ),
        validated(cc="max-age=60", fields=ETAG, request={"If-None-Match": '"mine"'}),
        stored("one", after=50),
    ),
    "a range is answered from the store (RFC 9110 14.2)": (
        fetched("0123456789", "max-age=60", ETAG),
        stored(
            "0123",
            status=206,
            request={"Range": "bytes=0-3"},
            seen={"content-range": "bytes 0-3/10", "content-length": "4", "etag": '"v1"'},
        ),
        stored("789", status=206, request={"Range": "bytes=-3"}, seen={"content-range": "bytes 7-9/10"}),
        stored("89", status=206, request={"Range": "bytes=8-100"}, seen={"content-range": "bytes 8-9/10"}),
        stored("", status=416, request={"Range": "bytes=10-"}, seen={"content-range": "bytes */10"}),
        stored("0123456789", request={"Range": "bytes=3-1"}),
        stored("0123456789", request={"Range": "lines=0-1"}),
        stored("0123456789"),
    ),
    "If-Range gives the part only of what it names (RFC 9110 13.1.5)": (
        fetched("0123456789", "max-age=60", ETAG),
        stored("01", status=206, request={"Range": "bytes=0-1", "If-Range": '"v1"'}),
        stored("0123456789", request={"Range": "bytes=0-1", "If-Range": '"v2"'}),
        stored("0123456789", request={"Range": "bytes=0-1", "If-Range": 'W/"v1"'}),
    ),
    "a range of what is not held reaches the origin, and the part is not stored as the whole (3.3)": (
        fetched(
            "0123",
            "max-age=60",
            {"Content-Range": "bytes 0-3/10"},
            status=206,
            request={"Range": "bytes=0-3"},
            sent={"range": "bytes=0-3"},
        ),
        fetched("0123456789", "max-age=60"),
        stored("0123456789"),
    ),
    "a part is stored, and serves what lies within it (RFC 9111 3.3, RFC 9110 14.2)": (
        part("456789", 4, request={"Range": "bytes=-6"}, sent={"range": "bytes=-6"}),
        stored("456789", status=206, request={"Range": "bytes=-6"}, seen={"content-range": "bytes 4-9/10"}),
        stored("89", status=206, request={"Range": "bytes=8-"}, seen={"content-range": "bytes 8-9/10"}),
        stored("5", status=206, request={"Range": "bytes=5-5"}, seen={"content-length": "1", "x-mine": "yes"}),
        stored("67", status=206, request={"Range": "bytes=6-7", "If-Range": '"v1"'}),
        part("34", 3, request={"Range": "bytes=3-4"}, fields={"ETag": '"v1"'}),
        stored("3456", status=206, request={"Range": "bytes=3-6"}),
    ),
    "a part is used only while it is fresh, by those whom it may serve, and when nothing else is asked for": (
        part("456789", 4, request={"Range": "bytes=-6"}),
        part("456789", 4, request={"Range": "bytes=-6", "Cache-Control": "no-cache"}),
        part("456789", 4, request={"Range": "bytes=-6", "Authorization": "Bearer other"}),
        part("456789", 4, request={"Range": "bytes=-6"}, after=61),
        stored("", status=504, request={"Range": "bytes=0-1", "Cache-Control": "only-if-cached"}, seen={"age": None}),
        fetched("gone", status=404, method="DELETE"),
        stored("9", status=206, request={"Range": "bytes=9-9"}),
        fetched("", status=204, method="DELETE"),
        part("9", 9, request={"Range": "bytes=9-9"}),
    ),
    "parts of the same bytes are put together, and become the whole (RFC 9111 3.4)": (
        part("0123", 0, request={"Range": "bytes=0-3"}),
        part("345", 3, request={"Range": "bytes=3-5"}),
        part("6789", 6, request={"Range": "bytes=6-9"}),
        stored("0123456789", seen={"content-length": "10", "content-range": None, "etag": '"v1"'}),
        stored("34", status=206, request={"Range": "bytes=3-4"}),
    ),
    "of two parts that do not touch the later one is kept": (
        part("0123", 0, request={"Range": "bytes=0-3"}),
        part("6789", 6, request={"Range": "bytes=6-9"}),
        stored("78", status=206, request={"Range": "bytes=7-8"}),
        part("0123", 0, request={"Range": "bytes=0-3"}),
    ),
    "parts with different, weak or missing tags are never put together (RFC 9111 3.4)": (
        part("01234", 0, request={"Range": "bytes=0-4"}),
        part("abcde", 5, request={"Range": "bytes=5-9"}, fields={"ETag": '"v2"'}),
        fetched("whole", "max-age=60", sent={"range": None}),
    ),
    **{
        f"parts with {name} are never put together (RFC 9111 3.4)": (
            part("01234", 0, request={"Range": "bytes=0-4"}, fields=fields),
            part("56789", 5, request={"Range": "bytes=5-9"}, fields=fields),
            fetched("0123456789", "max-age=60", fields, sent={"range": None, "if-range": None}),
            stored("0123456789"),
        )
        for name, fields in {"weak tags": {"ETag": 'W/"v1"'}, "no tags": {}}.items()
    },
    "who asks for the whole gets a beginning that is held, completed by the rest (RFC 9111 3.4)": (
        part("01234", 0, request={"Range": "bytes=0-4"}),
        completed("56789", 5, "0123456789", seen={"content-length": "10", "content-range": None, "x-mine": "yes"}),
        stored("0123456789"),
    ),
    "a beginning that is stale is completed as well, if it is still that of the same bytes (RFC 9111 3.4)": (
        part("01234", 0, request={"Range": "bytes=0-4"}),
        completed("56789", 5, "0123456789", after=100),
        stored("0123456789", after=50),
    ),
    "the beginning of what has changed is not completed (RFC 9110 13.1.5)": (
        part("01234", 0, request={"Range": "bytes=0-4"}),
        fetched("new", "max-age=60", {"ETag": '"v2"'}, sent={"range": "bytes=5-", "if-range": '"v1"'}),
        stored("new"),
    ),
    "a range whose origin sends the whole stores the whole": (
        fetched("0123456789", "max-age=60", ETAG, request={"Range": "bytes=0-3"}, sent={"range": "bytes=0-3"}),
        stored("0123456789"),
    ),
    "a part that may not be stored is not": (
        part("01234", 0, request={"Range": "bytes=0-4"}, cc="no-store"),
        part("01234", 0, request={"Range": "bytes=0-4"}),
    ),
    **{
        f"a part whose Content-Range is {value!r} is passed on, and not stored (RFC 9110 14.4)": (
            fetched("01234", "max-age=60", {"Content-Range": value}, status=206, request={"Range": "bytes=0-4"}),
            fetched("01234", "max-age=60", {"Content-Range": value}, status=206, request={"Range": "bytes=0-4"}),
        )
        for value in ("bytes 0-5/10", "bytes 0-4/*", "bytes 4-0/10", "lines 0-4/10", "bytes 6-10/10", "")
    },
    **{
        f"a request with {name} passes by the cache, both ways": (
            fetched("part", "max-age=60", request={name: value}, sent={name.lower(): value}),
            fetched("one", "max-age=60"),
            fetched("part", "max-age=60", request={name: value}, sent={name.lower(): value}),
            stored("one"),
        )
        for name, value in {"If-Match": '"mine"', "If-Unmodified-Since": "Tue, 01 Jan 2019 00:00:00 GMT"}.items()
    },
    # --- whose copy a 304 is about, and what of it is kept -------------------------------------------------------
    "a 304 to the caller's own tag says nothing of an entry that has none (4.3.4)": (
        fetched(cc="max-age=10", fields=DATED),
        Step(Answer(b"", 304, {"ETag": 'W/"mine"'}), "", 304, request={"If-None-Match": 'W/"mine"'}, after=20),
        fetched("two", "max-age=60"),
    ),
    "a 304 without a tag is about the caller's copy, unless the caller's tags are ours (4.3.4)": (
        fetched(cc="max-age=10", fields=ETAG),
        Step(Answer(b"", 304), "", 304, request={"If-None-Match": '"mine"'}, after=20),
        Step(Answer(b"", 304, cc("max-age=60")), "", 304, request={"If-None-Match": '"v1"'}),
        stored(after=30),
    ),
    "a 304 to the caller's date says nothing of an entry without validators (4.3.4)": (
        fetched(cc="max-age=10"),
        Step(Answer(b"", 304), "", 304, request={"If-Modified-Since": "Tue, 01 Jan 2030 00:00:00 GMT"}, after=20),
        fetched("two"),
    ),
    "a 304 that names another tag than was sent proves nothing (4.3.4)": (
        fetched(cc="max-age=10", fields={"ETag": 'W/"v1"'}),
        validated("two", fields={"ETag": 'W/"v2"'}, after=20, sent={"if-none-match": 'W/"v1"'}),
        stored("two"),
    ),
    "a 304 to a request without conditions is passed on (RFC 9110 15.4.5)": (
        Step(Answer(raw=b"HTTP/1.1 304 Not Modified\r\nConnection: close\r\n\r\n"), "", 304),
        fetched(cc="max-age=60"),
    ),
    "If-None-Match: * is sent as it is (RFC 9110 13.1.2)": (
        fetched(cc="max-age=10", fields=ETAG),
        Step(Answer(b"", 304, ETAG), "", 304, request={"If-None-Match": "*"}, after=20, sent={"if-none-match": "*"}),
    ),
    "an If-None-Match with a star in it is not one that is a star (RFC 9110 13.1.2)": (
        fetched(cc="max-age=60", fields=ETAG),
        stored(request={"If-None-Match": "no*tag"}),
        stored(request={"If-None-Match": '"*"'}),
    ),
    "of a 304 with no-store nothing is stored (5.2.2.5)": (
        fetched(cc="max-age=10", fields={**ETAG, "X-Version": "1"}),
        validated(cc="no-store, max-age=60", fields={**ETAG, "X-Version": "2"}, after=20, seen={"x-version": "2"}),
        validated(cc="max-age=60", fields=ETAG, seen={"x-version": "1"}),
        stored(after=30),
    ),
    "of a HEAD's answer with no-store nothing is stored (5.2.2.5, 4.3.5)": (
        fetched(cc="max-age=10", fields=ETAG),
        Step(Answer(b"one", 200, {**ETAG, "Cache-Control": "no-store, max-age=60"}), "", method="HEAD", after=20),
        validated(cc="max-age=60", fields=ETAG, sent={"if-none-match": '"v1"'}),
    ),
    "who posts with no-store has nothing stored (5.2.1.5)": (
        Step(
            Answer(b"posted", 200, {"Cache-Control": "max-age=60", "Content-Location": "/thing"}),
            "posted",
            method="POST",
            request=cc("no-store"),
        ),
        fetched(cc="max-age=60"),
    ),
    "fields that a 304 lists in no-cache are reused no more (5.2.2.4)": (
        fetched(cc="max-age=10", fields={**ETAG, "X-Mine": "1"}),
        validated(cc='max-age=60, no-cache="x-mine"', fields=ETAG, after=20),
        stored(seen={"x-mine": None}),
    ),
    "fields that the stored no-cache lists are not taken from a 304 (5.2.2.4)": (
        fetched(cc='max-age=10, no-cache="x-mine x-other"', fields={**ETAG, "X-Mine": "1"}),
        validated(fields={**ETAG, "X-Mine": "2"}, after=20),
        stored(seen={"x-mine": None}),
    ),
    # --- ranges --------------------------------------------------------------------------------------------------
    "a date is a strong validator only a second after the change (RFC 9110 8.8.2.2, 13.1.5)": (
        fetched("0123456789", "max-age=60", {"Last-Modified": 0.0, "Date": 0.0}),
        stored("0123456789", request={"Range": "bytes=0-3", "If-Range": "Wed, 18 May 2033 03:33:20 GMT"}),
    ),
    "the rest without a tag does not complete a beginning (3.4)": (
        part("0123", 0, request={"Range": "bytes=0-3"}),
        Step(
            Answer(b"ABCDEF", 206, {"Content-Range": "bytes 4-9/10", "Cache-Control": "max-age=60"}),
            "ABCDEF",
            status=206,
        ),
    ),
    "parts that are put together have the fields of both (3.2, 3.4)": (
        part("0123", 0, fields={**ETAG, "Content-Type": "text/x"}, request={"Range": "bytes=0-3"}),
        part("456789", 4, request={"Range": "bytes=4-9"}),
        stored("0123456789", seen={"content-type": "text/x"}),
    ),
    "a range may end far beyond what there is (RFC 9110 14.1.2)": (
        fetched("0123456789", "max-age=60"),
        stored("56789", status=206, request={"Range": "bytes=5-99999999999999999999"}),
    ),
    # --- what is read as strictly as it can be ----------------------------------------------------------------------
    **{
        f"{value!r} is not fresh (4.2.1)": (fetched(cc=value), fetched("two"))
        for value in (
            "no-store max-age=9",
            "no-store; max-age=9",
            "no-cache no-store",
            "max-age=0 must-revalidate",
            "max-age=9 private",
            'max-age="9',
            "max-age:9",
            'no-cache="x',
            '"no-store"',
        )
    },
    "the greatest min-fresh and the least max-stale count (5.2.1)": (
        fetched(cc="max-age=60"),
        fetched("two", "max-age=60", after=40, request=[("Cache-Control", "min-fresh=5, min-fresh=50")]),
        fetched("three", after=80, request=[("Cache-Control", "max-stale=5, max-stale")]),
    ),
    # --- Vary keeps apart what may differ (4.1) ----------------------------------------------------------------------
    **{
        f"{name}: {one} and {other} are two (4.1)": (
            fetched("one", "max-age=60", {"Vary": name}, request={name: one}),
            fetched("two", "max-age=60", {"Vary": name}, request={name: other}),
            stored("one", request={name: one}),
        )
        for name, one, other in (
            ("Accept", 'a/b;p="X"', 'a/b;p="x"'),
            ("Accept", 'a/b;p="x y"', 'a/b;p="xy"'),
            ("Accept", 'a/b;p="x,  y"', 'a/b;p="x, y"'),
            ("X-Mine", '"a,b"', '"a, b"'),
            ("User-Agent", "x (a,b)", "x (a, b)"),
        )
    },
    "Accept is the same in another order, another case and with other space (4.1)": (
        fetched("one", "max-age=60", {"Vary": "Accept"}, request={"Accept": 'Text/HTML;Q=0.5, a/b ; p="X"'}),
        stored("one", request={"Accept": 'a/b;p="X",text/html;q=0.5'}),
    ),
}


class Clock:
    """Unix time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 2_000_000_000.25

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The one clock of the package, of hishel and of the origin."""
    found = Clock()
    monkeypatch.setattr(time, "time", found)
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[Scripted]:
    with Scripted() as found:
        yield found


class Run:
    """One run of a scenario: what to ask next, and whether the answer and the origin agree with it."""

    def __init__(self, server: Scripted, clock: Clock, steps: Sequence[Step]) -> None:
        self.server = server
        self.clock = clock
        self.steps = steps
        server.clock = clock

    def requests(self, build: Callable[..., httpx.Request]) -> Iterator[tuple[httpx.Request, Step]]:
        for step in self.steps:
            self.clock.now += step.after
            self.server.reset(lambda asked, step=step: self.answer(step, asked))  # type: ignore[misc]
            fields = list(step.request.items() if isinstance(step.request, Mapping) else step.request)
            yield build(step.method, self.server.url + step.path, headers=fields), step

    @staticmethod
    def answer(step: Step, asked: Asked) -> Answer:
        if step.answer is None:
            return Answer(b"the origin was asked", 599)
        if step.answer.status == 304 and not any(name.startswith("if-") for name in asked.fields):
            return Answer(step.body.encode(), 200, cc("max-age=60"))  # no condition, no 304
        return step.answer

    def check(self, step: Step, response: httpx.Response, number: int) -> None:
        what = f"step {number}: {step.method} {step.path}"
        assert (step.status, step.body) == (response.status_code, response.text), what
        expected, reached = step.answer is not None, bool(self.server.asked)
        assert expected == reached, f"{what}: the origin {'was' if reached else 'was not'} asked"
        for name, value in step.seen.items():
            assert value == response.headers.get(name), f"{what}: {name}"
        for name, value in step.sent.items():
            assert value == self.server.asked[0].fields.get(name), f"{what}: {name} at the origin"
        assert "p2pcache; " in response.headers["cache-status"], what


NAMES = list(SCENARIOS)


@pytest.mark.parametrize("name", NAMES)
def test_sync(name: str, server: Scripted, clock: Clock, local: Settings) -> None:
    run = Run(server, clock, SCENARIOS[name])
    transport = P2PCacheTransport(httpx.HTTPTransport(verify=CONTEXT), settings=local)
    with httpx.Client(transport=transport, headers={"Accept-Encoding": "identity"}) as client:
        for number, (request, step) in enumerate(run.requests(client.build_request), 1):
            run.check(step, client.send(request), number)


@pytest.mark.anyio
@pytest.mark.parametrize("name", NAMES)
async def test_async(name: str, server: Scripted, clock: Clock, local: Settings) -> None:
    run = Run(server, clock, SCENARIOS[name])
    transport = P2PCacheTransport(httpx.AsyncHTTPTransport(verify=CONTEXT), settings=local)
    async with httpx.AsyncClient(transport=transport, headers={"Accept-Encoding": "identity"}) as client:
        for number, (request, step) in enumerate(run.requests(client.build_request), 1):
            run.check(step, await client.send(request), number)
