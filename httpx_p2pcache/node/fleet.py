"""The node's part in the fleet: who is a member, and who joins how.

What they say about entries is in ``home``, ``questions`` and ``fetches``.

Everything here runs in the node's own trio loop. What a peer does wrong is caught where it is dialled, admitted,
served, and in :meth:`Fleet.spawn`; it is counted, logged at debug, and nobody else notices.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import socket
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

from httpx_p2pcache.entries import Keyring
from httpx_p2pcache.exceptions import Rejected
from httpx_p2pcache.ledger import Ledger
from httpx_p2pcache.multiaddrs import MAX_ADDRESSES, is_loopback
from httpx_p2pcache.node.discovery import Discovery, Sighting
from httpx_p2pcache.node.discovery.all import discoveries
from httpx_p2pcache.node.fetches import Fetches
from httpx_p2pcache.node.home import Home
from httpx_p2pcache.node.homes import Homes, anchors_among, core_among, peer_of
from httpx_p2pcache.node.host import DIAL_SECONDS, Host, announced, reset
from httpx_p2pcache.node.members import Link, Member
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
from httpx_p2pcache.node.search import BACK_OFF_SECONDS, GRACE_SECONDS, Candidate, Search
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
JUDGE_SECONDS = 0.01  # for which what is new about members is collected, longer the more there are
DEMAND_SECONDS = 1.0  # in which those who have asked for the same ask for the next
NEWCOMER_SECONDS = 0.5  # within which somebody who has connected is expected to know the others
MAX_LINKS_EACH = 4  # to one peer: two that dial each other at the same moment have two
MAX_RUNNERS = 1000  # whose counts one member may tell
MAX_KNOWN = 1000  # members that one member may have
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
        self.shelf = Shelf(self)
        self.home = Home(self)
        self.homes = Homes(self)
        self.fetches = Fetches(self)
        self.questions = Questions(self)
        self.search = Search(self, self._discoveries())
        self.presence = Presence(self)
        self.unreached = 0  # how many members of our members we cannot reach
        self._judging = False
        self.there: set[ID] = set()  # members, and members of members
        self.large = False  # more nodes than one mesh can have
        self.core = frozenset({self.host.id})  # see homes
        self.wanted: frozenset[ID] | None = None  # whom to be connected to: None for everybody
        self.joined = trio.Event()
        self.stopping = trio.Event()
        self.nursery: trio.Nursery
        self._called_ready: set[ID] = set()
        self._links: Counter[ID] = Counter()  # to each peer, introduced or not
        self._somebody_ready = trio.Event()
        self._worker = Worker("p2pcache-disk")
        self._ledger = Ledger(self.settings.dir)
        self._began = time.time()
        self._reminded = itertools.count()
        self._demanded = -math.inf  # when it was last that somebody wanted what another had (the system's clock)
        self._turns = itertools.count(time.time_ns())  # a node that begins anew goes on above what it has said before
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
                        self._every(WATCH_SECONDS, self.presence.watch)
                        self._every(LOOK_SECONDS, self.presence.show_out_strangers, self.presence.let_go)
                        self._every(REMIND_SECONDS, self._remind)
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
                self._acquainted(link, message)
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
            await self._introduce(link)  # before it can be a member, and be told that we are ready
            await link.serve(handle, self.home.at_once)
        finally:
            self._links[link.peer_id] -= 1
            if not self._links[link.peer_id]:
                del self._links[link.peer_id]
            self._part_from(link)

    async def _introduce(self, link: Link) -> None:
        others = [(p, m) for p, m in self.members.items() if p != link.peer_id and self._matters(p)]
        members = [(p.to_bytes(), m.addresses[:MAX_ADDRESSES]) for p, m in others]
        takes, ready = self.settings.max_body_size, self.joined.is_set()
        addresses, host = self.addresses[:MAX_ADDRESSES], socket.gethostname()
        link.told, link.told_unreached, link.turn = {p for p, _ in others}, self.unreached, next(self._turns)
        await link.send(Introduce(addresses, host, members, takes, ready, self.unreached, link.turn))

    def _introduced(self, link: Link, said: Introduce, how: str, addresses: list[str]) -> None:
        here = said.host == socket.gethostname()
        reachable = [a for a in said.addresses if here or not is_loopback(a)]
        reachable += self.host.seen_at(link.peer_id, said.addresses)
        reachable = list(dict.fromkeys(reachable)) or addresses
        member = self.members.get(link.peer_id)
        if member is None:
            member = self.members[link.peer_id] = Member(link.peer_id, how, reachable)
            self.reach_changed()
            for quota in self.quotas.known():
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
        self._acquainted(link, Acquainted(said.members, [], said.unreached, said.turn))
        if self.joined.is_set() and link.peer_id not in self._called_ready:
            self.spawn(self._call_ready, member)

    def _acquainted(self, link: Link, said: Acquainted) -> None:
        """A member tells whom it knows: they may be there for us as well."""
        member = self.members.get(link.peer_id)
        if member is None:
            return
        local = any(is_loopback(address) for address in member.addresses)
        for peer_id, addresses in said.come:
            known = tuple(a for a in addresses if local or not is_loopback(a))
            self.search.sighted(Sighting(peer_id=peer_id, addresses=known, how="peers"))
        come = {peer_of(peer_id) for peer_id, _ in said.come}
        self.search.candidates.awaits(come - self.members.keys(), trio.current_time())
        link.knows |= come
        link.knows -= {peer_of(peer_id) for peer_id in said.gone}
        # It has two links where both have dialled, and what is said on one may be overtaken on the other.
        if said.turn >= member.turn:
            before = member.knows, member.unreached
            member.knows, member.unreached = set(list(link.knows)[:MAX_KNOWN]), said.unreached
            member.turn = said.turn
            if before != (member.knows, member.unreached):
                self.reach_changed()
        if come - self.members.keys() - {self.host.id}:
            self.spawn(self._judge_reach)

    async def _judge_reach(self) -> None:
        await trio.sleep(GRACE_SECONDS)
        self.reach_changed()

    def reach_changed(self) -> None:
        """Somebody has come or gone, here or at a member: what that means is found out soon, for all who do at once."""
        if not self._judging:
            self._judging = True
            self.spawn(self._judge)

    async def _judge(self) -> None:
        """Do we still reach all whom our members reach? Each member is told what is new since it was told last: two
        that come at the same moment learn of each other only so."""
        await trio.sleep(min(max(JUDGE_SECONDS, len(self.members) * JUDGE_SECONDS / 5), GRACE_SECONDS))
        self._judging = False
        told: set[ID] = set().union(*(member.knows for member in self.members.values())) - {self.host.id}
        there, before = told | self.members.keys(), self.there
        self.there = there
        if self.large:  # where not everybody is dialled, who is known to nobody any more is not counted upon
            self.search.candidates.doubt(before - there)
        self.find_core()
        missing = told - self.members.keys() if self.wanted is None else (told & self.wanted) - self.members.keys()
        self.unreached = self.search.candidates.unreached(missing, trio.current_time())
        shown = {peer_id for peer_id in self.members if self._matters(peer_id)}
        for member in list(self.members.values()):
            if member.links and (link := member.links[0]).introduced.is_set():
                ours = shown - {link.peer_id}
                last = max(member.links, key=lambda one: one.turn)  # on which it was told last how things are
                if ours != last.told or last.told_unreached != self.unreached:
                    come, gone = sorted(ours - link.told, key=ID.to_bytes), sorted(link.told - ours, key=ID.to_bytes)
                    link.told, link.told_unreached, link.turn = ours, self.unreached, next(self._turns)
                    new = [(p.to_bytes(), self.members[p].addresses[:MAX_ADDRESSES]) for p in come]
                    left = [p.to_bytes() for p in gone]
                    self.spawn(link.send, Acquainted(new, left, self.unreached, link.turn))

    def _matters(self, peer_id: ID) -> bool:
        """Whether everybody should know of it: it can be a home."""
        return not self.large or peer_id in self.core

    def find_core(self) -> None:
        """Who are the homes, and to whom are we connected? In a small fleet the same: everybody."""
        ours, candidates = self.host.id, self.search.candidates
        known = candidates.promising() | self.members.keys() | {ours}
        self.core, self.wanted = core_among(known), None
        self.large = len(self.core) < len(known)
        if self.large:
            failing = core_among(candidates.everybody() | known) - self.core
            linked = self.core & self.members.keys()
            # Who fails to reach more of the core than it reaches, behind NAT, tries them all.
            central = ours in self.core or len(failing) > len(linked)
            self.wanted = (self.core if central else anchors_among(self.core, ours)) | failing

    def unknown_to(self, peer_id: ID) -> list[Member]:
        """The members whom a member cannot tell something itself."""
        member = self.members.get(peer_id)
        if member is None:
            return []
        return [one for one in self.members.values() if one is not member and one.peer_id not in member.knows]

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
        """Whether that is so."""
        return self.joined.is_set() and not any(
            trio.current_time() - member.met < NEWCOMER_SECONDS and self._matters(member.peer_id)
            for member in self.members.values()
            if not member.ready
        )

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
        self.reach_changed()

    async def _go_on(self, member: Member, lost: Link) -> None:
        """A member has another link: each tells the other there what it is fetching for it. The rest was lost."""
        fetching = self.fetches.fetching()
        with contextlib.suppress(OSError):
            if fetching:
                await member.send(Fetching(fetching))
        await trio.sleep(self.settings.lookup_timeout / 2)
        self.home.parted(lost)

    # What is told again and again

    async def _remind(self) -> None:
        """One member in turn is told all anew, whatever it may have missed."""
        if self.members:
            member = list(self.members.values())[next(self._reminded) % len(self.members)]
            if member.links:
                await self._introduce(member.links[0])

    async def _tell_counts(self) -> None:
        """What the processes of this runner have counted goes to every member, when it has changed."""
        runner, counts = await self.in_worker(lambda: (self._ledger.runner(), self._ledger.read(self._began)))
        self.counts = TellCounts(runner, {name: n for name, n in total(counts).items() if n})
        for member in list(self.members.values()):
            known = [self.counts]  # and what comes from those whom it does not know itself
            if not self.large:
                known += [one for m in self.unknown_to(member.peer_id) for one in m.counts.values()]
            for one in known:
                if one.runner and member.told_counts.get(one.runner) != one:
                    member.told_counts[one.runner] = one
                    self.spawn(member.send, one)
