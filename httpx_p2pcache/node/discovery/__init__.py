"""*Who is there?* Each way of finding peers is a :class:`Discovery`; they run side by side, and each may fail alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """A peer that may be there: its ID in bytes (b"": whoever it is), multiaddrs without it, and how it was found."""

    peer_id: bytes
    addresses: tuple[str, ...]
    how: str


class Discovery(Protocol):
    """A way of finding peers.

    - Called from a worker thread, one call at a time; a call may touch the disk, and raises OSError when it fails.
      One that is ``slow``, as it asks over the network, has a thread of its own, and says when it must have an end.
    - ``pause`` is for how many seconds it is left alone between two calls of ``find``, at the least.
    - ``find`` may name peers that are gone, and ourselves; the node sorts them out.
    - ``withdraw`` takes back what ``announce`` has left anywhere.
    """

    slow: bool
    pause: float

    def announce(self, peer_id: bytes, addresses: list[str]) -> None: ...

    def find(self) -> list[Sighting]: ...

    def withdraw(self) -> None: ...
