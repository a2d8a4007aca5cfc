"""The quota board: what the fleet knows of each identity's rate limits at GitHub.

Every answer says how much is left (``x-ratelimit-*``), and a refusal when to come back (``retry-after``, else the reset
time where nothing remains, else a minute and twice as long each time: GitHub's "Rate limits for the REST API"). Nothing
is invented from it: while an identity is refused, what may be served stale is, and one call a minute tries again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Annotated
from urllib.parse import urlsplit

import msgspec
from hishel import Headers
from msgspec import Meta

from httpx_p2pcache.entries import Digest
from httpx_p2pcache.exceptions import UNDECODABLE

PROBE_SECONDS = 60.0  # between two calls that see whether a refusal still stands
FIRST_PAUSE = 60.0  # after a secondary limit that names no time
LONGEST_PAUSE = 3600.0
MAX_QUOTAS = 1000  # identities and resources known at a time
TELL_SECONDS = 10.0  # between two messages to the fleet about one quota, unless it begins or ends to refuse

MOST = 2**31
Count = Annotated[int, Meta(ge=0, le=MOST)]


class Quota(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One identity's limit for one resource. ``reset``, ``refused_until`` and ``seen`` are Unix times."""

    identity: Digest
    resource: Annotated[str, Meta(min_length=1, max_length=40)]
    limit: Count
    remaining: Count
    reset: Annotated[float, Meta(ge=0, le=2**40)]
    refused_until: Annotated[float, Meta(ge=0, le=2**40)]
    seen: Annotated[float, Meta(ge=0, le=2**40)]


class QuotaBoard:
    """What is known of all quotas. Thread-safe."""

    def __init__(self) -> None:
        self._quotas: dict[tuple[str, str], Quota] = {}
        self._pauses: dict[tuple[str, str], float] = {}
        self._probed: dict[tuple[str, str], float] = {}
        self._told: dict[tuple[str, str], float] = {}
        self._listeners: list[Callable[[Quota], None]] = []
        self._lock = threading.Lock()

    def after_fork(self) -> None:
        """In a forked child: a lock that another thread may have held is not waited for."""
        self._lock = threading.Lock()

    def on_change(self, listener: Callable[[Quota], None]) -> None:
        """Have ``listener`` called, in whichever thread it happens, with every quota that is learned from now on.

        The board's lock is held then: it must not ask the board.
        """
        self._listeners.append(listener)

    def note(self, identity: str, url: str, status: int, headers: Headers, now: float) -> Quota | None:
        """Learn from an answer of the origin; returns what the fleet should be told of, or None."""
        limit, remaining, reset = (_number(headers, f"x-ratelimit-{name}") for name in ("limit", "remaining", "reset"))
        if limit is None or remaining is None or reset is None:
            if not refuses(status, headers):
                return None
            limit, remaining, reset = limit or 0, remaining or 0, reset or 0
        place = identity, headers.get("x-ratelimit-resource") or resource(url)
        limit, remaining = min(limit, MOST), min(remaining, MOST)  # members believe no more
        with self._lock:
            known = self._quotas.get(place)
            until = 0.0
            if refuses(status, headers):
                until = self._come_back(place, headers, remaining, reset, now)
            elif status != 304 or known is None:
                self._pauses.pop(place, None)
            elif known.refused_until > now:
                until = known.refused_until  # a 304 is free: it does not say that others are allowed again
            quota = Quota(
                identity=identity,
                resource=place[1][:40],
                limit=limit,
                remaining=remaining,
                reset=float(reset),
                refused_until=until,
                seen=now,
            )
            self._keep(place, quota)
            changed = known is None or (known.refused_until > now) != (until > now)
            if not changed and now - self._told.get(place, 0.0) < TELL_SECONDS:
                return None
            self._told[place] = now
            return quota

    def _come_back(self, place: tuple[str, str], headers: Headers, remaining: int, reset: int, now: float) -> float:
        after = _number(headers, "retry-after")
        if after is not None:
            return now + min(after, LONGEST_PAUSE)
        if remaining == 0 and reset > now:
            return min(float(reset), now + LONGEST_PAUSE)
        pause = min(self._pauses.get(place, FIRST_PAUSE / 2) * 2, LONGEST_PAUSE)
        self._pauses[place] = pause
        return now + pause

    def merge(self, quota: Quota, now: float) -> bool:
        """What a member has learned; the later knowledge counts, and nothing beyond an hour from now.

        Returns whether it is news.
        """
        place = quota.identity, quota.resource
        with self._lock:
            known = self._quotas.get(place)
            news = quota.seen <= now + LONGEST_PAUSE and (known is None or known.seen < quota.seen)
            if news:
                until, seen = min(quota.refused_until, now + LONGEST_PAUSE), min(quota.seen, now)
                self._keep(place, msgspec.structs.replace(quota, refused_until=until, seen=seen))
            return news

    def refused(self, identity: str, url: str, now: float) -> bool:
        """Whether a call would be refused now; false once a minute, so that somebody finds out."""
        place = identity, resource(url)
        with self._lock:
            quota = self._quotas.get(place)
            if quota is None or quota.refused_until <= now:
                self._probed.pop(place, None)
                return False
            # From the first time that it was heard of: a member that says it again and again puts nothing off.
            if now - self._probed.setdefault(place, quota.seen) >= PROBE_SECONDS:
                self._probed[place] = now
                return False
            return True

    def known(self) -> list[Quota]:
        """All quotas, for somebody who has just come."""
        with self._lock:
            return list(self._quotas.values())

    def describe(self) -> list[dict[str, str | int | float]]:
        """Each quota as plain values; the identity by its first eight digits, "" for none."""
        return [
            {
                "identity": quota.identity[:8],
                "resource": quota.resource,
                "limit": quota.limit,
                "remaining": quota.remaining,
                "reset": quota.reset,
                "refused_until": quota.refused_until,
            }
            for quota in self.known()
        ]

    def _keep(self, place: tuple[str, str], quota: Quota) -> None:
        self._quotas.pop(place, None)
        self._quotas[place] = quota
        for listener in self._listeners:
            listener(quota)
        while len(self._quotas) > MAX_QUOTAS:
            oldest = next(iter(self._quotas))
            for known in (self._quotas, self._pauses, self._probed, self._told):
                known.pop(oldest, None)


def refuses(status: int, headers: Headers) -> bool:
    """Whether an answer is a refusal for a rate limit: 429, or the 403 that GitHub sends for it."""
    if status == 403:
        return headers.get("x-ratelimit-remaining") == "0" or "retry-after" in headers
    return status == 429


def speaks_of_limits(body: bytes) -> bool:
    """Whether a refusal that looks like one for a rate limit is one by its words, as GitHub writes them.

    The call that spends the last of a quota may be refused for good: it has the same head. What is no message of
    GitHub's is taken for what its head says.
    """
    try:
        message = msgspec.json.decode(body, type=_Message).message.lower()
    except UNDECODABLE:
        return True
    return "limit" in message or "abuse" in message


class _Message(msgspec.Struct):
    message: str


def resource(url: str) -> str:
    """The resource that GitHub counts a call for, before the answer says so."""
    path = urlsplit(url).path.removeprefix("/api/v3")
    if path.startswith("/search/code"):
        return "code_search"
    return "search" if path.startswith("/search/") else "core"


def _number(headers: Headers, name: str) -> int | None:
    value = headers.get(name, "").strip()
    return int(value[:12]) if value.isdecimal() else None
