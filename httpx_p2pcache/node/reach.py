"""Who knows whom: what members tell each other of their members, and what follows from that.

How many of them we cannot reach, whether they are more than one mesh can have, who are the homes then, and to whom we
are to be connected.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import trio
from libp2p.peer.id import ID

from httpx_p2pcache.machine import proof_of_place
from httpx_p2pcache.multiaddrs import MAX_ADDRESSES, is_loopback
from httpx_p2pcache.node.discovery import Sighting
from httpx_p2pcache.node.homes import anchors_among, core_among, peer_of
from httpx_p2pcache.node.link import Link
from httpx_p2pcache.node.members import Member
from httpx_p2pcache.node.protocol import Acquainted, Introduce
from httpx_p2pcache.node.search import GRACE_SECONDS

if TYPE_CHECKING:
    from httpx_p2pcache.node.fleet import Fleet

JUDGE_SECONDS = 0.01  # for which what is new about members is collected, longer the more there are
MAX_KNOWN = 1000  # members that one member may have


class Reach:
    """Which members know which, and what this node makes of it. Everything runs in its loop."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._members = fleet.members
        self.unreached = 0  # how many members of our members we cannot reach
        self.there: set[ID] = set()  # members, and members of members
        self.large = False  # more nodes than one mesh can have
        self.core = frozenset({fleet.host.id})  # see homes
        self.wanted: frozenset[ID] | None = None  # whom to be connected to: None for everybody
        self._judging = False
        self._reminded = itertools.count()
        self._turns = itertools.count(time.time_ns())  # a node that begins anew goes on above what it has said before

    async def introduce(self, link: Link) -> None:
        """Tell a peer who we are, and whom we know. Raises OSError if it is gone."""
        others = [(p, m) for p, m in self._members.items() if p != link.peer_id and self.matters(p)]
        members = [(p.to_bytes(), m.addresses[:MAX_ADDRESSES]) for p, m in others]
        takes, ready = self._fleet.settings.max_body_size, self._fleet.joined.is_set()
        addresses = self._fleet.addresses[:MAX_ADDRESSES]
        place = proof_of_place(self._fleet.host.id.to_bytes(), link.peer_id.to_bytes())
        link.told, link.told_unreached, link.turn = {p for p, _ in others}, self.unreached, next(self._turns)
        await link.send(Introduce(addresses, place, members, takes, ready, self.unreached, link.turn))

    def told(self, link: Link, said: Acquainted) -> None:
        """A member tells whom it knows: they may be there for us as well."""
        member = self._members.get(link.peer_id)
        if member is None:
            return
        local = any(is_loopback(address) for address in member.addresses)
        for peer_id, addresses in said.come:
            known = tuple(a for a in addresses if local or not is_loopback(a))
            self._fleet.search.sighted(Sighting(peer_id=peer_id, addresses=known, how="peers"))
        come = {peer_of(peer_id) for peer_id, _ in said.come}
        self._fleet.search.candidates.awaits(come - self._members.keys(), trio.current_time())
        link.knows |= come
        link.knows -= {peer_of(peer_id) for peer_id in said.gone}
        # It has two links where both have dialled, and what is said on one may be overtaken on the other.
        if said.turn >= member.turn:
            before = member.knows, member.unreached
            member.knows, member.unreached = set(list(link.knows)[:MAX_KNOWN]), said.unreached
            member.turn = said.turn
            if before != (member.knows, member.unreached):
                self.changed()
        if come - self._members.keys() - {self._fleet.host.id}:
            self._fleet.spawn(self._judge_later)

    def changed(self) -> None:
        """Somebody has come or gone, here or at a member: what that means is found out soon, for all who do at once."""
        if not self._judging:
            self._judging = True
            self._fleet.spawn(self._judge)

    async def _judge_later(self) -> None:
        await trio.sleep(GRACE_SECONDS)
        self.changed()

    async def _judge(self) -> None:
        """Do we still reach all whom our members reach? Each member is told what is new since it was told last: two
        that come at the same moment learn of each other only so."""
        await trio.sleep(min(max(JUDGE_SECONDS, len(self._members) * JUDGE_SECONDS / 5), GRACE_SECONDS))
        self._judging = False
        told: set[ID] = set().union(*(member.knows for member in self._members.values())) - {self._fleet.host.id}
        there, before = told | self._members.keys(), self.there
        self.there = there
        if self.large:  # where not everybody is dialled, who is known to nobody any more is not counted upon
            self._fleet.search.candidates.doubt(before - there)
        self.find_core()
        missing = told - self._members.keys() if self.wanted is None else (told & self.wanted) - self._members.keys()
        self.unreached = self._fleet.search.candidates.unreached(missing, trio.current_time())
        shown = {peer_id for peer_id in self._members if self.matters(peer_id)}
        for member in list(self._members.values()):
            if member.links and (link := member.links[0]).introduced.is_set():
                ours = shown - {link.peer_id}
                last = max(member.links, key=lambda one: one.turn)  # on which it was told last how things are
                if ours != last.told or last.told_unreached != self.unreached:
                    come, gone = sorted(ours - link.told, key=ID.to_bytes), sorted(link.told - ours, key=ID.to_bytes)
                    link.told, link.told_unreached, link.turn = ours, self.unreached, next(self._turns)
                    new = [(p.to_bytes(), self._members[p].addresses[:MAX_ADDRESSES]) for p in come]
                    left = [p.to_bytes() for p in gone]
                    self._fleet.spawn(link.send, Acquainted(new, left, self.unreached, link.turn))

    def matters(self, peer_id: ID) -> bool:
        """Whether everybody should know of it: it can be a home."""
        return not self.large or peer_id in self.core

    def find_core(self) -> None:
        """Who are the homes, and to whom are we connected? In a small fleet the same: everybody."""
        ours, candidates = self._fleet.host.id, self._fleet.search.candidates
        known = candidates.promising() | self._members.keys() | {ours}
        self.core, self.wanted = core_among(known), None
        self.large = len(self.core) < len(known)
        if self.large:
            failing = core_among(candidates.everybody() | known) - self.core
            linked = self.core & self._members.keys()
            # Who fails to reach more of the core than it reaches, behind NAT, tries them all.
            central = ours in self.core or len(failing) > len(linked)
            self.wanted = (self.core if central else anchors_among(self.core, ours)) | failing

    def unknown_to(self, peer_id: ID) -> list[Member]:
        """The members whom a member cannot tell something itself."""
        member = self._members.get(peer_id)
        if member is None:
            return []
        return [one for one in self._members.values() if one is not member and one.peer_id not in member.knows]

    async def remind(self) -> None:
        """One member in turn is told all anew, whatever it may have missed."""
        if self._members:
            member = list(self._members.values())[next(self._reminded) % len(self._members)]
            if member.links:
                await self.introduce(member.links[0])
