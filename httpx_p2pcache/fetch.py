"""What the origin has to say to a GET or HEAD: steps 5 to 7 of a request's way (see ``exchange``)."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Generator, Sequence
from email.utils import formatdate
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import hishel
import msgspec
from hishel import Headers

from httpx_p2pcache import parts
from httpx_p2pcache.answers import Answer, Discard, Effect, Read, Reply, Run, Way, caching
from httpx_p2pcache.claims import Verdict
from httpx_p2pcache.conditions import combined, opaque, tags_of
from httpx_p2pcache.entries import Entry
from httpx_p2pcache.freshness import (
    directives,
    freshened,
    initial_age,
    machine_response,
    may_be_stored,
    must_not_be_stale,
    seconds,
    storable_fields,
    vary_names,
)
from httpx_p2pcache.github import adopted, decoded, endpoint
from httpx_p2pcache.keep import Keep
from httpx_p2pcache.lease import Lease
from httpx_p2pcache.quota import speaks_of_limits
from httpx_p2pcache.stored import Stored

if TYPE_CHECKING:
    from httpx_p2pcache.lookup import Lookup

logger = logging.getLogger("httpx_p2pcache")

FAILING = frozenset({429, 500, 502, 503, 504})  # RFC 5861 §4, and what is refused for too many calls
# Not yet; not by this proxy, in this time, here, so early; not so many.
_OF_NO_RESOURCE = frozenset({202, 407, 408, 421, 425, 429})
_EVENTS = "text/event-stream"
_GITHUB_STALE_SECONDS = 86_400.0


class Fetch:
    """The origin is asked for what a look-up has not found, or has found to be stale; ``lease``: for whom."""

    def __init__(self, lookup: Lookup, lease: Lease) -> None:
        self._lookup = lookup
        self._lease = lease
        self._exchange = lookup.exchange
        self._request = lookup.request
        self._held = lookup.held
        self._why = "miss"  # the origin is asked, as RFC 9211 §2.2 names it
        if lookup.held:
            self._why = "request" if lookup.held[0].fresh(time.time()) else "stale"

    def way(self, state: hishel.AnyState) -> Way:
        """Steps 5 to 7, from what hishel's machine says to what is held."""
        exchange = self._exchange
        if self._why == "stale":
            exchange.stats.add("expirations", endpoint=endpoint(self._request.method, self._request.url))
        begun = self._begun()
        while True:
            assert isinstance(state, (hishel.CacheMiss, hishel.NeedRevalidation))
            added: dict[str, str] = {} if begun is None else begun[1]
            respelt: str | None = None
            if isinstance(state, hishel.NeedRevalidation):
                added = {n: state.request.headers[n] for n in state.request.headers if n.startswith("if-")}
                respelt = self._respelt(state)
                if respelt is not None:
                    added["if-none-match"] += f", {respelt}"
                if self._lookup.conditional:
                    added = combined(self._request.headers, added)
            sent = time.time()
            reply = yield from self._reply(added, sent)
            if isinstance(reply, Answer):
                return reply
            if begun is not None and reply.status in (206, 416):
                answer = yield from self._complete(begun[0], reply, sent)
                if answer is not None:
                    return answer
                begun = None  # not what was asked for: once more, for the whole
                continue
            if reply.status == 304:
                if self._is_ambiguous(added, reply):  # once more, with the caller's own tags alone
                    yield Discard()
                    state, self._why = self._lookup.nothing(), "miss"
                    continue
                if isinstance(state, hishel.CacheMiss) or not self._proves_ours(state, reply):
                    # It is about the caller's copy, or about none at all: those who wait need one.
                    self._lease.settle(Verdict.ABANDONED)
                    return Answer(None, reply, f"fwd={self._why}; fwd-status=304", caching("origin"))
                yield Discard()
                if not self._names_ours(state, reply):
                    state, self._why = self._lookup.nothing(), "miss"
                    continue
            if isinstance(state, hishel.CacheMiss):
                storable = may_be_stored(self._request.method, reply.status, reply.headers)
                break
            state = yield from self._decided(state, reply, respelt)
            if not isinstance(state, hishel.CacheMiss):
                storable = isinstance(state, hishel.StoreAndUse)
                break
            self._why = "miss"  # a 304 that fits nothing we hold: once more, without conditions of ours
        if isinstance(state, hishel.NeedToBeUpdated):
            return (yield from self._freshen(state, reply, sent))
        if self._request.method == "HEAD" and reply.status == 200:
            yield Run(partial(self._compare_with_head, reply, sent))
        yield from exchange.heed_refusal(self._request, reply, sent)
        keep = None
        if storable and _is_of_use(reply) and not _too_large(reply, exchange.settings.max_body_size):
            keep = Keep(self._lookup, reply, sent, self._lease)
        else:
            if self._request.method == "GET" and _says_what_is_there(reply):
                # §4.3.3: a full answer says that what we hold is none any more; a refusal says it to this identity.
                refused = reply.status in (401, 403)
                held = [*self._held, *self._lookup.parts]
                ours = [s for s in held if not refused or s.entry.identity == self._lookup.asker.identity]
                yield Run(partial(exchange.store.remove, self._lookup.key, ours))
            self._lease.settle(Verdict.FAILED if reply.status >= 500 else Verdict.UNSTORABLE)
        status = f"fwd={self._why}"
        if self._why == "stale":
            status += f"; fwd-status={reply.status}"
        if keep is not None:
            status += "; stored"
        return Answer(None, reply, status, caching("origin", stored=keep is not None), keep)

    def _reply(self, added: dict[str, str], sent: float) -> Generator[Effect, Any, Reply | Answer]:
        """What the origin says; or a stale answer in the place of what it would refuse, or fails to say (step 7)."""
        stale = self._stale("its rate limit", asked=False) if self._is_refused(sent) else None
        if stale is not None:
            return stale
        try:
            reply = yield from self._exchange.send(self._request, added)
        except Exception as exc:
            stale = self._stale(type(exc).__name__)
            if stale is None:
                raise
            return stale
        if reply.status == 403 and self._exchange.is_limit(self._request, reply):
            return (yield from self._forbidden(reply, sent))
        if reply.status in FAILING:
            stale = self._stale(str(reply.status))
            if stale is not None:
                yield Discard()
                return stale
        return reply

    def _forbidden(self, reply: Reply, sent: float) -> Generator[Effect, Any, Answer]:
        """A 403 whose head is that of a rate limit: whether it is one, or a refusal to this identity, its body says."""
        exchange = self._exchange
        entry = self._lookup.entry(reply, (yield Read()), sent)
        yield Discard()
        if self._request.method == "GET" and speaks_of_limits(decoded(entry) or b""):
            stale = self._stale("403")
            if stale is not None:
                return stale
        else:
            identity = self._lookup.asker.identity
            yield Run(partial(exchange.store.refuse, self._lookup.key, identity, since=sent))
        self._lease.settle(Verdict.UNSTORABLE)
        return Answer(exchange.store.passing(entry), None, f"fwd={self._why}", caching("origin"))

    def _decided(
        self, state: hishel.NeedRevalidation, reply: Reply, respelt: str | None
    ) -> Generator[Effect, Any, hishel.AnyState]:
        """What hishel's machine says to the answer to a revalidation."""
        first = state.revalidating_entries[0]
        seen = hishel.Response(reply.status, reply.headers)
        # The machine compares with the tag that it knows; the new one is stored with the other fields.
        if respelt and opaque(reply.headers.get("etag") or "") == opaque(respelt):
            known = {"etag": [str(self._lookup.stored(first).entry.first("etag"))]}
            seen = hishel.Response(reply.status, Headers({**_lists(reply.headers), **known}))
        if reply.status == 304:  # about the one whose validators were sent, and none that looks like it
            if first.id in self._lookup.others:  # of which the machine knows its tag alone
                seen.headers.pop("last-modified", None)
            state = dataclasses.replace(state, revalidating_entries=[first])
        decided: hishel.AnyState = state.next(machine_response(seen))
        if isinstance(decided, hishel.InvalidateEntries):
            ours = [stored for stored in self._held if stored.id in decided.entry_ids]
            yield Run(partial(self._exchange.store.remove, self._lookup.key, ours))
            decided = decided.next()
        return decided

    def part(self) -> Way:
        """A range that is not held. The whole fleet seldom wants the same one, so nobody waits for it."""
        sent = time.time()
        answer = yield from self._exchange.pass_by(self._request, "miss")
        yield from self._exchange.heed_refusal(self._request, answer.reply, sent)
        # A part that was asked for by If-Range need not say what kind of thing it is of (RFC 9110 §15.3.7.1).
        if answer.reply is not None and self._storable(answer.reply) and "if-range" not in self._request.headers:
            answer.keep = Keep(self._lookup, answer.reply, sent, self._lease)
            answer.cache_status += "; stored"
            answer.caching["stored"] = True
        return answer

    def _storable(self, reply: Reply) -> bool:
        """Whether the answer to a range may be stored: a part, or the whole if the origin ignores ranges."""
        return (
            (reply.status == 200 or (reply.status == 206 and "content-range" in reply.headers))
            and may_be_stored("GET", 200, reply.headers)
            and not _too_large(reply, self._exchange.settings.max_body_size)
        )

    def _begun(self) -> tuple[Stored, dict[str, str]] | None:
        """A part that is the beginning of what is asked for, and the fields that ask for the rest."""
        if self._held or self._lookup.conditional or self._request.method != "GET":
            return None
        for stored in self._lookup.parts:
            fields = parts.rest(stored.entry, self._exchange.settings.max_body_size)
            if fields is not None:
                return stored, fields
        return None

    def _complete(self, part: Stored, reply: Reply, sent: float) -> Generator[Effect, Any, Answer | None]:
        """What a part and the rest of it come to (RFC 9111 §3.4); None if that is not the whole."""
        exchange, entry, stored = self._exchange, None, None
        if reply.status == 206 and not _too_large(reply, exchange.settings.max_body_size):
            body = yield Read()
            entry = parts.completed(part.entry, self._lookup.entry(reply, body, sent))
            entry = entry and self._lookup.asker.vouch(entry)
        yield Discard()
        if entry is None:
            yield Run(partial(exchange.store.remove, self._lookup.key, [part]))
            return None
        if self._storable(reply):
            stored = yield Run(partial(exchange.store.save, entry, since=sent))
        if stored is not None and self._lookup.shareable(entry):
            self._lease.publish(entry)
        else:
            self._lease.settle(Verdict.UNSTORABLE)
        stored = stored or exchange.store.passing(entry, part.id)
        status = "fwd=partial; fwd-status=206" + ("; stored" if stored.id != part.id else "")
        return Answer(stored, None, status, caching("origin", stored=stored.id != part.id), age=entry.initial_age)

    def _respelt(self, state: hishel.NeedRevalidation) -> str | None:
        """The tag of what is revalidated, if it was given to another spelling of the same credentials.

        GitHub binds it to the whole field, ``token T`` or ``Bearer T``; to the one it sees now it is another.
        """
        shown = state.revalidating_entries[0]
        if not self._lookup.shared or shown.id in self._lookup.others or "if-none-match" not in state.request.headers:
            return None
        stored = self._lookup.stored(shown)
        etag = self._exchange.github.validator(self._request.headers, stored.entry, stored.memo)
        return None if etag is None or opaque(etag) == opaque(stored.entry.first("etag") or "") else etag

    def _is_ambiguous(self, added: dict[str, str], reply: Reply) -> bool:
        """Whether a 304 does not say which of the caller's tags and ours it is about, as it should (§4.3.4)."""
        theirs, sent = self._request.headers.get("if-none-match"), added.get("if-none-match")
        return theirs is not None and sent is not None and sent != theirs and "etag" not in reply.headers

    def _proves_ours(self, state: hishel.NeedRevalidation, reply: Reply) -> bool:
        """Whether a 304 is about what we hold, and not about the copy that the caller holds."""
        if not self._lookup.conditional:
            return True
        ours = state.request.headers.get("if-none-match")
        if "if-none-match" in self._request.headers:
            # Which of several tags it is about it has to say (§4.3.4); about a date it does not speak beside tags.
            theirs = tags_of(self._request.headers["if-none-match"])
            return ours is not None and (
                theirs == {opaque(ours)} or ("etag" in reply.headers and self._names_ours(state, reply))
            )
        return ours is not None or "if-modified-since" in state.request.headers

    def _names_ours(self, state: hishel.NeedRevalidation, reply: Reply) -> bool:
        """Whether the entity tag of a 304, if it has one, is the one that we have sent, if we have (§4.3.4)."""
        ours, named = state.request.headers.get("if-none-match"), reply.headers.get("etag")
        return ours is None or named is None or opaque(named) in (opaque(ours), opaque(self._respelt(state) or ours))

    def _freshen(self, state: hishel.NeedToBeUpdated, reply: Reply, sent: float) -> Way:
        """The origin said 304: what we hold is still right (RFC 9111 §4.3.4)."""
        exchange = self._exchange
        shown = state.next().entry
        other = self._lookup.others.get(shown.id)
        stored = self._lookup.stored(shown) if other is None else other[0]
        fields = stored.entry.headers if other is None else adopted(stored.entry, other[1])
        entry = self._renewed(stored.entry, fields, reply, sent)
        fresh: Stored | None = None
        if "no-store" in directives(reply.headers):  # §5.2.2.5: nothing of it is stored, the old fields are stale
            pass
        elif other is None:
            fresh = yield Run(partial(exchange.store.refresh, stored, entry, since=sent))
        else:
            fresh = yield Run(partial(exchange.store.save, entry, since=sent))
        if fresh is None:  # or it was written to meanwhile: an answer to this request, and to no other
            self._lease.settle(Verdict.ABANDONED)
            fresh = exchange.store.passing(entry, stored.id)
        elif other is not None and self._lease.fleet is None:
            self._lease.settle(Verdict.PUBLISHED)  # it proves something to this identity only
        elif self._lookup.shareable(entry):
            self._lease.publish(entry, refreshed=True)
        else:
            self._lease.settle(Verdict.PUBLISHED, fleet=Verdict.UNSTORABLE)
        asked = endpoint(self._request.method, self._request.url)
        exchange.stats.add("revalidated", endpoint=asked)
        exchange.stats.add("bytes_from_cache", len(entry.body), endpoint=asked)
        why = "request" if self._why == "request" else "stale"
        status = f"fwd={why}; fwd-status=304; ttl={fresh.fresh_for - int(entry.initial_age)}"
        proven = caching("origin", from_cache=True, revalidated=True)
        return self._lookup.viewed(Answer(fresh, None, status, proven, age=entry.initial_age))

    def _renewed(self, entry: Entry, fields: dict[str, list[str]], reply: Reply, sent: float) -> Entry:
        """``entry`` with ``fields``, and the times, as a reply that proves it right has renewed them (§3.2)."""
        now = time.time()
        headers = freshened(fields, reply.headers)
        if "date" not in reply.headers:
            headers["date"] = [formatdate(now, usegmt=True)]  # RFC 9110 §6.6.1: the old one is not the reply's
        age = initial_age(storable_fields(reply.headers), sent, now)
        selecting = self._lookup.selecting(headers)
        return self._lookup.asker.vouch(
            msgspec.structs.replace(
                entry,
                identity=self._lookup.asker.identity,
                selecting=selecting,
                headers=headers,
                initial_age=age,
                received=now,
            )
        )

    def _compare_with_head(self, reply: Reply, sent: float) -> None:
        """A HEAD's 200 freshens the GET's entry that it agrees with, and removes one that it does not (§4.3.5)."""
        store = self._exchange.store
        for stored in self._held:
            if stored.entry.method != "GET" or stored.entry.status != 200:
                continue
            unsaid = {"content-length": str(len(stored.entry.body))}  # where it came in chunks
            if all(
                name not in reply.headers or reply.headers[name] == (stored.entry.first(name) or unsaid.get(name))
                for name in ("etag", "last-modified", "content-length")
            ):
                validated = "etag" in reply.headers or "last-modified" in reply.headers
                if not validated or "no-store" in directives(reply.headers):  # §5.2.2.5
                    continue
                store.refresh(stored, self._renewed(stored.entry, stored.entry.headers, reply, sent), since=sent)
            else:
                store.remove(self._lookup.key, [stored])
        tag = reply.headers.get("etag")
        if tag is not None:
            others = [part for part in self._lookup.parts if parts.strong_tag(part.entry) != tag]
            store.remove(self._lookup.key, others)

    def _is_refused(self, now: float) -> bool:
        github, quotas = self._exchange.github, self._exchange.quotas
        if not github.follows(self._request.url):
            return False
        return quotas.refused(self._exchange.keyring.payer(self._lookup.seen), self._request.url, now)

    def _stale(self, cause: str, *, asked: bool = True) -> Answer | None:
        """Step 7: a stale entry that may stand in for an origin that fails (RFC 5861 §4), or None."""
        exchange, now = self._exchange, time.time()
        if self._lookup.shown.headers:
            return None
        for stored in sorted(self._held, key=lambda s: s.entry.received, reverse=True):
            age = stored.entry.age(now)
            if must_not_be_stale(stored.entry) or age - stored.fresh_for > self._stale_allowance(stored):
                continue
            if exchange.store.refused(self._lookup.key, self._lookup.asker.identity, stored.entry.received):
                continue
            exchange.stats.add("stale_served", endpoint=endpoint(self._request.method, self._request.url))
            parts = urlsplit(self._request.url)
            logger.warning("%s%s: served stale, %d s old, because of %s", parts.netloc, parts.path, age, cause)
            status = "fwd=stale" if asked else "hit"
            if cause.isdecimal():
                status += f"; fwd-status={cause}"
            status += f"; ttl={stored.fresh_for - int(age)}; detail=stale-if-error"
            self._lease.settle(Verdict.FAILED)
            return self._lookup.viewed(Answer(stored, None, status, caching("local", from_cache=True), age=age))
        return None

    def _stale_allowance(self, stored: Stored) -> float:
        """How many seconds past its lifetime an entry may be used when the origin fails."""
        for named in (self._lookup.wishes, stored.control):
            if "stale-if-error" in named:
                return seconds(named["stale-if-error"])
        settings = self._exchange.settings
        if settings.stale_if_error is not None:
            return settings.stale_if_error
        return _GITHUB_STALE_SECONDS if self._exchange.github.follows(self._request.url) else 0.0


def _lists(headers: Headers) -> dict[str, list[str]]:
    return {name: headers.get_list(name) or [] for name in headers}


def _says_what_is_there(reply: Reply) -> bool:
    return reply.status < 500 and reply.status not in _OF_NO_RESOURCE


def _is_of_use(reply: Reply) -> bool:
    """Whether an answer that may be stored can ever be an answer again: else nobody waits for it."""
    if (
        reply.status == 202
    ):  # "not yet", at GitHub with a lifetime: whoever asks again wants to know whether it is there
        return False
    if "*" in vary_names(_lists(reply.headers)) or (reply.headers.get("content-type") or "").startswith(_EVENTS):
        return False
    unproven = directives(reply.headers).get("no-cache", "") is None
    return not unproven or "etag" in reply.headers or "last-modified" in reply.headers


def _too_large(reply: Reply, limit: int) -> bool:
    length: Sequence[str] = reply.headers.get_list("content-length") or ()
    return any(line.isdecimal() and int(line[:20]) > limit for line in length)
