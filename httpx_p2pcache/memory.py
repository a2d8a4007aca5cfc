"""What was read or written last: entries decoded and with their decisions prepared, by cache key."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from httpx_p2pcache.stored import Stored

MEMORY_BYTES = 64 * 1024**2  # bodies kept in memory, for all URLs of one store

State = list[tuple[bytes, int]]  # the rows of a key: their ids, and hashes of what is in them that may change


@dataclass
class Remembered:
    """What memory holds for a key: valid in this version of the file, and later as long as this is its rows' state."""

    __slots__ = ("found", "state", "version")
    found: list[Stored]
    version: int
    state: State | None  # None: it was not loaded from them


class Memory:
    """Up to :data:`MEMORY_BYTES` of entries; what was used longest ago leaves first. Not thread-safe."""

    def __init__(self) -> None:
        self._keys: OrderedDict[bytes, Remembered] = OrderedDict()
        self._bytes = 0

    def get(self, key: bytes) -> Remembered | None:
        return self._keys.get(key)

    def used(self, key: bytes) -> None:
        """Note that a key that is held was used."""
        self._keys.move_to_end(key)

    def put(self, key: bytes, found: list[Stored], version: int, state: State | None) -> None:
        """Keep all that a key has now."""
        self.forget(key)
        self._keys[key] = Remembered(found, version, state)
        self._bytes += _size(found)
        while self._bytes > MEMORY_BYTES and len(self._keys) > 1:
            self.forget(next(iter(self._keys)))

    def forget(self, key: bytes) -> None:
        if key in self._keys:
            self._bytes -= _size(self._keys.pop(key).found)

    def clear(self) -> None:
        self._keys.clear()
        self._bytes = 0


def _size(found: list[Stored]) -> int:
    """Bytes in memory, more or less: a key of which nothing is held is remembered as well."""
    return 512 + sum(2048 + len(stored.entry.body) for stored in found)
