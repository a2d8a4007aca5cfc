"""What a caller's own conditions and ranges make of an entry (RFC 9110 §13, §14): a 304, a 206, a 416, or all of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hishel import Headers

from httpx_p2pcache.entries import Entry
from httpx_p2pcache.freshness import http_date

_TAG = re.compile(r'(?:W/)?"[^"]*"')
_RANGE = re.compile(r"bytes\s*=\s*(\d{0,40})\s*-\s*(\d{0,40})\s*", re.IGNORECASE)


@dataclass(frozen=True)
class View:
    """An entry as one caller gets it: ``dropped`` fields left out, ``added`` ones put in."""

    status: int
    body: bytes
    dropped: tuple[str, ...] = ()
    added: tuple[tuple[str, str], ...] = ()


def viewed(entry: Entry, method: str, headers: Headers) -> View:
    """What a request with these fields gets of an entry that may be used for it."""
    body = b"" if method == "HEAD" else entry.body
    if entry.status == 200 and not_modified(entry, headers):
        return View(304, b"", dropped=("content-length", "content-encoding", "content-type", "content-range"))
    # Of a coded body no part can be decoded, and clients do that by the field alone: a range may be ignored (§14.2).
    whole = "content-encoding" in entry.headers or "range" not in headers
    if entry.status == 200 and method == "GET" and not whole and range_holds(entry, headers):
        return _part(entry, headers["range"])
    return View(entry.status, body)


def not_modified(entry: Entry, headers: Headers) -> bool:
    """Whether the caller's copy is the entry (§13.2.2): If-None-Match if there is one, else If-Modified-Since."""
    if "if-none-match" in headers:
        etag = entry.first("etag")
        theirs = headers["if-none-match"]
        return theirs.strip() == "*" or (etag is not None and opaque(etag) in tags_of(theirs))
    since = http_date(headers.get("if-modified-since"))
    if since is None:  # "A recipient MUST ignore ... if the received field value is not a valid HTTP-date"
        return False
    # RFC 9111 §4.3.2: without Last-Modified the Date, else the time of receipt, stands for it.
    modified = http_date(entry.first("last-modified"))
    if modified is None:
        modified = http_date(entry.first("date"))
    return (entry.received if modified is None else modified) <= since


def tags_of(if_none_match: str) -> set[str]:
    """The entity tags of an If-None-Match as :func:`opaque` gives them; none of one that is ``*``."""
    return {opaque(tag) for tag in _TAG.findall(if_none_match)}


def opaque(etag: str) -> str:
    """An entity tag without weakness mark and quotes, for the weak comparison (§8.8.3.2)."""
    return etag.strip().removeprefix("W/").strip('"')


def range_holds(entry: Entry, headers: Headers) -> bool:
    """Whether the range applies: If-Range names exactly the entry, by a strong tag or its date (§13.1.5)."""
    condition = headers.get("if-range")
    if condition is None:
        return True
    if condition.startswith('"'):
        return condition == entry.first("etag")
    condition_date, modified, date = map(http_date, (condition, entry.first("last-modified"), entry.first("date")))
    if modified is None or condition_date != modified:
        return False
    # §8.8.2.2: a date is a strong validator only where the origin had a whole second in which to notice a change.
    return date is not None and date - modified >= 1


def wanted(ranges: str, size: int) -> tuple[int, int] | None:
    """The first and last position that a Range field asks for of ``size`` bytes (§14.1.2).

    First beyond last: there are no such bytes. None for several ranges, another unit, or what is no range: those may be
    ignored (§14.2), the whole is an answer to them as well.
    """
    match = _RANGE.fullmatch(ranges.strip())
    if match is None or not (match[1] or match[2]) or (match[1] and match[2] and int(match[1]) > int(match[2])):
        return None
    if match[1]:
        return int(match[1]), min(int(match[2] or size - 1), size - 1)
    return max(0, size - int(match[2])), size - 1


def part_of(body: bytes, first: int, size: int) -> View:
    """The 206 that hands over ``body``, which begins at ``first`` of ``size`` bytes."""
    held = f"bytes {first}-{first + len(body) - 1}/{size}"
    added = (("content-range", held), ("content-length", str(len(body))))
    return View(206, body, ("content-length", "content-range"), added)


def _part(entry: Entry, ranges: str) -> View:
    asked, size = wanted(ranges, len(entry.body)), len(entry.body)
    if asked is None:
        return View(200, entry.body)
    first, last = asked
    if first > last:
        dropped = ("content-length", "content-encoding", "content-type", "etag", "last-modified")
        return View(416, b"", dropped, (("content-range", f"bytes */{size}"), ("content-length", "0")))
    return part_of(entry.body[first : last + 1], first, size)


def combined(headers: Headers, ours: dict[str, str]) -> dict[str, str]:
    """The fields to send when the caller has conditions of its own and we would validate with ``ours``.

    Both entity tags are sent: the origin's 304 names the one that matches. A date of the caller's is not sent beside a
    tag of ours, which would hide it; it is compared with what is then known to be right.
    """
    if "if-none-match" in headers and "if-none-match" in ours:
        theirs = headers["if-none-match"]
        alone = theirs.strip() == "*" or opaque(ours["if-none-match"]) in tags_of(theirs)  # "*" has no company
        return {"if-none-match": theirs if alone else f"{theirs}, {ours['if-none-match']}"}
    return ours
