"""A local hit: what it adds to a bare client, beside what hishel's own transport adds (SQLite, same response).

Of all three: undisturbed, and after another process that uses the same file has stored something else. Of ours besides
the first time that a process asks, when the entry is loaded from SQLite.
"""

from __future__ import annotations

import contextlib
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
CALLS = 20
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


KINDS: dict[str, Callable[[Path], httpx.BaseTransport]] = {
    "bare": lambda _: _AtOnce(),
    "hishel": lambda path: hishel.httpx.CacheTransport(
        _AtOnce(), hishel.SqliteStorage(database_path=path), rfc=hishel.CacheOptions(shared=False)
    ),
    "ours": lambda path: P2PCacheTransport(_AtOnce(), settings=Settings(dir=path, enable_p2p=False)),
}


def run() -> dict[str, Any]:
    logging.getLogger("httpx_p2pcache").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:

        def client(kind: str, file: str) -> httpx.Client:
            transport = KINDS[kind](Path(scratch) / f"{kind} {file}")
            return stack.enter_context(httpx.Client(transport=transport, headers=REQUEST))

        neighbours = [client(kind, "busy") for kind in KINDS]

        def neighbours_store() -> None:
            for one in neighbours:
                one.get(f"{URL}/issues", headers={"Cache-Control": "no-cache"})

        first = client("ours", "first")
        forget = first._transport._exchange.store._memory.clear  # type: ignore[attr-defined] # the public API has none
        calls = {
            **{(kind, "quiet"): _caller(client(kind, "quiet"), int) for kind in KINDS},
            **{(kind, "busy"): _caller(client(kind, "busy"), neighbours_store) for kind in KINDS},
            ("ours", "first"): _caller(first, forget),
        }
        times: dict[tuple[str, str], list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call()
        for _ in range(TURNS):
            for name, call in calls.items():
                times[name].append(call())
    micros = {name: statistics.median(taken) * 1e6 for name, taken in times.items()}
    bare = {"first": micros["bare", "quiet"]} | {
        when: value for (kind, when), value in micros.items() if kind == "bare"
    }
    hishels, ours = (
        {when: value - bare[when] for (kind, when), value in micros.items() if kind == name}
        for name in ("hishel", "ours")
    )
    return {
        "bare client, µs": round(bare["quiet"]),
        "hishel's transport adds, µs": round(hishels["quiet"]),
        "ours adds, µs": round(ours["quiet"]),
        "ratio to hishel's": round(ours["quiet"] / hishels["quiet"], 2),
        "after another process has stored something, bare client, µs": round(bare["busy"]),
        "after another process has stored something, hishel's adds, µs": round(hishels["busy"]),
        "after another process has stored something, ours adds, µs": round(ours["busy"]),
        "after another process has stored something, ratio to hishel's": round(ours["busy"] / hishels["busy"], 2),
        "the first time a process asks, ours adds, µs": round(ours["first"]),
        "the first time a process asks, ratio to hishel's": round(ours["first"] / hishels["quiet"], 2),
    }


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
