"""The way of one GET or HEAD up to the origin: steps 2 to 4 of a request's way (see ``exchange``)."""

from __future__ import annotations

import time
import uuid
from collections.abc import Generator, Hashable
from concurrent.futures import Future
from email.utils import formatdate
from functools import partial
from typing import TYPE_CHECKING, Any

import hishel
from hishel import CacheOptions

from httpx_p2pcache import parts
from httpx_p2pcache.answers import (
    NOT_LOOKED,
    Afterwards,
    Answer,
    Effect,
    Miss,
    Reply,
    Run,
    Wait,
    Way,
    caching,
)
from httpx_p2pcache.claims import FLEET_PATIENCE, Granted, Look, Verdict
from httpx_p2pcache.conditions import viewed
from httpx_p2pcache.entries import ANONYMOUS, Entry, body_digest, cache_key, claim_key
from httpx_p2pcache.fetch import Fetch
from httpx_p2pcache.freshness import (
    directives,
    initial_age,
    is_for_others,
    machine_entry,
    machine_request,
    machine_unproven,
    must_not_be_stale,
    seconds,
    storable_fields,
    vary_names,
)
from httpx_p2pcache.github import may_have_grown
from httpx_p2pcache.lease import Lease
from httpx_p2pcache.machine import is_local
from httpx_p2pcache.network import FleetClaim, Found, Question, may_select
from httpx_p2pcache.parts import PART
from httpx_p2pcache.stored import VERSION, VERSION_SELECTED, Stored

if TYPE_CHECKING:
    from httpx_p2pcache.exchange import Exchange

CACHEABLE = ("GET", "HEAD")
# A cache has no part in these; and a GET with content is answered for its content, which no key knows.
# ``host`` is there only if it is not the URL's: which of a server's sites it names, no key knows either.
FOR_THE_ORIGIN = frozenset({"host", "if-match", "if-unmodified-since", "transfer-encoding", "upgrade"})
CONDITIONS = frozenset({"if-modified-since", "if-none-match"})
SPECIAL = FOR_THE_ORIGIN | CONDITIONS | {"cache-control", "content-length", "if-range", "pragma", "range"}
# Fields of a request that say nothing about which representation is meant, and are not sent to peers.
_UNSELECTIVE = frozenset({"connection", "content-length", "transfer-encoding", "te"})
MAX_TRIED = 4  # entries of other identities that are unpacked to see whether they can be proven
_OPTIONS = CacheOptions(shared=False, supported_methods=list(CACHEABLE))


class Lookup:
    """The way of one GET or HEAD: steps 2 to 4; what follows is a :class:`~httpx_p2pcache.fetch.Fetch`."""

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
        self.began = time.monotonic()
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
                return (yield from Fetch(self, lease).part())

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
            if come is not None and self.plain and exchange.fresh(self.seen, self.asker, [*self.held, come]) is come:
                state = come
            elif found is not None or (lease.fleet is not None and lease.fleet.brought):
                state = yield from self._look()
            if isinstance(state, Stored):
                lease.settle(Verdict.PUBLISHED)
                return self._serve(state, source)
            return (yield from Fetch(self, lease).way(state))
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
            return self.nothing()
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
        return self.stored(state.entry) if isinstance(state, hishel.FromCache) else state

    def _incomplete(self, stored: Stored, view: hishel.Entry) -> bool:
        """Whether it would have to be validated, and a 304 would not tell all."""
        state = hishel.IdleClient(options=_OPTIONS).next(self.shown, [view])
        return isinstance(state, hishel.NeedRevalidation) and may_have_grown(stored.entry)

    def _others(self, found: list[Stored], now: float) -> list[hishel.Entry]:
        """Entries of other identities as the machine may see them: with the tag that they have for us, unvalidated."""
        exchange, value_of, tried = self.exchange, self.exchange.value_of(self.seen), 0
        for stored in sorted(found, key=lambda one: one.made, reverse=True):
            if stored in self.held or not stored.matches(self.request.method, value_of, any_identity=True):
                continue
            etag = exchange.github.validator(self.request.headers, stored.entry, stored.memo)
            if etag is not None:  # one tag is sent, and so it is the latest that can be proven
                self.others[stored.id] = stored, etag
                return [machine_unproven(stored.entry, stored.id, etag, now)]
            tried += 1
            if tried == MAX_TRIED:
                break
        return []

    def _serve(self, stored: Stored, source: str) -> Answer:
        return self.viewed(self.exchange.from_store(stored, time.time(), source=source, collapsed=self.collapsed))

    def viewed(self, answer: Answer) -> Answer:
        """The answer as the caller's own conditions ask for it."""
        if answer.stored is not None and (self.conditional or self.ranged):
            answer.view = viewed(answer.stored.entry, self.request.method, self.request.headers)
        return answer

    def _from_part(self) -> Answer | None:
        """The part that a range asks for, if it is held and fresh."""
        now, ttl = time.time(), self.exchange.settings.default_ttl
        later = self.held[0].made if self.held else None
        for stored in self.parts if self.ranged and not self.conditional else ():
            if later is not None and stored.made < later:
                continue
            view = parts.view(stored.entry, self.request.headers)
            shown = machine_entry(stored.entry, "GET", stored.id, self.wishes, now, ttl)
            shown.response.status_code = 200
            state = hishel.IdleClient(options=_OPTIONS).next(self.shown, [shown])
            if view is not None and isinstance(state, hishel.FromCache):
                answer = self.exchange.from_store(stored, now, source="local")
                answer.view = view
                return answer
        return None

    def _while_revalidate(self, state: hishel.AnyState, claim: bytes) -> Answer | None:
        """What may be served stale while it is revalidated in the background (RFC 5861 §3)."""
        if not self.background or not self.plain:
            return None
        if not isinstance(state, hishel.NeedRevalidation) or state.revalidating_entries[0].id in self.others:
            return None
        stored, now = self.stored(state.revalidating_entries[0]), time.time()
        allowed = seconds(stored.control.get("stale-while-revalidate"))
        if must_not_be_stale(stored.entry) or stored.entry.age(now) - stored.fresh_for >= allowed:
            return None
        answer = self.exchange.from_store(stored, now, source="local")
        answer.cache_status += "; detail=stale-while-revalidate"
        if self.exchange.begins_revalidation(claim):
            way = Lookup(self.exchange, self.request, self.wishes).way(object())
            answer.afterwards = Afterwards(way, partial(self.exchange.revalidating.pop, claim, None))
        return answer

    def nothing(self) -> hishel.CacheMiss:
        """What hishel's machine says where nothing is held."""
        return hishel.CacheMiss(_OPTIONS, self.shown)

    def stored(self, shown: hishel.Entry) -> Stored:
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
        until = self.began + FLEET_PATIENCE * self.patience
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
            selecting=self.selecting(headers),
            status=reply.status,
            headers=headers,
            body=body,
            digest=body_digest(body),
            initial_age=initial_age(headers, sent, now),
            received=now,
        )
        return self.asker.vouch(entry)

    def selecting(self, headers: dict[str, list[str]]) -> dict[str, str]:
        """This request's fields that have selected a response with these ``headers``, as they may be stored."""
        names = [*vary_names(headers), *([VERSION] if VERSION_SELECTED in headers else [])]
        return self.exchange.keyring.selecting(self.seen.headers, names)

    @staticmethod
    def shareable(entry: Entry) -> bool:
        """Whether a peer may ever use it: cookies are for one user only, and ``Vary: *`` for one request."""
        if "set-cookie" in entry.headers or "*" in vary_names(entry.headers) or not is_for_others(entry.status):
            return False
        # For one user, and we do not see which: a client certificate, or a transport below us, says who asks.
        return entry.identity != ANONYMOUS or "private" not in directives(entry.headers)
