"""A request's way, from the look-up to the answer: one generator that does no I/O itself.

It yields what it needs done and is sent what came of it. A sync and an async pump (in ``transport``) do it:

========================  ==============================================================================
:class:`Run`              call a function that may touch the disk; sent its result
:class:`Wait`             wait for a future; sent its result, or None if there was none in time
:class:`Send`             send the caller's request to the origin with these fields added; sent a Reply
:class:`Discard`          be done with a reply that is not passed on, so that its connection is free
========================  ==============================================================================

The way (the numbers are those of the README's "Loading process"):

1. Unsafe methods go to the origin; a success invalidates here and at every peer.
2. What the store holds: fresh, and the identity may use it: answered.
3. One flight per key in this process; its leader asks the key's home, once, for the entry or for the fleet's claim.
4. hishel's state machine decides on what we now hold.
5. The origin, conditional where we hold a body.
6. Storable: saved when the caller has read it to its end, published, and the claim released by that. Anything else
   releases the claim at once with its verdict.
7. The origin failed or refused for its limits, and we hold a stale entry that may be used: served, marked.

Whoever holds a claim owes those who wait exactly one verdict, on every path: that is :class:`_Lease`.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from email.utils import formatdate
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import hishel
import msgspec
from hishel import CacheOptions, Headers

from httpx_p2pcache.claims import Flights, Granted, Look, Verdict
from httpx_p2pcache.conditions import View, combined, opaque, viewed
from httpx_p2pcache.entries import (
    ANONYMOUS,
    Entry,
    Keyring,
    body_digest,
    cache_key,
    carries_credentials,
    claim_key,
    resolved_url,
    same_origin,
)
from httpx_p2pcache.freshness import (
    directives,
    freshened,
    initial_age,
    machine_entry,
    machine_request,
    machine_response,
    machine_unproven,
    must_not_be_stale,
    seconds,
    storable_fields,
    vary_names,
)
from httpx_p2pcache.github import GitHub, adopted, may_have_grown
from httpx_p2pcache.network import Awaited, FleetClaim, Found, NoPeers, PeerNetwork, Question
from httpx_p2pcache.quota import QuotaBoard, refuses
from httpx_p2pcache.settings import Settings
from httpx_p2pcache.stats import Stats, summary
from httpx_p2pcache.store import Store, Stored

logger = logging.getLogger("httpx_p2pcache")

_CACHEABLE = ("GET", "HEAD")
_SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})  # RFC 9110 §9.2.1
# A cache has no part in these; and a GET with content is answered for its content, which no key knows.
_FOR_THE_ORIGIN = frozenset({"if-match", "if-unmodified-since", "transfer-encoding", "upgrade"})
_CONDITIONS = frozenset({"if-modified-since", "if-none-match"})
_SPECIAL = _FOR_THE_ORIGIN | _CONDITIONS | {"cache-control", "content-length", "if-range", "pragma", "range"}
# Fields of a request that say nothing about which representation is meant, and are not sent to peers.
_UNSELECTIVE = frozenset({"connection", "host", "content-length", "transfer-encoding", "te"})
MAX_SELECTING = 100  # fields of a request beyond which no peer is asked
_GITHUB_STALE_SECONDS = 86_400.0
_OPTIONS = CacheOptions(shared=False, supported_methods=list(_CACHEABLE))


class Run(NamedTuple):
    func: Callable[[], Any]


class Wait(NamedTuple):
    future: Future[Any]
    seconds: float
    keep: bool = False  # else it is cancelled when it does not come in time: nobody wants it any more


class Send(NamedTuple):
    added: dict[str, str]


class Discard(NamedTuple):
    reply: Reply


Effect = Run | Wait | Send | Discard
Way = Generator[Effect, Any, "Answer"]


@dataclass(frozen=True)
class Reply:
    """A response from the origin: its head, and the client's own object with the body still to be read."""

    status: int
    headers: Headers
    native: Any


@dataclass
class Answer:
    """What the caller gets: a ``stored`` entry, or the origin's ``reply`` (``keep`` saves it as it is read), or a 504.

    ``cache_status`` is the RFC 9211 member that describes it; ``caching`` the mapping for ``extensions``.
    """

    stored: Stored | None
    reply: Reply | None
    cache_status: str
    caching: dict[str, Any]
    keep: Keep | None = None
    age: float = 0.0
    view: View | None = None  # of ``stored``, where the caller has conditions of its own
    afterwards: Way | None = None  # to be driven in the background once the answer is given (RFC 5861 §3)


class Exchange:
    """The way of every request of one transport."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        keyring: Keyring,
        stats: Stats,
        network: PeerNetwork,
        github: GitHub,
        quotas: QuotaBoard,
    ) -> None:
        self.settings = settings
        self.store = store
        self.keyring = keyring
        self.stats = stats
        self.network = network
        self.github = github
        self.quotas = quotas
        self.flights = Flights(settings.claim_timeout, time.monotonic)
        self._may_wait_to_join = settings.join_timeout > 0

    def describe(self) -> dict[str, object]:
        """Counters, the figures made of them, the node's state and the store's size, as plain values."""
        entries, size = self.store.size()
        return {
            **summary(self.stats.snapshot()),
            **self.network.status(),
            "quotas": self.quotas.describe(),
            "cache_dir": str(self.settings.dir),
            "cache_size": entries,
            "total_size_bytes": size,
        }

    def after_fork(self) -> None:
        """In a forked child: go on without the parent's node, and without locks that its threads may have held."""
        self.network.after_fork()
        self.github.after_fork()
        self.quotas.after_fork()
        self.network = NoPeers()
        self.flights = Flights(self.settings.claim_timeout, time.monotonic)
        self.stats = Stats()

    def hit(self, request: hishel.Request) -> Answer | None:
        """The answer to a plain request that memory holds fresh: the hot path. Decides as the machine would."""
        if request.method not in _CACHEABLE or not _SPECIAL.isdisjoint(request.headers):
            return None
        found = self.store.peek(cache_key(request.url))
        answer = self._fresh(request, self.keyring.identity(request), found) if found else None
        if answer is not None:
            self.stats.add("requests")
        return answer

    def _fresh(self, request: hishel.Request, identity: str, found: list[Stored]) -> Answer | None:
        """The newest of ``found`` that a plain request may have without validation."""
        now, best, value_of = time.time(), None, self._value_of(request)
        for stored in found:
            if (
                stored.fresh(now)
                and self._may_use(stored, identity)
                and stored.matches(request.method, value_of)
                and (best is None or stored.entry.age(now) < best.entry.age(now))
            ):
                best = stored
        return None if best is None else self._from_store(best, now, source="local")

    def way(
        self, request: hishel.Request, caller: Hashable, patience: float | None, *, background: bool = False
    ) -> Way:
        """The way of one request of ``caller``, a thread or a task; see the module's head.

        ``patience`` is for how many seconds it waits for others at the most; None: for as long as a claim lives.
        ``background``: the answer may have an ``afterwards``.
        """
        self.stats.add("requests")
        wishes = directives(request.headers)
        if request.method not in _CACHEABLE:
            return (yield from self._write_through(request))
        if (
            "no-store" in wishes  # §5.2.1.5: nothing of this exchange is stored
            or not _FOR_THE_ORIGIN.isdisjoint(request.headers)
            or request.headers.get("content-length", "0") != "0"
            or carries_credentials(request.url)
        ):
            return (yield from self._pass_by(request, "bypass"))
        return (yield from _Lookup(self, request, wishes, patience, background).way(caller))

    def _write_through(self, request: hishel.Request) -> Way:
        answer = yield from self._pass_by(request, "method")
        reply = answer.reply
        if request.method in _SAFE or reply is None or reply.status >= 400:
            return answer
        targets = {request.url}
        for name in ("location", "content-location"):  # §4.4: of the same origin only
            for value in reply.headers.get_list(name) or ():
                target = resolved_url(request.url, value)
                if same_origin(target, request.url):
                    targets.add(target)
        keys = [cache_key(url) for url in sorted(targets)]
        yield Run(partial(self.store.invalidate, keys))
        if self.network.active:
            yield Wait(self.network.invalidate(keys), self.settings.lookup_timeout)
        if _answers_get(request, reply):
            lookup = _Lookup(self, hishel.Request("GET", request.url, request.headers), {})
            answer.keep = Keep(lookup, reply, time.time(), _Lease(self, lookup.key, bytes(16)))
            answer.cache_status += "; stored"
            answer.caching["stored"] = True
        return answer

    def _pass_by(self, request: hishel.Request, why: str) -> Way:
        self.stats.add("origin_calls")
        reply: Reply = yield Send({})
        self.note_quota(request, reply)
        return Answer(None, reply, f"fwd={why}", _caching("origin"))

    def note_quota(self, request: hishel.Request, reply: Reply) -> None:
        """What the origin says of its limits goes on the board, and to the fleet."""
        if self.github.follows(request.url):
            identity = self.keyring.identity(request)
            quota = self.quotas.note(identity, request.url, reply.status, reply.headers, time.time())
            if quota is not None:
                self.network.tell_quota(quota)

    def _from_store(self, stored: Stored, now: float, *, source: str, collapsed: bool = False) -> Answer:
        age = stored.entry.age(now)
        status = "fwd=miss; collapsed" if collapsed else "hit"
        status += f"; ttl={stored.fresh_for - int(age)}"
        if source == "peer":
            status += "; detail=peer"
        if collapsed:
            self.stats.add("coalesced")
        self.stats.add("peer_hits" if source == "peer" else "local_hits")
        self.stats.add("bytes_from_cache", len(stored.entry.body))
        return Answer(stored, None, status, _caching(source, from_cache=True), age=age)

    def _value_of(self, request: hishel.Request) -> Callable[[str], str | None]:
        return partial(self.keyring.selecting_value, request.headers)

    def _may_use(self, stored: Stored, identity: str) -> bool:
        """Whether ``identity`` may have the entry as it is. Where a proof is to be had for free, it is asked for."""
        if stored.entry.identity == identity:
            return True
        control = stored.control  # RFC 9111 §3.5; what is for shared caches only, we do not weigh
        if "public" not in control or "s-maxage" in control or "proxy-revalidate" in control:
            return False
        return identity == ANONYMOUS or not self.github.follows(stored.entry.url)


def _caching(
    source: str, *, from_cache: bool = False, revalidated: bool = False, stored: bool = False
) -> dict[str, Any]:
    return {"from_cache": from_cache, "revalidated": revalidated, "stored": stored, "source": source}


@dataclass
class _Lease:
    """What is owed to those who wait for this request, here and in the fleet: one verdict, once."""

    exchange: Exchange
    key: bytes
    claim: bytes
    flight: int | None = None
    fleet: FleetClaim | None = None
    waiting: Future[Any] | None = None  # what is being waited for, and may be granted while we give up
    late: bool = False  # the home has not answered in time
    settled: bool = False

    def wait(self, future: Future[Any], seconds: float, *, keep: bool = False) -> Generator[Effect, Any, Any]:
        """Wait for a future that may hold a claim: one that comes while we are cancelled is not lost.

        ``keep``: it is not cancelled when it does not come in time.
        """
        self.waiting = future
        found = yield Wait(future, seconds, keep)
        self.waiting = None
        return found

    def adopt_late(self, future: Future[Any]) -> None:
        """A home was too slow to be waited for, and answers after all: a claim that it grants is ours still."""
        answer = None if future.cancelled() else future.result()
        if isinstance(answer, Awaited):
            answer.answer.cancel()
        elif isinstance(answer, FleetClaim):
            if self.settled:
                self.exchange.network.release(self.claim, self.key, answer, Verdict.ABANDONED)
            else:
                self.fleet = answer

    def give_up(self, verdict: Verdict) -> None:
        """Settle on the way out, with what may just have been granted."""
        future = self.waiting
        while future is not None and not future.cancel() and not future.cancelled() and future.exception() is None:
            granted = future.result()
            future = granted.answer if isinstance(granted, Awaited) else None
            if isinstance(granted, Granted):
                self.flight = granted.id
            elif isinstance(granted, FleetClaim):
                self.fleet = granted
        self.settle(verdict)

    def settle(self, verdict: Verdict, *, fleet: Verdict | None = None) -> None:
        if self.settled:
            return
        self.settled = True
        if self.flight is not None:
            self.exchange.flights.release(self.claim, self.flight, verdict)
        if self.fleet is not None:
            self.exchange.network.release(self.claim, self.key, self.fleet, fleet or verdict)

    def publish(self, entry: Entry, *, refreshed: bool = False) -> None:
        """Those in this process look again; the fleet gets the entry, and its claim ends by that."""
        if self.settled:
            return
        self.settled = True
        if self.flight is not None:
            self.exchange.flights.release(self.claim, self.flight, Verdict.PUBLISHED)
        if self.exchange.network.active:
            self.exchange.stats.add("published")
            self.exchange.network.publish(entry, self.claim, widely=not self.late, refreshed=refreshed)


class _Lookup:
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
        self.conditional = not _CONDITIONS.isdisjoint(request.headers)
        self.ranged = "range" in request.headers and request.method == "GET"
        self.exchange = exchange
        self.request = request
        self.wishes = wishes
        self.key = cache_key(request.url)
        self.identity = exchange.keyring.identity(request)
        self.shown = machine_request(request)
        self.shared = exchange.github.shares(request.method, request.url, request.headers)
        self.held: list[Stored] = []  # what this identity may use, once it is fresh
        self.others: dict[uuid.UUID, tuple[Stored, str]] = {}  # what it may use once the origin has said 304 to a tag
        self.collapsed = False

    def way(self, caller: Hashable) -> Way:
        exchange = self.exchange
        # Where every identity can use the answer in some way, the whole fleet waits for one fetch.
        claim = claim_key(self.request, "" if self.shared else self.identity)
        lease = _Lease(exchange, self.key, claim)
        source = "local"
        try:
            if _SPECIAL.isdisjoint(self.request.headers):
                found = yield Run(partial(exchange.store.load, self.key))
                answer = exchange._fresh(self.request, self.identity, found)
                if answer is not None:
                    return answer
            state = yield from self._look()
            if isinstance(state, hishel.FromCache):
                return self._serve(state, source)
            answer = self._while_revalidate(state)
            if answer is not None:
                return answer
            if self.ranged:  # a part that is not held is not stored either
                return (yield from exchange._pass_by(self.request, "bypass"))
            if "only-if-cached" in self.wishes:  # §5.2.1.7
                return Answer(None, None, "fwd=request; detail=only-if-cached", _caching("local"))

            ticket = exchange.flights.ask(claim, caller)
            if isinstance(ticket, Future):
                ticket = yield from lease.wait(ticket, self.patience)
                self.collapsed = isinstance(ticket, Look)
            if isinstance(ticket, Granted):
                lease.flight = ticket.id
            # Look again inside the flight: between our look-up and the ticket another flight may have landed.
            state = yield from self._look()
            if isinstance(state, hishel.FromCache):
                lease.settle(Verdict.PUBLISHED)
                return self._serve(state, source)

            if lease.flight is not None and (yield from self._ask_the_fleet(lease)):
                source = "peer"
            if source == "peer" or lease.fleet is not None:
                state = yield from self._look()
                if isinstance(state, hishel.FromCache):
                    lease.settle(Verdict.PUBLISHED)
                    return self._serve(state, source)
            return (yield from self._fetch(state, lease))
        except BaseException as exc:
            lease.give_up(Verdict.FAILED if isinstance(exc, Exception) else Verdict.ABANDONED)
            raise

    def _look(self) -> Generator[Effect, Any, hishel.AnyState]:
        """What hishel's machine says to what the store holds now."""
        store, now = self.exchange.store, time.time()
        found: list[Stored] | None = store.peek(self.key)
        if found is None:
            found = yield Run(partial(store.load, self.key))
        exchange, value_of = self.exchange, self.exchange._value_of(self.request)
        found = found or []
        self.held = [
            stored
            for stored in found
            if exchange._may_use(stored, self.identity) and stored.matches(self.request.method, value_of)
        ]
        ttl = exchange.settings.default_ttl
        method, wishes = self.request.method, self.wishes
        shown = [machine_entry(stored.entry, method, stored.id, wishes, now, ttl) for stored in self.held]
        if exchange.github.follows(self.request.url):
            shown = [view for stored, view in zip(self.held, shown, strict=True) if not self._incomplete(stored, view)]
        self.others = {}
        if self.shared:
            shown += yield Run(partial(self._others, found, now))
        return hishel.IdleClient(options=_OPTIONS).next(self.shown, shown)

    def _incomplete(self, stored: Stored, view: hishel.Entry) -> bool:
        """Whether it would have to be validated, and a 304 would not tell all."""
        state = hishel.IdleClient(options=_OPTIONS).next(self.shown, [view])
        return isinstance(state, hishel.NeedRevalidation) and may_have_grown(stored.entry)

    def _others(self, found: list[Stored], now: float) -> list[hishel.Entry]:
        """Entries of other identities as the machine may see them: with the tag that they have for us, unvalidated."""
        exchange, value_of, shown = self.exchange, self.exchange._value_of(self.request), []
        for stored in found:
            if stored in self.held or not stored.matches(self.request.method, value_of, any_identity=True):
                continue
            etag = exchange.github.validator(self.request.headers, stored.entry, stored.memo)
            if etag is None:
                continue
            self.others[stored.id] = stored, etag
            shown.append(machine_unproven(stored.entry, stored.id, etag, now))
        return shown

    def _serve(self, state: hishel.FromCache, source: str) -> Answer:
        stored = self._stored(state.entry)
        return self._viewed(self.exchange._from_store(stored, time.time(), source=source, collapsed=self.collapsed))

    def _viewed(self, answer: Answer) -> Answer:
        """The answer as the caller's own conditions ask for it."""
        if answer.stored is not None and (self.conditional or self.ranged):
            answer.view = viewed(answer.stored.entry, self.request.method, self.request.headers)
        return answer

    def _while_revalidate(self, state: hishel.AnyState) -> Answer | None:
        """What may be served stale while it is revalidated in the background (RFC 5861 §3)."""
        if not self.background or not _SPECIAL.isdisjoint(self.request.headers):
            return None
        if not isinstance(state, hishel.NeedRevalidation) or state.revalidating_entries[0].id in self.others:
            return None
        stored, now = self._stored(state.revalidating_entries[0]), time.time()
        allowed = seconds(stored.control.get("stale-while-revalidate"))
        if must_not_be_stale(stored.entry) or stored.entry.age(now) - stored.fresh_for >= allowed:
            return None
        answer = self.exchange._from_store(stored, now, source="local")
        answer.cache_status += "; detail=stale-while-revalidate"
        answer.afterwards = _Lookup(self.exchange, self.request, self.wishes).way(object())
        return answer

    def _stored(self, shown: hishel.Entry) -> Stored:
        return next(stored for stored in self.held if stored.id == shown.id)

    def _ask_the_fleet(self, lease: _Lease) -> Generator[Effect, Any, bool]:
        """Step 3: true if an entry has come from a peer; the lease holds the fleet's claim if it was granted."""
        exchange = self.exchange
        settings = exchange.settings
        if self.shown.headers:  # it demands validation end to end: no peer can answer that
            return False
        if exchange._may_wait_to_join:
            yield Wait(exchange.network.joined(), settings.join_timeout)
            exchange._may_wait_to_join = False
        if not exchange.network.active:
            return False
        names = [name for name in self.request.headers if name not in _UNSELECTIVE]
        if len(names) > MAX_SELECTING:
            return False
        question = Question(
            key=self.key,
            claim=lease.claim,
            method=self.request.method,
            identity=self.identity,
            selecting=exchange.keyring.selecting(self.request.headers, names),
            holds=self.held[0].entry.digest if self.held else b"",
            age=self.held[0].entry.age(time.time()) if self.held else 0.0,
            any_identity=self.shared,
        )
        until = time.monotonic() + self.patience
        asked = exchange.network.ask(question)
        answer = yield from lease.wait(asked, settings.lookup_timeout, keep=True)
        if answer is None:
            lease.late = True
            asked.add_done_callback(lease.adopt_late)
        while isinstance(answer, Awaited):
            self.collapsed = True
            answer = yield from lease.wait(answer.answer, max(0.0, until - time.monotonic()))
        if isinstance(answer, Found):
            return True
        self.collapsed = False
        if isinstance(answer, FleetClaim):
            lease.fleet = answer
        elif answer is None:
            exchange.stats.add("peer_failures")
        return False

    def _fetch(self, state: hishel.AnyState, lease: _Lease) -> Way:
        """Steps 5 to 7."""
        exchange = self.exchange
        why = "stale" if self.held else "miss"
        if self.shown.headers:
            why = "request"
        while True:
            assert isinstance(state, (hishel.CacheMiss, hishel.NeedRevalidation))
            added = {}
            if isinstance(state, hishel.NeedRevalidation):
                added = {n: state.request.headers[n] for n in state.request.headers if n.startswith("if-")}
                if self.conditional:
                    added = combined(self.request.headers, added)
            sent = time.time()
            if self._is_refused(sent):
                stale = self._stale("its rate limit")
                if stale is not None:
                    lease.settle(Verdict.FAILED)
                    return stale
            exchange.stats.add("origin_calls")
            try:
                reply: Reply = yield Send(added)
            except Exception as exc:
                stale = self._stale(type(exc).__name__)
                if stale is None:
                    raise
                lease.settle(Verdict.FAILED)
                return stale
            exchange.note_quota(self.request, reply)
            if _failing(reply):
                stale = self._stale(str(reply.status))
                if stale is not None:
                    yield Discard(reply)
                    lease.settle(Verdict.FAILED)
                    return stale
            if reply.status == 304:
                if self.conditional and not self._proves_ours(state, reply):
                    lease.settle(Verdict.ABANDONED)  # it is about the caller's copy: those who wait need one
                    return Answer(None, reply, f"fwd={why}; fwd-status=304", _caching("origin"))
                yield Discard(reply)
            state = state.next(machine_response(hishel.Response(reply.status, reply.headers)))
            if isinstance(state, hishel.InvalidateEntries):
                ours = [id_ for id_ in state.entry_ids if id_ not in self.others]
                yield Run(partial(exchange.store.remove, self.key, ours))
                state = state.next()
            if not isinstance(state, hishel.CacheMiss):
                break
            why = "miss"  # a 304 that fits nothing we hold: once more, without conditions
        if isinstance(state, hishel.NeedToBeUpdated):
            return (yield from self._freshen(state, reply, sent, lease))
        if self.request.method == "HEAD" and reply.status == 200:
            yield Run(partial(self._compare_with_head, reply, sent))
        if reply.status in (401, 403, 404, 410) and not refuses(reply.status, reply.headers):
            # This identity may not see it, or it is gone: nothing older is served stale afterwards.
            yield Run(partial(exchange.store.refuse, self.key, self.identity, since=sent))
        keep = None
        if isinstance(state, hishel.StoreAndUse) and not _too_large(reply, exchange.settings.max_body_size):
            keep = Keep(self, reply, sent, lease)
        else:
            lease.settle(Verdict.FAILED if reply.status >= 500 else Verdict.UNSTORABLE)
        status = (
            f"fwd={why}" + (f"; fwd-status={reply.status}" if why == "stale" else "") + ("; stored" if keep else "")
        )
        return Answer(None, reply, status, _caching("origin", stored=keep is not None), keep)

    def _proves_ours(self, state: hishel.AnyState, reply: Reply) -> bool:
        """Whether a 304 is about what we hold, and not about the copy that the caller holds."""
        if not isinstance(state, hishel.NeedRevalidation):
            return False
        ours, named = state.request.headers.get("if-none-match"), reply.headers.get("etag")
        return ours is None or named is None or opaque(named) == opaque(ours)

    def _compare_with_head(self, reply: Reply, sent: float) -> None:
        """A HEAD's 200 freshens the GET's entry that it agrees with, and removes one that it does not (§4.3.5)."""
        store, now = self.exchange.store, time.time()
        for stored in self.held:
            if stored.entry.method != "GET" or stored.entry.status != 200:
                continue
            if all(
                name not in reply.headers or reply.headers[name] == stored.entry.first(name)
                for name in ("etag", "last-modified", "content-length")
            ):
                entry = msgspec.structs.replace(
                    stored.entry,
                    headers=freshened(stored.entry.headers, reply.headers),
                    initial_age=initial_age(storable_fields(reply.headers), sent, now),
                    received=now,
                )
                store.refresh(stored, entry, since=sent)
            else:
                store.remove(self.key, [stored.id])

    def _freshen(self, state: hishel.NeedToBeUpdated, reply: Reply, sent: float, lease: _Lease) -> Way:
        """The origin said 304: what we hold is still right (RFC 9111 §4.3.4)."""
        exchange, now = self.exchange, time.time()
        shown = state.next().entry
        other = self.others.get(shown.id)
        stored = self._stored(shown) if other is None else other[0]
        fields = stored.entry.headers if other is None else adopted(stored.entry, other[1])
        headers = freshened(fields, reply.headers)
        if "date" not in reply.headers:
            headers["date"] = [formatdate(now, usegmt=True)]  # RFC 9110 §6.6.1: the old one is not the 304's
        entry = msgspec.structs.replace(
            stored.entry,
            identity=self.identity,
            selecting=self.selecting(vary_names(headers)),
            headers=headers,
            initial_age=initial_age(storable_fields(reply.headers), sent, now),
            received=now,
        )
        fresh: Stored | None
        if other is None:
            fresh = yield Run(partial(exchange.store.refresh, stored, entry, since=sent))
        else:
            fresh = yield Run(partial(exchange.store.save, entry, since=sent))
        if fresh is None:  # it was written to meanwhile: an answer to this request, and to no other
            lease.settle(Verdict.ABANDONED)
            fresh = exchange.store.passing(stored, entry)
        elif other is not None and lease.fleet is None:
            lease.settle(Verdict.PUBLISHED)  # it proves something to this identity only
        elif self.shareable(entry):
            lease.publish(entry, refreshed=True)
        else:
            lease.settle(Verdict.PUBLISHED, fleet=Verdict.UNSTORABLE)
        exchange.stats.add("revalidated")
        exchange.stats.add("bytes_from_cache", len(entry.body))
        status = f"fwd=stale; fwd-status=304; ttl={fresh.fresh_for - int(entry.initial_age)}"
        caching = _caching("origin", from_cache=True, revalidated=True)
        return self._viewed(Answer(fresh, None, status, caching, age=entry.initial_age))

    def _is_refused(self, now: float) -> bool:
        github, quotas = self.exchange.github, self.exchange.quotas
        return github.follows(self.request.url) and quotas.refused(self.identity, self.request.url, now)

    def _stale(self, cause: str) -> Answer | None:
        """Step 7: a stale entry that may stand in for an origin that fails (RFC 5861 §4), or None."""
        exchange, now = self.exchange, time.time()
        if self.shown.headers:
            return None
        for stored in sorted(self.held, key=lambda s: s.entry.received, reverse=True):
            age = stored.entry.age(now)
            if must_not_be_stale(stored.entry) or age - stored.fresh_for > self._stale_allowance(stored):
                continue
            exchange.stats.add("stale_served")
            parts = urlsplit(self.request.url)
            logger.warning("%s%s: served stale, %d s old, because of %s", parts.netloc, parts.path, age, cause)
            status = f"fwd=stale; ttl={stored.fresh_for - int(age)}; detail=stale-if-error"
            if cause.isdigit():
                status = status.replace("fwd=stale;", f"fwd=stale; fwd-status={cause};")
            return self._viewed(Answer(stored, None, status, _caching("local", from_cache=True), age=age))
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
        headers.setdefault("date", [formatdate(now, usegmt=True)])  # RFC 9110 §6.6.1
        return Entry(
            method=self.request.method,
            url=self.request.url,
            identity=self.identity,
            selecting=self.selecting(vary_names(headers)),
            status=reply.status,
            headers=headers,
            body=body,
            digest=body_digest(body),
            initial_age=initial_age(headers, sent, now),
            received=now,
        )

    def selecting(self, names: list[str]) -> dict[str, str]:
        """This request's fields of these names, as they may be stored."""
        return self.exchange.keyring.selecting(self.request.headers, names)

    @staticmethod
    def shareable(entry: Entry) -> bool:
        """Whether a peer may ever use it: cookies are for one user only, and ``Vary: *`` for one request."""
        if "set-cookie" in entry.headers or "*" in vary_names(entry.headers):
            return False
        # For one user, and we do not see which: a client certificate, or a transport below us, says who asks.
        return entry.identity != ANONYMOUS or "private" not in directives(entry.headers)


class Keep:
    """Saves a reply while its caller reads it; told by the stream how that went. Exactly one of the ends counts."""

    def __init__(self, lookup: _Lookup, reply: Reply, sent: float, lease: _Lease) -> None:
        self._lookup = lookup
        self._reply = reply
        self._sent = sent
        self._lease = lease
        self._chunks: list[bytes] = []
        self._left = lookup.exchange.settings.max_body_size

    def feed(self, chunk: bytes) -> None:
        """A piece of the body has been read. A body that grows too large is let go."""
        self._left -= len(chunk)
        if self._left >= 0:
            self._chunks.append(chunk)
        else:
            self._chunks = []
            self._lease.settle(Verdict.UNSTORABLE)

    def finish(self) -> None:
        """The body has been read to its end: saved here, then published. May touch the disk."""
        if self._left < 0:
            return
        exchange = self._lookup.exchange
        try:
            entry = self._lookup.entry(self._reply, b"".join(self._chunks), self._sent)
            saved = exchange.store.save(entry, since=self._sent)
            exchange.stats.add("stored")
            if exchange.github.follows(entry.url):
                exchange.github.learn(self._lookup.request.headers, entry)
            if self._lookup.shared and entry.status != 200:
                self._lease.settle(Verdict.FAILED)  # true for this identity: the next one has to see for itself
            elif saved is not None and self._lookup.shareable(entry):
                self._lease.publish(entry)
            else:
                self._lease.settle(Verdict.PUBLISHED, fleet=Verdict.UNSTORABLE)
        except Exception:  # the caller has its response: a store that fails must not take it away
            logger.debug("an entry could not be kept", exc_info=True)
            self._lease.settle(Verdict.UNSTORABLE)

    def abandon(self) -> None:
        """The body will not be read to its end. After ``finish`` this does nothing."""
        self._lease.settle(Verdict.ABANDONED)


def _answers_get(request: hishel.Request, reply: Reply) -> bool:
    """Whether a POST's answer is what GET would give: it says so, and for how long (RFC 9110 §9.3.3)."""
    if request.method != "POST" or reply.status != 200 or "no-store" in directives(reply.headers):
        return False
    explicit = "max-age" in directives(reply.headers) or "expires" in reply.headers
    location = reply.headers.get("content-location")
    return explicit and location is not None and resolved_url(request.url, location) == request.url


def _failing(reply: Reply) -> bool:
    """Whether the origin is down, or refuses for its limits."""
    return reply.status in (500, 502, 503, 504) or refuses(reply.status, reply.headers)  # RFC 5861 §4


def _too_large(reply: Reply, limit: int) -> bool:
    length: Sequence[str] = reply.headers.get_list("content-length") or ()
    return any(line.isdigit() and int(line[:20]) > limit for line in length)
