"""The node's part in the fleet: who is a member, and who joins how.

What they say about entries is in ``home``, ``questions`` and ``fetches``.

Everything here runs in the node's own trio loop. What a peer does wrong is caught where it is dialled, admitted,
served, and in :meth:`Fleet.spawn`; it is counted, logged at debug, and nobody else notices.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import anyio.to_thread
import trio
import trio.lowlevel
from libp2p.peer.id import ID

from httpx_p2pcache.claims import CLAIM_LIFE, FLEET_PATIENCE
from httpx_p2pcache.entries import ANONYMOUS, Keyring
from httpx_p2pcache.exceptions import Rejected
from httpx_p2pcache.ledger import Ledger
from httpx_p2pcache.machine import proves_place
from httpx_p2pcache.multiaddrs import is_loopback
from httpx_p2pcache.node.discovery import Discovery, Sighting
from httpx_p2pcache.node.discovery.all import discoveries
from httpx_p2pcache.node.fetches import Fetches
from httpx_p2pcache.node.home import Home
from httpx_p2pcache.node.homes import Homes, peer_of
from httpx_p2pcache.node.host import DIAL_SECONDS, Host, announced, reset
from httpx_p2pcache.node.link import Link
from httpx_p2pcache.node.members import Member
from httpx_p2pcache.node.presence import ADMISSION_SECONDS, Presence
from httpx_p2pcache.node.protocol import (
    FRAME_OVERHEAD,
    Acquainted,
    Fetching,
    Introduce,
    Inventory,
    Message,
    Ready,
    TellCounts,
    TellQuota,
    admit,
)
from httpx_p2pcache.node.questions import Questions
from httpx_p2pcache.node.reach import Reach
from httpx_p2pcache.node.search import BACK_OFF_SECONDS, Candidate, Search
from httpx_p2pcache.node.shelf import Shelf
from httpx_p2pcache.node.worker import Worker
from httpx_p2pcache.quota import QuotaBoard
from httpx_p2pcache.settings import Settings
from httpx_p2pcache.stats import Stats, total
from httpx_p2pcache.store import Store

logger = logging.getLogger("httpx_p2pcache")

READY_SECONDS = 3.0  # for a member to tell what it holds
WATCH_SECONDS = 0.5  # between two looks at who owes us something
REMIND_SECONDS = 2.0
LOOK_SECONDS = 1.0  # between two looks at who is not needed, and who is a stranger
COUNTS_SECONDS = 2.0  # between two messages to the members about what has been counted
DEMAND_SECONDS = 1.0  # in which those who have asked for the same ask for the next
NEWCOMER_SECONDS = 0.5  # within which somebody who has connected is expected to know the others
MAX_LINKS_EACH = 4  # to one peer: two that dial each other at the same moment have two
MAX_RUNNERS = 1000  # whose counts one member may tell
MAX_HOLDS = 1000  # cache keys in an inventory, the latest used
FAREWELL_SECONDS = 0.8  # for publications that are under way when we leave

Result = TypeVar("Result")


@dataclass
class Fleet:
    """The members of the fleet as this node sees them."""

    settings: Settings
    store: Store
    keyring: Keyring
    stats: Stats
    quotas: QuotaBoard
    members: dict[ID, Member] = field(default_factory=dict)
    addresses: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.host: Any = self._make_host()
        self.now = trio.lowlevel.current_clock().current_time  # the loop's time, in any thread
        self.shelf = Shelf(self)
        self.home = Home(self)
        self.homes = Homes(self)
        self.fetches = Fetches(self)
        self.questions = Questions(self)
        self.search = Search(self, self._discoveries())
        self.presence = Presence(self)
        self.reach = Reach(self)
        self.joined = trio.Event()
        self.stopping = trio.Event()
        self.nursery: trio.Nursery
        self._called_ready: set[ID] = set()
        self._links: Counter[ID] = Counter()  # to each peer, introduced or not
        self._somebody_ready = trio.Event()
        self._worker = Worker("p2pcache-disk")
        self._ledger = Ledger(self.settings.dir)
        self._began = time.time()
        self._demanded = -math.inf  # when it was last that somebody wanted what another had (the system's clock)
        self.counts = TellCounts("", {})  # of this runner

    def _make_host(self) -> Any:
        return Host(self._accept, self.members.__contains__, self.settings.dir, is_expected=self.is_expected)

    def _discoveries(self) -> list[Discovery]:
        return discoveries(self)

    async def run(self, started: Callable[[], None]) -> None:
        """Be a member until ``stopping`` is set; ``started`` is called once we listen. Raises OSError if we cannot."""
        try:
            async with self.host.listening(self.settings.listen_host, self.settings.listen_port) as port:
                self.addresses = list(self.settings.announce_addrs) or announced(self.settings.listen_host, port)
                try:
                    async with trio.open_nursery() as self.nursery:
                        started()
                        self.nursery.start_soon(self.questions.keep_time)
                        self.nursery.start_soon(self.search.run, self._get_ready)
                        self._every(self._watch_seconds(), self.presence.watch)
                        self._every(LOOK_SECONDS, self.presence.show_out_strangers, self.presence.let_go)
                        self._every(REMIND_SECONDS, self.reach.remind)
                        self._every(COUNTS_SECONDS, self._tell_counts)
                        await self.stopping.wait()
                        await trio.lowlevel.checkpoint()  # what was handed over before that begins
                        # What has been paid for is handed over first: a short process would share nothing else.
                        with trio.move_on_after(FAREWELL_SECONDS):
                            await self.fetches.published()
                        self.nursery.cancel_scope.cancel()
                finally:
                    with trio.CancelScope(shield=True), trio.move_on_after(0.5):
                        await self.search.withdraw()
        finally:
            self._worker.stop()

    def _watch_seconds(self) -> float:
        """Who waits for what is fetched does so a little longer than the claim lives: to be granted it by then."""
        return min(WATCH_SECONDS, max(0.05, (FLEET_PATIENCE - CLAIM_LIFE) / 2 * self.settings.claim_timeout))

    def runners(self) -> dict[str, dict[str, int]]:
        """What each runner of the fleet has counted, as last heard: by the runner's name, this one's included."""
        told = [self.counts, *(one for m in list(self.members.values()) for one in list(m.counts.values()))]
        # A runner without a daemon may have several nodes, of which each tells what all its processes have counted.
        return {one.runner: one.counts for one in sorted(told, key=lambda t: t.counts.get("requests", 0)) if one.runner}

    def spawn(self, func: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Run ``func`` in the background; if it fails that costs its own purpose and nothing else."""
        try:
            self.nursery.start_soon(self._tried, func, *args)
        except RuntimeError:  # we have left already
            logger.debug("%s came too late", func.__name__)

    async def _tried(self, func: Callable[..., Awaitable[None]], *args: Any) -> None:
        try:
            await func(*args)
        except Exception as exc:
            self.stats.add("peer_failures")
            logger.debug("%s has failed: %r", func.__name__, exc, exc_info=True)

    def _every(self, seconds: float, *functions: Callable[[], Awaitable[None]]) -> None:
        """Run ``functions`` one after another, again and again, each time as by :meth:`spawn`."""

        async def again() -> None:
            while True:
                await trio.sleep(seconds)
                for func in functions:
                    await self._tried(func)

        self.nursery.start_soon(again)

    async def in_worker(self, func: Callable[[], Result]) -> Result:
        """``func()`` in the node's one worker thread: what touches the disk must not hold up the loop."""
        token, done = trio.lowlevel.current_trio_token(), trio.Event()
        future: Future[Result] = self._worker.submit(func)

        def wake(_: Future[Result]) -> None:
            try:
                token.run_sync_soon(done.set)
            except trio.RunFinishedError:
                pass

        future.add_done_callback(wake)
        await done.wait()
        return future.result()

    async def in_thread(self, func: Callable[[], Result]) -> Result:
        """``func()`` in a thread of its own, which may take long; we do not wait for it beyond our own end."""
        return await anyio.to_thread.run_sync(func, abandon_on_cancel=True)

    # Who comes, and who is let in

    def is_expected(self, peer_id: ID) -> bool:
        """Whether it is being dialled, to become a member."""
        candidate = self.search.candidates.get(peer_id)
        return candidate is not None and candidate.dialling

    async def dial(self, candidate: Candidate, peer_id: ID) -> None:
        """Make a candidate a member. Raises :class:`Rejected` if it does not hold the secret, OSError or else."""
        stream = None
        try:
            with trio.fail_after(DIAL_SECONDS):
                stream = await self.host.connect(candidate.addresses, peer_id, DIAL_SECONDS)
                keyring = await self._admit(stream, peer_id, dialled=True)
                link = Link(stream, peer_id, keyring, self._frame_limit)
                link.dialled = True
                self.spawn(self._serve, link, candidate.how, candidate.addresses)
                await link.introduced.wait()
            if link.closed.is_set():
                raise OSError("it has left at once")
        except BaseException:
            if stream is not None:
                await reset(stream)
            raise

    async def _accept(self, stream: Any, peer_id: ID) -> None:
        """Somebody has opened a stream to us."""
        try:
            with trio.fail_after(ADMISSION_SECONDS):
                keyring = await self._admit(stream, peer_id, dialled=False)
            peer_id = peer_of(peer_id.to_bytes())
        except Exception as exc:
            logger.debug("a peer was not admitted: %r", exc)
            self.stats.add("rejected")
            await reset(stream)
            # Only who has proved not to hold the secret is kept away: a member may be slow, or gone in between.
            if peer_id not in self.members and isinstance(exc, Rejected):
                await self.host.refuse(peer_id)
            elif peer_id not in self.members and not self.is_expected(peer_id):
                await self.host.disconnect(peer_id)
            return
        link = Link(stream, peer_id, keyring, self._frame_limit)
        known = self.search.candidates.get(peer_id)
        await self._serve(link, known.how if known else "inbound", known.addresses if known else [])

    async def _admit(self, stream: Any, peer_id: ID, *, dialled: bool) -> Keyring:
        ours, theirs = self.host.id.to_bytes(), peer_id.to_bytes()
        dialler, listener = (ours, theirs) if dialled else (theirs, ours)
        keys, nonce = self.keyring.admission, os.urandom(32)
        held = await admit(stream, keys, dialler=dialler, listener=listener, dialled=dialled, nonce=nonce)
        return self.keyring.every[held]

    @property
    def _frame_limit(self) -> int:
        return self.settings.max_body_size + FRAME_OVERHEAD

    # Members come and go.

    async def _serve(self, link: Link, how: str, addresses: list[str]) -> None:
        """All of a peer's life with us, on one link: a member from its introduction on."""

        async def handle(link: Link, message: Message) -> None:
            if isinstance(message, Introduce):
                self._introduced(link, message, how, addresses)
            elif isinstance(message, Ready):
                holds = await self.in_worker(partial(self.store.keys, MAX_HOLDS))
                # One step: what is under way is noted at the very moment in which the member becomes a home.
                if link.peer_id in self.members:
                    self._is_ready(self.members[link.peer_id])
                await link.send(Inventory(message.call, holds, self.fetches.fetching()))
            elif isinstance(message, Acquainted):
                self.reach.told(link, message)
            elif isinstance(message, TellCounts):
                member = self.members.get(link.peer_id)
                if member is not None and (message.runner in member.counts or len(member.counts) < MAX_RUNNERS):
                    member.counts[message.runner] = message
            else:
                await self.home.handle(link, message)

        if self._links[link.peer_id] >= MAX_LINKS_EACH:
            await link.close()
            return
        self._links[link.peer_id] += 1
        try:
            await self.reach.introduce(link)  # before it can be a member, and be told that we are ready
            await link.serve(handle, self.home.at_once)
        finally:
            self._links[link.peer_id] -= 1
            if not self._links[link.peer_id]:
                del self._links[link.peer_id]
            self._part_from(link)

    def _introduced(self, link: Link, said: Introduce, how: str, addresses: list[str]) -> None:
        here = proves_place(said.place, link.peer_id.to_bytes(), self.host.id.to_bytes())
        reachable = [a for a in said.addresses if here or not is_loopback(a)]
        reachable += self.host.seen_at(link.peer_id, said.addresses)
        reachable = list(dict.fromkeys(reachable)) or addresses
        member = self.members.get(link.peer_id)
        if member is None:
            member = self.members[link.peer_id] = Member(link.peer_id, how, reachable)
            self.reach.changed()
            for quota in self.quotas.known():
                if quota.identity != ANONYMOUS:
                    self.spawn(link.send, TellQuota(quota))
        if link not in member.links:
            member.links.append(link)
        member.takes, member.here = said.takes, here
        if said.ready:
            self._is_ready(member)
        link.introduced.set()
        self.search.sighted(Sighting(peer_id=link.peer_id.to_bytes(), addresses=tuple(reachable), how=how))
        known = self.search.candidates.get(link.peer_id)
        if known is not None:
            known.doubted = False
        link.knows = set()
        self.reach.told(link, Acquainted(said.members, [], said.unreached, said.turn))
        if self.joined.is_set() and link.peer_id not in self._called_ready:
            self.spawn(self._call_ready, member)

    async def _get_ready(self) -> None:
        """Everybody whom we could find is connected: now we are a home, and are told what there is."""
        with trio.move_on_after(READY_SECONDS):
            async with trio.open_nursery() as nursery:
                for member in list(self.members.values()):
                    nursery.start_soon(self._tried, self._call_ready, member)
        self.joined.set()
        for member in self.members.values():  # who has come meanwhile
            if member.peer_id not in self._called_ready:
                self.spawn(self._call_ready, member)

    async def _call_ready(self, member: Member) -> None:
        self._called_ready.add(member.peer_id)
        try:
            answer = await member.link.call(Ready, READY_SECONDS)
        except OSError:
            return
        if isinstance(answer, Inventory):
            self.home.told(member.peer_id, answer)

    async def settled(self, timeout: float) -> None:
        """Wait, for a moment, until we and those who have just come know each other: before that homes are guessed."""
        with trio.move_on_after(timeout):
            await self.joined.wait()
            while not self.is_settled():
                await self._somebody_ready.wait()

    def is_settled(self) -> bool:
        """Whether :meth:`settled` would return at once."""
        return self.joined.is_set() and not any(
            self.now() - member.met < NEWCOMER_SECONDS and self.reach.matters(member.peer_id)
            for member in self.members.values()
            if not member.ready
        )

    def rtt(self, link: Link) -> float:
        """The seconds of a round trip to a member, as it was measured last; 0 if it never was."""
        member = self.members.get(link.peer_id)
        return (member and member.rtt) or 0.0

    def demanded(self) -> None:
        """A member has asked for what we have or fetch, or has what we asked for."""
        self._demanded = time.monotonic()

    def in_demand(self) -> bool:
        """Whether that was lately: what is fetched is waited for by somebody, more likely than not. From any thread."""
        return time.monotonic() - self._demanded < DEMAND_SECONDS

    def _is_ready(self, member: Member) -> None:
        if not member.ready:
            member.ready = True
            self.presence.ask(member)  # how far it is
        self._somebody_ready.set()
        self._somebody_ready = trio.Event()

    def _part_from(self, link: Link) -> None:
        member = self.members.get(link.peer_id)
        if member is None or link not in member.links:
            self.home.parted(link)
            return
        member.links.remove(link)
        if member.links:
            self.spawn(self._go_on, member, link)
        else:
            self.home.parted(link)
            del self.members[link.peer_id]
            self._called_ready.discard(link.peer_id)
            self.home.lost(link.peer_id)
            self.fetches.granter_lost(link.peer_id)
            candidate = self.search.candidates.get(link.peer_id)
            if candidate is not None:
                candidate.next_try = trio.current_time() + BACK_OFF_SECONDS[0]
                self.search.look_again()
        self.reach.changed()

    async def _go_on(self, member: Member, lost: Link) -> None:
        """A member has another link: each tells the other there what it is fetching for it. The rest was lost."""
        fetching = self.fetches.fetching()
        with contextlib.suppress(OSError):
            if fetching:
                await member.send(Fetching(fetching))
        await trio.sleep(self.settings.lookup_timeout / 2)
        self.home.parted(lost)

    # What is told again and again

    async def _tell_counts(self) -> None:
        """What the processes of this runner have counted goes to every member, when it has changed."""
        runner, counts = await self.in_worker(lambda: (self._ledger.runner(), self._ledger.read(self._began)))
        self.counts = TellCounts(runner, {name: n for name, n in total(counts).items() if n})
        for member in list(self.members.values()):
            known = [self.counts]  # and what comes from those whom it does not know itself
            if not self.reach.large:
                known += [one for m in self.reach.unknown_to(member.peer_id) for one in m.counts.values()]
            for one in known:
                if one.runner and member.told_counts.get(one.runner) != one:
                    member.told_counts[one.runner] = one
                    self.spawn(member.send, one)
