"""Parts of a representation: a 206 is stored, served from, combined with others, completed (RFC 9111 §3.3, §3.4).

A part is an :class:`Entry` under the method :data:`PART`, which no request has: what asks for the whole never meets it,
and what invalidates its URL removes it as well. Parts are put together only where both carry the same strong entity
tag, so that they are parts of the same bytes. A part is not sent to peers; what becomes whole is, as any entry.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import msgspec
from hishel import Headers

from httpx_p2pcache.conditions import View, part_of, range_holds, wanted
from httpx_p2pcache.entries import Entry, body_digest
from httpx_p2pcache.freshness import freshened

PART = "GET-PART"

_CONTENT_RANGE = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15})", re.IGNORECASE)


class Span(NamedTuple):
    """Which bytes a part holds: from ``first`` up to before ``end``, of ``size`` in all."""

    first: int
    end: int
    size: int


def span(entry: Entry) -> Span | None:
    """What Content-Range says of the entry's body; None if it says nothing that fits (RFC 9110 §14.4)."""
    match = _CONTENT_RANGE.fullmatch((entry.first("content-range") or "").strip())
    if match is None:
        return None
    first, end, size = int(match[1]), int(match[2]) + 1, int(match[3])
    return Span(first, end, size) if first < end <= size and len(entry.body) == end - first else None


def view(part: Entry, headers: Headers) -> View | None:
    """What a request with these fields, Range among them, gets of a part; None if it needs more than that."""
    held = span(part)
    asked = None if held is None else wanted(headers["range"], held.size)
    if held is None or asked is None or not range_holds(part, headers):
        return None
    first, last = asked
    if not held.first <= first <= last < held.end:
        return None
    return part_of(part.body[first - held.first : last + 1 - held.first], first, held.size)


def combined(entry: Entry, known: Iterable[Entry]) -> Entry | None:
    """A 206 as it is stored: with what is ``known`` of the same bytes and touches it; whole, it is the entry of a 200.

    Of parts that do not touch the later one is stored, in the place of the other. None if it cannot be stored: its
    Content-Range does not describe its body.
    """
    ours = span(entry)
    if ours is None:
        return None
    first, body = ours.first, entry.body
    fields: dict[str, list[str]] = dict(entry.headers)
    selecting = dict(entry.selecting)
    for other in known:
        theirs = span(other)
        if theirs is None or theirs.size != ours.size or strong_tag(other) is None:
            continue
        end = first + len(body)
        if strong_tag(other) == strong_tag(entry) and theirs.first <= end and first <= theirs.end:
            before = other.body[: max(0, first - theirs.first)]
            after = other.body[max(0, end - theirs.first) :]
            first, body = min(first, theirs.first), before + body + after
            fields = freshened(other.headers, Headers(fields))  # a 206 to If-Range need not say all again (§3.4)
            selecting = {**other.selecting, **selecting}
    whole = len(body) == ours.size
    fields["content-length"] = [str(len(body))]
    if whole:
        fields.pop("content-range", None)
    else:
        fields["content-range"] = [f"bytes {first}-{first + len(body) - 1}/{ours.size}"]
    return msgspec.structs.replace(
        entry,
        method="GET" if whole else PART,
        status=200 if whole else 206,
        selecting=selecting,
        headers=fields,
        body=body,
        digest=body_digest(body),
    )


def rest(part: Entry, limit: int) -> dict[str, str] | None:
    """The fields that ask for what a part lacks, if it is a beginning and the whole has at most ``limit`` bytes."""
    held, tag = span(part), strong_tag(part)
    if held is None or tag is None or held.first != 0 or held.size > limit:
        return None
    return {"range": f"bytes={held.end}-", "if-range": tag}


def completed(part: Entry, entry: Entry) -> Entry | None:
    """The whole, of a part and the 206 that was asked for by :func:`rest`; None if they do not make one."""
    whole = combined(entry, [part])
    return whole if whole is not None and whole.status == 200 else None


def strong_tag(entry: Entry) -> str | None:
    """The entity tag, if two bodies that have it are the same bytes (RFC 9110 §8.8.1)."""
    tag = entry.first("etag")
    return tag if tag is not None and tag.startswith('"') else None
