"""What came from a peer is checked like what comes from a stranger: a cache multiplies its mistakes."""

from __future__ import annotations

import math
import re
import zlib
from urllib.parse import urlsplit

import msgspec

from httpx_p2pcache.entries import Entry, carries_credentials, is_credential, links, resolved_url, same_origin
from httpx_p2pcache.exceptions import Rejected
from httpx_p2pcache.freshness import http_date, is_for_others, may_be_stored, vary_names

MAX_RESIDENT = 31_536_000.0  # a year, as RFC 9111's own advice for the longest lifetime was
MAX_FUTURE = 7200.0  # clocks may differ by an hour in either direction
MAX_FIELDS = 200
MAX_FIELD_BYTES = 64 * 1024
MAX_UNPACKED = 128 * 1024**2  # bytes: gzip makes a thousandth of what is empty, a tenth of what says something
UNPACKED_AT_ONCE = 256 * 1024
_UNPACKING = {"gzip": 31, "deflate": 15}  # zlib's wbits; a deflate that is none of zlib's is rare

# Of all names or values at once, each on a line of its own.
_NAMES = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+(?:\n[!#$%&'*+.^_`|~0-9a-z-]+)*")
_VALUES = re.compile(r"[\t\x20-\x7e\x80-\xff\n]*")
_PAGINATION = re.compile(r"\b(?:next|prev|previous|first|last)\b", re.IGNORECASE)


def believed(entry: Entry, resident: float, now: float, max_body_size: int) -> Entry:
    """``entry`` as it may be stored here, ``resident`` seconds older than when it was sealed.

    Raises :class:`Rejected` with the reason, which names no value of the entry.
    """
    if not math.isfinite(resident) or not 0 <= resident <= MAX_RESIDENT:
        raise Rejected("it has been on its way for an impossible time")
    if entry.method not in ("GET", "HEAD") or not entry.url.startswith(("http://", "https://")):
        raise Rejected("its method or URL is not one that is cached")
    if not _is_url(entry.url):
        raise Rejected("its URL is none")
    if carries_credentials(entry.url) or any(is_credential(n) and len(v) != 32 for n, v in entry.selecting.items()):
        raise Rejected("it holds credentials in clear")
    if len(entry.body) > max_body_size:
        raise Rejected("its body is larger than CACHE_MAX_BODY_SIZE")
    _check_fields(entry.headers, entry.selecting)
    if "set-cookie" in entry.headers or "*" in vary_names(entry.headers):
        raise Rejected("it is for one user or one request only")
    if not is_for_others(entry.status):
        raise Rejected("it is a refusal, or a failure")
    location = entry.first("location")
    if location is not None and not same_origin(resolved_url(entry.url, location), entry.url):
        raise Rejected("its Location leads to another origin")  # clients take with them what they are asked with
    date = http_date(entry.first("date"))
    if date is not None and date > now + MAX_FUTURE:
        raise Rejected("its Date lies in the future")
    length = entry.first("content-length")
    if entry.method == "GET" and length is not None and length != str(len(entry.body)):
        raise Rejected("its body is not as long as its Content-Length says")
    for url, parameters in links(entry):
        if _PAGINATION.search(parameters) and not same_origin(url, entry.url):
            raise Rejected("its Link leads to another origin")
    _check_coding(entry)
    if not may_be_stored(entry.method, entry.status, entry.headers):
        raise Rejected("RFC 9111 §3 does not allow it to be stored")
    age = entry.initial_age + resident
    if date is not None:  # §4.2.3, as far as clocks agree
        age = max(age, now - date - MAX_FUTURE)
    return msgspec.structs.replace(entry, initial_age=age, received=now)


def _is_url(url: str) -> bool:
    try:
        urlsplit(url).port  # noqa: B018 - this is what raises for one that is none
    except ValueError:
        return False
    return True


def _check_coding(entry: Entry) -> None:
    """Whoever reads the body unpacks it, without a limit: it has to be what it says, and no bomb."""
    coding = (entry.first("content-encoding") or "").strip().lower()
    if coding in ("", "identity") or not entry.body:
        return
    if coding not in _UNPACKING:
        raise Rejected("its body is in a coding that is not checked")
    unpack, unpacked, packed = zlib.decompressobj(wbits=_UNPACKING[coding]), 0, entry.body
    try:
        while packed and unpacked <= MAX_UNPACKED:
            unpacked += len(unpack.decompress(packed, UNPACKED_AT_ONCE))
            packed = unpack.unconsumed_tail
    except zlib.error:
        raise Rejected("its body is not in the coding that it names") from None
    if unpacked > MAX_UNPACKED:
        raise Rejected("its body unpacks to too much")
    if not unpack.eof:
        raise Rejected("its body breaks off")
    if unpack.unused_data or packed:  # some clients read on, and others do not
        raise Rejected("its body goes on after its end")


def _check_fields(headers: dict[str, list[str]], selecting: dict[str, str]) -> None:
    """The fields of a response, and those of its request."""
    fields = [*headers, *selecting]
    lines = [line for values in headers.values() for line in values] + [*selecting.values()]
    if not fields:
        return
    size = sum(len(name) * len(values) for name, values in headers.items()) + sum(map(len, selecting))
    if len(lines) > MAX_FIELDS or size + sum(map(len, lines)) > MAX_FIELD_BYTES:
        raise Rejected("it has too many or too large fields")
    if not all(headers.values()):
        raise Rejected("it has a field without a line")
    names, values = "\n".join(fields), "\n".join(lines)
    breaks = names.count("\n") - len(fields) + values.count("\n") - len(lines) + 2  # that are none of ours
    if breaks or not _NAMES.fullmatch(names) or not _VALUES.fullmatch(values):
        raise Rejected("it has a field that RFC 9110 §5 does not allow")
