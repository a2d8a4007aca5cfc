"""Members: the peers that have been admitted, and are connected."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import trio
from libp2p.peer.id import ID

from httpx_p2pcache.entries import Keyring
from httpx_p2pcache.node.link import Link
from httpx_p2pcache.node.protocol import TellCounts


@dataclass
class Member:
    """A peer that has been admitted and is connected."""

    peer_id: ID
    how: str  # found by, as a discovery names itself; or "peers", or "inbound"
    addresses: list[str]
    links: list[Link] = field(default_factory=list)
    since: float = field(default_factory=time.time)
    met: float = field(default_factory=trio.current_time)
    rtt: float | None = None
    ready: bool = False  # it knows the others, and is home to its keys
    here: bool = False  # on this machine, as it says
    takes: int = 0  # bytes of the largest body that it stores
    counts: dict[str, TellCounts] = field(default_factory=dict)  # what its runner, and those behind it, have counted
    told_counts: dict[str, TellCounts] = field(default_factory=dict)  # what we have told it
    knows: set[ID] = field(default_factory=set)  # its members
    unreached: int = 0  # how many members of its members it cannot reach
    turn: int = 0  # in which it has said so
    asked: float = 0.0  # when we have asked whether it is there, in the loop's time
    vain: int = 0  # how often what it said was being fetched did not come in time, since it has last come
    vain_until: float = 0.0  # in the loop's time: until then that is not waited for
    suspect: bool = False  # it has not answered in time: not asked again until it is heard of

    @property
    def link(self) -> Link:
        """The link to use: the oldest that is open, so that frames stay in order. Raises OSError when it is gone."""
        for link in self.links:
            if not link.closed.is_set():
                return link
        raise OSError("the peer is gone")

    async def send(self, frame: Any) -> None:
        """Write one frame. Raises OSError when the peer is gone."""
        await self.link.send(frame)

    @property
    def keyring(self) -> Keyring:
        return self.link.keyring

    def usable(self) -> bool:
        """Whether it is home to its keys, and can be asked."""
        if self.ready and not self.suspect:
            for link in self.links:
                if not link.closed.is_set():
                    return True
        return False

    def heard(self) -> float:
        """When it was last heard of, in the loop's time."""
        return max((link.heard for link in self.links), default=0.0)

    def used(self) -> float:
        """When it was last asked, or asked us, in the loop's time."""
        return max((link.used for link in self.links), default=0.0)

    def busy(self) -> bool:
        """Whether a call of ours is under way."""
        return any(link.busy for link in self.links)

    def dialled(self) -> bool:
        """Whether we have dialled it."""
        return any(link.dialled for link in self.links)

    def describe(self) -> dict[str, object]:
        """As ``status`` shows it: plain values, the round trip in milliseconds."""
        return {
            "peer_id": str(self.peer_id),
            "addresses": self.addresses,
            "how": self.how,
            "unreached": self.unreached,
            "rtt_ms": None if self.rtt is None else round(self.rtt * 1000, 2),
            "connected_for": round(time.time() - self.since, 1),
            "heard_ago": round(time.monotonic() - max((link.last for link in self.links), default=0.0), 1),
            "bytes_in": sum(link.received for link in self.links),
            "bytes_out": sum(link.sent for link in self.links),
        }
