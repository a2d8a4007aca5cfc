"""RFC 9111's arithmetic, and what hishel's state machine is shown.

One idea: **what the machine sees is normalised, what the caller sees is exact.** The machine decides from a ``Date``
and a ``Cache-Control``, reading both leniently. So every entry is shown to it with a ``Date`` that yields its true
current age (§4.2.3) and a ``Cache-Control`` that says what its own fields and the request's directives come to.
All functions are pure; ``now`` is Unix time in seconds.
"""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Mapping
from datetime import datetime, timezone
from email.utils import formatdate
from functools import lru_cache

import hishel
from hishel import CacheOptions, Headers

from httpx_p2pcache.entries import Entry

# RFC 9110 §15.1, less those that only 206 and 304 handling could use.
HEURISTICALLY_CACHEABLE = frozenset({200, 203, 204, 300, 301, 308, 404, 405, 410, 414, 501})
# CACHE_DEFAULT_TTL does not apply to errors: who polls until something exists must see it appear.
_DEFAULT_TTL_STATUSES = frozenset({200, 203, 204, 300, 301, 308})
_UNDERSTOOD = HEURISTICALLY_CACHEABLE | {302, 303, 307, 400, 401, 403, 500, 502, 503, 504}
_LONGEST = 2**31  # RFC 9111 §1.2.2: what a delta-seconds too large to represent counts as
_HEURISTIC_SHARE = 0.1  # RFC 9111 §4.2.2: "A typical setting of this fraction might be 10%."

_DIRECTIVE = re.compile(
    r"""\s*([!#$%&'*+.^_`|~0-9A-Za-z-]+)(?:\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]*)))?\s*(?:,|$)|([^,]*)(?:,|$)"""
)
# What a member that is no directive may have been meant to be: read as strictly as it can be (§4.2.1).
_MEANT = re.compile(r"(?<![A-Za-z0-9_-])(no-store|no-cache|private|must-revalidate|max-age)(?![A-Za-z0-9_-])", re.I)
REMEMBERED_LENGTH = 256  # characters of Cache-Control beyond which what it says is not remembered
_DELTA = re.compile(r"\s*(\d+)\s*")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_TIME = r"(?P<h>\d\d):(?P<m>\d\d):(?P<s>\d\d)"
_DATES = (  # RFC 9110 §5.6.7: IMF-fixdate, and the two obsolete forms that a recipient has to accept
    re.compile(rf"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun), (?P<d>\d\d) (?P<mon>[A-Z][a-z][a-z]) (?P<y>\d{{4}}) {_TIME} GMT"),
    re.compile(
        rf"(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day, (?P<d>\d\d)-(?P<mon>[A-Z][a-z][a-z])-(?P<y>\d\d) {_TIME} GMT"
    ),
    re.compile(rf"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) (?P<mon>[A-Z][a-z][a-z]) (?P<d>[ \d]\d) {_TIME} (?P<y>\d{{4}})"),
)


def directives(headers: Headers | Mapping[str, list[str]]) -> dict[str, str | None]:
    """``Cache-Control`` as a mapping of lower-case names to arguments (RFC 9111 §5.2); None where there is no argument.

    Of a directive that is repeated with different arguments the most restrictive counts (§4.2.1).
    """
    lines = _control_lines(headers)
    if not lines:
        return {}
    # One exchange asks for the same ones six times.
    return dict(_directives(*lines) if _is_short(lines) else _directives.__wrapped__(*lines))


def _control_lines(headers: Headers | Mapping[str, list[str]]) -> list[str]:
    lines = headers.get_list("cache-control") if isinstance(headers, Headers) else headers.get("cache-control")
    return lines or []


def _is_short(lines: list[str]) -> bool:
    """Whether what is found out about these lines is remembered."""
    return sum(map(len, lines)) < REMEMBERED_LENGTH


@lru_cache(maxsize=256)
def _directives(*lines: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name, quoted, plain, other in (match for line in lines for match in _DIRECTIVE.findall(_short(line))):
        key, argument = name.lower(), (re.sub(r"\\(.)", r"\1", quoted) if quoted else plain) or None
        if not key:
            found |= dict.fromkeys(map(str.lower, _MEANT.findall(other)))
            continue
        if key in found and found[key] != argument:
            argument = _stricter(key, found[key], argument)
        found[key] = argument
    return found


def _short(line: str) -> str:
    """White space as single spaces where there may be much of it: the pattern tries every way to divide it."""
    return line if len(line) < 256 else " ".join(line.split())


def _stricter(name: str, a: str | None, b: str | None) -> str | None:
    if name == "max-stale" and (a is None or b is None):  # without an argument it is willing to accept any
        return b if a is None else a
    if a is None or b is None:  # an argument narrows no-cache and private, and is missed by max-age
        return None
    if name in ("no-cache", "private"):
        return f"{a},{b}"
    if name == "min-fresh":
        return str(max(seconds(a), seconds(b)))
    return str(min(seconds(a), seconds(b)))


def seconds(argument: str | None) -> int:
    """A delta-seconds argument; 0 for one that is absent or malformed (§4.2.1: consider it stale)."""
    match = _DELTA.fullmatch(argument or "")
    return min(int(match[1][:20]), _LONGEST) if match else 0


def http_date(value: str | None) -> float | None:
    """The Unix time of an HTTP-date, strictly one of the three formats of RFC 9110 §5.6.7; None for anything else."""
    date = value.strip() if value else ""
    return _http_date(date) if 0 < len(date) < 40 else None


@lru_cache(maxsize=256)
def _http_date(date: str) -> float | None:
    for pattern in _DATES:
        match = pattern.fullmatch(date)
        if match is None:
            continue
        year = int(match["y"])
        if len(match["y"]) == 2:  # "more than 50 years in the future ... the most recent year in the past"
            this_year = datetime.now(timezone.utc).year
            year += this_year // 100 * 100
            year -= 100 if year > this_year + 50 else 0
        try:
            month = _MONTHS.index(match["mon"]) + 1
            clock = int(match["h"]), int(match["m"]), min(int(match["s"]), 59)
            return datetime(year, month, int(match["d"]), *clock, tzinfo=timezone.utc).timestamp()
        except ValueError:
            return None
    return None


def initial_age(headers: Mapping[str, list[str]], sent: float, received: float) -> float:
    """``corrected_initial_age`` (§4.2.3) of a response to a request that left at ``sent``."""
    lines = headers.get("age") or ("",)
    # "If a cache receives multiple Age lines it SHOULD use the first" and ignore one that is no delta-seconds (§5.1).
    match = _DELTA.fullmatch(lines[0].split(",")[0])
    age_value = min(int(match[1][:20]), _LONGEST) if match else 0
    date = http_date(", ".join(headers.get("date", ())))
    delay = max(0.0, received - sent)
    apparent_age = max(0.0, received - date) if date is not None else 0.0
    # Date has whole seconds: one of the second in which the request was sent says nothing of an age.
    apparent_age = apparent_age if apparent_age >= 1 + delay else 0.0
    return min(max(apparent_age, age_value + delay), _LONGEST)


def lifetime(entry: Entry, default_ttl: float) -> float | None:
    """``freshness_lifetime`` in seconds for a private cache (§4.2.1); None where nothing says or allows one."""
    control = directives(entry.headers)
    if "max-age" in control:
        return seconds(control["max-age"])
    if "expires" in entry.headers:
        lines = entry.headers["expires"]
        expires = http_date(lines[0]) if len(lines) == 1 else None
        if expires is None:
            return 0.0  # "A cache recipient MUST interpret invalid date formats ... as a time in the past"
        date = http_date(", ".join(entry.headers.get("date", ())))
        return max(0.0, expires - (date if date is not None else entry.received))
    if entry.status not in HEURISTICALLY_CACHEABLE and "public" not in control:
        return None
    modified = http_date(entry.first("last-modified"))
    if modified is not None:
        return min(default_ttl, max(0.0, (entry.received - modified) * _HEURISTIC_SHARE))
    return default_ttl if entry.status in _DEFAULT_TTL_STATUSES else None


def must_not_be_stale(entry: Entry) -> bool:
    """Whether the origin forbids any use without validation once it is stale (§4.2.4, §5.2.2.2, §5.2.2.4)."""
    control = directives(entry.headers)
    return "must-revalidate" in control or control.get("no-cache", "") is None


def machine_request(request: hishel.Request) -> hishel.Request:
    """``request`` as the machine has to see it: nothing but whether it demands validation."""
    control = directives(request.headers)
    # §5.2.1.4; Pragma counts only where there is no Cache-Control (§5.4).
    demands = control.get("no-cache", "") is None or (
        not control and "no-cache" in request.headers.get("pragma", "").lower()
    )
    return hishel.Request(request.method, request.url, Headers({"cache-control": "no-cache"} if demands else {}))


def machine_entry(
    entry: Entry, method: str, id_: uuid.UUID, wishes: Mapping[str, str | None], now: float, default_ttl: float
) -> hishel.Entry:
    """``entry`` as hishel's machine has to see it to decide what RFC 9111 asks, given the request's directives."""
    control = directives(entry.headers)
    fresh_for, age = lifetime(entry, default_ttl), entry.age(now)
    if fresh_for is not None:
        if "max-stale" in wishes and not must_not_be_stale(entry):  # §5.2.1.2
            fresh_for += _LONGEST if wishes["max-stale"] is None else seconds(wishes["max-stale"])
        fresh_for -= seconds(wishes.get("min-fresh"))  # §5.2.1.3
        if "max-age" in wishes:  # §5.2.1.1: unwilling to accept an age greater than that; 0 asks for validation
            limit = seconds(wishes["max-age"])
            fresh_for = min(fresh_for, limit + 1 if limit else 0)
    shown: dict[str, str] = {
        name: ", ".join(entry.headers[name]) for name in ("etag", "last-modified") if name in entry.headers
    }
    # The machine counts whole seconds since Date and asks for age < max-age.
    shown["date"] = formatdate(math.floor(now) - math.floor(age), usegmt=True)
    shown["cache-control"] = f"max-age={max(0, math.floor(min(fresh_for or 0, _LONGEST)))}"
    if control.get("no-cache", "") is None:
        shown["cache-control"] += ", no-cache"
    # Vary and the method are not asked for: only entries that the request selects are shown to the machine at all.
    return hishel.Entry(id_, hishel.Request(method, entry.url), hishel.Response(entry.status, Headers(shown)))


def machine_unproven(entry: Entry, id_: uuid.UUID, etag: str, now: float) -> hishel.Entry:
    """``entry`` as one that may be used only once the origin has said 304 to ``etag``."""
    fields = {
        "etag": etag,
        "date": formatdate(math.floor(now) - math.floor(entry.age(now)), usegmt=True),
        "cache-control": "no-cache",
    }
    response = hishel.Response(entry.status, Headers(fields))
    return hishel.Entry(id_, hishel.Request(entry.method, entry.url), response)


def machine_response(response: hishel.Response) -> hishel.Response:
    """A response from the origin as the machine has to see it to decide whether it may be stored (§3)."""
    shown: dict[str, str | list[str]] = {
        name: response.headers.get_list(name) or []
        for name in ("etag", "last-modified", "expires")
        if name in response.headers
    }
    control = directives(response.headers)
    if "must-understand" in control:  # §5.2.2.3: in the place of no-store for who understands, else like it
        if response.status_code in _UNDERSTOOD:
            control.pop("no-store", None)
        else:
            control["no-store"] = None
    # Only what bears on storing, and written anew: the machine would read other arguments its own way.
    known: list[str] = [name for name in ("no-store", "public", "private", "must-revalidate") if name in control]
    if "max-age" in control:
        known.append(f"max-age={seconds(control['max-age'])}")
    shown["cache-control"] = ", ".join(known)
    return hishel.Response(response.status_code, Headers(shown))


# What no runner gives to others, or takes from them: a refusal is for its own token, a failure for its own connection.
_FOR_ONE = frozenset({401, 403, 407, 408, 421, 425, 426, 428, 429, 431, 451})
NEVER_STORED = frozenset({428, 429, 431, 511})  # RFC 6585 §3 to §6


def may_be_stored(method: str, status: int, headers: Headers | Mapping[str, list[str]]) -> bool:
    """Whether hishel's machine lets a private cache store a response (§3) to a plain request."""
    lines = _control_lines(headers)
    asked = method, status, "expires" in headers, *lines  # all that it looks at, which takes it a while
    return _may_be_stored(*asked) if _is_short(lines) else _may_be_stored.__wrapped__(*asked)


@lru_cache(maxsize=256)
def _may_be_stored(method: str, status: int, expires: bool, *control: str) -> bool:
    if status in NEVER_STORED or status > 599:
        return False
    fields: dict[str, str | list[str]] = {"cache-control": [*control], **({"expires": "0"} if expires else {})}
    asked = hishel.Request(method, "https://origin.invalid/", Headers({}))
    state = hishel.CacheMiss(options=CacheOptions(shared=False), request=asked)
    seen = machine_response(hishel.Response(status, Headers(fields)))
    return isinstance(state.next(seen), hishel.StoreAndUse)


def is_for_others(status: int) -> bool:
    """Whether a response with this status is given to other runners, and taken from them."""
    return status < 500 and status not in _FOR_ONE


def vary_names(headers: Mapping[str, list[str]]) -> list[str]:
    """The lower-case members of ``Vary``, sorted, each once."""
    members = {name.strip().lower() for line in headers.get("vary", ()) for name in line.split(",")}
    return sorted(members - {""})


_CONNECTION_FIELDS = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authentication-info",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)


def storable_fields(headers: Headers) -> dict[str, list[str]]:
    """The response fields that may be stored (§3.1): none that belong to the connection, none named as ``no-cache``."""
    fields = {name: headers.get_list(name) or [] for name in headers}
    dropped = {name.strip().lower() for line in fields.get("connection", ()) for name in line.split(",")}
    dropped |= _unproven(headers)
    return {name: lines for name, lines in fields.items() if name not in dropped and name not in _CONNECTION_FIELDS}


def _unproven(headers: Headers | Mapping[str, list[str]]) -> set[str]:
    """The fields that a qualified ``no-cache`` lists: each use of them would have to be validated (§5.2.2.4)."""
    listed = directives(headers).get("no-cache") or ""
    return set(re.split(r"[\s,]+", listed.lower())) - {""}


# §3.2: never Content-Length, nor what "the cache's stored response depends upon": our bodies are stored as they came.
_NOT_UPDATED = frozenset({"content-encoding", "content-length", "content-range"})


def freshened(stored: Mapping[str, list[str]], not_modified: Headers) -> dict[str, list[str]]:
    """The stored fields updated by those of a 304 (RFC 9111 §3.2)."""
    updates = storable_fields(not_modified)
    fields = {**stored, **{name: lines for name, lines in updates.items() if name not in _NOT_UPDATED}}
    unproven = _unproven(fields)
    return {name: lines for name, lines in fields.items() if name not in unproven}
