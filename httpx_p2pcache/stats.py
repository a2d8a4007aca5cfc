"""Counters of one process, in the words its users know."""

from __future__ import annotations

import threading
from collections import Counter

COUNTERS = (
    "requests",  # everything that came through the transport
    "local_hits",  # answered from this runner's store, the origin not asked
    "peer_hits",  # answered with what a peer held or was fetching, the origin not asked
    "coalesced",  # of the hits: waited for another request's fetch of the same thing
    "revalidated",  # the origin said 304: free of quota, and the stored body served
    "stale_served",  # the origin failed or refused, and a stale entry was served
    "origin_calls",  # requests that reached the origin, 304s included
    "stored",  # responses saved from the origin
    "received",  # entries accepted from peers
    "published",  # entries handed to the fleet
    "peer_failures",  # questions to peers that got no usable answer in time
    "rejected",  # what peers sent that was not believed
    "validators_held",  # own answers whose entity tag was the one computed for it
    "validators_failed",  # own answers whose entity tag was another
    "bytes_from_cache",  # body bytes that the origin did not have to send
)


class Stats:
    """Thread-safe counters; ``add`` costs well under a microsecond."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._counts[name] += amount

    def snapshot(self) -> dict[str, int]:
        """Every counter of :data:`COUNTERS`, whole numbers from 0."""
        with self._lock:
            return {name: self._counts[name] for name in COUNTERS}


def summary(counts: dict[str, int]) -> dict[str, int | float]:
    """The counters with the figures made of them: ``hits``, ``misses``, ``hit_rate`` (0 to 1), ``api_calls_*``."""
    hits = counts["local_hits"] + counts["peer_hits"]
    calls = counts["origin_calls"] - counts["revalidated"]
    return {
        **counts,
        "total_requests": counts["requests"],
        "hits": hits,
        "misses": counts["requests"] - hits,
        "hit_rate": hits / counts["requests"] if counts["requests"] else 0.0,
        "api_calls_saved": hits + counts["revalidated"],
        "api_calls_made": calls,
    }
