"""*Who has it?* What a node is to the others: the home of some keys, and one who is told of writes.

The home of a cache key is one node, the same in the eyes of all who know the same nodes (:mod:`.homes`). It keeps the
key's claims and a copy of what is published. A node asks the home one question (:mod:`.questions`)::

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
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import trio
from libp2p.peer.id import ID

from httpx_p2pcache.claims import CLAIM_LIFE, ClaimTable, Go, Look, Pending, Tidings, Told, Verdict
from httpx_p2pcache.claims import Granted as ClaimGranted
from httpx_p2pcache.entries import ANONYMOUS
from httpx_p2pcache.network import Question, settle
from httpx_p2pcache.node.link import Link
from httpx_p2pcache.node.members import Member
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
from httpx_p2pcache.node.shelf import LARGE, BodyMissing, chosen, helps, resident
from httpx_p2pcache.quota import Quota
from httpx_p2pcache.stored import Stored

if TYPE_CHECKING:
    from httpx_p2pcache.node.fleet import Fleet

logger = logging.getLogger("httpx_p2pcache")

BUSY = 4  # questions under way beyond which the next is told to wait before it is looked at
LOOKS = 4  # for an entry, where others are published meanwhile
MAX_WRITES = 1000  # remembered, so that none goes in circles
MAX_HINTS = 20_000  # cache keys of which we know who holds them


class Applicant(NamedTuple):
    """Who waits at a home: a member's call, or this node's own request."""

    peer_id: ID
    call: int
    tell: Callable[[Tidings], None]
    link: Link | None = None  # on which it waits, or has been granted what it asked for

    def __hash__(self) -> int:
        return hash((self.peer_id, self.call))


class Home:
    """This node as the home of some keys. Everything runs in its loop."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._shelf = fleet.shelf
        self._life = CLAIM_LIFE * fleet.settings.claim_timeout
        self._claims: ClaimTable[Applicant] = ClaimTable(self._life)
        self.hints: OrderedDict[bytes, ID] = OrderedDict()  # of cache keys: a member that has said that it holds them
        self._writes: OrderedDict[int, None] = OrderedDict()  # of which we have heard
        self._answering = 0
        self._published_so_far = 0

    # What concerns everybody

    async def invalidate(self, keys: list[bytes], future: Future[None]) -> None:
        """Tell everybody; ``future`` is resolved when all have answered or are given up."""
        try:
            await self._tell_write(keys, secrets.randbits(63), list(self._fleet.members.values()))
        finally:
            settle(future, None)

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
                await self._tell_write(message.keys, message.id, self._fleet.reach.unknown_to(link.peer_id))
        await link.send(Done(message.call))

    async def tell_quota(self, quota: Quota) -> None:
        """Let every member know."""
        if quota.identity == ANONYMOUS:  # it is counted by address: what one meets is no other's limit
            return
        for member in list(self._fleet.members.values()):
            self._fleet.spawn(member.send, TellQuota(quota))

    # What members want of us

    def at_once(self, link: Link, message: Message) -> bool:
        """Answer a question that the store, and nobody else, decides; false for what may have to wait."""
        if not isinstance(message, Ask) or self._answering >= BUSY:
            return False
        question = message.question
        held = self._shelf.at_hand(question.key)
        if held is None or sum(len(stored.entry.body) for stored in held) > LARGE:
            return False
        stored = chosen(held, question)
        sure = message.forwarded or helps(stored, question)
        if not sure and (question.key in self.hints or not self._fleet.is_settled()):
            return False
        answer = self._answer(link, message, stored)
        if not link.send_at_once(answer):
            self._fleet.spawn(self._send, link, answer)
        return True

    async def handle(self, link: Link, message: Message) -> None:
        """Do what a member asks. Raises OSError when it is gone before it can be answered."""
        if isinstance(message, Ask):
            await self._asked(link, message)
        elif isinstance(message, Publish):
            await self._published(link, message)
        elif isinstance(message, Push):
            stored = await self._shelf.received(message.key, message.sealed, message.resident, link.keyring)
            if stored is not None:
                self.ended(message.claim, None, Verdict.PUBLISHED)
        elif isinstance(message, Release):
            self.ended(message.claim, message.id, message.verdict)
        elif isinstance(message, Fetching):
            self.adopt(link.peer_id, message.fetching)
        elif isinstance(message, Invalidate):
            await self._written(link, message)
        elif isinstance(message, TellQuota):
            if message.quota.identity != ANONYMOUS and self._fleet.quotas.merge(message.quota, time.time()):
                for member in self._fleet.reach.unknown_to(link.peer_id):
                    self._fleet.spawn(member.send, message)
        elif isinstance(message, Granted):  # to one of us who has given up
            await link.send(Release(message.claim, message.id, Verdict.ABANDONED))

    async def _asked(self, link: Link, message: Ask) -> None:
        question, call = message.question, message.call
        self._answering += 1
        try:
            told_to_wait = self._answering > BUSY and not message.forwarded
            if told_to_wait:  # before it believes that nobody is here
                await link.send(Wait(call))
            if not message.forwarded and not self._fleet.is_settled():
                await self._fleet.settled(self._fleet.settings.lookup_timeout / 4)
            for _ in range(LOOKS):  # what is published while we look ends the claim, and nobody else's would wait
                so_far = self._published_so_far
                stored = await (self._shelf.select(question) if message.forwarded else self.find(question))
                if self._published_so_far == so_far:
                    break
            answer = self._answer(link, message, stored)
            if not (told_to_wait and isinstance(answer, Wait)):
                await self._send(link, answer)
        finally:
            self._answering -= 1

    def _answer(self, link: Link, message: Ask, stored: Stored | None) -> Found | Granted | Nothing | Wait:
        """What is said to a question of which ``stored`` is the best that there is."""
        question, call = message.question, message.call
        if stored is not None and helps(stored, question):
            self._fleet.demanded()
            return self._found(link, call, question, stored)
        if message.forwarded:
            return Nothing(call)

        def tell(tidings: Tidings) -> None:
            if not isinstance(tidings, Look) or not self._delivered_at_once(link, call, question):
                self._fleet.spawn(self._deliver, link, call, question, tidings)

        holder = self._claims.holder(question.claim)
        lost = None if holder is None or holder.peer_id != link.peer_id else holder.link
        if lost is not None and lost.closed.is_set():
            self.parted(lost)  # it asks again, so it has not heard that it may fetch
        answer = self._claims.ask(question.claim, Applicant(link.peer_id, call, tell, link), trio.current_time())
        if isinstance(answer, Pending):
            self._fleet.demanded()
            return Wait(call)
        return Nothing(call) if isinstance(answer, Go) else self._grant(link, call, question, answer.id, stored)

    def _found(self, link: Link, call: int, question: Question, stored: Stored) -> Found:
        return Found(call, self._shelf.sealed(stored, question, link.keyring), resident(stored.entry.received))

    def _grant(self, link: Link, call: int, question: Question, id_: int, stale: Stored | None) -> Granted:
        if stale is None or stale.entry.digest == question.holds:
            return Granted(call, question.claim, id_, b"", 0.0)
        sealed = self._shelf.seal(stale, link.keyring, light=False)
        return Granted(call, question.claim, id_, sealed, resident(stale.entry.received))

    async def _send(self, link: Link, answer: Found | Granted | Nothing | Wait) -> None:
        """Raises OSError if the member is gone; a claim that it was granted passes on."""
        try:
            await link.send(answer)
        except OSError:
            if isinstance(answer, Granted):
                self.ended(answer.claim, answer.id, Verdict.ABANDONED)
            raise

    def _delivered_at_once(self, link: Link, call: int, question: Question) -> bool:
        """Whether what has been published could be handed to a member that waits for it, without waiting."""
        try:
            held = self._shelf.at_hand(question.key)
            if held is None or sum(len(stored.entry.body) for stored in held) > LARGE:
                return False
            stored = chosen(held, question)
            return stored is not None and link.send_at_once(self._found(link, call, question, stored))
        except Exception:  # the task meets the same, and says so
            return False

    async def _deliver(self, link: Link, call: int, question: Question, tidings: Tidings) -> None:
        """What a member waits for has been decided."""
        stored = await self._shelf.select(question)
        answer: Found | Granted | Nothing = Nothing(call)
        if isinstance(tidings, ClaimGranted):
            answer = self._grant(link, call, question, tidings.id, stored)
        elif isinstance(tidings, Look) and stored is not None:
            answer = self._found(link, call, question, stored)
        try:
            await self._send(link, answer)
        except OSError:
            pass  # it is gone

    async def _published(self, link: Link, message: Publish) -> None:
        try:
            sealed, held_for = message.sealed, message.resident
            before = await self._shelf.load(message.key)
            stored = await self._shelf.received(message.key, sealed, held_for, link.keyring, missing_ok=False)
        except BodyMissing:
            await link.send(Published(message.call, [], False))
            return
        # What is not believed here will not be believed a second time: who waits goes on.
        verdict = Verdict.UNSTORABLE if stored is None else Verdict.PUBLISHED
        told = self.ended(message.claim, None, verdict)
        served = [] if stored is None else [asker.peer_id.to_bytes() for _, asker, _ in told]
        known = any(stored is one for one in before)
        await link.send(Published(message.call, served[:1000], True, known))

    def holder_of(self, key: bytes) -> Member | None:
        """The member that has said that it holds a key."""
        holder = self._fleet.members.get(self.hints.get(key, self._fleet.host.id))
        return None if holder is None or holder.suspect else holder

    async def find(self, question: Question) -> Stored | None:
        """The entry that helps an asker most: from the store, else from the member that is known to hold it."""
        stored = await self._shelf.select(question)
        if helps(stored, question):
            return stored
        holder = self.holder_of(question.key)
        if holder is None:
            return stored
        self.hints.pop(question.key, None)
        try:
            link, budget = holder.link, self._fleet.settings.lookup_timeout / 2
            answer = await link.call(lambda n: Ask(n, question, forwarded=True), budget)
        except OSError:
            return stored
        if isinstance(answer, Found):
            await self._shelf.received(question.key, answer.sealed, answer.resident, link.keyring)
        return await self._shelf.select(question)

    # Claims

    def claim_here(self, claim: bytes, number: int, tell: Callable[[Tidings], None]) -> ClaimGranted | Pending | Go:
        """This node's own request for a claim; ``tell`` is called once with what a :class:`Pending` comes to."""
        return self._claims.ask(claim, Applicant(self._fleet.host.id, number, tell), self._fleet.now())

    def ended(self, claim: bytes, id_: int | None, verdict: Verdict) -> Told[Applicant]:
        """A claim was released, or what it was for was published: then whichever there is. Returns who was told."""
        self._published_so_far += verdict is Verdict.PUBLISHED
        told = self._claims.release(claim, id_, verdict, trio.current_time())
        self._tell(told)
        return told

    def lost(self, peer_id: ID) -> None:
        """A member is gone: what it was fetching passes to the first who waits."""
        self._tell(self._claims.forget(lambda asker: asker.peer_id == peer_id, trio.current_time()))

    def parted(self, link: Link) -> None:
        """A link is lost, and with it what was told to a member on it: it asks anew on another."""
        self._tell(self._claims.forget(lambda asker: asker.link is link, trio.current_time()))

    def expire(self) -> None:
        """Claims whose end has come pass on."""
        self._tell(self._claims.expire(trio.current_time()))

    def parties(self) -> set[ID]:
        """Those who fetch what others wait for here, or wait."""
        return {asker.peer_id for asker in self._claims.parties()}

    def owing(self) -> set[ID]:
        """Members whose claim here is more than a second old."""
        soon = trio.current_time() + self._life - 1.0
        return {asker.peer_id for asker in self._claims.holders(soon)}

    def told(self, peer_id: ID, said: Inventory) -> None:
        """What a member holds and fetches: we may be the home of it now."""
        for key in said.holds:
            self.hints[key] = peer_id
            self.hints.move_to_end(key)
        while len(self.hints) > MAX_HINTS:
            self.hints.popitem(last=False)
        self.adopt(peer_id, said.fetching)

    def adopt(self, peer_id: ID, fetching: list[tuple[bytes, int, float]]) -> None:
        """A node fetches these (claim key, id, seconds left), as another home has granted."""
        for claim, id_, left in fetching:
            holder, ends = self._claims.holder(claim), trio.current_time() + min(left, self._life)
            if holder is None or holder.peer_id == peer_id:
                self._claims.adopt(claim, Applicant(peer_id, 0, _nobody), ends, id_)

    def _tell(self, told: Told[Applicant]) -> None:
        for _, asker, tidings in told:
            asker.tell(tidings)


def _nobody(tidings: Tidings) -> None:
    """A claimant has nothing to be told."""
