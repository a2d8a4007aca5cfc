"""What a daemon says of itself, and takes orders by: the host ``p2pcache`` on its socket, and behind its token.

=================  ============================================================================================
``GET /status``    the daemon and its node, as JSON: what ``p2pcache status`` and ``peers`` show
``GET /stats``     the runner's counts, as JSON; ``since`` (Unix time); the fleet's are in the status
``GET /metrics``   the same for Prometheus
``GET /``          a page to look at
``POST /open``     open the door on a loopback port (``port``, 0 for any); answers with its URL
``POST /stop``     end
=================  ============================================================================================
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any, cast

import anyio.to_thread
import base58
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from httpx_p2pcache import __version__
from httpx_p2pcache.exchange import Exchange
from httpx_p2pcache.node.discovery.artifacts import artifact_name
from httpx_p2pcache.report import report

LATEST = 2**40  # as a time: some ten thousand years from now


class Control:
    """The orders of one daemon. ``describe`` adds what its process knows: sockets, processes attached, start."""

    def __init__(
        self,
        exchange: Exchange,
        describe: Callable[[], dict[str, Any]],
        open_port: Callable[[int], Awaitable[str]],
        stop: Callable[[], Awaitable[None]],
    ) -> None:
        self._exchange = exchange
        self._describe = describe
        self._open_port = open_port
        self._stop = stop
        self.app = Starlette(
            routes=[
                Route("/", self._page),
                Route("/status", self._status),
                Route("/stats", self._stats),
                Route("/metrics", self._metrics),
                Route("/open", self._open, methods=["POST"]),
                Route("/stop", self._end, methods=["POST"]),
            ]
        )

    async def _page(self, _: Request) -> Response:
        page = resources.files("httpx_p2pcache.daemon").joinpath("page.html").read_text("utf-8")
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        return HTMLResponse(page, headers={"content-security-policy": policy, "cache-control": "no-store"})

    async def _status(self, _: Request) -> Response:
        return JSONResponse(await anyio.to_thread.run_sync(self.status))

    def _artifact(self, peer_id: object, addresses: list[str]) -> str:
        """The name of an artifact that leads others here; "" where there is no node."""
        if not isinstance(peer_id, str) or not addresses:
            return ""
        return artifact_name(self._exchange.keyring, base58.b58decode(peer_id), addresses)

    def status(self) -> dict[str, Any]:
        """Plain values; may touch the disk."""
        described = self._exchange.describe()
        kept = (
            "aggregate",
            "p2p_enabled",
            "off_because",
            "peer_id",
            "addresses",
            "connected_peers",
            "unreached",
            "peers",
            "quotas",
            "cache_dir",
            "cache_size",
        )
        return {
            "version": __version__,
            "pid": os.getpid(),
            "now": time.time(),
            "fleet": self._exchange.settings.fleet,
            "label": self._exchange.keyring.label,
            "joined": self._exchange.network.active,
            **self._describe(),
            **{name: described[name] for name in (*kept, "total_size_bytes")},
            "artifact": self._artifact(described["peer_id"], cast("list[str]", described["addresses"])),
        }

    async def _stats(self, request: Request) -> Response:
        try:
            since = float(request.query_params.get("since", "0"))
        except ValueError:
            since = math.nan
        if not 0 <= since <= LATEST:
            return JSONResponse({"message": f"since must be a Unix time, a number from 0 to {LATEST}"}, 400)
        found = await anyio.to_thread.run_sync(lambda: report(self._exchange.ledger, since))
        return JSONResponse(found)

    async def _metrics(self, _: Request) -> Response:
        body = await anyio.to_thread.run_sync(self._exposition)
        return Response(body, media_type=CONTENT_TYPE_LATEST)

    def _exposition(self) -> bytes:
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> list[Metric]:
        """What ``prometheus_client`` calls: every counter by endpoint, and the node's state."""
        status = self.status()
        families: dict[str, CounterMetricFamily] = {}
        for endpoint, counts in self._exchange.ledger.read().items():
            for name, amount in counts.items():
                if name not in families:
                    families[name] = CounterMetricFamily(
                        f"p2pcache_{name}", name.replace("_", " "), labels=["endpoint"]
                    )
                families[name].add_metric([endpoint], amount)
        gauges = [
            GaugeMetricFamily("p2pcache_peers", "members of the fleet that are connected", status["connected_peers"]),
            GaugeMetricFamily("p2pcache_entries", "entries in the store", status["cache_size"]),
            GaugeMetricFamily("p2pcache_store_bytes", "bytes of the store", status["total_size_bytes"]),
            GaugeMetricFamily("p2pcache_processes", "processes attached", status["processes"]),
        ]
        quota = GaugeMetricFamily("p2pcache_quota_remaining", "calls left", labels=["identity", "resource"])
        for known in status["quotas"]:
            quota.add_metric([known["identity"], known["resource"]], known["remaining"])
        return [*families.values(), *gauges, quota]

    async def _open(self, request: Request) -> Response:
        text = request.query_params.get("port", "0")
        if not (text.isascii() and text.isdigit()) or int(text) > 65535:
            return JSONResponse({"message": f"port must be a number from 0 to 65535, not {text!r}"}, 400)
        try:
            return JSONResponse({"url": await self._open_port(int(text))})
        except OSError as exc:
            return JSONResponse({"message": f"the port cannot be opened: {exc}"}, 409)

    async def _end(self, _: Request) -> Response:
        return JSONResponse({"stopping": True}, background=BackgroundTask(self._stop))
