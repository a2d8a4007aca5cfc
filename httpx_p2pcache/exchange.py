"""A request's way, from the look-up to the answer: one generator that does no I/O itself.

It yields what it needs done and is sent what came of it. A sync and an async pump (``pump``) do it:

========================  ==============================================================================
:class:`Run`              call a function that may touch the disk; sent its result
:class:`Wait`             wait for a future; sent its result, or None if there was none in time
:class:`Send`             send the caller's request to the origin with these fields added; sent a Reply
:class:`Read`             read the body of the reply that came last; sent its bytes
:class:`Discard`          be done with a reply that is not passed on, so that its connection is free
========================  ==============================================================================

The way of a GET or HEAD is in ``lookup``, from the origin on in ``fetch``; what is saved of it in ``keep``, what is
owed to others in ``lease``. The steps are those of the README's "Loading process":

1. Unsafe methods go to the origin; a success, or a lost answer, invalidates here and at every peer.
2. What the store holds: fresh, and the identity may use it: answered.
3. One flight per key in this process; its leader asks the key's home, once, for the entry or for the fleet's claim.
4. hishel's state machine decides on what we now hold.
5. The origin, conditional where we hold a body.
6. Storable: saved when the caller has read it to its end, published, and the claim released by that; a moment later
   where nobody waits for it. Anything else releases the claim at once with its verdict.
7. The origin failed or refused for its limits, and we hold a stale entry that may be used: served, marked.

"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Hashable
from functools import partial
from typing import Any, cast

import hishel

from httpx_p2pcache.answers import NOT_LOOKED, Answer, Effect, Miss, Reply, Run, Send, Wait, Way, caching
from httpx_p2pcache.claims import Flights
from httpx_p2pcache.entries import (
    ANONYMOUS,
    MAX_URL,
    Asker,
    Keyring,
    cache_key,
    carries_credentials,
    resolved_url,
    same_origin,
)
from httpx_p2pcache.freshness import directives
from httpx_p2pcache.github import GitHub, endpoint
from httpx_p2pcache.keep import Keep, let_go_of_forgotten
from httpx_p2pcache.lease import Lease
from httpx_p2pcache.ledger import Ledger
from httpx_p2pcache.lookup import CACHEABLE, FOR_THE_ORIGIN, SPECIAL, Lookup
from httpx_p2pcache.network import PeerNetwork
from httpx_p2pcache.quota import QuotaBoard, refuses
from httpx_p2pcache.settings import Settings
from httpx_p2pcache.stats import Stats, aggregate, summary
from httpx_p2pcache.store import Store
from httpx_p2pcache.stored import Stored

_NEVER_SENT = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol"})  # as clients name it
REFUSALS = frozenset({401, 403, 404, 410, 451})
_SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})  # RFC 9110 §9.2.1


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
        ledger: Ledger,
    ) -> None:
        self.settings = settings
        self.store = store
        self.keyring = keyring
        self.stats = stats
        self.network = network
        self.github = github
        self.quotas = quotas
        self.ledger = ledger
        self.flights = Flights(settings.claim_timeout, time.monotonic)
        self.revalidating: dict[bytes, float] = {}  # in the background, by claim key: until when nobody else begins it
        self.may_wait_to_join = settings.join_timeout > 0

    def describe(self) -> dict[str, object]:
        """Counters, the figures made of them, the node's state and the store's size, as plain values."""
        entries, size = self.store.size()
        counts, status = self.stats.snapshot(), self.network.status()
        runners: Any = status.pop("runners") or {"": counts}
        return {
            **summary(counts),
            **status,
            "aggregate": aggregate(runners, cast("int", status["connected_peers"])),
            "quotas": self.quotas.describe(),
            "cache_dir": str(self.settings.dir),
            "cache_size": entries,
            "total_size_bytes": size,
        }

    def after_fork(self) -> None:
        """In a forked child: let go of the parent's node, and of locks that its threads may have held."""
        network = self.network.after_fork()
        self.quotas.after_fork()
        self.network = network
        self.store.behind = not network.by_file
        self.flights = Flights(self.settings.claim_timeout, time.monotonic)
        self.revalidating = {}
        self.stats = Stats()
        self.github.after_fork(self.stats)
        self.ledger = Ledger(self.settings.dir)
        self.ledger.follow(self.stats)

    def hit(self, request: hishel.Request, *, in_memory: bool = True) -> Answer | Miss:
        """The answer to a plain request for which something fresh is held: the hot path. Decides as the machine would.

        ``in_memory``: the caller cannot wait for the disk.
        """
        if request.method not in CACHEABLE or not SPECIAL.isdisjoint(request.headers):
            return NOT_LOOKED
        key, landed = cache_key(request.url), self.flights.landed
        found = self.store.peek(key) if in_memory else self.store.load(key)
        seen = self.github.seen(request)
        best = self.fresh(seen, self.keyring.asker(seen), found) if found else None
        if best is None:
            return Miss(found, landed)
        self.stats.add("requests", endpoint=endpoint(request.method, request.url))
        return self.from_store(best, time.time(), source="local")

    def fresh(self, request: hishel.Request, asker: Asker, found: list[Stored]) -> Stored | None:
        """The latest of ``found`` that a plain request (as :meth:`GitHub.seen`) selects, if it needs no validation."""
        best, value_of = None, self.value_of(request)
        for stored in found:
            if (
                (best is None or stored.made > best.made)
                and self.may_use(stored, asker)
                and stored.matches(request.method, value_of)
            ):
                best = stored
        return best if best is not None and best.fresh(time.time()) else None

    def way(
        self,
        request: hishel.Request,
        caller: Hashable,
        patience: float | None,
        *,
        background: bool = False,
        miss: Miss = NOT_LOOKED,
    ) -> Way:
        """The way of one request of ``caller``, a thread or a task, for which :meth:`hit` has just found no answer.

        ``patience`` is for how many seconds it waits for others at the most; None: for as long as a claim lives.
        ``background``: the answer may have an ``afterwards``. See the module's head.
        """
        let_go_of_forgotten()
        self.stats.add("requests", endpoint=endpoint(request.method, request.url))
        wishes = directives(request.headers)
        if request.method not in CACHEABLE:
            return (yield from self._write_through(request))
        if (
            (no_store := "no-store" in wishes)  # §5.2.1.5: nothing of this exchange is stored
            or not FOR_THE_ORIGIN.isdisjoint(request.headers)
            or request.headers.get("content-length", "0") != "0"
            or len(request.url) > MAX_URL
            or carries_credentials(request.url)
        ):
            if "only-if-cached" in wishes:  # §5.2.1.7
                return Answer(None, None, "detail=only-if-cached", caching("local"))
            sent = time.time()
            answer = yield from self.pass_by(request, "bypass")
            if no_store and FOR_THE_ORIGIN.isdisjoint(request.headers) and "content-length" not in request.headers:
                yield from self.heed_refusal(request, answer.reply, sent)
            return answer
        return (yield from Lookup(self, request, wishes, patience, background).way(caller, miss))

    def _write_through(self, request: hishel.Request) -> Way:
        sent, key = time.time(), cache_key(request.url)
        try:
            answer = yield from self.pass_by(request, "method")
        except GeneratorExit:
            raise
        except BaseException as exc:  # a cancellation as well
            if request.method not in _SAFE and type(exc).__name__ not in _NEVER_SENT:  # it may have been done
                yield from self._invalidate([key])
            raise
        reply = answer.reply
        if request.method in _SAFE or reply is None or reply.status >= 400:
            return answer
        targets = {request.url}
        for name in ("location", "content-location"):  # §4.4: of the same origin only
            for value in reply.headers.get_list(name) or ():
                target = resolved_url(request.url, value)
                if same_origin(target, request.url):
                    targets.add(target)
        answers_get = _answers_get(request, reply)
        # Another write that has ended meanwhile may have been done after this one.
        outdone = answers_get and (yield Run(partial(self.store.written, key, sent)))
        yield from self._invalidate([cache_key(url) for url in sorted(targets)])
        if answers_get and not outdone and "no-store" not in directives(request.headers):
            lookup = Lookup(self, hishel.Request("GET", request.url, request.headers), {})
            answer.keep = Keep(lookup, reply, time.time(), Lease(self, lookup.key, bytes(16)))
            answer.cache_status += "; stored"
            answer.caching["stored"] = True
        return answer

    def _invalidate(self, keys: list[bytes]) -> Generator[Effect, Any, None]:
        yield Run(partial(self.store.invalidate, keys))
        if self.network.active:
            yield Wait(self.network.invalidate(keys), self.settings.lookup_timeout)

    def pass_by(self, request: hishel.Request, why: str) -> Way:
        """The origin's answer, which the store has no part in; ``why``, as RFC 9211 §2.2 names it."""
        reply = yield from self.send(request, {})
        return Answer(None, reply, f"fwd={why}", caching("origin"))

    def begins_revalidation(self, claim: bytes) -> bool:
        """Whether the caller is to revalidate in the background: one at a time does, for all."""
        now = time.monotonic()
        if self.revalidating.get(claim, 0.0) > now:
            return False
        self.revalidating[claim] = now + self.settings.claim_timeout
        return True

    def heed_refusal(self, request: hishel.Request, reply: Reply | None, sent: float) -> Generator[Effect, Any, None]:
        """Where this identity may not see it, or it is gone: nothing older is served stale afterwards."""
        if reply is not None and reply.status in REFUSALS and not self.is_limit(request, reply):
            identity = self.keyring.asker(self.github.seen(request)).identity
            yield Run(partial(self.store.refuse, cache_key(request.url), identity, since=sent))

    def is_limit(self, request: hishel.Request, reply: Reply) -> bool:
        """Whether a rate limit is why the origin refuses, as far as the head of its answer tells."""
        return refuses(reply.status, reply.headers) and (reply.status == 429 or self.github.follows(request.url))

    def send(self, request: hishel.Request, added: dict[str, str]) -> Generator[Effect, Any, Reply]:
        """The origin's reply to the request with these fields added; counted, and its limits noted."""
        asked, began = endpoint(request.method, request.url), time.perf_counter()
        try:
            reply: Reply = yield Send(added)
        except Exception as exc:
            if type(exc).__name__ not in _NEVER_SENT:
                self.stats.add("origin_calls", endpoint=asked)
            raise
        self.stats.add("origin_calls", endpoint=asked)
        self.stats.add("origin_ms", int((time.perf_counter() - began) * 1000), endpoint=asked)
        if reply.status == 304:
            self.stats.add("not_modified", endpoint=asked)
        self.note_quota(request, reply)
        return reply

    def note_quota(self, request: hishel.Request, reply: Reply) -> None:
        """What the origin says of its limits goes on the board, and to the fleet."""
        if self.github.follows(request.url):
            payer = self.keyring.payer(self.github.seen(request))
            quota = self.quotas.note(payer, request.url, reply.status, reply.headers, time.time())
            if quota is not None:
                self.network.tell_quota(quota)

    def from_store(self, stored: Stored, now: float, *, source: str, collapsed: bool = False) -> Answer:
        """An entry as an answer, counted; ``source``: "local" or "peer"; ``collapsed``: by another request's fetch."""
        age = stored.entry.age(now)
        status = "fwd=miss; collapsed" if collapsed else "hit"
        status += f"; ttl={stored.fresh_for - int(age)}"
        if source == "peer":
            status += "; detail=peer"
        asked = endpoint(stored.entry.method, stored.entry.url)
        if collapsed:
            self.stats.add("coalesced", endpoint=asked)
        self.stats.add("peer_hits" if source == "peer" else "local_hits", endpoint=asked)
        self.stats.add("bytes_from_cache", len(stored.entry.body), endpoint=asked)
        return Answer(stored, None, status, caching(source, from_cache=True), age=age)

    def value_of(self, request: hishel.Request) -> Callable[[str], str | None]:
        return partial(self.keyring.selecting_value, request.headers)

    def may_use(self, stored: Stored, asker: Asker) -> bool:
        """Whether ``asker`` may have the entry as it is. Where a proof is to be had for free, it is asked for."""
        if stored.made_by(asker):
            return True
        control = stored.control  # RFC 9111 §3.5; what is for shared caches only, we do not weigh
        if "public" not in control or not control.keys().isdisjoint(("private", "proxy-revalidate", "s-maxage")):
            return False
        if "set-cookie" in stored.entry.headers:
            return False
        made = stored.entry.received - stored.entry.initial_age
        if self.store.refused(stored.key, asker.identity, made):
            return False
        return asker.identity == ANONYMOUS or not self.github.follows(stored.entry.url)


def _answers_get(request: hishel.Request, reply: Reply) -> bool:
    """Whether a POST's answer is what GET would give: it says so, and for how long (RFC 9110 §9.3.3)."""
    if request.method != "POST" or reply.status != 200 or "no-store" in directives(reply.headers):
        return False
    explicit = "max-age" in directives(reply.headers) or "expires" in reply.headers
    location = reply.headers.get("content-location")
    return explicit and location is not None and resolved_url(request.url, location) == request.url
