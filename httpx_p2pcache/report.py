"""What has been counted, as people and scripts read it: totals with the figures made of them, endpoints, minutes."""

from __future__ import annotations

from typing import Any

from httpx_p2pcache.ledger import Ledger
from httpx_p2pcache.stats import COUNTERS, summary, total


def report(ledger: Ledger, since: float) -> dict[str, Any]:
    """A runner's counts since a Unix time: its name, ``total``, ``endpoints`` (the most saved first), ``minutes``."""
    counts = ledger.read(since)
    endpoints = [
        {"endpoint": endpoint, **_figures(summary(_whole(of)))} for endpoint, of in counts.items() if of.get("requests")
    ]
    return {
        "runner": ledger.runner(),
        "since": since,
        "total": summary(total(counts)),
        "endpoints": sorted(endpoints, key=lambda one: (-one["api_calls_saved"], one["endpoint"])),
        "minutes": [{"at": at, **_figures(summary(_whole(of)))} for at, of in ledger.by_minute(since)],
    }


def _whole(counts: dict[str, int]) -> dict[str, int]:
    return dict.fromkeys(COUNTERS, 0) | counts


def _figures(counts: dict[str, int | float]) -> dict[str, Any]:
    names = ("requests", "local_hits", "peer_hits", "revalidated", "api_calls_made", "api_calls_saved", "hit_rate")
    return {name: counts[name] for name in names}
