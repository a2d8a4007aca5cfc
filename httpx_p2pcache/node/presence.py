"""Is everybody still there, and does everybody belong here? Members that fall silent, are not needed, or never were."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio
from libp2p.peer.id import ID

from httpx_p2pcache.node.members import Member

if TYPE_CHECKING:
    from httpx_p2pcache.node.fleet import Fleet

ADMISSION_SECONDS = 3.0  # how long a stranger may stay before it has proved anything
SILENCE_SECONDS = 10.0  # after which a member is asked whether it is still there
URGENT_SECONDS = 1.0  # the same while somebody waits for it
PING_SECONDS = 2.0
UNREAD_SECONDS = 0.05  # for what had come already when we, kept from running, found that time was up
IDLE_SECONDS = 30.0  # after which who was asked is left again, in a fleet that is too large for a mesh
MAX_LINKS = 512  # members beyond which those are left that were not used for longest; each is a socket and some tasks


class Presence:
    """Who stays connected to this node. ``watch``, ``let_go`` and ``show_out_strangers`` are called again and again."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._strangers: dict[ID, float] = {}  # who is connected, and since when

    async def watch(self) -> None:
        """Claims that end are passed on; members that fall silent are asked, at once where somebody waits for them."""
        now = trio.current_time()
        home = self._fleet.home
        home.expire()
        self._fleet.fetches.expire()
        waited_for = home.owing() | self._fleet.questions.waits_at()
        for member in list(self._fleet.members.values()):
            for link in [link for link in member.links if link.is_stuck()]:
                self._fleet.spawn(link.close)
            silence = now - max(member.heard(), member.asked)
            if silence > SILENCE_SECONDS or (silence > URGENT_SECONDS and member.peer_id in waited_for):
                self.ask(member)

    async def let_go(self) -> None:
        """In a large fleet: whom we have asked and do not need any more, and more than we can keep.

        A node of the core leaves nobody who may be anchored there, unless they are too many.
        """
        fleet, now = self._fleet, trio.current_time()
        if not fleet.reach.large:
            return
        engaged = fleet.home.parties() | fleet.questions.waits_at() | fleet.fetches.granters()
        kept = engaged | (fleet.reach.wanted or frozenset())
        free = [member for peer_id, member in fleet.members.items() if peer_id not in kept and not member.busy()]
        free.sort(key=Member.used)
        surplus = max(0, len(fleet.members) - MAX_LINKS)
        leaving = free[:surplus]
        if fleet.host.id not in fleet.reach.core:
            idle = [member for member in free[surplus:] if now - member.used() > IDLE_SECONDS]
            leaving += [member for member in idle if member.dialled() or member.peer_id in fleet.reach.core]
        for member in leaving:
            fleet.reach.there.discard(member.peer_id)  # it is not gone
            await self.leave(member)

    async def leave(self, member: Member) -> None:
        for link in list(member.links):
            await link.close()
        await self._fleet.host.disconnect(member.peer_id)

    def suspect(self, peer_id: ID) -> None:
        """It has not answered in time: it is left alone until it is heard of, and dropped if it is not."""
        member = self._fleet.members.get(peer_id)
        if member is not None and not member.suspect:
            member.suspect = True
            self.ask(member)

    def ask(self, member: Member) -> None:
        """Ask a member whether it is there, and learn how far it is."""
        link = next((one for one in member.links if not one.closed.is_set()), None)
        if link is None:  # it is gone, and about to be forgotten
            return
        began = member.asked = trio.current_time()

        async def ping() -> None:
            try:
                member.rtt = await link.ping(PING_SECONDS)
            except OSError:
                await trio.sleep(UNREAD_SECONDS)
                if member.heard() <= began:  # else it is busy
                    await self.leave(member)
                    return
            member.suspect = False

        self._fleet.spawn(ping)

    async def show_out_strangers(self) -> None:
        """Who is connected but was not admitted in time is disconnected."""
        now = trio.current_time()
        strangers = [p for p in self._fleet.host.connected() if p not in self._fleet.members]
        self._strangers = {p: self._strangers.get(p, now) for p in strangers}
        for peer_id, since in self._strangers.items():
            expected = self._fleet.is_expected(peer_id) or peer_id in self._fleet.host.visiting
            if now - since > ADMISSION_SECONDS and not expected:
                self._fleet.spawn(self._fleet.host.disconnect, peer_id)
