"""*Who is there?* Looks for peers in every way at once, and dials who is found until it is a member or forgotten."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio
from libp2p.peer.id import ID

from httpx_p2pcache.exceptions import Rejected
from httpx_p2pcache.multiaddrs import MAX_ADDRESSES
from httpx_p2pcache.node.discovery import Discovery, Sighting
from httpx_p2pcache.node.homes import peer_of
from httpx_p2pcache.node.host import DIAL_SECONDS

if TYPE_CHECKING:
    from httpx_p2pcache.node.fleet import Fleet

logger = logging.getLogger("httpx_p2pcache")

LOOK_AROUND_SECONDS = 0.25  # between two looks for new peers at the start ...
LOOK_AROUND_LATER = 1.0  # ... and once the fleet has had time to form
FORMING_SECONDS = 10.0
LATE_SECONDS = 2.0  # after which the ways begin that cost more, and that short processes do not need
ANNOUNCE_AGAIN = 30.0  # after which one that has failed to begin is tried again
GRACE_SECONDS = 0.25  # within which a member of a member is reached, or counts as one whom we cannot reach
MEETING_SECONDS = GRACE_SECONDS + 0.15  # for which who joins waits for others after the last: they have judged by then
FIRST_LOOK_SECONDS = 1.5  # what a way of finding that hangs may cost who joins ...
FIRST_DIALS_SECONDS = 3.0  # ... and those whom it has found, if none of them answers
DIALS_AT_ONCE = 32
BACK_OFF_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
BACK_OFF_SHORT = 5.0  # the longest for a peer named by a setting: it may come back under the same address
REFUSED_SECONDS = 60.0  # for whom a peer without our secret is left alone: it may be given it
FORGET_SECONDS = 60.0  # after which a peer that cannot be reached, and is not seen any more, is forgotten
MAX_CANDIDATES = 2000


@dataclass
class Candidate:
    """A peer that may be there, and when it is tried next.

    ``peer_id`` None: whoever is at its address, which was ``turned_out`` to be somebody when we asked last.
    """

    peer_id: ID | None
    addresses: list[str]
    how: str
    seen: float
    failures: int = 0
    next_try: float = 0.0
    dialling: bool = False
    doubted: bool = False  # a member says that it is gone, and none that it is there
    turned_out: ID | None = None

    def failed(self, now: float, *, refused: bool) -> None:
        """It was dialled in vain."""
        wait = BACK_OFF_SECONDS[min(self.failures, len(BACK_OFF_SECONDS) - 1)]
        self.failures += 1
        if self.how == "bootstrap":
            wait = min(wait, BACK_OFF_SHORT)
        self.next_try = now + (REFUSED_SECONDS if refused else wait)


@dataclass
class Candidates:
    """The peers that may be there. Knows no clock: every event takes ``now``, in seconds."""

    ours: ID
    _known: dict[ID | str, Candidate] = field(default_factory=dict)
    _awaited: dict[ID, float] = field(default_factory=dict)  # members of members whom we do not reach yet: since when

    def sighted(self, sighting: Sighting, now: float) -> bool:
        """Somebody may be there; whether that is news."""
        try:
            peer_id = peer_of(sighting.peer_id) if sighting.peer_id else None
        except Exception:  # py-libp2p has no one error for a peer ID that is none
            return False
        if peer_id == self.ours or not sighting.addresses:
            return False
        known = self._known.get(peer_id or sighting.addresses[0])
        if known is not None:
            # What it says of itself once it is a member is more than what is said of it.
            known.addresses = list(dict.fromkeys([*sighting.addresses, *known.addresses]))[:MAX_ADDRESSES]
            known.seen = now
            known.doubted = known.doubted and sighting.how != "peers"
            if known.how == "dht":  # whose servers may say anything
                known.how = sighting.how
            return False
        if len(self._known) >= MAX_CANDIDATES:
            return False
        self._known[peer_id or sighting.addresses[0]] = Candidate(peer_id, list(sighting.addresses), sighting.how, now)
        return True

    def get(self, peer_id: ID) -> Candidate | None:
        return self._known.get(peer_id)

    def awaits(self, peer_ids: Collection[ID], now: float) -> None:
        """A member reaches them: so shall we, before long."""
        for peer_id in peer_ids:
            self._awaited.setdefault(peer_id, now)

    def unreached(self, peer_ids: Collection[ID], now: float) -> int:
        """How many of these cannot be reached: tried in vain, or not reached for so long that it comes to the same."""
        for gone in self._awaited.keys() - set(peer_ids):
            del self._awaited[gone]
        since = [(self._known.get(p), self._awaited.setdefault(p, now)) for p in peer_ids]
        return sum(1 for known, first in since if known is None or known.failures or now - first >= GRACE_SECONDS)

    def promising(self) -> set[ID]:
        """Who may well be there: neither dialled in vain nor doubted, nor named by a stranger alone."""
        return {
            one.peer_id
            for one in self._known.values()
            if one.peer_id is not None and not one.failures and not one.doubted and one.how != "dht"
        }

    def everybody(self) -> set[ID]:
        """Who may be there."""
        return {one.peer_id for one in self._known.values() if one.peer_id is not None}

    def doubt(self, peer_ids: Collection[ID]) -> None:
        """Nobody knows them any more."""
        for peer_id in peer_ids:
            if peer_id in self._known:
                self._known[peer_id].doubted = True

    def dialling(self) -> bool:
        return any(one.dialling for one in self._known.values())

    def due(self, members: Collection[ID], now: float, wanted: Collection[ID] | None = None) -> list[Candidate]:
        """Whom to dial now; of those who are ``wanted``, or else of all."""
        under_way = min(sum(one.dialling for one in self._known.values()), DIALS_AT_ONCE)
        due = [one for one in self._idle(members, wanted) if one.next_try <= now]
        return due[: DIALS_AT_ONCE - under_way]

    def next_due(self, members: Collection[ID], wanted: Collection[ID] | None = None) -> float:
        """When the next one is due."""
        return min((one.next_try for one in self._idle(members, wanted)), default=math.inf)

    def _idle(self, members: Collection[ID], wanted: Collection[ID] | None) -> Iterator[Candidate]:
        """Who is neither a member nor being dialled."""
        for one in self._known.values():
            if one.dialling or (one.peer_id or one.turned_out) in members:
                continue
            if wanted is None or one.peer_id in wanted:
                yield one

    def forget_lost(self, members: Collection[ID], now: float) -> list[ID]:
        """Those who have failed often, and are not seen any more, are forgotten; returns who."""
        lost = [
            key
            for key, one in self._known.items()
            if one.failures > len(BACK_OFF_SECONDS)
            and now - one.seen > FORGET_SECONDS
            and one.how != "bootstrap"
            and one.peer_id not in members
        ]
        for key in lost:
            del self._known[key]
        return [key for key in lost if isinstance(key, ID)]

    def found_out(self, candidate: Candidate, peer_id: ID, now: float) -> None:
        """Whoever is at a candidate's address is ``peer_id``, this time."""
        candidate.turned_out, candidate.next_try = peer_id, now + BACK_OFF_SHORT
        if peer_id != self.ours:
            found = Sighting(peer_id=peer_id.to_bytes(), addresses=tuple(candidate.addresses), how=candidate.how)
            self.sighted(found, now)


class Search:
    """The ways of finding, side by side; each may fail alone, and is heard of once."""

    def __init__(self, fleet: Fleet, discoveries: list[Discovery]) -> None:
        self._fleet = fleet
        self._discoveries = discoveries
        self._failed: set[str] = set()
        self._news = trio.Event()
        self._dialled = trio.Event()
        self.candidates = Candidates(fleet.host.id)

    async def run(self, joined: Callable[[], Awaitable[None]]) -> None:
        """Look until cancelled; ``joined`` is called once everybody who was found first has been tried.

        Those whom they know are tried as well; but once there are members nobody is waited for who does not answer.
        """
        async with trio.open_nursery() as nursery:
            first = []
            for discovery in self._discoveries:
                looked = trio.Event()
                first.append(looked)
                nursery.start_soon(self._look, discovery, looked)
            with trio.move_on_after(FIRST_LOOK_SECONDS):
                for looked in first:
                    await looked.wait()
            with trio.move_on_after(FIRST_DIALS_SECONDS) as patience:
                known = 0
                while self._dial_due() or self.candidates.dialling():
                    if len(self._fleet.members) > known:
                        known = len(self._fleet.members)
                        patience.deadline = min(patience.deadline, trio.current_time() + MEETING_SECONDS)
                    await self._news.wait()
            await joined()
            while True:
                self._dial_due()
                with trio.move_on_after(self._until_due()):
                    await self._news.wait()

    def _dial_due(self) -> bool:
        """Begin to dial those who are due; whether there were any."""
        if self._news.is_set():
            self._fleet.reach.find_core()  # whoever was just told of may be more than one mesh can have
            self._news = trio.Event()
        due = self._due()
        for candidate in due:
            candidate.dialling = True
            self._fleet.spawn(self._dial, candidate)
        return bool(due)

    def _until_due(self) -> float:
        """How many seconds it may take until somebody is to be dialled of whom we know already."""
        due = self.candidates.next_due(self._fleet.members, self._fleet.reach.wanted)
        return min(max(0.05, due - trio.current_time()), LOOK_AROUND_LATER)

    async def _look(self, discovery: Discovery, looked: trio.Event) -> None:
        began = trio.current_time()
        if discovery.late:
            looked.set()
            await trio.sleep(LATE_SECONDS)
        while not await self._tried(
            discovery, discovery.announce, self._fleet.host.id.to_bytes(), self._fleet.addresses
        ):
            looked.set()
            await trio.sleep(ANNOUNCE_AGAIN)
        while True:
            await self._tried(discovery, self._find, discovery)
            looked.set()
            forming = trio.current_time() - began < FORMING_SECONDS
            await trio.sleep(max(discovery.pause, LOOK_AROUND_SECONDS if forming else LOOK_AROUND_LATER))

    async def _find(self, discovery: Discovery) -> None:
        for sighting in await discovery.find():
            self.sighted(sighting)

    async def withdraw(self) -> None:
        """Take back what was announced."""
        async with trio.open_nursery() as nursery:
            for discovery in self._discoveries:
                nursery.start_soon(self._tried, discovery, discovery.withdraw)

    async def _tried(self, discovery: Discovery, func: Callable[..., Awaitable[None]], *arguments: Any) -> bool:
        try:
            await func(*arguments)
        except OSError as exc:
            if discovery.name not in self._failed:
                self._failed.add(discovery.name)
                logger.warning("%s cannot be used to find peers: %s", discovery.name, exc)
            return False
        except Exception as exc:  # what others write, and libraries that read it: this way fails, and no other
            logger.debug("%s has failed: %r", discovery.name, exc, exc_info=True)
            return False
        self._failed.discard(discovery.name)
        return True

    def sighted(self, sighting: Sighting) -> None:
        """Somebody may be there: it is dialled when it is due."""
        if self.candidates.sighted(sighting, trio.current_time()):
            self._news.set()

    def look_again(self) -> None:
        """Somebody may be due by now."""
        self._news.set()

    def _due(self) -> list[Candidate]:
        now, members = trio.current_time(), self._fleet.members
        for peer_id in self.candidates.forget_lost(members, now):
            self._fleet.host.forget(peer_id)
        return self.candidates.due(members, now, self._fleet.reach.wanted)

    async def reach(self, peer_id: ID, timeout: float) -> None:
        """Dial somebody who is known, now. Raises OSError if it is no member within ``timeout`` seconds."""
        candidate = self.candidates.get(peer_id)
        if candidate is None:
            raise OSError("it is not known any more")
        if not candidate.dialling:
            candidate.dialling = True
            self._fleet.spawn(self._dial, candidate)
        with trio.move_on_after(timeout):
            while candidate.dialling:
                await self._dialled.wait()
        if peer_id not in self._fleet.members:
            raise OSError("it is not reached")

    async def _dial(self, candidate: Candidate) -> None:
        try:
            if candidate.peer_id is None:
                await self._find_out(candidate)
            else:
                await self._fleet.dial(candidate, candidate.peer_id)
        except Exception as exc:
            logger.debug("a peer found by %s was not reached: %r", candidate.how, exc)
            candidate.failed(trio.current_time(), refused=isinstance(exc, Rejected))
        else:
            candidate.failures = 0
        finally:
            candidate.dialling = False
            self._news.set()
            self._dialled.set()
            self._dialled = trio.Event()
            self._fleet.reach.changed()

    async def _find_out(self, candidate: Candidate) -> None:
        """Who is at an address whose peer ID was not said: it may be another after each restart."""
        peer_id = await self._fleet.host.who_is_at(candidate.addresses, DIAL_SECONDS)
        self.candidates.found_out(candidate, peer_id, trio.current_time())
        self._news.set()
