"""*Whose key is it?* Which nodes are homes, and of what: the same in the eyes of all who know the same nodes.

A fleet of up to :data:`MESH` nodes is one mesh: everybody is connected to everybody, and a home. In a larger one the
:data:`MESH` nodes of least weight are the core: among them it is as in a small fleet, and they alone are homes. All
others keep a connection to :data:`ANCHORS` of them, and have others to those whom they ask, for as long as they ask. So
neither what a node has to know grows with the fleet, nor what a miss costs.

Weights are those of rendezvous hashing (Thaler and Ravishankar 1998): who comes or goes moves its own part alone.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from libp2p.peer.id import ID

if TYPE_CHECKING:
    from httpx_p2pcache.node.fleet import Fleet
    from httpx_p2pcache.node.members import Member

MAX_HOMES = 3  # looked for in turn, when one after another is not reached, or is lost while we wait there
MESH = 50
ANCHORS = 2  # by which a node outside the core hears of writes, quotas and the core's changes


def home_among(unreached: Mapping[ID, int], key: bytes) -> ID:
    """The home of ``key`` among nodes of which each has that many members of the fleet that it cannot reach.

    Only those that reach the most can be homes: in a fleet behind NAT that is its hub, and every node sees the same.
    """
    least = min(unreached.values())
    return max((peer_id for peer_id, count in unreached.items() if count == least), key=lambda p: _weight(p, key))


def core_among(known: Collection[ID]) -> frozenset[ID]:
    """The core of a fleet of these nodes: all of them, up to :data:`MESH`."""
    return frozenset(known if len(known) <= MESH else heapq.nsmallest(MESH, known, key=rank))


def anchors_among(core: Collection[ID], ours: ID) -> frozenset[ID]:
    """Those of the core to whom a node outside it keeps a connection: spread evenly over the core."""
    return frozenset(heapq.nlargest(ANCHORS, core, key=lambda p: _weight(p, ours.to_bytes())))


@lru_cache(maxsize=16_384)
def peer_of(data: bytes) -> ID:
    """The peer ID of these bytes: always the same object, as libp2p's compare slowly. Raises what libp2p raises."""
    return ID(data)


def _weight(peer_id: ID, key: bytes) -> bytes:
    return hashlib.blake2b(peer_id.to_bytes() + key, digest_size=8).digest()


@lru_cache(maxsize=16_384)
def rank(peer_id: ID) -> bytes:
    """The least are the core."""
    return _weight(peer_id, b"core")


class Homes:
    """The homes as one node of a fleet sees them in this moment."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def now(self, key: bytes, *, local: bool = False) -> ID:
        """Who is home to ``key``, in a large fleet perhaps somebody we are not connected to.

        ``local``: of what is at a host of this machine, which only members here can make sense of.
        """
        fleet = self._fleet
        local = local and not all(member.here for member in fleet.members.values())
        unreached = {m.peer_id: m.unreached for m in fleet.members.values() if m.usable() and (m.here or not local)}
        if fleet.reach.large and not local:  # who is no member is dialled once it is asked
            known = {p: unreached.get(p, 0) for p in fleet.reach.core if p in unreached or p not in fleet.members}
            known.pop(fleet.host.id, None)
            # The hub of a large fleet behind NAT need not be of its core.
            if known and fleet.host.id not in fleet.reach.core and fleet.reach.unreached >= min(known.values()):
                return home_among(known, key)
            unreached = known
        return home_among({**unreached, fleet.host.id: fleet.reach.unreached}, key)

    async def of(self, key: bytes, *, local: bool = False) -> Member | None:
        """The member that is home to ``key``, if need be connected to first; None if it is this node. As :meth:`now`.

        Raises OSError if it is not reached in time, and that its place is another's then.
        """
        fleet = self._fleet
        for _ in range(MAX_HOMES):
            home = self.now(key, local=local)
            if home == fleet.host.id:
                return None
            if home not in fleet.members:
                try:
                    await fleet.search.reach(home, fleet.settings.lookup_timeout)
                except OSError:
                    fleet.reach.find_core()  # without it
                    continue
                if not fleet.members[home].usable():
                    continue
            return fleet.members[home]
        raise OSError("no home is reached")
