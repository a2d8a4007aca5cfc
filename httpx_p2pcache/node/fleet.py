"""The node's part in the fleet: who is a member, and who joins how. What they say about entries is in ``home``.

Everything here runs in the node's own trio loop. What a peer does wrong is caught where it is dialled, admitted,
served, and in :meth:`Fleet.spawn`; it is counted, logged at debug, and nobody else notices.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import trio
from libp2p.peer.id import ID

from httpx_p2pcache.entries import Keyring
from httpx_p2pcache.ledger import Ledger
from httpx_p2pcache.node.discovery import Discovery, Sighting
from httpx_p2pcache.node.discovery.registry import Registry
from httpx_p2pcache.node.discovery.static import StaticPeers
from httpx_p2pcache.node.home import Home
from httpx_p2pcache.node.host import Host, announced, is_loopback, reset
from httpx_p2pcache.node.members import Link, Member
from httpx_p2pcache.node.protocol import (
    FRAME_OVERHEAD,
    Introduce,
    Inventory,
    Message,
    Ready,
    TellCounts,
    TellQuota,
    admit,
)
from httpx_p2pcache.node.worker import Worker
from httpx_p2pcache.quota import QuotaBoard
from httpx_p2pcache.settings import Settings
from httpx_p2pcache.stats import Stats, total
from httpx_p2pcache.store import Store

logger = logging.getLogger("httpx_p2pcache")

DIAL_SECONDS = 3.0  # to connect, secure, multiplex and be admitted
ADMISSION_SECONDS = 2.0  # how long a stranger may stay before it has proved anything
LOOK_AROUND_SECONDS = 0.25  # between two looks for new peers at the start ...
LOOK_AROUND_LATER = 1.0  # ... and once the fleet has had time to form
FORMING_SECONDS = 10.0
BACK_OFF_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
SILENCE_SECONDS = 5.0  # after which a member is asked whether it is still there
URGENT_SECONDS = 1.0  # the same while somebody waits for it
PING_SECONDS = 2.0
COUNTS_SECONDS = 2.0  # between two messages to the members about what has been counted
NEWCOMER_SECONDS = 0.5  # within which somebody who has connected is expected to know the others
FORGET_SECONDS = 60.0  # after which a peer that cannot be reached, and is not seen any more, is forgotten
DIALS_AT_ONCE = 32
MAX_CANDIDATES = 2000
MAX_HOLDS = 1000  # cache keys in an inventory, the latest used
FAREWELL_SECONDS = 0.8  # for publications that are under way when we leave

Result = TypeVar("Result")


@dataclass
class _Candidate:
    """A peer that may be there, and when it is tried next."""

    peer_id: ID
    addresses: list[str]
    how: str
    seen: float = field(default_factory=trio.current_time)
    failures: int = 0
    next_try: float = 0.0
    dialling: bool = False


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
        self.host = Host(self._accept)
        self.home = Home(self)
        self.joined = trio.Event()
        self.stopping = trio.Event()
        self.nursery: trio.Nursery
        self._candidates: dict[ID, _Candidate] = {}
        self._changed = trio.Event()
        self._called_ready: set[ID] = set()
        self._somebody_ready = trio.Event()
        self._worker = Worker("p2pcache-disk")
        self._discoveries: list[Discovery] = [
            StaticPeers(self.settings.bootstrap_peers),
            Registry(self.settings.peer_registry or self.settings.dir / "peers", self.keyring, self.settings.peer_ttl),
        ]
        self._failed_discoveries: set[str] = set()
        self._ledger = Ledger(self.settings.dir)
        self._began = time.time()
        self.counts = TellCounts("", {})  # of this runner

    async def run(self, started: Callable[[], None]) -> None:
        """Be a member until ``stopping`` is set; ``started`` is called once we listen. Raises OSError if we cannot."""
        try:
            async with self.host.listening(self.settings.listen_host, self.settings.listen_port) as port:
                self.addresses = list(self.settings.announce_addrs) or announced(self.settings.listen_host, port)
                try:
                    async with trio.open_nursery() as self.nursery:
                        started()
                        self.nursery.start_soon(self._look_around)
                        self.nursery.start_soon(self._watch)
                        self.nursery.start_soon(self._show_out_strangers)
                        self.nursery.start_soon(self._tell_counts)
                        await self.stopping.wait()
                        # What has been paid for is handed over first: a short process would share nothing else.
                        with trio.move_on_after(FAREWELL_SECONDS):
                            await self.home.published()
                        self.nursery.cancel_scope.cancel()
                finally:
                    with trio.CancelScope(shield=True), trio.move_on_after(0.5):
                        for discovery in self._discoveries:
                            await self._tried(discovery, discovery.withdraw)
        finally:
            self._worker.stop()

    def runners(self) -> dict[str, dict[str, int]]:
        """What each runner of the fleet has counted, as last heard: by the runner's name, this one's included."""
        told = [self.counts, *(m.counts for m in list(self.members.values()) if m.counts is not None)]
        # A runner without a daemon may have several nodes, of which each tells what all its processes have counted.
        return {one.runner: one.counts for one in sorted(told, key=lambda t: t.counts.get("requests", 0)) if one.runner}

    def spawn(self, func: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Run ``func`` in the background; if it fails that costs its own purpose and nothing else."""

        async def run() -> None:
            try:
                await func(*args)
            except Exception as exc:
                self.stats.add("peer_failures")
                logger.debug("%s has failed: %r", func.__name__, exc, exc_info=True)

        try:
            self.nursery.start_soon(run)
        except RuntimeError:  # we have left already
            logger.debug("%s came too late", func.__name__)

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

    # Who is there?

    async def _look_around(self) -> None:
        began = trio.current_time()
        for discovery in self._discoveries:
            await self._tried(discovery, partial(discovery.announce, self.host.id.to_bytes(), self.addresses))
        while True:
            for discovery in self._discoveries:
                for sighting in await self._tried(discovery, discovery.find) or ():
                    self.sighted(sighting)
            due = self._due()
            if self.joined.is_set():
                for candidate in due:
                    self.spawn(self._dial, candidate)
            else:
                async with trio.open_nursery() as nursery:
                    for candidate in due:
                        nursery.start_soon(self._dial, candidate)
                await self._get_ready()
            forming = trio.current_time() - began < FORMING_SECONDS
            self._changed = trio.Event()
            with trio.move_on_after(LOOK_AROUND_SECONDS if forming else LOOK_AROUND_LATER):
                await self._changed.wait()

    async def _tried(self, discovery: Discovery, func: Callable[[], Result]) -> Result | None:
        name = type(discovery).__name__
        try:
            found = await self.in_worker(func)
        except OSError as exc:
            if name not in self._failed_discoveries:
                self._failed_discoveries.add(name)
                logger.warning("%s cannot be used to find peers: %s", name, exc)
            return None
        self._failed_discoveries.discard(name)
        return found

    def sighted(self, sighting: Sighting) -> None:
        """Somebody may be there: it is dialled when it is due."""
        try:
            peer_id = ID(sighting.peer_id)
        except Exception:  # py-libp2p has no one error for a peer ID that is none
            return
        if peer_id == self.host.id or not sighting.addresses:
            return
        known = self._candidates.get(peer_id)
        if known is None and len(self._candidates) >= MAX_CANDIDATES:
            return
        if known is None:
            self._candidates[peer_id] = _Candidate(peer_id, list(sighting.addresses), sighting.how)
            self._changed.set()
        else:
            known.addresses, known.seen = list(sighting.addresses), trio.current_time()

    def _due(self) -> list[_Candidate]:
        """Whom to dial now. Who has failed often, and is not seen any more, is forgotten."""
        now = trio.current_time()
        for candidate in list(self._candidates.values()):
            gone = candidate.failures > len(BACK_OFF_SECONDS) and now - candidate.seen > FORGET_SECONDS
            if gone and candidate.peer_id not in self.members and candidate.how != "bootstrap":
                del self._candidates[candidate.peer_id]
                self.host.forget(candidate.peer_id)
        found = [
            candidate
            for candidate in self._candidates.values()
            if candidate.peer_id not in self.members and not candidate.dialling and candidate.next_try <= now
        ]
        return found[:DIALS_AT_ONCE]

    async def _dial(self, candidate: _Candidate) -> None:
        candidate.dialling = True
        stream = None
        try:
            with trio.fail_after(DIAL_SECONDS):
                stream = await self.host.connect(candidate.addresses, candidate.peer_id, DIAL_SECONDS)
                await self._admit(stream, candidate.peer_id, dialled=True)
                link = Link(stream, candidate.peer_id, self._frame_limit)
                self.spawn(self._serve, link, candidate.how, candidate.addresses)
                await link.introduced.wait()
            if link.closed.is_set():
                raise OSError("it has left at once")
        except Exception as exc:
            logger.debug("a peer found by %s was not reached: %r", candidate.how, exc)
            wait = BACK_OFF_SECONDS[min(candidate.failures, len(BACK_OFF_SECONDS) - 1)]
            candidate.failures += 1
            candidate.next_try = trio.current_time() + wait
            if stream is not None:
                await reset(stream)
        else:
            candidate.failures = 0
        finally:
            candidate.dialling = False

    async def _accept(self, stream: Any, peer_id: ID) -> None:
        """Somebody has opened a stream to us."""
        try:
            with trio.fail_after(ADMISSION_SECONDS):
                await self._admit(stream, peer_id, dialled=False)
        except Exception as exc:
            logger.debug("a peer was not admitted: %r", exc)
            self.stats.add("rejected")
            await reset(stream)
            return
        link = Link(stream, peer_id, self._frame_limit)
        known = self._candidates.get(peer_id)
        await self._serve(link, known.how if known else "inbound", known.addresses if known else [])

    async def _admit(self, stream: Any, peer_id: ID, *, dialled: bool) -> None:
        ours, theirs = self.host.id.to_bytes(), peer_id.to_bytes()
        dialler, listener = (ours, theirs) if dialled else (theirs, ours)
        await admit(
            stream,
            self.keyring.admission,
            dialler=dialler,
            listener=listener,
            dialled=dialled,
            nonce=os.urandom(32),
        )

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
                await link.send(Inventory(message.call, holds, self.home.fetching()))
            elif isinstance(message, TellCounts):
                if link.peer_id in self.members:
                    self.members[link.peer_id].counts = message
            else:
                await self.home.handle(link, message)

        self.spawn(self._introduce, link)
        try:
            await link.serve(handle)
        finally:
            self._part_from(link)

    async def _introduce(self, link: Link) -> None:
        members = [(m.peer_id.to_bytes(), m.addresses[:16]) for m in self.members.values() if m.addresses]
        takes, ready = self.settings.max_body_size, self.joined.is_set()
        await link.send(Introduce(self.addresses[:16], socket.gethostname(), members[:1000], takes, ready))

    def _introduced(self, link: Link, said: Introduce, how: str, addresses: list[str]) -> None:
        here = said.host == socket.gethostname()
        reachable = [a for a in said.addresses if here or not is_loopback(a)] or addresses
        member = self.members.get(link.peer_id)
        if member is None:
            # Who came before it is told of it: two that come at the same moment learn of each other only so.
            for other in list(self.members.values()):
                self.spawn(self._introduce, other.link)
            member = self.members[link.peer_id] = Member(link.peer_id, how, reachable)
            for quota in self.quotas.known():
                self.spawn(link.send, TellQuota(quota))
        if link not in member.links:
            member.links.append(link)
        member.takes = said.takes
        if said.ready:
            self._is_ready(member)
        link.introduced.set()
        self.sighted(Sighting(peer_id=link.peer_id.to_bytes(), addresses=tuple(reachable), how=how))
        for peer_id, theirs in said.members:
            known = tuple(a for a in theirs if here or not is_loopback(a))
            self.sighted(Sighting(peer_id=peer_id, addresses=known, how="peers"))
        if self.joined.is_set() and link.peer_id not in self._called_ready:
            self.spawn(self._call_ready, member)

    async def _get_ready(self) -> None:
        """Everybody whom we could find is connected: now we are a home, and are told what there is."""
        with trio.move_on_after(DIAL_SECONDS):
            async with trio.open_nursery() as nursery:
                for member in list(self.members.values()):
                    nursery.start_soon(self._call_ready, member)
        self.joined.set()
        for member in self.members.values():  # who has come meanwhile
            if member.peer_id not in self._called_ready:
                self.spawn(self._call_ready, member)

    async def _call_ready(self, member: Member) -> None:
        self._called_ready.add(member.peer_id)
        try:
            answer = await member.link.call(Ready, DIAL_SECONDS)
        except OSError:
            return
        if isinstance(answer, Inventory):
            self.home.told(member.peer_id, answer)

    async def settled(self, timeout: float) -> None:
        """Wait, for a moment, until we and those who have just come know each other: before that homes are guessed."""
        with trio.move_on_after(timeout):
            await self.joined.wait()
            while any(
                not member.ready and trio.current_time() - member.met < NEWCOMER_SECONDS
                for member in self.members.values()
            ):
                await self._somebody_ready.wait()

    def _is_ready(self, member: Member) -> None:
        if not member.ready:
            member.ready = True
            self._ask_whether_there(member)  # how far it is
        self._somebody_ready.set()
        self._somebody_ready = trio.Event()

    def _part_from(self, link: Link) -> None:
        member = self.members.get(link.peer_id)
        if member is None or link not in member.links:
            return
        member.links.remove(link)
        if not member.links:
            del self.members[link.peer_id]
            self._called_ready.discard(link.peer_id)
            self.home.lost(link.peer_id)
            candidate = self._candidates.get(link.peer_id)
            if candidate is not None:
                candidate.next_try = trio.current_time() + BACK_OFF_SECONDS[0]

    # Is everybody still there?

    async def _watch(self) -> None:
        """Claims that end are passed on; members that fall silent are asked, at once where somebody waits for them."""
        while True:
            await trio.sleep(0.25)
            now = trio.current_time()
            self.home.expire()
            waited_for = self.home.waited_for()
            for member in list(self.members.values()):
                silence = now - member.heard()
                if silence > SILENCE_SECONDS or (silence > URGENT_SECONDS and member.peer_id in waited_for):
                    self._ask_whether_there(member)

    def suspect(self, peer_id: ID) -> None:
        """It has not answered in time: it is left alone until it is heard of, and dropped if it is not."""
        member = self.members.get(peer_id)
        if member is not None and not member.suspect:
            member.suspect = True
            self._ask_whether_there(member)

    def _ask_whether_there(self, member: Member) -> None:
        link = member.link

        async def ask() -> None:
            try:
                member.rtt = await link.ping(PING_SECONDS)
                member.suspect = False
            except OSError:
                await link.close()
                await self.host.disconnect(member.peer_id)

        link.heard = trio.current_time()  # asked once per silence
        self.spawn(ask)

    async def _tell_counts(self) -> None:
        """What the processes of this runner have counted goes to every member, when it has changed."""
        while True:
            await trio.sleep(COUNTS_SECONDS)
            runner, counts = await self.in_worker(lambda: (self._ledger.runner(), self._ledger.read(self._began)))
            self.counts = TellCounts(runner, {name: n for name, n in total(counts).items() if n})
            for member in list(self.members.values()):
                if member.told_counts != self.counts:
                    member.told_counts = self.counts
                    self.spawn(member.link.send, self.counts)

    async def _show_out_strangers(self) -> None:
        """Who is connected but was not admitted in time is disconnected."""
        seen: dict[ID, float] = {}
        while True:
            await trio.sleep(1.0)
            now = trio.current_time()
            strangers = [p for p in self.host.connected() if p not in self.members]
            seen = {p: seen.get(p, now) for p in strangers}
            for peer_id, since in seen.items():
                candidate = self._candidates.get(peer_id)
                if now - since > ADMISSION_SECONDS and not (candidate and candidate.dialling):
                    self.spawn(self.host.disconnect, peer_id)
