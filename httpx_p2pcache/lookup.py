"""The way of one GET or HEAD: steps 2 to 7 of a request's way (see ``exchange``)."""

from __future__ import annotations

import dataclasses
import logging
import time
import uuid
from collections.abc import Generator, Hashable, Sequence
from concurrent.futures import Future
from email.utils import formatdate
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import hishel
import msgspec
from hishel import CacheOptions, Headers

from httpx_p2pcache import parts
from httpx_p2pcache.answers import (
    NOT_LOOKED,
    Afterwards,
    Answer,
    Discard,
    Effect,
    Miss,
    Read,
    Reply,
    Run,
    Wait,
    Way,
    caching,
)
from httpx_p2pcache.claims import FLEET_PATIENCE, Granted, Look, Verdict
from httpx_p2pcache.conditions import combined, opaque, tags_of, viewed
from httpx_p2pcache.entries import ANONYMOUS, Entry, body_digest, cache_key, claim_key
from httpx_p2pcache.freshness import (
    directives,
    freshened,
    initial_age,
    machine_entry,
    machine_request,
    machine_response,
    machine_unproven,
    may_be_stored,
    must_not_be_stale,
    seconds,
    storable_fields,
    vary_names,
)
from httpx_p2pcache.github import adopted, endpoint, may_have_grown
from httpx_p2pcache.keep import Keep
from httpx_p2pcache.lease import Lease
from httpx_p2pcache.machine import is_local
from httpx_p2pcache.network import FleetClaim, Found, Question, may_select
from httpx_p2pcache.parts import PART
from httpx_p2pcache.quota import refuses
from httpx_p2pcache.stored import Stored

if TYPE_CHECKING:
    from httpx_p2pcache.exchange import Exchange

logger = logging.getLogger("httpx_p2pcache")

CACHEABLE = ("GET", "HEAD")
# A cache has no part in these; and a GET with content is answered for its content, which no key knows.
# ``host`` is there only if it is not the URL's: which of a server's sites it names, no key knows either.
FOR_THE_ORIGIN = frozenset({"host", "if-match", "if-unmodified-since", "transfer-encoding", "upgrade"})
CONDITIONS = frozenset({"if-modified-since", "if-none-match"})
SPECIAL = FOR_THE_ORIGIN | CONDITIONS | {"cache-control", "content-length", "if-range", "pragma", "range"}
# Fields of a request that say nothing about which representation is meant, and are not sent to peers.
_UNSELECTIVE = frozenset({"connection", "content-length", "transfer-encoding", "te"})
_OF_NO_RESOURCE = frozenset({202, 407, 408, 421, 425})  # not yet; not by this proxy, in this time, here, so early
_GITHUB_STALE_SECONDS = 86_400.0
_OPTIONS = CacheOptions(shared=False, supported_methods=list(CACHEABLE))


class Lookup:
    """The way of one GET or HEAD: steps 2 to 7."""

    def __init__(
        self,
        exchange: Exchange,
        request: hishel.Request,
        wishes: dict[str, str | None],
        patience: float | None = None,
        background: bool = False,
    ) -> None:
        self.patience = (
            exchange.settings.claim_timeout if patience is None else min(patience, exchange.settings.claim_timeout)
        )
        self.background = background
        self.conditional = not CONDITIONS.isdisjoint(request.headers)
        self.plain = SPECIAL.isdisjoint(request.headers)
        self.ranged = "range" in request.headers and request.method == "GET"
        self.exchange = exchange
        self.request = request
        self.wishes = wishes
        self.key = cache_key(request.url)
        self.seen = exchange.github.seen(request)
        self.asker = exchange.keyring.asker(self.seen)
        self.shown = machine_request(request)
        self.pooled = exchange.github.pools(request.method, request.url)
        self.shared = self.pooled and exchange.github.shares(request.method, request.url, request.headers)
        self.held: list[Stored] = []  # what this identity may use, once it is fresh
        self.parts: list[Stored] = []  # 206s that this identity may use
        self.others: dict[uuid.UUID, tuple[Stored, str]] = {}  # what it may use once the origin has said 304 to a tag
        self.collapsed = False
        self._found: list[Stored] | None = None  # by the last look, ...
        self._state: Stored | hishel.AnyState  # ... and what it came to

    def way(self, caller: Hashable, miss: Miss = NOT_LOOKED) -> Way:
        exchange = self.exchange
        # Where every identity can use the answer in some way, the whole fleet waits for one fetch.
        claim = claim_key(self.request, "" if self.pooled else self.asker.identity)
        lease = Lease(exchange, self.key, claim)
        source, landed = "local", exchange.flights.landed if miss.found is None else miss.landed
        try:
            state = yield from self._look(miss.found)
            if isinstance(state, Stored):
                return self._serve(state, source)
            answer = self._while_revalidate(state, claim)
            if answer is not None:
                return answer
            answer = self._from_part()
            if answer is not None:
                return answer
            if "only-if-cached" in self.wishes:  # §5.2.1.7
                return Answer(None, None, "detail=only-if-cached", caching("local"))
            if self.ranged:
                return (yield from self._fetch_part(lease))

            ticket = exchange.flights.ask(claim, caller)
            if isinstance(ticket, Future):
                ticket = yield from lease.wait(ticket, self.patience)
                self.collapsed = isinstance(ticket, Look)
            if isinstance(ticket, Granted):
                lease.flight = ticket.id
            # Look again inside the flight: between our look-up and the ticket another flight may have landed.
            if exchange.flights.landed != landed:
                state = yield from self._look()
                if isinstance(state, Stored):
                    lease.settle(Verdict.PUBLISHED)
                    return self._serve(state, source)

            found = (yield from self._ask_the_fleet(lease)) if lease.flight is not None else None
            if found is not None:
                source = "peer"
            come = None if found is None else found.stored
            if come is not None and self.plain and exchange.fresh(self.seen, self.asker, [come]):
                state = come
            elif found is not None or (lease.fleet is not None and lease.fleet.brought):
                state = yield from self._look()
            if isinstance(state, Stored):
                lease.settle(Verdict.PUBLISHED)
                return self._serve(state, source)
            return (yield from self._fetch(state, lease))
        except BaseException as exc:
            lease.give_up(Verdict.FAILED if isinstance(exc, Exception) else Verdict.ABANDONED)
            raise

    def _look(self, found: list[Stored] | None = None) -> Generator[Effect, Any, Stored | hishel.AnyState]:
        """What the store holds that may be served, or what hishel's machine says to it; ``found``: if it is known."""
        store = self.exchange.store
        if found is None:
            found = store.peek(self.key)
        if found is None:
            found = yield Run(partial(store.load, self.key))
        if found is self._found:  # nothing has come, and nothing has gone
            return self._state
        self._found = found
        self._state = yield from self._judged(found, time.time())
        return self._state

    def _judged(self, found: list[Stored], now: float) -> Generator[Effect, Any, Stored | hishel.AnyState]:
        exchange, value_of = self.exchange, self.exchange.value_of(self.seen)
        self.held, self.parts, self.others = [], [], {}
        if not found:
            return hishel.CacheMiss(_OPTIONS, self.shown)
        if self.plain and (best := exchange.fresh(self.seen, self.asker, found)) is not None:
            self.held = [best]
            return best
        self.held = [
            stored
            for stored in found
            if exchange.may_use(stored, self.asker) and stored.matches(self.request.method, value_of)
        ]
        self.parts = [s for s in found if exchange.may_use(s, self.asker) and s.matches(PART, value_of)]
        ttl = exchange.settings.default_ttl
        method, wishes = self.request.method, self.wishes
        # Only the latest counts (§4): what is older is no answer, and its validators prove nothing of it.
        self.held.sort(key=lambda stored: stored.made, reverse=True)
        latest = self.held[:1]
        shown = [machine_entry(stored.entry, method, stored.id, wishes, now, ttl) for stored in latest]
        if exchange.github.follows(self.request.url):
            shown = [view for stored, view in zip(latest, shown, strict=True) if not self._incomplete(stored, view)]
        if self.shared:
            shown += yield Run(partial(self._others, found, now))
        state = hishel.IdleClient(options=_OPTIONS).next(self.shown, shown)
        return self._stored(state.entry) if isinstance(state, hishel.FromCache) else state

    def _incomplete(self, stored: Stored, view: hishel.Entry) -> bool:
        """Whether it would have to be validated, and a 304 would not tell all."""
        state = hishel.IdleClient(options=_OPTIONS).next(self.shown, [view])
        return isinstance(state, hishel.NeedRevalidation) and may_have_grown(stored.entry)

    def _others(self, found: list[Stored], now: float) -> list[hishel.Entry]:
        """Entries of other identities as the machine may see them: with the tag that they have for us, unvalidated."""
        exchange, value_of, shown = self.exchange, self.exchange.value_of(self.seen), []
        for stored in found:
            if stored in self.held or not stored.matches(self.request.method, value_of, any_identity=True):
                continue
            etag = exchange.github.validator(self.request.headers, stored.entry, stored.memo)
            if etag is None:
                continue
            self.others[stored.id] = stored, etag
            shown.append(machine_unproven(stored.entry, stored.id, etag, now))
        return shown

    def _serve(self, stored: Stored, source: str) -> Answer:
        return self._viewed(self.exchange.from_store(stored, time.time(), source=source, collapsed=self.collapsed))

    def _viewed(self, answer: Answer) -> Answer:
        """The answer as the caller's own conditions ask for it."""
        if answer.stored is not None and (self.conditional or self.ranged):
            answer.view = viewed(answer.stored.entry, self.request.method, self.request.headers)
        return answer

    def _from_part(self) -> Answer | None:
        """The part that a range asks for, if it is held and fresh."""
        now, ttl = time.time(), self.exchange.settings.default_ttl
        for stored in self.parts if self.ranged and not self.conditional else ():
            view = parts.view(stored.entry, self.request.headers)
            shown = machine_entry(stored.entry, "GET", stored.id, self.wishes, now, ttl)
            shown.response.status_code = 200
            state = hishel.IdleClient(options=_OPTIONS).next(self.shown, [shown])
            if view is not None and isinstance(state, hishel.FromCache):
                answer = self.exchange.from_store(stored, now, source="local")
                answer.view = view
                return answer
        return None

    def _fetch_part(self, lease: Lease) -> Way:
        """A range that is not held. The whole fleet seldom wants the same one, so nobody waits for it."""
        sent = time.time()
        answer = yield from self.exchange.pass_by(self.request, "miss")
        yield from self.exchange.heed_refusal(self.request, answer.reply, sent)
        if answer.reply is not None and self._storable(answer.reply):
            answer.keep = Keep(self, answer.reply, sent, lease)
            answer.cache_status += "; stored"
            answer.caching["stored"] = True
        return answer

    def _storable(self, reply: Reply) -> bool:
        """Whether the answer to a range may be stored: a part, or the whole if the origin ignores ranges."""
        return (
            reply.status in (200, 206)
            and may_be_stored("GET", 200, reply.headers)
            and not _too_large(reply, self.exchange.settings.max_body_size)
        )

    def _while_revalidate(self, state: hishel.AnyState, claim: bytes) -> Answer | None:
        """What may be served stale while it is revalidated in the background (RFC 5861 §3)."""
        if not self.background or not self.plain:
            return None
        if not isinstance(state, hishel.NeedRevalidation) or state.revalidating_entries[0].id in self.others:
            return None
        stored, now = self._stored(state.revalidating_entries[0]), time.time()
        allowed = seconds(stored.control.get("stale-while-revalidate"))
        if must_not_be_stale(stored.entry) or stored.entry.age(now) - stored.fresh_for >= allowed:
            return None
        answer = self.exchange.from_store(stored, now, source="local")
        answer.cache_status += "; detail=stale-while-revalidate"
        if self.exchange.begins_revalidation(claim):
            way = Lookup(self.exchange, self.request, self.wishes).way(object())
            answer.afterwards = Afterwards(way, partial(self.exchange.revalidating.pop, claim, None))
        return answer

    def _stored(self, shown: hishel.Entry) -> Stored:
        return next(stored for stored in self.held if stored.id == shown.id)

    def _ask_the_fleet(self, lease: Lease) -> Generator[Effect, Any, Found | None]:
        """Step 3: what has come from a peer; the lease holds the fleet's claim if it was granted."""
        exchange = self.exchange
        settings = exchange.settings
        if self.shown.headers:  # it demands validation end to end: no peer can answer that
            return None
        if exchange.may_wait_to_join:
            yield Wait(exchange.network.joined(), settings.join_timeout)
            exchange.may_wait_to_join = False
        if not exchange.network.active:
            return None
        names = [name for name in self.request.headers if name not in _UNSELECTIVE]
        selecting = exchange.keyring.selecting(self.seen.headers, names)
        if not may_select(selecting):
            return None
        question = Question(
            key=self.key,
            claim=lease.claim,
            method=self.request.method,
            identity=self.asker.identity,
            selecting=selecting,
            holds=self.held[0].entry.digest if self.held else b"",
            age=self.held[0].entry.age(time.time()) if self.held else 0.0,
            any_identity=self.shared,
            local=is_local(self.request.url),
        )
        until = time.monotonic() + FLEET_PATIENCE * self.patience
        asked = exchange.network.ask(question)
        patience = min(settings.lookup_timeout, max(0.0, until - time.monotonic()))
        answer = yield from lease.wait(asked, patience, keep=True)
        if answer is None and asked.awaited:
            answer = yield from lease.wait(asked, max(0.0, until - time.monotonic()))
        elif answer is None:
            lease.late = True
            asked.add_done_callback(lease.adopt_late)
        if isinstance(answer, Found):
            self.collapsed = self.collapsed or asked.awaited
            return answer
        self.collapsed = False
        if isinstance(answer, FleetClaim):
            lease.fleet = answer
        elif answer is None:
            exchange.stats.add("peer_timeouts")
            exchange.stats.add("peer_failures")
        return None

    def _fetch(self, state: hishel.AnyState, lease: Lease) -> Way:
        """Steps 5 to 7."""
        exchange = self.exchange
        why = "stale" if self.held else "miss"
        if self.held:
            exchange.stats.add("expirations", endpoint=endpoint(self.request.method, self.request.url))
        if self.shown.headers:
            why = "request"
        begun = None if self.held or self.conditional or self.request.method != "GET" else self._begun()
        while True:
            assert isinstance(state, (hishel.CacheMiss, hishel.NeedRevalidation))
            added: dict[str, str] = {} if begun is None else begun[1]
            respelt: str | None = None
            if isinstance(state, hishel.NeedRevalidation):
                added = {n: state.request.headers[n] for n in state.request.headers if n.startswith("if-")}
                respelt = self._respelt(state)
                if respelt is not None:
                    added["if-none-match"] += f", {respelt}"
                if self.conditional:
                    added = combined(self.request.headers, added)
            sent = time.time()
            if self._is_refused(sent):
                stale = self._stale("its rate limit")
                if stale is not None:
                    lease.settle(Verdict.FAILED)
                    return stale
            try:
                reply = yield from exchange.send(self.request, added)
            except Exception as exc:
                stale = self._stale(type(exc).__name__)
                if stale is None:
                    raise
                lease.settle(Verdict.FAILED)
                return stale
            if _failing(reply):
                stale = self._stale(str(reply.status))
                if stale is not None:
                    yield Discard()
                    lease.settle(Verdict.FAILED)
                    return stale
            if begun is not None and reply.status in (206, 416):
                answer = yield from self._complete(begun[0], reply, sent, lease)
                if answer is not None:
                    return answer
                begun = None  # not what was asked for: once more, for the whole
                continue
            if reply.status == 304:
                if self._is_ambiguous(added, reply):  # once more, with the caller's own tags alone
                    yield Discard()
                    state, why = hishel.CacheMiss(_OPTIONS, self.shown), "miss"
                    continue
                if isinstance(state, hishel.CacheMiss) or (self.conditional and not self._proves_ours(state, reply)):
                    # It is about the caller's copy, or about none at all: those who wait need one.
                    lease.settle(Verdict.ABANDONED)
                    return Answer(None, reply, f"fwd={why}; fwd-status=304", caching("origin"))
                yield Discard()
                if not self._names_ours(state, reply):
                    state, why = hishel.CacheMiss(_OPTIONS, self.shown), "miss"
                    continue
            if isinstance(state, hishel.CacheMiss):
                storable = may_be_stored(self.request.method, reply.status, reply.headers)
                break
            seen = hishel.Response(reply.status, reply.headers)
            # The machine compares with the tag that it knows; the new one is stored with the other fields.
            if respelt and opaque(reply.headers.get("etag") or "") == opaque(respelt):
                known = {"etag": [str(self._stored(state.revalidating_entries[0]).entry.first("etag"))]}
                seen = hishel.Response(reply.status, Headers({**_lists(reply.headers), **known}))
            if reply.status == 304:  # about the one whose validators were sent, and none that looks like it
                if state.revalidating_entries[0].id in self.others:  # of which the machine knows its tag alone
                    seen.headers.pop("last-modified", None)
                state = dataclasses.replace(state, revalidating_entries=state.revalidating_entries[:1])
            state = state.next(machine_response(seen))
            if isinstance(state, hishel.InvalidateEntries):
                ours = [stored for stored in self.held if stored.id in state.entry_ids]
                yield Run(partial(exchange.store.remove, self.key, ours))
                state = state.next()
            if not isinstance(state, hishel.CacheMiss):
                storable = isinstance(state, hishel.StoreAndUse)
                break
            why = "miss"  # a 304 that fits nothing we hold: once more, without conditions of ours
        if isinstance(state, hishel.NeedToBeUpdated):
            return (yield from self._freshen(state, reply, sent, lease))
        if self.request.method == "HEAD" and reply.status == 200:
            yield Run(partial(self._compare_with_head, reply, sent))
        yield from exchange.heed_refusal(self.request, reply, sent)
        keep = None
        # A 202 says "not yet", at GitHub with a lifetime; whoever asks again wants to know whether it is there now.
        if storable and reply.status != 202 and not _too_large(reply, exchange.settings.max_body_size):
            keep = Keep(self, reply, sent, lease)
        else:
            if self.request.method == "GET" and _says_what_is_there(reply):
                # §4.3.3: a full answer says that what we hold is none any more; a refusal says it to this identity.
                refused = reply.status in (401, 403)
                ours = [s for s in self.held if not refused or s.entry.identity == self.asker.identity]
                yield Run(partial(exchange.store.remove, self.key, ours))
            lease.settle(Verdict.FAILED if reply.status >= 500 else Verdict.UNSTORABLE)
        status = (
            f"fwd={why}" + (f"; fwd-status={reply.status}" if why == "stale" else "") + ("; stored" if keep else "")
        )
        return Answer(None, reply, status, caching("origin", stored=keep is not None), keep)

    def _begun(self) -> tuple[Stored, dict[str, str]] | None:
        """A part that is the beginning of what is asked for, and the fields that ask for the rest."""
        for stored in self.parts:
            fields = parts.rest(stored.entry, self.exchange.settings.max_body_size)
            if fields is not None:
                return stored, fields
        return None

    def _complete(self, part: Stored, reply: Reply, sent: float, lease: Lease) -> Generator[Effect, Any, Answer | None]:
        """What a part and the rest of it come to (RFC 9111 §3.4); None if that is not the whole."""
        exchange, entry, stored = self.exchange, None, None
        if reply.status == 206 and not _too_large(reply, exchange.settings.max_body_size):
            body = yield Read()
            entry = parts.completed(part.entry, self.entry(reply, body, sent))
            entry = entry and self.asker.vouch(entry)
        yield Discard()
        if entry is None:
            yield Run(partial(exchange.store.remove, self.key, [part]))
            return None
        if self._storable(reply):
            stored = yield Run(partial(exchange.store.save, entry, since=sent))
        if stored is not None and self.shareable(entry):
            lease.publish(entry)
        else:
            lease.settle(Verdict.UNSTORABLE)
        stored = stored or exchange.store.passing(part, entry)
        status = "fwd=partial; fwd-status=206" + ("; stored" if stored.id != part.id else "")
        return Answer(stored, None, status, caching("origin", stored=stored.id != part.id), age=entry.initial_age)

    def _respelt(self, state: hishel.NeedRevalidation) -> str | None:
        """The tag of what is revalidated, if it was given to another spelling of the same credentials.

        GitHub binds it to the whole field, ``token T`` or ``Bearer T``; to the one it sees now it is another.
        """
        shown = state.revalidating_entries[0]
        if not self.shared or shown.id in self.others or "if-none-match" not in state.request.headers:
            return None
        stored = self._stored(shown)
        etag = self.exchange.github.validator(self.request.headers, stored.entry, stored.memo)
        return None if etag is None or opaque(etag) == opaque(stored.entry.first("etag") or "") else etag

    def _is_ambiguous(self, added: dict[str, str], reply: Reply) -> bool:
        """Whether a 304 does not say which of the caller's tags and ours it is about, as it should (§4.3.4)."""
        theirs, sent = self.request.headers.get("if-none-match"), added.get("if-none-match")
        return theirs is not None and sent is not None and sent != theirs and "etag" not in reply.headers

    def _proves_ours(self, state: hishel.AnyState, reply: Reply) -> bool:
        """Whether a 304 is about what we hold, and not about the copy that the caller holds."""
        if not isinstance(state, hishel.NeedRevalidation):
            return False
        ours = state.request.headers.get("if-none-match")
        if "if-none-match" in self.request.headers:
            # Which of several tags it is about it has to say (§4.3.4); about a date it does not speak beside tags.
            theirs = tags_of(self.request.headers["if-none-match"])
            return ours is not None and (
                theirs == {opaque(ours)} or ("etag" in reply.headers and self._names_ours(state, reply))
            )
        return ours is not None or "if-modified-since" in state.request.headers

    def _names_ours(self, state: hishel.NeedRevalidation, reply: Reply) -> bool:
        """Whether the entity tag of a 304, if it has one, is the one that we have sent, if we have (§4.3.4)."""
        ours, named = state.request.headers.get("if-none-match"), reply.headers.get("etag")
        return ours is None or named is None or opaque(named) in (opaque(ours), opaque(self._respelt(state) or ours))

    def _compare_with_head(self, reply: Reply, sent: float) -> None:
        """A HEAD's 200 freshens the GET's entry that it agrees with, and removes one that it does not (§4.3.5)."""
        store = self.exchange.store
        for stored in self.held:
            if stored.entry.method != "GET" or stored.entry.status != 200:
                continue
            if all(
                name not in reply.headers or reply.headers[name] == stored.entry.first(name)
                for name in ("etag", "last-modified", "content-length")
            ):
                validated = "etag" in reply.headers or "last-modified" in reply.headers
                if not validated or "no-store" in directives(reply.headers):  # §5.2.2.5
                    continue
                store.refresh(stored, self._renewed(stored.entry, stored.entry.headers, reply, sent), since=sent)
            else:
                store.remove(self.key, [stored])

    def _freshen(self, state: hishel.NeedToBeUpdated, reply: Reply, sent: float, lease: Lease) -> Way:
        """The origin said 304: what we hold is still right (RFC 9111 §4.3.4)."""
        exchange = self.exchange
        shown = state.next().entry
        other = self.others.get(shown.id)
        stored = self._stored(shown) if other is None else other[0]
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
            lease.settle(Verdict.ABANDONED)
            fresh = exchange.store.passing(stored, entry)
        elif other is not None and lease.fleet is None:
            lease.settle(Verdict.PUBLISHED)  # it proves something to this identity only
        elif self.shareable(entry):
            lease.publish(entry, refreshed=True)
        else:
            lease.settle(Verdict.PUBLISHED, fleet=Verdict.UNSTORABLE)
        asked = endpoint(self.request.method, self.request.url)
        exchange.stats.add("revalidated", endpoint=asked)
        exchange.stats.add("bytes_from_cache", len(entry.body), endpoint=asked)
        status = f"fwd=stale; fwd-status=304; ttl={fresh.fresh_for - int(entry.initial_age)}"
        proven = caching("origin", from_cache=True, revalidated=True)
        return self._viewed(Answer(fresh, None, status, proven, age=entry.initial_age))

    def _renewed(self, entry: Entry, fields: dict[str, list[str]], reply: Reply, sent: float) -> Entry:
        """``entry`` with ``fields``, and the times, as a reply that proves it right has renewed them (§3.2)."""
        now = time.time()
        headers = freshened(fields, reply.headers)
        if "date" not in reply.headers:
            headers["date"] = [formatdate(now, usegmt=True)]  # RFC 9110 §6.6.1: the old one is not the reply's
        age = initial_age(storable_fields(reply.headers), sent, now)
        selecting = self.selecting(vary_names(headers))
        return self.asker.vouch(
            msgspec.structs.replace(
                entry,
                identity=self.asker.identity,
                selecting=selecting,
                headers=headers,
                initial_age=age,
                received=now,
            )
        )

    def _is_refused(self, now: float) -> bool:
        github, quotas = self.exchange.github, self.exchange.quotas
        return github.follows(self.request.url) and quotas.refused(self.asker.identity, self.request.url, now)

    def _stale(self, cause: str) -> Answer | None:
        """Step 7: a stale entry that may stand in for an origin that fails (RFC 5861 §4), or None."""
        exchange, now = self.exchange, time.time()
        if self.shown.headers:
            return None
        for stored in sorted(self.held, key=lambda s: s.entry.received, reverse=True):
            age = stored.entry.age(now)
            if must_not_be_stale(stored.entry) or age - stored.fresh_for > self._stale_allowance(stored):
                continue
            if exchange.store.refused(self.key, self.asker.identity, stored.entry.received):
                continue
            exchange.stats.add("stale_served", endpoint=endpoint(self.request.method, self.request.url))
            parts = urlsplit(self.request.url)
            logger.warning("%s%s: served stale, %d s old, because of %s", parts.netloc, parts.path, age, cause)
            status = f"fwd=stale; ttl={stored.fresh_for - int(age)}; detail=stale-if-error"
            if cause.isdecimal():
                status = status.replace("fwd=stale;", f"fwd=stale; fwd-status={cause};")
            return self._viewed(Answer(stored, None, status, caching("local", from_cache=True), age=age))
        return None

    def _stale_allowance(self, stored: Stored) -> float:
        """How many seconds past its lifetime an entry may be used when the origin fails."""
        for named in (self.wishes, stored.control):
            if "stale-if-error" in named:
                return seconds(named["stale-if-error"])
        settings = self.exchange.settings
        if settings.stale_if_error is not None:
            return settings.stale_if_error
        return _GITHUB_STALE_SECONDS if self.exchange.github.follows(self.request.url) else 0.0

    def entry(self, reply: Reply, body: bytes, sent: float) -> Entry:
        """The entry that a complete response becomes."""
        now = time.time()
        headers = storable_fields(reply.headers)
        if "date" not in headers:  # RFC 9110 §6.6.1
            headers["date"] = [formatdate(now, usegmt=True)]
        entry = Entry(
            method=self.request.method,
            url=self.request.url,
            identity=self.asker.identity,
            selecting=self.selecting(vary_names(headers)),
            status=reply.status,
            headers=headers,
            body=body,
            digest=body_digest(body),
            initial_age=initial_age(headers, sent, now),
            received=now,
        )
        return self.asker.vouch(entry)

    def selecting(self, names: list[str]) -> dict[str, str]:
        """This request's fields of these names, as they may be stored."""
        return self.exchange.keyring.selecting(self.seen.headers, names)

    @staticmethod
    def shareable(entry: Entry) -> bool:
        """Whether a peer may ever use it: cookies are for one user only, and ``Vary: *`` for one request."""
        if "set-cookie" in entry.headers or "*" in vary_names(entry.headers):
            return False
        # For one user, and we do not see which: a client certificate, or a transport below us, says who asks.
        return entry.identity != ANONYMOUS or "private" not in directives(entry.headers)


def _lists(headers: Headers) -> dict[str, list[str]]:
    return {name: headers.get_list(name) or [] for name in headers}


def _says_what_is_there(reply: Reply) -> bool:
    return reply.status < 500 and reply.status not in _OF_NO_RESOURCE and not refuses(reply.status, reply.headers)


def _failing(reply: Reply) -> bool:
    """Whether the origin is down, or refuses for its limits."""
    return reply.status in (500, 502, 503, 504) or refuses(reply.status, reply.headers)  # RFC 5861 §4


def _too_large(reply: Reply, limit: int) -> bool:
    length: Sequence[str] = reply.headers.get_list("content-length") or ()
    return any(line.isdecimal() and int(line[:20]) > limit for line in length)
