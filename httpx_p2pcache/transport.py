"""The door: ``httpx.Client(transport=P2PCacheTransport())``."""

from __future__ import annotations

from typing import Any, ClassVar

import httpx

from httpx_p2pcache.caching import CachingTransport
from httpx_p2pcache.settings import Settings


class P2PCacheTransport(CachingTransport, httpx.BaseTransport, httpx.AsyncBaseTransport):
    """An RFC 9111 cache that shares with the fleet; for ``httpx.Client`` and ``httpx.AsyncClient`` alike.

    ``next_transport`` reaches the origin (default: httpx's own, with the proxies of the environment); it must be of the
    client's kind, sync or async, else :class:`ConfigurationError` (a ``TypeError``) is raised at the first request.
    ``settings`` default to the environment's; :class:`SettingsError` is raised for a value that cannot be used.

    Every response carries ``Cache-Status`` (RFC 9211), and in ``extensions["caching"]`` what hishel puts there
    (``from_cache``, ``revalidated``, ``stored``) with ``source``: "local", "peer" or "origin".

    Constructing it starts the node in the background, or takes a tenth of a second at the most to reach the runner's
    daemon. ``close`` and ``aclose`` are idempotent, close ``next_transport`` as well, and return within two seconds.
    """

    _library: ClassVar[Any] = httpx

    def __init__(
        self,
        next_transport: httpx.BaseTransport | httpx.AsyncBaseTransport | None = None,
        *,
        settings: Settings | None = None,
    ) -> None:
        super().__init__(next_transport, settings=settings)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response: httpx.Response = self._handle(request)
        return response

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response: httpx.Response = await self._handle_async(request)
        return response
