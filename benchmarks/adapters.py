"""What each adapter adds to a request that is neither cached nor cacheable, in turns with the bare client."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import requests

from httpx_p2pcache import P2PCacheTransport, Settings
from httpx_p2pcache.integrations.requests import P2PCacheAdapter
from httpx_p2pcache.testing import Origin, Resource

ROUNDS, EACH = 15, 40
LATENCY = 0.02  # seconds: a fast answer of an API


def run() -> dict[str, Any]:
    found: dict[str, Any] = {}
    fields = {"Content-Type": "application/json", "Cache-Control": "no-store"}
    resources = {"/never-stored": Resource(b"x" * 2400, fields=fields, max_age=None)}
    with tempfile.TemporaryDirectory() as scratch, Origin(resources, latency=LATENCY) as origin:
        settings = Settings(dir=Path(scratch), enable_p2p=False)
        url = origin.url + "/never-stored"
        bare, cached = requests.Session(), requests.Session()
        cached.mount("http://", P2PCacheAdapter(settings=settings))
        pairs: dict[str, tuple[Callable[[str], Any], Callable[[str], Any]]] = {"requests": (bare.get, cached.get)}
        plain, ours = httpx.Client(trust_env=False), httpx.Client(transport=P2PCacheTransport(settings=settings))
        pairs["httpx"] = plain.get, ours.get
        for name, (without, with_cache) in pairs.items():
            ratios, medians = [], []
            for _ in range(ROUNDS):
                one, other = _median(without, url), _median(with_cache, url)
                ratios.append(other / one)
                medians.append((one, other))
            took = [statistics.median(m[side] for m in medians) * 1000 for side in (0, 1)]
            found[f"{name}, not cacheable, {LATENCY * 1000:.0f} ms latency: bare / through the cache, ms"] = (
                f"{took[0]:.2f} / {took[1]:.2f}"
            )
            found[f"{name}: what the cache adds (median of {ROUNDS} pairs)"] = f"{statistics.median(ratios) - 1:.1%}"
        for client in (bare, cached, plain, ours):
            client.close()
    return found


def _median(get: Callable[[str], Any], url: str) -> float:
    took = []
    for _ in range(EACH):
        began = time.perf_counter()
        get(url)
        took.append(time.perf_counter() - began)
    return statistics.median(took)
