"""An entry at rest, with its decisions prepared."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from functools import lru_cache

from httpx_p2pcache.entries import Asker, Entry, cache_key, is_credential
from httpx_p2pcache.freshness import directives, http_date, lifetime, vary_names

VERSION, VERSION_SELECTED = "x-github-api-version", "x-github-api-version-selected"


class Stored:
    """An entry at rest, with what a hit needs prepared: nothing is parsed again while it stays in memory."""

    __slots__ = (
        "codings",
        "control",
        "entry",
        "fresh_for",
        "id",
        "key",
        "made",
        "memo",
        "raw_headers",
        "reusable",
        "row",
        "vary",
        "versions",
    )

    def __init__(
        self, id_: uuid.UUID, entry: Entry, default_ttl: float, any_coding: bool, row: uuid.UUID | None = None
    ) -> None:
        self.id = id_
        self.row = row  # in the file; None until it is written
        self.entry = entry
        self.key = cache_key(entry.url)
        self.memo: dict[object, object] = {}  # what was computed of it once and is needed again
        self.control = directives(entry.headers)
        # When the origin made it (RFC 9111 §4: the most recent one counts), then when it came.
        date = http_date(entry.first("date"))
        made = math.floor(entry.received - entry.initial_age) if date is None else date
        self.made = min(made, entry.received), entry.received
        fresh_for = lifetime(entry, default_ttl)
        # Whole seconds, as hishel's machine counts them.
        self.fresh_for = math.floor(fresh_for) if fresh_for is not None else 0
        names = vary_names(entry.headers)
        self.vary = [
            (name, entry.selecting.get(name)) for name in names if not (any_coding and name == "accept-encoding")
        ]
        # GitHub's Vary does not name the version of its API that was asked for, but the answer does.
        self.versions: tuple[str | None, ...] = ()
        if VERSION_SELECTED in entry.headers:
            self.versions = entry.first(VERSION_SELECTED), entry.selecting.get(VERSION)
        self.codings = (entry.first("content-encoding") or "").lower() if any_coding else ""
        self.reusable = self.control.get("no-cache", "") is not None and "*" not in names
        self.raw_headers = [
            (name.encode("latin-1"), line.encode("latin-1"))
            for name, lines in entry.headers.items()
            if name != "age"
            for line in lines
        ]

    def is_same(self, other: Stored) -> bool:
        """Whether both are one entry at rest, which may have been loaded twice."""
        return self.id == other.id or (self.row is not None and self.row == other.row)

    def made_by(self, asker: Asker) -> bool:
        """Whether it was fetched by one who asks as this one does. Whether that was so is found out once."""
        if self.entry.identity != asker.identity:
            return False
        made = self.memo.get("made")
        if made is None:
            made = self.memo["made"] = asker.made(self.entry)
        return made is True

    def matches(self, method: str, value_of: Callable[[str], str | None], *, any_identity: bool = False) -> bool:
        """Whether a request selects this representation (RFC 9111 §4 and §4.1); ``*`` never matches.

        ``value_of`` gives the request's fields as :meth:`Keyring.selecting_value` does. With ``any_identity`` the
        fields that say who asks may differ.
        """
        if method != self.entry.method and (method, self.entry.method) != ("HEAD", "GET"):
            return False
        if self.codings and not _accepts(value_of("accept-encoding"), self.codings):
            return False
        if self.versions and value_of(VERSION) not in self.versions:
            return False
        return all(
            name != "*" and (value_of(name) == value or (any_identity and is_credential(name)))
            for name, value in self.vary
        )

    def fresh(self, now: float) -> bool:
        """Whether it may be used without validation by a request that asks nothing special of a cache."""
        return self.reusable and math.floor(self.entry.age(now)) < self.fresh_for


def same_place(old: Entry, new: Entry) -> bool:
    """Whether ``new`` answers what ``old`` answered: it replaces it."""
    return (old.method, old.identity, old.first("content-encoding")) == (
        new.method,
        new.identity,
        new.first("content-encoding"),
    ) and all(
        old.selecting.get(name) == new.selecting.get(name)
        for name in {VERSION, *vary_names(old.headers), *vary_names(new.headers)}
    )


@lru_cache
def _accepts(accept_encoding: str | None, codings: str) -> bool:
    """Whether a client that says ``accept_encoding`` takes these content codings (RFC 9110 §12.5.3)."""
    offered: dict[str, bool] = {}
    for member in (accept_encoding or "").lower().split(","):
        name, _, weight = member.partition(";")
        offered[name.strip()] = weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return all(offered.get(coding.strip(), offered.get("*", False)) for coding in codings.split(","))
