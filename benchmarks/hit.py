"""A local hit: what it adds to a bare client, beside what hishel's own transport adds (SQLite, same response).

From memory; after another process of the runner has stored something else; and the first time that a process asks.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hishel
import hishel.httpx
import httpx

from httpx_p2pcache import P2PCacheTransport, Settings

TURNS = 40
CALLS = 50
BODY = b"x" * 13_900
URL = "https://api.github.com/repos/octo-org/octo-repo"
FIELDS = {
    "Content-Type": "application/json; charset=utf-8",
    "Cache-Control": "private, max-age=3600, s-maxage=60",
    "Vary": "Accept, Authorization, Cookie, X-GitHub-OTP, Accept-Encoding, Accept, X-Requested-With",
    "ETag": 'W/"6b48ee9bb449156fad1cafe6ee6806aef190819b67c61901b0c8d17760bf2653"',
    "Last-Modified": "Wed, 26 Jul 2023 17:50:01 GMT",
    "X-GitHub-Media-Type": "github.v3; format=json",
    "X-RateLimit-Limit": "5000",
    "X-RateLimit-Remaining": "4986",
    "X-RateLimit-Reset": "1690600508",
    "X-RateLimit-Used": "14",
    "X-RateLimit-Resource": "core",
    "Strict-Transport-Security": "max-age=31536000; includeSubdomains; preload",
    "X-Frame-Options": "deny",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'",
    "X-GitHub-Request-Id": "C804:4194:187E3F3:319CBA9:64C47981",
}
REQUEST = {"Accept": "application/vnd.github+json", "Authorization": "Bearer a-token"}


class _AtOnce(httpx.BaseTransport):
    """An origin that answers at once."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:  # noqa: ARG002 - the base class's signature
        return httpx.Response(200, headers=FIELDS, stream=httpx.ByteStream(BODY))


def run() -> dict[str, Any]:
    logging.getLogger("httpx_p2pcache").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        clients = {
            "bare": httpx.Client(transport=_AtOnce(), headers=REQUEST),
            "hishel": httpx.Client(
                transport=hishel.httpx.CacheTransport(
                    _AtOnce(),
                    hishel.SqliteStorage(database_path=Path(scratch) / "hishel.db"),
                    rfc=hishel.CacheOptions(shared=False),
                ),
                headers=REQUEST,
            ),
            "memory": httpx.Client(transport=_ours(Path(scratch) / "ours"), headers=REQUEST),
            "busy": httpx.Client(transport=_ours(Path(scratch) / "busy"), headers=REQUEST),
            "sqlite": httpx.Client(transport=_ours(Path(scratch) / "cold"), headers=REQUEST),
        }
        neighbour = httpx.Client(transport=_ours(Path(scratch) / "busy"), headers=REQUEST)
        befores: dict[str, Callable[[], object]] = {
            "busy": lambda: neighbour.get(f"{URL}/issues", headers={"Cache-Control": "no-cache"}),
            "sqlite": clients["sqlite"]._transport._exchange.store._forget_all,  # type: ignore[attr-defined] # not public
        }
        calls = {name: _caller(client, befores.get(name, int)) for name, client in clients.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call()
        for _ in range(TURNS):
            for name, call in calls.items():
                times[name].append(call())
        for client in [*clients.values(), neighbour]:
            client.close()
    micros = {name: statistics.median(taken) * 1e6 for name, taken in times.items()}
    added = {name: value - micros["bare"] for name, value in micros.items()}
    return {
        "bare client, µs": round(micros["bare"]),
        "hishel's transport adds, µs": round(added["hishel"]),
        "ours adds, from memory, µs": round(added["memory"]),
        "ours adds, after another process has written, µs": round(added["busy"]),
        "ours adds, the first time a process asks, µs": round(added["sqlite"]),
        "ratio to hishel's, from memory": round(added["memory"] / added["hishel"], 2),
        "ratio to hishel's, after another process has written": round(added["busy"] / added["hishel"], 2),
        "ratio to hishel's, the first time a process asks": round(added["sqlite"] / added["hishel"], 2),
    }


def _ours(directory: Path) -> P2PCacheTransport:
    return P2PCacheTransport(_AtOnce(), settings=Settings(dir=directory, enable_p2p=False))


def _caller(client: httpx.Client, before: Callable[[], object]) -> Callable[[], float]:
    """The seconds that a hit takes; ``before`` each of them something happens that is not counted."""

    def call() -> float:
        total = 0.0
        for _ in range(CALLS):
            before()
            started = time.perf_counter()
            client.get(URL)
            total += time.perf_counter() - started
        return total / CALLS

    return call
