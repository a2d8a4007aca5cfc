"""Counters of one process, in the words its users know."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Mapping

COUNTERS = (
    "requests",  # everything that came through the transport
    "local_hits",  # answered from this runner's store, the origin not asked
    "peer_hits",  # answered with what a peer held or was fetching, the origin not asked
    "coalesced",  # of the hits: waited for another request's fetch of the same thing
    "revalidated",  # the origin said 304: free of quota, and the stored body served
    "expirations",  # an entry was held, and had to be validated
    "stale_served",  # the origin failed or refused, and a stale entry was served
    "origin_calls",  # requests that reached the origin, 304s included
    "not_modified",  # of these: answered with 304, to our condition or the caller's own, which is free of quota
    "origin_ms",  # milliseconds that the origin took for them, to the head of its answer
    "stored",  # responses saved from the origin
    "received",  # entries accepted from peers
    "published",  # entries handed to the fleet
    "peer_timeouts",  # questions to peers that were not answered within the look-up budget
    "peer_failures",  # all that went wrong with peers, these included
    "rejected",  # what peers sent that was not believed, and strangers that were not admitted
    "validators_held",  # own answers whose entity tag was the one computed for it
    "validators_failed",  # own answers whose entity tag was another
    "bytes_from_cache",  # body bytes that the origin did not have to send
)
MAX_ENDPOINTS = 200  # kept apart; what comes beyond is counted as OTHERS
OTHERS = "others"

Counts = dict[str, dict[str, int]]  # by endpoint, by counter; "" is what belongs to no request


class Stats:
    """Thread-safe counters; ``add`` costs well under a microsecond."""

    def __init__(self) -> None:
        self._counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._lock = threading.Lock()

    def add(self, name: str, amount: int = 1, endpoint: str = "") -> None:
        """Count ``amount`` for a counter of :data:`COUNTERS`, and for the kind of resource that was asked for."""
        with self._lock:
            if endpoint not in self._counts and len(self._counts) >= MAX_ENDPOINTS:
                endpoint = OTHERS
            self._counts[endpoint][name] += amount

    def snapshot(self) -> dict[str, int]:
        """Every counter of :data:`COUNTERS`, whole numbers from 0."""
        return total(self.by_endpoint())

    def by_endpoint(self) -> Counts:
        with self._lock:
            return {endpoint: dict(counts) for endpoint, counts in self._counts.items()}


def total(counts: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """The counters of all endpoints together."""
    return {name: sum(one.get(name, 0) for one in counts.values()) for name in COUNTERS}


def summary(counts: Mapping[str, int]) -> dict[str, int | float]:
    """The counters with the figures made of them.

    ``hits``, ``misses``, ``hit_rate`` (0 to 1), ``api_calls_made`` (that counted), ``api_calls_saved`` and
    ``seconds_saved``: what the hits would have taken at the origin, at its mean time for an answer.
    """
    hits = counts["local_hits"] + counts["peer_hits"]
    calls = counts["origin_calls"] - counts["not_modified"]
    mean = counts["origin_ms"] / counts["origin_calls"] / 1000 if counts["origin_calls"] else 0.0
    return {
        **counts,
        "total_requests": counts["requests"],
        "hits": hits,
        "misses": counts["requests"] - hits,
        "hit_rate": hits / counts["requests"] if counts["requests"] else 0.0,
        "api_calls_saved": hits + counts["revalidated"],
        "api_calls_made": calls,
        "seconds_saved": round(hits * mean, 3),
    }


def aggregate(runners: Mapping[str, Mapping[str, int]], peers: int) -> dict[str, int | float]:
    """The fleet's figures: those of all ``runners`` together, with what users of the first system read."""
    together = summary(total(runners))
    return {
        **together,
        "runners": len(runners),
        "total_api_calls": together["api_calls_made"],
        "total_cache_hits": together["hits"],
        "total_peers": peers,
    }
