"""*Who is there?* Each way of finding peers is a :class:`Discovery`; they run side by side, and each may fail alone.

Most of them block: they are a :class:`Finder`, which :class:`InThread` makes a discovery of.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import msgspec
from msgspec import Meta

from httpx_p2pcache.entries import Keyring
from httpx_p2pcache.exceptions import UNDECODABLE, Rejected
from httpx_p2pcache.multiaddrs import MAX_ADDRESSES, is_loopback
from httpx_p2pcache.node.protocol import Address, PeerBytes


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """A peer that may be there: its ID in bytes (b"": whoever it is), multiaddrs without it, and how it was found."""

    peer_id: bytes
    addresses: tuple[str, ...]
    how: str


class Discovery(Protocol):
    """A way of finding peers. All methods raise OSError when they fail, and have an end.

    - ``find`` may name peers that are gone, and ourselves; the node sorts them out.
    - ``withdraw`` takes back what ``announce`` has left anywhere.
    - ``pause`` is for how many seconds it is left alone between two calls of ``find``, at the least.
    - ``late``: it is not needed where others have found somebody within a few seconds, and begins after them.
    """

    name: str
    pause: float
    late: bool

    async def announce(self, peer_id: bytes, addresses: list[str]) -> None: ...

    async def find(self) -> list[Sighting]: ...

    async def withdraw(self) -> None: ...


class Finder(Protocol):
    """A discovery that blocks; called from a worker thread, one call at a time."""

    pause: float

    def announce(self, peer_id: bytes, addresses: list[str]) -> None: ...

    def find(self) -> list[Sighting]: ...

    def withdraw(self) -> None: ...


class InThread:
    """A finder as a discovery: ``run`` calls a function in some worker thread."""

    def __init__(
        self, finder: Finder, run: Callable[[Callable[[], Any]], Awaitable[Any]], *, late: bool = False
    ) -> None:
        self._finder, self._run = finder, run
        self.name, self.pause, self.late = type(finder).__name__, finder.pause, late

    async def announce(self, peer_id: bytes, addresses: list[str]) -> None:
        await self._run(lambda: self._finder.announce(peer_id, addresses))

    async def find(self) -> list[Sighting]:
        found: list[Sighting] = await self._run(self._finder.find)
        return found

    async def withdraw(self) -> None:
        await self._run(self._finder.withdraw)


class Record(msgspec.Struct, frozen=True, array_like=True):
    """A node's addresses as it leaves them where others look; sealed, so that only the fleet can read them."""

    peer_id: PeerBytes
    addresses: Annotated[list[Address], Meta(max_length=MAX_ADDRESSES)]
    host: Annotated[str, Meta(max_length=256)]  # loopback addresses are for the same host only
    written: Annotated[float, Meta(ge=0, le=2**40)]  # Unix time

    def seal(self, keyring: Keyring, place: bytes) -> bytes:
        return keyring.seal(msgspec.msgpack.encode(self), place)

    @classmethod
    def open(cls, sealed: bytes, keyring: Keyring, place: bytes) -> Record:
        """Raises :class:`Rejected` for what the fleet has not sealed for this ``place``."""
        try:
            return _RECORD.decode(keyring.open(sealed, place))
        except UNDECODABLE as exc:
            raise Rejected("it is not a record of addresses") from exc

    def sighting(self, host: str, how: str) -> Sighting:
        """What the record tells a node on ``host``."""
        here = self.host == host
        known = tuple(a for a in self.addresses if here or not is_loopback(a))
        return Sighting(peer_id=self.peer_id, addresses=known, how=how)


_RECORD = msgspec.msgpack.Decoder(Record)
