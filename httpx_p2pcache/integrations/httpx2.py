"""The cache for httpx2: ``httpx2.Client(transport=P2PCacheTransport())``, sync or async. httpx is not imported."""

from __future__ import annotations

from typing import Any, ClassVar

import httpx2

from httpx_p2pcache.caching import CachingTransport
from httpx_p2pcache.settings import Settings


class P2PCacheTransport(CachingTransport, httpx2.BaseTransport, httpx2.AsyncBaseTransport):
    """For ``httpx2.Client`` and ``AsyncClient`` what :class:`httpx_p2pcache.P2PCacheTransport` is for httpx's."""

    _library: ClassVar[Any] = httpx2

    def __init__(
        self,
        next_transport: httpx2.BaseTransport | httpx2.AsyncBaseTransport | None = None,
        *,
        settings: Settings | None = None,
    ) -> None:
        super().__init__(next_transport, settings=settings)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response: httpx2.Response = self._handle(request)
        return response

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response: httpx2.Response = await self._handle_async(request)
        return response
