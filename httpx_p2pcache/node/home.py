"""*Who has it?* Questions, claims, publications and invalidations among the members.

The home of a cache key is one node, the same in the eyes of all who know the same nodes (:mod:`.homes`). It keeps the
key's claims and a copy of what is published. A node asks the home one question::

    asker              home                          claimant
      │ Ask ────────────> has it fresh:  Found ──> asker
      │                   nobody fetches: Granted ──> asker, which fetches from the origin
      │                   somebody does: Wait ──> asker
      │                                   │ <──────────── Publish
      │ <──────────────────────── Found ──┘ ───────────> Published(served) ── Push to all who were not served

Membership may be seen differently for a moment; then a key has two homes, and two fetches at the worst. Who becomes a
home is told in the :class:`Inventory` of each member what that member holds, and what it is fetching.

Where not everybody can reach everybody (NAT), each tells its members how many of *their* members it cannot reach, and
only those that reach the most are homes: a fleet around one reachable node has all of them there.
What concerns everybody, a write or a quota, is passed on to those whom its sender does not know.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import trio
from libp2p.peer.id import ID

from httpx_p2pcache import network
from httpx_p2pcache.claims import CLAIM_LIFE, ClaimTable, Go, Look, Pending, Tidings, Told, Verdict
from httpx_p2pcache.claims import Granted as ClaimGranted
from httpx_p2pcache.entries import Entry, cache_key
from httpx_p2pcache.network import Answer, Awaited, FleetClaim, Question, Unclaimed
from httpx_p2pcache.node.homes import home_among
from httpx_p2pcache.node.members import Link, Member
from httpx_p2pcache.node.protocol import (
    Ask,
    Done,
    Fetching,
    Found,
    Granted,
    Invalidate,
    Inventory,
    Message,
    Nothing,
    Publish,
    Published,
    Push,
    Release,
    TellQuota,
    Wait,
)
from httpx_p2pcache.node.shelf import BodyMissing, Parcel, Shelf, helps, resident
from httpx_p2pcache.quota import Quota
from httpx_p2pcache.stored import Stored

if TYPE_CHECKING:
    from httpx_p2pcache.node.fleet import Fleet

logger = logging.getLogger("httpx_p2pcache")

MAX_HOMES = 3  # asked in turn, when one after another is lost while we wait there
BUSY = 4  # questions under way beyond which the next is told to wait before it is looked at
MAX_WRITES = 1000  # remembered, so that none goes in circles
MAX_HINTS = 20_000  # cache keys of which we know who holds them


class _Fetch(NamedTuple):
    """A claim that this node has: for which key, until when (the loop's time), and from whom."""

    key: bytes
    id: int
    ends: float
    granter: ID


class Asker(NamedTuple):
    """Who waits at a home: a member's call, or this node's own request."""

    peer_id: ID
    call: int
    tell: Callable[[Tidings], None]

    def __hash__(self) -> int:
        return hash((self.peer_id, self.call))


class Home:
    """This node as the home of some keys, and as one who asks the homes of the others."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._shelf = Shelf(fleet)
        self._life = CLAIM_LIFE * fleet.settings.claim_timeout
        self._claims: ClaimTable[Asker] = ClaimTable(self._life)
        self._hints: OrderedDict[bytes, ID] = OrderedDict()
        self._fetching: dict[bytes, _Fetch] = {}
        self._waiting_at: dict[int, ID] = {}
        self._writes: OrderedDict[int, None] = OrderedDict()  # of which we have heard
        self._own_calls = 0
        self._answering = 0
        self._publishing = 0
        self._all_published = trio.Event()

    # What this node's own requests want

    async def ask(self, question: Question, future: Future[Answer]) -> None:
        """Answer ``future``, and the futures that it may lead to, as :class:`network.PeerNetwork` promises."""
        try:
            if not self._fleet.is_settled():
                await self._fleet.settled(self._fleet.settings.lookup_timeout / 4)
            for _ in range(MAX_HOMES):
                home = await self._home_of(question.key)
                asked = self._ask_here(question, future) if home is None else self._ask_there(home, question, future)
                later = await asked
                if later is None:
                    return
                future = later  # the home was lost meanwhile: the next one knows, or decides anew
        except OSError:
            self._fleet.stats.add("peer_failures")
        finally:
            self._resolve(future, Unclaimed(), question)

    async def _home_of(self, key: bytes) -> Member | None:
        """The member that is home to ``key``, if need be connected to first; None if it is this node.

        Raises OSError if it is not reached in time, and that its place is another's then.
        """
        fleet = self._fleet
        for _ in range(MAX_HOMES):
            home = self._who_is_home(key)
            if home == fleet.host.id:
                return None
            if home not in fleet.members:
                try:
                    await fleet.search.reach(home, fleet.settings.lookup_timeout)
                except OSError:
                    fleet.find_core()  # without it
                    continue
                if not fleet.members[home].usable():
                    continue
            return fleet.members[home]
        raise OSError("no home is reached")

    def _who_is_home(self, key: bytes) -> ID:
        fleet = self._fleet
        unreached = {m.peer_id: m.unreached for m in fleet.members.values() if m.usable()}
        if fleet.large:  # who is no member is dialled once it is asked
            known = {p: unreached.get(p, 0) for p in fleet.core if p in unreached or p not in fleet.members}
            known.pop(fleet.host.id, None)
            # The hub of a large fleet behind NAT need not be of its core.
            if known and fleet.host.id not in fleet.core and fleet.unreached >= min(known.values()):
                return home_among(known, key)
            unreached = known
        return home_among({**unreached, fleet.host.id: fleet.unreached}, key)

    async def _ask_there(self, home: Member, question: Question, future: Future[Answer]) -> Future[Answer] | None:
        """Ask a member; a future if it was lost before it had answered that, which is then still to be answered."""
        settings, link, began = self._fleet.settings, home.link, trio.current_time()
        with link.open_call() as call:
            try:
                with trio.fail_after(settings.lookup_timeout):
                    await link.send(Ask(call.number, question))
                    answer = await call.receive()
            except trio.TooSlowError:
                # A busy home is heard of, though late; one that says nothing at all is not asked for the time being.
                if home.heard() < began:
                    self._fleet.presence.suspect(home.peer_id)
                raise OSError("the home does not answer") from None
            except OSError:
                return future  # it is gone
            if isinstance(answer, Wait):
                later: Future[Answer] = Future()
                self._resolve(future, Awaited(later), question)
                future = later
                self._waiting_at[id(call)] = home.peer_id
                try:
                    with trio.fail_after(settings.claim_timeout):
                        answer = await call.receive()
                except (OSError, trio.TooSlowError):
                    return future
                finally:
                    del self._waiting_at[id(call)]
            if isinstance(answer, Found):
                stored = await self._shelf.received(question.key, answer.sealed, answer.resident, link.keyring)
                self._resolve(future, Unclaimed() if stored is None else network.Found(), question)
            elif isinstance(answer, Granted):
                if answer.sealed:
                    await self._shelf.received(question.key, answer.sealed, answer.resident, link.keyring)
                self._granted(future, question, answer.id, home.peer_id)
            else:
                self._resolve(future, Unclaimed(), question)
        return None

    async def _ask_here(self, question: Question, future: Future[Answer]) -> None:
        """The same question where we are the home ourselves."""
        stored = await self._find(question)
        if helps(stored, question):
            self._resolve(future, network.Found(), question)
            return
        self._own_calls += 1
        later: Future[Answer] = Future()
        done = trio.Event()

        def tell(tidings: Tidings) -> None:
            if isinstance(tidings, ClaimGranted):
                self._granted(later, question, tidings.id, self._fleet.host.id)
            else:
                self._resolve(later, network.Found() if isinstance(tidings, Look) else Unclaimed(), question)
            done.set()

        asker = Asker(self._fleet.host.id, self._own_calls, tell)
        answer = self._claims.ask(question.claim, asker, trio.current_time())
        if isinstance(answer, ClaimGranted):
            self._granted(future, question, answer.id, self._fleet.host.id)
        elif isinstance(answer, Pending):
            self._resolve(future, Awaited(later), question)
            with trio.move_on_after(self._fleet.settings.claim_timeout):
                await done.wait()
            self._resolve(later, Unclaimed(), question)
        else:
            self._resolve(future, Unclaimed(), question)

    def _granted(self, future: Future[Answer], question: Question, id_: int, granter: ID) -> None:
        ends = trio.current_time() + self._life
        self._fetching[question.claim] = _Fetch(question.key, id_, ends, granter)
        self._resolve(future, FleetClaim(id_), question)

    def _resolve(self, future: Future[Answer], answer: Answer, question: Question) -> None:
        """Set an answer that is not set yet; a claim that nobody waits for any more is given back."""
        try:
            if not future.done():
                future.set_result(answer)
                return
        except InvalidStateError:
            pass
        if isinstance(answer, FleetClaim):
            self._fleet.spawn(self.release, question.claim, question.key, answer.id, Verdict.ABANDONED)
        elif isinstance(answer, Awaited):
            answer.answer.cancel()  # who gave up waiting for this one does not wait for the next

    async def release(self, claim: bytes, key: bytes, id_: int, verdict: Verdict) -> None:
        """This node's claim has ended without an entry: told to who granted it, and to who is the home by now."""
        held = self._fetching.pop(claim, None)
        self._tell(self._claims.release(claim, id_, verdict, trio.current_time()))
        granter = None if held is None else self._fleet.members.get(held.granter)
        try:
            home = await self._home_of(key)
        except OSError:
            home = None
        for member in {m.peer_id: m for m in (home, granter) if m is not None}.values():
            try:
                await member.send(Release(claim, id_, verdict))
            except OSError:
                self._fleet.stats.add("peer_failures")

    async def publish(self, entry: Entry, claim: bytes, *, refreshed: bool, widely: bool) -> None:
        """This node has fetched or refreshed ``entry``: the home first, which serves those who wait, then the rest.

        Not ``widely``: to the home alone. Where a home is too busy to answer in time every member may be fetching the
        same, and the last thing it needs is a copy from each.
        """
        held = self._fetching.pop(claim, None)
        self._tell(self._claims.release(claim, None, Verdict.PUBLISHED, trio.current_time()))
        if not self._fleet.members:
            return
        key = cache_key(entry.url)
        parcel = Parcel(entry, refreshed=refreshed)
        self._publishing += 1
        try:
            served, known = await self._publish_at_home(key, claim, parcel)
            # In a large fleet it is pulled from the home; only who has granted the claim as well is not left waiting.
            everybody = widely and not known and not self._fleet.large
            async with trio.open_nursery() as nursery:
                for member in list(self._fleet.members.values()):
                    concerned = everybody or (held is not None and member.peer_id == held.granter)
                    if concerned and member.peer_id.to_bytes() not in served and len(entry.body) <= member.takes:
                        nursery.start_soon(self._push, member, key, claim, parcel)
        finally:
            self._publishing -= 1
            if not self._publishing:
                self._all_published.set()
                self._all_published = trio.Event()

    async def _publish_at_home(self, key: bytes, claim: bytes, parcel: Parcel) -> tuple[set[bytes], bool]:
        try:
            home = await self._home_of(key)
        except OSError:
            return set(), False
        if home is None or len(parcel.entry.body) > home.takes:
            return set(), False
        return await self._publish_at(home, key, claim, parcel)

    async def _publish_at(self, home: Member, key: bytes, claim: bytes, parcel: Parcel) -> tuple[set[bytes], bool]:
        """Give the home the first form of the entry that it can use.

        Returns who has the entry by that, and whether the home had it already.
        """
        for whole in (False, True):
            try:
                sealed = parcel.sealed(home.keyring, whole=whole)

                def build(number: int, sealed: bytes = sealed) -> Publish:
                    return Publish(number, key, claim, sealed, resident(parcel.entry.received))

                answer = await home.link.call(build, self._fleet.settings.claim_timeout)
            except OSError:
                self._fleet.stats.add("peer_failures")
                break
            if isinstance(answer, Published) and answer.enough:
                return {home.peer_id.to_bytes(), *answer.served}, answer.known
        return {home.peer_id.to_bytes()}, False

    async def published(self) -> None:
        """Wait until nothing is being published any more."""
        while self._publishing:
            await self._all_published.wait()

    async def _push(self, member: Member, key: bytes, claim: bytes, parcel: Parcel) -> None:
        try:
            if member.links:
                sealed = parcel.sealed(member.keyring, whole=False)
                await member.send(Push(key, claim, sealed, resident(parcel.entry.received)))
        except OSError:
            self._fleet.stats.add("peer_failures")

    async def invalidate(self, keys: list[bytes], future: Future[None]) -> None:
        """Tell everybody; ``future`` is resolved when all have answered or are given up."""
        try:
            await self._tell_write(keys, secrets.randbits(63), list(self._fleet.members.values()))
        finally:
            try:
                future.set_result(None)
            except InvalidStateError:  # the writer has gone on already
                pass

    async def _tell_write(self, keys: list[bytes], id_: int, members: list[Member]) -> None:
        self._writes[id_] = None
        while len(self._writes) > MAX_WRITES:
            self._writes.popitem(last=False)

        async def tell(member: Member) -> None:
            try:
                await member.link.call(lambda n: Invalidate(n, keys, id_), self._fleet.settings.lookup_timeout)
            except OSError:
                self._fleet.stats.add("peer_failures")

        async with trio.open_nursery() as nursery:
            for member in members:
                nursery.start_soon(tell, member)

    async def _written(self, link: Link, message: Invalidate) -> None:
        if message.id not in self._writes:
            await self._fleet.in_worker(partial(self._fleet.store.invalidate, message.keys))
            if message.id:
                await self._tell_write(message.keys, message.id, self._fleet.unknown_to(link.peer_id))
        await link.send(Done(message.call))

    async def tell_quota(self, quota: Quota) -> None:
        """Let every member know."""
        for member in list(self._fleet.members.values()):
            self._fleet.spawn(member.send, TellQuota(quota))

    # What members want of us

    def at_once(self, message: Message) -> bool:
        """Whether to handle a message is to wait for nobody: a question that the store, and nobody else, decides."""
        if not isinstance(message, Ask) or self._answering >= BUSY:
            return False
        key = message.question.key
        if not message.forwarded and (key in self._hints or not self._fleet.is_settled()):
            return False
        return self._shelf.is_light(key)

    async def handle(self, link: Link, message: Message) -> None:
        """Do what a member asks. Raises OSError when it is gone before it can be answered."""
        if isinstance(message, Ask):
            await self._asked(link, message)
        elif isinstance(message, Publish):
            await self._published(link, message)
        elif isinstance(message, Push):
            stored = await self._shelf.received(message.key, message.sealed, message.resident, link.keyring)
            if stored is not None:
                self._tell(self._claims.release(message.claim, None, Verdict.PUBLISHED, trio.current_time()))
        elif isinstance(message, Release):
            told = self._claims.release(message.claim, message.id, message.verdict, trio.current_time())
            self._tell(told)
        elif isinstance(message, Fetching):
            self._adopt(link.peer_id, message.fetching)
        elif isinstance(message, Invalidate):
            await self._written(link, message)
        elif isinstance(message, TellQuota):
            if self._fleet.quotas.merge(message.quota, time.time()):
                for member in self._fleet.unknown_to(link.peer_id):
                    self._fleet.spawn(member.send, message)
        elif isinstance(message, Granted):  # to one of us who has given up
            await link.send(Release(message.claim, message.id, Verdict.ABANDONED))

    async def _asked(self, link: Link, message: Ask) -> None:
        self._answering += 1
        try:
            await self._answer(link, message)
        finally:
            self._answering -= 1

    async def _answer(self, link: Link, message: Ask) -> None:
        question, call = message.question, message.call
        told_to_wait = self._answering > BUSY and not message.forwarded
        if told_to_wait:  # before it believes that nobody is here
            await link.send(Wait(call))
        if not message.forwarded and not self._fleet.is_settled():
            await self._fleet.settled(self._fleet.settings.lookup_timeout / 4)
        stored = await (self._shelf.select(question) if message.forwarded else self._find(question))
        if stored is not None and helps(stored, question):
            sealed = self._shelf.sealed(stored, question, link.keyring)
            await link.send(Found(call, sealed, resident(stored.entry.received)))
            return
        if message.forwarded:
            await link.send(Nothing(call))
            return

        def tell(tidings: Tidings) -> None:
            self._fleet.spawn(self._deliver, link, call, question, tidings)

        asker = Asker(link.peer_id, call, tell)
        answer = self._claims.ask(question.claim, asker, trio.current_time())
        if isinstance(answer, Pending):
            if not told_to_wait:
                await link.send(Wait(call))
        elif isinstance(answer, Go):
            await link.send(Nothing(call))
        else:
            await self._grant(link, call, question, answer.id, stored)

    async def _grant(self, link: Link, call: int, question: Question, id_: int, stale: Stored | None) -> None:
        sealed, held_for = b"", 0.0
        if stale is not None and stale.entry.digest != question.holds:
            sealed = self._shelf.seal(stale, link.keyring, light=False)
            held_for = resident(stale.entry.received)
        try:
            await link.send(Granted(call, question.claim, id_, sealed, held_for))
        except OSError:
            self._tell(self._claims.release(question.claim, id_, Verdict.ABANDONED, trio.current_time()))
            raise

    async def _deliver(self, link: Link, call: int, question: Question, tidings: Tidings) -> None:
        """What a member waits for has been decided."""
        try:
            stored = await self._shelf.select(question)
            if isinstance(tidings, ClaimGranted):
                await self._grant(link, call, question, tidings.id, stored)
            elif isinstance(tidings, Look) and stored is not None:
                held_for = resident(stored.entry.received)
                await link.send(Found(call, self._shelf.sealed(stored, question, link.keyring), held_for))
            else:
                await link.send(Nothing(call))
        except OSError:
            pass  # it is gone: a claim that it was granted has been passed on

    async def _published(self, link: Link, message: Publish) -> None:
        try:
            sealed, held_for, keyring = message.sealed, message.resident, link.keyring
            before = await self._shelf.load(message.key)
            stored = await self._shelf.received(message.key, sealed, held_for, keyring, missing_ok=False)
        except BodyMissing:
            await link.send(Published(message.call, [], False))
            return
        # What is not believed here will not be believed a second time: who waits goes on.
        verdict = Verdict.UNSTORABLE if stored is None else Verdict.PUBLISHED
        told = self._claims.release(message.claim, None, verdict, trio.current_time())
        self._tell(told)
        served = [] if stored is None else [asker.peer_id.to_bytes() for _, asker, _ in told]
        known = any(stored is one for one in before)
        await link.send(Published(message.call, served[:1000], True, known))

    async def _find(self, question: Question) -> Stored | None:
        """The entry that helps an asker most: from the store, else from the member that is known to hold it."""
        stored = await self._shelf.select(question)
        if helps(stored, question):
            return stored
        holder = self._fleet.members.get(self._hints.get(question.key, self._fleet.host.id))
        if holder is None or holder.suspect:
            return stored
        self._hints.pop(question.key, None)
        try:
            budget = self._fleet.settings.lookup_timeout / 2
            answer = await holder.link.call(lambda n: Ask(n, question, forwarded=True), budget)
        except OSError:
            return stored
        if isinstance(answer, Found):
            await self._shelf.received(question.key, answer.sealed, answer.resident, holder.keyring)
        return await self._shelf.select(question)

    def _tell(self, told: Told[Asker]) -> None:
        for _, asker, tidings in told:
            asker.tell(tidings)

    # Members come and go

    def lost(self, peer_id: ID) -> None:
        """A member is gone: what it was fetching passes to the first who waits.

        And what it had granted to us is told to those who are the homes now.
        """
        now = trio.current_time()
        self._tell(self._claims.forget(lambda asker: asker.peer_id == peer_id, now))
        for claim, held in self._fetching.items():
            if held.granter != peer_id or held.ends <= now:
                continue
            if self._who_is_home(held.key) == self._fleet.host.id:
                self._claims.adopt(claim, Asker(self._fleet.host.id, 0, _nobody), held.ends, held.id)
            else:
                self._fleet.spawn(self._tell_new_home, claim, held)

    async def _tell_new_home(self, claim: bytes, held: _Fetch) -> None:
        home = await self._home_of(held.key)
        if home is not None:
            await home.send(Fetching([(claim, held.id, held.ends - trio.current_time())]))

    def engaged(self) -> set[ID]:
        """Members whom a fetch joins with us: they wait or fetch for us, or we for them."""
        return {
            *self._waiting_at.values(),
            *(held.granter for held in self._fetching.values()),
            *(asker.peer_id for asker in self._claims.parties()),
        }

    def expire(self) -> None:
        """Claims whose end has come pass on."""
        now = trio.current_time()
        self._tell(self._claims.expire(now))
        self._fetching = {claim: held for claim, held in self._fetching.items() if held.ends > now}

    def waited_for(self) -> set[ID]:
        """Members that somebody waits for: homes that owe us an answer, and those who fetch for us for a second."""
        soon = trio.current_time() + self._life - 1.0
        return {*self._waiting_at.values(), *(asker.peer_id for asker in self._claims.holders(soon))}

    def fetching(self) -> list[tuple[bytes, int, float]]:
        """The fleet's claims that this node has: claim key, id, seconds left."""
        now = trio.current_time()
        return [(claim, held.id, held.ends - now) for claim, held in self._fetching.items() if held.ends > now][:1000]

    def told(self, peer_id: ID, said: Inventory) -> None:
        """What a member holds and fetches: we may be the home of it now."""
        for key in said.holds:
            self._hints[key] = peer_id
            self._hints.move_to_end(key)
        while len(self._hints) > MAX_HINTS:
            self._hints.popitem(last=False)
        self._adopt(peer_id, said.fetching)

    def _adopt(self, peer_id: ID, fetching: list[tuple[bytes, int, float]]) -> None:
        """A member fetches these, as another home has granted."""
        for claim, id_, left in fetching:
            ends = trio.current_time() + min(left, self._life)
            self._claims.adopt(claim, Asker(peer_id, 0, _nobody), ends, id_)


def _nobody(tidings: Tidings) -> None:
    """A claimant has nothing to be told."""
